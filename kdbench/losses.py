"""Loss functions that several methods share. B is the batch size, C classes, c channels."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-12
"""Lower bound of norms in divisions."""


def kl(target: Tensor, logits: Tensor, temperature: float = 1.0, epsilon: float = 0.0) -> Tensor:
    """Compute the softened KL divergence T^2 * mean_b sum_c p (log p - log q).

    Args:
        target: (B, C) logits of p; not detached here.
        logits: (B, C) logits of q.
        temperature: temperature T of both.
        epsilon: constant added to p, as in the authors' code of ONE and OKDDip.
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
    """Compute for each of K networks the mean KL divergence from its detached peers.

    Args:
        logits: K tensors (B, C).
        temperature: temperature of every KL term.
    """
    detached = [z.detach() for z in logits]
    losses = []
    for i, z in enumerate(logits):
        peers = [kl(t, z, temperature) for j, t in enumerate(detached) if j != i]
        losses.append(torch.stack(peers).mean())
    return losses


def ramp(epoch: float, length: float) -> float:
    """Return the sigmoid ramp-up exp(-5 (1 - min(e, E0) / E0)^2), which is 1 after E0 epochs."""
    if length <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(epoch, length) / length) ** 2)


def attention(features: Tensor) -> Tensor:
    """Compute the attention map, the mean of squares over channels, (B, 1, h, w)."""
    # Sum first, then divide: the backward pass of a mean would expand to the size of the features.
    return features.square().sum(dim=1, keepdim=True) / features.shape[1]


def unit(x: Tensor) -> Tensor:
    """Divide each sample (B, ...) by its L2 norm.

    Samples are not flattened, because that would copy channels-last maps and give gradients in the
    slower contiguous layout.
    """
    norm = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)
    return x * norm.clamp_min(EPSILON).reciprocal()


def normalised_distance(x: Tensor, y: Tensor) -> Tensor:
    """Compute the mean squared difference of samples that are L2-normalized."""
    return F.mse_loss(unit(x), unit(y))


def mean_probability_logits(logits: Sequence[Tensor]) -> Tensor:
    """Compute the log of the networks' mean probability, (B, C), which is role "ensemble"."""
    stacked = torch.stack([F.log_softmax(z, dim=1) for z in logits])
    return torch.logsumexp(stacked, dim=0) - math.log(len(logits))
