"""An exported network and its model card, as two files."""

from dataclasses import dataclass
from pathlib import Path

from kdbench.atomic import atomic_write
from kdbench.errors import UserError
from kdbench.export.card import card_of
from kdbench.export.formats import FORMATS
from kdbench.export.model_card import model_card
from kdbench.export.student import Finished, label


@dataclass(frozen=True)
class Written:
    file: Path
    card: Path
    bytes: int
    """Of the file."""


def write(finished: Finished, form: str, output: Path, overwrite: bool = False) -> Written:
    """Write the network to a file, or to one named after the run in a folder.

    Raises:
        UserError: one of the files exists, cannot be written or has another format's suffix.
    """
    file = _place(finished, form, output)
    beside = file.with_name(f"{file.name}.md")
    for existing in (file, beside):
        if existing.exists() and not overwrite:
            raise UserError(f"'{existing}' exists; --overwrite replaces it.")
    card = card_of(finished)
    content = FORMATS[form].encode(finished.network, card)
    text = model_card(finished, card, file.name, form)
    for path, data in ((file, content), (beside, text.encode())):
        with atomic_write(path) as stream:
            stream.write(data)
    return Written(file, beside, len(content))


def _place(finished: Finished, form: str, output: Path) -> Path:
    if output.is_dir() or not output.suffix:
        return output / f"{label(finished.result.identity).replace('/', '-')}.{form}"
    if output.suffix != f".{form}":
        raise UserError(f"--output '{output}' must end in .{form}, or name a folder.")
    return output
