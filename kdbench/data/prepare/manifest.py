"""The manifest of a folder of prepared images: how they were made, and which shards exist."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from kdbench.atomic import atomic_write
from kdbench.errors import UserError
from kdbench.results.schema import Record
from kdbench.validation import describe_problems, join_problems

MANIFEST = "kdbench-prepared.json"


class Originals(Record):
    """Description of the original images, which tells different originals apart."""

    data: str
    """Name of the dataset."""
    layout: str
    files: int
    """Number of local files; 0 for a dataset on the hub."""
    bytes: int
    """Total size of these files."""
    splits: dict[str, int]
    """Number of images by split."""

    @property
    def images(self) -> int:
        """Number of images in all splits."""
        return sum(self.splits.values())


class Settings(Record):
    """Settings that determine the stored bytes of each image and its shard."""

    shorter_side: int
    """Shorter side in pixels; images that are not larger keep their bytes."""
    quality: int
    """JPEG quality."""
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
    """Reasons why images could not be decoded, by index in the split; they keep their bytes."""


class Manifest(Record):
    """Manifest of a folder of prepared images."""

    version: Literal[1] = 1
    made_by: str
    """Versions of kdbench and of the decoding libraries."""
    originals: Originals
    settings: Settings
    shards: dict[str, Shard]
    """Finished shards by file name."""

    @property
    def summary(self) -> str:
        """Description for the notes of a result."""
        return f"prepared: {self.settings}"

    @property
    def images(self) -> int:
        """Number of images in finished shards."""
        return sum(shard.rows for shard in self.shards.values())

    def images_of(self, split: str) -> int:
        """Return the number of images of a split in finished shards."""
        return sum(shard.rows for shard in self.shards.values() if shard.split == split)

    @property
    def bytes(self) -> int:
        """Total size of the finished shards in bytes."""
        return sum(shard.bytes for shard in self.shards.values())

    @property
    def is_complete(self) -> bool:
        """True if every image of every split is in a finished shard."""
        return self.images == self.originals.images

    def undecodable(self) -> list[tuple[str, int, str]]:
        """Return split, index and reason of every image that cannot be decoded."""
        return sorted(
            (shard.split, index, reason)
            for shard in self.shards.values()
            for index, reason in shard.undecodable.items()
        )


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a folder; return None if there is none.

    Raises:
        UserError: The manifest cannot be read or is not valid.
    """
    file = folder / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problems = join_problems(describe_problems(error, Manifest)[:1]).rstrip(".")
        raise UserError(
            f"'{file}' is damaged ({problems}); delete the folder and prepare the images again."
        ) from error
    except OSError as error:
        raise UserError(f"'{file}' cannot be read: {error.strerror or error}.") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of a folder atomically.

    Raises:
        UserError: The file cannot be written.
    """
    with atomic_write(folder / MANIFEST) as stream:
        stream.write(manifest.model_dump_json(indent=1).encode() + b"\n")


def sha256(file: Path) -> str:
    """Return the SHA-256 hash of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_shards(
    folder: Path, manifest: Manifest, on_shard: Callable[[Shard], None] = lambda shard: None
) -> Iterator[str]:
    """Read all shards of a folder and yield one sentence per problem."""
    for name, shard in manifest.shards.items():
        try:
            problem = "" if sha256(folder / name) == shard.sha256 else "has a different SHA-256"
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
