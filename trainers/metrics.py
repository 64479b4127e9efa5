"""Dice, IoU and pixel accuracy, from four counts per image and class.

Shapes: N images, C classes, *S spatial axes (two or three). Each class is scored against the rest, so masks may
overlap, and a pixel may be in no mask. Scores are fractions. If a class is in neither the prediction nor the truth,
its score is 0/0: it is NaN, and no mean includes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import ConfigError, UserError

Rows = TypeVar("Rows", bound="PerImage")
PAPER_EPSILON = 1e-5  # in the denominators of the experiments of Dai & Li (JMLR 24(224), 2023)


def valid_pixels(targets: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Return which pixels are labelled, (N, *S) bool: False on void.

    targets: (N, *S) integer labels; `ignore_index` is void.
    Raises TypeError if labels are not integers, and UserError if one is neither in [0, num_classes) nor
    `ignore_index`.
    """
    if targets.is_floating_point() or targets.is_complex():
        raise TypeError(f"targets are {targets.dtype}: pass integer class labels, not one-hot ones")
    targets = targets.long()  # comparing uint8 with a negative ignore_index would wrap
    valid = targets != ignore_index
    wrong = valid & ((targets < 0) | (targets >= num_classes))
    if wrong.any():
        values = targets[wrong].unique().tolist()
        shown = ", ".join(str(int(value)) for value in values[:5]) + (", ..." if len(values) > 5 else "")
        raise UserError(
            f"targets hold label {shown}, outside 0..{num_classes - 1} and not ignore_index={ignore_index}. "
            "Fix: remap the labels of the data set, or correct num_classes or ignore_index."
        )
    return valid


@dataclass(frozen=True, eq=False)
class Truth:
    """The labels of a batch, encoded once for all rules."""

    onehot: Tensor  # (N, C, *S) bool, False on void
    valid: Tensor | None  # (N, *S) bool, the pixels that count; None if all do
    actual: Tensor  # (N, C) int64, the number of pixels of each class
    pixels: Tensor  # (N,) int64, the number of pixels that count


class PerImage:
    """Base of dataclasses that hold one row per image.

    A field holds rows if it is a tensor, a list, another such object, or a dictionary of these. Other fields are common
    to all images.
    """

    @classmethod
    def cat(cls: type[Rows], parts: Sequence[Rows]) -> Rows:
        """Join the rows of batches in order. Raises ValueError if there are none."""
        if not parts:
            raise ValueError("no rows to join: there was no batch")
        return cls(*(_join([getattr(part, field.name) for part in parts]) for field in fields(cls)))  # type: ignore[arg-type]


def _join(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _join([value[key] for value in values]) for key in first}
    if isinstance(first, PerImage):
        return type(first).cat(values)
    if isinstance(first, list):
        return [row for value in values for row in value]
    return torch.cat(values) if isinstance(first, Tensor) else first


@dataclass(frozen=True, eq=False)
class Counts(PerImage):
    """Numbers of pixels per image and class. Every score is computed from them."""

    intersection: Tensor  # (N, C) int64, |A∩B| of prediction A and truth B
    predicted: Tensor  # (N, C) int64, |A|
    actual: Tensor  # (N, C) int64, |B|
    pixels: Tensor  # (N,) int64, the pixels of each image that count

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def to(self, device: torch.device | str) -> Counts:
        return Counts(*(value.to(device) for value in vars(self).values()))

    def pooled(self) -> Counts:
        """Return the counts of all images together, as of one image (N = 1)."""
        return Counts(*(value.sum(0, keepdim=True) for value in vars(self).values()))

    def dice(self, epsilon: float = 0.0) -> Tensor:
        """Return 2|A∩B| / (|A|+|B|+epsilon), (N, C) float64, NaN where A and B are both empty."""
        return _ratio(2 * self.intersection, self.predicted + self.actual, epsilon)

    def iou(self, epsilon: float = 0.0, *, legacy_bce_iou: bool = False) -> Tensor:
        """Return |A∩B| / (|A∪B|+epsilon), (N, C) float64, NaN where A and B are both empty.

        With `legacy_bce_iou` |A|+|B| replaces the union, which gives half the Dice. Every published IoU of a network
        trained with BCE or B-Soft-Dice has this fault.
        """
        union = self.predicted + self.actual
        return _ratio(self.intersection, union if legacy_bce_iou else union - self.intersection, epsilon)

    def pixel_accuracy(self, epsilon: float = 0.0) -> Tensor:
        """Return the share of pairs (pixel, class) on which prediction and truth agree, (N,) float64.

        All classes count, each against the rest, as in the paper. With many classes it is close to 1 for any
        prediction. It is NaN if no pixel counts.
        """
        pairs = self.pixels * self.actual.shape[1]
        differ = (self.predicted + self.actual - 2 * self.intersection).sum(1)
        return _ratio(pairs - differ, pairs, epsilon)


