"""Measure what the report shows: all scores in one pass over a split, and what the confidence of masks is worth.

Shapes: N images, C classes, H × W pixels; n images with a score.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from configs.errors import UserError
from configs.fitting import Fitter
from rankseg import Predictor, threshold
from rankseg.calibration import Reliability
from scripts.analysis import selective
from scripts.analysis.selective import MaskRecord, conformal_margin, record_masks
from trainers.distributed import World
from trainers.evaluator import observe
from trainers.forward import measure as measure_images
from trainers.forward import probs_for
from trainers.metrics import Counts, PerImage, Scoring, count, mean_over_classes

EXPECTED = "expected Dice"  # the confidence of this project; the others are for comparison
THRESHOLDS = tuple(k / 10 for k in range(1, 10))
ToProbs = Callable[[Tensor], Tensor]
Pairs = tuple[Tensor, Tensor]  # expected and achieved Dice of images


@dataclass(frozen=True, eq=False)
class Findings(PerImage):
    """The sufficient statistics of the report.

    Attributes:
        names: the images, in order.
        counts: (N, C) pixels, by rule, kind of probabilities, and void pixels "masked" or "counted".
        cutoffs: (N, C) the smallest probability that RankDice selected; NaN if it selected nothing.
        reliability: by kind of probabilities.
        scoring: the conventions of the run.
        temperature: fitted on the validation split.
    """

    names: list[str]
    counts: dict[tuple[str, str, str], Counts]
    cutoffs: Tensor
    reliability: dict[str, Reliability]
    scoring: Scoring
    temperature: float

    def of(self, rule: str, probs: str = "raw", void: str = "") -> Counts:
        """Return the counts of a rule; default: under the run's own protocol."""
        return self.counts[rule, probs, void or self.scoring.void]

    def dice(self, rule: str, probs: str = "raw", void: str = "") -> Tensor:
        """Return the mean Dice over scored classes of each image, (N,) float64, NaN if undefined."""
        return mean_over_classes(self.of(rule, probs, void).dice(), self.scoring.scored)

    def mean(self, rule: str, probs: str = "raw", void: str = "") -> float:
        """Return the mean Dice, in percent."""
        return 100 * float(self.dice(rule, probs, void).nanmean())


