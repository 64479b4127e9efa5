"""Read the result files of `test.py`, average over seeds if only the seed differs, and make tables.

There is one table for each collection and protocol. Its rows are data set × model × loss, and its columns are rules.
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
from configs.files import read_json, read_yaml
from configs.stored import differences
from scripts.analysis.scores import mean, scores_from_counts, short_variant, variant_of
from scripts.tables.layout import DATASETS, LOSSES, MODELS, RULES, Cell, Table, label, mark_of

_MAX_LISTED = 5  # at most this number of differences is listed


class Row(NamedTuple):
    """The names of a table row; `variant` is the text of `variant_of`."""

    collection: str
    protocol: str
    dataset: str
    split: str
    model: str
    loss: str
    variant: str


@dataclass(frozen=True)
class Result:
    """One rule on one checkpoint.

    `checkpoint` is its SHA-256, "" if unknown. `dice` and `iou` are in percent, NaN if nothing was scored. `identity`
    is what the results of a common average must share. `config` is the configuration of the run without its seed.
    """

    path: Path
    row: Row
    rule: str
    seed: int
    num_images: int
    checkpoint: str
    dice: float
    iou: float
    identity: dict[str, Any] = field(repr=False)
    config: dict[str, Any] = field(repr=False)


class Problem(NamedTuple):
    """A result file that cannot be used, and the reason; `name` is the path below the folder that was read."""

    path: Path
    reason: str
    name: str


@dataclass(frozen=True)
class Group:
    """The results of one table cell, one per seed; `reason` says why there is no average, "" if there is one."""

    results: tuple[Result, ...]
    reason: str = ""

    @property
    def first(self) -> Result:
        """Return the first result; row and rule are the same for all."""
        return self.results[0]

    def summary(self, metric: str) -> tuple[float, float]:
        """Return mean and half the range over seeds of "dice" or "iou", in percent."""
        values = [getattr(result, metric) for result in self.results]
        return mean(values), (max(values) - min(values)) / 2


Groups = Mapping[tuple[Row, str], Group]


def read_results(saved: Path, from_counts: bool = False) -> tuple[list[Result], list[Problem]]:
    """Read every result file below `saved`; a damaged file becomes a Problem.

    A result file is a JSON file in the folder `results` of a run (`results/paper` for the paper's protocol) or below
    `saved/results`. A record that is found twice, in a run and as its copy in git, counts once. With `from_counts`,
    the scores are computed from the counts per image and class in the CSV files.
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
        scores = (result.seed, result.checkpoint, result.dice, result.iou, str(result.identity))
        results.setdefault((result.row[1:], result.rule, *scores) if result.checkpoint else (path,), result)
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


def parse_result(path: Path, saved: Path, record: dict[str, Any]) -> Result:
    """Return the result of a file below `saved`."""
    if record["format"] != 1:
        raise UserError(f"format={record['format']!r} is invalid: this program reads format 1.")
    data, scores, checkpoint = record["dataset"], record["scores"], record.get("checkpoint") or {}
    run = next((p for p in path.parents if p.name.startswith("seed") and p.name[4:].isdigit()), path.parent)
    above = run.relative_to(saved).parts[: -4 if run.name.startswith("seed") else None]
    return Result(
        path=path,
        row=Row(
            collection="/".join(above),  # the folders above <dataset>/<model>/<loss>/seed<k>: "" for runs
            protocol=str(record["protocol"]),
            dataset=str(data["name"]),
            split=str(data["split"]),
            model=str(record["model"]),
            loss=str(record["loss"]),
            variant=variant_of(record, path.relative_to(run).parts),
        ),
        rule=str(record["predictor"]),
        seed=int(record["seed"]),
        num_images=int(data["num_images"]),
        checkpoint=str(checkpoint.get("sha256") or ""),
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
            "checkpoint": checkpoint.get("file"),
            "configuration": record.get("config_hash"),
        },
        config=_read_config(run / "config.yaml"),
    )


def _percent(scores: dict[str, Any], key: str) -> float:
    """Return a fraction as percent; null is NaN."""
    value = math.nan if scores[key] is None else float(scores[key])
    if not (math.isnan(value) or 0 <= value <= 1):
        raise UserError(f"{key} is {value}: expected a fraction between 0 and 1. Fix: score again.")
    return 100 * value


