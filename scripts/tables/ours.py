"""Tables of our results: rows data set × model × loss, columns rules; one table for each protocol."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from scripts.tables.layout import DATASETS, LOSSES, MODELS, RULES, Cell, Notes, Table, label, missing
from scripts.tables.results import Group, Groups, Problem, Result, short_variant

_ROUNDING = 2


def our_tables(groups: Groups, problems: Sequence[Problem] = ()) -> list[Table]:
    """Return one table for each collection and protocol; `problems` are listed below the first."""
    keys = sorted({group.first.row[:2] for group in groups.values()})
    return [_table(groups, *key, problems if index == 0 else ()) for index, key in enumerate(keys)]


def table_name(collection: str, protocol: str) -> str:
    """Return the name that a marker in a page refers to: "ours-corrected", "results-kvasir-paper"."""
    return "-".join([*(collection.split("/") if collection else ["ours"]), protocol])


def _table(groups: Groups, collection: str, protocol: str, problems: Sequence[Problem]) -> Table:
    here = {key: group for key, group in groups.items() if key[:2] == (collection, protocol)}
    rules = rule_order(group.first.predictor for group in here.values())
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
        name=table_name(collection, protocol),
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


def rule_order(rules: Iterable[str]) -> list[str]:
    """Return the rules in the order of the paper, then the others by name."""
    known = list(RULES)
    return sorted(set(rules), key=lambda r: (known.index(r) if r in known else len(known), r))


def _row_order(row: tuple[str, ...]) -> tuple:
    _, _, dataset, split, model, loss, variant = row
    ranks = [
        list(names).index(name) if name in names else len(names)
        for name, names in ((dataset, DATASETS), (model, MODELS), (loss, LOSSES))
    ]
    return (ranks[0], dataset, split, ranks[1], model, ranks[2], loss, variant)


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
        return missing()
    if group.reason:
        return Cell(("rejected",), marks=(numbered.mark(f"Not averaged: {group.reason}."),))
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
