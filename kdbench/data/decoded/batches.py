"""Batches of images in memory: one gather crops, flips and pads a whole batch on any device.

Order and random draws depend on (seed, epoch, step) alone. All methods therefore see the same
images in the same order and the same view 0, and a resumed run continues with the same batches.
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
    """Return the number of images of a global batch that each process gets.

    Raises:
        UserError: the number of processes does not divide the global batch size.
    """
    if suite.batch_size % processes:
        raise UserError(
            f"The global batch size {suite.batch_size} of suite '{suite.name}' does not divide "
            f"by {processes} processes; start a number of processes that divides it."
        )
    return suite.batch_size // processes


class TrainingBatches:
    """Batches of V augmented views of shuffled training images, in whole global batches.

    With several processes, each takes its slice of every global batch.

    Raises:
        UserError: the number of processes does not divide the global batch size.
    """

    waited_seconds: float | None = None
    """Always None: batches in memory are ready at once."""
    undecodable: Mapping[str, str] = MappingProxyType({})
    """Always empty: loading the images raises if one cannot be decoded."""
    notes: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self, images: Images, suite: Suite, seed: int, views: int, rank: int = 0, processes: int = 1
    ):
        self.images = images
        self.seed = seed
        self.views = views
        self.batch_size = suite.batch_size
        self.augmentation = suite.augmentation
        self.local_slice = batch_slice(suite, rank, processes)
        device = images.pixels.device
        size = images.pixels.shape[1]
        # Suites of encoded images have no padding; they come here only as noise for timing steps.
        self.padding = suite.augmentation.padding or 0
        self.reflected_indices = reflected_indices(size, self.padding).to(device)
        self.window = torch.arange(size, device=device)
        self.normalize = Normalize(suite.augmentation, device)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the views and labels of each step from step `start` on.

        Views are (V, B, 3, H, W) float32 in channels-last memory, labels are (B,). `start` does not
        change what the remaining steps yield.
        """
        device = self.images.pixels.device
        order = epoch_order(self.seed, epoch, len(self.images), self.batch_size)
        order = order.to(device, non_blocking=True)
        draws = [
            self._draws(epoch, view).to(device, non_blocking=True) for view in range(self.views)
        ]
        for step in range(start, len(self)):
            indices = order[step][self.local_slice]
            views = torch.stack(
                [self._view(indices, draw[step][self.local_slice]) for draw in draws]
            )
            yield views.permute(0, 1, 4, 2, 3), self.images.labels[indices]

    def _draws(self, epoch: int, view: int) -> Tensor:
        """Draw top, left and flip of every sample of an epoch: (steps, B, 3)."""
        source = generator(self.seed, "view", epoch, view)
        shape = (len(self), self.batch_size)
        offsets = torch.randint(0, 2 * self.padding + 1, (*shape, 2), generator=source)
        flips = torch.randint(0, 2, (*shape, 1), generator=source)
        return torch.cat([offsets, flips * self.augmentation.horizontal_flip], dim=2)

    def _view(self, indices: Tensor, draw: Tensor) -> Tensor:
        """Return one augmented, normalized view (B, H, W, 3) of the images at `indices`."""
        top, left, flip = draw.unsqueeze(2).unbind(dim=1)
        columns = torch.where(flip.bool(), self.window.flip(0), self.window)
        rows = self.reflected_indices[top + self.window]
        columns = self.reflected_indices[left + columns]
        pixels = self.images.pixels[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
        return self.normalize(pixels)


class EvaluationBatches:
    """Batches of all images once, in order, normalized.

    With n processes, each takes every n-th image.
    """

    undecodable: Mapping[str, str] = MappingProxyType({})

    def __init__(self, images: Images, suite: Suite, rank: int = 0, processes: int = 1):
        self.images = Images(images.pixels[rank::processes], images.labels[rank::processes])
        self.batch_size = suite.evaluation_batch_size
        self.normalize = Normalize(suite.augmentation, images.pixels.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = zip(
            self.images.pixels.split(self.batch_size),
            self.images.labels.split(self.batch_size),
            strict=True,
        )
        for pixels, labels in pairs:
            yield self.normalize(pixels).permute(0, 3, 1, 2), labels


class Normalize:
    """Conversion of uint8 pixels (..., 3 * repeat) to float32 with the suite's mean and deviation.

    Normalizing rows of `repeat` pixels at once is several times faster than single pixels.
    """

    def __init__(self, augmentation: Augmentation, device: torch.device, repeat: int = 1):
        std = torch.tensor(augmentation.std, device=device)
        self.scale = (1 / (255 * std)).repeat(repeat)
        self.shift = (-torch.tensor(augmentation.mean, device=device) / std).repeat(repeat)

    def __call__(self, pixels: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addcmul(self.shift, pixels.float(), self.scale, out=out)


def batch_slice(suite: Suite, rank: int, processes: int) -> slice:
    """Return the slice of every global batch that belongs to a rank.

    Raises:
        UserError: the number of processes does not divide the global batch size.
    """
    share = batch_share(suite, processes)
    return slice(rank * share, (rank + 1) * share)


def epoch_order(seed: int, epoch: int, images: int, batch_size: int) -> Tensor:
    """Return the image indices (steps, B) of an epoch, without the incomplete last batch."""
    steps = images // batch_size
    shuffled = torch.randperm(images, generator=generator(seed, "order", epoch))
    return shuffled[: steps * batch_size].view(steps, batch_size)


def reflected_indices(size: int, padding: int) -> Tensor:
    """Return the source index of each pixel of a reflect-padded line: (size + 2 * padding,)."""
    position = torch.arange(-padding, size + padding).abs()
    return torch.where(position < size, position, 2 * (size - 1) - position)
