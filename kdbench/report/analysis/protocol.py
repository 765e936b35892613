"""The suite that a result was made under."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence

from pydantic import ValidationError

from kdbench.results.schema import Result
from kdbench.suite.suite import Suite


def read_suite(result: Result) -> Suite | None:
    """Return the suite of a result; None if this version of kdbench cannot read it."""
    try:
        return Suite.model_validate(result.protocol)
    except ValidationError:
        return None


def data_versions(results: Sequence[Result]) -> list[str]:
    """Return the hash of each result's data; empty if it is not known.

    Results of earlier versions have none. If their suite has checksums of its images, they count as
    having the hash that most other results of the same data section have.
    """
    known: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        if result.data is not None:
            known[_data_key(result)][result.data] += 1
    versions = []
    for result in results:
        others = known[_data_key(result)].most_common(1) if _has_checksums(result) else []
        versions.append(result.data or (others[0][0] if others else ""))
    return versions


def _data_key(result: Result) -> str:
    data = json.dumps(result.protocol.get("data"), sort_keys=True)
    return f"{result.notes.get('images', '')} {data}"


def _has_checksums(result: Result) -> bool:
    data = result.protocol.get("data", {})
    return all(data.get(split, {}).get("sha256") for split in ("train", "test"))


def description(result: Result) -> str:
    """Return the description of a result's suite, with the changes made on the command line."""
    text = str(result.protocol.get("description", ""))
    _, _, changes = result.identity.suite.partition("@")
    return f"{text}; here with {changes.replace(',', ', ')}" if text and changes else text
