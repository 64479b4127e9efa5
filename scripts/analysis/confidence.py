"""What the confidence of masks is worth: the order that it gives to images, and a bound on their Dice.

Used by `scripts/confidence.py` and by the report. Shapes: n images with a score.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from trainers.selective import MaskRecord, aurc, compare_aurc, conformal_margin, resplit_coverages, risk_coverage

EXPECTED = "expected Dice"  # the confidence of this project; the others are for comparison


def known_pairs(record: MaskRecord) -> tuple[Tensor, Tensor]:
    """Return expected and achieved Dice of the images with a score, (n,) each."""
    dice = record.dice()
    known = ~dice.isnan()
    return record.signals()[EXPECTED][known], dice[known]


def assess(
    on: MaskRecord, fitted: tuple[Tensor, Tensor] | None, alpha: float = 0.1, resplits: int = 200
) -> dict[str, Any]:
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
        "correlation": _correlation(expected, dice),
        "aurc": {name: one._asdict() for name, one in compare_aurc(signals, risk, EXPECTED).items()},
        "aurc_without_order": aurc(torch.zeros(len(risk)), risk),
        "curves": {name: risk_coverage(values, risk)[1].tolist() for name, values in signals.items()},
        "points": torch.stack((expected, dice), 1).tolist(),
    }
    try:
        return found | _check_bound(expected, dice, fitted, alpha, resplits)
    except UserError as error:
        return {**found, "no_bound": str(error)}


def _check_bound(
    expected: Tensor, dice: Tensor, fitted: tuple[Tensor, Tensor] | None, alpha: float, resplits: int
) -> dict[str, Any]:
    """Return the margin of the bound and how often it holds."""
    if fitted is None:
        size, everything = len(dice) // 2, (expected, dice)
    else:
        size = len(fitted[1])
        everything = torch.cat([fitted[0], expected]), torch.cat([fitted[1], dice])
    margin = conformal_margin(*(fitted or everything), alpha)
    coverages = resplit_coverages(*everything, size, alpha, splits=resplits)
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


def _correlation(one: Tensor, other: Tensor) -> float:
    if len(one) < 2 or float(one.std()) == 0 or float(other.std()) == 0:
        return math.nan
    return float(torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1])
