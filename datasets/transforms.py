"""Transforms of image and mask together: augmentation for training, and the evaluation of both protocols.

A transform takes an image (3, H, W) uint8 and a mask (H, W) uint8 as tv_tensors. It returns the normalised image
(3, h, w) float32 and the target (h, w) int64; in the corrected evaluation, the target stays (H, W). Random numbers come
from torch's global CPU generator, which the loaders seed for each image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from configs.errors import UserError

Size = int | Sequence[int]
Window = tuple[int, int, int, int]  # top, left, height, width


def require_pair(image: Tensor, mask: Tensor) -> None:
    """Raise TypeError unless the pair is an Image and a Mask, and UserError if their sizes differ.

    torchvision takes a plain tensor for an image, so a plain mask would fail or be interpolated like an image.
    """
    if not (isinstance(image, tv_tensors.Image) and isinstance(mask, tv_tensors.Mask)):
        raise TypeError(
            f"expected tv_tensors.Image and Mask, got {type(image).__name__} and {type(mask).__name__}. "
            "Fix: wrap the image and the mask"
        )
    if image.shape[-2:] != mask.shape[-2:]:
        raise UserError(f"image is {tuple(image.shape[-2:])} and mask {tuple(mask.shape[-2:])}: bring them to one size")


def as_size(size: Size) -> tuple[int, int]:
    """Return (height, width) of a size: the side of a square, or a pair. Raises UserError for anything else."""
    pair = (size, size) if isinstance(size, int) else size
    if isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(k, int) and k > 0 for k in pair):
        return pair[0], pair[1]
    raise UserError(
        f"size={size} is invalid: expected an integer >= 1 or [height, width] (dataset.crop, dataset.resize)"
    )


def resize_to(shape: Sequence[int], size: Size) -> list[int]:
    """Return the (height, width) of a resized image: an integer is the shorter side, a pair is both."""
    if not isinstance(size, int):
        return list(as_size(size))
    short = min(shape)
    return [size if side == short else size * side // short for side in shape]


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale an image (3, H, W) uint8 to [0, 1], subtract the mean, and divide by the standard deviation."""
    scaled = image.as_subclass(Tensor).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return F.normalize(scaled, mean, std, inplace=True)


def rotate_window(image: Tensor, mask: Tensor, degrees: int, window: Window, label_fill: int) -> tuple[Tensor, Tensor]:
    """Rotate a pair by whole degrees counter-clockwise, and return a window of it.

    The frame keeps its size. It rotates about (W/2, H/2), measured from the centre of the first pixel. The image is
    interpolated bilinearly and truncated to uint8; its corners are black. The mask takes the nearest pixel; its corners
    are `label_fill`. Only the pixels of the window are computed, from the part of the frame that they come from.
    """
    top, left, height, width = window
    if degrees == 0:
        rows, columns = slice(top, top + height), slice(left, left + width)
        return image[:, rows, columns], mask[rows, columns]
    y, x = source_places(image.shape[-2:], degrees, window)
    (y0, y1), (x0, x1) = source_range(y, image.shape[-2]), source_range(x, image.shape[-1])
    part, labels = image[:, y0:y1, x0:x1].float(), mask[y0:y1, x0:x1].float()
    size = torch.tensor([labels.shape[1], labels.shape[0]])
    grid = (torch.stack((x - x0, y - y0), dim=-1) * (2 / size) - 1)[None]
    part = grid_sample(part[None], grid, "bilinear", "zeros", align_corners=False)[0]
    # grid_sample returns 0 outside the frame, so `label_fill` is subtracted before and added after.
    labels = grid_sample((labels - label_fill)[None, None], grid, "nearest", "zeros", align_corners=False)
    return part.to(torch.uint8), (labels[0, 0] + label_fill).to(torch.uint8)


def source_places(shape: Sequence[int], degrees: int, window: Window) -> tuple[Tensor, Tensor]:
    """Return the source coordinates y and x (h, w) of each pixel of a rotated window, from the frame's corner."""
    top, left, height, width = window
    centre_y, centre_x = shape[0] / 2 + 0.5, shape[1] / 2 + 0.5
    y = (torch.arange(top, top + height) + (0.5 - centre_y))[:, None]
    x = torch.arange(left, left + width) + (0.5 - centre_x)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return sin * x + cos * y + centre_y, cos * x - sin * y + centre_x


def source_range(places: Tensor, size: int) -> tuple[int, int]:
    """Return the range (first, end) of the pixels along an axis that interpolation at these places can read."""
    margin = 2  # bilinear neighbours, and rounding
    first = min(max(int(places.min()) - margin, 0), size - 1)
    return first, min(max(int(places.max()) + margin + 1, first + 1), size)


