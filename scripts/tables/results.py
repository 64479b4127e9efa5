"""Our results: read from the files of `test.py`, grouped over seeds if nothing but the seed differs, and their tables.

A table has rows data set × model × loss and columns rules; there is one for each collection and protocol.
"""

from __future__ import annotations

import csv
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import UserError
from configs.files import read_json, read_text, read_yaml
from configs.stored import NON_RESULT_KEYS
from scripts.tables.layout import DATASETS, LOSSES, MODELS, RULES, Cell, Notes, Table, label
from trainers.metrics import PAPER_EPSILON
from trainers.text import read_csv

_ROUNDING = 2
_MAY_DIFFER = NON_RESULT_KEYS | {"seed", "hydra"}  # within one average
_SHOWN = 5  # differences that are listed


@dataclass(frozen=True)
class Result:
    """One rule on one checkpoint; `dice` and `iou` in percent, NaN if nothing was scored.

    `variant` names what was done to the probabilities before the rule, "" for nothing.
    """

    path: Path
    collection: str
    dataset: str
    split: str
    protocol: str
    model: str
    loss: str
    variant: str
    predictor: str
    seed: int
    num_images: int
    checkpoint: str
    dice: float
    iou: float
    identity: dict[str, Any] = field(repr=False)
    config: dict[str, Any] = field(repr=False)

    @property
    def cell(self) -> tuple[str, ...]:
        """Return the names of a table cell, which is an average over seeds."""
        return (*self.row, self.predictor)

    @property
    def row(self) -> tuple[str, ...]:
        """Return the names of a table row: collection, protocol, data set, split, model, loss, variant."""
        names = ("collection", "protocol", "dataset", "split", "model", "loss", "variant")
        return tuple(getattr(self, name) for name in names)


class Problem(NamedTuple):
    """A result file that cannot be used, and the reason; `name` is the path below the folder that was read."""

    path: Path
    reason: str
    name: str


@dataclass(frozen=True)
class Group:
    """The seeds of one table cell; `reason` says why they have no average, "" if they have one."""

    results: tuple[Result, ...]
    reason: str = ""

    @property
    def first(self) -> Result:
        """Return one of the results; the names of the cell are the same for all."""
        return self.results[0]

    def summary(self, metric: str) -> tuple[float, float]:
        """Return mean and half the range over seeds of "dice" or "iou", in percent."""
        values = [getattr(result, metric) for result in self.results]
        return mean(values), (max(values) - min(values)) / 2


Groups = Mapping[tuple[str, ...], Group]


