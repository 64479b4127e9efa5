"""Expected Dice and IoU by quadrature: no normal approximation, no truncation, no loop over pixels or volumes.

1/x = ∫_0^∞ e^{-xt} dt turns both expectations into one integral over t (u = 1 - e^{-t}):

    log G(t) = Σ_j log(1 - p_j u)                     logarithm of E e^{-Γt}, Γ the number of object pixels
    q_j(t)   = p_j e^{-t} / (1 - p_j u)               p_j, exponentially tilted

    Dice_γ(τ) = ∫ e^{-(τ+γ)t} G(t) [γ + 2 Σ_{j≤τ} q_j(t)] dt
    IoU_γ(τ)  = (γ + Σ_{j≤τ} p_j) ∫ e^{-(τ+γ)t} exp(log G(t) - Σ_{j≤τ} log(1 - p_j u)) dt

Let λ be the mean of the denominator. The integrand is e^{-λt} times a slowly varying factor, so Gauss–Laguerre
quadrature of scale 1/λ needs few nodes. It is also a power of s = e^{-t} times a polynomial in s. Gauss–Jacobi
quadrature, used below λ = `_JACOBI_MAX`, integrates it exactly up to degree 127. All λ of an octave (a band) share
their nodes. A rule is a pair (t, w) of float64 tensors, ∫ e^{-at} H(t) dt ≈ Σ_k exp(w_k - a t_k) H(t_k). The logarithms
of the weights are stored: they are added to the exponents of the integrand before `exp`, and cannot overflow or
underflow.

The empty mask scores E[γ/(γ+Γ)] = P(Γ=0) + γ ∫ e^{-γt} (G(t) - P(Γ=0)) dt, P(Γ=0) = Π (1 - p_j), for γ < 1. The
integrand of ∫ e^{-γt} G(t) dt alone would have a pole at γ = 0.

If γ exceeds the number of pixels, every score is close to 1. The loss 1 - score is integrated instead: the mean of
|A Δ B| / denominator, A the mask and B the object, whose terms are all positive.

`kernel.cpp` and `triton_kernels.py` use the same formulas, and the constants of this module: change all three together.

Shapes: B rows, W pixels of a window, W + 1 volumes, K nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Below this mean of the denominator, 64 Gauss–Jacobi nodes are used: exact for polynomials of degree < 128.
_JACOBI_MAX = 48.0

# Values per block of nodes in `_integrate`: they fit a CPU's cache, or a small part of a GPU's memory.
_BLOCK_VALUES = {"cpu": 1 << 16, "other": 1 << 23}

# Number of bands: denominators up to 48 · 2^59, far beyond the largest `smooth`.
_BANDS = 60

# `log_series` stops after four terms: an error below 4! (p/λ)^4 = 1e-12 for pixels p <= 4.5e-4 λ.
NEGLIGIBLE = 4.5e-4


@lru_cache(maxsize=8)
def laguerre(nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss–Laguerre rule of unit scale; for a scale λ use t/λ and w - log λ.

    It is exact for e^{-t} times polynomials of degree < 2·nodes. The nodes are the eigenvalues of the Jacobi
    matrix (Golub & Welsch, 1969). The weights come from the Laguerre functions e^{-x/2} L_n(x), which stay
    of moderate size where the weights themselves fall to 1e-22 (16 nodes).
    """
    order = torch.arange(nodes, dtype=torch.float64, device="cpu")
    x = torch.linalg.eigvalsh(torch.diag(2 * order + 1) + torch.diag(order[1:], 1) + torch.diag(order[1:], -1))
    before, function = torch.zeros_like(x), torch.exp(-x / 2)
    for n in range(nodes + 1):
        before, function = function, ((2 * n + 1 - x) * function - n * before) / (n + 1)
    # Weight x / ((n+1) L_{n+1}(x))², times e^{x} because e^{-x} belongs to the integrand here.
    return x, torch.log(x) - 2 * torch.log((nodes + 1) * function.abs())


