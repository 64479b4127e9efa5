"""Class probabilities of one image of any size, and the label map that a rule makes of them.

Windows, scales and mirror images are averaged as PROBABILITIES, and the rule then decides on the whole map. Deciding
window by window would give another mask, because the best cut-off of a rule such as RankDice depends on all pixels.

Shapes: C classes, H × W pixels of the image, B windows in a batch, h × w of a window.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

import rankseg
from configs.errors import UserError
from datasets.base import DatasetInfo
from datasets.transforms import Size, resize_to
from rankseg import Predictor
from scripts.decoding.arrays import scratch
from trainers.fitted import RuleWithOwnProbs, fitted_threshold
from trainers.forward import resize_logits

WHOLE = 4 << 20  # by default, images of up to so many pixels go through the network at once
WINDOW = 1024  # by default, the side of the windows of larger images
IN_MEMORY = 2 << 30  # probabilities of more bytes are in a temporary file

Network = Callable[[Tensor], Tensor]  # normalised (B, 3, h, w) -> logits (B, C, h', w')
Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class View:
    """The windows, scales and mirror images of an image that pass through the network.

    Attributes:
        window: side of a window, in pixels of the network's input. 0: the whole image. None: the whole image up to
            `WHOLE` pixels, `WINDOW` above.
        overlap: the share of a window that the next one repeats, at least.
        scales: sizes relative to the size of evaluation.
        flip: whether mirror images are used too.
        resize: the size of evaluation (`dataset.resize`); None: the size of the image.
        batch: number of windows in a forward pass.
        folder: for temporary files.
    """

    window: int | None = None
    overlap: float = 0.25
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    resize: Size | None = None
    batch: int = 1
    folder: Path = Path(tempfile.gettempdir())

    def __post_init__(self) -> None:
        if self.window and self.window < 16:
            raise UserError(f"window={self.window} is invalid: expected at least 16 pixels, or 0 for whole images")
        if not 0 <= self.overlap <= 0.75:
            raise UserError(f"overlap={self.overlap} is invalid: expected a number from 0 to 0.75")
        if not self.scales or not all(0.1 <= scale <= 10 for scale in self.scales):
            raise UserError(f"scales={self.scales} is invalid: expected numbers from 0.1 to 10")
        if self.batch < 1:
            raise UserError(f"batch={self.batch} is invalid: expected an integer >= 1")


@torch.inference_mode()
def probabilities(
    image: Tensor,
    network: Network,
    to_probs: Callable[[Tensor], Tensor],
    normalise: Callable[[Tensor], Tensor],
    view: View,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the probabilities (C, H, W) float32 of an image (3, H, W) uint8, the weighted mean over its views.

    A whole image at one scale without flip is computed as in the corrected evaluation: resized, passed through the
    network, the logits resized back, and then turned into probabilities by `to_probs`.
    """
    height, width = image.shape[-2:]
    total: Tensor | None = None
    weights = torch.zeros(height, width)
    for boxes, size in _windows((height, width), view):
        pixels = torch.stack([normalise(_cut(image, box, size)) for box in boxes]).to(device)
        probs = _window_probs(network, to_probs, pixels, boxes[0][2:], view.flip).cpu()
        if len(boxes) == 1 and boxes[0] == (0, 0, height, width) and len(view.scales) == 1:
            return probs[0]
        if total is None:
            total = torch.from_numpy(scratch((probs.shape[1], height, width), np.float32, view.folder, IN_MEMORY))
        window_weights = _window_weights(boxes[0][2:], view.overlap)
        for (top, left, h, w), part in zip(boxes, probs, strict=True):
            total[:, top : top + h, left : left + w] += part * window_weights
            weights[top : top + h, left : left + w] += window_weights
    assert total is not None
    for channel in total:  # one class at a time: no second copy of the whole map
        channel.div_(weights).clamp_(0, 1)
    return total


def _window_probs(
    network: Network, to_probs: Callable[[Tensor], Tensor], pixels: Tensor, size: Sequence[int], flip: bool
) -> Tensor:
    """Return (B, C, *size) probabilities of windows (B, 3, h, w), averaged with those of their mirror images."""
    probs = to_probs(resize_logits(network(pixels), size))
    if flip:
        probs = (probs + to_probs(resize_logits(network(pixels.flip(-1)).flip(-1), size))) / 2
    return probs


