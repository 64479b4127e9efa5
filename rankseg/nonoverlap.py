"""Masks that do not overlap: one label a pixel, chosen for the mean expected score of an image's classes.

Over label maps the surrogate F = mean_c f_c, f_c = (2a_c + γ) / (n_c + μ_c + γ + 1) for Dice and
f_c = (a_c + γ) / (n_c + μ_c + γ - a_c) for IoU, is maximised, a_c the probability mass and n_c the number of pixels
given to class c. To first order a pixel given to class c adds (2p - f_c) / d_c, or ((1 + f_c) p - f_c) / d_c for IoU,
d_c the denominator. So each round is one argmax of affinely re-weighted probabilities; an image keeps its new
map only if F rose.

Only classes likely to be present take part: the scores average over classes that occur in the prediction or
in the truth, so predicting an absent class costs a zero.

Shapes: N images, C classes, D pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankseg.masks import RankResult

_ROUNDS = 20
_WORTH = 1e-7  # a round must raise F by this part


def surrogate_objective(probs: Tensor, labels: Tensor, present: Tensor, score: str, smooth: float) -> Tensor:
    """F of label maps (N, D), `labels` = C meaning no class, over the classes `present` (N, C): (N,) float64."""
    mean = probs.sum(2, dtype=torch.float32).double()
    value, _ = _class_scores(probs, labels, mean, score, smooth)
    return (value * present).sum(1) / present.sum(1).clamp(min=1)


def one_label_a_pixel(probs: Tensor, score: str, smooth: float, pruning: bool) -> RankResult:
    """Give each pixel of `probs` (N, C, *S) at most one class; `score` is "dice" or "iou".

    The search begins with the argmax and never falls below it in F. Equal gains go to the first class. A pixel
    belongs to no class where every class would lose by it, and in images without a likely class; with `pruning`
    likely are the classes with a probability above 1/2, otherwise all. `cutpoint` is the largest probability
    among the pixels of other labels.
    """
    shape = probs.shape[:2]
    flat = probs.flatten(2)
    if probs.numel() == 0:
        return RankResult(
            torch.zeros_like(probs, dtype=torch.bool), probs.new_zeros(shape).long(), probs.new_zeros(shape)
        )
    classes = probs.shape[1]
    present = flat.amax(2) > (0.5 if pruning else 0.0)
    mean = flat.sum(2, dtype=torch.float32).double()
    labels = _drop_absent(flat.argmax(1), present)
    value, denominator = _class_scores(flat, labels, mean, score, smooth)
    objective = (value * present).sum(1)
    for _ in range(_ROUNDS):
        slope = (2 if score == "dice" else 1 + value) / denominator
        offset = torch.where(present, -value / denominator, -torch.inf)
        gain = flat * slope.to(flat.dtype)[:, :, None]
        gain += offset.to(flat.dtype)[:, :, None]
        best, proposal = gain.max(1)
        proposal.masked_fill_(best <= 0, classes)
        new_value, new_denominator = _class_scores(flat, proposal, mean, score, smooth)
        new_objective = (new_value * present).sum(1)
        better = new_objective > objective * (1 + _WORTH)
        if not better.any():
            break
        labels = torch.where(better[:, None], proposal, labels)
        value = torch.where(better[:, None], new_value, value)
        denominator = torch.where(better[:, None], new_denominator, denominator)
        objective = torch.where(better, new_objective, objective)
    masks = torch.zeros(flat.shape[0], classes + 1, flat.shape[2], dtype=torch.bool, device=probs.device)
    masks = masks.scatter_(1, labels[:, None], True)[:, :classes]
    tau = masks.sum(2)
    cutpoint = flat.masked_fill(masks, 0).amax(2)
    return RankResult(masks.reshape(probs.shape), tau, cutpoint)


def _drop_absent(labels: Tensor, present: Tensor) -> Tensor:
    """Replace the labels (N, D) of classes that are not `present` (N, C) by C, no class."""
    return labels.masked_fill(~present.gather(1, labels), present.shape[1])


def _class_scores(
    flat: Tensor, labels: Tensor, mean: Tensor, score: str, smooth: float
) -> tuple[Tensor, Tensor]:
    """f_c and d_c of label maps (N, D) for `mean` μ (N, C): two (N, C) float64."""
    classes = flat.shape[1]
    picked = flat.gather(1, labels.clamp(max=classes - 1)[:, None])[:, 0].double()
    zeros = mean.new_zeros(mean.shape[0], classes + 1)
    mass = zeros.scatter_add(1, labels, picked)[:, :classes]
    volume = zeros.scatter_add(1, labels, torch.ones_like(picked))[:, :classes]
    if score == "dice":
        denominator = volume + mean + smooth + 1
        return (2 * mass + smooth) / denominator, denominator
    denominator = (volume + mean + smooth - mass).clamp(min=1e-12)
    return (mass + smooth) / denominator, denominator
