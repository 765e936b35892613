"""What `kdbench new` does: a working one-file method to start from."""

import re
from pathlib import Path

from kdbench.errors import UserError
from kdbench.paths import METHODS

TEMPLATE = METHODS / "_template.py"
TEMPLATE_CLASS = "MeanOfLogits"


def write_method(name: str, folder: Path, taken: set[str]) -> Path:
    """Write `<name>.py` from the template, with a class of that name.

    Raises:
        UserError: the name is no Python name or taken, or the file exists or cannot be written.
    """
    if not name.isidentifier() or name.startswith("_"):
        raise UserError(f"'{name}' is no name for a method: use letters, digits and underscores.")
    if name in taken:
        raise UserError(f"A method '{name}' exists already; choose another name.")
    file = folder / f"{name}.py"
    class_name = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    template = TEMPLATE.read_text(encoding="utf-8")
    if class_name != TEMPLATE_CLASS and re.search(rf"\b{class_name}\b", template):
        raise UserError(f"'{name}' would hide a name that the method uses; choose another name.")
    source = template.replace(TEMPLATE_CLASS, class_name)
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(source)
    except FileExistsError:
        raise UserError(f"'{file}' exists already; choose another name.") from None
    except OSError as error:
        raise UserError(f"Cannot write '{file}': {error.strerror or error}.") from error
    return file
