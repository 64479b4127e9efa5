"""Measure what the report shows: the scores of all rules, and how well the confidence of a mask predicts its Dice.

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
from trainers.evaluator import sample_pixels
from trainers.forward import measure as measure_images
from trainers.forward import probs_for
from trainers.metrics import Counts, PerImage, Scoring, count, mean_over_classes

EXPECTED = "expected Dice"  # the confidence of this project; the others are for comparison
THRESHOLDS = tuple(k / 10 for k in range(1, 10))
ToProbs = Callable[[Tensor], Tensor]
Pairs = tuple[Tensor, Tensor]  # expected and achieved Dice of images


@dataclass(frozen=True, eq=False)
class Findings(PerImage):
    """The measurements that scores and charts of the report are computed from.

    Attributes:
        names: the images, in order.
        counts: (N, C) pixels, by rule, kind of probabilities, and treatment of void pixels, "masked" or "counted".
        cutoffs: (N, C) the smallest raw probability that RankDice selected; NaN if it selected nothing.
        reliability: by kind of probabilities.
        scoring: the conventions of the run.
        temperature: fitted on the validation split; NaN if none was fitted.
    """

    names: list[str]
    counts: dict[tuple[str, str, str], Counts]
    cutoffs: Tensor
    reliability: dict[str, Reliability]
    scoring: Scoring
    temperature: float

    def counts_of(self, rule: str, probs: str = "raw", void: str = "") -> Counts:
        """Return the counts of a rule; by default void pixels are treated as in the run's protocol."""
        return self.counts[rule, probs, void or self.scoring.void]

    def dice(self, rule: str, probs: str = "raw", void: str = "") -> Tensor:
        """Return the mean Dice over the scored classes of each image, (N,) float64, NaN if undefined."""
        return mean_over_classes(self.counts_of(rule, probs, void).dice(), self.scoring.scored)

    def mean(self, rule: str, probs: str = "raw", void: str = "") -> float:
        """Return the mean Dice over images, in percent."""
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
        fitters: pairs of a kind of probabilities and its fitter, one of them "raw". The next pair is taken after the
            fitted values of the last one were saved.
        names: the rules.
        data: the split that is measured.
        held_out: the split that the bound on the Dice is fitted on; None if there is none.

    Returns:
        The findings, the result of `assess`, the rules of raw probabilities, and lines about what was fitted on them.
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
    measured = record_split(raw, data, rules["rankdice"], to_probs, "confidence")
    fitted_on = None
    if held_out is not None:
        fitted_on = known_pairs(record_split(raw, held_out, rules["rankdice"], to_probs, "held-out images"))
    return findings, assess(measured, fitted_on), rules, lines


def record_split(fitter: Fitter, data: Any, rule: Predictor, to_probs: ToProbs, title: str) -> MaskRecord:
    """Return counts and confidences of the masks of a rule on a split; ``title`` names the progress bar."""
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
    """Count the pixels of each rule's masks on each kind of probabilities; on raw ones with both treatments of void.

    Args:
        compared: for each kind of probabilities, the conversion of logits and the rules. A rule's attribute
            ``to_probs`` replaces the conversion for it.
    """
    reliability = {kind: Reliability() for kind in compared}
    other = replace(scoring, void="counted" if scoring.void == "masked" else "masked", legacy_soft_dice_void=False)
    sweep = {f"at {at:.1f}": functools.partial(threshold, at=at) for at in THRESHOLDS}

    def measure_batch(batch: Any, targets: Tensor, logits: Tensor) -> Findings:
        truth, other_truth = scoring.encode(targets), other.encode(targets)
        counts: dict[tuple[str, str, str], Counts] = {}
        for kind, (to_probs, rules) in compared.items():
            probs = to_probs(logits)
            reliability[kind].update(*sample_pixels(probs, truth))
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
    """Return the mean Dice in percent over pairs of image and present class, in thirds by the object's size.

    Returns:
        (name of the third, number of pairs, rule -> mean); a third without pairs is left out.
    """
    scored = list(findings.scoring.scored)
    counts = findings.counts_of("rankdice")  # the truth is the same for all rules
    share = (counts.actual[:, scored].double() / counts.pixels[:, None].double()).flatten()
    present = (share > 0).nonzero()[:, 0]
    thirds = present[share[present].argsort(stable=True)].tensor_split(3)
    scores = {rule: findings.counts_of(rule).dice()[:, scored].flatten() for rule in compared}
    rows = []
    for name, pairs in zip(("small", "medium", "large"), thirds, strict=True):
        if len(pairs):
            low, high = 100 * float(share[pairs[0]]), 100 * float(share[pairs[-1]])
            means = {rule: 100 * float(dice[pairs].mean()) for rule, dice in scores.items()}
            rows.append((f"{name} objects ({low:.3g} to {high:.3g} % of the image)", len(pairs), means))
    return rows


