"""Everything the report says, measured in one pass over the split: the same probabilities, counted many ways.

Letters of shapes: N images, C classes, H × W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rankseg import Predictor, rules
from rankseg.calibration import Reliability, focal_correction
from trainers.distributed import World
from trainers.evaluator import Scoring, at_size, observe
from trainers.losses import Link, link_probs
from trainers.metrics import Counts, count, mean_over_classes

THRESHOLDS = tuple(k / 10 for k in range(1, 10))
CUTOFF_BINS = 30


class Key(NamedTuple):
    """What was counted: a rule, on which probabilities, with void left out or counted."""

    rule: str
    probs: str = "raw"
    void: str = "masked"


@dataclass(frozen=True)
class Findings:
    """The sufficient statistics of the report.

    Attributes:
        names: the images, in order.
        counts: (N, C) pixels, by what was counted.
        cutoffs: (N, C) the smallest probability that RankDice selected; NaN where it selected nothing.
        reliability: by kind of probabilities.
        scoring: the run's conventions; ``main`` is their void.
        temperature: fitted on the validation split.
    """

    names: list[str]
    counts: dict[Key, Counts]
    cutoffs: Tensor
    reliability: dict[str, Reliability]
    scoring: Scoring
    temperature: float

    def key(self, rule: str, probs: str = "raw") -> Key:
        """The key of what the run's own protocol counts."""
        return Key(rule, probs, self.scoring.void)

    def dice(self, key: Key) -> Tensor:
        """The mean Dice over scored classes of each image, (N,) float64, NaN where undefined."""
        return mean_over_classes(self.counts[key].dice(), self.scoring.scored)

    def mean(self, key: Key) -> float:
        """The mean Dice, in percent."""
        return 100 * float(self.dice(key).nanmean())


def variants(link: Link, temperature: float, loss: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """The ways to make probabilities of logits that the report compares."""
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "raw": lambda logits: link_probs(logits, link),
        "calibrated": lambda logits: link_probs(logits / temperature, link),
    }
    if loss == "focal":
        ways["focal-corrected"] = lambda logits: focal_correction(link_probs(logits, link))
    return ways


def thresholds() -> dict[str, Predictor]:
    """The threshold rules that RankDice is compared with, ``at 0.1`` … ``at 0.9``."""
    return {f"at {at:.1f}": functools.partial(rules.threshold, at=at) for at in THRESHOLDS}


@torch.inference_mode()
def measure(
    model: nn.Module,
    batches: Iterable[Any],
    compared: Mapping[str, Predictor],
    ways: Mapping[str, Callable[[Tensor], Tensor]],
    scoring: Scoring,
    where: World,
    temperature: float,
) -> Findings:
    """Count each rule on each kind of probabilities, and the raw ones with void left out and counted.

    Raises:
        ValueError: there is no image.
    """
    names: list[str] = []
    tallies: dict[Key, list[Counts]] = {}
    cutoffs: list[Tensor] = []
    reliabilities = {name: Reliability() for name in ways}
    other = replace(
        scoring, void="counted" if scoring.void == "masked" else "masked", legacy_soft_dice_void=False
    )
    sweep = thresholds()

    for batch in tqdm(batches, desc="measuring", disable=None, leave=False):
        targets = batch.targets.to(where.device)
        if scoring.paper and (targets == scoring.ignore_index).all():
            continue
        logits = at_size(model(batch.images.to(where.device)).logits, targets.shape[-2:])
        truth, second = scoring.encode(targets), other.encode(targets)
        names += batch.names

        def add(rule: str, kind: str, masks: Tensor, truth: Any, void: str) -> None:
            tallies.setdefault(Key(rule, kind, void), []).append(count(masks, truth).to("cpu"))

        for kind, way in ways.items():
            probs = way(logits)
            observe(reliabilities[kind], probs, truth)
            for rule, predictor in ({**compared, **sweep} if kind == "raw" else compared).items():
                masks = predictor(probs)
                add(rule, kind, masks, truth, scoring.void)
                if kind == "raw" and rule in compared:
                    add(rule, kind, masks, second, other.void)
                if kind == "raw" and rule == "rankdice":
                    cutoffs.append(lowest(probs, masks).cpu())
    if not names:
        raise ValueError("there is no image to report on; check the split and dataset.root")
    return Findings(
        names,
        {key: Counts.cat(parts) for key, parts in tallies.items()},
        torch.cat(cutoffs),
        reliabilities,
        scoring,
        temperature,
    )


def lowest(probs: Tensor, masks: Tensor) -> Tensor:
    """The smallest selected probability of each image and class, (N, C), NaN where nothing is selected."""
    least = probs.masked_fill(~masks, torch.inf).flatten(2).amin(2)
    return least.masked_fill(least.isinf(), torch.nan)


def chosen_cutoffs(findings: Findings) -> Tensor:
    """The cut-offs of RankDice in the scored classes of all images, where it selected anything, (masks,)."""
    found = findings.cutoffs[:, list(findings.scoring.scored)]
    return found[~found.isnan()]


def by_size(findings: Findings, compared: Iterable[str]) -> list[tuple[str, int, dict[str, float]]]:
    """Mean Dice in percent over pairs of image and class, in thirds by the object's share of the image.

    Returns:
        (name of the third, number of pairs, rule -> mean).
    """
    scored = list(findings.scoring.scored)
    first = findings.counts[findings.key("rankdice")]
    share = (first.actual[:, scored].double() / first.pixels[:, None].double()).flatten()
    present = (share > 0).nonzero()[:, 0]
    thirds = present[share[present].argsort(stable=True)].tensor_split(3)
    scores = {rule: findings.counts[findings.key(rule)].dice()[:, scored].flatten() for rule in compared}
    rows = []
    for name, pairs in zip(("small", "medium", "large"), thirds, strict=True):
        if len(pairs):
            low, high = 100 * float(share[pairs[0]]), 100 * float(share[pairs[-1]])
            means = {rule: 100 * float(dice[pairs].mean()) for rule, dice in scores.items()}
            rows.append((f"{name} objects ({low:.3g} to {high:.3g} % of the image)", len(pairs), means))
    return rows


def false_alarms(findings: Findings, rule: str) -> tuple[int, int]:
    """Pairs of image and class in which a rule predicts an absent class, and absent pairs in all."""
    scored = list(findings.scoring.scored)
    counts = findings.counts[findings.key(rule)]
    absent = counts.actual[:, scored] == 0
    return int((absent & (counts.predicted[:, scored] > 0)).sum()), int(absent.sum())
