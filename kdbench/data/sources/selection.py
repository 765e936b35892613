"""Which images of a split are used, by their labels."""

import torch
from torch import Tensor


def first_per_class(labels: Tensor, count: int) -> Tensor:
    """Positions of the first `count` images of each class, in the order of `labels` (N,)."""
    order = torch.argsort(labels, stable=True)
    starts = torch.searchsorted(labels[order], labels.unique())
    keep = (starts[:, None] + torch.arange(count)).flatten()
    return order[keep].sort().values


def stratified_holdout(labels: Tensor, share: float) -> Tensor:
    """Mask (N,) of the last images of each class: its share, at least one."""
    held = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label, count in enumerate(torch.bincount(labels).tolist()):
        members = torch.nonzero(labels == label).flatten()
        held[members[count - max(1, round(share * count)) :]] = True
    return held
