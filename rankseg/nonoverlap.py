"""Non-overlapping masks: at most one label per pixel, chosen for the mean expected score of an image's classes.

The search maximises, over label maps, the surrogate F = mean_c f_c with

    f_c = (2a_c + γ) / (n_c + μ_c + γ + 1) for Dice,      f_c = (a_c + γ) / (n_c + μ_c + γ - a_c) for IoU,

a_c the probability mass and n_c the number of pixels of class c. To first order, a pixel of class c adds
(2p - f_c) / d_c, or ((1 + f_c) p - f_c) / d_c for IoU, d_c the denominator. Each round is therefore one argmax of
affinely re-weighted probabilities. An image keeps its new label map only if F rose.

By default only classes that are likely to be present take part. The score of an image is the mean over classes that
occur in the prediction or in the truth, so predicting an absent class adds a zero.

Shapes: N images, C classes, D pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from rankseg.gather import tiles, working_dtype
from rankseg.masks import RankResult
from rankseg.solver import compares_losses

_ROUNDS = 20
_MIN_GAIN = 1e-7  # a round must raise F (or, see `compares_losses`, lower 1 - F) by this fraction


def surrogate_objective(probs: Tensor, labels: Tensor, present: Tensor, score: str, smooth: float) -> Tensor:
    """Return F of `labels` (N, D), C for no class, over the classes `present` (N, C) of `probs` (N, C, D): (N,)."""
    classes = probs.shape[1]
    mean = probs.sum(2, dtype=torch.float64)
    picked = probs.gather(1, labels.clamp(max=classes - 1)[:, None])[:, 0].double()
    zeros = mean.new_zeros(mean.shape[0], classes + 1)
    mass = zeros.scatter_add(1, labels, picked)[:, :classes]
    volume = zeros.scatter_add(1, labels, torch.ones_like(picked))[:, :classes]
    value, _, _ = _class_scores(mass, volume, mean, score, smooth)
    return (value * present).sum(1) / present.sum(1).clamp(min=1)


def over_classes(probs: Tensor, classes: Sequence[int], solve: Callable[[Tensor, bool], RankResult]) -> RankResult:
    """Non-overlapping masks of `probs` (N, C, *S) for the mean expected score of the given `classes` alone.

    A single class is solved exactly, like a problem with one channel. A pixel that is in no mask of `classes` gets the
    most probable other class, if that probability is above 0. `solve` returns the masks of some classes, given their
    maps and whether masks may overlap.

    Raises:
        ValueError: `classes` are not distinct channels of `probs`.
    """
    total = probs.shape[1]
    chosen = list(classes) if isinstance(classes, Iterable) else []
    integers = all(isinstance(c, Integral) and not isinstance(c, bool) and 0 <= c < total for c in chosen)
    if not chosen or not integers or len(set(chosen)) != len(chosen):
        raise ValueError(
            f"classes must be distinct integers in 0..{total - 1}, at least one, got {classes!r}; leave classes out "
            "to score all of them"
        )
    others = [c for c in range(total) if c not in chosen]
    masks = torch.zeros_like(probs, dtype=torch.bool, memory_format=torch.contiguous_format)
    inner, outer = (torch.tensor(part, device="cpu").to(probs.device) for part in (chosen, others))
    solved = solve(probs.index_select(1, inner), len(chosen) == 1).predict
    masks.index_copy_(1, inner, solved)
    if others:
        top, index = probs.index_select(1, outer).max(1, keepdim=True)
        free = ~solved.any(1, keepdim=True) & (top > 0)
        masks.scatter_(1, outer[index], free)
    flat_masks = masks.flatten(2)
    return RankResult(masks, flat_masks.sum(2), _largest_left_out(probs.flatten(2), flat_masks))


def non_overlapping_masks(probs: Tensor, score: str, smooth: float, pruning: bool) -> RankResult:
    """Give each pixel of `probs` (N, C, *S) at most one class; `score` is "dice" or "iou".

    The search starts from the argmax, in which unlikely classes lose their pixels, and F never falls below that. If
    gains are equal, the first class gets the pixel. A pixel has no label if it would lower F in every likely class. A
    class is likely if one of its probabilities exceeds 1/2 (without `pruning`: 0). `cutpoint` is the largest
    probability among the pixels outside a mask.
    """
    shape = probs.shape[:2]
    masks = torch.zeros_like(probs, dtype=torch.bool, memory_format=torch.contiguous_format)
    if probs.numel() == 0:
        return RankResult(masks, probs.new_zeros(shape).long(), probs.new_zeros(shape))
    flat, found = probs.flatten(2), masks.flatten(2)
    present = flat.amax(2) > (0.5 if pruning else 0.0)
    mean = flat.sum(2, dtype=torch.float32).double()
    ones = torch.ones_like(mean)
    mass, volume = _assign(flat, ones, 0 * ones, present, found)
    value, denominator, loss = _class_scores(mass, volume, mean, score, smooth)
    losses = compares_losses(smooth, flat.shape[2])
    objective = ((-loss if losses else value) * present).sum(1)
    proposal = torch.empty_like(found)
    for _ in range(_ROUNDS):
        slope = (2 if score == "dice" else 1 + value) / denominator
        offset = torch.where(present, -value / denominator, -torch.inf)
        new_mass, new_volume = _assign(flat, slope, offset, present, proposal)
        new_value, new_denominator, loss = _class_scores(new_mass, new_volume, mean, score, smooth)
        new_objective = ((-loss if losses else new_value) * present).sum(1)
        better = new_objective > objective + objective.abs() * _MIN_GAIN
        some, every = torch.stack([better.any(), better.all()]).tolist()
        if not some:
            break
        if every:
            found, proposal = proposal, found
        else:
            torch.where(better[:, None, None], proposal, found, out=found)
        value = torch.where(better[:, None], new_value, value)
        denominator = torch.where(better[:, None], new_denominator, denominator)
        volume = torch.where(better[:, None], new_volume, volume)
        objective = torch.where(better, new_objective, objective)
    return RankResult(found.view(probs.shape), volume.round().long(), _largest_left_out(flat, found))


def _assign(flat: Tensor, slope: Tensor, offset: Tensor, present: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Give each pixel to the class with the largest slope·p + offset if that exceeds 0; the first one if tied.

    Writes `masks` (N, C, D) bool of the classes `present` (N, C); `slope` and `offset` are (N, C). Returns the
    probability mass and the number of pixels of each class: two (N, C) float64.
    """
    images, classes, pixels = flat.shape
    dtype = working_dtype(flat)
    slope, offset, kept = (x.to(dtype)[:, :, None] for x in (slope, offset, present))
    mass, volume = torch.zeros(2, images, classes, dtype=torch.float64, device=flat.device)
    for row_slice, column_slice in tiles(images, pixels, flat.device, depth=classes):
        tile = flat[row_slice, :, column_slice].to(dtype)
        gain = tile * slope[row_slice]
        gain += offset[row_slice]
        best = gain.amax(1, keepdim=True)
        best.masked_fill_(best <= 0, torch.inf)
        # Comparing with the maximum is several times as fast as computing its index.
        given = gain.eq_(best)
        # On other devices, testing for ties costs more than it saves.
        if given.device.type != "cpu" or (given.sum(1) > 1).any():
            given *= given.cumsum(1) <= 1
        given *= kept[row_slice]
        masks[row_slice, :, column_slice] = given
        volume[row_slice] += given.sum(2)
        mass[row_slice] += given.mul_(tile).sum(2, dtype=torch.float64)
    return mass, volume


def _largest_left_out(flat: Tensor, masks: Tensor) -> Tensor:
    """Return the largest probability outside each mask (N, C, D), 0 if no pixel is outside: (N, C)."""
    largest = flat.new_zeros(flat.shape[:2])
    for row_slice, column_slice in tiles(flat.shape[0], flat.shape[2], flat.device, depth=flat.shape[1]):
        outside = flat[row_slice, :, column_slice].masked_fill(masks[row_slice, :, column_slice], 0)
        largest[row_slice] = torch.maximum(largest[row_slice], outside.amax(2))
    return largest


def _class_scores(
    mass: Tensor, volume: Tensor, mean: Tensor, score: str, smooth: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return f_c, d_c and 1 - f_c, from the mass and the volume of each class and the mean μ: (N, C) float64 each."""
    if score == "dice":
        denominator = volume + mean + smooth + 1
        return (2 * mass + smooth) / denominator, denominator, (volume + mean + 1 - 2 * mass) / denominator
    denominator = (volume + mean + smooth - mass).clamp(min=1e-12)
    return (mass + smooth) / denominator, denominator, (volume + mean - 2 * mass) / denominator
