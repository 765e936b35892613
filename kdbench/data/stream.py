"""A split's encoded images one after the other, from any row on, without copies on the disk."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kdbench.data.sources import Source
from kdbench.errors import UserError
from kdbench.sections import Split

Row = tuple[bytes, int]
"""An encoded image and its label."""

BATCH = 100


def encoded_rows(source: Source, split: Split, start: int = 0) -> Iterator[Row]:
    """Encoded images and labels in the official order, from row `start` on.

    Raises:
        UserError: the data set cannot be read, or is another than the suite says.
    """
    # Of Parquet the `datasets` library first makes a copy as large as itself.
    by_file = source.layout == "parquet"
    rows = _of_files(source, split, start) if by_file else islice(source.rows(split), start, None)
    labels = source.data.classes * source.data.class_stride
    for index, (image, label) in enumerate(rows, start):
        if not isinstance(image, bytes):
            raise other(source, f"row {index} of '{split.split}' holds no encoded image")
        if type(label) is not int or not 0 <= label < labels:
            raise other(
                source,
                f"image {index} of '{split.split}' has the label {label!r}, "
                f"none of 0 to {labels - 1}",
            )
        yield image, label


def other(source: Source, reason: str) -> UserError:
    """The error for content that the suite does not describe."""
    return UserError(f"{source.describe()} is not the data set '{source.data.name}': {reason}.")


def _of_files(source: Source, split: Split, start: int) -> Iterator[tuple[object, object]]:
    for file in source.files():
        if not file.name.startswith(f"{split.split}-"):
            continue
        try:
            with pq.ParquetFile(file) as parquet:
                if start >= parquet.metadata.num_rows:
                    start -= parquet.metadata.num_rows
                    continue
                yield from islice(_of_file(source, parquet), start, None)
                start = 0
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(file, error) from error


def _of_file(source: Source, parquet: pq.ParquetFile) -> Iterator[tuple[object, object]]:
    columns = [source.data.image_column, source.data.label_column]
    missing = set(columns) - set(parquet.schema_arrow.names)
    if missing:
        raise other(source, f"it has no column '{sorted(missing)[0]}'")
    for batch in parquet.iter_batches(BATCH, columns=columns):
        images, labels = (batch.column(name).to_pylist() for name in columns)
        for image, label in zip(images, labels, strict=True):
            yield image.get("bytes") if isinstance(image, dict) else image, label


def _unreadable(file: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return UserError(f"'{file}' cannot be read: {reason}.")
