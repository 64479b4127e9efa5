"""Several training runs of one cell: mean and range of what each found. Their images are never pooled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.paired.scores import RuleScores
from scripts.tables.results import group_seeds, result_of


def over_seeds(found: Sequence[dict[str, Any]], scores: Sequence[RuleScores]) -> list[dict[str, Any]]:
    """For each rule and cell that was compared in several runs: mean and range over the runs, also by class.

    Runs that differ in more than their seed have no mean; `refused` says in what they differ. `scores` are the
    rules of `found`, in its order.

    Raises:
        ValueError: a result does not say what it was made of.
    """
    of_path = {one.path.resolve(): comparison for one, comparison in zip(scores, found, strict=True)}
    if len(of_path) < len(found):
        raise ValueError("a run is given twice; give each once")
    results = []
    for path, one in zip(of_path, scores, strict=True):
        try:
            results.append(replace(result_of(path, Path(path.anchor), one.record), collection=""))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: no key {error}; score it again with test.py") from None
    rows = []
    for group in group_seeds(results).values():
        if len(group.results) > 1:
            runs = [of_path[result.path] for result in group.results]
            row = {key: runs[0][key] for key in ("rule", "baseline", "model", "loss", "variant")}
            row["seeds"] = [run["seed"] for run in runs]
            rows.append(row | ({"refused": group.refusal} if group.refusal else _summary(runs)))
    return rows


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and range over runs of the mean difference, and of that of each class where every run has it."""
    names = [row["name"] for row in runs[0]["classes"]]
    means = {name: [_class_mean(run, name) for run in runs] for name in names}
    classes = [{"name": n, **_spread(m)} for n, m in means.items() if not any(map(math.isnan, m))]
    return {**_spread([run["mean"] for run in runs]), "classes": classes}


def _class_mean(run: dict[str, Any], name: str) -> float:
    return next((row["mean"] for row in run["classes"] if row["name"] == name), math.nan)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": math.fsum(values) / len(values), "range": [min(values), max(values)]}