@functools.cache  # slow, and all results of a run share it
def _read_config(path: Path) -> dict[str, Any]:
    """Return a run's configuration without its seed, to name a difference by its key; {} if it cannot be read."""
    try:
        tree = read_yaml(path)
    except (OSError, UserError):
        return {}
    return {key: value for key, value in tree.items() if key not in ("seed", "hydra")} if isinstance(tree, dict) else {}


def group_seeds(results: Iterable[Result]) -> Groups:
    """Group the results of each cell. If they differ in more than the seed, the group stores why it has no average."""
    cells: dict[tuple[Row, str], list[Result]] = {}
    for result in results:
        cells.setdefault((result.row, result.rule), []).append(result)
    groups = {}
    for cell, members in cells.items():
        members.sort(key=lambda r: (r.seed, str(r.path)))
        reasons = [difference(members[0], other) for other in members[1:]]
        reasons += [
            f"seed {one.seed} occurs twice: {one.path.name} of two checkpoints or two scores"
            for one, other in pairwise(members)
            if one.seed == other.seed
        ]
        groups[cell] = Group(tuple(members), next(filter(None, reasons), ""))
    return groups


def find_groups(groups: Groups, dataset: str, protocol: str, model: str, loss: str, rule: str) -> list[Group]:
    """Return our results of this cell without calibration, in any collection and split.

    Results of the last epoch come first, because the paper tested the last epoch. Results of the best epoch are
    returned only for collections without any of the last epoch.
    """
    names = (dataset, protocol, model, loss, rule)
    found = [g for (r, own), g in groups.items() if (r.dataset, r.protocol, r.model, r.loss, own) == names]
    last = [g for g in found if short_variant(g.first.row.variant) == "last"]
    have_last = {g.first.row.collection for g in last}
    return last + [g for g in found if g.first.row.variant == "" and g.first.row.collection not in have_last]


def difference(one: Result, other: Result) -> str:
    """Return the differences, apart from the seed, that rule out a common average; "" if there are none."""
    unlike = [key for key, value in one.identity.items() if value != other.identity[key]]
    if None in (one.identity["data contents"], other.identity["data contents"]):  # scored by an earlier version
        unlike = [key for key in unlike if key != "data contents"]
    # The changed keys of the configuration explain more than its hash.
    changed = differences(one.config, other.config) if one.config and other.config else []
    if changed or len(unlike) > 1:
        unlike = [key for key in unlike if key != "configuration"]
    parts = [f"{key} {one.identity[key]} against {other.identity[key]}" for key in unlike] + changed
    if not parts:
        return ""
    more = f"; and {len(parts) - _MAX_LISTED} more" if len(parts) > _MAX_LISTED else ""
    return f"seeds {one.seed} and {other.seed} differ: {'; '.join(parts[:_MAX_LISTED])}{more}"


# --- tables


def our_tables(groups: Groups, problems: Sequence[Problem] = ()) -> list[Table]:
    """Return one table for each collection and protocol; `problems` are listed below the first."""
    keys = sorted({row[:2] for row, _ in groups})
    return [_table(groups, *key, problems if index == 0 else ()) for index, key in enumerate(keys)]


def _table(groups: Groups, collection: str, protocol: str, problems: Sequence[Problem]) -> Table:
    here = {cell: group for cell, group in groups.items() if cell[0][:2] == (collection, protocol)}
    first_of_dataset = {row[:4]: group.first for (row, _), group in here.items()}
    rules = sorted({rule for _, rule in here}, key=lambda rule: _sort_key(rule, RULES))
    lines, notes = [], dict[str, str]()
    for row in sorted(_add_missing_rows({row for row, _ in here}), key=_row_order):
        of_row = [here.get((row, rule)) for rule in rules]
        present = [group for group in of_row if group]
        valid = [group for group in present if not group.reason]
        # All rules of a row must have the same seeds, checkpoints and data.
        runs = {tuple((r.seed, r.checkpoint, str(r.identity["data fingerprint"])) for r in g.results) for g in valid}
        any_result = present[0].first if present else first_of_dataset[row[:4]]
        labels = _labels(row, any_result, {len(group.results) for group in present}, len(runs) > 1, notes)
        comparable = len(valid) > 1 and len(runs) == 1
        best = {metric: _best(valid, metric) for metric in ("dice", "iou")} if comparable else {}
        lines.append((*labels, *(our_cell(group, notes, best) for group in of_row)))
    if problems:
        mark_of(skipped_files_text(problems) + ": " + "; ".join(f"{p.name} ({p.reason})" for p in problems), notes)
    place = f" ({collection})" if collection else ""
    return Table(
        name="-".join([*(collection.split("/") if collection else ["ours"]), protocol]),
        title=f"Our results{place}, protocol {protocol}: (mDice, mIoU) in percent",
        head=("Data", "Model", "Loss", *(RULES.get(rule, rule) for rule in rules)),
        rows=tuple(lines),
        labels=3,
        notes={mark: reason for reason, mark in notes.items()},
        caption=_caption({len(group.results) for group in here.values()}),
    )


