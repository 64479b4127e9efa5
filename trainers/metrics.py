"""Dice, IoU and pixel accuracy, all from four counts per image and class.

Shapes: N images, C classes, *S spatial axes (two or three). Every class is scored one against the rest, so
masks may overlap or leave pixels empty. Scores are fractions; where a class is absent from prediction and
truth alike the score is 0/0, which is NaN and left out of every mean (never 0, never 1).

Two conventions are supported. The corrected one is the default: void pixels are left out of all counts. The
paper's is given by arguments: `void="counted"` (a prediction on void is a false positive),
`epsilon=PAPER_EPSILON`, three `decimals`, and the two `legacy_` faults that some published rows carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import UserError

PAPER_EPSILON = 1e-5
"""Added to the denominators by the experiments of Dai & Li (JMLR 24(224), 2023)."""


def valid_pixels(targets: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Return the mask of labelled pixels, and reject labels that are not classes.

    targets: (N, *S) integer labels; `ignore_index` marks void. Returns (N, *S) bool, False on void.
    Raises TypeError if the labels are not integers, and UserError if one is neither in [0, num_classes) nor
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
    """The labels of one batch, encoded once so that every rule can be counted against them.

    onehot: (N, C, *S) bool, False in every class on void.
    valid: (N, *S) bool, the pixels that count; None where all of them do.
    actual: (N, C) int64, pixels of each class. pixels: (N,) int64, pixels that count.
    """

    onehot: Tensor
    valid: Tensor | None
    actual: Tensor
    pixels: Tensor


@dataclass(frozen=True, eq=False)
class Counts:
    """The sufficient statistic of every score: pixels per image and class.

    intersection, predicted, actual: (N, C) int64, |A∩B|, |A| and |B| of prediction A and truth B.
    pixels: (N,) int64, the pixels of each image that count.
    """

    intersection: Tensor
    predicted: Tensor
    actual: Tensor
    pixels: Tensor

    def __len__(self) -> int:
        return self.pixels.shape[0]

    @staticmethod
    def cat(parts: Sequence[Counts]) -> Counts:
        """Join the counts of several batches, in order. Raises ValueError for an empty list."""
        if not parts:
            raise ValueError("no counts to join: the evaluation saw no batch")
        return Counts(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Counts)))

    def select(self, images: Tensor | Sequence[int]) -> Counts:
        """Return the counts of these images, in this order."""
        index = torch.as_tensor(images, dtype=torch.int64, device=self.pixels.device)
        return Counts(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device | str) -> Counts:
        """Return the counts on another device."""
        return Counts(*(getattr(self, field.name).to(device) for field in fields(self)))

    def pooled(self) -> Counts:
        """Return the counts of the whole set as if it were one image (N = 1)."""
        return Counts(*(getattr(self, field.name).sum(0, keepdim=True) for field in fields(self)))

    def dice(self, epsilon: float = 0.0) -> Tensor:
        """Return 2|A∩B| / (|A|+|B|+epsilon), (N, C) float64, NaN where A and B are both empty."""
        return _ratio(2 * self.intersection, self.predicted + self.actual, epsilon)

    def iou(self, epsilon: float = 0.0, *, legacy_bce_iou: bool = False) -> Tensor:
        """Return |A∩B| / (|A∪B|+epsilon), (N, C) float64, NaN where A and B are both empty.

        With `legacy_bce_iou` the union is |A|+|B|, which halves the Dice: the fault in every published IoU
        of a network trained with BCE or B-Soft-Dice.
        """
        union = self.predicted + self.actual
        return _ratio(self.intersection, union if legacy_bce_iou else union - self.intersection, epsilon)

    def pixel_accuracy(self, epsilon: float = 0.0) -> Tensor:
        """Return the share of (pixel, class) pairs on which prediction and truth agree, (N,) float64.

        Over all classes, one against the rest, as in the paper: with many classes it is close to 1 for any
        prediction. NaN if no pixel counts.
        """
        pairs = self.pixels * self.actual.shape[1]
        differ = (self.predicted + self.actual - 2 * self.intersection).sum(1)
        return _ratio(pairs - differ, pairs, epsilon)


def encode(
    targets: Tensor,
    num_classes: int,
    ignore_index: int = 255,
    void: Literal["masked", "counted"] = "masked",
    *,
    legacy_soft_dice_void: bool = False,
) -> Truth:
    """Encode a batch of label maps for `count`.

    targets: (N, *S) integer labels, never modified. With `void="masked"` void pixels are in no count; with
    "counted" they have no class, and every prediction on them is false. `legacy_soft_dice_void`
    (only with "counted") relabels them to the smallest class of the batch, as happened to the published rows
    of Soft-Dice. Raises TypeError or ValueError where the labels or the convention are not valid.
    """
    if void not in ("masked", "counted"):
        raise ValueError(f"void is {void!r}: choose 'masked' or 'counted'")
    if legacy_soft_dice_void and void == "masked":
        raise ValueError("legacy_soft_dice_void relabels void, which void='masked' leaves out: choose one")
    valid = valid_pixels(targets, num_classes, ignore_index)
    targets = targets.long()
    if legacy_soft_dice_void and valid.any():
        targets = targets.masked_fill(~valid, int(targets[valid].min()))
        valid = torch.ones_like(valid)
    classes = torch.arange(num_classes, device=targets.device)
    onehot = targets.unsqueeze(1) == classes.view(1, -1, *[1] * (targets.dim() - 1))
    if 0 <= ignore_index < num_classes:
        onehot &= valid.unsqueeze(1)
    counted = void == "counted" or bool(valid.all())
    whole = torch.full((targets.shape[0],), targets[0].numel(), dtype=torch.int64, device=targets.device)
    return Truth(
        onehot=onehot,
        valid=None if counted else valid,
        actual=_true_pixels(onehot),
        pixels=whole if counted else _true_pixels(valid.unsqueeze(1)).squeeze(1),
    )


def count(masks: Tensor, truth: Truth) -> Counts:
    """Count what a rule predicted against the truth.

    masks: (N, C, *S) bool. Raises TypeError or ValueError where they do not fit the truth.
    """
    if masks.dtype != torch.bool:
        raise TypeError(f"masks are {masks.dtype}: a prediction rule returns (N, C, *S) bool")
    if masks.shape != truth.onehot.shape:
        raise ValueError(f"masks are {tuple(masks.shape)} but the truth is {tuple(truth.onehot.shape)}")
    kept = masks if truth.valid is None else masks & truth.valid.unsqueeze(1)
    return Counts(_true_pixels(masks & truth.onehot), _true_pixels(kept), truth.actual, truth.pixels)


def mean_over_classes(scores: Tensor, scored: Sequence[int]) -> Tensor:
    """Average (N, C) scores over the scored classes of each image, leaving NaN out: (N,), NaN if all are."""
    return scores[:, list(scored)].nanmean(1)


def summary(
    counts: Counts,
    scored: Sequence[int],
    *,
    epsilon: float = 0.0,
    legacy_bce_iou: bool = False,
    decimals: int | None = None,
) -> dict[str, float | dict[str, float]]:
    """Return every average of the tables, as fractions, keyed by name.

    `mean_dice`, `mean_iou`: over the scored classes of each image, then over images (mDice and mIoU of the
    paper, section 5). `class_dice`, `class_iou`: each class over images, keyed by its number; all classes,
    scored or not. `pooled_*`: the whole set as one image, the usual mIoU of benchmarks; these have no
    published counterpart and take neither epsilon nor legacy flag. `pixel_accuracy`: mean over images.
    NaN where a score is defined nowhere. `decimals` rounds all of them.
    """
    dice, iou = counts.dice(epsilon), counts.iou(epsilon, legacy_bce_iou=legacy_bce_iou)
    pooled = counts.pooled()

    def number(value: Tensor) -> float:
        return float(value) if decimals is None else round(float(value), decimals)

    def mean(scores: Tensor) -> float:
        return number(mean_over_classes(scores, scored).nanmean())

    def by_class(scores: Tensor) -> dict[str, float]:
        return {str(index): number(value) for index, value in enumerate(scores.nanmean(0))}

    return {
        "pixel_accuracy": number(counts.pixel_accuracy(epsilon).nanmean()),
        "mean_dice": mean(dice),
        "mean_iou": mean(iou),
        "class_dice": by_class(dice),
        "class_iou": by_class(iou),
        "pooled_mean_dice": mean(pooled.dice()),
        "pooled_mean_iou": mean(pooled.iou()),
        "pooled_class_dice": by_class(pooled.dice()),
        "pooled_class_iou": by_class(pooled.iou()),
    }


def _ratio(numerator: Tensor, denominator: Tensor, epsilon: float) -> Tensor:
    """Divide integers in float64; 0/0 is NaN for any epsilon."""
    quotient = numerator.double() / (denominator.double() + epsilon)
    return quotient.masked_fill(denominator == 0, float("nan"))


def _true_pixels(masks: Tensor) -> Tensor:
    """Count the True pixels of (N, C, *S) bool masks: (N, C) int64.

    Eight bools are added at a time, as the bytes of an int64: torch sums bools one by one, over a hundred
    times slower on CPU. A byte holds the sum of 128 rows without carrying into its neighbour.
    """
    flat = masks.flatten(2)
    flat = F.pad(flat, (0, -flat.shape[-1] % 1024)).contiguous()
    rows = flat.view(torch.int64).unflatten(-1, (-1, 128))
    return rows.sum(-1).view(torch.uint8).sum(-1, dtype=torch.int64)
