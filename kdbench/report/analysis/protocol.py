"""The suite that a result was made under."""

from pydantic import ValidationError

from kdbench.results.schema import Result
from kdbench.suite.suite import Suite


def suite_of(result: Result) -> Suite | None:
    """None where another version made it, whose suites this one cannot read."""
    try:
        return Suite.model_validate(result.protocol)
    except ValidationError:
        return None


def description(result: Result) -> str:
    """Of that suite, with what the command changed in it; empty where there is none."""
    said = str(result.protocol.get("description", ""))
    _, _, changes = result.identity.suite.partition("@")
    return f"{said}; here with {changes.replace(',', ', ')}" if said and changes else said
