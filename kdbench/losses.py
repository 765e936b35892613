"""The few formulas that methods share. B batch, C classes, c channels."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-12
"""Smallest norm that is divided by."""


def kl(target: Tensor, logits: Tensor, temperature: float = 1.0, epsilon: float = 0.0) -> Tensor:
    """KL_T(target -> logits) of two (B, C) logits: T^2 * mean_b sum_c p (log p - log q).

    Detach the target where the method says so; nothing is detached here. `epsilon` is added to
    the target probabilities, as in the authors' code of ONE and OKDDip.
    """
    log_q = F.log_softmax(logits / temperature, dim=1)
    if epsilon:
        p = F.softmax(target / temperature, dim=1) + epsilon
        divergence = F.kl_div(log_q, p, reduction="batchmean")
    else:
        log_p = F.log_softmax(target / temperature, dim=1)
        divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def mutual_kl(logits: Sequence[Tensor], temperature: float = 1.0) -> list[Tensor]:
    """For each of K networks, the mean over its peers j of KL_T(sg z_j -> z_i); z are (B, C)."""
    detached = [z.detach() for z in logits]
    losses = []
    for i, z in enumerate(logits):
        peers = [kl(t, z, temperature) for j, t in enumerate(detached) if j != i]
        losses.append(torch.stack(peers).mean())
    return losses


def ramp(epoch: float, length: float) -> float:
    """Sigmoid ramp-up exp(-5 (1 - min(e, E0) / E0)^2); 1 from `length` epochs on."""
    if length <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(epoch, length) / length) ** 2)


def attention(features: Tensor) -> Tensor:
    """Attention map: mean over channels of the squares, (B, c, h, w) -> (B, 1, h, w)."""
    # Divided after the sum: the gradient of a mean is as large as the features themselves.
    return features.square().sum(dim=1, keepdim=True) / features.shape[1]


def unit(x: Tensor) -> Tensor:
    """Each sample (B, ...) divided by its L2 norm; not flattened, which would copy channels-last
    maps and hand the convolutions behind them gradients in the slower layout.
    """
    norm = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)
    return x * norm.clamp_min(EPSILON).reciprocal()


def normalised_distance(x: Tensor, y: Tensor) -> Tensor:
    """d(x, y): each sample flattened and L2-normalised, then the mean squared difference."""
    return F.mse_loss(unit(x), unit(y))


def mean_probability_logits(logits: Sequence[Tensor]) -> Tensor:
    """Log of the mean of the networks' probabilities, (B, C): what "ensemble" means everywhere."""
    stacked = torch.stack([F.log_softmax(z, dim=1) for z in logits])
    return torch.logsumexp(stacked, dim=0) - math.log(len(logits))
