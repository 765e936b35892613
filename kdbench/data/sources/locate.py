"""Locates a dataset in a folder or on the hub, without reading it yet.

A folder, or its subfolder named after the dataset, may contain Parquet files in the layout of the
hub, a dataset written by `save_to_disk` of the `datasets` library, or torchvision's own files,
whose checksums are verified. Encoded images may also be in one folder per split and class.
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
# Folder names of torchvision's datasets. Importing torchvision to get them would take seconds.
TORCHVISION_FOLDERS = {"CIFAR100": "cifar-100-python", "CIFAR10": "cifar-10-batches-py"}


@dataclass(frozen=True)
class Source:
    """A located dataset."""

    data: Data
    layout: Literal["parquet", "save_to_disk", "torchvision", "imagefolder", "hub"]
    folder: Path | None = None

    def describe(self) -> str:
        """Return the location of the dataset, for messages."""
        return f"hub {self.data.hub}" if self.folder is None else f"{self.layout} in {self.folder}"

    def reading(self) -> str:
        """Return a progress message for the opening of the dataset."""
        copied = self.data.encoded and self.layout in ("parquet", "hub")
        return f"Reading the images of {self.data.name}" + (
            " (Parquet files are converted to Arrow once)" if copied else ""
        )

    def files(self) -> list[Path]:
        """Return the local files of the dataset; empty for a dataset on the hub."""
        if self.folder is None:
            return []
        if self.layout == "parquet":
            return [f for s in (self.data.train, self.data.test) for f in _shards(self.folder, s)]
        return sorted(file for file in self.folder.rglob("*") if file.is_file())

    def mismatch_error(self, reason: str) -> UserError:
        """Return the error for a dataset that does not match the suite."""
        return UserError(
            f"The dataset in {self.describe()} does not match '{self.data.name}': {reason}."
        )

    def split_folder(self, split: Split) -> Path:
        """Return the folder of an image folder that contains the classes of a split."""
        assert self.folder is not None
        found = _split_folder(self.folder, split)
        assert found is not None
        return found

    def rows(self, split: Split) -> Iterator[tuple[bytes | object, int]]:
        """Yield the images, as bytes or decoded PIL images, and labels in the official order.

        Raises:
            UserError: The dataset cannot be read, or has no such split or column.
        """
        if self.layout == "torchvision":
            yield from self._torchvision_rows(split)
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield from self._encoded_rows(self.dataset(split, Path(scratch)))

    def dataset(self, split: Split, copies: Path) -> "Dataset":
        """Return the split as memory-mapped Arrow files of the `datasets` library.

        Parquet files are first converted to Arrow files of the same size, in the folder `copies`.

        Raises:
            UserError: The dataset cannot be read, or has no such split or column.
        """
        dataset = self._dataset(split, str(copies))
        missing = {self.data.image_column, self.data.label_column} - set(dataset.column_names)
        if missing:
            columns = ", ".join(dataset.column_names)
            raise self.mismatch_error(
                f"it has no column '{sorted(missing)[0]}' (columns: {columns})"
            )
        return dataset

    def _encoded_rows(self, dataset: "Dataset") -> Iterator[tuple[bytes, int]]:
        table = dataset.with_format("arrow")
        for start in range(0, len(dataset), 1000):
            rows = table[start : start + 1000]
            images = rows[self.data.image_column].to_pylist()
            labels = rows[self.data.label_column].to_pylist()
            for image, label in zip(images, labels, strict=True):
                if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes):
                    column = self.data.image_column
                    raise self.mismatch_error(f"column '{column}' does not contain encoded images")
                yield image["bytes"], label

    def _dataset(self, split: Split, copies: str) -> "Dataset":
        import datasets  # slow to import, and not needed once images are cached

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # it also logs the errors that it raises
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
        except Exception as error:  # damaged files raise many kinds of errors
            remedy = f" {_data_instructions(self.data)}" if self.layout == "hub" else ""
            raise UserError(
                f"The '{split.split}' split of dataset '{self.data.name}' ({self.describe()}) "
                f"cannot be read: {_reason(error)}.{remedy}"
            ) from error

    def _torchvision_rows(self, split: Split) -> Iterator[tuple[object, int]]:
        import torchvision  # slow to import, and not needed for other layouts

        assert self.data.torchvision is not None and self.folder is not None
        reader = getattr(torchvision.datasets, self.data.torchvision)
        try:
            # The reader verifies the published MD5 checksums before it unpickles anything.
            train = split.split == self.data.train.split
            yield from reader(self.folder.parent, train=train, download=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"Dataset '{self.data.name}' ({self.describe()}) is incomplete or damaged: "
                "its files do not match the published checksums; extract the archive again."
            ) from error


def locate(
    data: Data, data_dir: Path | None, is_cached: Callable[[Source], bool] = lambda source: False
) -> Source:
    """Locate a dataset: embedded in kdbench, in `data_dir`, in $KDBENCH_DATA, or on the hub.

    If a folder is given, the dataset must be there. The hub is only asked without a folder, and
    not if the images are cached.

    Args:
        data: description of the dataset.
        data_dir: folder that contains the dataset.
        is_cached: returns True if the images of a source are cached.

    Raises:
        UserError: The dataset is not found, or is incomplete.
    """
    if data.embedded is not None:
        return Source(data, "parquet", SUITES / data.embedded)
    folder = data_dir or (Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None)
    if folder is None:
        hub = Source(data, "hub")
        return hub if data.hub is not None and is_cached(hub) else _source_on_hub(data)
    candidates = [folder, folder / data.name, folder / "data", folder / data.name / data.name]
    try:
        if not folder.is_dir():
            problem = "is not a folder" if folder.exists() else "does not exist"
            raise UserError(f"Data folder '{folder}' {problem}. {_data_instructions(data)}")
        for candidate in candidates:
            source = _source_in_folder(data, candidate)
            if source is not None:
                return source
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"Dataset '{data.name}' in '{folder}' cannot be read: {reason}.") from error
    searched = ", ".join(str(candidate) for candidate in candidates[:2])
    raise UserError(
        f"Dataset '{data.name}' was not found in {searched}. {_data_instructions(data)}"
    )


def _source_in_folder(data: Data, folder: Path) -> Source | None:
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
                raise _incomplete_error(data, folder, f"folder {_folder_names(split)[-1]}")
        return Source(data, "imagefolder", folder)
    return None


def _folder_names(split: Split) -> tuple[str, ...]:
    """Return the possible folder names of a split; ImageNet's validation folder is often `val`."""
    return (split.split, "val") if split.split == "validation" else (split.split,)