def _windows(shape: tuple[int, int], view: View) -> Iterator[tuple[list[Box], tuple[int, int]]]:
    """Yield batches of boxes of one size in the image, and the size to which they are resized for the network."""
    base = resize_to(shape, view.resize) if view.resize is not None else list(shape)
    window = view.window if view.window is not None else WINDOW if math.prod(shape) > WHOLE else 0
    for scale in view.scales:
        scaled = [max(1, round(side * scale)) for side in base]
        if not window or max(scaled) <= window:
            yield [(0, 0, *shape)], (scaled[0], scaled[1])
            continue
        sizes = [min(side, window) for side in scaled]
        # The sides of a window in pixels of the image itself.
        sides = [min(full, max(1, round(s * full / side))) for s, side, full in zip(sizes, scaled, shape, strict=True)]
        tops, lefts = (starts(full, side, view.overlap) for full, side in zip(shape, sides, strict=True))
        boxes = [(top, left, sides[0], sides[1]) for top in tops for left in lefts]
        for first in range(0, len(boxes), view.batch):
            yield boxes[first : first + view.batch], (sizes[0], sizes[1])


def starts(length: int, side: int, overlap: float) -> list[int]:
    """Return the starts of evenly spread windows of this side that cover the length, from its start to its end."""
    if side >= length:
        return [0]
    step = max(1, round(side * (1 - overlap)))
    count = -(-(length - side) // step) + 1
    return [round(k * (length - side) / (count - 1)) for k in range(count)]


def _cut(image: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    top, left, height, width = box
    part = image[:, top : top + height, left : left + width]
    return part if size == (height, width) else TF.resize(part, list(size), antialias=True)


def _window_weights(size: Sequence[int], overlap: float) -> Tensor:
    """Return weights (h, w) that decrease linearly towards the edges, over the share that windows overlap."""
    slopes = []
    for side in size:
        from_edge = torch.minimum(torch.arange(1, side + 1), torch.arange(side, 0, -1)).float()
        slopes.append((from_edge / max(1.0, side * overlap)).clamp(max=1))
    return slopes[0][:, None] * slopes[1]


# ---------------------------------------------------------------------------------------------------------------------
# Label maps

# Functions that can decide each class by itself.
SEPARABLE = (rankseg.threshold, rankseg.rankdice, rankseg.rankiou, fitted_threshold)


def is_separable(rule: Predictor) -> bool:
    """Return whether the rule decides each class by itself, so that classes can be passed singly to save memory."""
    function, options = parts_of(rule)
    one_number = isinstance(options.get("at", 0.5), float)  # not one threshold for each class
    return function in SEPARABLE and bool(options.get("allow_overlap", True)) and one_number


def may_overlap(rule: Predictor) -> bool:
    """Return whether the rule may give a pixel to several classes."""
    function, options = parts_of(rule)
    return function is not rankseg.argmax and bool(options.get("allow_overlap", True))


def parts_of(rule: Predictor) -> tuple[Callable[..., Tensor], dict[str, object]]:
    """Return the function and the options of a rule, without the wrapper of a rule with its own probabilities."""
    while isinstance(rule, RuleWithOwnProbs):
        rule = rule.rule
    return (rule.func, rule.keywords) if isinstance(rule, partial) else (rule, {})


def masks_of(probs: Tensor, rule: Predictor, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Yield the mask (*S) bool of each class that a rule makes of probabilities (C, *S), on the device."""
    if is_separable(rule):
        for channel in probs:
            yield rule(channel[None, None].to(device))[0, 0]
    else:
        yield from rule(probs[None].to(device))[0]


def label_map(
    probs: Tensor, rule: Predictor, info: DatasetInfo, each: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """Return the labels (H, W) uint8 that a rule makes of probabilities (C, H, W).

    A rule can give a pixel to several classes or to none. The label of a pixel is
      - the most probable of the scored classes whose masks contain the pixel;
      - if there is none, the most probable class that is not scored (the background), whatever its mask;
      - if every class is scored, void.

    ``each(c, mask)`` is called with the mask of every class, before overlaps are resolved.

    Raises UserError if probabilities and data set differ in their number of classes.
    """
    if len(probs) != info.num_classes:
        raise UserError(
            f"the network gives {len(probs)} classes, the data set {info.num_classes}. Fix: pass the right --classes"
        )
    labels = torch.full(probs.shape[1:], info.ignore_index, dtype=torch.uint8)
    best = torch.full(probs.shape[1:], -2.0)
    for c, mask in enumerate(masks_of(probs, rule)):
        if each is not None:
            each(c, mask)
        scored = c in info.scored
        # A class that is not scored ranks in (-2, -1], below every scored class that has the pixel.
        rank = probs[c] if scored else probs[c] - 2 + 1e-6
        better = rank > best
        if scored:
            better &= mask
        torch.where(better, rank, best, out=best)  # indexing by a mask takes 16 bytes a pixel
        labels.masked_fill_(better, c)
    return labels
