"""Selection of images by their labels."""

import torch
from torch import Tensor


def first_per_class(labels: Tensor, count: int) -> Tensor:
    """Return the positions of the first `count` images of each class, in ascending order."""
    order = torch.argsort(labels, stable=True)
    starts = torch.searchsorted(labels[order], labels.unique())
    positions = (starts[:, None] + torch.arange(count)).flatten()
    return order[positions].sort().values


def stratified_holdout(labels: Tensor, share: float) -> Tensor:
    """Return a mask (N,) of the last images of each class: a share of them, at least one."""
    held = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label, count in enumerate(torch.bincount(labels).tolist()):
        members = torch.nonzero(labels == label).flatten()
        held[members[count - max(1, round(share * count)) :]] = True
    return held