def _add_missing_rows(rows: set[Row]) -> set[Row]:
    """Add the rows that are missing: every model of a data set with every loss of it."""
    found = set(rows)
    for place in {row[:4] for row in rows}:
        cells = {(row.model, row.loss) for row in rows if row[:4] == place}
        every = {(model, loss) for model, _ in cells for _, loss in cells}
        found |= {Row(*place, *cell, "") for cell in every - cells}
    return found


def _sort_key(name: str, known: Iterable[str]) -> tuple[int, str]:
    """Return a sort key: known names in their order, then the others by name."""
    places = {one: place for place, one in enumerate(known)}
    return places.get(name, len(places)), name


def _row_order(row: Row) -> tuple:
    return (
        _sort_key(row.dataset, DATASETS),
        row.split,
        _sort_key(row.model, MODELS),
        _sort_key(row.loss, LOSSES),
        row.variant,
    )


def _caption(counts: set[int]) -> str:
    if counts == {1}:
        return "One seed each; the best of a row in bold."
    alone = " Rows with one seed have no range." if 1 in counts else ""
    return f"Mean ± half the range over seeds; the best of a row in bold.{alone}"


def _labels(row: Row, result: Result, seeds: set[int], unlike: bool, notes: dict[str, str]) -> tuple[Cell, Cell, Cell]:
    """Return the labels of a row: data set with split and size; model; loss with variant and number of seeds.

    The split is that of the data set's folder: the role `test` of a run may be the images of `val`.
    """
    data = result.config.get("dataset")
    splits = data.get("splits") if isinstance(data, dict) else None
    folder_split = splits.get(row.split, row.split) if isinstance(splits, dict) else row.split
    count = f" ({'–'.join(map(str, sorted(seeds)))} seeds)" if seeds - {1} else ""
    variant, marks = row.variant, []
    if variant:
        marks.append(mark_of(f"{variant[0].upper()}{variant[1:]}.", notes))
    if unlike:
        marks.append(
            mark_of("The rules of this row were scored on different checkpoints or data, so none is bold.", notes)
        )
    return (
        label(f"{DATASETS.get(row.dataset, row.dataset)} {folder_split}, {result.num_images} images"),
        label(MODELS.get(row.model, row.model)),
        label(LOSSES.get(row.loss, row.loss) + (variant and f", {short_variant(variant)}") + count, marks),
    )


def _best(groups: Sequence[Group], metric: str) -> float | None:
    """Return the largest mean, rounded as printed, so that equal printed numbers are all bold."""
    means = [group.summary(metric)[0] for group in groups]
    return max((round(mean, 2) for mean in means if not math.isnan(mean)), default=None)


def our_cell(group: Group | None, notes: dict[str, str], best: Mapping[str, float | None]) -> Cell:
    """Return one cell: "(70.13 ± 0.42, 60.02 ± 0.51)", or "missing", or "rejected" with its reason."""
    if group is None:
        return label("missing")
    if group.reason:
        return label("rejected", [mark_of(f"Not averaged: {group.reason}.", notes)])
    values, bold = [], []
    for metric in ("dice", "iou"):
        mean, half = group.summary(metric)
        half_range = f" ± {half:.2f}" if len(group.results) > 1 else ""
        values.append("undefined" if math.isnan(mean) else f"{mean:.2f}{half_range}")
        bold.append(round(mean, 2) == best.get(metric))
    return Cell(tuple(values), tuple(bold))


def skipped_files_text(problems: Sequence[Problem]) -> str:
    """Return a sentence about how many files were skipped."""
    many = len(problems) != 1
    return f"{len(problems)} result file{'s' * many} could not be read and {'were' if many else 'was'} skipped"
