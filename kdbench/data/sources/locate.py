"""Finds a data set, in a folder or on the hub, without reading it yet.

Accepted in a folder, or in its subfolder named after the data set: Parquet files in the hub's
layout, `save_to_disk` of the `datasets` library, torchvision's own folder (checksums verified), and
for images that stay encoded a folder for each split and in it one for each class.
"""

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kdbench.data.prepare.manifest import MANIFEST
from kdbench.errors import UserError
from kdbench.paths import SUITES
from kdbench.suite.sections import Data, Split

if TYPE_CHECKING:
    from datasets import Dataset

ENVIRONMENT = "KDBENCH_DATA"
SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")
# Folders that hold torchvision's copy of a data set; importing torchvision to ask takes seconds.
TORCHVISION_FOLDERS = {"CIFAR100": "cifar-100-python", "CIFAR10": "cifar-10-batches-py"}


@dataclass(frozen=True)
class Source:
    """A located data set."""

    data: Data
    layout: Literal["parquet", "save_to_disk", "torchvision", "imagefolder", "hub"]
    folder: Path | None = None

    def describe(self) -> str:
        """For messages: where the data set is."""
        return f"hub {self.data.hub}" if self.folder is None else f"{self.layout} in {self.folder}"

    def reading(self) -> str:
        """What opening it is, for the display."""
        copied = self.data.encoded and self.layout in ("parquet", "hub")
        return f"Reading the images of {self.data.name}" + (
            "; of Parquet a copy is made, once" if copied else ""
        )

    def files(self) -> list[Path]:
        """The files that make up the data set on this machine; none on the hub."""
        if self.folder is None:
            return []
        if self.layout == "parquet":
            return [f for s in (self.data.train, self.data.test) for f in _shards(self.folder, s)]
        return sorted(file for file in self.folder.rglob("*") if file.is_file())

    def refusal(self, reason: str) -> UserError:
        """The error for content that the suite does not describe."""
        return UserError(f"{self.describe()} is not the data set '{self.data.name}': {reason}.")

    def split_folder(self, split: Split) -> Path:
        """Where an imagefolder has the classes of a split."""
        assert self.folder is not None
        found = _split_folder(self.folder, split)
        assert found is not None
        return found

    def rows(self, split: Split) -> Iterator[tuple[bytes | object, int]]:
        """(encoded image bytes or a decoded PIL image, label) in the official order.

        Raises:
            UserError: the data set cannot be read, or lacks the split or a column.
        """
        if self.layout == "torchvision":
            yield from self._torchvision_rows(split)
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield from self._decode_later(self.dataset(split, Path(scratch)))

    def dataset(self, split: Split, copies: Path) -> "Dataset":
        """The split as the `datasets` library reads it: memory-mapped Arrow files.

        Of Parquet it makes them first, in the folder `copies`, as large as the Parquet files.

        Raises:
            UserError: it cannot be read, or lacks the split or a column.
        """
        dataset = self._dataset(split, str(copies))
        missing = {self.data.image_column, self.data.label_column} - set(dataset.column_names)
        if missing:
            columns = ", ".join(dataset.column_names)
            raise self.refusal(f"it has no column '{sorted(missing)[0]}' (columns: {columns})")
        return dataset

    def _decode_later(self, dataset: "Dataset") -> Iterator[tuple[bytes, int]]:
        table = dataset.with_format("arrow")
        for start in range(0, len(dataset), 1000):
            rows = table[start : start + 1000]
            images = rows[self.data.image_column].to_pylist()
            labels = rows[self.data.label_column].to_pylist()
            for image, label in zip(images, labels, strict=True):
                if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes):
                    column = self.data.image_column
                    raise self.refusal(f"its column '{column}' holds no encoded images")
                yield image["bytes"], label

    def _dataset(self, split: Split, copies: str) -> "Dataset":
        import datasets  # takes two seconds, and is not needed once images are cached

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # it logs what it raises
        try:
            if self.layout == "save_to_disk":
                saved = datasets.load_from_disk(str(self.folder))
                if split.split not in saved:
                    raise ValueError(f"it has no such split (splits: {', '.join(saved)})")
                return saved[split.split]
            if self.layout == "hub":
                return datasets.load_dataset(self.data.hub, split=split.split)
            assert self.folder is not None
            files = [str(file) for file in _shards(self.folder, split)]
            return datasets.load_dataset(
                "parquet", data_files={split.split: files}, split=split.split, cache_dir=copies
            )
        except Exception as error:  # of damaged files the library raises a dozen kinds
            remedy = f" {_how_to_provide(self.data)}" if self.layout == "hub" else ""
            raise UserError(
                f"The '{split.split}' split of data set '{self.data.name}' ({self.describe()}) "
                f"cannot be read: {_reason(error)}.{remedy}"
            ) from error

    def _torchvision_rows(self, split: Split) -> Iterator[tuple[object, int]]:
        import torchvision  # takes a second, and most users have another layout

        assert self.data.torchvision is not None and self.folder is not None
        reader = getattr(torchvision.datasets, self.data.torchvision)
        try:
            # Verifies the published MD5 sums before it unpickles anything.
            train = split.split == self.data.train.split
            yield from reader(self.folder.parent, train=train, download=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"Data set '{self.data.name}' ({self.describe()}) is incomplete or damaged: "
                "its files do not match the published checksums; extract the archive again."
            ) from error