def false_alarms(findings: Findings, rule: str) -> tuple[int, int]:
    """Return the number of pairs of image and absent class with a predicted mask, and the number of all such pairs."""
    scored = list(findings.scoring.scored)
    counts = findings.counts_of(rule)
    absent = counts.actual[:, scored] == 0
    return int((absent & (counts.predicted[:, scored] > 0)).sum()), int(absent.sum())


def known_pairs(record: MaskRecord) -> Pairs:
    """Return expected and achieved Dice of the images with a score, (n,) each."""
    dice = record.dice()
    known = ~dice.isnan()
    return record.signals()[EXPECTED][known], dice[known]


def assess(measured: MaskRecord, fitted_on: Pairs | None, alpha: float = 0.1, resplits: int = 200) -> dict[str, Any]:
    """Return AURC, risk-coverage curves and the conformal bound of the measured masks.

    Args:
        measured: the masks of the measured images.
        fitted_on: expected and achieved Dice of other images, which the margin of the bound is fitted on. If None, the
            margin is fitted on the measured images, and the bound of one random half is checked on the other.
        alpha: share of images that may be below the bound.
        resplits: number of random splits of all images that check the coverage.

    Returns:
        The numbers of confidence.json. With too few images for ``alpha``, "no_bound" is the reason why there is no
        bound.
    """
    expected, dice = known_pairs(measured)
    if not len(dice):
        return {"alpha": alpha, "images": 0, "no_bound": "no image has a score."}
    known, risk = ~measured.dice().isnan(), 1 - dice
    signals = {name: values[known] for name, values in measured.signals().items()}
    found = {
        "alpha": alpha,
        "images": len(dice),
        "expected": float(expected.mean()),
        "achieved": float(dice.mean()),
        "correlation": float(torch.stack([expected, dice]).corrcoef()[0, 1]) if len(dice) > 1 else math.nan,
        "aurc": selective.compare_aurc(signals, risk, EXPECTED),
        "aurc_without_order": selective.aurc(torch.zeros(len(risk)), risk),
        "curves": {name: selective.risk_coverage(values, risk)[1].tolist() for name, values in signals.items()},
        "points": torch.stack((expected, dice), 1).tolist(),
    }
    try:
        return {**found, **_measure_bound(expected, dice, fitted_on, alpha, resplits)}
    except UserError as error:
        return {**found, "no_bound": str(error)}


def _measure_bound(
    expected: Tensor, dice: Tensor, fitted_on: Pairs | None, alpha: float, resplits: int
) -> dict[str, Any]:
    """Return the margin of the bound and how often it holds; raise UserError if there are too few images."""
    if fitted_on is None:
        num_fit, all_pairs = len(dice) // 2, (expected, dice)
    else:
        num_fit = len(fitted_on[1])
        all_pairs = torch.cat([fitted_on[0], expected]), torch.cat([fitted_on[1], dice])
    margin = conformal_margin(*(fitted_on or all_pairs), alpha)
    coverages = selective.resplit_coverages(*all_pairs, num_fit, alpha, splits=resplits)
    bound = expected - margin
    return {
        "margin": margin,
        "margin_images": len(fitted_on[1]) if fitted_on else None,
        "coverage": float((dice >= bound).double().mean()),
        "mean_bound": float(bound.clamp(min=0).mean()),
        "resplits": {
            "number": resplits,
            "mean": float(coverages.mean()),
            "from": float(coverages.quantile(0.05)),
            "to": float(coverages.quantile(0.95)),
        },
    }
