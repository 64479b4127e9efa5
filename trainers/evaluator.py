"""Scoring prediction rules: one forward pass, the same probabilities for every rule.

Letters of shapes: N images, C classes, H × W pixels.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from rankseg import Predictor
from rankseg.calibration import Reliability
from trainers.distributed import World, gather
from trainers.losses import SegmentationLoss, link_probs
from trainers.metrics import PAPER_EPSILON, Counts, Truth, count, encode, mean_over_classes, summary
from trainers.results import EvalResult
from trainers.update import PRECISIONS

_OBSERVED = 1 << 14  # pixels of an image that its reliability is read from, or some more


@dataclass(frozen=True)
class Scoring:
    """What is scored, and by whose conventions (``protocol=paper`` or ``corrected``).

    Attributes:
        num_classes, ignore_index: of the labels.
        scored: the classes that the means run over.
        void: whether predictions on void pixels are left out or count as false.
        paper: the published arithmetic (an epsilon in denominators, three decimals, batch means of the loss).
        legacy_bce_iou, legacy_soft_dice_void: two faults of published rows, on demand.
    """

    num_classes: int
    scored: tuple[int, ...]
    ignore_index: int = 255
    void: Literal["masked", "counted"] = "masked"
    paper: bool = False
    legacy_bce_iou: bool = False
    legacy_soft_dice_void: bool = False

    def encode(self, targets: Tensor) -> Truth:
        """The truth that every rule is counted against."""
        return encode(
            targets,
            self.num_classes,
            self.ignore_index,
            self.void,
            legacy_soft_dice_void=self.legacy_soft_dice_void,
        )

    def summary(self, counts: Counts) -> dict[str, Any]:
        """Every average of the tables."""
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
    where: World,
    *,
    temperature: float = 1.0,
    correct: Callable[[Tensor], Tensor] | None = None,
    precision: str = "fp32",
    progress: str = "",
) -> dict[str, EvalResult]:
    """Score every rule on the same probabilities.

    Args:
        model: images (N, 3, H, W) -> an object with ``logits`` (N, C, H, W).
        batches: with ``images``, ``targets`` (N, H', W'), ``names``, ``indices``; logits are resized where the
            target is larger or smaller. Each process gets its own share; together they see every image once.
        rules: name -> probabilities (N, C, H', W') to masks.
        criterion: the loss, whose ``link`` turns logits into probabilities.
        scoring: the conventions.
        where: this process among all.
        temperature: divides the logits before the link; the loss is that of the logits as they are.
        correct: probabilities -> probabilities, such as the correction of focal-loss networks.
        progress: what to write before the progress bar; empty for none.

    Returns:
        A result for each rule, at every rank, over all images in the order of their indices.

    Raises:
        ValueError: there is no image, or a rule returns something other than masks.
    """
    model.eval()
    rows: list[tuple[int, str]] = []
    losses: list[tuple[int, float]] = []
    counts: dict[str, list[Counts]] = {name: [] for name in rules}
    seconds = dict.fromkeys(rules, 0.0)
    reliability = Reliability()
    cast = torch.autocast(
        where.device.type, PRECISIONS[precision] or torch.bfloat16, enabled=precision != "fp32"
    )

    bar = tqdm(
        total=getattr(batches, "num_images", None),  # this process's share
        unit="img",
        desc=progress,
        disable=None if progress and where.is_main else True,
        leave=False,
    )
    for batch in batches:
        bar.update(len(batch.names))
        images = batch.images.to(where.device, non_blocking=True)
        targets = batch.targets.to(where.device, non_blocking=True)
        if scoring.paper and (targets == scoring.ignore_index).all():
            continue
        with cast:
            logits = model(images).logits
        logits = at_size(logits, targets.shape[-2:])
        losses += _losses(criterion, logits, targets, batch.indices, scoring)

        probs = link_probs(logits / temperature if temperature != 1 else logits, criterion.link)
        probs = correct(probs) if correct else probs
        truth = scoring.encode(targets)
        for name, rule in rules.items():
            started = _now(where)
            masks = rule(probs)
            seconds[name] += _now(where) - started
            counts[name].append(count(masks, truth).to("cpu"))
        observe(reliability, probs, truth)
        rows += zip(batch.indices, batch.names, strict=True)
        if not bar.disable and rules:
            shown, last = next(reversed(counts.items()))
            dice = mean_over_classes(torch.cat([part.dice() for part in last]), scoring.scored).nanmean()
            bar.set_postfix({f"mDice {shown}": f"{dice:.3f}"}, refresh=False)
    bar.close()
    return _collect(rows, losses, counts, seconds, reliability, scoring, where)


def _losses(
    criterion: SegmentationLoss, logits: Tensor, targets: Tensor, indices: list[int], scoring: Scoring
) -> list[tuple[int, float]]:
    """The loss of each image, so that it does not depend on the batch size; the paper's is that of each batch."""
    if scoring.paper:
        return [(indices[0], criterion(logits, targets).item())]
    labelled = (targets != scoring.ignore_index).flatten(1).any(1).tolist()
    return [
        (index, criterion(logits[i : i + 1], targets[i : i + 1]).item())
        for i, index in enumerate(indices)
        if labelled[i]
    ]


def at_size(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (N, C, *, *) as float32 at the (height, width) of their targets, bilinear."""
    logits = logits.float()
    if logits.shape[-2:] == tuple(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def observe(reliability: Reliability, probs: Tensor, truth: Truth) -> None:
    """Add a batch's probabilities (N, C, H, W), of large images at a regular stride.

    Neighbouring pixels say the same thing, and binning all of them would cost more than predicting does.
    """
    step = max(1, truth.onehot[0, 0].numel() // _OBSERVED)
    valid = None if truth.valid is None else truth.valid.flatten(1)[:, ::step]
    reliability.update(probs.flatten(2)[..., ::step], truth.onehot.flatten(2)[..., ::step], valid)


def _collect(
    rows: list[tuple[int, str]],
    losses: list[tuple[int, float]],
    counts: dict[str, list[Counts]],
    seconds: dict[str, float],
    reliability: Reliability,
    scoring: Scoring,
    where: World,
) -> dict[str, EvalResult]:
    """Join the shares of all ranks by image index, so that no number depends on how they were shared out."""
    local = {name: Counts.cat(parts) if parts else None for name, parts in counts.items()}
    shares = gather((rows, losses, local, seconds, reliability), where)
    rows = [row for share in shares for row in share[0]]
    if not rows:
        raise ValueError("there is no image to score; check the split and dataset.root")
    order = sorted(range(len(rows)), key=lambda i: rows[i][0])
    loss = [value for _, value in sorted(pair for share in shares for pair in share[1])]
    merged = functools.reduce(Reliability.merge, (share[4] for share in shares))
    results = {}
    for name in counts:
        joined = Counts.cat([share[2][name] for share in shares if share[2][name] is not None]).select(order)
        results[name] = EvalResult(
            predictor=name,
            names=[rows[i][1] for i in order],
            counts=joined,
            scored=scoring.scored,
            scores={
                "test_loss": sum(loss) / len(loss) if loss else float("nan"),
                **scoring.summary(joined),
                "ece": merged.ece(),
                "classwise_ece": float(merged.classwise_ece().nanmean()),
            },
            seconds=sum(share[3][name] for share in shares),
        )
    return results


def _now(where: World) -> float:
    if where.device.type == "cuda":
        torch.cuda.synchronize(where.device)
    return time.perf_counter()
