"""Sequential reading of a split's encoded images from any row on, without copies on disk."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from kdbench.data.sources.checks import check_count
from kdbench.data.sources.locate import Source
from kdbench.data.sources.readers import open_reader
from kdbench.errors import UserError
from kdbench.suite.sections import Split

ROWS_IN_MEMORY = 100
"""Number of rows that are in memory at a time."""


class Row(NamedTuple):
    """An encoded image with its label."""

    encoded: bytes
    label: int
    """Label in the source."""
    path: str | None
    """Path of the original, without local folders."""


def encoded_rows(source: Source, split: Split, start: int = 0) -> Iterator[Row]:
    """Yield the rows of a split in the official order, from row `start` on.

    Raises:
        UserError: The dataset cannot be read, or does not match the suite.
    """
    # A reader would convert Parquet files to Arrow files of the same size.
    rows = _rows_from_parquet if source.layout == "parquet" else _rows_from_reader
    labels = source.data.classes * source.data.class_stride
    for index, (image, label, path) in enumerate(rows(source, split, start), start):
        if not isinstance(image, bytes):
            raise source.mismatch_error(
                f"row {index} of '{split.split}' does not contain an encoded image"
            )
        if type(label) is not int or not 0 <= label < labels:
            raise source.mismatch_error(
                f"image {index} of '{split.split}' has label {label!r}, which is not in 0 to "
                f"{labels - 1}"
            )
        yield Row(image, label, path)


RawRow = tuple[object, object, str | None]
"""Image, label and path as the source has them, not validated."""


def _rows_from_reader(source: Source, split: Split, start: int) -> Iterator[RawRow]:
    reader, labels = open_reader(source, split)
    check_count(source, split, len(labels))
    has_paths = source.layout == "imagefolder"
    for row in range(start, len(labels)):
        try:
            encoded = reader.read(row)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"Image {reader.name(row)} of '{split.split}' ({source.describe()}) "
                f"cannot be read: {reason}."
            ) from error
        yield encoded, int(labels[row]), reader.name(row) if has_paths else None


def _rows_from_parquet(source: Source, split: Split, start: int) -> Iterator[RawRow]:
    files = [file for file in source.files() if file.name.startswith(f"{split.split}-")]
    counts = [_count_rows(file) for file in files]
    check_count(source, split, sum(counts))
    for file, count in zip(files, counts, strict=True):
        if start < count:
            yield from islice(_rows_from_file(source, file), start, None)
        start = max(0, start - count)


def _rows_from_file(source: Source, file: Path) -> Iterator[RawRow]:
    columns = [source.data.image_column, source.data.label_column]
    try:
        with pq.ParquetFile(file) as parquet:
            missing = set(columns) - set(parquet.schema_arrow.names)
            if missing:
                raise source.mismatch_error(f"it has no column '{sorted(missing)[0]}'")
            for batch in parquet.iter_batches(ROWS_IN_MEMORY, columns=columns):
                images, labels = (batch.column(name).to_pylist() for name in columns)
                for image, label in zip(images, labels, strict=True):
                    content = image if isinstance(image, dict) else {}
                    path = content.get("path")
                    yield content.get("bytes"), label, path and Path(path).name
    except (OSError, pa.ArrowException) as error:
        raise _unreadable_error(file, error) from error


def _count_rows(file: Path) -> int:
    try:
        return int(pq.read_metadata(file).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable_error(file, error) from error


def _unreadable_error(file: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return UserError(f"'{file}' cannot be read: {reason}; copy it again.")
