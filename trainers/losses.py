"""Losses on logits and label maps. Each loss names its link, and whether it is strictly proper.

Shapes: N images, C classes, *S spatial axes (two or three). Every loss is called as
`loss(logits (N, C, *S), targets (N, *S) integer) -> scalar` with any link: a loss makes one-hot targets itself if it
needs them. It computes in float32 also under autocast, and never modifies the targets.

Void pixels (`ignore_index`) do not count; if all pixels are void, the loss is 0 with zero gradients. With
`legacy=True` each loss treats void as in the experiments of Dai & Li (JMLR 24(224), 2023); see the docstrings. If all
pixels are void, legacy losses that count void as a negative of every class return the value of the original. All other
losses return 0; the original returns NaN (cross-entropy) or 0 (focal), or fails.
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
    """Return the probabilities (N, C, *S) of logits (N, C, *S), in at least float32."""
    logits = _at_least_float32(logits)
    if link == "softmax":
        return logits.softmax(1)
    if link == "sigmoid":
        return logits.sigmoid()
    raise ConfigError(f"link={link!r} is invalid: expected 'softmax' or 'sigmoid'")


class SegmentationLoss(nn.Module, ABC):
    """Base class of losses: it checks the input, computes in float32, and handles void."""

    link: ClassVar[Link]  # from logits to probabilities
    strictly_proper: ClassVar[bool]  # only the true class probabilities minimise the loss, as RankSEG's theory requires
    void_is_negative: ClassVar[bool] = False  # whether `legacy` counts void as a negative of every class

    def __init__(self, ignore_index: int = 255, legacy: bool = False) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.legacy = legacy

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar in at least float32.

        Raises ValueError if shapes do not fit or a label is neither a class nor `ignore_index`, and TypeError if
        targets are not integers.
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
            return self.compute(logits, targets.long().masked_fill(~valid, 0), valid)

    def num_terms(self, targets: Tensor) -> Tensor:
        """Return the number of pixels that the loss of targets (N, *S) is a mean over.

        The losses of the parts of a batch are averaged with these weights. For a mean over pixels, the result is the
        loss of the whole batch.
        """
        if self.legacy and self.void_is_negative:
            return torch.tensor(targets.numel())
        return (targets != self.ignore_index).sum()

    @abstractmethod
    def compute(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Return the loss. At least one pixel is valid, unless `legacy` counts void.

        logits: (N, C, *S). labels: (N, *S) int64 in [0, C), 0 on void. valid: (N, *S) bool, False on void.
        """