class TrainTransform:
    """Augmentation of the paper, in its order: rotate, pad right and bottom, crop, flip, normalise."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        crop: Size | None = None,  # size of the result; None keeps the whole image
        resize: Size | None = None,  # of image and mask before the augmentation
        rotate: int = 10,  # the largest angle in whole degrees, in both directions
        flip: float = 0.5,  # the probability of a mirror image
        label_fill: int = 255,  # label of corners and padding: void. The paper's code used 0, the background
    ) -> None:
        if not (isinstance(rotate, int) and 0 <= rotate <= 180):
            raise UserError(f"rotate={rotate} is invalid: expected whole degrees, 0 to 180")
        if not 0 <= flip <= 1:
            raise UserError(f"flip={flip} is invalid: expected a probability, 0 to 1")
        self.normalise = partial(normalise, mean=mean, std=std)
        self.crop = None if crop is None else as_size(crop)
        if resize is not None:
            as_size(resize)
        self.resize, self.rotate, self.flip, self.label_fill = resize, rotate, flip, label_fill

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        require_pair(image, mask)
        if self.resize is not None:
            shape = resize_to(image.shape[-2:], self.resize)
            image, mask = F.resize(image, shape, antialias=True), F.resize(mask, shape, InterpolationMode.NEAREST_EXACT)
        crop = self.crop or (image.shape[-2], image.shape[-1])
        degrees = draw(-self.rotate, self.rotate)
        # An image that is smaller than the crop is padded, and the crop has one position.
        top, left = (draw(0, max(size - side, 0)) for size, side in zip(image.shape[-2:], crop, strict=True))
        mirrored = bool(torch.rand(()) < self.flip)
        image, mask = self.apply(image, mask, degrees, top, left, mirrored)
        return self.normalise(image), mask.as_subclass(Tensor).long()

    def apply(
        self, image: Tensor, mask: Tensor, degrees: int, top: int, left: int, mirrored: bool
    ) -> tuple[Tensor, Tensor]:
        """Augment a pair with given random numbers; the result is uint8."""
        height, width = image.shape[-2:]
        crop_height, crop_width = self.crop or (height, width)
        window = top, left, min(crop_height, height), min(crop_width, width)
        image, mask = rotate_window(image, mask, degrees, window, self.label_fill)
        padding = [0, 0, crop_width - window[3], crop_height - window[2]]
        if any(padding):
            image = F.pad(tv_tensors.Image(image), padding, fill=0)
            mask = F.pad(tv_tensors.Mask(mask), padding, fill=self.label_fill)
        if mirrored:
            image, mask = image.flip(-1), mask.flip(-1)
        return image, mask


class EvalTransform:
    """Transform for evaluation, for both protocols.

    Corrected (`legacy=False`): the whole image is used; `resize`, if given, limits the memory, and `crop` is ignored.
    The target keeps its resolution; the logits are resized to it afterwards.

    Paper (`legacy=True`): `resize` is ignored. The shorter side becomes `crop`, and the centre `crop` x `crop` is
    scored. The image is resized bilinearly without antialiasing and truncated to uint8. The label is the nearest pixel,
    as in Pillow.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        resize: Size | None = None,
        crop: int | None = None,
        legacy: bool = False,
    ) -> None:
        if legacy and not isinstance(crop, int):
            raise UserError(
                f"crop={crop} is invalid: the paper's evaluation needs a side in pixels (dataset.eval_crop)"
            )
        self.normalise = partial(normalise, mean=mean, std=std)
        self.resize, self.crop, self.legacy = resize, crop, legacy
        if resize is not None:
            as_size(resize)

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        require_pair(image, mask)
        if self.legacy:
            assert self.crop is not None
            image, mask = centre_crop(image.as_subclass(Tensor), mask.as_subclass(Tensor), self.crop)
        elif self.resize is not None:
            image = F.resize(image, resize_to(image.shape[-2:], self.resize), antialias=True)
        return self.normalise(image), mask.as_subclass(Tensor).long()


def draw(low: int, high: int) -> int:
    """Return a random integer from low to high, both included."""
    return int(torch.randint(low, high + 1, ()))


# ---------------------------------------------------------------------------------------------------------------------
# The paper's preprocessing for evaluation: bit for bit as OpenCV and Pillow compute it, without OpenCV


def centre_crop(image: Tensor, mask: Tensor, crop: int) -> tuple[Tensor, Tensor]:
    """Return the centre of a pair that the paper scores: (3, crop, crop) and (crop, crop), both uint8.

    The shorter side is resized to `crop` and the other to `floor(crop * long / short)`.
    """
    new_height, new_width = resize_to(image.shape[-2:], crop)
    top, left = (new_height - crop) // 2, (new_width - crop) // 2
    window = bilinear_window(image, (new_height, new_width), top, left, crop)
    # At the edge between two pixels Pillow's accumulated rounding decides, so Pillow itself has to resize.
    labels = Image.fromarray(mask.numpy()).resize((new_width, new_height), Image.Resampling.NEAREST)
    return window, torch.from_numpy(np.array(labels.crop((left, top, left + crop, top + crop))))


def bilinear_window(image: Tensor, size: tuple[int, int], top: int, left: int, crop: int) -> Tensor:
    """Return a window of the image resized to (height, width), equal to OpenCV's float resize after truncation.

    OpenCV interpolates along rows first, then along columns, each with one fused `a + (b - a) f` in float32. Product
    and sum in float64 give the same rounding. Another order or rounding changes pixels whose exact value is an integer.
    """
    row, next_row, row_share = source_pixels(image.shape[-2], size[0], top, crop)
    column, next_column, column_share = source_pixels(image.shape[-1], size[1], left, crop)
    first, last = int(row[0]), int(next_row[-1]) + 1
    pixels = image.permute(1, 2, 0)[first:last]  # channels last, as decoded: selecting columns is fast
    left_pixels, right_pixels = (pixels.index_select(1, at).short() for at in (column, next_column))
    across = blend(left_pixels, right_pixels, column_share[:, None])
    upper, lower = (across.index_select(0, at - first) for at in (row, next_row))
    return blend(upper, lower, row_share[:, None, None]).to(torch.uint8).permute(2, 0, 1)


def source_pixels(size: int, new_size: int, start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return two source pixels and the share of the second, for `count` pixels of a resized axis from `start`."""
    places = (torch.arange(start, start + count, dtype=torch.float64) + 0.5) * (size / new_size) - 0.5
    places = places.clamp(0, size - 1)
    index = places.floor().long()
    return index, (index + 1).clamp(max=size - 1), (places - index).float()


def blend(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Return `a + (b - a) share` in float32, rounded once."""
    return (b - a).double().mul_(share.double()).add_(a).float()
