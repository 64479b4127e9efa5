"""The published approximations of the expected Dice, T-RNA (app=1) and BA (app=2), vectorised.

Both replace the distribution of Γ, the number of object pixels, by a refined normal distribution w, cut to the central
1 - 2e-4 of its mass. They score the volumes τ = 1..U, with U from `_upper`, or 5·mean + 1 if the mean of Γ is small.
The sorted probabilities are p_1 >= p_2 >= ..., and S_τ is the sum of the first τ (Dai & Li, JMLR 24(224), 2023,
section 3):

    BA      S_τ Σ_l 2 w_l / (l+τ+γ+1) + Σ_l γ w_l / (l+τ+γ)              γ = smooth
    T-RNA   Σ_l 2 W_l(τ) / (l+τ+γ+2) + Σ_l γ w_l / (l+τ+γ+1)             W(τ) = Σ_{j≤τ} p_j w^(j)

w^(j) is the distribution without pixel j. Two ideas replace the loops of the original. Sums over l are correlations
with 1/n: one FFT computes them for all τ. w^(j) is a smooth function of p_j: a Chebyshev interpolant needs it at
`_CHEBYSHEV_POINTS` probabilities instead of D.

Two differences from the original are intended. The range of τ includes U and D; the original stops one short. A row
whose distribution is not nearly normal (variance below `_MIN_VARIANCE`, skewness beyond `_MAX_SKEWNESS`) is solved
exactly; the original crashes or selects nothing there.

Shapes: R rows, D pixels of a row, L values of Γ.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rankseg.gather import statistics
from rankseg.solver import Solution, compares_losses, solve

_TAIL = 1e-4  # mass that is cut off at each end of the distribution
_FEW = 50.0  # up to this mean, T-RNA is used with any `app`
_CHEBYSHEV_POINTS = 12
_MIN_VARIANCE, _MAX_SKEWNESS = 0.25, 5.0
_BUDGET = 1 << 22  # numbers in memory for a group of rows


def search(flat: Tensor, app: int, smooth: float, truncate_mean: bool, pruning: bool, variant: str) -> Solution:
    """Find the best volume of each row of `flat` (R, D) by T-RNA or BA; see `rankseg.rank_dice` for the options."""
    rows, pixels = flat.shape
    peak = flat.amax(1)
    kept = torch.ones_like(peak, dtype=torch.bool)
    if pruning:
        kept = peak >= 0.5 if variant == "experiments" else peak > 0.5
    result = Solution(
        torch.zeros(rows, dtype=torch.int64, device=flat.device),
        peak.clone(),
        torch.zeros(rows, dtype=torch.int64, device=flat.device),
        torch.full((rows,), torch.nan, dtype=torch.float64, device=flat.device),
    )
    for group in kept.nonzero()[:, 0].split(max(1, _BUDGET // (pixels * _CHEBYSHEV_POINTS))):
        part = _search_rows(flat[group], app, smooth, truncate_mean, variant)
        for whole, piece in zip(result, part, strict=True):
            whole[group] = piece
    return result


def _search_rows(rows: Tensor, app: int, smooth: float, truncate_mean: bool, variant: str) -> Solution:
    values = rows.sort(dim=1, descending=True).values
    ordered = values.double()
    mean, variance, third = moments(ordered)
    skewness = third / variance.clamp(min=1e-300) ** 1.5
    sound = (variance >= _MIN_VARIANCE) & (skewness.abs() <= _MAX_SKEWNESS)
    if truncate_mean:
        mean = (ordered >= 0.5).sum(1).double()
    few = mean <= _FEW
    upper = torch.where(few, torch.floor(5 * mean + 1).long().clamp(max=rows.shape[1]), _upper(ordered, smooth))
    tau = torch.zeros_like(upper)
    value = torch.full_like(mean, torch.nan)
    for refined in (True, False):
        members = (sound & ((few | (app == 1)) == refined)).nonzero()[:, 0]
        if members.numel():
            law = mean[members], variance[members], third[members]
            tau[members], value[members] = _best(ordered[members], law, upper[members], smooth, refined, variant)
    result = _with_cutpoint(values, tau, value)
    broken = (~sound).nonzero()[:, 0]
    if broken.numel():
        left = rows[broken]
        exact = solve(left, statistics(left), "dice", smooth, pruning=False)
        for whole, piece in zip(result, exact, strict=True):
            whole[broken] = piece
    return result


def _with_cutpoint(values: Tensor, tau: Tensor, value: Tensor) -> Solution:
    """Return the solution with the volumes `tau` (R,) of rows with the sorted probabilities `values` (R, D)."""
    padded = torch.nn.functional.pad(values, (0, 1))
    cutpoint = padded.gather(1, tau[:, None])
    selected = torch.arange(values.shape[1], device=values.device) < tau[:, None]
    tied = ((values == cutpoint) & selected).sum(1)
    return Solution(tau, cutpoint[:, 0], tied, value)


def _upper(ordered: Tensor, smooth: float) -> Tensor:
    """Return the first τ with S_τ / (p_{τ+1} + 1e-5) > τ + γ + D, else D: no later volume can be best. (R,) int64."""
    pixels = ordered.shape[1]
    volume = torch.arange(1, pixels, dtype=torch.float64, device=ordered.device)
    enough = ordered.cumsum(1)[:, :-1] / (ordered[:, 1:] + 1e-5) > volume + smooth + pixels
    found = enough.any(1)
    first = enough.to(torch.uint8).argmax(1) + 1 if pixels > 1 else found.long()
    return torch.where(found, first, pixels)


def _best(
    ordered: Tensor, law: tuple[Tensor, Tensor, Tensor], upper: Tensor, smooth: float, refined: bool, variant: str
) -> tuple[Tensor, Tensor]:
    """Return the best volume in 0..`upper` of sorted rows (R, D), and its approximate score: (R,) each.

    `law` are the moments of Γ. `refined` chooses T-RNA, otherwise BA.
    """
    mean, variance, third = law
    pixels = ordered.shape[1]
    deviation = variance.sqrt()
    skewness = third / deviation**3
    low = torch.floor(mean + deviation * refined_quantile(_TAIL, skewness + 1e-5)).long() - 1
    high = torch.ceil(mean + deviation * refined_quantile(1 - _TAIL, skewness + 1e-5)).long()
    low, high = low.clamp(min=0), high.clamp(max=pixels)
    length = int((high - low).max().clamp(min=1))
    support = low[:, None] + torch.arange(length, dtype=torch.float64, device=low.device)
    inside = support < high[:, None]

    def distribution_without(p: float) -> Tensor:
        """Return the distribution of Γ without one pixel of probability `p`, on the support: (R, L)."""
        spread = p * (1 - p)
        sigma = (variance - spread).clamp(min=1e-12).sqrt()[:, None]
        skew = (third - spread * (1 - 2 * p))[:, None] / sigma**3
        centre = (mean - p)[:, None]
        steps = [refined_cdf((support + shift - centre) / sigma, skew) for shift in (0.5, -0.5)]
        mass = (steps[0] - steps[1]).clamp(0, 1) * inside
        return mass / mass.sum(1, keepdim=True).clamp(min=1e-300)

    longest = int(upper.max())
    volume = torch.arange(1, longest + 1, device=low.device)
    chosen = ordered[:, :longest]
    weights = distribution_without(0.0)
    if refined:
        score = torch.zeros_like(chosen)
        for polynomial, coefficient in zip(_chebyshev(chosen), _coefficients(distribution_without), strict=True):
            sums = (chosen * polynomial).cumsum(1)
            score += 2 * sums * _correlate(coefficient, low, longest, smooth + 2)
    else:
        score = 2 * chosen.cumsum(1) * _correlate(weights, low, longest, smooth + 1)
    shift = 1 if refined else 0
    losses = compares_losses(smooth, pixels)
    if losses:  # Σ_l γ w_l / (l+τ+γ) - 1 = -Σ_l w_l (l+τ) / (l+τ+γ), where all scores are close to 1
        score -= _correlate(weights, low, longest, smooth + shift, shift)
    elif smooth:
        score += smooth * _correlate(weights, low, longest, smooth + shift)
    score.masked_fill_(volume > upper[:, None], -torch.inf)
    value, step = score.max(1)
    tau = step + 1
    empty = torch.zeros_like(mean)
    if smooth:
        part = -support if losses else torch.full_like(support, smooth)
        empty = (part * weights / (support + smooth)).sum(1)
    tau = torch.where(value > empty, tau, 0)
    # If the range of τ ends before the support begins, "published" selects `upper` pixels, "experiments" none.
    out_of_reach = upper <= low
    tau = torch.where(out_of_reach, upper if variant == "published" else 0, tau)
    best = torch.maximum(value, empty) + (1 if losses else 0)
    return tau, torch.where(out_of_reach, torch.nan, best)


def _chebyshev(p: Tensor) -> list[Tensor]:
    """Return the first `_CHEBYSHEV_POINTS` Chebyshev polynomials at 2p - 1."""
    x = 2 * p - 1
    polynomials = [torch.ones_like(x), x]
    while len(polynomials) < _CHEBYSHEV_POINTS:
        polynomials.append(2 * x * polynomials[-1] - polynomials[-2])
    return polynomials


def _coefficients(function: Callable[[float], Tensor]) -> list[Tensor]:
    """Return the Chebyshev coefficients in p of `function`(p) -> (R, L), from its values at the Chebyshev points."""
    points = _CHEBYSHEV_POINTS
    angles = [math.pi * (k + 0.5) / points for k in range(points)]
    samples = torch.stack([function((1 + math.cos(angle)) / 2) for angle in angles])
    orders = torch.arange(points, dtype=torch.float64, device="cpu")
    cosines = torch.cos(orders[:, None] * torch.tensor(angles, dtype=torch.float64, device="cpu"))
    cosines[0] /= 2
    return list(torch.tensordot(cosines.to(samples.device), samples, dims=1) * (2 / points))


def _correlate(weights: Tensor, low: Tensor, longest: int, shift: float, numerator: float | None = None) -> Tensor:
    """Return Σ_l w_l / (l + τ + shift) for τ = 1..`longest`, l from `low`: (R, longest).

    With `numerator`, the terms are w_l (l + τ + numerator) / (l + τ + shift).
    """
    length = weights.shape[1]
    size = longest + length
    ramp = torch.arange(1, size + 1, dtype=torch.float64, device=weights.device)
    ramp = ramp + low[:, None]
    kernel = (1 if numerator is None else ramp + numerator) / (ramp + shift)
    fast = 1 << (size - 1).bit_length()
    product = torch.fft.rfft(kernel, fast) * torch.fft.rfft(weights, fast).conj()
    return torch.fft.irfft(product, fast)[:, :longest]


def moments(probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and third central moment of the number of object pixels, from `probs` (..., D): float64, (...)."""
    p = probs.double()
    spread = p * (1 - p)
    return p.sum(-1), spread.sum(-1), (spread * (1 - 2 * p)).sum(-1)


def refined_cdf(x: Tensor, skewness: Tensor) -> Tensor:
    """Return the refined normal distribution function Φ(x) + κ (1 - x²) φ(x) / 6 (Volkova, 1996), κ = `skewness`."""
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(x) + skewness * (1 - x * x) * density / 6


def refined_quantile(level: float, skewness: Tensor) -> Tensor:
    """Solve `refined_cdf`(x) = `level` for x by bisection on [-12, 12]; x has the shape of `skewness`."""
    low, high = torch.full_like(skewness, -12), torch.full_like(skewness, 12)
    for _ in range(60):
        middle = (low + high) / 2
        below = refined_cdf(middle, skewness) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