class CrossEntropy(SegmentationLoss):
    """Cross-entropy: the mean of -log p_y over labelled pixels. `legacy` changes nothing."""

    link = "softmax"
    strictly_proper = True

    def compute(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        return _mean_where(-_log_likelihood(logits, labels), valid)


class Focal(SegmentationLoss):
    """Focal loss: the mean of (1 - p_y)^gamma · (-log p_y) over labelled pixels (Lin et al., ICCV 2017).

    With `legacy` the mean is over all pixels, and void pixels add 0.
    """

    link = "softmax"
    strictly_proper = False

    def __init__(self, ignore_index: int = 255, legacy: bool = False, gamma: float = 2.0) -> None:
        super().__init__(ignore_index, legacy)
        self.gamma = gamma

    def compute(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        log_likelihood = _log_likelihood(logits, labels)
        labelled = _mean_where(-log_likelihood * _focal_weight(log_likelihood, self.gamma), valid)
        return labelled * valid.sum() / valid.numel() if self.legacy else labelled

    def num_terms(self, targets: Tensor) -> Tensor:
        return torch.tensor(targets.numel()) if self.legacy else super().num_terms(targets)


class BCE(SegmentationLoss):
    """Binary cross-entropy of each class against the rest: the mean over labelled pixels and classes.

    With `legacy` void pixels count as negatives of every class.
    """

    link = "sigmoid"
    strictly_proper = True
    void_is_negative = True

    def compute(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        onehot = _onehot(labels, valid, logits)
        per_class = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
        return per_class.mean() if self.legacy else _mean_where(per_class.mean(1), valid)


class BCEFocal(BCE):
    """Focal weight of the mean BCE b, as in the experiments: (1 - e^-b)^gamma · b.

    There is one weight for the batch, not one for each pixel. `legacy` has the same meaning as in `BCE`.
    """

    strictly_proper = False

    def __init__(self, ignore_index: int = 255, legacy: bool = False, gamma: float = 2.0) -> None:
        super().__init__(ignore_index, legacy)
        self.gamma = gamma

    def compute(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        bce = super().compute(logits, labels, valid)
        return bce * _focal_weight(-bce, self.gamma)


class SoftDice(SegmentationLoss):
    """Soft Dice: 1 - (2 Σ p·y + 1) / (Σ p + Σ y + 1), one ratio over images, classes and pixels.

    A softmax sums to 1, so the denominator is constant and the loss is affine in the mean probability of the true
    class. With `legacy` void pixels get the smallest class index in the batch.
    """

    link = "softmax"
    strictly_proper = False

    def compute(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        if self.legacy:
            labels = labels.where(valid, labels[valid].min())
            valid = torch.ones_like(valid)
        likelihood = _log_likelihood(logits, labels).exp().where(valid, 0)
        pixels = valid.sum().to(likelihood.dtype)
        return 1 - (2 * likelihood.sum() + 1) / (2 * pixels + 1)


class BSoftDice(SegmentationLoss):
    """Soft Dice of sigmoid probabilities, each class against the rest.

    With `legacy` void pixels count as negatives of every class.
    """

    link = "sigmoid"
    strictly_proper = False
    void_is_negative = True

    def compute(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        onehot = _onehot(labels, valid, logits)
        probs = logits.sigmoid()
        if not self.legacy:
            probs = probs.where(valid.unsqueeze(1), 0)
        return 1 - (2 * (probs * onehot).sum() + 1) / (probs.sum() + onehot.sum() + 1)


class Lovasz(SegmentationLoss):
    """Lovász-Softmax of the whole batch and the classes in it (Berman et al., CVPR 2018). `legacy` changes nothing."""

    link = "softmax"
    strictly_proper = False

    def compute(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        probs = logits.softmax(1).transpose(0, 1).flatten(1)
        kept = valid.flatten()
        if kept.all():
            return lovasz_softmax(probs, labels.flatten())
        return lovasz_softmax(probs[:, kept], labels.flatten()[kept])


class CEDice(SoftDice):
    """The sum of `CrossEntropy` and `SoftDice`. `legacy` has the same meaning as in `SoftDice`."""

    def compute(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        cross_entropy = _mean_where(-_log_likelihood(logits, labels), valid)
        return cross_entropy + super().compute(logits, labels, valid)


class LogCoshDice(SoftDice):
    """log cosh of `SoftDice` (Jadon, CIBCB 2020). `legacy` has the same meaning as there."""

    def compute(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        return super().compute(logits, labels, valid).cosh().log()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p_y, (N, *S), by gathering: the backward pass of NLLLoss is not deterministic on CUDA."""
    return logits.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)


def _focal_weight(log_probs: Tensor, gamma: float) -> Tensor:
    """Return (1 - p)^gamma, with a finite gradient at p = 1 for every gamma."""
    misses = -log_probs.expm1()
    return misses.clamp(min=torch.finfo(misses.dtype).tiny) ** gamma


def _onehot(labels: Tensor, valid: Tensor, like: Tensor) -> Tensor:
    """Return one-hot labels (N, C, *S) in the dtype of `like`; zero on void."""
    return torch.zeros_like(like).scatter_(1, labels.unsqueeze(1), valid.unsqueeze(1).to(like.dtype))


def _mean_where(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of values (N, *S) over the valid pixels; there must be one."""
    return values.where(valid, 0).sum() / valid.sum()


def lovasz_softmax(probs: Tensor, labels: Tensor) -> Tensor:
    """Return the Lovász extension of 1 - IoU, averaged over the classes that occur in the labels.

    probs: (C, P) in [0, 1]. labels: (P,) int64 in [0, C), at least one pixel. The pixels of all images form one ratio.
    """
    losses = []
    for index in labels.unique().tolist():
        actual = labels == index
        errors = (actual.to(probs.dtype) - probs[index]).abs()
        errors, order = errors.sort(descending=True)
        losses.append((errors * jaccard_steps(actual[order], probs.dtype)).sum())
    return torch.stack(losses).mean()


def jaccard_steps(actual: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how much each further mistake raises the Jaccard loss (Berman et al., CVPR 2018, algorithm 1): (P,).

    actual: (P,) bool, whether a pixel is of the class, in the order of decreasing error; at least one is True.
    The steps sum to 1. They are in closed form, because differences of successive losses cancel in float32 if there
    are many pixels.
    """
    missed = actual.cumsum(0)
    total = missed[-1]
    intersection = total - missed
    union = (total + (~actual).cumsum(0)).to(dtype)
    # A missed pixel lowers the intersection by 1: the step is 1/U. A false one raises the union: I/(U-1) - I/U.
    return torch.where(actual, 1 / union, intersection / (union * (union - 1)))
