"""An exported file measured again, on the images and by the code that measured its run."""

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
class Remeasured:
    """What a file's network does on a suite's test images."""

    card: Card
    suite: str
    images: int
    metrics: Metrics
    undecodable: Mapping[str, str]
    """Reasons by name, of images that counted as wrong."""
    agrees: bool | None
    """Whether top-1 is that of the run; None where the suite is another."""


def evaluate_file(
    file: Path, suite: str | None, data_dir: Path | None, device: torch.device, workers: int
) -> Remeasured:
    """Each test image once, in the suite's precision; ONNX always computes in float32.

    Without a suite it is the one that the file's card names. A .pt2 file may run code: use files
    you trust.

    Raises:
        UserError: no such file, its images are not the suite's, or the data cannot be read.
    """
    card, network = open_exported(file, device)
    chosen = _suite(suite, card)
    data = chosen.data
    if (data.classes, data.image_size) != (card.classes, card.image_size):
        raise UserError(
            f"'{file}' tells {card.classes} classes in images of {card.image_size} pixels apart; "
            f"suite '{chosen.name}' has {data.classes} in {data.image_size}."
        )
    _, test = open_images(locate(data, data_dir, is_cached), device, workers)
    batches = evaluation_batches(test, _unnormalised(chosen))
    with torch.autocast(device.type, torch.bfloat16, enabled=chosen.precision == "bf16"):
        metrics = measure(lambda images: {"student": network(images)}, batches)["student"]
    same = chosen.digest() == card.identity.suite_hash
    agrees = metrics.top1 == card.metrics.top1 if same else None
    return Remeasured(card, chosen.name, len(test), metrics, batches.undecodable, agrees)


def _suite(asked: str | None, card: Card) -> Suite:
    """The suite that is asked for, changed as that of the card was where they are of one name."""
    name, _, changes = card.identity.suite.partition("@")
    if asked is None and name not in suite_files():
        raise UserError(f"Suite '{name}' does not ship; --suite ./{name}.toml names its file.")
    suite = load_suite(asked or name)
    if suite.name != name:
        return suite
    for change in changes.split(","):
        match change.split("="):
            case ["epochs", epochs] if re.fullmatch("[1-9][0-9]{0,5}", epochs):
                suite = suite.with_epochs(int(epochs))
            case ["precision", "fp32" | "bf16" as precision]:
                suite = suite.with_precision(precision)
    return suite


def _unnormalised(suite: Suite) -> Suite:
    """Its batches are images in [0, 1], as a file takes them."""
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    augmentation = suite.augmentation.model_copy(update=plain)
    return suite.model_copy(update={"augmentation": augmentation})