@lru_cache(maxsize=8)
def jacobi(nodes: int, power: float = 0.0) -> tuple[Tensor, Tensor]:
    """Gauss–Jacobi rule in s = e^{-t} on (0, 1) with weight s^power, 0 <= power < 1 (0: Gauss–Legendre).

    It is exact for integrals ∫_0^1 s^power · polynomial(s) ds of degree < 2·nodes. Expected scores with a mean
    denominator below `_JACOBI_MAX` are such integrals, up to a negligible rest; `power` is the fractional part of
    `smooth`.
    """
    n = torch.arange(nodes, dtype=torch.float64, device="cpu")
    m, b = n[1:], power
    diagonal = b * b / ((2 * n + b) * (2 * n + b + 2)) if b else torch.zeros_like(n)
    off = torch.sqrt(4 * m * m * (m + b) ** 2 / ((2 * m + b) ** 2 * (2 * m + b + 1) * (2 * m + b - 1)))
    z, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    s = (1 + z) / 2
    t = -torch.log(s)
    return t, torch.log(vectors[0] ** 2 / (1 + b)) + (1 + b) * t


def band_of(scale: Tensor) -> Tensor:
    """Return the band of a mean denominator `scale`: 0 below `_JACOBI_MAX`, then one for each octave."""
    return torch.floor(torch.log2(scale / _JACOBI_MAX)).clamp(min=-1).long() + 1


def nodes(band: int, smooth: float) -> tuple[Tensor, Tensor]:
    """Return nodes t and logarithmic weights w of `band`, (K,) each, on the CPU; see the module for their meaning."""
    if band == 0:
        return jacobi(64, smooth % 1)
    scale = _JACOBI_MAX * 2.0 ** (band - 0.5)
    times, weights = laguerre(16 if scale < 4000 else 10)
    return times / scale, weights - math.log(scale)


@lru_cache(maxsize=16)
def node_table(device: torch.device, power: float) -> tuple[Tensor, Tensor]:
    """Return nodes and logarithmic weights of all bands on `device`, (bands, 64) each; unused weights are -inf.

    `power` is the fractional part of `smooth`.
    """
    times = torch.zeros(_BANDS, 64, dtype=torch.float64, device="cpu")
    weights = torch.full_like(times, -torch.inf)
    for band in range(_BANDS):
        t, w = nodes(band, power)
        times[band, : len(t)], weights[band, : len(t)] = t, w
    return times.to(device), weights.to(device)


def log_series(sums: Tensor, u: Tensor) -> Tensor:
    """Σ log(1 - pu) = -Σ_k u^k P_k / k from power sums (B, 5) and u (1 or B, K), without logarithms: (B, K)."""
    _, p1, p2, p3, p4 = sums.unsqueeze(2).unbind(1)
    inner = torch.addcmul(p2, u, torch.addcmul(p3, u, p4, value=3 / 4), value=2 / 3)
    return torch.addcmul(p1, u, inner, value=1 / 2).mul_(u).neg_()


def tilted_series(sums: Tensor, u: Tensor) -> Tensor:
    """Σ p e^{-t} / (1 - pu) = e^{-t} Σ_k u^k P_{k+1} from power sums (B, 5) and u (1 or B, K): (B, K)."""
    _, p1, p2, p3, p4 = sums.unsqueeze(2).unbind(1)
    return torch.addcmul(p1, u, torch.addcmul(p2, u, torch.addcmul(p3, u, p4))).mul_(1 - u)


def power_sums(values: Tensor, among: Tensor) -> Tensor:
    """Σ p^k, k = 0..4, over the values (B, W) marked by `among` (B, W) bool: (B, 5)."""
    part = values * among
    square = part * part
    parts = [among.to(part), part, square, square * part, square * square]
    return torch.stack([part.sum(1) for part in parts], dim=1)


