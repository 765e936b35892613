"""What a folder of prepared images says of itself: how it was made, and whether it is whole."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from kdbench.atomic import atomic_write
from kdbench.errors import UserError
from kdbench.results.schema import Record
from kdbench.validation import describe, sentence

MANIFEST = "kdbench-prepared.json"


class Originals(Record):
    """What was prepared; other originals have other images, or the same in another order."""

    data: str
    """The data set's name."""
    layout: str
    files: int
    """On this machine; 0 on the hub."""
    bytes: int
    """Of those files together."""
    splits: dict[str, int]
    """Images by split."""

    @property
    def images(self) -> int:
        """Of all splits."""
        return sum(self.splits.values())


class Settings(Record):
    """What decides the bytes that are kept of an image, and which file they are in."""

    shorter_side: int
    """Pixels; images that are not larger keep their bytes."""
    quality: int
    """Of the JPEG files that are made."""
    images_per_shard: int

    def __str__(self) -> str:
        return f"shorter side {self.shorter_side}, JPEG quality {self.quality}"


class Shard(Record):
    """A finished Parquet file."""

    split: str
    rows: int
    bytes: int
    sha256: str
    undecodable: dict[int, str]
    """Images that keep their bytes and cannot be decoded: index in the split, reason."""


class Manifest(Record):
    """How a folder of prepared images was made, and what is in it so far."""

    version: Literal[1] = 1
    made_by: str
    """kdbench and the libraries that decoded and encoded."""
    originals: Originals
    settings: Settings
    shards: dict[str, Shard]
    """By file name."""

    @property
    def summary(self) -> str:
        """For the notes of a result: these pixels are not the originals'."""
        return f"prepared: {self.settings}"

    @property
    def images(self) -> int:
        """Images in finished shards."""
        return sum(shard.rows for shard in self.shards.values())

    def images_of(self, split: str) -> int:
        """Of a split, in finished shards."""
        return sum(shard.rows for shard in self.shards.values() if shard.split == split)

    @property
    def bytes(self) -> int:
        """Of finished shards."""
        return sum(shard.bytes for shard in self.shards.values())

    @property
    def is_complete(self) -> bool:
        """Whether every image of every split is in a finished shard."""
        return self.images == self.originals.images

    def undecodable(self) -> list[tuple[str, int, str]]:
        """Split, index in it and reason of every image that cannot be decoded."""
        return sorted(
            (shard.split, index, reason)
            for shard in self.shards.values()
            for index, reason in shard.undecodable.items()
        )


def read_manifest(folder: Path) -> Manifest | None:
    """What `kdbench data prepare` noted in the folder; None where it never wrote.

    Raises:
        UserError: the note cannot be read, or is none.
    """
    file = folder / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problems = sentence(describe(error, Manifest)[:1]).rstrip(".")
        raise UserError(
            f"'{file}' is damaged ({problems}): delete the folder and prepare the images again."
        ) from error
    except OSError as error:
        raise UserError(f"'{file}' cannot be read: {error.strerror or error}.") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the folder's manifest, in one step.

    Raises:
        UserError: the folder or the disk does not take it.
    """
    with atomic_write(folder / MANIFEST) as stream:
        stream.write(manifest.model_dump_json(indent=1).encode() + b"\n")


def sha256(file: Path) -> str:
    """Of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_shards(
    folder: Path, manifest: Manifest, on_shard: Callable[[Shard], None] = lambda shard: None
) -> Iterator[str]:
    """What is wrong with the folder's shards, one sentence each; reads them whole."""
    for name, shard in manifest.shards.items():
        try:
            problem = "" if sha256(folder / name) == shard.sha256 else "has another SHA-256"
        except FileNotFoundError:
            problem = "is missing"
        except OSError as error:
            problem = f"cannot be read: {error.strerror or error}"
        if problem:
            yield f"{name} {problem}."
        on_shard(shard)
    missing = manifest.originals.images - manifest.images
    if missing:
        yield f"{missing:,} of {manifest.originals.images:,} images are not prepared yet."