def _split_folder(folder: Path, split: Split) -> Path | None:
    return next((folder / n for n in _folder_names(split) if (folder / n).is_dir()), None)


def _shards(folder: Path, split: Split) -> list[Path]:
    return sorted(file for file in folder.glob(f"{split.split}-*.parquet") if file.is_file())


def _check_shards(data: Data, folder: Path, split: Split) -> None:
    """Check that all N files `<split>-<k>-of-<N>.parquet` exist."""
    shards = _shards(folder, split)
    missing = f"{split.split}-*.parquet" if not shards else None
    counts = {int(match[2]) for match in map(SHARD.search, map(str, shards)) if match}
    for count in counts:
        names = [f"{split.split}-{k:05d}-of-{count:05d}.parquet" for k in range(count)]
        missing = next((name for name in names if not (folder / name).is_file()), missing)
    if missing:
        raise _incomplete_error(data, folder, missing)


def _incomplete_error(data: Data, folder: Path, missing: str) -> UserError:
    prepared = (folder / MANIFEST).is_file()
    remedy = "finish `kdbench data prepare`" if prepared else "copy the folder again"
    return UserError(
        f"Dataset '{data.name}' in {folder} is incomplete: {missing} is missing; {remedy}."
    )


def _source_on_hub(data: Data) -> Source:
    import huggingface_hub  # only needed without a folder
    from huggingface_hub import constants

    if data.hub is None:
        raise UserError(f"Dataset '{data.name}' is not on the hub. {_data_instructions(data)}")
    source = Source(data, "hub")
    if constants.HF_HUB_OFFLINE:  # the library then uses its cache, without retries
        return source
    try:
        api = huggingface_hub.HfApi()
        if api.dataset_info(data.hub, timeout=5).gated:
            api.auth_check(data.hub, repo_type="dataset")
    except huggingface_hub.errors.GatedRepoError as error:
        raise UserError(
            f"Dataset '{data.name}' on the hub ({data.hub}) is gated: accept its terms at "
            f"https://huggingface.co/datasets/{data.hub}, then log in with `hf auth login` or "
            f"set HF_TOKEN. {_data_instructions(data)}"
        ) from error
    except Exception as error:  # kinds of errors depend on the HTTP library of the hub's client
        raise UserError(
            f"Dataset '{data.name}' was not found: no --data-dir was given, {ENVIRONMENT} is not "
            f"set, and the hub ({data.hub}) did not answer ({_reason(error)}). "
            f"{_data_instructions(data)}"
        ) from error
    return source


def _reason(error: Exception) -> str:
    """Return a library's error as one short line without a period."""
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())[:300].rstrip(".")
    if isinstance(cause, LookupError | TypeError | AttributeError) or not text:
        return f"its content is damaged ({type(cause).__name__} {text})"
    return text


def _data_instructions(data: Data) -> str:
    layouts = [
        f"Parquet files '{data.train.split}-*.parquet' and '{data.test.split}-*.parquet' "
        "in the layout of the hub",
        "a dataset written by datasets' save_to_disk",
    ]
    if data.torchvision is not None:
        layouts.append(f"torchvision's '{TORCHVISION_FOLDERS[data.torchvision]}'")
    if data.encoded:
        names = " and ".join(f"'{_folder_names(split)[-1]}'" for split in (data.train, data.test))
        layouts.append(f"folders {names} with one folder of image files per class")
    return (
        f"Name a folder with --data-dir or {ENVIRONMENT} that contains {', '.join(layouts[:-1])}, "
        f"or {layouts[-1]}, directly or in a subfolder '{data.name}'."
    )
