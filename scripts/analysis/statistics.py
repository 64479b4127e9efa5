"""Statistics of paired differences: bootstrap interval of the mean, signed-rank test, effect sizes, harm.

Differences are rule − baseline, image by image, in points (percent). The interval is the BCa bootstrap of
`scipy.stats.bootstrap` (Efron, JASA 1987). With groups, such as the patients that images belong to, whole groups
are resampled, because images of one patient are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError

RESAMPLES = 10_000
HARM = (1, 5, 10)  # losses in points whose frequency is reported
_EXACT_UP_TO = 50  # differences, without ties and zeros, for which the exact signed-rank law is used
_BATCH = 1 << 22  # resampled values held in memory at a time
_TIE = 1e-9  # smaller differences are rounding

Interval = tuple[float, float]
Array = NDArray[np.float64]


def mean_interval(
    values: Sequence[float],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """Return the BCa bootstrap interval of the mean; the same seed gives the same interval.

    Args:
        values: one number per image.
        confidence: the level, in (0, 1).
        groups: the group of each image; None if images are independent.
    """
    from scipy import stats  # slow to import

    if not len(values):
        raise UserError("there is no image that both rules score, so there is no interval.")
    if not 0 < confidence < 1:
        raise UserError(f"confidence={confidence} is invalid: expected a number in (0, 1), such as 0.95.")
    if resamples < 1:
        raise UserError(f"resamples={resamples} is invalid: expected an integer >= 1; 10000 is usual.")
    data = np.asarray(values, dtype=np.float64)
    sums, sizes = _group_sums(data, groups)
    means = sums / sizes
    if len(sums) == 1 or means.min() == means.max():
        return float(means[0]), float(means[0])
    found = stats.bootstrap(
        (sums,) if groups is None else (sums, sizes),
        np.mean if groups is None else _ratio,
        paired=True,
        n_resamples=resamples,
        batch=max(1, _BATCH // len(sums)),
        confidence_level=confidence,
        method="percentile" if resamples == 1 else "BCa",
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    if math.isnan(low) or math.isnan(high):  # every resampled mean is on one side of the mean
        low, high = found.bootstrap_distribution.min(), found.bootstrap_distribution.max()
    return float(low), float(high)


def _group_sums(values: Array, groups: Sequence[Hashable] | None) -> tuple[Array, Array]:
    """Return the sum of values and the number of images of each group."""
    if groups is None:
        return values, np.ones_like(values)
    place = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    index = [place[name] for name in groups]
    sizes = np.bincount(index, minlength=len(place)).astype(np.float64)
    return np.bincount(index, values, len(place)).astype(np.float64), sizes


def _ratio(sums: Array, sizes: Array, axis: int = -1) -> Any:
    return sums.sum(axis) / sizes.sum(axis)


def signed_rank(values: Sequence[float]) -> tuple[float, str, float]:
    """Return Wilcoxon's two-sided p, the method ("exact", "normal" or "none"), and the rank-biserial correlation.

    Zeros are dropped. The correlation, (favourable − unfavourable) / all ranks, is in [−1, 1] (Kerby, 2014). The
    exact law is used for at most 50 differences without ties and zeros.
    """
    from scipy import stats

    moved = np.array([value for value in values if value], dtype=np.float64)
    if not len(moved):
        return math.nan, "none", 0.0
    untied = len(np.unique(np.abs(moved))) == len(moved) == len(values)
    exact = len(moved) <= _EXACT_UP_TO and untied
    method = "exact" if exact else "asymptotic"
    p = stats.wilcoxon(moved, zero_method="wilcox", correction=False, method=method).pvalue
    ranks = stats.rankdata(np.abs(moved))
    effect = float((ranks * np.sign(moved)).sum() / ranks.sum())
    return float(p), "exact" if exact else "normal", effect


def standardized_mean(values: Sequence[float]) -> float:
    """Return mean over standard deviation (Cohen's d for pairs); NaN if the values do not vary."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)) / deviation if deviation > 0 else math.nan


def describe_differences(
    values: Sequence[float],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Return all statistics of paired differences in points, for tables, JSON files and charts.

    ``better``, ``worse``, ``tied`` and the values of ``harm`` ("1", "5", "10": images that lose more than so many
    points) are shares of the images; ``worst_loss`` and ``best_gain`` are in points and not negative.
    """
    count = len(values)
    interval = mean_interval(values, confidence, resamples, seed, groups)
    p, method, effect = signed_rank([round(value, 9) for value in values])
    return {
        "images": count,
        "groups": None if groups is None else len(set(groups)),
        "mean": math.fsum(values) / count,
        "median": median(values),
        "interval": list(interval),
        "confidence": confidence,
        "better": sum(value > _TIE for value in values) / count,
        "worse": sum(value < -_TIE for value in values) / count,
        "tied": sum(abs(value) <= _TIE for value in values) / count,
        "harm": {str(points): sum(value < -points for value in values) / count for points in HARM},
        "worst_loss": max(0.0, -min(values)),
        "best_gain": max(0.0, max(values)),
        "standardized_mean": standardized_mean(values),
        "rank_biserial": effect,
        "wilcoxon_p": p,
        "wilcoxon_method": method,
        "differences": list(values),
    }
