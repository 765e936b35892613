"""Writing of an exported network and its model card."""

from dataclasses import dataclass
from pathlib import Path

from kdbench.atomic import atomic_write
from kdbench.errors import UserError
from kdbench.export.card import make_card
from kdbench.export.formats import FORMATS
from kdbench.export.model_card import render_model_card
from kdbench.export.student import FinishedRun, format_label


@dataclass(frozen=True)
class ExportedFiles:
    """The files that an export wrote."""

    file: Path
    card: Path
    bytes: int
    """Size of the network's file."""


def write_export(
    finished: FinishedRun, format_name: str, output: Path, overwrite: bool = False
) -> ExportedFiles:
    """Write the network and its model card.

    Args:
        finished: the run to export.
        format_name: name of the format.
        output: the file to write, or a folder in which the file is named after the run.
        overwrite: replace existing files.

    Raises:
        UserError: A file exists already or cannot be written, or the suffix is of another format.
    """
    file = _output_file(finished, format_name, output)
    card_file = file.with_name(f"{file.name}.md")
    for existing in (file, card_file):
        if existing.exists() and not overwrite:
            raise UserError(f"'{existing}' already exists; use --overwrite to replace it.")
    card = make_card(finished)
    content = FORMATS[format_name].encode(finished.network, card)
    text = render_model_card(finished, card, file.name, format_name)
    for path, data in ((file, content), (card_file, text.encode())):
        with atomic_write(path) as stream:
            stream.write(data)
    return ExportedFiles(file, card_file, len(content))


def _output_file(finished: FinishedRun, format_name: str, output: Path) -> Path:
    if output.is_dir() or not output.suffix:
        return output / f"{format_label(finished.result.identity).replace('/', '-')}.{format_name}"
    if output.suffix != f".{format_name}":
        raise UserError(f"--output '{output}' must end in .{format_name} or name a folder.")
    return output