def locate(
    data: Data, data_dir: Path | None, is_cached: Callable[[Source], bool] = lambda source: False
) -> Source:
    """Find the data set: embedded, in `data_dir`, in $KDBENCH_DATA, or on the hub.

    A folder that was named must hold the data set; only without one is the hub asked, and not
    where `is_cached` says that its images were kept.

    Raises:
        UserError: it is in none of the places, or incomplete in the one that was named.
    """
    if data.embedded is not None:
        return Source(data, "parquet", SUITES / data.embedded)
    named = data_dir or (Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None)
    if named is None:
        hub = Source(data, "hub")
        return hub if data.hub is not None and is_cached(hub) else _on_the_hub(data)
    places = [named, named / data.name, named / "data", named / data.name / data.name]
    try:
        if not named.is_dir():
            lack = "is no folder" if named.exists() else "does not exist"
            raise UserError(f"Data folder '{named}' {lack}. {_how_to_provide(data)}")
        for place in places:
            source = _in_folder(data, place)
            if source is not None:
                return source
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"Data set '{data.name}' in '{named}' cannot be read: {reason}.") from error
    looked = ", ".join(str(place) for place in places[:2])
    raise UserError(f"Data set '{data.name}' is not in {looked}. {_how_to_provide(data)}")


def _in_folder(data: Data, folder: Path) -> Source | None:
    if (folder / "dataset_dict.json").is_file():
        return Source(data, "save_to_disk", folder)
    if data.torchvision is not None:
        name = TORCHVISION_FOLDERS[data.torchvision]
        original = folder.resolve() if folder.resolve().name == name else folder / name
        if original.is_dir():
            return Source(data, "torchvision", original)
    splits = (data.train, data.test)
    if any(_shards(folder, split) for split in splits):
        for split in splits:
            _check_shards(data, folder, split)
        return Source(data, "parquet", folder)
    if data.encoded and any(_split_folder(folder, split) for split in splits):
        for split in splits:
            if _split_folder(folder, split) is None:
                raise _incomplete(data, folder, f"folder {_folder_names(split)[-1]}")
        return Source(data, "imagefolder", folder)
    return None


def _folder_names(split: Split) -> tuple[str, ...]:
    """`val` is what everybody calls the validation images of ImageNet on a disk."""
    return (split.split, "val") if split.split == "validation" else (split.split,)


def _split_folder(folder: Path, split: Split) -> Path | None:
    return next((folder / n for n in _folder_names(split) if (folder / n).is_dir()), None)


def _shards(folder: Path, split: Split) -> list[Path]:
    return sorted(file for file in folder.glob(f"{split.split}-*.parquet") if file.is_file())


def _check_shards(data: Data, folder: Path, split: Split) -> None:
    """All N files of `<split>-<k>-of-<N>.parquet` must be there."""
    shards = _shards(folder, split)
    missing = f"{split.split}-*.parquet" if not shards else None
    counts = {int(m[2]) for m in map(SHARD.search, map(str, shards)) if m}
    for count in counts:
        names = [f"{split.split}-{k:05d}-of-{count:05d}.parquet" for k in range(count)]
        absent = [name for name in names if not (folder / name).is_file()]
        missing = absent[0] if absent else missing
    if missing:
        raise _incomplete(data, folder, missing)


def _incomplete(data: Data, folder: Path, missing: str) -> UserError:
    prepared = (folder / MANIFEST).is_file()
    remedy = "go on with `kdbench data prepare`" if prepared else "copy the folder again"
    return UserError(
        f"Data set '{data.name}' in {folder} is incomplete: {missing} is missing; {remedy}."
    )


def _on_the_hub(data: Data) -> Source:
    import huggingface_hub  # only needed where no folder was named
    from huggingface_hub import constants

    if data.hub is None:
        raise UserError(f"Data set '{data.name}' is not on the hub. {_how_to_provide(data)}")
    source = Source(data, "hub")
    if constants.HF_HUB_OFFLINE:  # the library then answers from its cache, without retries
        return source
    try:
        api = huggingface_hub.HfApi()
        if api.dataset_info(data.hub, timeout=5).gated:
            api.auth_check(data.hub, repo_type="dataset")
    except huggingface_hub.errors.GatedRepoError as error:
        raise UserError(
            f"Data set '{data.name}' on the hub ({data.hub}) is gated: accept its terms at "
            f"https://huggingface.co/datasets/{data.hub}, then log in here with `hf auth login` or "
            f"set HF_TOKEN. {_how_to_provide(data)}"
        ) from error
    except Exception as error:  # the hub's client changes its HTTP library, and so its errors
        raise UserError(
            f"Data set '{data.name}' is not at hand: no --data-dir was given, {ENVIRONMENT} is not "
            f"set, and the hub ({data.hub}) did not answer ({_reason(error)}). "
            f"{_how_to_provide(data)}"
        ) from error
    return source


def _reason(error: Exception) -> str:
    """A library's error on one short line, without its full stop."""
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())[:300].rstrip(".")
    if isinstance(cause, LookupError | TypeError | AttributeError) or not text:
        return f"its content is damaged ({type(cause).__name__} {text})"  # the text says little
    return text


def _how_to_provide(data: Data) -> str:
    layouts = [
        f"Parquet files '{data.train.split}-*.parquet' and '{data.test.split}-*.parquet' "
        "in the hub's layout",
        "a folder written by datasets' save_to_disk",
    ]
    if data.torchvision is not None:
        layouts.append(f"torchvision's '{TORCHVISION_FOLDERS[data.torchvision]}'")
    if data.encoded:
        names = " and ".join(f"'{_folder_names(split)[-1]}'" for split in (data.train, data.test))
        layouts.append(f"folders {names} with a folder of image files for each class")
    return (
        f"Name a folder with --data-dir or {ENVIRONMENT} that holds {', '.join(layouts[:-1])}, "
        f"or {layouts[-1]}, there or in its subfolder '{data.name}'."
    )
