"""rank_dice: the masks that maximise the expected Dice (first, plain version)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankseg.validation import check_choice, check_probs, check_smooth


class RankResult(NamedTuple):
    """Masks `predict` (N, C, *S) bool, volumes `tau` (N, C) int64, cut-offs `cutpoint` (N, C)."""

    predict: Tensor
    tau: Tensor
    cutpoint: Tensor


def search_sorted(row: Tensor, smooth: float, score: str) -> int:
    """Best volume of one class from its float64 probabilities sorted in decreasing order, by all volumes."""
    pixels = row.numel()
    taus = torch.arange(pixels + 1, dtype=torch.float64)
    sums = torch.cat([row.new_zeros(1), row.cumsum(0)])
    mean = sums[-1]
    if mean == 0:
        return 0
    centre = (
        float((2 * sums / (taus + mean + 1 + smooth)).argmax())
        if score == "dice"
        else float(((sums + smooth) / (taus + mean - sums + smooth + 1e-9)).argmax())
    )
    low, high = max(int(centre) - 200, 0), min(int(centre) + 200, pixels)
    import numpy as np

    x, w = (torch.from_numpy(a) for a in np.polynomial.laguerre.laggauss(32))
    scale = centre + mean + 1 + smooth
    values = torch.zeros(high - low + 1, dtype=torch.float64)
    window = torch.arange(low, high + 1)
    for node, weight in zip(x, w, strict=True):
        t = node / scale
        u = -torch.expm1(-t)
        logs = torch.log1p(-row * u)
        if score == "dice":
            tilted = torch.cat([row.new_zeros(1), (row * torch.exp(-t) / (1 - row * u)).cumsum(0)])
            inner = logs.sum() - (window + smooth) * t + node
            values += weight / scale * torch.exp(inner) * (smooth + 2 * tilted[window])
        else:
            rest = logs.sum() - torch.cat([row.new_zeros(1), logs.cumsum(0)])
            values += (
                weight
                / scale
                * torch.exp(rest[window] - (window + smooth) * t + node)
                * (smooth + sums[window])
            )
    return low + int(values.argmax())


def plain(probs: Tensor, smooth: float, pruning: bool, score: str) -> RankResult:
    flat = probs.flatten(2)
    n, c, d = flat.shape
    predict = torch.zeros(n, c, d, dtype=torch.bool)
    tau = torch.zeros(n, c, dtype=torch.int64)
    cutpoint = torch.zeros(n, c, dtype=probs.dtype)
    for i in range(n):
        for j in range(c):
            values, order = flat[i, j].cpu().sort(descending=True, stable=True)
            best = 0 if pruning and values[0] <= 0.5 else search_sorted(values.double(), smooth, score)
            tau[i, j] = best
            predict[i, j, order[:best]] = True
            cutpoint[i, j] = 0 if best == d else values[best]
    device = probs.device
    return RankResult(predict.view(probs.shape).to(device), tau.to(device), cutpoint.to(device))


def rank_dice(
    probs: Tensor,
    app: int = 0,
    smooth: float = 0.0,
    *,
    allow_overlap: bool = True,
    truncate_mean: bool = False,
    pruning: bool = True,
    variant: str = "published",
    device: torch.device | str | None = None,
    verbose: int = 0,
) -> RankResult:
    """Masks that maximise the expected Dice of each class of each image."""
    probs = check_probs(probs)
    smooth = check_smooth(smooth)
    check_choice("app", app, (0, 1, 2))
    check_choice("variant", variant, ("published", "experiments"))
    if device is not None:
        probs = probs.to(device)
    return plain(probs, smooth, pruning, "dice")
