"""The paper's evaluation preprocessing, equal to OpenCV's and Pillow's to the bit, without OpenCV.

Shapes: image (3, H, W) uint8, mask (H, W) uint8.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def centre_crop(image: Tensor, mask: Tensor, crop: int) -> tuple[Tensor, Tensor]:
    """Return the paper's evaluated window of a pair, (3, crop, crop) and (crop, crop), both uint8.

    The short side is scaled to `crop` and the other to `floor(crop * long / short)`, image bilinear without
    antialiasing and truncated, label nearest; then the centre is cut out, starting at `(size - crop) // 2`.
    """
    height, width = image.shape[-2:]
    short = min(height, width)
    new_height, new_width = crop * height // short, crop * width // short
    top, left = (new_height - crop) // 2, (new_width - crop) // 2
    window = bilinear_window(image, (new_height, new_width), top, left, crop)
    # Where a sampling point falls on a pixel's edge, Pillow decides by accumulated rounding: only Pillow
    # repeats it.
    labels = Image.fromarray(mask.numpy()).resize((new_width, new_height), Image.Resampling.NEAREST)
    return window, torch.from_numpy(np.array(labels.crop((left, top, left + crop, top + crop))))


def bilinear_window(image: Tensor, size: tuple[int, int], top: int, left: int, crop: int) -> Tensor:
    """Return a window of the image resized to (height, width), as OpenCV's float resize and truncation.

    OpenCV interpolates along rows first, then columns, each as one fused `a + (b - a) f` in float32. The
    fused product and sum is had by computing them in float64; any other order or rounding changes pixels
    whose exact value is whole.
    """
    row, next_row, row_share = taps(image.shape[-2], size[0], top, crop)
    column, next_column, column_share = taps(image.shape[-1], size[1], left, crop)
    first, last = int(row[0]), int(next_row[-1]) + 1
    pixels = image.permute(1, 2, 0)[first:last]  # channels last, as decoded: columns are then cheap to pick
    left_pixels, right_pixels = (pixels.index_select(1, at).short() for at in (column, next_column))
    across = mix(left_pixels, right_pixels, column_share[:, None])
    upper, lower = (across.index_select(0, at - first) for at in (row, next_row))
    return mix(upper, lower, row_share[:, None, None]).to(torch.uint8).permute(2, 0, 1)


def taps(size: int, new_size: int, start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return two source indices and the second's share for `count` places of a resized line from `start`."""
    places = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * (size / new_size) - 0.5
    places = places.clamp(0, size - 1)
    index = places.floor().long()
    return index, (index + 1).clamp(max=size - 1), (places - index).float()


def mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Return `a + (b - a) share` in float32 with one rounding of product and sum."""
    return (b - a).double().mul_(share.double()).add_(a).float()
