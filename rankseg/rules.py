"""Prediction rules: probabilities in, masks out.

Every rule is a `Predictor`: a function from probabilities (N, C, *S) in [0, 1] to masks (N, C, *S) bool.
`threshold` and `argmax` are the usual two (the paper's T and max); `rankdice` and `rankiou` are the Bayes
rules of the scores themselves. Partial application turns options into rules:

    rule = functools.partial(rankdice, app=2, truncate_mean=True, variant="experiments")

Shapes: N images, C classes, *S spatial axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from rankseg.rank_dice import rank_dice, rank_iou
from rankseg.validation import check_probs, eager_only


class Predictor(Protocol):
    """A prediction rule: probs (N, C, *S) float in [0, 1] -> masks (N, C, *S) bool."""

    def __call__(self, probs: Tensor) -> Tensor: ...


@eager_only
def threshold(probs: Tensor, at: float | Sequence[float] | Tensor = 0.5) -> Tensor:
    """Select the pixels of each class with probability >= `at`: masks (N, C, *S) bool.

    `at` is one number for all classes, or one for each class, (C,).

    Raises:
        TypeError, ValueError: see `rankseg.validation.check_probs`; or `at` is outside [0, 1] or not one per class.
    """
    number = float(at) if isinstance(at, Real) and not isinstance(at, bool) else -1.0
    if 0 <= number <= 1:
        return check_probs(probs) >= number
    probs = check_probs(probs)
    cutoffs = torch.as_tensor(at, dtype=torch.float64, device=probs.device) if _is_numbers(at) else None
    if cutoffs is None or cutoffs.shape != probs.shape[1:2] or not ((cutoffs >= 0) & (cutoffs <= 1)).all():
        raise ValueError(
            f"at must be a probability in [0, 1], or one for each of {probs.shape[1]} classes, got {at!r}; "
            "0.5 is the usual choice"
        )
    return probs >= cutoffs.to(probs.dtype).view(-1, *[1] * (probs.ndim - 2))


def _is_numbers(at: object) -> bool:
    numbers = at.tolist() if isinstance(at, Tensor) else at
    return isinstance(numbers, (list, tuple)) and all(isinstance(x, Real) and not isinstance(x, bool) for x in numbers)


@eager_only
def argmax(probs: Tensor) -> Tensor:
    """Give each pixel to its most probable class (the first one if tied): masks (N, C, *S) bool.

    Raises:
        TypeError, ValueError: see `rankseg.validation.check_probs`.
    """
    probs = check_probs(probs)
    masks = torch.zeros(probs.shape, dtype=torch.bool, device=probs.device)
    if probs.numel():
        masks.scatter_(1, probs.argmax(1, keepdim=True), True)
    return masks


@eager_only
def rankdice(probs: Tensor, **options: Any) -> Tensor:
    """Select the masks that maximise the expected Dice: masks (N, C, *S) bool.

    `options` are those of `rankseg.rank_dice`, which also returns the volumes and the cut-offs.
    """
    return rank_dice(probs, **options).predict


@eager_only
def rankiou(probs: Tensor, **options: Any) -> Tensor:
    """Select the masks that maximise the expected IoU: masks (N, C, *S) bool.

    `options` are those of `rankseg.rank_iou`, which also returns the volumes and the cut-offs.
    """
    return rank_iou(probs, **options).predict
