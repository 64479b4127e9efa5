"""Prediction rules: probabilities in, masks out.

Every rule is a `Predictor`: a function from probabilities (N, C, *S) in [0, 1] to masks (N, C, *S) bool.
`threshold` and `argmax` are the usual two (the paper's T and max). `rankdice` and `rankiou` maximise the expected Dice
and IoU. `rank_dice` and `rank_iou` return volumes and cut-offs too; `rank_dice` accepts the published
calls.
`functools.partial` makes a rule with other options:

    rule = functools.partial(rankdice, app=2, truncate_mean=True, variant="experiments")

Shapes: N images, C classes, *S spatial axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from rankseg import approximations
from rankseg.engines import best_masks
from rankseg.masks import RankResult, as_result, rows_of
from rankseg.validation import (
    check_choice,
    check_flag,
    check_form,
    check_probs,
    check_smooth,
    check_values,
    eager_only,
    to_device,
)


class Predictor(Protocol):
    """A prediction rule: probs (N, C, *S) float in [0, 1] -> masks (N, C, *S) bool."""

    def __call__(self, probs: Tensor) -> Tensor: ...


@eager_only
def threshold(probs: Tensor, at: float | Sequence[float] | Tensor = 0.5) -> Tensor:
    """Select the pixels of each class with probability >= `at`: masks (N, C, *S) bool.

    `at` is one number for all classes, or one for each class, (C,). It is rounded to the dtype of `probs`. So a
    pixel that is below `at` by a rounding error is selected.

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
@torch.no_grad()
def rank_dice(
    probs: Tensor,
    app: int = 0,
    smooth: float = 0.0,
    *,
    allow_overlap: bool = True,
    classes: Sequence[int] | None = None,
    truncate_mean: bool = False,
    pruning: bool = True,
    variant: str = "published",
    device: torch.device | str | None = None,
    verbose: int = 0,
) -> RankResult:
    """Select, for each class of each image, the mask of the highest expected Dice.

    The labels of the pixels are taken as independent with the probabilities given, and
    Dice = (2 |A∩B| + smooth) / (|A| + |B| + smooth), 0/0 = 0 (Dai & Li, JMLR 24(224), 2023, section 3).

    Args:
        probs: (N, C, *S) in [0, 1], any floating dtype; calibrated probabilities give the best masks. Keep the
            axis of a single class: (N, H, W) would be read as H classes of W pixels each. Pixels of probability 0
            change nothing: set void and padding to 0.
        app: 0 exact; 1 the published T-RNA; 2 the published blind approximation (BA), which uses T-RNA for classes
            with at most 50 expected object pixels.
        smooth: the constant γ of the score, from 0 to 1e15.
        allow_overlap: True decides each class on its own; False gives each pixel at most one label
            (`rankseg.nonoverlap`), with `app=0` only.
        classes: with `allow_overlap=False`, the classes whose mean score is maximised, such as the foreground; default
            all. The other classes get the pixels that are left. With two channels (background, foreground) the default
            scores the background too, so the foreground mask is smaller; `classes=[1]` gives the mask of one channel.
        truncate_mean: use the number of pixels with p >= 1/2 as the expected number of object pixels (`app` 1 and 2).
        pruning: give the empty mask to classes whose largest probability is at most 1/2, as published. Such a
            class is probably absent. One selected pixel of an absent class scores 0; an empty mask is not counted.
            Without pruning (and with smooth = 0) nearly every class gets a mask.
        variant: "published", or "experiments" for the code that made the paper's tables (`app` 1 and 2 only). The
            experiments prune classes only if their largest probability is below 1/2. If the search finds no volume,
            they return the empty mask, and the published function returns the last volume of the range.
        device: where to compute and to put the results; default: the device of `probs`.
        verbose: 1 prints the volumes.

    Returns:
        `predict` (N, C, *S) bool, `tau` (N, C) int64, `cutpoint` (N, C): see `RankResult`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it and the remedy.
    """
    probs, smooth, allow_overlap, pruning = _check(probs, smooth, allow_overlap, pruning, classes)
    app = check_choice("app", app, (0, 1, 2))
    truncate_mean = check_flag("truncate_mean", truncate_mean)
    check_choice("variant", variant, ("published", "experiments"))
    if app == 0 and (truncate_mean or variant != "published"):
        raise ValueError("truncate_mean and variant belong to the approximations; pass app=1 or app=2 with them")
    if app != 0 and not allow_overlap:
        raise ValueError(f"allow_overlap=False is solved for app=0 only, got app={app}; leave out one of the two")
    probs = to_device(probs, device)
    if app == 0 or probs.numel() == 0:
        result = best_masks(probs, "dice", smooth, pruning, allow_overlap, classes)
    else:
        probs = check_values(probs)
        flat = rows_of(probs)
        found = approximations.search(flat, app, smooth, truncate_mean, pruning, variant)
        result = as_result(probs, flat, found.tau, found.cutpoint, found.tied)
    if verbose:
        print(f"rank_dice: volumes {result.tau.tolist()}")
    return result


@eager_only
@torch.no_grad()
def rank_iou(
    probs: Tensor,
    smooth: float = 0.0,
    *,
    allow_overlap: bool = True,
    classes: Sequence[int] | None = None,
    pruning: bool = True,
    device: torch.device | str | None = None,
) -> RankResult:
    """Select, for each class of each image, the mask of the highest expected IoU, exactly.

    IoU = (|A∩B| + smooth) / (|A∪B| + smooth), 0/0 = 0. For a mask A, the intersection depends only on pixels in A and
    the union only on pixels outside A. They are independent, so the expectation is a product. The arguments, the result
    and the errors are as in `rankseg.rank_dice`.
    """
    probs, smooth, allow_overlap, pruning = _check(probs, smooth, allow_overlap, pruning, classes)
    return best_masks(to_device(probs, device), "iou", smooth, pruning, allow_overlap, classes)


def _check(
    probs: Tensor, smooth: float, allow_overlap: bool, pruning: bool, classes: Sequence[int] | None
) -> tuple[Tensor, float, bool, bool]:
    """Return the checked arguments that both rules have; no value of `probs` is read."""
    probs, smooth = check_form(probs), check_smooth(smooth)
    allow_overlap, pruning = check_flag("allow_overlap", allow_overlap), check_flag("pruning", pruning)
    if classes is not None and allow_overlap:
        raise ValueError("classes needs allow_overlap=False; with overlap, each class is decided on its own")
    return probs, smooth, allow_overlap, pruning


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
