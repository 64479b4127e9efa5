"""Dice against a fixed threshold, as `report.py` measured it on the probabilities that a rule was scored on."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from scripts.paired.scores import RuleScores


@dataclass(frozen=True)
class Sweep:
    """Mean Dice in percent at each threshold and of two rules, and the cut-offs that RankDice chose."""

    curve: list[tuple[float, float]]
    levels: dict[str, float]
    cutoffs: list[float]


def sweep_of(baseline: RuleScores, rule: RuleScores) -> tuple[Sweep | None, str]:
    """The sweep that belongs to two scored rules; or None and the reason, with the command that helps."""
    folder = next((p for p in rule.path.parents if p.name == "results"), rule.path.parent).parent
    path, record = folder / "report" / "report.json", rule.record
    if rule.metric != "dice" or record.get("temperature", 1) != 1 or record.get("correct_focal"):
        return None, "report.py measures it in Dice, on probabilities as they are"
    remedy = f"python scripts/report.py {folder / record['checkpoint'].get('file', '')}"
    if record.get("protocol") == "paper":
        remedy += " protocol=paper"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        of = report["of"]
        curve = [(float(name.split()[1]), 100 * dice) for name, dice in report["threshold"].items()]
        cutoffs = report["cutoffs"]
    except FileNotFoundError:
        return None, f"{path} does not exist; run, where the checkpoint is: {remedy}"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None, f"{path} cannot be read, or is older than this program; run: {remedy}"
    same = {
        "checkpoint": record["checkpoint"].get("sha256"),
        "protocol": record.get("protocol"),
        "split": record.get("dataset", {}).get("split"),
    }
    unlike = [key for key, value in same.items() if of.get(key) != value]
    if unlike:
        return None, f"{path} is of another {', '.join(unlike)}; run: {remedy}"
    levels = {one.rule: 100 * _mean(one) for one in (baseline, rule)}
    return Sweep(curve, levels, cutoffs), ""


def _mean(scores: RuleScores) -> float:
    values = scores.by_image().values()
    return math.fsum(values) / len(values)
