"""Evaluation of an exported file, with the images and the code that evaluated its run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kdbench.data import evaluation_batches, is_cached, locate, open_images
from kdbench.engine.evaluate import measure
from kdbench.errors import UserError
from kdbench.export.card import Card
from kdbench.export.formats import open_exported
from kdbench.results.schema import Metrics
from kdbench.suite.load import load_suite, suite_files
from kdbench.suite.suite import Suite


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a file's network on a suite's test images."""

    card: Card
    suite: str
    images: int
    metrics: Metrics
    undecodable: Mapping[str, str]
    """Reasons, by image name, why images could not be decoded. They count as wrong."""
    agrees: bool | None
    """True if top-1 equals that of the run; None if the suite is another one."""


def evaluate_file(
    file: Path, suite: str | None, data_dir: Path | None, device: torch.device, workers: int
) -> Evaluation:
    """Evaluate an exported file on a suite's test images, in the suite's precision.

    ONNX files always compute in float32. A .pt2 file may run code; only use files you trust.

    Args:
        file: exported file.
        suite: name or TOML file of the suite; None means the suite of the exported run.
        data_dir: folder of the data set.
        device: device to evaluate on.
        workers: number of processes that decode images.

    Raises:
        UserError: The file does not exist or does not fit the suite, or the data cannot be read.
    """
    card, network = open_exported(file, device)
    chosen = _choose_suite(suite, card)
    data = chosen.data
    if (data.classes, data.image_size) != (card.classes, card.image_size):
        raise UserError(
            f"'{file}' is a network for {card.classes} classes and images of {card.image_size} "
            f"pixels, but suite '{chosen.name}' has {data.classes} classes and {data.image_size} "
            "pixels."
        )
    _, test = open_images(locate(data, data_dir, is_cached), device, workers)
    batches = evaluation_batches(test, _without_normalization(chosen))
    with torch.autocast(device.type, torch.bfloat16, enabled=chosen.precision == "bf16"):
        metrics = measure(lambda images: {"student": network(images)}, batches)["student"]
    same = chosen.digest() == card.identity.suite_hash
    agrees = metrics.top1 == card.metrics.top1 if same else None
    return Evaluation(card, chosen.name, len(test), metrics, batches.undecodable, agrees)


def _choose_suite(requested: str | None, card: Card) -> Suite:
    """Return the requested suite, with the run's changes if it is the suite of the run."""
    name, _, changes = card.identity.suite.partition("@")
    if requested is None and name not in suite_files():
        raise UserError(
            f"Suite '{name}' does not come with kdbench; name its file with --suite ./{name}.toml."
        )
    suite = load_suite(requested or name)
    if suite.name != name:
        return suite
    for change in changes.split(","):
        match change.split("="):
            case ["epochs", epochs] if re.fullmatch("[1-9][0-9]{0,5}", epochs):
                suite = suite.with_epochs(int(epochs))
            case ["precision", "fp32" | "bf16" as precision]:
                suite = suite.with_precision(precision)
    return suite


def _without_normalization(suite: Suite) -> Suite:
    """Return the suite without normalization: exported networks take images in [0, 1]."""
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    augmentation = suite.augmentation.model_copy(update=plain)
    return suite.model_copy(update={"augmentation": augmentation})
