"""rank_iou: the masks that maximise the expected IoU.

Shapes: N images, C classes, *S spatial axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankseg.backend import best_masks
from rankseg.masks import RankResult
from rankseg.validation import check_flag, check_form, check_smooth, eager_only, to_device


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
