"""Expected Dice and IoU by quadrature: no normal approximation, no truncation, no loop over pixels or volumes.

1/x = ∫_0^∞ e^{-xt} dt turns both expectations into one integral over t (u = 1 - e^{-t}):

    log G(t) = Σ_j log(1 - p_j u)                     logarithm of E e^{-Γt}, Γ the number of object pixels
    q_j(t)   = p_j e^{-t} / (1 - p_j u)               p_j, exponentially tilted

    Dice_γ(τ) = ∫ e^{-(τ+γ)t} G(t) [γ + 2 Σ_{j≤τ} q_j(t)] dt
    IoU_γ(τ)  = (γ + Σ_{j≤τ} p_j) ∫ e^{-(τ+γ)t} exp(log G(t) - Σ_{j≤τ} log(1 - p_j u)) dt

Under the integral stands e^{-λt} times a slowly varying factor, λ the mean of the denominator, so Gauss–Laguerre
quadrature of that scale converges at once; below `_FEW` pixels the integrand is a polynomial in s = e^{-t} for
which Gauss–Jacobi is exact. Scales are shared by octaves of λ.

Shapes: B rows, W pixels of a row looked at singly (the window), W + 1 volumes, K nodes; power sums are (B, 5).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankseg.quadrature import jacobi, laguerre

# Up to this mean of the denominator 64 Gauss–Jacobi nodes integrate exactly (polynomials of degree < 128).
_FEW = 48.0

# Numbers that are integrated at once, which is as many nodes as fit: what a cache holds, or a little of a GPU.
_AT_ONCE = {"cpu": 1 << 16, "other": 1 << 21}

# `log_series` stops after four terms: an error below 4! (p/λ)^4 = 1e-12 for pixels p <= 4.5e-4 λ.
NEGLIGIBLE = 4.5e-4


def octave(scale: Tensor) -> Tensor:
    """Which quadrature rule a mean denominator `scale` belongs to: 0 below `_FEW`, then one an octave."""
    return torch.floor(torch.log2(scale / _FEW)).clamp(min=-1).long() + 1


def nodes(band: int, smooth: float) -> tuple[Tensor, Tensor]:
    """Nodes t and logarithmic weights w of octave `band`, (K,) each: ∫ e^{-at} H dt ≈ Σ exp(w - at) H(t)."""
    if band == 0:
        return jacobi(64, smooth % 1)
    scale = _FEW * 2.0 ** (band - 0.5)
    times, weights = laguerre(16 if scale < 4000 else 10)
    return times / scale, weights - math.log(scale)


def log_series(sums: Tensor, u: Tensor) -> Tensor:
    """Σ log(1 - pu) = -Σ_k u^k P_k / k from power sums (B, 5), u (K,): (B, K). No logarithm a pixel is needed."""
    _, p1, p2, p3, p4 = sums.unsqueeze(2).unbind(1)
    return -u * (p1 + u * (p2 / 2 + u * (p3 / 3 + u * p4 / 4)))


def tilted_series(sums: Tensor, u: Tensor) -> Tensor:
    """Σ p e^{-t} / (1 - pu) = e^{-t} Σ_k u^k P_{k+1} from power sums (B, 5), u (K,): (B, K)."""
    _, p1, p2, p3, p4 = sums.unsqueeze(2).unbind(1)
    return (1 - u) * (p1 + u * (p2 + u * (p3 + u * p4)))


def power_sums(values: Tensor, among: Tensor) -> Tensor:
    """Σ p^k, k = 0..4, over the values (B, W) marked by `among` (B, W) bool: (B, 5)."""
    part = values * among
    square = part * part
    parts = [among.to(part), part, square, square * part, square * square]
    return torch.stack([part.sum(1) for part in parts], dim=1)


def cumulative(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ..., W values along the last axis: (·, W + 1)."""
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))


