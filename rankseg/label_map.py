"""Label maps from masks: one integer per pixel, with a value of its own for pixels that no mask claims.

`masks.int().argmax(1)` is not a label map: it turns a pixel without a class into class 0.

Shapes: N images, C classes, *S spatial axes.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from rankseg.validation import check_masks, check_probs, eager_only, plain

VOID = 255
"""Label of pixels without a class, and the usual `ignore_index` of segmentation losses."""


@eager_only
@torch.no_grad()
def label_map(masks: Tensor, unassigned: str | int = "void", probs: Tensor | None = None, *, first: int = 0) -> Tensor:
    """Return the label of each pixel: (N, *S) int64.

    A pixel in several masks gets the class with the largest of `probs` among them (the first one if tied); without
    `probs`, the first of them.

    Args:
        masks: (N, C, *S) bool, as the rules return them.
        unassigned: label of pixels that are in no mask. "void" is 255; "max" is the class with the largest of
            `probs`; an integer is that label.
        probs: (N, C, *S) in [0, 1], the probabilities that the masks were made from.
        first: label of the first class. A head without a background channel, such as one sigmoid channel for
            one object, needs `first=1, unassigned=0`: then 0 is the background.

    Raises:
        TypeError, ValueError: an argument is not as described, or the label of unassigned pixels is also a label of
            a class because there are more than 255 of them.
    """
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        got = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"masks must be a bool torch.Tensor, got {got}; compare first, as in masks > 0.5")
    masks = plain(masks, "masks")
    if masks.ndim < 3 or masks.shape[1] == 0:
        raise ValueError(
            f"masks must be (N, C, *S) with C >= 1, got shape {tuple(masks.shape)}; a single mask (H, W) is "
            "masks[None, None]"
        )
    if not _is_label(first):
        raise TypeError(f"first must be an integer, got {first!r}; 0 is the usual label of the first class")
    if probs is not None:
        probs = check_probs(probs)
        masks = check_masks(masks, probs)
    classes = masks.shape[1]
    first, fill = int(first), _fill_value(unassigned, probs, int(first), classes)
    labels = masks.new_full((masks.shape[0], *masks.shape[2:]), fill, dtype=torch.int64)
    if probs is None:
        for c in reversed(range(classes)):
            labels.masked_fill_(masks[:, c], first + c)
        return labels
    best = probs.new_full(labels.shape, -1.0)
    for c in range(classes):
        better = masks[:, c] & (probs[:, c] > best)
        best = torch.where(better, probs[:, c], best)
        labels.masked_fill_(better, first + c)
    if unassigned == "max":
        labels = torch.where(best < 0, first + probs.argmax(1), labels)
    return labels


def _fill_value(unassigned: str | int, probs: Tensor | None, first: int, classes: int) -> int:
    """Return the label that pixels outside of all masks start with."""
    if unassigned == "max":
        if probs is None:
            raise ValueError("unassigned='max' needs the probabilities; pass probs=")
        return VOID  # replaced in the end
    if unassigned == "void":
        if first <= VOID < first + classes:
            raise ValueError(
                f"unassigned='void' is label {VOID}, which is also a class among {classes}; pass unassigned=-1 "
                "or another integer that is not a class"
            )
        return VOID
    if not _is_label(unassigned):
        raise ValueError(f"unassigned must be 'void', 'max' or an integer, got {unassigned!r}")
    return int(unassigned)


def _is_label(value: Any) -> bool:
    """Return whether a value is an integer, also of NumPy, so small that the labels of all classes are int64."""
    return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < 1 << 62
