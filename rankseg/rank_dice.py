"""rank_dice and rank_iou: the masks that maximise the expected score. rank_dice has the published signature.

Shapes: N images, C classes, *S spatial axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankseg import approximations
from rankseg.backend import best_masks
from rankseg.masks import RankResult, as_result, rows_of
from rankseg.validation import check_choice, check_flag, check_form, check_smooth, check_values, eager_only, to_device


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
        app: 0 exact; 1 the published T-RNA, 2 the published blind approximation (BA).
        smooth: the constant γ of the score, from 0 to 1e15.
        allow_overlap: classes are decided one by one; False gives each pixel one label at most
            (`rankseg.nonoverlap`), with `app=0` only.
        classes: with `allow_overlap=False`, the classes whose mean score is maximised, such as the foreground; default
            all. The other classes get the pixels that are left. With two channels (background, foreground) the default
            scores the background too, so the foreground mask is smaller; `classes=[1]` gives the mask of one channel.
        truncate_mean: count the pixels with p >= 1/2 in place of the mean (`app` 1 and 2 only).
        pruning: give the empty mask to classes whose largest probability is at most 1/2, as published. Such a
            class is probably absent. One selected pixel of an absent class scores 0; an empty mask is not counted.
            Without pruning (and with smooth = 0) nearly every class gets a mask.
        variant: "published" or "experiments", the code that made the paper's tables (`app` 1 and 2 only). It prunes
            classes whose largest probability is below 1/2. If no volume is found in the search range, the mask is
            empty; the published function returns the last volume of the range.
        device: where to compute; the results are there too. Default: where `probs` is.
        verbose: 1 prints the volumes.

    Returns:
        `predict` (N, C, *S) bool, `tau` (N, C) int64, `cutpoint` (N, C): see `RankResult`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it and the remedy.
    """
    probs = check_form(probs)
    smooth = check_smooth(smooth)
    app = check_choice("app", app, (0, 1, 2))
    allow_overlap, pruning = check_flag("allow_overlap", allow_overlap), check_flag("pruning", pruning)
    truncate_mean = check_flag("truncate_mean", truncate_mean)
    check_choice("variant", variant, ("published", "experiments"))
    if app == 0 and (truncate_mean or variant != "published"):
        raise ValueError("truncate_mean and variant belong to the approximations; pass app=1 or app=2 with them")
    if app != 0 and not allow_overlap:
        raise ValueError(f"allow_overlap=False is solved for app=0 only, got app={app}; leave out one of the two")
    probs = to_device(probs, device)
    if classes is not None and allow_overlap:
        raise ValueError("classes needs allow_overlap=False; overlapping masks are decided class by class")
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

    IoU = (|A∩B| + smooth) / (|A∪B| + smooth), 0/0 = 0. Given the mask, intersection and union outside of it are
    independent, so the expectation factorises and no surrogate is needed. The arguments, the result and the
    errors are those of `rankseg.rank_dice`.
    """
    probs = check_form(probs)
    smooth = check_smooth(smooth)
    allow_overlap, pruning = check_flag("allow_overlap", allow_overlap), check_flag("pruning", pruning)
    probs = to_device(probs, device)
    if classes is not None and allow_overlap:
        raise ValueError("classes needs allow_overlap=False; overlapping masks are decided class by class")
    return best_masks(probs, "iou", smooth, pruning, allow_overlap, classes)
