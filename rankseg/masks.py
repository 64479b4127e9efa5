"""From volumes and cut-offs to masks of exactly that volume, and from masks to label maps.

Shapes: N images, C classes, *S spatial axes, R = N·C rows, D pixels of a row.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankseg.validation import check_masks, check_probs, eager_only, plain


class RankResult(NamedTuple):
    """The result of `rank_dice` and `rank_iou`.

    `predict` (N, C, *S) bool: the masks. `tau` (N, C) int64: their volumes in pixels. `cutpoint` (N, C), in the
    dtype of the probabilities: the largest probability that is not selected; 0 if all pixels are selected.
    """

    predict: Tensor
    tau: Tensor
    cutpoint: Tensor


def rows_of(probs: Tensor) -> Tensor:
    """View `probs` (N, C, *S) as rows (N·C, D); only what cannot be viewed is copied."""
    return probs.reshape(probs.shape[0] * probs.shape[1], -1)


def select(flat: Tensor, tau: Tensor, cutpoint: Tensor, tied: Tensor) -> Tensor:
    """Return masks (R, D) of the `tau` (R,) most probable pixels of each row. Of tied pixels the first are selected.

    `cutpoint` (R,) is the largest probability that is not selected (ignored if `tau` is D). `tied` (R,) is the
    number of selected pixels with exactly that probability.
    """
    everything = tau == flat.shape[1]
    masks = (flat > torch.where(everything, -1, cutpoint)[:, None]).contiguous()
    missing = tied.masked_fill(everything, 0)
    rows = missing.nonzero()[:, 0]
    height = max(1, (1 << 22) // flat.shape[1])
    if flat.device.type != "cpu":
        height = max(height, -(-rows.numel() // 8))
    for row in rows.split(height):
        equal = flat[row] == cutpoint[row, None]
        equal &= equal.cumsum(1, dtype=torch.int32) <= missing[row, None]
        masks[row] |= equal
    return masks


def as_result(probs: Tensor, flat: Tensor, tau: Tensor, cutpoint: Tensor, tied: Tensor) -> RankResult:
    """Build the result from volumes, cut-offs and numbers of tied pixels (R,) of the rows `flat` of `probs`."""
    masks = select(flat, tau, cutpoint, tied)
    cutpoint = cutpoint.masked_fill(tau == flat.shape[1], 0)
    shape = probs.shape[:2]
    return RankResult(masks.view(probs.shape), tau.view(shape), cutpoint.view(shape))


# ---------------------------------------------------------------------------------------------------------------------
# Label maps: one integer per pixel. `masks.int().argmax(1)` would turn a pixel without a class into class 0.

VOID = 255  # label of pixels without a class, and the usual `ignore_index` of segmentation losses


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
        TypeError, ValueError: an argument is not as described, or `unassigned` is "void" and a class has label 255.
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
        return VOID  # `label_map` replaces it
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
