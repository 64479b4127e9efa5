"""The interaction of rule and loss: every number against sums by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from scripts.interaction import table
from trainers.metrics import Counts
from trainers.results import EvalResult

# Dice of three images in percent: loss -> seed -> rule.
DICE = {
    "ce": [{"max": (50, 60, 70), "rankdice": (60, 60, 90)}, {"max": (40, 50, 60), "rankdice": (40, 60, 80)}],
    "ce_dice": [{"max": (70, 80, 90), "rankdice": (72, 80, 91)}, {"max": (60, 70, 80), "rankdice": (60, 73, 80)}],
}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    for loss, seeds in DICE.items():
        for seed, rules in enumerate(seeds):
            for inner in ("results", "results/calibrated"):
                for rule, dice in rules.items():
                    hits = torch.tensor([[0, value] for value in dice])
                    whole = torch.full_like(hits, 100)
                    counts = Counts(hits, whole, whole, torch.full((3,), 1000))
                    scores = {"mean_dice": sum(dice) / 300, "log_loss": 0.3 + seed / 10, "brier": 0.2, "ece": 0.05}
                    result = EvalResult(rule, ["a", "b", "c"], counts, (1,), scores, 0.0)
                    result.save(tmp_path / loss / f"seed{seed}" / inner, {})
    return [tmp_path / "ce", tmp_path / "ce_dice"]


def test_scores_gains_and_interaction(folders: list[Path]) -> None:
    lines = table(folders, ["max", "rankdice"], "max")
    assert next(line for line in lines if line.startswith("| ce, raw")) == (
        "| ce, raw (2 seeds) | 55.00 ± 5.00 | 65.00 ± 5.00 | 0.350 ± 0.050 | 0.200 ± 0.000 | 5.000 ± 0.000 |"
    )
    gain = next(line for line in lines if line.startswith("| rankdice, ce, raw"))
    assert "+10.00 [" in gain and gain.endswith("| +10.00 … +10.00 |")
    other = next(line for line in lines if line.startswith("| rankdice, ce_dice, raw"))
    assert "+1.00 [" in other
    both = next(line for line in lines if line.startswith("| rankdice, raw"))
    mean, low, high = (float(number) for number in re.findall(r"[+-]\d+\.\d+", both))
    # Of the images: (10 + 0)/2 - (2 + 0)/2 = 4, (0 + 10)/2 - (0 + 3)/2 = 3.5, (20 + 20)/2 - (1 + 0)/2 = 19.5.
    assert mean == 9.0 and 3.5 <= low < 9 < high <= 19.5


def test_bad_input(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seed0"):
        table([tmp_path / "nothing"], ["max"], "max")
    with pytest.raises(UserError, match=r"T_fit\.csv"):
        table(folders, ["max", "T_fit"], "max")
    path = folders[0] / "seed1" / "results" / "max.json"
    path.write_text(path.read_text().replace("log_loss", "loss"))
    with pytest.raises(UserError, match=r"ce: max\.json has no score log_loss"):
        table(folders, ["max"], "max")
