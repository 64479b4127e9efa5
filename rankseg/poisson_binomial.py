"""The Poisson-binomial law: the number of ones among independent Bernoulli variables with different probabilities.

The exact law (`pmf`) is the oracle of the tests; the refined normal law is what the published approximations
are made of.

Shapes: ... any leading axes, D probabilities, L values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """`mean` Σp, `variance` Σp(1-p), `third` central moment Σp(1-p)(1-2p), of shape (...)."""

    mean: Tensor
    variance: Tensor
    third: Tensor


def moments(probs: Tensor) -> Moments:
    """Central moments of the law of `probs` (..., D), in float64."""
    p = probs.double()
    spread = p * (1 - p)
    return Moments(p.sum(-1), spread.sum(-1), (spread * (1 - 2 * p)).sum(-1))


def pmf(probs: Tensor) -> Tensor:
    """Exact P(Γ = 0..D) of `probs` (D,): (D + 1,) float64, by the dynamic programme over pixels, O(D²)."""
    law = torch.zeros(probs.numel() + 1, dtype=torch.float64, device=probs.device)
    law[0] = 1
    for p in probs.double():
        law = law * (1 - p) + torch.nn.functional.pad(law[:-1], (1, 0)) * p
    return law


def refined_cdf(x: Tensor, skewness: Tensor) -> Tensor:
    """Refined normal distribution function Φ(x) + κ (1 - x²) φ(x) / 6 (Volkova, 1996), x standardised."""
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(x) + skewness * (1 - x * x) * density / 6


def refined_quantile(level: float, skewness: Tensor) -> Tensor:
    """Solve `refined_cdf`(x) = level for x by bisection on [-12, 12]: the shape of `skewness`."""
    low, high = torch.full_like(skewness, -12), torch.full_like(skewness, 12)
    for _ in range(60):
        middle = (low + high) / 2
        below = refined_cdf(middle, skewness) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
