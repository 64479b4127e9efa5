"""Lovász-Softmax: the convex extension of the Jaccard loss (Berman, Triki & Blaschko, CVPR 2018).

Shapes: P pixels, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lovasz_softmax(probs: Tensor, labels: Tensor) -> Tensor:
    """Return the Lovász extension of 1 - IoU, averaged over the classes present in the labels.

    probs: (C, P) in [0, 1]. labels: (P,) int64 in [0, C), at least one pixel. One ratio is taken over all the
    pixels together, whatever images they come from.
    """
    losses = []
    for index in labels.unique().tolist():
        actual = labels == index
        errors = (actual.to(probs.dtype) - probs[index]).abs()
        errors, order = errors.sort(descending=True)
        losses.append((errors * jaccard_steps(actual[order], probs.dtype)).sum())
    return torch.stack(losses).mean()


def jaccard_steps(actual: Tensor, dtype: torch.dtype) -> Tensor:
    """Return by how much each further mistake raises the Jaccard loss (algorithm 1 of the paper).

    actual: (P,) bool, the true pixels of a class in the order in which they are got wrong, at least one True.
    Returns (P,), summing to 1. The steps are written in closed form, as differences of neighbouring losses
    cancel in float32 once there are many pixels.
    """
    missed = actual.cumsum(0)
    total = missed[-1]
    intersection = total - missed
    union = (total + (~actual).cumsum(0)).to(dtype)
    # A missed pixel takes 1 from the intersection: 1/U. A false one adds 1 to the union: I/(U-1) - I/U.
    return torch.where(actual, 1 / union, intersection / (union * (union - 1)))
