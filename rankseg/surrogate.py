"""The reciprocal-moment surrogate: an estimate of the optimum, and the proof that no other volume is better.

Jensen's inequality gives a lower bound of every expected score, and 1 - pu <= e^{-pu} an upper bound:

    Dice   (2C + γ) / (τ + μ + γ + 1)  <=  Dice_γ(τ)  <=  (2C + γ) / (τ + μ + γ - 1)
    IoU    (C + γ) / (τ + μ + γ - C)   <=   IoU_γ(τ)  <=  (C + γ) / (τ + μ + γ - C - 1)

for every volume τ >= 1, where C = C(τ) is the sum of the τ largest probabilities and μ that of all. The lower
bound is the surrogate of Wang & Dai (NeurIPS 2025). A volume whose upper bound is below the best lower bound
cannot be optimal; `margin` explains why it is enough to check the two ends of a bracket.

Shapes: R rows, D pixels of a row, W + 1 volumes of a bracket.
"""

from __future__ import annotations

import torch
from torch import Tensor


def loss_bound(score: str, volume: Tensor, captured: Tensor, mean: Tensor, smooth: float) -> Tensor:
    """Return 1 - lower bound, for masks of `volume` pixels that capture the probability mass `captured`.

    It stays accurate if `smooth` is so large that every score rounds to 1.
    """
    total = volume + mean
    if score == "dice":
        return (total + 1 - 2 * captured) / (total + smooth + 1)
    # 0/0 is a score of 0: the empty mask of an impossible object.
    denominator = total + smooth - captured
    return torch.where(denominator > 0, (total - 2 * captured) / denominator.clamp(min=1e-300), 1.0)


def margin(score: str, volume: Tensor, captured: Tensor, mean: Tensor, smooth: float, loss: Tensor) -> Tensor:
    """Return g(τ). If it is negative, the volume τ scores less than 1 - `loss`, which another volume attains.

    Multiplied out, "upper bound >= best" reads g >= 0 with g = 2C + γ - best·(τ + μ + γ - 1) for Dice and
    g = (1 + best)·C + γ - best·(τ + μ + γ - 1) for IoU, best = 1 - loss. C(τ) is concave in τ (its steps are the
    sorted probabilities), hence so is g. The volumes with g >= 0 are therefore an interval around the surrogate's
    optimum: if g < 0 on both sides of a bracket, no volume outside of it can be optimal.
    """
    total = volume + mean
    weight = 2 if score == "dice" else 2 - loss
    slack = 1e-12 * total  # rounding must not exclude a volume
    return weight * captured - (total - 1) + loss * (total + smooth - 1) + slack


def ranks_needed(score: str, margins: Tensor, edges: Tensor, loss: Tensor) -> Tensor:
    """Return how many more pixels at each end of the bracket make g negative there: (2, R), infinite if none do.

    `margins` (2, R) is g at the first and the last volume, `edges` (2, R) are the upper and the lower cut-off. The
    probability of a pixel above the bracket exceeds the upper cut-off, so leaving the pixel out lowers g by at least
    weight·edge - best. Adding a pixel below the bracket lowers g by at least best - weight·edge.
    """
    best = 1 - loss
    step = edges * (2 if score == "dice" else 1 + best) - best
    step[1].neg_()
    needed = torch.floor(margins / step.clamp(min=1e-300)) + 1
    return needed.clamp_(min=0).masked_fill_(step <= 0, torch.inf)


def excess_root(score: str, cut: Tensor, excess: Tensor, volume: Tensor, mean: Tensor, smooth: float) -> Tensor:
    """Return the cut-off after `cut` (R,) in Dinkelbach's iteration; `excess` is Σ_{p > cut} (p - cut).

    The optimal cut-off is the root of a convex decreasing function, Σ (p - cut)_+ + γ/2 - cut·(μ + γ + 1) for Dice
    and Σ (p - cut)_+ + γ - cut·(μ + 2γ) for IoU. Dinkelbach's iteration is Newton's method for this root.
    """
    constant, slope = (smooth / 2, mean + smooth + 1) if score == "dice" else (smooth, mean + 2 * smooth)
    return (cut + (excess + constant - cut * slope) / (volume + slope)).clamp(0.001, 0.999)


def from_sample(score: str, sample: Tensor, stride: int, mean: Tensor, smooth: float) -> tuple[Tensor, ...]:
    """Estimate the cut-off, its volume, and the density of pixels there, from every `stride`-th pixel: (R,) each.

    Dinkelbach's iteration needs no sort: every step is a count and a sum over {p > cut}.
    """
    sample = sample.float()
    cut = torch.full_like(mean, 0.35)
    for _ in range(4):
        above = (sample - cut[:, None]).relu_()
        excess, volume = above.sum(1) * stride, above.sign_().sum(1) * stride
        cut = excess_root(score, cut, excess, volume, mean, smooth)
    near = (sample - cut[:, None]).abs_() < 0.05
    return cut, volume, (near.sum(1, dtype=torch.float32) + 1) * (stride / 0.1)


def bracket(cut: Tensor, density: Tensor) -> tuple[Tensor, Tensor]:
    """Return a bracket (low, high) of cut-offs that most likely holds all volumes that `margin` does not exclude.

    Leaving out k pixels at distance x from the cut-off costs about 2kx; the two bounds differ by 4·cut. The width is
    only a guess: the solver proves afterwards that it is sufficient, or widens the bracket.
    """
    half = 3 * torch.sqrt(cut / density) + 0.002 * cut
    return (cut - half).clamp(min=1e-3), cut + half
