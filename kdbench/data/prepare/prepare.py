"""A one-time cache of a data set's images: smaller, as JPEG, in Parquet shards of the hub's layout.

Every image keeps its index and label. One that is small already, or cannot be decoded, keeps its
bytes, so that counts are those of the data set and a run treats it as it would the original.
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
from kdbench.data.prepare.shrink import keep, shrinking
from kdbench.data.sources.locate import Source
from kdbench.data.sources.stream import encoded_rows
from kdbench.errors import PlanInterruptedError, UserError
from kdbench.suite.sections import Split
from kdbench.suite.suite import Suite

QUALITY = 90
"""As FFCV's ImageNet; at 4:2:0 a 256-pixel image takes about a quarter of its original's bytes."""
IMAGES_PER_SHARD = 10_000
SAMPLE = 64
"""Images of each split that an estimate is made from."""


@dataclass(frozen=True)
class Estimate:
    """What is left to do, from a sample of each split."""

    images: int
    bytes: int
    seconds: float
    """With all workers, each on a core of its own."""
    free: int
    """Bytes on the disk of the output folder."""

    def describe(self, manifest: Manifest, output: Path, workers: int) -> str:
        """For `--dry-run`."""
        originals = manifest.originals
        minutes = max(1, round(self.seconds / 60))
        return "\n".join(
            [
                f"{originals.data} ({originals.layout}) to {manifest.settings}",
                f"{self.images:,} of {originals.images:,} images to prepare",
                f"about {decimal(self.bytes)} in '{output}' ({decimal(self.free)} free)",
                f"about {minutes:,} min with --workers {workers}, reading the originals aside",
            ]
        )

    def check_disk(self, output: Path) -> None:
        """Fail before hours of work rather than after.

        Raises:
            UserError: the disk has too little space.
        """
        if self.bytes > self.free:
            raise UserError(
                f"The prepared images need about {decimal(self.bytes)}, and the disk of "
                f"'{output}' has {decimal(self.free)}: free some, or name another folder."
            )


def shorter_side(suite: Suite) -> int:
    """What a suite resizes images to before it evaluates them, in pixels.

    Raises:
        UserError: its images are small, and stay as they are.
    """
    if suite.data.resize is None:
        raise UserError(
            f"Suite '{suite.name}' trains on small images, which are kept decoded: "
            "there is nothing to prepare."
        )
    return suite.data.resize


def begin(source: Source, shorter_side: int, output: Path) -> Manifest:
    """What is prepared in the folder so far, to go on from; nothing is written.

    Raises:
        UserError: the source is prepared itself, or the folder holds something else, or is the
            originals' own.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"'{output}' is no folder: name another with --output.")
    if source.folder is not None and read_manifest(source.folder) is not None:
        raise UserError(
            f"The images in '{source.folder}' are prepared already: name the folder of the "
            "originals with --data-dir."
        )
    if source.folder is not None and output.resolve().is_relative_to(source.folder.resolve()):
        raise UserError(
            f"'{output}' lies in the folder of the originals: name one outside it with --output."
        )
    originals = _originals(source)
    settings = Settings(
        shorter_side=shorter_side, quality=QUALITY, images_per_shard=IMAGES_PER_SHARD
    )
    found = read_manifest(output)
    if found is None:
        if any(output.glob("*.parquet")):
            raise UserError(
                f"'{output}' holds Parquet files that this command did not write: "
                "name another folder with --output."
            )
        made_by = f"kdbench {__version__}, {decoder_name()}"
        return Manifest(made_by=made_by, originals=originals, settings=settings, shards={})
    if (found.originals, found.settings) != (originals, settings):
        difference = _difference(found, originals, settings)
        raise UserError(
            f"'{output}' holds images that were prepared {difference}: "
            "name another folder with --output."
        )
    whole = {name: shard for name, shard in found.shards.items() if _is_there(output / name, shard)}
    return found.model_copy(update={"shards": whole})


def estimate(source: Source, manifest: Manifest, output: Path, workers: int) -> Estimate:
    """What the images without a finished shard will take.

    Raises:
        UserError: the data set cannot be read, or is another than the suite says.
    """
    images, size, seconds = 0, 0.0, 0.0
    settings = manifest.settings
    for split in _splits(source):
        left = split.images - manifest.images_of(split.split)
        if not left:
            continue
        sample = list(islice(encoded_rows(source, split), SAMPLE))
        started = time.perf_counter()
        kept = keep(sample, settings.shorter_side, settings.quality)
        per_image = left / max(1, len(sample))
        images += left
        seconds += per_image * (time.perf_counter() - started) / workers
        size += per_image * sum(len(row.encoded) for row in kept)
    return Estimate(images, round(size), seconds, shutil.disk_usage(_existing(output)).free)


def prepare(
    source: Source,
    manifest: Manifest,
    output: Path,
    workers: int,
    on_images: Callable[[int], None] = lambda count: None,
) -> Manifest:
    """Write what shards the manifest lacks, and the manifest after each.

    `on_images` hears of every image that is done, those done before included.

    Raises:
        UserError: the data set is another than the suite says, or the disk does not take it.
        PlanInterruptedError: Ctrl-C.
    """
    settings = manifest.settings
    if manifest.is_complete:
        on_images(manifest.images)
        return manifest
    write_manifest(output, manifest)
    try:
        with shrinking(settings.shorter_side, settings.quality, workers) as keep_all:
            writer = ShardWriter(source, output, keep_all, on_images)
            for split in _splits(source):
                for name, shard in writer.write(split, manifest):
                    shards = dict(sorted((manifest.shards | {name: shard}).items()))
                    manifest = manifest.model_copy(update={"shards": shards})
                    write_manifest(output, manifest)
    except KeyboardInterrupt:
        raise PlanInterruptedError(f"Stopped. {_how_to_go_on(manifest)}") from None
    except UserError as error:
        raise UserError(f"{error} {_how_to_go_on(manifest)}") from error
    return manifest


def check(output: Path, on_images: Callable[[int], None] = lambda count: None) -> list[str]:
    """What is wrong with a folder of prepared images, a sentence each; reads every shard.

    Raises:
        UserError: nothing was prepared there.
    """
    manifest = read_manifest(output)
    if manifest is None:
        raise UserError(f"'{output}' holds no prepared images.")
    return list(verify_shards(output, manifest, lambda shard: on_images(shard.rows)))


def _originals(source: Source) -> Originals:
    files = source.files()
    return Originals(
        data=source.data.name,
        layout=source.layout,
        files=len(files),
        bytes=sum(file.stat().st_size for file in files),
        splits={split.split: split.images for split in _splits(source)},
    )


def _difference(found: Manifest, originals: Originals, settings: Settings) -> str:
    if found.settings != settings:
        return f"with other settings ({found.settings}; now {settings})"
    before, now = found.originals, originals
    return (
        f"from other originals ({before.data}, {before.layout}, {before.files} files of "
        f"{before.bytes:,} bytes; now {now.data}, {now.layout}, {now.files} files of "
        f"{now.bytes:,} bytes)"
    )


def _splits(source: Source) -> tuple[Split, Split]:
    return source.data.train, source.data.test


def _is_there(file: Path, shard: Shard) -> bool:
    return file.is_file() and file.stat().st_size == shard.bytes


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(place for place in [folder, *folder.absolute().parents] if place.is_dir())


def _how_to_go_on(manifest: Manifest) -> str:
    return (
        f"{manifest.images:,} of {manifest.originals.images:,} images are prepared; "
        "the same command goes on from there."
    )
