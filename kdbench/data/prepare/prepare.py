"""Preparation of a dataset: its images are stored once as smaller JPEGs, in Parquet shards.

Every image keeps its index and label. Images that are small already or cannot be decoded keep their
bytes, so counts stay those of the dataset and runs treat these images like the originals.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.filesize import decimal

from kdbench import __version__
from kdbench.data.encoded.decode import decoder_name
from kdbench.data.prepare.manifest import (
    Manifest,
    Originals,
    Settings,
    Shard,
    read_manifest,
    verify_shards,
    write_manifest,
)
from kdbench.data.prepare.shards import ShardWriter
from kdbench.data.prepare.shrink import shrink_pool, shrink_rows
from kdbench.data.sources.locate import Source
from kdbench.data.sources.stream import encoded_rows
from kdbench.errors import PlanInterruptedError, UserError
from kdbench.suite.sections import Split
from kdbench.suite.suite import Suite

QUALITY = 90
"""JPEG quality, the same as FFCV's ImageNet. A 256-pixel image takes about a quarter of the
original's bytes."""
IMAGES_PER_SHARD = 10_000
SAMPLE_SIZE = 64
"""Number of images per split on which an estimate is based."""


@dataclass(frozen=True)
class Estimate:
    """Estimate of the remaining work, from a sample of each split."""

    images: int
    bytes: int
    seconds: float
    """Time with all workers, if each has its own core."""
    free: int
    """Free bytes on the disk of the output folder."""

    def describe(self, manifest: Manifest, output: Path, workers: int) -> str:
        """Return the text that `--dry-run` prints."""
        originals = manifest.originals
        minutes = max(1, round(self.seconds / 60))
        return "\n".join(
            [
                f"{originals.data} ({originals.layout}) to {manifest.settings}",
                f"{self.images:,} of {originals.images:,} images to prepare",
                f"about {decimal(self.bytes)} in '{output}' ({decimal(self.free)} free)",
                f"about {minutes:,} min with --workers {workers}, not counting disk reads",
            ]
        )

    def check_disk(self, output: Path) -> None:
        """Check that the disk has enough space.

        Raises:
            UserError: It does not.
        """
        if self.bytes > self.free:
            raise UserError(
                f"The prepared images need about {decimal(self.bytes)}, but the disk of "
                f"'{output}' has {decimal(self.free)} free; free some space or name another "
                "folder with --output."
            )


def shorter_side(suite: Suite) -> int:
    """Return the size in pixels to which a suite resizes images in evaluation.

    Raises:
        UserError: The suite uses small images, which need no preparation.
    """
    if suite.data.resize is None:
        raise UserError(
            f"Suite '{suite.name}' trains on small images, which are kept in memory; there is "
            "nothing to prepare."
        )
    return suite.data.resize


