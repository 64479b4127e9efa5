"""Compute one label per pixel from probabilities and a rule, for palette pictures; one class at a time if possible.

A rule may give a pixel to several classes, or to none. The label is then
  - of the scored classes that have the pixel, the one of the highest probability;
  - else a class that is not scored (the background), the most probable one, whether or not it has the pixel;
  - else, where every class is scored, void: no class claims the pixel.

Shapes: C classes, H × W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import rankseg
from configs.errors import UserError
from datasets.base import DatasetInfo
from rankseg import Predictor

SEPARABLE = (rankseg.threshold, rankseg.rankdice, rankseg.rankiou)


def one_by_one(rule: Predictor) -> bool:
    """Whether the rule decides each class for itself, so that it may be shown them one after another."""
    if not isinstance(rule, partial):
        return rule in SEPARABLE
    return rule.func in SEPARABLE and rule.keywords.get("allow_overlap", True)


def masks_of(probs: Tensor, rule: Predictor) -> Iterator[Tensor]:
    """Yield each class's mask (H, W) bool of probabilities (C, H, W)."""
    if one_by_one(rule):
        for channel in probs:
            yield rule(channel[None, None])[0, 0]
    else:
        yield from rule(probs[None])[0]


def label_map(
    probs: Tensor, rule: Predictor, info: DatasetInfo, each: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """Return the labels (H, W) uint8 that a rule gives to probabilities (C, H, W).

    ``each(c, mask)`` is called with the mask of every class, overlaps and all.

    Raises ValueError where probabilities and classes do not belong together.
    """
    if len(probs) != info.num_classes:
        raise UserError(
            f"the network gives {len(probs)} classes and the data set has {info.num_classes}: pass the right --classes"
        )
    labels = torch.full(probs.shape[1:], info.ignore_index, dtype=torch.uint8)
    best = torch.full(probs.shape[1:], -2.0)
    for c, mask in enumerate(masks_of(probs, rule)):
        if each is not None:
            each(c, mask)
        scored = c in info.scored
        # What is not scored ranks in (-2, -1]: behind a scored class that has the pixel.
        rank = probs[c] if scored else probs[c] - 2 + 1e-6
        better = rank > best
        if scored:
            better &= mask
        torch.where(better, rank, best, out=best)  # indexing by a mask takes 16 bytes per pixel
        labels.masked_fill_(better, c)
    return labels
