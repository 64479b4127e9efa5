"""Statistics of paired differences: BCa bootstrap of the mean, Wilcoxon's signed ranks, effect sizes.

Efron, "Better bootstrap confidence intervals", JASA 1987; Wilcoxon, Biometrics Bulletin 1945; Kerby, "The
simple difference formula", 2014, for the rank-biserial correlation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

_NORMAL = NormalDist()
_CHUNK = 1 << 22  # resampled values held at a time
EXACT_UP_TO = 50  # differences for which the exact law of the rank sum is counted


@dataclass(frozen=True)
class Wilcoxon:
    """Signed-rank test of symmetry about zero, zeros dropped.

    Attributes:
        statistic: the smaller of the two rank sums.
        p: two-sided; NaN where every difference is zero.
        rank_biserial: (favourable − unfavourable) / all ranks, in [−1, 1]: the effect size.
        nonzero: differences that took part.
        method: "exact" or "normal" (with the correction of the variance for ties, none for continuity).
    """

    statistic: float
    p: float
    rank_biserial: float
    nonzero: int
    method: str


def bca_of_mean(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of the mean; the same seed gives the same interval.

    Raises:
        ValueError: no values, no resamples, or a confidence outside (0, 1).
    """
    if not values:
        raise ValueError("an interval needs at least one difference; the two rules share no scored image")
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1; 10000 is usual")
    data = torch.tensor(values, dtype=torch.float64)
    if data.min() == data.max():
        return float(data[0]), float(data[0])
    generator = torch.Generator().manual_seed(seed)
    size, parts, left = len(data), [], resamples
    while left:
        rows = max(1, min(left, _CHUNK // size))
        parts.append(data[torch.randint(size, (rows, size), generator=generator)].mean(1))
        left -= rows
    jackknife = (data.sum() - data) / (size - 1)
    return bca_interval(float(data.mean()), torch.cat(parts), jackknife, confidence)


def bca_interval(
    estimate: float, replicates: Tensor, jackknife: Tensor, confidence: float
) -> tuple[float, float]:
    """The BCa interval from bootstrap replicates and leave-one-out estimates, (B,) and (n,) float64."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, such as 0.95")
    below = float((replicates < estimate).sum() + (replicates <= estimate).sum()) / (2 * len(replicates))
    deviations = jackknife.mean() - jackknife
    spread = float((deviations**2).sum())
    if below in (0.0, 1.0) or spread == 0.0:
        return float(replicates.min()), float(replicates.max())
    acceleration = float((deviations**3).sum()) / (6 * spread**1.5)
    bias = _NORMAL.inv_cdf(below)
    levels = []
    for level in ((1 - confidence) / 2, (1 + confidence) / 2):
        shifted = bias + _NORMAL.inv_cdf(level)
        levels.append(_NORMAL.cdf(bias + shifted / (1 - acceleration * shifted)))
    low, high = torch.quantile(replicates, torch.tensor(levels, dtype=torch.float64)).tolist()
    return low, high


def wilcoxon(values: Sequence[float]) -> Wilcoxon:
    """Wilcoxon's signed-rank test; the exact law for few differences without ties, else the normal one."""
    moved = [v for v in values if v != 0]
    size = len(moved)
    if not size:
        return Wilcoxon(0.0, math.nan, 0.0, 0, "none")
    ranks = average_ranks([abs(v) for v in moved])
    positive = math.fsum(r for r, v in zip(ranks, moved, strict=True) if v > 0)
    total = size * (size + 1) / 2
    smaller = min(positive, total - positive)
    ties = Counter(ranks).values()
    exact = size <= EXACT_UP_TO and max(ties) == 1 and size == len(values)
    if exact:
        p = min(1.0, 2 * _exact_tail(size, int(smaller)))
    else:
        variance = size * (size + 1) * (2 * size + 1) / 24 - sum(t**3 - t for t in ties) / 48
        p = math.erfc(abs(smaller - total / 2) / math.sqrt(2 * variance))
    return Wilcoxon(smaller, p, (2 * positive - total) / total, size, "exact" if exact else "normal")


def _exact_tail(size: int, statistic: int) -> float:
    """P(rank sum <= statistic) when each of the ranks 1..size is positive with probability one half."""
    ways = [1] + [0] * statistic
    for rank in range(1, size + 1):
        for total in range(statistic, rank - 1, -1):
            ways[total] += ways[total - rank]
    return sum(ways) / 2**size


def average_ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for position in range(start, end + 1):
            ranks[order[position]] = (start + end) / 2 + 1
        start = end + 1
    return ranks


def standardized_mean(values: Sequence[float]) -> float:
    """Mean over standard deviation of the differences (Cohen's d for pairs); NaN where they do not vary."""
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean / math.sqrt(variance) if variance > 0 else math.nan
