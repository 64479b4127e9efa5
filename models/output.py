"""The output of every network."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SegmentationOutput(NamedTuple):
    """Scores of each class at each pixel, before softmax or sigmoid.

    Attributes:
        logits: (N, C, H, W) at the size of the images.
        aux: (N, C, H, W) of an auxiliary head while training, else None.
    """

    logits: Tensor
    aux: Tensor | None = None