def load_or_create_manifest(source: Source, shorter_side: int, output: Path) -> Manifest:
    """Return the manifest of the images prepared so far, or a new one; writes nothing.

    Raises:
        UserError: The source is already prepared, or the output folder contains something else or
            is inside the folder of the originals.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"'{output}' is not a folder; name another one with --output.")
    if source.folder is not None and read_manifest(source.folder) is not None:
        raise UserError(
            f"The images in '{source.folder}' are already prepared; name the folder of the "
            "originals with --data-dir."
        )
    if source.folder is not None and output.resolve().is_relative_to(source.folder.resolve()):
        raise UserError(
            f"'{output}' is inside the folder of the originals; name another one with --output."
        )
    originals = _describe_originals(source)
    settings = Settings(
        shorter_side=shorter_side, quality=QUALITY, images_per_shard=IMAGES_PER_SHARD
    )
    existing = read_manifest(output)
    if existing is None:
        if any(output.glob("*.parquet")):
            raise UserError(
                f"'{output}' contains Parquet files that this command did not write; "
                "name another folder with --output."
            )
        made_by = f"kdbench {__version__}, {decoder_name()}"
        return Manifest(made_by=made_by, originals=originals, settings=settings, shards={})
    if (existing.originals, existing.settings) != (originals, settings):
        difference = _describe_difference(existing, originals, settings)
        raise UserError(
            f"'{output}' contains images that were prepared {difference}; "
            "name another folder with --output."
        )
    complete = {
        name: shard for name, shard in existing.shards.items() if _has_size(output / name, shard)
    }
    return existing.model_copy(update={"shards": complete})


def estimate(source: Source, manifest: Manifest, output: Path, workers: int) -> Estimate:
    """Estimate size and time of the images that have no finished shard yet.

    Raises:
        UserError: The dataset cannot be read, or does not match the suite.
    """
    images, size, seconds = 0, 0.0, 0.0
    settings = manifest.settings
    for split in _splits(source):
        remaining = split.images - manifest.images_of(split.split)
        if not remaining:
            continue
        sample = list(islice(encoded_rows(source, split), SAMPLE_SIZE))
        started = time.perf_counter()
        shrunk = shrink_rows(sample, settings.shorter_side, settings.quality)
        scale = remaining / max(1, len(sample))
        images += remaining
        seconds += scale * (time.perf_counter() - started) / workers
        size += scale * sum(len(row.encoded) for row in shrunk)
    free = shutil.disk_usage(_nearest_existing_folder(output)).free
    return Estimate(images, round(size), seconds, free)


def prepare(
    source: Source,
    manifest: Manifest,
    output: Path,
    workers: int,
    on_images: Callable[[int], None] = lambda count: None,
) -> Manifest:
    """Write all missing shards, and update the manifest after each.

    Args:
        source: the originals.
        manifest: the images prepared so far.
        output: folder for the shards.
        workers: number of processes.
        on_images: called with the number of images done, including those done before.

    Raises:
        UserError: The dataset does not match the suite, or a shard cannot be written.
        PlanInterruptedError: The user pressed Ctrl-C.
    """
    settings = manifest.settings
    if manifest.is_complete:
        on_images(manifest.images)
        return manifest
    write_manifest(output, manifest)
    try:
        with shrink_pool(settings.shorter_side, settings.quality, workers) as shrink_all:
            writer = ShardWriter(source, output, shrink_all, on_images)
            for split in _splits(source):
                for name, shard in writer.write(split, manifest):
                    shards = dict(sorted((manifest.shards | {name: shard}).items()))
                    manifest = manifest.model_copy(update={"shards": shards})
                    write_manifest(output, manifest)
    except KeyboardInterrupt:
        raise PlanInterruptedError(f"Stopped. {_resume_hint(manifest)}") from None
    except UserError as error:
        raise UserError(f"{error} {_resume_hint(manifest)}") from error
    return manifest


def check_prepared(
    output: Path, on_images: Callable[[int], None] = lambda count: None
) -> list[str]:
    """Read all shards of a folder and return one sentence per problem.

    Raises:
        UserError: The folder has no prepared images.
    """
    manifest = read_manifest(output)
    if manifest is None:
        raise UserError(f"'{output}' has no prepared images.")
    return list(verify_shards(output, manifest, lambda shard: on_images(shard.rows)))


def _describe_originals(source: Source) -> Originals:
    files = source.files()
    return Originals(
        data=source.data.name,
        layout=source.layout,
        files=len(files),
        bytes=sum(file.stat().st_size for file in files),
        splits={split.split: split.images for split in _splits(source)},
    )


def _describe_difference(existing: Manifest, originals: Originals, settings: Settings) -> str:
    if existing.settings != settings:
        return f"with other settings ({existing.settings}; now {settings})"
    before, now = existing.originals, originals
    return (
        f"from other originals ({before.data}, {before.layout}, {before.files} files of "
        f"{before.bytes:,} bytes; now {now.data}, {now.layout}, {now.files} files of "
        f"{now.bytes:,} bytes)"
    )


def _splits(source: Source) -> tuple[Split, Split]:
    return source.data.train, source.data.test


def _has_size(file: Path, shard: Shard) -> bool:
    return file.is_file() and file.stat().st_size == shard.bytes


def _nearest_existing_folder(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(place for place in [folder, *folder.absolute().parents] if place.is_dir())


def _resume_hint(manifest: Manifest) -> str:
    return (
        f"{manifest.images:,} of {manifest.originals.images:,} images are prepared; "
        "run the same command again to continue."
    )
