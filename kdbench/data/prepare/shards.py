"""Parquet shards of encoded images in the hub's layout."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from kdbench.atomic import atomic_write
from kdbench.data.prepare.manifest import Manifest, Shard, sha256
from kdbench.data.prepare.shrink import KeepAll
from kdbench.data.sources.locate import Source
from kdbench.data.sources.stream import Row, encoded_rows
from kdbench.suite.sections import Split

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
        rows: Iterator[Row] | None = None
        for shard in plan(split, manifest.settings.images_per_shard):
            if shard.name in manifest.shards:
                self.on_images(shard.stop - shard.start)
                rows = None
                continue
            if rows is None:
                rows = encoded_rows(self.source, split, shard.start)
            mine = islice(rows, shard.stop - shard.start)
            yield shard.name, self._write_shard(split, shard, mine)

    def _write_shard(self, split: Split, planned: PlannedShard, rows: Iterator[Row]) -> Shard:
        file = self.output / planned.name
        columns = {
            self.source.data.image_column: datasets.Image(),
            self.source.data.label_column: datasets.Value("int64"),
        }
        schema = datasets.Features(columns).arrow_schema
        undecodable: dict[int, str] = {}
        index = planned.start
        with atomic_write(file) as stream, pq.ParquetWriter(stream, schema, **PARQUET) as writer:
            for group in self.keep_all(_groups(rows)):
                images = [{"bytes": row.encoded, "path": row.path} for row in group]
                labels = [row.label for row in group]
                writer.write_table(pa.table([images, labels], schema=schema))
                undecodable |= {
                    index + place: row.undecodable
                    for place, row in enumerate(group)
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