def variants(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Return the kinds of probabilities that the report compares, each with the options that make it."""
    found: dict[str, dict[str, Any]] = {"raw": {"calibrate": "none"}, "calibrated": {"calibrate": "temperature"}}
    if cfg.loss.name == "focal":
        found["focal-corrected"] = {"calibrate": "none", "correct_focal": True}
    if cfg.calibrate == "class":
        found["calibrated per class"] = {"calibrate": "class"}
    return found


def analyse(
    fitters: Iterable[tuple[str, Fitter]], names: Sequence[str], data: Any, held_out: Any
) -> tuple[Findings, dict[str, Any], dict[str, Predictor], list[str]]:
    """Score rules on every kind of probabilities, and measure the confidence of RankDice on raw ones.

    Args:
        fitters: by kind of probabilities, "raw" first; each is made when the one before has saved its values.
        names: the rules.
        data: the images.
        held_out: images that the bound on the Dice is fitted on; None if there are none.

    Returns:
        The findings, the result of `assess`, the rules of raw probabilities, and lines about what was fitted.
    """
    compared, temperature = {}, math.nan
    for kind, fitter in fitters:
        rules, values = fitter.rules(names, data)
        compared[kind] = fitter.to_probs(), rules
        if kind == "raw":
            raw, lines = fitter, fitter.report(values, data)
        if kind == "calibrated":
            temperature = cast(float, fitter.calibration("temperature"))
        fitter.save()
    batches, scoring = raw.batches(data), raw.scoring(data)
    findings = measure(raw.network, batches, compared, scoring, raw.world, temperature, raw.precision)
    to_probs, rules = compared["raw"]
    on = record_split(raw, data, rules["rankdice"], to_probs, "confidence")
    fitted = None
    if held_out is not None:
        fitted = known_pairs(record_split(raw, held_out, rules["rankdice"], to_probs, "held-out images"))
    return findings, assess(on, fitted), rules, lines


def record_split(fitter: Fitter, data: Any, rule: Predictor, to_probs: ToProbs, title: str) -> MaskRecord:
    """Return counts and confidence of the masks of a rule on a split."""
    batches, scoring = fitter.batches(data), fitter.scoring(data)
    return record_masks(fitter.network, batches, rule, to_probs, scoring, fitter.world, fitter.precision, title)


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    compared: Mapping[str, tuple[ToProbs, Mapping[str, Predictor]]],
    scoring: Scoring,
    world: World,
    temperature: float,
    precision: str = "fp32",
) -> Findings:
    """Count each rule on each kind of probabilities; on raw ones also with the other treatment of void pixels.

    Args:
        compared: for each kind of probabilities the conversion of logits, and the rules. A rule with an attribute
            ``to_probs`` has a conversion of its own.
    """
    reliability = {kind: Reliability() for kind in compared}
    other = replace(scoring, void="counted" if scoring.void == "masked" else "masked", legacy_soft_dice_void=False)
    sweep = {f"at {at:.1f}": functools.partial(threshold, at=at) for at in THRESHOLDS}  # RankDice is compared with

    def measure_batch(batch: Any, targets: Tensor, logits: Tensor) -> Findings:
        truth, other_truth = scoring.encode(targets), other.encode(targets)
        counts: dict[tuple[str, str, str], Counts] = {}
        for kind, (to_probs, rules) in compared.items():
            probs = to_probs(logits)
            observe(reliability[kind], probs, truth)
            for rule, predictor in rules.items():
                masks = predictor(probs_for(predictor, logits, probs))
                counts[rule, kind, scoring.void] = count(masks, truth).to("cpu")
                if kind == "raw":
                    counts[rule, kind, other.void] = count(masks, other_truth).to("cpu")
                    if rule == "rankdice":
                        cutoffs = smallest_selected(probs, masks).cpu()
            if kind == "raw":
                for rule, predictor in sweep.items():
                    counts[rule, kind, scoring.void] = count(predictor(probs), truth).to("cpu")
        return Findings(list(batch.names), counts, cutoffs, reliability, scoring, temperature)

    options: Any = {"precision": precision, "progress": "measuring", "unneeded": scoring.is_unneeded}
    return measure_images(measure_batch, model, batches, world, **options)[0]


def smallest_selected(probs: Tensor, masks: Tensor) -> Tensor:
    """Return the smallest selected probability of each image and class, (N, C), NaN if nothing is selected."""
    least = probs.masked_fill(~masks, torch.inf).flatten(2).amin(2)
    return least.masked_fill(least.isinf(), torch.nan)


def chosen_cutoffs(findings: Findings) -> Tensor:
    """Return the cut-offs of RankDice's non-empty masks of scored classes, (masks,)."""
    found = findings.cutoffs[:, list(findings.scoring.scored)]
    return found[~found.isnan()]


def by_size(findings: Findings, compared: Iterable[str]) -> list[tuple[str, int, dict[str, float]]]:
    """Return the mean Dice in percent over pairs of image and class, in thirds by the object's size.

    Returns:
        (name of the third, number of pairs, rule -> mean).
    """
    scored = list(findings.scoring.scored)
    first = findings.of("rankdice")
    share = (first.actual[:, scored].double() / first.pixels[:, None].double()).flatten()
    present = (share > 0).nonzero()[:, 0]
    thirds = present[share[present].argsort(stable=True)].tensor_split(3)
    scores = {rule: findings.of(rule).dice()[:, scored].flatten() for rule in compared}
    rows = []
    for name, pairs in zip(("small", "medium", "large"), thirds, strict=True):
        if len(pairs):
            low, high = 100 * float(share[pairs[0]]), 100 * float(share[pairs[-1]])
            means = {rule: 100 * float(dice[pairs].mean()) for rule, dice in scores.items()}
            rows.append((f"{name} objects ({low:.3g} to {high:.3g} % of the image)", len(pairs), means))
    return rows


def false_alarms(findings: Findings, rule: str) -> tuple[int, int]:
    """Return how many pairs of image and absent class a rule predicts a mask for, and how many pairs there are."""
    scored = list(findings.scoring.scored)
    counts = findings.of(rule)
    absent = counts.actual[:, scored] == 0
    return int((absent & (counts.predicted[:, scored] > 0)).sum()), int(absent.sum())


def known_pairs(record: MaskRecord) -> Pairs:
    """Return expected and achieved Dice of the images with a score, (n,) each."""
    dice = record.dice()
    known = ~dice.isnan()
    return record.signals()[EXPECTED][known], dice[known]


def assess(on: MaskRecord, fitted: Pairs | None, alpha: float = 0.1, resplits: int = 200) -> dict[str, Any]:
    """Return AURC, risk-coverage curves and the conformal bound of the masks in ``on``.

    Args:
        on: the images that are measured.
        fitted: expected and achieved Dice of other images, which give the margin; None if there are none. The bound
            of one random half is then checked on the other.
        alpha: share of images that may miss the bound.
        resplits: random splits of all images that check the coverage.

    Returns:
        The numbers of confidence.json. With too few images for ``alpha`` there is no bound: "no_bound" has the reason.
    """
    expected, dice = known_pairs(on)
    if not len(dice):
        return {"alpha": alpha, "images": 0, "no_bound": "no image has a score."}
    known, risk = ~on.dice().isnan(), 1 - dice
    signals = {name: values[known] for name, values in on.signals().items()}
    found = {
        "alpha": alpha,
        "images": len(dice),
        "expected": float(expected.mean()),
        "achieved": float(dice.mean()),
        "correlation": float(torch.stack([expected, dice]).corrcoef()[0, 1]) if len(dice) > 1 else math.nan,
        "aurc": {name: one._asdict() for name, one in selective.compare_aurc(signals, risk, EXPECTED).items()},
        "aurc_without_order": selective.aurc(torch.zeros(len(risk)), risk),
        "curves": {name: selective.risk_coverage(values, risk)[1].tolist() for name, values in signals.items()},
        "points": torch.stack((expected, dice), 1).tolist(),
    }
    try:
        return {**found, **_check_bound(expected, dice, fitted, alpha, resplits)}
    except UserError as error:
        return {**found, "no_bound": str(error)}


def _check_bound(expected: Tensor, dice: Tensor, fitted: Pairs | None, alpha: float, resplits: int) -> dict[str, Any]:
    """Return the margin of the bound and how often it holds."""
    if fitted is None:
        size, everything = len(dice) // 2, (expected, dice)
    else:
        size = len(fitted[1])
        everything = torch.cat([fitted[0], expected]), torch.cat([fitted[1], dice])
    margin = conformal_margin(*(fitted or everything), alpha)
    coverages = selective.resplit_coverages(*everything, size, alpha, splits=resplits)
    bound = expected - margin
    return {
        "margin": margin,
        "margin_images": len(fitted[1]) if fitted else None,
        "coverage": float((dice >= bound).double().mean()),
        "mean_bound": float(bound.clamp(min=0).mean()),
        "resplits": {
            "number": resplits,
            "mean": float(coverages.mean()),
            "from": float(coverages.quantile(0.05)),
            "to": float(coverages.quantile(0.95)),
        },
    }
