"""rank_iou: the masks that maximise the expected IoU (first, plain version)."""

from __future__ import annotations

import torch
from torch import Tensor

from rankseg.rank_dice import RankResult, plain
from rankseg.validation import check_probs, check_smooth


def rank_iou(
    probs: Tensor,
    smooth: float = 0.0,
    *,
    allow_overlap: bool = True,
    pruning: bool = True,
    device: torch.device | str | None = None,
) -> RankResult:
    """Masks that maximise the expected IoU of each class of each image."""
    probs = check_probs(probs)
    smooth = check_smooth(smooth)
    if device is not None:
        probs = probs.to(device)
    return plain(probs, smooth, pruning, "iou")
