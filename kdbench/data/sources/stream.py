"""A split's encoded images one after the other, from any row on, without copies on the disk."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from kdbench.data.sources.locate import Source
from kdbench.data.sources.readers import open_reader
from kdbench.errors import UserError
from kdbench.suite.sections import Split

BATCH = 100
"""Rows that are in memory at a time."""


class Row(NamedTuple):
    """An image of a data set."""

    encoded: bytes
    label: int
    """As the source has it."""
    path: str | None
    """Of the original, without the folders of this machine."""


def encoded_rows(source: Source, split: Split, start: int = 0) -> Iterator[Row]:
    """The split's rows in the official order, from row `start` on.

    Raises:
        UserError: the data set cannot be read, or is another than the suite says.
    """
    # Of Parquet a reader makes a copy as large as itself, for access by row.
    rows = _of_parquet if source.layout == "parquet" else _of_reader
    labels = source.data.classes * source.data.class_stride
    for index, (image, label, path) in enumerate(rows(source, split, start), start):
        if not isinstance(image, bytes):
            raise source.refusal(f"row {index} of '{split.split}' holds no encoded image")
        if type(label) is not int or not 0 <= label < labels:
            raise source.refusal(
                f"image {index} of '{split.split}' has the label {label!r}, "
                f"none of 0 to {labels - 1}"
            )
        yield Row(image, label, path)


Found = tuple[object, object, str | None]


def _of_reader(source: Source, split: Split, start: int) -> Iterator[Found]:
    reader, labels = open_reader(source, split)
    _check_count(source, split, len(labels))
    named = source.layout == "imagefolder"
    for row in range(start, len(labels)):
        try:
            encoded = reader.read(row)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"Image {reader.name(row)} of '{split.split}' ({source.describe()}) "
                f"cannot be read: {reason}."
            ) from error
        yield encoded, int(labels[row]), reader.name(row) if named else None


def _of_parquet(source: Source, split: Split, start: int) -> Iterator[Found]:
    files = [file for file in source.files() if file.name.startswith(f"{split.split}-")]
    counts = [_count(file) for file in files]
    _check_count(source, split, sum(counts))
    for file, count in zip(files, counts, strict=True):
        if start < count:
            yield from islice(_of_file(source, file), start, None)
        start = max(0, start - count)


def _of_file(source: Source, file: Path) -> Iterator[Found]:
    columns = [source.data.image_column, source.data.label_column]
    try:
        with pq.ParquetFile(file) as parquet:
            missing = set(columns) - set(parquet.schema_arrow.names)
            if missing:
                raise source.refusal(f"it has no column '{sorted(missing)[0]}'")
            for batch in parquet.iter_batches(BATCH, columns=columns):
                images, labels = (batch.column(name).to_pylist() for name in columns)
                for image, label in zip(images, labels, strict=True):
                    content = image if isinstance(image, dict) else {}
                    path = content.get("path")
                    yield content.get("bytes"), label, path and Path(path).name
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def _count(file: Path) -> int:
    try:
        return int(pq.read_metadata(file).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def _check_count(source: Source, split: Split, found: int) -> None:
    if found != split.images:
        raise source.refusal(f"'{split.split}' has {found:,} images, not {split.images:,}")


def _unreadable(file: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return UserError(f"'{file}' cannot be read: {reason}; copy it again.")
