"""Published and our results side by side, and our results against the numbers that experiments expect."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from configs.errors import UserError
from configs.files import read_yaml
from scripts.tables.layout import DATASETS, Cell, Table, missing
from scripts.tables.ours import Groups, Notes, our_cell
from scripts.tables.published import COLUMNS, Published, PublishedCell, heads, marks, notes, row_labels
from scripts.tables.results import Group, short_variant

# Images that the paper scored; its Kvasir-SEG split is unpublished.
IMAGES = {"cityscapes": 500, "voc2012": 1449, "kvasir_seg": None}
_CAPTION = (
    "Ours under protocol paper, RankDice as in the experiments. Δ = ours − published, in points; "
    "– where the printed number cannot be compared."
)
_OTHER_DATA = "No difference: ours was scored on {ours} images, the paper's number on {theirs}."
_UNKNOWN_SPLIT = "The paper's split of Kvasir-SEG is unpublished: the difference includes that of the data."
_OTHER_NETWORK = "Not the paper's network but {model}: {differs}."
_SEVERAL = "More than one collection holds this cell: {names}. Move one out of the way."


def compared_tables(data: Published, groups: Groups, expected: Iterable[Expected] = ()) -> list[Table]:
    """Return for each published table: published, ours and Δ = ours − published, column by column.

    A row without a run of the paper's network shows the network that an experiment compares with it (`paper_rows`).
    """
    nearest = [block for block in expected if block.paper_rows]
    return [_compared(data, groups, dataset, nearest) for dataset in COLUMNS]


def _compared(data: Published, groups: Groups, dataset: str, nearest: Sequence[Expected]) -> Table:
    cells = {(c.model, c.loss, c.predictor): c for c in data.cells if c.dataset == dataset}
    numbered, rows = Notes(), []
    for model, loss in dict.fromkeys((m, lo) for m, lo, _ in cells):
        row = [cells[model, loss, rule] for rule in COLUMNS[dataset]]
        line = list(row_labels(data, row))
        for cell in row:
            line += [_published(data, cell), *_ours(data, groups, cell, numbered, nearest)]
        rows.append(tuple(line))
    head = [f"{rule}: {part}" for rule in heads(dataset) for part in ("published", "ours", "Δ")]
    return Table(
        name=f"both-{dataset}",
        title=f"{DATASETS[dataset]}: published and ours (mDice, mIoU) × .01",
        head=("Model", "Loss", *head),
        rows=tuple(rows),
        labels=2,
        parts=("mDice", "mIoU"),
        notes=(*notes(data, cells.values()), *numbered.all()),
        marks=marks(data, cells.values(), "table"),
        caption=_CAPTION,
    )


def _published(data: Published, cell: PublishedCell) -> Cell:
    return Cell(cell.values, (cell.bold,) * len(cell.values), marks(data, [cell], "cell"))


def _ours(
    data: Published, groups: Groups, cell: PublishedCell, numbered: Notes, nearest: Sequence[Expected]
) -> tuple[Cell, Cell]:
    """Return our cell and the difference; no difference for other data or a number that an erratum spoils."""
    found = matching(groups, cell.dataset, "paper", cell.model, cell.loss, cell.predictor)
    other = ""
    for block in nearest if not found else ():
        for model, row in block.paper_rows.items():
            if block.dataset == cell.dataset and row == cell.model:
                matches = matching(groups, cell.dataset, "paper", model, cell.loss, cell.predictor)
                found += [group for group in matches if _is_checked(block, group)]
                other = _OTHER_NETWORK.format(model=model, differs=block.differs)
    if not found:
        return missing(), Cell(("–",))
    if len(found) > 1:
        names = ", ".join(sorted(group.first.collection or "runs" for group in found))
        return Cell(("rejected",), marks=(numbered.mark(_SEVERAL.format(names=names)),)), Cell(("–",))
    group = found[0]
    ours = our_cell(group, numbered)
    if other:
        ours = replace(ours, marks=(*ours.marks, numbered.mark(other)))
    if group.reason or cell.mdice is None:
        return ours, Cell(("–",))
    expected = IMAGES[cell.dataset]
    if expected is not None and expected != group.first.num_images:
        reason = _OTHER_DATA.format(ours=group.first.num_images, theirs=expected)
        return ours, Cell(("–",), marks=(numbered.mark(reason),))
    spoiled = {part for erratum in data.errata if erratum.concerns(cell) for part in erratum.spoils}
    deltas = {
        part: group.summary(part)[0] - value for part, value in (("dice", cell.mdice), ("iou", cell.miou))
    }
    split = (numbered.mark(_UNKNOWN_SPLIT),) if expected is None else ()
    return ours, Cell(
        tuple("–" if part in spoiled else _signed(d) for part, d in deltas.items()), marks=split
    )


def _signed(delta: float) -> str:
    return "–" if math.isnan(delta) else f"{delta:+.2f}".replace("-", "−")


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


@dataclass(frozen=True)
class Expected:
    """The scores that an experiment's configuration expects, in percent.

    `scores[model][loss][rule]` is [mDice, mIoU]; either may be null. `num_images` and `collection` restrict the
    results that are checked; null means no restriction. `paper_rows[model]` is the published network that a model
    of this experiment is compared with, and `differs` says what is not as in the paper.
    """

    path: Path
    dataset: str
    protocol: str
    tolerance: float
    scores: Mapping[str, Mapping[str, Mapping[str, Sequence[float | None]]]]
    num_images: int | None = None
    collection: str | None = None
    paper_rows: Mapping[str, str] = field(default_factory=dict)
    differs: str = ""


def read_expected(configs: Path) -> list[Expected]:
    """Return the `expected:` blocks of all experiments."""
    found = []
    for path in sorted((configs / "experiment").rglob("*.yaml")):
        block = (read_yaml(path) or {}).get("expected")
        if block:
            try:
                found.append(Expected(path=path, **block))
            except TypeError as error:
                raise UserError(f"{path}: the key 'expected' is invalid: {error}") from None
    return found


def violations(expected: Iterable[Expected], groups: Groups) -> list[str]:
    """Return one line for each of our numbers that is out of the tolerance of an experiment."""
    lines = []
    for block in expected:
        for model, losses in block.scores.items():
            for loss, rules in losses.items():
                for rule, values in rules.items():
                    for group in matching(groups, block.dataset, block.protocol, model, loss, rule):
                        if _is_checked(block, group):
                            lines += _out_of_tolerance(block, group, values)
    return lines


def _is_checked(block: Expected, group: Group) -> bool:
    return (
        not group.reason
        and block.num_images in (None, group.first.num_images)
        and block.collection in (None, group.first.collection)
    )


def _out_of_tolerance(block: Expected, group: Group, values: Sequence[float | None]) -> list[str]:
    lines = []
    for metric, value in zip(("dice", "iou"), values, strict=True):
        mean = group.summary(metric)[0]
        if value is not None and not abs(mean - value) <= block.tolerance:
            cell = " ".join(filter(None, group.first.cell[2:]))
            lines.append(
                f"{cell}: m{'Dice' if metric == 'dice' else 'IoU'} {mean:.2f}, {block.path.name} expects "
                f"{value:.2f} ± {block.tolerance:g} ({group.first.path})"
            )
    return lines
