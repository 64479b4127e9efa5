"""Score prediction rules: one forward pass, and the same probabilities for every rule.

Shapes: N images, C classes, H × W pixels.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from configs.errors import UserError
from rankseg import Predictor, confidence
from rankseg.calibration import Reliability
from trainers.distributed import World, gather_objects
from trainers.forward import ToProbs, forward
from trainers.losses import SegmentationLoss
from trainers.metrics import PAPER_EPSILON, Counts, Truth, count, encode, summary
from trainers.results import EvalResult

_OBSERVED = 1 << 14  # reliability uses every k-th pixel of a large image: at least so many, fewer than twice as many


@dataclass(frozen=True)
class Scoring:
    """What is scored, and by which conventions (``protocol=paper`` or ``corrected``).

    Attributes:
        num_classes, ignore_index: of the labels.
        scored: the classes in the means.
        void: whether predictions on void pixels are left out or count as false.
        paper: the published arithmetic: an epsilon in denominators, three decimals, the loss of batches.
        legacy_bce_iou, legacy_soft_dice_void: two faults of published rows, off by default.
    """

    num_classes: int
    scored: tuple[int, ...]
    ignore_index: int = 255
    void: Literal["masked", "counted"] = "masked"
    paper: bool = False
    legacy_bce_iou: bool = False
    legacy_soft_dice_void: bool = False

    def encode(self, targets: Tensor) -> Truth:
        """Encode labels (N, H, W) for counting."""
        return encode(
            targets, self.num_classes, self.ignore_index, self.void, legacy_soft_dice_void=self.legacy_soft_dice_void
        )

    def is_unneeded(self, targets: Tensor) -> bool:
        """Return whether a batch is left out: under ``paper``, one without any labelled pixel."""
        return self.paper and bool((targets == self.ignore_index).all())

    def summary(self, counts: Counts) -> dict[str, Any]:
        """Return every average of the tables."""
        return summary(
            counts,
            self.scored,
            epsilon=PAPER_EPSILON if self.paper else 0.0,
            legacy_bce_iou=self.legacy_bce_iou,
            decimals=3 if self.paper else None,
        )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    rules: Mapping[str, Predictor],
    criterion: SegmentationLoss,
    scoring: Scoring,
    world: World,
    *,
    to_probs: Callable[[Tensor], Tensor] | None = None,
    confidences: bool = False,
    precision: str = "fp32",
    progress: str = "",
) -> dict[str, EvalResult]:
    """Score every rule on the same probabilities.

    Args:
        model: images (N, 3, H, W) -> an object with ``logits`` (N, C, H, W).
        batches: with ``images``, ``targets`` (N, H', W'), ``names`` and ``indices``. Logits are resized to the
            target. Each process gets its share of the images; together they see every image once.
        rules: name -> probabilities (N, C, H', W') to masks.
        criterion: the loss, whose ``link`` turns logits into probabilities.
        scoring: the conventions.
        world: this process among all.
        to_probs: logits -> probabilities; default: the link of the criterion. A rule's attribute ``to_probs``
            replaces it. The loss is computed from the logits as they are.
        confidences: whether to compute the expected Dice of every mask.
        precision: of the network, as in training.
        progress: title of the progress bar; empty for none.

    Returns:
        The result of each rule over all images, in the order of their indices, at every rank.

    Raises:
        ValueError: there is no image, or a rule does not return masks.
    """
    convert = to_probs or ToProbs(criterion.link)
    share = _Share({name: [] for name in rules}, {name: [] for name in rules}, dict.fromkeys(rules, 0.0))
    unneeded = scoring.is_unneeded
    passes = forward(model, batches, world, precision=precision, progress=progress, unneeded=unneeded)
    for batch, targets, logits in passes:
        share.losses += _losses(criterion, logits, targets, batch.indices, scoring)
        probs, truth = convert(logits), scoring.encode(targets)
        own: dict[Any, Tensor] = {}
        for name, rule in rules.items():
            other = getattr(rule, "to_probs", None)
            if other is not None and other not in own:
                own[other] = other(logits)
            given = probs if other is None else own[other]
            started = _now(world)
            masks = rule(given)
            share.seconds[name] += _now(world) - started
            share.counts[name].append(count(masks, truth).to("cpu"))
            if confidences:
                share.confidences[name].append(confidence(given, masks).cpu())
        observe(share.reliability, probs, truth)
        share.likelihoods.append(proper_scores(probs, truth, criterion.link).cpu())
        share.rows += zip(batch.indices, batch.names, strict=True)
    return _collect(share, scoring, world)


@dataclass
class _Share:
    """What one process measured on its images."""

    counts: dict[str, list[Counts]]
    confidences: dict[str, list[Tensor]]
    seconds: dict[str, float]
    rows: list[tuple[int, str]] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    likelihoods: list[Tensor] = field(default_factory=list)
    reliability: Reliability = field(default_factory=Reliability)


def _losses(
    criterion: SegmentationLoss, logits: Tensor, targets: Tensor, indices: list[int], scoring: Scoring
) -> list[tuple[int, float]]:
    """Return (index, loss) of each labelled image, whatever the batch size; under ``paper`` one pair for the batch."""
    if scoring.paper:
        return [(indices[0], criterion(logits, targets).item())]
    labelled = (targets != scoring.ignore_index).flatten(1).any(1).tolist()
    return [
        (index, criterion(logits[i : i + 1], targets[i : i + 1]).item())
        for i, index in enumerate(indices)
        if labelled[i]
    ]


def observe(reliability: Reliability, probs: Tensor, truth: Truth) -> None:
    """Add the probabilities (N, C, H, W) of a batch to its reliability.

    Large images are read at a regular stride: neighbouring pixels hold nearly the same information, and binning all of
    them would take longer than the prediction.
    """
    step = max(1, truth.onehot[0, 0].numel() // _OBSERVED)
    valid = None if truth.valid is None else truth.valid.flatten(1)[:, ::step]
    reliability.update(probs.flatten(2)[..., ::step], truth.onehot.flatten(2)[..., ::step], valid)


def proper_scores(probs: Tensor, truth: Truth, link: str) -> Tensor:
    """Return the log-loss and Brier score of each image, (N, 2) float64: means over its counted pixels, or NaN.

    The log-loss of a softmax is -log p of the true class; that of a sigmoid is the sum of the binary log-losses of all
    classes. The Brier score is Σ_c (p_c - y_c)². Large images are read at a regular stride, as in `observe`.
    """
    step = max(1, truth.onehot[0, 0].numel() // _OBSERVED)
    p, y = probs.flatten(2)[..., ::step].double(), truth.onehot.flatten(2)[..., ::step]
    valid = y.any(1) if link == "softmax" else torch.ones_like(y[:, 0])
    if truth.valid is not None:
        valid = valid & truth.valid.flatten(1)[:, ::step]
    right = torch.where(y, p, 1.0 if link == "softmax" else 1 - p).clamp(min=1e-38)
    values = torch.stack([-right.log().sum(1), ((p - y.double()) ** 2).sum(1)], dim=2)
    pixels = valid.sum(1, keepdim=True).double()
    return (values * valid[..., None]).sum(1) / torch.where(pixels > 0, pixels, torch.nan)


def probability_scores(reliability: Reliability, likelihoods: Tensor, first: int = 0) -> dict[str, Any]:
    """Return the averages that depend on the probabilities alone, not on a rule.

    Args:
        likelihoods: `proper_scores` of the images, (N, 2).
        first: the number of the first class.
    """
    log_loss, brier = likelihoods.nanmean(0).tolist()
    return {
        "ece": reliability.ece(),
        "classwise_ece": float(reliability.classwise_ece().nanmean()),
        "log_loss": log_loss,
        "brier": brier,
        "volume_ratio": {str(c): ratio for c, ratio in enumerate(reliability.volume_ratio().tolist(), first)},
    }


def _collect(local: _Share, scoring: Scoring, world: World) -> dict[str, EvalResult]:
    """Join the shares of all ranks in the order of the images: no number depends on how they were distributed."""
    shares = [share for share in gather_objects(local, world) if share.rows]
    rows = [row for share in shares for row in share.rows]
    if not rows:
        raise UserError("there is no image to score. Fix: check split, dataset.splits and dataset.root.")
    order = sorted(range(len(rows)), key=lambda i: rows[i][0])
    loss = [value for _, value in sorted(pair for share in shares for pair in share.losses)]
    merged = functools.reduce(Reliability.merge, (share.reliability for share in shares))
    likelihoods = torch.cat([part for share in shares for part in share.likelihoods])[order]
    of_probs = probability_scores(merged, likelihoods)
    results = {}
    for name in local.counts:
        joined = Counts.cat([part for share in shares for part in share.counts[name]]).select(order)
        parts = [part for share in shares for part in share.confidences[name]]
        results[name] = EvalResult(
            predictor=name,
            names=[rows[i][1] for i in order],
            counts=joined,
            scored=scoring.scored,
            scores={
                "test_loss": sum(loss) / len(loss) if loss else float("nan"),
                **scoring.summary(joined),
                **of_probs,
            },
            seconds=sum(share.seconds[name] for share in shares),
            confidence=torch.cat(parts)[order] if parts else None,
        )
    return results


def _now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()
