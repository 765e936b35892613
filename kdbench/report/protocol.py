"""The suite that a result was made under."""

from pydantic import ValidationError

from kdbench.store import Result
from kdbench.suite import Suite


def suite_of(result: Result) -> Suite | None:
    """None where another version made it, whose suites this one cannot read."""
    try:
        return Suite.model_validate(result.protocol)
    except ValidationError:
        return None
