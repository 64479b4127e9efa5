"""Selective prediction: which images to trust, and a lower bound on their Dice with a guaranteed probability.

A confidence ranks images; the risk of an image is 1 - Dice. The risk-coverage curve is the mean risk of the most
confident images. The mean of the curve, AURC, measures the ranking. Split conformal prediction turns confidences into
bounds. Let s_i = confidence_i - Dice_i on n images that were not used for any choice, and q the ⌈(n+1)(1-α)⌉-th
smallest s_i. A new exchangeable image has Dice >= confidence - q with probability at least 1 - α.

Shapes: n images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from rankseg import Predictor
from rankseg.expected import confidence, image_confidence, mean_entropy, mean_max_probability, soft_dice_confidence
from trainers.distributed import World
from trainers.forward import measure
from trainers.metrics import Counts, PerImage, Scoring, count, mean_over_classes


def risk_coverage(confidence: Tensor, risk: Tensor) -> tuple[Tensor, Tensor]:
    """Return coverages k/n and the mean risk of the k most confident images, (n,) each.

    For images of equal confidence it is the mean over all their orders.
    """
    order = confidence.argsort(descending=True)
    sizes = torch.unique_consecutive(confidence[order], return_counts=True)[1]
    group = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    means = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, group, risk[order].double()) / sizes
    kept = torch.arange(1, len(risk) + 1, dtype=torch.float64)
    return kept / len(risk), means[group].cumsum(0) / kept


def aurc(confidence: Tensor, risk: Tensor) -> float:
    """Return the area under the risk-coverage curve: the mean risk over all coverages."""
    return float(risk_coverage(confidence, risk)[1].mean())


def compare_aurc(
    confidences: Mapping[str, Tensor], risk: Tensor, reference: str, *, resamples: int = 2000
) -> dict[str, dict[str, Any]]:
    """Estimate the AURC of several confidences of the same images, with paired 95 % percentile bootstrap intervals.

    Returns:
        name -> "aurc", "interval", "gain" (AURC of the reference - this one), "gain_interval".
    """
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(len(risk), (len(risk),), generator=generator) for _ in range(resamples)]
    counts = torch.stack([torch.bincount(draw, minlength=len(risk)) for draw in draws])
    drawn = {name: _resampled_aurc(values, risk, counts) for name, values in confidences.items()}
    ends = torch.tensor([(1 - 0.95) / 2, (1 + 0.95) / 2], dtype=torch.float64)
    base = aurc(confidences[reference], risk)
    result = {}
    for name, values in confidences.items():
        found = aurc(values, risk)
        result[name] = {
            "aurc": found,
            "interval": drawn[name].quantile(ends).tolist(),
            "gain": base - found,
            "gain_interval": (drawn[reference] - drawn[name]).quantile(ends).tolist(),
        }
    return result


def _resampled_aurc(confidence: Tensor, risk: Tensor, counts: Tensor) -> Tensor:
    """Return the AURC of each sample that holds image i `counts[b, i]` times: (B,), for counts (B, n).

    AURC is a weighted sum of the sorted risks: the j-th of n has the weight Σ_{k>=j} 1/(k n). Images of equal
    confidence share the weights of their places.
    """
    order = confidence.argsort(descending=True)
    group = torch.unique_consecutive(confidence[order], return_inverse=True)[1]
    number = torch.zeros(len(counts), int(group[-1]) + 1, dtype=torch.int64)
    number.index_add_(1, group, counts[:, order])
    total = torch.zeros(number.shape, dtype=torch.float64)
    total.index_add_(1, group, counts[:, order] * risk[order].double())
    images = counts.shape[1]
    weights = (1 / torch.arange(1, images + 1, dtype=torch.float64)).flip(0).cumsum(0).flip(0) / images
    before = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
    last = number.cumsum(1)
    return (total / number.clamp(min=1) * (before[last] - before[last - number])).sum(1)


def conformal_margin(confidence: Tensor, score: Tensor, alpha: float) -> float:
    """Return q: a new image has score >= confidence - q with probability at least 1 - `alpha`.

    Raises UserError if `alpha` is outside (0, 1), or if there are too few images for it.
    """
    if not 0 < alpha < 1:
        raise UserError(f"alpha={alpha} is invalid: expected a number between 0 and 1. Fix: alpha=0.1 is usual.")
    images = len(score)
    place = math.ceil((images + 1) * (1 - alpha) - 1e-9)
    if place > images:
        least = math.ceil(1 / alpha - 1e-9) - 1
        raise UserError(
            f"alpha={alpha:g} needs at least {least} validation images with a score, found {images}: "
            "no bound holds with fewer. Fix: use a larger alpha or more images."
        )
    return float((confidence - score).double().sort().values[place - 1])


def resplit_coverages(
    confidence: Tensor, score: Tensor, num_fit: int, alpha: float, *, splits: int = 200, seed: int = 0
) -> Tensor:
    """Return the coverage of the bound on the remaining images, for random sets of `num_fit` images: (splits,)."""
    generator = torch.Generator().manual_seed(seed)
    coverages = []
    for _ in range(splits):
        order = torch.randperm(len(score), generator=generator)
        fitted, rest = order[:num_fit], order[num_fit:]
        margin = conformal_margin(confidence[fitted], score[fitted], alpha)
        coverages.append((score[rest] >= confidence[rest] - margin).double().mean())
    return torch.stack(coverages)


@dataclass(frozen=True, eq=False)
class MaskRecord(PerImage):
    """Counts and confidences of the masks of one rule on labelled images."""

    names: list[str]
    counts: Counts
    confidence: Tensor  # (N, C) exact expected Dice; P(class absent) of an empty mask
    soft_dice: Tensor  # (N, C) its approximation, the soft Dice confidence (SDC)
    max_probability: Tensor  # (N,) mean over the pixels
    entropy: Tensor  # (N,) mean over the pixels
    scored: tuple[int, ...]  # the classes in the means

    def dice(self) -> Tensor:
        """Return the mean Dice of each image, (N,) float64, NaN if it is undefined."""
        return mean_over_classes(self.counts.dice(), self.scored)

    def signals(self) -> dict[str, Tensor]:
        """Return every confidence of the images, (N,) each, by name. Larger is surer; `oracle` is the Dice itself."""
        scored = list(self.scored)
        predicted = self.counts.predicted[:, scored] > 0
        return {
            "expected Dice": image_confidence(self.confidence[:, scored], predicted),
            "SDC": image_confidence(self.soft_dice[:, scored], predicted),
            "mean max probability": self.max_probability,
            "mean entropy": -self.entropy,
            "oracle": self.dice(),
        }

    def class_pairs(self, index: int) -> tuple[Tensor, Tensor]:
        """Return confidence and Dice of one class, over the images in which it is predicted."""
        predicted = self.counts.predicted[:, index] > 0
        return self.confidence[predicted, index], self.counts.dice()[predicted, index]


def record_masks(
    model: nn.Module,
    batches: Iterable[Any],
    rule: Predictor,
    to_probs: Callable[[Tensor], Tensor],
    scoring: Scoring,
    world: World,
    precision: str = "fp32",
    progress: str = "",
) -> MaskRecord:
    """Apply a rule to labelled images; return confidence and counts of the masks of all images, at every rank."""

    def record(batch: Any, targets: Tensor, logits: Tensor) -> MaskRecord:
        probs = getattr(rule, "to_probs", to_probs)(logits)
        masks = rule(probs)
        return MaskRecord(
            list(batch.names),
            count(masks, scoring.encode(targets)).to("cpu"),
            confidence(probs, masks).cpu(),
            soft_dice_confidence(probs, masks).cpu(),
            mean_max_probability(probs).cpu(),
            mean_entropy(probs).cpu(),
            scoring.scored,
        )

    options = {"precision": precision, "progress": progress, "unneeded": scoring.is_unneeded}
    return measure(record, model, batches, world, **options)[0]
