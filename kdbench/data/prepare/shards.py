"""Parquet shards of encoded images, in the layout of the hub."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from kdbench.atomic import atomic_write
from kdbench.data.prepare.manifest import Manifest, Shard, sha256
from kdbench.data.prepare.shrink import ShrinkAll
from kdbench.data.sources.locate import Source
from kdbench.data.sources.stream import Row, encoded_rows
from kdbench.suite.sections import Split

ROWS_PER_GROUP = 100
"""Rows per row group, the same as on the hub."""
# Compression, dictionaries and statistics are useless for JPEG images.
PARQUET_OPTIONS = {"compression": "none", "use_dictionary": False, "write_statistics": False}


@dataclass(frozen=True)
class PlannedShard:
    """A range of images of a split, and the file they are written to."""

    name: str
    start: int
    stop: int


def plan_shards(split: Split, images_per_shard: int) -> list[PlannedShard]:
    """Return the shards of a split, of about equal size, with the hub's file names."""
    count = -(-split.images // images_per_shard)
    return [
        PlannedShard(
            f"{split.split}-{shard:05d}-of-{count:05d}.parquet",
            split.images * shard // count,
            split.images * (shard + 1) // count,
        )
        for shard in range(count)
    ]


@dataclass(frozen=True)
class ShardWriter:
    """Writes the smaller images of a source to a folder, each shard atomically."""

    source: Source
    output: Path
    shrink_all: ShrinkAll
    on_images: Callable[[int], None]
    """Function that is called with the number of images done, including those done before."""

    def write(self, split: Split, manifest: Manifest) -> Iterator[tuple[str, Shard]]:
        """Write the missing shards of a split; yield name and description of each.

        Raises:
            UserError: The dataset does not match the suite, or a shard cannot be written.
        """
        rows: Iterator[Row] | None = None
        for shard in plan_shards(split, manifest.settings.images_per_shard):
            if shard.name in manifest.shards:
                self.on_images(shard.stop - shard.start)
                rows = None
                continue
            if rows is None:
                rows = encoded_rows(self.source, split, shard.start)
            shard_rows = islice(rows, shard.stop - shard.start)
            yield shard.name, self._write_shard(split, shard, shard_rows)

    def _write_shard(self, split: Split, planned: PlannedShard, rows: Iterator[Row]) -> Shard:
        file = self.output / planned.name
        columns = {
            self.source.data.image_column: datasets.Image(),
            self.source.data.label_column: datasets.Value("int64"),
        }
        schema = datasets.Features(columns).arrow_schema
        undecodable: dict[int, str] = {}
        index = planned.start
        with (
            atomic_write(file) as stream,
            pq.ParquetWriter(stream, schema, **PARQUET_OPTIONS) as writer,
        ):
            for group in self.shrink_all(_groups(rows)):
                images = [{"bytes": row.encoded, "path": row.path} for row in group]
                labels = [row.label for row in group]
                writer.write_table(pa.table([images, labels], schema=schema))
                undecodable |= {
                    index + offset: row.undecodable
                    for offset, row in enumerate(group)
                    if row.undecodable is not None
                }
                index += len(group)
                self.on_images(len(group))
        return Shard(
            split=split.split,
            rows=index - planned.start,
            bytes=file.stat().st_size,
            sha256=sha256(file),
            undecodable=undecodable,
        )


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    return iter(lambda: list(islice(rows, ROWS_PER_GROUP)), [])
