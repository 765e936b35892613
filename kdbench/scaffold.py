"""The `kdbench new` command: writes a working one-file method to start from."""

import re
from pathlib import Path

from kdbench.errors import UserError
from kdbench.paths import METHODS

TEMPLATE = METHODS / "_template.py"
TEMPLATE_CLASS = "MeanOfLogits"


def write_method(name: str, folder: Path, taken: set[str]) -> Path:
    """Write `<name>.py` from the template, with a class of that name.

    Raises:
        UserError: The name is not valid or already used, or the file exists or cannot be written.
    """
    if not name.isidentifier() or name.startswith("_"):
        raise UserError(
            f"'{name}' is not a valid method name; use letters, digits and underscores."
        )
    if name in taken:
        raise UserError(f"Method '{name}' already exists; choose another name.")
    file = folder / f"{name}.py"
    class_name = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    template = TEMPLATE.read_text(encoding="utf-8")
    if class_name != TEMPLATE_CLASS and re.search(rf"\b{class_name}\b", template):
        raise UserError(f"'{name}' conflicts with a name in the template; choose another name.")
    source = template.replace(TEMPLATE_CLASS, class_name)
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(source)
    except FileExistsError:
        raise UserError(f"'{file}' already exists; choose another name.") from None
    except OSError as error:
        raise UserError(f"Cannot write '{file}': {error.strerror or error}.") from error
    return file