@dataclass(frozen=True)
class Scoring:
    """What is scored, and by which conventions (``protocol=paper`` or ``corrected``)."""

    num_classes: int
    scored: tuple[int, ...]  # the classes in the means
    ignore_index: int = 255
    void: Literal["masked", "counted"] = "masked"  # counted: a prediction on void is a false positive
    paper: bool = False  # the published arithmetic: an epsilon in denominators, three decimals, the loss of batches
    legacy_bce_iou: bool = False  # a fault of published rows: see `Counts.iou`
    legacy_soft_dice_void: bool = False  # another: void gets the smallest class of the batch; needs void="counted"

    def __post_init__(self) -> None:
        if self.void not in ("masked", "counted"):
            raise ConfigError(f"protocol.void={self.void} is invalid: expected masked or counted")
        if self.legacy_soft_dice_void and self.void == "masked":
            raise ConfigError(
                "protocol.legacy_soft_dice_void=true contradicts protocol.void=masked, which leaves void out. "
                "Fix: pass protocol=paper, or protocol.legacy_soft_dice_void=false."
            )

    def is_unneeded(self, targets: Tensor) -> bool:
        """Return whether a batch is left out: under ``paper``, one without any labelled pixel."""
        return self.paper and bool((targets == self.ignore_index).all())

    def encode(self, targets: Tensor) -> Truth:
        """Encode a batch of integer labels (N, *S) for `count`."""
        valid = valid_pixels(targets, self.num_classes, self.ignore_index)
        targets = targets.long()
        if self.legacy_soft_dice_void and valid.any():
            targets = targets.masked_fill(~valid, int(targets[valid].min()))
            valid = torch.ones_like(valid)
        classes = torch.arange(self.num_classes, device=targets.device)
        onehot = targets.unsqueeze(1) == classes.view(1, -1, *[1] * (targets.dim() - 1))
        if 0 <= self.ignore_index < self.num_classes:
            onehot &= valid.unsqueeze(1)
        counted = self.void == "counted" or bool(valid.all())
        whole = torch.full((targets.shape[0],), targets[0].numel(), dtype=torch.int64, device=targets.device)
        return Truth(
            onehot=onehot,
            valid=None if counted else valid,
            actual=_true_pixels(onehot),
            pixels=whole if counted else _true_pixels(valid.unsqueeze(1)).squeeze(1),
        )

    def summary(self, counts: Counts) -> dict[str, Any]:
        """Return every average of the tables as fractions, by name; ``paper`` rounds them.

        `mean_dice`, `mean_iou`: over the scored classes of an image, then over images (mDice and mIoU of the paper,
        section 5). `class_dice`, `class_iou`: over images, for every class, scored or not, by its number. `pooled_*`:
        of all images together, as in the usual mIoU of benchmarks; without an epsilon, also under ``paper``.
        `pixel_accuracy`: over images. A score that no image defines is NaN.
        """
        averages = self.averages(counts)
        if not self.paper:
            return averages
        return {
            name: {c: round(x, 3) for c, x in value.items()} if isinstance(value, dict) else round(value, 3)
            for name, value in averages.items()
        }

    def averages(self, counts: Counts) -> dict[str, Any]:
        """Return the numbers of `summary` before they are rounded."""
        epsilon = PAPER_EPSILON if self.paper else 0.0
        dice, iou = counts.dice(epsilon), counts.iou(epsilon, legacy_bce_iou=self.legacy_bce_iou)
        pooled = counts.pooled()

        def mean(scores: Tensor) -> float:
            return float(mean_over_classes(scores, self.scored).nanmean())

        def by_class(scores: Tensor) -> dict[str, float]:
            return {str(index): float(value) for index, value in enumerate(scores.nanmean(0))}

        return {
            "pixel_accuracy": float(counts.pixel_accuracy(epsilon).nanmean()),
            "mean_dice": mean(dice),
            "mean_iou": mean(iou),
            "class_dice": by_class(dice),
            "class_iou": by_class(iou),
            "pooled_mean_dice": mean(pooled.dice()),
            "pooled_mean_iou": mean(pooled.iou()),
            "pooled_class_dice": by_class(pooled.dice()),
            "pooled_class_iou": by_class(pooled.iou()),
        }


def count(masks: Tensor, truth: Truth) -> Counts:
    """Count the pixels of predicted masks (N, C, *S) bool against the truth.

    Raises TypeError if the masks are not bool, and ValueError if their shape is not that of the truth.
    """
    if masks.dtype != torch.bool:
        raise TypeError(f"masks are {masks.dtype}: a prediction rule returns (N, C, *S) bool")
    if masks.shape != truth.onehot.shape:
        raise ValueError(f"masks are {tuple(masks.shape)} but the truth is {tuple(truth.onehot.shape)}")
    kept = masks if truth.valid is None else masks & truth.valid.unsqueeze(1)
    return Counts(_true_pixels(masks & truth.onehot), _true_pixels(kept), truth.actual, truth.pixels)


def mean_over_classes(scores: Tensor, scored: Sequence[int]) -> Tensor:
    """Return the mean of scores (N, C) over the scored classes of each image, without NaN: (N,), NaN if all are."""
    return scores[:, list(scored)].nanmean(1)


def _ratio(numerator: Tensor, denominator: Tensor, epsilon: float) -> Tensor:
    """Divide integers in float64; 0/0 is NaN with any epsilon."""
    quotient = numerator.double() / (denominator.double() + epsilon)
    return quotient.masked_fill(denominator == 0, float("nan"))


def _true_pixels(masks: Tensor) -> Tensor:
    """Return the number of True pixels of masks (N, C, *S): (N, C) int64.

    An int64 holds eight bools as its bytes, and one addition adds eight of them: torch sums single bools over a
    hundred times slower on CPU. A byte holds the sum of 128 rows, so nothing is carried into the next one.
    """
    flat = masks.flatten(2)
    flat = F.pad(flat, (0, -flat.shape[-1] % 1024)).contiguous()
    rows = flat.view(torch.int64).unflatten(-1, (-1, 128))
    return rows.sum(-1).view(torch.uint8).sum(-1, dtype=torch.int64)