def read_results(saved: Path, from_counts: bool = False) -> tuple[list[Result], list[Problem]]:
    """Read every result file below `saved`; a damaged file becomes a Problem.

    A result file is a JSON file in a folder `results` of a run (`results/paper` for the paper's protocol) or below
    `saved/results`. A record that is found twice, as a run and as its copy in git, counts once. With `from_counts`
    the scores are computed from the per-image counts in the CSV files.
    """
    results: dict[tuple, Result] = {}
    problems = []
    for path in result_files(saved):
        try:
            record = read_json(path)
            if isinstance(record, dict) and not {"format", "predictor", "scores"} & record.keys():
                continue  # another kind of record
            if from_counts:
                record["scores"] = scores_from_counts(path.with_suffix(".csv"), record)
            result = parse_result(path, saved, record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            problems.append(Problem(path, _describe(error), str(path.relative_to(saved))))
            continue
        identity = (result.seed, result.checkpoint, result.dice, result.iou, str(result.identity))
        results.setdefault((*result.cell[1:], *identity) if result.checkpoint else (path,), result)
    return list(results.values()), problems


def result_files(saved: Path) -> list[Path]:
    """Return the JSON files that may be results, those below `saved/results` first."""
    found = sorted(saved.rglob("*.json"), key=lambda p: ("results" not in p.relative_to(saved).parts[:1], p))
    others = ("provenance.json", "report.json")
    return [p for p in found if "results" in p.relative_to(saved.parent).parts[:-1] and p.name not in others]


def _describe(error: Exception) -> str:
    if isinstance(error.__cause__, json.JSONDecodeError):
        return f"not JSON (line {error.__cause__.lineno}: {error.__cause__.msg})"
    return f"no key {error}" if isinstance(error, KeyError) else str(error)


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
            raise UserError(f"{table}: impossible counts {inter}, {predicted}, {actual} of {key[0]}. Fix: score again.")
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
    overlap = 0 if legacy_bce_iou else 1  # a fault of published rows: |A| + |B| instead of the union
    return {key: inter / (p + a - overlap * inter + epsilon) for key, (inter, p, a) in counts.items()}


def scores_from_counts(table: Path, record: dict[str, Any]) -> dict[str, float]:
    """Compute mDice and mIoU from the counts of images and classes, by the conventions of the record's protocol."""
    paper, counts = record["protocol"] == "paper", read_counts(table)
    unknown = {image for image, _ in counts} - set(record["images"])
    if unknown:
        raise UserError(f"{table}: image {min(unknown)} is not in the record. Fix: score again.")
    means = {}
    for metric in ("dice", "iou"):
        found = fractions(counts, metric, PAPER_EPSILON if paper else 0.0, bool(record.get("legacy_bce_iou")))
        value = mean(mean_by_key((image, one) for (image, _), one in found.items()).values())
        means[f"mean_{metric}"] = round(value, 3) if paper else value
    return means


def parse_result(path: Path, saved: Path, record: dict[str, Any]) -> Result:
    """Return the result of a file below `saved`."""
    if record["format"] != 1:
        raise UserError(f"format={record['format']!r} is invalid: this program reads format 1.")
    data, scores = record["dataset"], record["scores"]
    run = _run_folder(path)
    return Result(
        path=path,
        collection=_collection(run, saved),
        dataset=str(data["name"]),
        split=str(data["split"]),
        protocol=str(record["protocol"]),
        model=str(record["model"]),
        loss=str(record["loss"]),
        variant=variant_of(record, path.relative_to(run).parts),
        predictor=str(record["predictor"]),
        seed=int(record["seed"]),
        num_images=int(data["num_images"]),
        checkpoint=str((record.get("checkpoint") or {}).get("sha256") or ""),
        dice=_percent(scores, "mean_dice"),
        iou=_percent(scores, "mean_iou"),
        identity={
            "data fingerprint": data["fingerprint"],
            "data contents": record.get("contents"),
            "number of images": data["num_images"],
            "link": record.get("link"),
            "scored classes": record.get("scored"),
            "model": record.get("model_detail"),
            "temperature": None if "temperature_fitted_on" in record else record.get("temperature"),
            "images of the temperature": record.get("temperature_fitted_on"),
            "correct_focal": record.get("correct_focal"),
            "checkpoint": (record.get("checkpoint") or {}).get("file"),
            "configuration": record.get("config_hash"),
        },
        config=_read_config(run / "config.yaml"),
    )


def variant_of(record: dict[str, Any], folders: tuple[str, ...] = ()) -> str:
    """Describe what was done to the probabilities, and an unusual threshold of T: "WORD: REASON; ..."."""
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
        parts.append(f"gate {record['gate']}: when ranking rules leave a class out")
    if record.get("threshold") not in (None, 0.5):
        parts.append(f"T at {record['threshold']:g}: another threshold of T")
    return "; ".join(parts)


def short_variant(variant: str) -> str:
    """Return the words of a variant without their reasons: "corrected, calibrated"."""
    return ", ".join(part.partition(":")[0] for part in variant.split("; "))


def _percent(scores: dict[str, Any], key: str) -> float:
    """Return a fraction as percent; null is NaN."""
    value = math.nan if scores[key] is None else float(scores[key])
    if not (math.isnan(value) or 0 <= value <= 1):
        raise UserError(f"{key} is {value}: expected a fraction between 0 and 1. Fix: score again.")
    return 100 * value


def _run_folder(path: Path) -> Path:
    """Return the folder `seed<k>` that holds the file, or the file's own folder."""
    return next((p for p in path.parents if p.name.startswith("seed") and p.name[4:].isdigit()), path.parent)


def _collection(run: Path, saved: Path) -> str:
    """Return the folders above <dataset>/<model>/<loss>/seed<k>: "" for runs, "demo", "results/kvasir"."""
    parts = run.relative_to(saved).parts
    return "/".join(parts[:-4] if run.name.startswith("seed") else parts)


@functools.cache  # slow, and all results of a run share it
def _read_config(path: Path) -> dict[str, Any]:
    """Return a run's configuration, flat, to name a difference by its key; {} if it cannot be read."""
    try:
        tree = read_yaml(path)
    except (OSError, UserError):
        return {}
    return _flatten(tree) if isinstance(tree, dict) else {}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name not in _MAY_DIFFER:
            flat.update(_flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def group_seeds(results: Iterable[Result]) -> Groups:
    """Group the seeds of each cell; seeds that differ in anything else have no average, and the reason is kept."""
    cells: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        cells.setdefault(result.cell, []).append(result)
    groups: dict[tuple[str, ...], Group] = {}
    for cell, members in cells.items():
        members.sort(key=lambda r: (r.seed, str(r.path)))
        found = next((text for other in members[1:] if (text := difference(members[0], other))), "")
        groups[cell] = Group(tuple(members), found or _duplicate_seed(members))
    return groups


def matching(groups: Groups, dataset: str, protocol: str, model: str, loss: str, rule: str) -> list[Group]:
    """Return our results of this cell without calibration, in any collection and split.

    Scores of the last epoch come first, because the paper tested the last epoch. Those of the best epoch are
    returned if a collection has no others.
    """
    names = ("dataset", "protocol", "model", "loss", "predictor")
    wanted = (dataset, protocol, model, loss, rule)
    found = [g for g in groups.values() if tuple(getattr(g.first, name) for name in names) == wanted]
    last = [g for g in found if short_variant(g.first.variant) == "last"]
    have_last = {g.first.collection for g in last}
    return last + [g for g in found if g.first.variant == "" and g.first.collection not in have_last]


def difference(one: Result, other: Result) -> str:
    """Return the differences, other than the seed, that forbid a common average; "" if there are none."""
    unlike = [key for key, value in one.identity.items() if value != other.identity[key]]
    if None in (one.identity["data contents"], other.identity["data contents"]):  # of an earlier version
        unlike = [key for key in unlike if key != "data contents"]
    keys = []
    if one.config and other.config:  # its keys say more than its hash
        keys = [key for key in one.config | other.config if one.config.get(key) != other.config.get(key)]
    if keys or len(unlike) > 1:
        unlike = [key for key in unlike if key != "configuration"]
    parts = [f"{key} {one.identity[key]} against {other.identity[key]}" for key in unlike]
    parts += [f"{key} {one.config.get(key)} against {other.config.get(key)}" for key in keys]
    if not parts:
        return ""
    more = f"; and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return f"seeds {one.seed} and {other.seed} differ: {'; '.join(parts[:_SHOWN])}{more}"


def _duplicate_seed(members: list[Result]) -> str:
    for one, other in pairwise(members):
        if one.seed == other.seed:
            return f"seed {one.seed} occurs twice: {one.path.name} of two checkpoints or two scores"
    return ""


# --- tables


def our_tables(groups: Groups, problems: Sequence[Problem] = ()) -> list[Table]:
    """Return one table for each collection and protocol; `problems` are listed below the first."""
    keys = sorted({group.first.row[:2] for group in groups.values()})
    return [_table(groups, *key, problems if index == 0 else ()) for index, key in enumerate(keys)]


def _table(groups: Groups, collection: str, protocol: str, problems: Sequence[Problem]) -> Table:
    here = {key: group for key, group in groups.items() if key[:2] == (collection, protocol)}
    rules = sorted({group.first.predictor for group in here.values()}, key=lambda rule: _rank(rule, RULES))
    lines, numbered = [], Notes()
    of_data = {group.first.row[:4]: group.first for group in here.values()}
    for row in sorted(_grid({group.first.row for group in here.values()}), key=_row_order):
        of_row = [here.get((*row, rule)) for rule in rules]
        present = [group for group in of_row if group]
        any_result = present[0].first if present else of_data[row[:4]]
        lines.append((*_labels(row, any_result, present, numbered), *_cells(of_row, numbered)))
    if problems:
        numbered.mark(problem_count(problems) + ": " + "; ".join(f"{p.name} ({p.reason})" for p in problems))
    place = f" ({collection})" if collection else ""
    return Table(
        name="-".join([*(collection.split("/") if collection else ["ours"]), protocol]),
        title=f"Our results{place}, protocol {protocol}: (mDice, mIoU) in percent",
        head=("Data", "Model", "Loss", *(RULES.get(rule, rule) for rule in rules)),
        rows=tuple(lines),
        labels=3,
        parts=("mDice", "mIoU"),
        notes=numbered.all(),
        caption=_caption(here.values()),
    )


def _grid(rows: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Add the rows that are missing: every model of a data set with every loss of it."""
    found = set(rows)
    for place in {row[:4] for row in rows}:
        cells = {row[4:6] for row in rows if row[:4] == place}
        every = {(model, loss) for model, _ in cells for _, loss in cells}
        found |= {(*place, *cell, "") for cell in every - cells}
    return found


def _rank(name: str, known: Iterable[str]) -> tuple[int, str]:
    """Return a sorting key: known names in their order, then the others by name."""
    places = {one: place for place, one in enumerate(known)}
    return places.get(name, len(places)), name


def _row_order(row: tuple[str, ...]) -> tuple:
    _, _, dataset, split, model, loss, variant = row
    return _rank(dataset, DATASETS), split, _rank(model, MODELS), _rank(loss, LOSSES), variant


def _caption(groups: Iterable[Group]) -> str:
    counts = {len(group.results) for group in groups}
    if counts == {1}:
        return "One seed each; the best of a row in bold."
    alone = " Rows with one seed have no range." if 1 in counts else ""
    return f"Mean ± half the range over seeds; the best of a row in bold.{alone}"


def _labels(row: tuple[str, ...], result: Result, present: Sequence[Group], numbered: Notes) -> tuple[Cell, Cell, Cell]:
    """Return the labels of a row: data set with split and size; model; loss with variant and number of seeds.

    The split is that of the data set's folder: the role `test` of a run may be the images of `val`.
    """
    _, _, dataset, split, model, loss, variant = row
    folder_split = result.config.get(f"dataset.splits.{split}", split)
    seeds = sorted({len(group.results) for group in present})
    count = f" ({'–'.join(map(str, seeds))} seeds)" if seeds not in ([1], []) else ""
    marks = [numbered.mark(f"{variant[0].upper()}{variant[1:]}.")] if variant else []
    marks += [numbered.mark(_UNLIKE)] if not comparable(present) else []
    return (
        label(f"{DATASETS.get(dataset, dataset)} {folder_split}, {result.num_images} images"),
        label(MODELS.get(model, model)),
        label(LOSSES.get(loss, loss) + (variant and f", {short_variant(variant)}") + count, marks),
    )


_UNLIKE = "The rules of this row were scored on different checkpoints or data, so none is bold."


def comparable(groups: Sequence[Group]) -> bool:
    """Return whether all rules of a row were scored with the same seeds, checkpoints and data."""
    runs = {
        tuple((r.seed, r.checkpoint, str(r.identity["data fingerprint"])) for r in group.results)
        for group in groups
        if not group.reason
    }
    return len(runs) <= 1


def _cells(groups: Sequence[Group | None], numbered: Notes) -> list[Cell]:
    """Return the cells of one row; the best of each metric is bold if all rules were scored on the same runs."""
    valid = [group for group in groups if group and not group.reason]
    best = {metric: _best(valid, metric) for metric in ("dice", "iou")}
    if len(valid) < 2 or not comparable(valid):
        best = dict.fromkeys(best)
    return [our_cell(group, numbered, best) for group in groups]


def _best(groups: Sequence[Group], metric: str) -> float | None:
    """Return the largest mean as printed, so that equal numbers are bold alike."""
    means = [group.summary(metric)[0] for group in groups]
    return max((round(mean, _ROUNDING) for mean in means if not math.isnan(mean)), default=None)


def our_cell(group: Group | None, numbered: Notes, best: Mapping[str, float | None] | None = None) -> Cell:
    """Return one cell: "(70.13 ± 0.42, 60.02 ± 0.51)", or "missing", or "rejected" with its reason."""
    if group is None:
        return label("missing")
    if group.reason:
        return label("rejected", [numbered.mark(f"Not averaged: {group.reason}.")])
    values, bold = [], []
    for metric in ("dice", "iou"):
        mean, half = group.summary(metric)
        values.append(_number(mean, half if len(group.results) > 1 else None))
        bold.append(best is not None and best[metric] is not None and round(mean, _ROUNDING) == best[metric])
    return Cell(tuple(values), tuple(bold))


def _number(mean: float, half: float | None) -> str:
    if math.isnan(mean):
        return "undefined"
    return f"{mean:.{_ROUNDING}f}" + (f" ± {half:.{_ROUNDING}f}" if half is not None else "")


def problem_count(problems: Sequence[Problem]) -> str:
    """Return how many files were skipped, in words."""
    many = len(problems) != 1
    return f"{len(problems)} result file{'s' * many} could not be read and {'were' if many else 'was'} skipped"
