"""From volumes and cut-offs to masks of exactly that volume.

Shapes: N images, C classes, *S spatial axes, R = N·C rows, D pixels of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankseg.gather import tiles


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
    masks = _above(flat, torch.where(everything, -1, cutpoint))
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


def _above(flat: Tensor, cut: Tensor) -> Tensor:
    """Whether each pixel of `flat` (R, D) exceeds `cut` (R,): (R, D) bool."""
    if flat.device.type != "cpu":
        return flat > cut[:, None]
    masks = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    space = flat.new_empty(0)
    for across, along in tiles(flat.shape[0], flat.shape[1], flat.device):
        # torch compares into floats and copies these to bool two to three times as fast as it compares into bool.
        space.resize_(flat[across, along].shape)
        masks[across, along] = torch.gt(flat[across, along], cut[across, None], out=space)
    return masks


def as_result(probs: Tensor, flat: Tensor, tau: Tensor, cutpoint: Tensor, tied: Tensor) -> RankResult:
    """Build the published triple from row-wise volumes and cut-offs."""
    masks = select(flat, tau, cutpoint, tied)
    cutpoint = cutpoint.masked_fill(tau == flat.shape[1], 0)
    shape = probs.shape[:2]
    return RankResult(masks.view(probs.shape), tau.view(shape), cutpoint.view(shape))
