"""The exact expected score of any mask. It needs no labels.

Shapes: N images, C classes, *S spatial axes, R = N·C rows, D pixels of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankseg.backend import compiled_engine, one_thread
from rankseg.exact import NEGLIGIBLE, Window, window_scores
from rankseg.gather import blocks, gather, row_numbers, tile_of, tiles
from rankseg.masks import rows_of
from rankseg.validation import check_form, check_masks, check_smooth, check_values, eager_only


@eager_only
def expected_dice(probs: Tensor, masks: Tensor, smooth: float = 0.0) -> Tensor:
    """Return E[(2|A∩B| + smooth) / (|A| + |B| + smooth)] of masks A: (N, C) float64.

    B is the random object, its pixels independent with probabilities `probs` (N, C, *S); `masks` (N, C, *S) bool.
    0/0 is 0. The relative error is about 1e-12; for large maps in half or single precision about 1e-11.

    Raises:
        TypeError, ValueError: see `rankseg.validation`.
    """
    return _expected("dice", probs, masks, smooth)


@eager_only
def expected_iou(probs: Tensor, masks: Tensor, smooth: float = 0.0) -> Tensor:
    """Return E[(|A∩B| + smooth) / (|A∪B| + smooth)] of masks A: (N, C) float64.

    As `expected_dice`, for the IoU.
    """
    return _expected("iou", probs, masks, smooth)


@torch.no_grad()
def _expected(score: str, probs: Tensor, masks: Tensor, smooth: float) -> Tensor:
    probs = check_form(probs)
    masks = check_masks(masks, probs)
    smooth = check_smooth(smooth)
    engine = compiled_engine(probs)
    if engine is not None and (compiled := engine.expected(probs, masks, score, smooth)) is not None:
        return compiled
    with one_thread(probs.device):
        return _with_torch(score, check_values(probs), masks, smooth)


def _with_torch(score: str, probs: Tensor, masks: Tensor, smooth: float) -> Tensor:
    """`_expected` of the Python implementation."""
    result = torch.zeros(probs.shape[0] * probs.shape[1], dtype=torch.float64, device=probs.device)
    if probs.numel() == 0:
        return result.view(probs.shape[:2])
    flat, rows = rows_of(probs), torch.arange(result.numel(), device=probs.device)
    # The confident pixels of small objects need a logarithm each; power sums represent the others.
    mean = flat.sum(1, dtype=torch.float32)
    low = (0.9 * NEGLIGIBLE * (mean + smooth)).to(flat.dtype)
    got = gather(flat, rows, low, masks=rows_of(masks))
    log_absent = _log_absent(flat, rows_of(masks)) if 0 < smooth < 1 else None
    # The pixels of the mask get a positive sign, the others a negative one; zeros fill the rows in between.
    signed = torch.where(got.flags, got.values, -got.values)
    for members, values in blocks(got.rows, signed, got.width):
        volumes = torch.arange(values.shape[1] + 1, device=values.device)
        inside = (values > 0).sum(1, keepdim=True)
        window = Window(values.abs(), got.included[members], got.excluded[members])
        absent = None if log_absent is None else log_absent[members]
        scores = window_scores(score, window, smooth, volumes == inside, log_absent=absent)
        result[members] = scores.gather(1, inside)[:, 0]
    return result.view(probs.shape[:2])


def _log_absent(flat: Tensor, masks: Tensor) -> Tensor:
    """log P(Γ = 0) = Σ log(1 - p) of the rows with an empty mask, which depend on it for γ < 1: (R,) float64."""
    result = torch.zeros(flat.shape[0], dtype=torch.float64, device=flat.device)
    empty = (~masks.any(1)).nonzero()[:, 0]
    numbers = row_numbers(empty)
    for across, along in tiles(empty.numel(), flat.shape[1], flat.device):
        tile = tile_of(flat, numbers, across, along).double()
        result[empty[across]] += torch.log1p(-tile).sum(1)
    return result
