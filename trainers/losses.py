"""Losses on logits and label maps, each naming its link and whether it is strictly proper.

Shapes: N images, C classes, *S spatial axes (two or three). Every loss is called as
`loss(logits (N, C, *S), targets (N, *S) integer) -> scalar` with any link: one-hot targets are made
inside. A loss computes in float32 also under autocast, is 0 with zero gradients on a batch that is all void,
and never modifies the targets.

Void pixels (`ignore_index`) never count. With `legacy=True` they are treated as in the experiments of Dai &
Li (JMLR 24(224), 2023), each loss in its own way; see the docstrings. On a batch that is all void, the losses that
count void as a negative of every class have the value of the original. The others are 0, and the original's are NaN
(cross-entropy), 0 (focal) or an error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import ConfigError
from trainers.metrics import valid_pixels

Link = Literal["softmax", "sigmoid"]


def link_probs(logits: Tensor, link: Link) -> Tensor:
    """Return the probabilities, (N, C, *S) in at least float32, that these logits stand for.

    Raises ValueError on an unknown link.
    """
    logits = _at_least_float32(logits)
    if link == "softmax":
        return logits.softmax(1)
    if link == "sigmoid":
        return logits.sigmoid()
    raise ConfigError(f"link={link!r} is invalid: expected 'softmax' or 'sigmoid'")


class SegmentationLoss(nn.Module, ABC):
    """What all losses share: checks, precision, void.

    link: how the network's logits become probabilities. strictly_proper: whether the loss is minimised by the
    true class probabilities alone, which is what RankSEG's theory asks for.
    """

    link: ClassVar[Link]
    strictly_proper: ClassVar[bool]
    void_is_negative: ClassVar[bool] = False  # whether `legacy` counts void as a negative of every class

    def __init__(self, ignore_index: int = 255, legacy: bool = False) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.legacy = legacy

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar in at least float32.

        Raises ValueError where shapes do not fit or a label is neither a class nor `ignore_index`, TypeError
        where targets are not integers.
        """
        if logits.shape[:1] + logits.shape[2:] != targets.shape:
            raise ValueError(
                f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit: "
                "pass (N, C, *S) logits and (N, *S) labels"
            )
        valid = valid_pixels(targets, logits.shape[1], self.ignore_index)
        with torch.autocast(logits.device.type, enabled=False):
            logits = _at_least_float32(logits)
            if not valid.any() and not (self.legacy and self.void_is_negative):
                return logits[:0].sum()  # 0, and still connected to the graph
            return self.of_labelled(logits, targets.long().masked_fill(~valid, 0), valid)

    def weight_of(self, targets: Tensor) -> Tensor:
        """Return over how many terms the loss of these targets (N, *S) is a mean: labelled pixels.

        Means over parts of a batch, weighted by it, make the mean over the whole.
        """
        if self.legacy and self.void_is_negative:
            return torch.tensor(targets.numel())
        return (targets != self.ignore_index).sum()

    @abstractmethod
    def of_labelled(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Return the loss, given at least one valid pixel.

        logits: (N, C, *S). labels: (N, *S) int64 in [0, C), 0 on void. valid: (N, *S) bool, False on void.
        """

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, legacy={self.legacy}"


class CrossEntropy(SegmentationLoss):
    """The mean of -log p_y over labelled pixels; `legacy` changes nothing."""

    link = "softmax"
    strictly_proper = True

    def of_labelled(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        return _mean_where(-_log_likelihood(logits, labels), valid)


class Focal(SegmentationLoss):
    """The mean of (1 - p_y)^gamma · (-log p_y) (Lin et al., ICCV 2017), not strictly proper.

    legacy: averaged over all pixels, void ones adding 0.
    """

    link = "softmax"
    strictly_proper = False

    def __init__(self, ignore_index: int = 255, legacy: bool = False, gamma: float = 2.0) -> None:
        super().__init__(ignore_index, legacy)
        self.gamma = gamma

    def of_labelled(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        log_likelihood = _log_likelihood(logits, labels)
        labelled = _mean_where(-log_likelihood * _focal_weight(log_likelihood, self.gamma), valid)
        return labelled * valid.sum() / valid.numel() if self.legacy else labelled

    def weight_of(self, targets: Tensor) -> Tensor:
        return torch.tensor(targets.numel()) if self.legacy else super().weight_of(targets)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma}"


class BCE(SegmentationLoss):
    """The mean binary cross-entropy over pixels and classes, one against the rest.

    legacy: void pixels count as negatives of every class.
    """

    link = "sigmoid"
    strictly_proper = True
    void_is_negative = True

    def of_labelled(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        onehot = _onehot(labels, valid, logits)
        per_class = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
        return per_class.mean() if self.legacy else _mean_where(per_class.mean(1), valid)


class BCEFocal(BCE):
    """Focal weighting of the mean BCE b, as in the experiments: (1 - e^-b)^gamma · b.

    The weight is one for the batch, not one for each pixel. legacy: as in BCE.
    """

    strictly_proper = False

    def __init__(self, ignore_index: int = 255, legacy: bool = False, gamma: float = 2.0) -> None:
        super().__init__(ignore_index, legacy)
        self.gamma = gamma

    def of_labelled(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        bce = super().of_labelled(logits, labels, valid)
        return bce * _focal_weight(-bce, self.gamma)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma}"


class SoftDice(SegmentationLoss):
    """1 - (2 Σ p·y + 1) / (Σ p + Σ y + 1), one ratio over batch, classes and pixels.

    As the softmax sums to 1, the denominator is constant: the loss is affine in the mean true-class
    probability. legacy: void pixels count as the smallest class present in the batch.
    """

    link = "softmax"
    strictly_proper = False

    def of_labelled(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        if self.legacy:
            labels = labels.where(valid, labels[valid].min())
            valid = torch.ones_like(valid)
        likelihood = _log_likelihood(logits, labels).exp().where(valid, 0)
        pixels = valid.sum().to(likelihood.dtype)
        return 1 - (2 * likelihood.sum() + 1) / (2 * pixels + 1)


class BSoftDice(SegmentationLoss):
    """The ratio of SoftDice with the sigmoid, one class against the rest.

    legacy: void pixels count as negatives of every class.
    """

    link = "sigmoid"
    strictly_proper = False
    void_is_negative = True

    def of_labelled(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        onehot = _onehot(labels, valid, logits)
        probs = logits.sigmoid()
        if not self.legacy:
            probs = probs.where(valid.unsqueeze(1), 0)
        return 1 - (2 * (probs * onehot).sum() + 1) / (probs.sum() + onehot.sum() + 1)


class Lovasz(SegmentationLoss):
    """Lovász-Softmax over the whole batch and the classes present; `legacy` changes nothing."""

    link = "softmax"
    strictly_proper = False

    def of_labelled(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        probs = logits.softmax(1).transpose(0, 1).flatten(1)
        kept = valid.flatten()
        if kept.all():
            return lovasz_softmax(probs, labels.flatten())
        return lovasz_softmax(probs[:, kept], labels.flatten()[kept])


class CEDice(SegmentationLoss):
    """CrossEntropy plus SoftDice. legacy: as in each of them."""

    link = "softmax"
    strictly_proper = False

    def __init__(self, ignore_index: int = 255, legacy: bool = False) -> None:
        super().__init__(ignore_index, legacy)
        self.cross_entropy = CrossEntropy(ignore_index, legacy)
        self.dice = SoftDice(ignore_index, legacy)

    def of_labelled(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        batch = (logits, labels, valid)
        return self.cross_entropy.of_labelled(*batch) + self.dice.of_labelled(*batch)


class LogCoshDice(SoftDice):
    """log cosh of SoftDice (Jadon, CIBCB 2020). legacy: as in SoftDice."""

    def of_labelled(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        return super().of_labelled(logits, labels, valid).cosh().log()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p_y, (N, *S). A gather, as the CUDA backward of NLLLoss is not deterministic."""
    return logits.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)


