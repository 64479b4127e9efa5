"""Per-image scores of rules from the result files of `test.py`, and their comparison image by image.

A rule's CSV has a row for each image and scored class in which prediction or truth is not empty. The score of an
image is the mean over its rows. An image without rows has no score and is in no pair.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.files import read_json, read_text
from scripts.analysis.statistics import RESAMPLES, describe_differences, mean_interval
from scripts.tables.results import group_seeds, mean, mean_by_key, parse_result, read_counts, short_variant, variant_of
from trainers.text import read_csv

# Two rules saw the same probabilities if these keys of their result files agree.
_SAME = ("checkpoint", "dataset", "protocol", "temperature", "calibration", "correct_focal", "images")


@dataclass(frozen=True)
class RuleScores:
    """One rule on one checkpoint: ``scores[image, class]`` is a fraction, ``record`` the JSON file at ``path``."""

    path: Path
    rule: str
    metric: str
    scores: dict[tuple[str, int], float]
    record: dict[str, Any]

    def by_image(self) -> dict[str, float]:
        """Return the mean over the scored classes of each image."""
        return mean_by_key((image, value) for (image, _), value in self.scores.items())

    def by_class(self) -> dict[int, float]:
        """Return the mean over images of each class."""
        return dict(sorted(mean_by_key((c, value) for (_, c), value in self.scores.items()).items()))

    def of_class(self, c: int) -> dict[str, float]:
        """Return the score of each image in one class."""
        return {image: value for (image, k), value in self.scores.items() if k == c}


def result_folder(path: Path, protocol: str) -> Path:
    """Return the folder that holds <rule>.csv: the path itself, or the results of the run at the path.

    A run that was scored on `last.pth` alone has them in `of_last`.
    """
    inner = ("results/paper", "paper") if protocol == "paper" else ("results",)
    found = [path / name for name in inner]
    for folder in (*found, *(folder / "of_last" for folder in found), path):
        if any(folder.glob("*.csv")):
            return folder
    raise UserError(f"{path}: no per-image scores (<rule>.csv). Fix: python test.py -r {path}/best_model.pth")


def rules_in(folder: Path) -> list[str]:
    """Return the rules that were scored in a folder."""
    return sorted(path.stem for path in folder.glob("*.csv") if path.with_suffix(".json").is_file())


def read_rule(folder: Path, rule: str, metric: str = "dice") -> RuleScores:
    """Read <rule>.csv and <rule>.json, and check that they belong together."""
    table, sidecar = folder / f"{rule}.csv", folder / f"{rule}.json"
    for path in (table, sidecar):
        if not path.is_file():
            scored = ", ".join(rules_in(folder)) or "none"
            raise UserError(f"{path}: file not found. Rules scored in this folder: {scored}.")
    try:
        record = read_json(sidecar)
        stated = record["scores"]["mean_dice"]
        stated = None if stated is None else float(stated)
        counts = read_counts(table)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        detail = f"no column or key {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{table} and {sidecar.name} cannot be read: {detail}. Fix: score again.") from None
    scores = {}
    for key, (inter, predicted, actual) in counts.items():
        total = predicted + actual
        scores[key] = 2 * inter / total if metric == "dice" else inter / (total - inter)
    found = RuleScores(sidecar, rule, metric, scores, record)
    average = mean(found.by_image().values())
    if metric == "dice" and stated is not None and not abs(average - stated) < 1e-3:
        raise UserError(
            f"{table}: its mean Dice is {average:.4f}, but {sidecar.name} has {stated:.4f}. Fix: score again."
        )
    return found


def pair(one: Mapping[Any, float], other: Mapping[Any, float]) -> tuple[dict[Any, float], int]:
    """Return the differences other − one of common keys, in the order of ``one``, and the number of other keys."""
    return {key: other[key] - one[key] for key in one if key in other}, len(one.keys() ^ other.keys())


def read_groups(text: str, images: Sequence[str]) -> dict[str, str]:
    """Return the group of each image, such as its patient.

    Args:
        text: a CSV file with the columns ``image`` and ``group``; or a regular expression that is searched in the
            image's name, whose first parentheses (or the whole match) are the group.
    """
    path = Path(text)
    if path.is_file():
        rows = list(read_csv(read_text(path, errors="surrogateescape")))
        if rows and not {"image", "group"} <= rows[0].keys():
            raise UserError(f"--group {path}: expected the columns image and group, found {', '.join(rows[0])}.")
        groups = {row["image"]: row["group"] for row in rows}
    else:
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise UserError(
                f"--group {text}: neither a file nor a regular expression ({error}). Fix: give the path of a CSV "
                "file with the columns image and group, or a pattern such as '(case[0-9]+)_'."
            ) from None
        matches = {image: pattern.search(image) for image in images}
        groups = {image: m[1 if pattern.groups else 0] or "" for image, m in matches.items() if m}
    missing = [image for image in images if image not in groups]
    if missing:
        raise UserError(f"--group {text}: {len(missing)} of {len(images)} images have no group: {missing[0]}.")
    return groups


def compare(
    baseline: RuleScores,
    rule: RuleScores,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    group: str | None = None,
) -> dict[str, Any]:
    """Return all statistics of rule − baseline over images, and the mean differences by class; in points.

    ``group`` is explained in `read_groups`; None if images are independent.
    """
    unlike = [key for key in _SAME if baseline.record.get(key) != rule.record.get(key)]
    if unlike:
        raise UserError(
            f"{baseline.rule} and {rule.rule} were not scored on the same probabilities: different "
            f"{', '.join(unlike)}. Fix: score both with one call of test.py."
        )
    pairs, unpaired = pair(baseline.by_image(), rule.by_image())
    group_of = read_groups(group, list(pairs)) if group else None

    def groups(images: Sequence[str]) -> list[Hashable] | None:
        return [group_of[image] for image in images] if group_of else None

    values = [100 * value for value in pairs.values()]
    listed = rule.record.get("classes")
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    one, other, classes = baseline.by_class(), rule.by_class(), []
    for c in sorted(one.keys() | other.keys()):
        found, missing = pair(baseline.of_class(c), rule.of_class(c))
        points = [100 * value for value in found.values()]
        classes.append(
            {
                "class": c,
                "name": names[c] if c < len(names) else str(c),
                "baseline": 100 * one.get(c, math.nan),
                "rule": 100 * other.get(c, math.nan),
                "images": len(points),
                "unpaired": missing,
                "mean": mean(points),
                "interval": list(mean_interval(points, confidence, resamples, seed, groups(list(found))))
                if points
                else [math.nan, math.nan],
            }
        )
    return {
        "baseline": baseline.rule,
        "rule": rule.rule,
        "metric": rule.metric,
        "model": rule.record.get("model"),
        "loss": rule.record.get("loss"),
        "variant": short_variant(variant_of(rule.record)),
        "seed": rule.record.get("seed"),
        "unpaired": unpaired,
        **describe_differences(values, confidence, resamples, seed, groups(list(pairs))),
        "classes": classes,
    }


def over_seeds(found: Sequence[dict[str, Any]], scores: Sequence[RuleScores]) -> list[dict[str, Any]]:
    """Return mean and range over the training runs of each compared rule; images of several runs are not pooled.

    Runs that differ in more than their seed have no mean; ``rejected`` holds the difference. ``scores`` are the
    rules of ``found``, in the same order.
    """
    of_path = {one.path.resolve(): comparison for one, comparison in zip(scores, found, strict=True)}
    if len(of_path) < len(found):
        raise UserError("a run is given twice. Fix: give each run once.")
    results = []
    for path, one in zip(of_path, scores, strict=True):
        try:
            results.append(replace(parse_result(path, Path(path.anchor), one.record), collection=""))
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: no key {error}. Fix: score again with test.py.") from None
    rows = []
    for group in group_seeds(results).values():
        if len(group.results) > 1:
            runs = [of_path[result.path] for result in group.results]
            row = {key: runs[0][key] for key in ("rule", "baseline", "model", "loss", "variant")}
            row["seeds"] = [run["seed"] for run in runs]
            rows.append(row | ({"rejected": group.reason} if group.reason else _summary(runs)))
    return rows


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and range over runs of the mean difference, and of each class that has one in every run."""
    by_run = [{(row["class"], row["name"]): row["mean"] for row in run["classes"]} for run in runs]
    classes = []
    for key in by_run[0]:
        means, name = [found.get(key, math.nan) for found in by_run], key[1]
        if not any(map(math.isnan, means)):
            classes.append({"name": name, **_spread(means)})
    return {**_spread([run["mean"] for run in runs]), "classes": classes}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": mean(values), "range": [min(values), max(values)]}