def window_scores(
    score: str,
    values: Tensor,
    chosen: Tensor,
    rest: Tensor,
    smooth: float,
    wanted: Tensor,
    losses: bool = False,
    log_absent: Tensor | None = None,
) -> Tensor:
    """Exact expected score of the volumes n + 0..W, n the number of `chosen` pixels: (B, W + 1) float64.

    Args:
        values: (B, W) the window in decreasing order, filled up with zeros.
        chosen: (B, 5) power sums of pixels outside of the window which every volume includes.
        rest: (B, 5) power sums of pixels outside of the window which no volume includes.
        wanted: (B, W + 1) bool, the volumes to evaluate; others are -inf.
        losses: return score - 1 instead, which stays accurate if every score rounds to 1.
        log_absent: (B,) log Π(1 - p) over all pixels of a row, if known more accurately than from power sums.
    """
    steps = torch.arange(values.shape[1] + 1, device=values.device, dtype=values.dtype)
    volume = chosen[:, :1] + steps
    captured = chosen[:, 1:2] + cumulative(values)
    mean = captured[:, -1:] + rest[:, 1:2]
    scale = volume + smooth + mean - (captured if score == "iou" else 0)
    band = torch.where(wanted, octave(scale), -1)
    result = torch.where(wanted, 0.0, -torch.inf).to(values)
    for number in torch.unique(band[wanted]).tolist():
        now = band == number
        rows = now.any(1).nonzero()[:, 0]
        sums = (values[rows], rest[rows], chosen[rows], volume[rows], captured[rows])
        absent = None if log_absent is None else log_absent[rows]
        found = _integrate(score, *sums, smooth, *nodes(number, smooth), losses, absent)
        result[rows] = torch.where(now[rows], found, result[rows])
    return result


def _integrate(
    score: str,
    values: Tensor,
    rest: Tensor,
    chosen: Tensor,
    volume: Tensor,
    captured: Tensor,
    smooth: float,
    times: Tensor,
    weights: Tensor,
    losses: bool,
    log_absent: Tensor | None,
) -> Tensor:
    """Integrate the module's formulas at the nodes `times` (K,), for all volumes of a window: (B, W + 1)."""
    result = torch.zeros_like(volume)
    of_empty = torch.zeros_like(volume[:, 0])
    singly, volume_at = values[:, None], (volume + smooth)[:, None]
    none_of_all = log_series(rest, rest.new_ones(1)) + torch.log1p(-values).sum(1, keepdim=True)  # log G(∞)
    at_once = max(1, _AT_ONCE.get(values.device.type, _AT_ONCE["other"]) // (values.numel() + 1))
    rule = zip(times.to(values).split(at_once), weights.to(values).split(at_once), strict=True)
    for t, weight in rule:
        u = -torch.expm1(-t)
        logs = torch.log1p(singly * -u[:, None])  # (B, K, W)
        log_rest, log_window = log_series(rest, u), logs.sum(2)
        if score == "dice" or losses:
            tilted = singly * (1 - u[:, None]) / (1 - singly * u[:, None])
            before, all_tilted = cumulative(tilted), tilted_series(rest, u) + tilted.sum(2)
        if score == "dice":
            log_all = log_rest + log_series(chosen, u) + log_window
            sums = tilted_series(chosen, u)[..., None] + before
            # For losses: the pixels of the mask outside the object, and those of the object outside the mask.
            sums = volume[:, None] - sums + (all_tilted[..., None] - before) if losses else smooth + 2 * sums
            exponent = (log_all + weight)[..., None] - volume_at * t[:, None]
            result += (exponent.exp_() * sums).sum(1)
        else:
            behind = (log_rest + log_window + weight)[..., None] - cumulative(logs)
            behind = (behind - volume_at * t[:, None]).exp_()
            if losses:
                behind *= (volume - captured)[:, None] + (all_tilted[..., None] - before)
            result += behind.sum(1)
        if losses:
            of_empty += (torch.exp(log_rest + log_window + weight - smooth * t) * all_tilted).sum(1)
        elif smooth:
            of_empty += _without_pole(log_rest + log_window, none_of_all, weight - smooth * t, smooth).sum(1)
    if losses:
        result, of_empty = -result, -of_empty
    elif score == "iou":
        result *= captured + smooth
    if smooth and not losses:
        # E[γ/(γ+Γ)] = P(Γ = 0) + γ ∫ e^{-γt} (G(t) - P(Γ = 0)) dt; 0/0 is 0.
        of_empty *= smooth
        if smooth < 1:
            of_empty += torch.exp(none_of_all[:, 0] if log_absent is None else log_absent)
    result[:, 0] = torch.where(volume[:, 0] == 0, of_empty, result[:, 0])
    return result


def _without_pole(log_all: Tensor, none_of_all: Tensor, weight: Tensor, smooth: float) -> Tensor:
    """The integrand e^{-γt} G of the empty mask, less e^{-γt} G(∞) for γ < 1, where it has a pole: (B, K)."""
    whole = torch.exp(log_all + weight)
    if smooth >= 1:
        return whole
    gain = log_all - none_of_all
    small = torch.exp(none_of_all + weight) * torch.expm1(gain.clamp(max=1))
    return torch.where(gain < 1, small, whole - torch.exp(none_of_all + weight))
