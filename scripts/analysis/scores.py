"""Read the scores in the result files of `test.py`, and compute paired statistics of two rules.

A rule's CSV has a row for each image and scored class in which prediction or truth is not empty. The score of an
image is the mean over its rows. An image without rows has no score and is in no pair.

Differences are rule − baseline, image by image, in points (percent). The interval is the BCa bootstrap of
`scipy.stats.bootstrap` (Efron, JASA 1987). Of equal values both ends are the mean; if BCa is undefined, the ends are
the extreme resampled means. With groups, such as the patients that images belong to, whole groups are resampled,
because images of one patient are not independent.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.files import read_json, read_text, shell_word
from trainers.metrics import PAPER_EPSILON
from trainers.text import read_csv

RESAMPLES = 10_000
HARM = (1, 5, 10)  # the shares of images that lose more than these points are reported
_EXACT_UP_TO = 50  # the signed-rank test is exact for at most so many differences without ties and zeros
_BATCH = 1 << 22  # resampled values held in memory at a time
_TIE = 1e-9  # points; smaller differences are rounding errors

Interval = tuple[float, float]
Array = NDArray[np.float64]
# Two rules saw the same probabilities if these keys of their result files agree.
_PROBABILITY_KEYS = (
    "checkpoint", "dataset", "protocol", "temperature", "calibration", "correct_focal", "focal_gamma", "images",
)  # fmt: skip


def read_counts(table: Path) -> dict[tuple[str, int], tuple[int, int, int]]:
    """Return intersection, predicted and actual pixels of each image and class in a rule's CSV file.

    Raises:
        UserError: counts are impossible, or a row occurs twice.
        OSError, ValueError, KeyError, csv.Error: the file cannot be read.
    """
    counts: dict[tuple[str, int], tuple[int, int, int]] = {}
    for row in read_csv(read_text(table, errors="surrogateescape")):
        key = (row["image"], int(row["class"]))
        inter, predicted, actual = (int(row[name]) for name in ("intersection", "predicted", "actual"))
        if not 0 <= inter <= min(predicted, actual) or not predicted + actual:
            raise UserError(
                f"{table}: image {key[0]}, class {key[1]}: the counts intersection={inter}, predicted={predicted}, "
                f"actual={actual} are impossible. Fix: score again."
            )
        if key in counts:
            raise UserError(f"{table}: image {key[0]}, class {key[1]} occurs twice. Fix: score again.")
        counts[key] = inter, predicted, actual
    return counts


def mean_by_key(items: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    """Return the mean of the values of each key, in the order of the keys."""
    found: dict[Any, list[float]] = {}
    for key, value in items:
        found.setdefault(key, []).append(value)
    return {key: mean(values) for key, values in found.items()}


def mean(values: Iterable[float]) -> float:
    """Return the mean, NaN without values."""
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def fractions(
    counts: Mapping[Any, tuple[int, int, int]], metric: str, epsilon: float = 0.0, legacy_bce_iou: bool = False
) -> dict[Any, float]:
    """Return Dice ("dice") or IoU ("iou") of intersection, predicted and actual pixels."""
    if metric == "dice":
        return {key: 2 * inter / (predicted + actual + epsilon) for key, (inter, predicted, actual) in counts.items()}
    overlap = 0 if legacy_bce_iou else 1  # an error in the published rows: |A| + |B| instead of the union
    return {key: inter / (p + a - overlap * inter + epsilon) for key, (inter, p, a) in counts.items()}


def scores_from_counts(table: Path, record: dict[str, Any]) -> dict[str, float]:
    """Compute mDice and mIoU from the counts of images and classes, by the conventions of the record's protocol."""
    paper, counts = record["protocol"] == "paper", read_counts(table)
    unknown = {image for image, _ in counts} - set(record["images"])
    if unknown:
        raise UserError(f"{table}: image {min(unknown)} is not in the record. Fix: score again.")
    halved = bool((record.get("options") or {}).get("protocol", {}).get("legacy_bce_iou"))
    means = {}
    for metric in ("dice", "iou"):
        found = fractions(counts, metric, PAPER_EPSILON if paper else 0.0, halved)
        value = mean(mean_by_key((image, one) for (image, _), one in found.items()).values())
        means[f"mean_{metric}"] = round(value, 3) if paper else value
    return means