def _focal_weight(log_probs: Tensor, gamma: float) -> Tensor:
    """Return (1 - p)^gamma, with a finite gradient at p = 1 for every gamma."""
    misses = -log_probs.expm1()
    return misses.clamp(min=torch.finfo(misses.dtype).tiny) ** gamma


def _onehot(labels: Tensor, valid: Tensor, like: Tensor) -> Tensor:
    """Return the labels as (N, C, *S) floats, all zero on void."""
    return torch.zeros_like(like).scatter_(1, labels.unsqueeze(1), valid.unsqueeze(1).to(like.dtype))


def _mean_where(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of the (N, *S) values at valid pixels, of which there is at least one."""
    return values.where(valid, 0).sum() / valid.sum()


def lovasz_softmax(probs: Tensor, labels: Tensor) -> Tensor:
    """Return the Lovász extension of 1 - IoU, averaged over the classes present in the labels.

    probs: (C, P) in [0, 1]. labels: (P,) int64 in [0, C), at least one pixel. One ratio is taken over all the
    pixels together, from all images.
    """
    losses = []
    for index in labels.unique().tolist():
        actual = labels == index
        errors = (actual.to(probs.dtype) - probs[index]).abs()
        errors, order = errors.sort(descending=True)
        losses.append((errors * jaccard_steps(actual[order], probs.dtype)).sum())
    return torch.stack(losses).mean()


def jaccard_steps(actual: Tensor, dtype: torch.dtype) -> Tensor:
    """Return by how much each further mistake raises the Jaccard loss (algorithm 1 of the paper).

    actual: (P,) bool, the true pixels of a class in the order in which they are got wrong, at least one True.
    Returns (P,), summing to 1. The steps are written in closed form, as differences of neighbouring losses
    cancel in float32 once there are many pixels.
    """
    missed = actual.cumsum(0)
    total = missed[-1]
    intersection = total - missed
    union = (total + (~actual).cumsum(0)).to(dtype)
    # A missed pixel takes 1 from the intersection: 1/U. A false one adds 1 to the union: I/(U-1) - I/U.
    return torch.where(actual, 1 / union, intersection / (union * (union - 1)))