def cumulative(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ..., W values along the last axis: (·, W + 1)."""
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))


class Window(NamedTuple):
    """Some pixels of B rows, and the power sums Σ p^k, k = 0..4, of all other pixels.

    `values` (B, W) are the probabilities of these pixels in decreasing order, padded with zeros. `included` (B, 5) are
    the power sums of the pixels that every mask contains, `excluded` (B, 5) of those that no mask contains;
    `excluded[:, 0]` is not used. Mask k contains the included pixels and the first k of `values`.
    """

    values: Tensor
    included: Tensor
    excluded: Tensor

    def rows(self, index: Tensor) -> Window:
        """Return the window of some rows."""
        return Window(*(part[index] for part in self))

    def volume(self) -> Tensor:
        """Return the number of pixels of each mask: (B, W + 1) float64."""
        return self.included[:, :1] + torch.arange(self.values.shape[1] + 1, device=self.values.device)

    def captured(self) -> Tensor:
        """Return the probability mass of each mask: (B, W + 1)."""
        return self.included[:, 1:2] + cumulative(self.values)

    def mean(self) -> Tensor:
        """Return the probability mass of all pixels: (B, 1)."""
        return self.captured()[:, -1:] + self.excluded[:, 1:2]

    def denominator(self, score: str, smooth: float) -> Tensor:
        """Return the mean denominator of the score of each mask: (B, W + 1)."""
        captured = self.captured()
        total = self.volume() + smooth + captured[:, -1:] + self.excluded[:, 1:2]
        return total - captured if score == "iou" else total


def window_scores(
    score: str,
    window: Window,
    smooth: float,
    wanted: Tensor,
    losses: bool = False,
    log_absent: Tensor | None = None,
    span: list[int] | None = None,
) -> Tensor:
    """Return the exact expected score of each wanted mask of a window, -inf for the others: (B, W + 1) float64.

    Args:
        score: "dice" or "iou".
        wanted: (B, W + 1) bool.
        losses: return -(1 - score), of which the largest is the best too; it stays accurate if every score rounds to 1.
        log_absent: (B,) log Π(1 - p) over all pixels of a row, if known more accurately than from power sums.
        span: the result of `band_span` as a list, if known; it saves one synchronisation with a GPU.
    """
    values = window.values
    band = band_of(window.denominator(score, smooth))
    result = torch.where(wanted, 0.0, -torch.inf).to(values)
    if values.device.type == "cpu":
        for number in torch.unique(band[wanted]).tolist():
            in_band = wanted & (band == number)
            rows = in_band.any(1).nonzero()[:, 0]
            absent = None if log_absent is None else log_absent[rows]
            t, w = nodes(number, smooth)
            found = _integrate(score, window.rows(rows), smooth, t[None], w[None], losses, absent)
            result[rows] = torch.where(in_band[rows], found, result[rows])
        return result
    # On a GPU, step k integrates all rows together, each with the nodes of its own lowest band + k.
    lowest = band.where(wanted, _BANDS - 1).amin(1, keepdim=True)
    first, most = band_span(band, wanted).tolist() if span is None else span
    times, weights = (x[:, : 64 if first == 0 else 16] for x in node_table(values.device, smooth % 1))
    for step in range(most):
        number = (lowest + step).clamp(max=_BANDS - 1)
        t, w = (table.index_select(0, number[:, 0]) for table in (times, weights))
        found = _integrate(score, window, smooth, t, w, losses, log_absent)
        result = torch.where(wanted & (band == number), found, result)
    return result


def band_span(band: Tensor, wanted: Tensor) -> Tensor:
    """Return the lowest wanted band of all rows, and the largest number of bands that one row spans: (2,) int64."""
    lowest, highest = band.where(wanted, _BANDS).amin(1), band.where(wanted, -1).amax(1)
    return torch.stack([lowest.amin(), (highest - lowest + 1).amax()])


def _integrate(
    score: str,
    window: Window,
    smooth: float,
    times: Tensor,
    weights: Tensor,
    losses: bool,
    log_absent: Tensor | None,
) -> Tensor:
    """Integrate the module's formulas for all masks of a window, with nodes and weights (1 or B, K): (B, W + 1)."""
    values, included, excluded = window
    volume, captured = window.volume(), window.captured()
    result = torch.zeros_like(volume)
    empty_score = torch.zeros_like(volume[:, 0])  # of the empty mask; used only if mask 0 is empty (no `included`)
    probs, rate = values[:, None], (volume + smooth)[:, None]
    log_no_object = log_series(excluded, torch.ones_like(excluded[:, :1]))  # log P(Γ = 0) = log G(∞)
    log_no_object = log_no_object + torch.log1p(-values).sum(1, keepdim=True)
    for t, weight in _node_blocks(times, weights, values):
        u = -torch.expm1(-t)
        logs = torch.log1p(probs * -u[..., None])  # (B, K, W)
        log_excluded, log_window = log_series(excluded, u), logs.sum(2)
        if score == "dice" or losses:
            tilted = probs * (1 - u[..., None]) / (1 - probs * u[..., None])
            tilted_inside, tilted_all = cumulative(tilted), tilted_series(excluded, u) + tilted.sum(2)
        if score == "dice":
            log_all = log_excluded + log_series(included, u) + log_window
            hits = tilted_series(included, u)[..., None] + tilted_inside
            # For losses: the pixels of the mask outside the object, and those of the object outside the mask.
            part = volume[:, None] - hits + (tilted_all[..., None] - tilted_inside) if losses else smooth + 2 * hits
            exponent = (log_all + weight)[..., None] - rate * t[..., None]
            result += (exponent.exp_() * part).sum(1)
        else:
            exponent = (log_excluded + log_window + weight)[..., None] - cumulative(logs)
            part = (exponent - rate * t[..., None]).exp_()
            if losses:
                part *= (volume - captured)[:, None] + (tilted_all[..., None] - tilted_inside)
            result += part.sum(1)
        if losses:
            empty_score += (torch.exp(log_excluded + log_window + weight - smooth * t) * tilted_all).sum(1)
        elif smooth:
            empty_score += _empty_mask_integrand(
                log_excluded + log_window, log_no_object, weight - smooth * t, smooth
            ).sum(1)
    if losses:
        result, empty_score = -result, -empty_score
    elif score == "iou":
        result *= captured + smooth
    if smooth and not losses:
        # E[γ/(γ+Γ)] = P(Γ = 0) + γ ∫ e^{-γt} (G(t) - P(Γ = 0)) dt; 0/0 is 0.
        empty_score *= smooth
        if smooth < 1:
            empty_score += torch.exp(log_no_object[:, 0] if log_absent is None else log_absent)
    result[:, 0] = torch.where(volume[:, 0] == 0, empty_score, result[:, 0])
    return result


def _node_blocks(times: Tensor, weights: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split nodes and weights (1 or B, K) into blocks that limit the memory; at most four on a GPU."""
    count = times.shape[1]
    kind = "cpu" if values.device.type == "cpu" else "other"
    at_once = max(1 if kind == "cpu" else -(-count // 4), _BLOCK_VALUES[kind] // (values.numel() + 1))
    return zip(times.split(at_once, 1), weights.split(at_once, 1), strict=True)


def _empty_mask_integrand(log_all: Tensor, log_no_object: Tensor, weight: Tensor, smooth: float) -> Tensor:
    """Return the terms of ∫ e^{-γt} G dt; for γ < 1, of ∫ e^{-γt} (G - G(∞)) dt, which has no pole at γ = 0: (B, K)."""
    integrand = torch.exp(log_all + weight)
    if smooth >= 1:
        return integrand
    excess = log_all - log_no_object
    small = torch.exp(log_no_object + weight) * torch.expm1(excess.clamp(max=1))
    return torch.where(excess < 1, small, integrand - torch.exp(log_no_object + weight))