def variant_of(record: dict[str, Any], folders: tuple[str, ...] = ()) -> str:
    """Return how a record differs from the default, as "WORD: REASON; ...", or "".

    The default is best_model.pth, without calibration, gate 0.5, threshold 0.5, and the options in the files of rules
    and protocol.
    """
    parts, temperature = [], record.get("temperature")
    others = [name.removeprefix("of_") for name in folders if name.startswith("of_")]
    parts += [f"{name}: scored on {name}.pth instead of best_model.pth" for name in others]
    if record.get("correct_focal"):
        parts.append("corrected: the bias of the focal loss undone in closed form")
    if "temperature_fitted_on" in record:
        same = record["temperature_fitted_on"] == record["dataset"]["fingerprint"]
        images = ", which are the images scored" if same else ""
        parts.append(f"calibrated: a temperature fitted on the validation images{images}")
    elif temperature not in (None, 1):
        parts.append(f"temperature {temperature:g}: logits divided by it")
    if record.get("calibration"):
        parts.append("calibrated per class: a temperature and a bias per class fitted on the validation images")
    if record.get("gate") not in (None, 0.5):
        effect = {"none": "keep the masks of unlikely classes", "fit": "empty masks of low expected Dice"}
        parts.append(f"gate {record['gate']}: ranking rules {effect.get(record['gate'], 'are gated')}")
    if record.get("threshold") not in (None, 0.5):
        parts.append(f"T at {record['threshold']:g}: another threshold of T")
    for name, options in (record.get("options") or {}).items():
        values = " ".join(f"{key}={value}" for key, value in options.items())
        parts.append(f"{name} {values}: other options of {name} than those of its file")
    return "; ".join(parts)


def short_variant(variant: str) -> str:
    """Return the words of a variant without their reasons: "corrected, calibrated"."""
    return ", ".join(part.partition(":")[0] for part in variant.split("; "))


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
        return mean_by_key((c, value) for (_, c), value in self.scores.items())

    def of_class(self, c: int) -> dict[str, float]:
        """Return the score of each image in one class."""
        return {image: value for (image, k), value in self.scores.items() if k == c}


def result_folder(path: Path, protocol: str) -> Path:
    """Return the folder that holds <rule>.csv: the results of the run at the path, or else the path itself.

    If only `last.pth` of a run was scored, its results are in `of_last`.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist. Fix: give the folder of a run, or of its results.")
    inner = ("results/paper", "paper") if protocol == "paper" else ("results",)
    found = [path / name for name in inner]
    for folder in (*found, *(folder / "of_last" for folder in found), path):
        if rules_in(folder):
            return folder
    files = [folder / name for folder in (path, path.parent) for name in ("best_model.pth", "last.pth")]
    checkpoint = next(filter(Path.is_file, files), None)
    below = next(path.glob("**/results/*.csv"), None)
    fix = "give the folder of a scored run, or of its results"
    if checkpoint:
        fix = f"python test.py -r {shell_word(str(checkpoint))}" + " protocol=paper" * (protocol == "paper")
    elif below:
        fix = f"give one run, such as {below.parents[1]}"
    raise UserError(f"{path}: no per-image scores (<rule>.csv with <rule>.json). Fix: {fix}.")


def rules_in(folder: Path) -> list[str]:
    """Return the rules that were scored in a folder."""
    return sorted(path.stem for path in folder.glob("*.csv") if path.with_suffix(".json").is_file())


def read_rule(folder: Path, rule: str, metric: str = "dice") -> RuleScores:
    """Read <rule>.csv and <rule>.json; for the Dice, check that both have the same mean."""
    table, sidecar = folder / f"{rule}.csv", folder / f"{rule}.json"
    for path in (table, sidecar):
        if not path.is_file():
            scored = ", ".join(rules_in(folder)) or "none"
            raise UserError(f"{path}: file not found. Fix: choose a scored rule: {scored}.")
    try:
        record = read_json(sidecar)
        stated = record["scores"]["mean_dice"]
        stated = None if stated is None else float(stated)
        counts = read_counts(table)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        detail = f"no column or key {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{table} and {sidecar.name} cannot be read: {detail}. Fix: score again.") from None
    found = RuleScores(sidecar, rule, metric, fractions(counts, metric), record)
    average = mean(found.by_image().values())
    if metric == "dice" and stated is not None and not abs(average - stated) < 1e-3:
        raise UserError(f"{table}: mean Dice is {average:.4f}, but {sidecar.name} has {stated:.4f}. Fix: score again.")
    return found


def pair(baseline: Mapping[Any, float], rule: Mapping[Any, float]) -> tuple[dict[Any, float], int]:
    """Return rule − baseline for the common keys, in the baseline's order, and the number of keys that only one has."""
    return {key: rule[key] - baseline[key] for key in baseline if key in rule}, len(baseline.keys() ^ rule.keys())


