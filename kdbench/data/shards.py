"""Parquet shards of encoded images in the hub's layout."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from kdbench.atomic import written_whole
from kdbench.data.prepared import Manifest, Shard, sha256
from kdbench.data.shrink import KeepAll, Row
from kdbench.data.sources import Source
from kdbench.errors import UserError
from kdbench.suite import Split

ROWS_PER_GROUP = 100
"""As the hub's: who wants one row reads no more."""
# JPEG compresses no further, no two images are the same, and nobody asks for the largest.
PARQUET = {"compression": "none", "use_dictionary": False, "write_statistics": False}


@dataclass(frozen=True)
class PlannedShard:
    """Images `start` to `stop` of a split, and the file they go into."""

    name: str
    start: int
    stop: int


def plan(split: Split, images_per_shard: int) -> list[PlannedShard]:
    """A split's shards, in the hub's naming, as even as can be."""
    count = -(-split.images // images_per_shard)
    return [
        PlannedShard(
            f"{split.split}-{shard:05d}-of-{count:05d}.parquet",
            split.images * shard // count,
            split.images * (shard + 1) // count,
        )
        for shard in range(count)
    ]


def encoded_rows(source: Source, split: Split) -> Iterator[Row]:
    """Encoded images and labels in the official order.

    Raises:
        UserError: the data set cannot be read, or is another than the suite says.
    """
    for index, (image, label) in enumerate(source.rows(split)):
        if not isinstance(image, bytes):
            raise _other(source, "it holds no encoded images")
        if type(label) is not int or not 0 <= label < source.data.classes:
            raise _other(
                source,
                f"image {index} of '{split.split}' has the label {label!r}, "
                f"none of 0 to {source.data.classes - 1}",
            )
        yield image, label


@dataclass(frozen=True)
class ShardWriter:
    """Writes the smaller images of a source into a folder, each shard whole or not at all."""

    source: Source
    output: Path
    keep_all: KeepAll
    on_images: Callable[[int], None]
    """Hears how many images more are done, those done before included."""

    def write(self, split: Split, manifest: Manifest) -> Iterator[tuple[str, Shard]]:
        """Name and content of each of the split's shards that the manifest lacks, once written.

        Raises:
            UserError: the data set is another than the suite says, or the disk does not take it.
        """
        planned = plan(split, manifest.settings.images_per_shard)
        if all(shard.name in manifest.shards for shard in planned):
            self.on_images(split.images)
            return
        rows = encoded_rows(self.source, split)
        for shard in planned:
            mine = islice(rows, shard.stop - shard.start)
            if shard.name in manifest.shards:
                self.on_images(sum(1 for _ in mine))
            else:
                yield shard.name, self._write_shard(split, shard, mine)
        if next(rows, None) is not None:
            raise _other(self.source, f"'{split.split}' has more than {split.images:,} images")

    def _write_shard(self, split: Split, planned: PlannedShard, rows: Iterator[Row]) -> Shard:
        file = self.output / planned.name
        columns = {
            self.source.data.image_column: datasets.Image(),
            self.source.data.label_column: datasets.Value("int64"),
        }
        schema = datasets.Features(columns).arrow_schema
        undecodable: dict[int, str] = {}
        index = planned.start
        with written_whole(file) as stream, pq.ParquetWriter(stream, schema, **PARQUET) as writer:
            for group in self.keep_all(_groups(rows)):
                images = [{"bytes": row.encoded, "path": None} for row in group]
                labels = [row.label for row in group]
                writer.write_table(pa.table([images, labels], schema=schema))
                undecodable |= {
                    index + place: row.undecodable
                    for place, row in enumerate(group)
                    if row.undecodable is not None
                }
                index += len(group)
                self.on_images(len(group))
            if index != planned.stop:
                raise _other(
                    self.source, f"'{split.split}' has {index:,} images, not {split.images:,}"
                )
        return Shard(
            split=split.split,
            rows=planned.stop - planned.start,
            bytes=file.stat().st_size,
            sha256=sha256(file),
            undecodable=undecodable,
        )


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    return iter(lambda: list(islice(rows, ROWS_PER_GROUP)), [])


def _other(source: Source, reason: str) -> UserError:
    return UserError(f"{source.describe()} is not the data set '{source.data.name}': {reason}.")
