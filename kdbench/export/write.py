"""Writing of an exported network and its model card."""

from dataclasses import dataclass
from pathlib import Path

from kdbench.atomic import atomic_write
from kdbench.errors import UserError
from kdbench.export.card import make_card
from kdbench.export.formats import FORMATS
from kdbench.export.model_card import model_card
from kdbench.export.student import FinishedRun, label


@dataclass(frozen=True)
class ExportedFiles:
    """The files that an export wrote."""

    file: Path
    card: Path
    bytes: int
    """Size of the network's file."""


def write(finished: FinishedRun, form: str, output: Path, overwrite: bool = False) -> ExportedFiles:
    """Write the network and its model card.

    Args:
        finished: the run to export.
        form: name of the format.
        output: the file to write, or a folder in which the file is named after the run.
        overwrite: replace existing files.

    Raises:
        UserError: A file exists already or cannot be written, or the suffix is of another format.
    """
    file = _output_file(finished, form, output)
    card_file = file.with_name(f"{file.name}.md")
    for existing in (file, card_file):
        if existing.exists() and not overwrite:
            raise UserError(f"'{existing}' already exists; use --overwrite to replace it.")
    card = make_card(finished)
    content = FORMATS[form].encode(finished.network, card)
    text = model_card(finished, card, file.name, form)
    for path, data in ((file, content), (card_file, text.encode())):
        with atomic_write(path) as stream:
            stream.write(data)
    return ExportedFiles(file, card_file, len(content))


def _output_file(finished: FinishedRun, form: str, output: Path) -> Path:
    if output.is_dir() or not output.suffix:
        return output / f"{label(finished.result.identity).replace('/', '-')}.{form}"
    if output.suffix != f".{form}":
        raise UserError(f"--output '{output}' must end in .{form} or name a folder.")
    return output