def read_groups(text: str, images: Sequence[str]) -> dict[str, str]:
    """Return the group of each image, such as its patient.

    Args:
        text: the path of a CSV file with the columns ``image`` and ``group``; or a regular expression that is searched
            for in the name of an image. The group is the text in its first parentheses, or else the whole match.
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
        part = 1 if pattern.groups else 0
        groups = {image: m[part] for image, m in matches.items() if m and m[part]}
    missing = [image for image in images if image not in groups]
    if missing:
        raise UserError(
            f"--group {text}: {len(missing)} of {len(images)} images have no group. Fix: give {missing[0]} one."
        )
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

    ``group`` is the argument ``text`` of `read_groups`; None if images are independent.
    """
    different = [key for key in _PROBABILITY_KEYS if baseline.record.get(key) != rule.record.get(key)]
    if different:
        raise UserError(
            f"{baseline.rule} and {rule.rule} were not scored on the same probabilities: different "
            f"{', '.join(different)}. Fix: score both with one call of test.py."
        )
    pairs, unpaired = pair(baseline.by_image(), rule.by_image())
    group_of = read_groups(group, list(pairs)) if group else None

    def groups(images: Iterable[str]) -> list[Hashable] | None:
        return [group_of[image] for image in images] if group_of else None

    values = [100 * value for value in pairs.values()]
    listed = rule.record.get("classes")
    names = dict(enumerate(listed)) if isinstance(listed, list) else {}
    one, other, classes = baseline.by_class(), rule.by_class(), []
    for c in sorted(one.keys() | other.keys()):
        found, missing = pair(baseline.of_class(c), rule.of_class(c))
        points = [100 * value for value in found.values()]
        classes.append(
            {
                "class": c,
                "name": str(names.get(c, c)),
                "baseline": 100 * one.get(c, math.nan),
                "rule": 100 * other.get(c, math.nan),
                "images": len(points),
                "unpaired": missing,
                "mean": mean(points),
                "interval": list(mean_interval(points, confidence, resamples, seed, groups(found))),
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
        **describe_differences(values, confidence, resamples, seed, groups(pairs)),
        "classes": classes,
    }


def mean_interval(
    values: Sequence[float],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """Return the BCa bootstrap interval of the mean, NaN without values. The same seed gives the same interval.

    Args:
        values: one number per image.
        confidence: the level, in (0, 1).
        groups: the group of each image; None if images are independent.
    """
    from scipy import stats  # slow to import

    if not 0 < confidence < 1:
        raise UserError(f"confidence={confidence} is invalid: expected a number in (0, 1), such as 0.95.")
    if not len(values):
        return math.nan, math.nan
    sums, sizes = _group_sums(np.asarray(values, dtype=np.float64), groups)
    means = sums / sizes
    if len(sums) == 1 or means.min() == means.max():
        return float(means[0]), float(means[0])
    found = stats.bootstrap(
        (sums,) if groups is None else (sums, sizes),
        np.mean if groups is None else _ratio,
        paired=True,
        n_resamples=resamples,
        batch=max(1, _BATCH // len(sums)),
        confidence_level=confidence,
        method="percentile" if resamples == 1 else "BCa",
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    if math.isnan(low) or math.isnan(high):  # every resampled mean is on one side of the mean
        low, high = found.bootstrap_distribution.min(), found.bootstrap_distribution.max()
    return float(low), float(high)


def _group_sums(values: Array, groups: Sequence[Hashable] | None) -> tuple[Array, Array]:
    """Return the sum of values and the number of images of each group."""
    if groups is None:
        return values, np.ones_like(values)
    place = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    index = [place[name] for name in groups]
    sizes = np.bincount(index, minlength=len(place)).astype(np.float64)
    return np.bincount(index, values, len(place)).astype(np.float64), sizes


def _ratio(sums: Array, sizes: Array, axis: int = -1) -> Any:
    return sums.sum(axis) / sizes.sum(axis)


def signed_rank(values: Sequence[float]) -> tuple[float, str, float]:
    """Return Wilcoxon's two-sided p, the method ("exact", "normal" or "none"), and the rank-biserial correlation.

    Zeros are dropped. The correlation is the sum of the ranks of positive differences, minus that of negative ones,
    divided by the sum of all ranks; it is in [−1, 1] (Kerby, 2014). The p-value is exact for at most 50 differences
    without ties and zeros, otherwise from the normal approximation.
    """
    from scipy import stats

    nonzero = np.array([value for value in values if value], dtype=np.float64)
    if not len(nonzero):
        return math.nan, "none", 0.0
    untied = len(np.unique(np.abs(nonzero))) == len(nonzero) == len(values)
    exact = len(nonzero) <= _EXACT_UP_TO and untied
    method = "exact" if exact else "asymptotic"
    p = stats.wilcoxon(nonzero, zero_method="wilcox", correction=False, method=method).pvalue
    ranks = stats.rankdata(np.abs(nonzero))
    effect = float((ranks * np.sign(nonzero)).sum() / ranks.sum())
    return float(p), "exact" if exact else "normal", effect


def describe_differences(
    values: Sequence[float],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Return all statistics of paired differences in points, for tables, JSON files and charts.

    ``better``, ``worse``, ``tied`` and the values of ``harm`` (images that lose more than "1", "5" or "10"
    points) are shares of the images; ``worst_loss`` and ``best_gain`` are in points and not negative.
    """
    if not values:
        raise UserError("no image has a score under both rules, so there is no interval. Fix: compare other rules.")
    count, deviation = len(values), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    interval = mean_interval(values, confidence, resamples, seed, groups)
    p, method, effect = signed_rank([round(value, 9) for value in values])
    return {
        "images": count,
        "groups": None if groups is None else len(set(groups)),
        "mean": mean(values),
        "median": median(values),
        "interval": list(interval),
        "confidence": confidence,
        "better": sum(value > _TIE for value in values) / count,
        "worse": sum(value < -_TIE for value in values) / count,
        "tied": sum(abs(value) <= _TIE for value in values) / count,
        "harm": {str(points): sum(value < -points for value in values) / count for points in HARM},
        "worst_loss": max(0.0, -min(values)),
        "best_gain": max(0.0, max(values)),
        "standardized_mean": float(np.mean(values)) / deviation if deviation > 0 else math.nan,  # Cohen's d of pairs
        "rank_biserial": effect,
        "wilcoxon_p": p,
        "wilcoxon_method": method,
        "differences": list(values),
    }
