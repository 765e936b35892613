"""Batches of whole-set tensors: one gather crops, flips and pads a batch, on any device.

Order and draws depend on (seed, epoch, step) alone. So all methods see the same images in the
same order and the same view 0, and a resumed run sees what it would have seen.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kdbench.data.decoded.images import Images
from kdbench.errors import UserError
from kdbench.seeds import generator
from kdbench.suite.suite import Augmentation, Suite


def batch_share(suite: Suite, processes: int) -> int:
    """Images of a global batch that each process gets.

    Raises:
        UserError: the batch cannot be shared out evenly.
    """
    if suite.batch_size % processes:
        raise UserError(
            f"The global batch size {suite.batch_size} of suite '{suite.name}' does not divide "
            f"by {processes} processes; start a number that divides it."
        )
    return suite.batch_size // processes


class TrainingBatches:
    """V augmented views of shuffled training images, in whole global batches.

    With several processes each takes its slice of every global batch.

    Raises:
        UserError: the global batch cannot be shared out evenly.
    """

    waited_seconds: float | None = None
    """Images in memory are waited for by nobody."""
    undecodable: Mapping[str, str] = MappingProxyType({})
    """All were decoded when they were read."""
    notes: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self, images: Images, suite: Suite, seed: int, views: int, rank: int = 0, processes: int = 1
    ):
        self.images = images
        self.seed = seed
        self.views = views
        self.batch_size = suite.batch_size
        self.augmentation = suite.augmentation
        self.mine = slice_of(suite, rank, processes)
        device = images.pixels.device
        size = images.pixels.shape[1]
        # Images of an encoded suite are here only as noise, to time steps with.
        self.padding = suite.augmentation.padding or 0
        self.reflected = reflected_indices(size, self.padding).to(device)
        self.window = torch.arange(size, device=device)
        self.normalise = Normalise(suite.augmentation, device)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(V, B, 3, H, W) float32 views in channels-last memory and (B,) labels, step by step.

        From step `start` on they are those of the whole epoch.
        """
        device = self.images.pixels.device
        order = epoch_order(self.seed, epoch, len(self.images), self.batch_size)
        order = order.to(device, non_blocking=True)
        draws = [
            self._draws(epoch, view).to(device, non_blocking=True) for view in range(self.views)
        ]
        for step in range(start, len(self)):
            chosen = order[step][self.mine]
            views = torch.stack([self._view(chosen, draw[step][self.mine]) for draw in draws])
            yield views.permute(0, 1, 4, 2, 3), self.images.labels[chosen]

    def _draws(self, epoch: int, view: int) -> Tensor:
        """Per sample: top, left, flip; (steps, B, 3)."""
        source = generator(self.seed, "view", epoch, view)
        shape = (len(self), self.batch_size)
        offsets = torch.randint(0, 2 * self.padding + 1, (*shape, 2), generator=source)
        flips = torch.randint(0, 2, (*shape, 1), generator=source)
        return torch.cat([offsets, flips * self.augmentation.horizontal_flip], dim=2)

    def _view(self, chosen: Tensor, draw: Tensor) -> Tensor:
        """One augmented, normalised view (B, H, W, 3) of the chosen images."""
        top, left, flip = draw.unsqueeze(2).unbind(dim=1)
        columns = torch.where(flip.bool(), self.window.flip(0), self.window)
        rows = self.reflected[top + self.window]
        columns = self.reflected[left + columns]
        pixels = self.images.pixels[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        return self.normalise(pixels)


class EvaluationBatches:
    """All images once, in order, normalised; with several processes each takes every n-th."""

    undecodable: Mapping[str, str] = MappingProxyType({})

    def __init__(self, images: Images, suite: Suite, rank: int = 0, processes: int = 1):
        self.images = Images(images.pixels[rank::processes], images.labels[rank::processes])
        self.batch_size = suite.evaluation_batch_size
        self.normalise = Normalise(suite.augmentation, images.pixels.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = zip(
            self.images.pixels.split(self.batch_size),
            self.images.labels.split(self.batch_size),
            strict=True,
        )
        for pixels, labels in pairs:
            yield self.normalise(pixels).permute(0, 3, 1, 2), labels


class Normalise:
    """Uint8 pixels (..., 3 repeat) to float32 with the suite's mean and standard deviation.

    Rows of `repeat` pixels take a fraction of the time that single ones take.
    """

    def __init__(self, augmentation: Augmentation, device: torch.device, repeat: int = 1):
        std = torch.tensor(augmentation.std, device=device)
        self.scale = (1 / (255 * std)).repeat(repeat)
        self.shift = (-torch.tensor(augmentation.mean, device=device) / std).repeat(repeat)

    def __call__(self, pixels: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addcmul(self.shift, pixels.float(), self.scale, out=out)


def slice_of(suite: Suite, rank: int, processes: int) -> slice:
    """What one of several processes takes of every global batch.

    Raises:
        UserError: the global batch cannot be shared out evenly.
    """
    share = batch_share(suite, processes)
    return slice(rank * share, (rank + 1) * share)


def epoch_order(seed: int, epoch: int, images: int, batch_size: int) -> Tensor:
    """Image indices (steps, B) of an epoch; what fills no batch is left out."""
    steps = images // batch_size
    shuffled = torch.randperm(images, generator=generator(seed, "order", epoch))
    return shuffled[: steps * batch_size].view(steps, batch_size)


def reflected_indices(size: int, padding: int) -> Tensor:
    """Source index of each pixel of a reflect-padded line: (size + 2 padding,)."""
    position = torch.arange(-padding, size + padding).abs()
    return torch.where(position < size, position, 2 * (size - 1) - position)
