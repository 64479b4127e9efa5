"""Score prediction rules, for testing and for validation. All rules share one forward pass."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankseg import Predictor, confidence
from rankseg.calibration import Reliability
from trainers.distributed import World
from trainers.forward import ToProbs, measure, probs_for
from trainers.journal import Journal
from trainers.losses import SegmentationLoss
from trainers.metrics import Counts, PerImage, Scoring, Truth, count
from trainers.results import EvalResult
from trainers.update import divergence_remedy

NEUTRAL = "T"  # the rule whose mDice chooses the best epoch: the threshold favours no ranking rule
_SAMPLED_PIXELS = 1 << 14  # at least so many pixels of a larger image are sampled, at most twice as many


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
    """Score every rule on the logits of one forward pass.

    Args:
        model, batches: see `trainers.forward.forward`. Each process gets its share of the images.
        rules: name -> rule, a function from probabilities (N, C, H, W) to masks.
        criterion: the loss; its ``link`` (softmax or sigmoid) names the function from logits to probabilities.
        to_probs: logits -> probabilities; default: the link of the criterion. All rules get these probabilities, but
            for rules with an attribute ``to_probs``. The loss is computed from the logits as they are.
        confidences: whether to compute `rankseg.confidence` of every mask.

    Returns:
        The result of each rule over all images, in the order of their indices, at every rank.

    Raises:
        UserError: there are no images.
    """
    convert = to_probs or ToProbs(criterion.link)
    seconds, reliability = dict.fromkeys(rules, 0.0), Reliability()

    def measure_batch(batch: Any, targets: Tensor, logits: Tensor) -> _Measured:
        probs, truth = convert(logits), scoring.encode(targets)
        counts: dict[str, Counts] = {}
        confidence_of: dict[str, Tensor] = {}
        for name, rule in rules.items():
            given = probs_for(rule, logits, probs)
            started = _now(world)
            masks = rule(given)
            seconds[name] += _now(world) - started
            counts[name] = count(masks, truth).to("cpu")
            if confidences:
                confidence_of[name] = confidence(given, masks).cpu()
        reliability.update(*sample_pixels(probs, truth))
        likelihoods = proper_scores(probs, truth, criterion.link).cpu()
        losses = _losses(criterion, logits, targets, scoring)
        return _Measured(list(batch.names), losses, likelihoods, counts, confidence_of)

    measured, states = measure(
        measure_batch, model, batches, world, state=(seconds, reliability),
        precision=precision, progress=progress, unneeded=scoring.is_unneeded,
    )  # fmt: skip
    return _collect(measured, states, scoring)


@dataclass(frozen=True, eq=False)
class _Measured(PerImage):
    """Measurements of N images: losses, log-loss and Brier score (N, 2); for each rule, counts and confidences."""

    names: list[str]
    losses: list[float | None]
    likelihoods: Tensor
    counts: dict[str, Counts]
    confidences: dict[str, Tensor]


def _losses(criterion: SegmentationLoss, logits: Tensor, targets: Tensor, scoring: Scoring) -> list[float | None]:
    """Return the loss of each image, None without labels; protocol ``paper``: of the batch, then None for the rest."""
    if scoring.paper:
        return [criterion(logits, targets).item(), *[None] * (len(targets) - 1)]
    labelled = (targets != scoring.ignore_index).flatten(1).any(1).tolist()
    return [
        criterion(logits[i : i + 1], targets[i : i + 1]).item() if labelled[i] else None for i in range(len(targets))
    ]


def sample_pixels(probs: Tensor, truth: Truth) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return probabilities and one-hot labels (N, C, P) of every k-th pixel, and whether it is valid, (N, P) or None.

    Neighbouring pixels hold nearly the same information, and binning all would take longer than the prediction.
    """
    step = max(1, truth.onehot[0, 0].numel() // _SAMPLED_PIXELS)
    valid = None if truth.valid is None else truth.valid.flatten(1)[:, ::step]
    return probs.flatten(2)[..., ::step], truth.onehot.flatten(2)[..., ::step], valid


def proper_scores(probs: Tensor, truth: Truth, link: str) -> Tensor:
    """Return the log-loss and Brier score of each image, (N, 2) float64: means over counted pixels, or NaN.

    The pixels are a sample, see `_sample_pixels`.

    The log-loss of a softmax is -log p of the true class; that of a sigmoid is the sum of the binary log-losses of all
    classes. The Brier score is Σ_c (p_c - y_c)².
    """
    sample, y, counted = sample_pixels(probs, truth)
    p, valid = sample.double(), y.any(1) if link == "softmax" else torch.ones_like(y[:, 0])
    if counted is not None:
        valid = valid & counted
    p_true = torch.where(y, p, 1.0 if link == "softmax" else 1 - p).clamp(min=1e-38)
    values = torch.stack([-p_true.log().sum(1), ((p - y.double()) ** 2).sum(1)], dim=2)
    pixels = valid.sum(1, keepdim=True).double()
    return (values * valid[..., None]).sum(1) / torch.where(pixels > 0, pixels, torch.nan)


def probability_scores(reliability: Reliability, likelihoods: Tensor, first: int = 0) -> dict[str, Any]:
    """Return the averages that depend on the probabilities alone, not on a rule.

    ``likelihoods`` are the `proper_scores` of the images, (N, 2). ``first`` is the class of the first channel: 1 if the
    background has none. The volume ratio of a class is Σ p / Σ y over all pixels.
    """
    log_loss, brier = likelihoods.nanmean(0).tolist()
    return {
        "ece": reliability.ece(),
        "classwise_ece": float(reliability.classwise_ece().nanmean()),
        "log_loss": log_loss,
        "brier": brier,
        "volume_ratio": {str(c): ratio for c, ratio in enumerate(reliability.volume_ratio().tolist(), first)},
    }


def _collect(measured: _Measured, states: list[Any], scoring: Scoring) -> dict[str, EvalResult]:
    """Average over all images. The distribution of the images over processes does not change a number."""
    loss = [value for value in measured.losses if value is not None]
    reliability = functools.reduce(Reliability.merge, (reliability for _, reliability in states))
    mean_loss = sum(loss) / len(loss) if loss else float("nan")
    of_probs = probability_scores(reliability, measured.likelihoods)
    return {
        name: EvalResult(
            predictor=name,
            names=measured.names,
            counts=counts,
            scored=scoring.scored,
            scores={"test_loss": mean_loss, **scoring.summary(counts), **of_probs},
            seconds=sum(seconds[name] for seconds, _ in states),
            confidence=measured.confidences.get(name),
        )
        for name, counts in measured.counts.items()
    }


def _now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()


@dataclass(eq=False)
class Validation:
    """Score a network on the validation images after an epoch: log the scores, and draw pictures."""

    data: Any
    loader: Any  # batches of the data; its ``transform`` is used for the pictures too
    rules: Mapping[str, Predictor]
    criterion: SegmentationLoss
    scoring: Scoring
    journal: Journal
    world: World
    _: KW_ONLY
    epochs: int  # for the printed line
    precision: str = "fp32"
    panels: int = 0  # number of images that are drawn for TensorBoard

    def __post_init__(self) -> None:
        self.to_probs = ToProbs(self.criterion.link, remedy=divergence_remedy(self.precision))

    def __call__(self, network: nn.Module, epoch: int, step: int) -> float:
        """Return the mDice of rule T, or 0 if no image defines it."""
        results = evaluate(
            network, self.loader, self.rules, self.criterion, self.scoring, self.world,
            to_probs=self.to_probs, precision=self.precision, progress="validating",
        )  # fmt: skip
        for name, result in results.items():
            self.journal.log(step, f"val_{name}", epoch=epoch, **result.scores)
        if self.journal.events is not None:
            self._draw(network, step)
        dice = {name: result.scores["mean_dice"] for name, result in results.items()}
        if self.world.is_main:
            shown = "  ".join(f"{name} {100 * score:.2f}" for name, score in dice.items())
            loss = results[NEUTRAL].scores["test_loss"]
            print(f"epoch {epoch:>3}/{self.epochs}  val loss {loss:.4f}  mDice: {shown}", flush=True)
        return dice[NEUTRAL] if math.isfinite(dice[NEUTRAL]) else 0.0

    def _draw(self, network: nn.Module, step: int) -> None:
        from trainers.panels import panels, sheet  # slow to import

        first = range(min(self.panels, len(self.data)))
        drawn = panels(
            network, self.data, self.loader.transform, self.rules, self.to_probs, self.world, first, self.precision,
        )  # fmt: skip
        for name, panel in drawn:
            self.journal.log_image(step, f"val/{name}", sheet(panel))
