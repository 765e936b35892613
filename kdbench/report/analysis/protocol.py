"""The suite that a result was made under."""

from pydantic import ValidationError

from kdbench.results.schema import Result
from kdbench.suite.suite import Suite


def read_suite(result: Result) -> Suite | None:
    """Return the suite of a result; None if this version of kdbench cannot read it."""
    try:
        return Suite.model_validate(result.protocol)
    except ValidationError:
        return None


def description(result: Result) -> str:
    """Return the description of a result's suite, with the changes made on the command line."""
    text = str(result.protocol.get("description", ""))
    _, _, changes = result.identity.suite.partition("@")
    return f"{text}; here with {changes.replace(',', ', ')}" if text and changes else text
