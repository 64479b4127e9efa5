"""The tables of the paper: cells as printed, with the known errata as marks and notes, alone or next to ours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import UserError
from configs.files import read_json, read_text, read_yaml
from scripts import ROOT
from scripts.tables.layout import DATASETS, LOSSES, MODELS, RULES, Cell, Table, label, mark_of
from scripts.tables.results import Group, Groups, find_groups, our_cell
from trainers.text import read_csv

FOLDER = ROOT / "saved" / "published"
COLUMNS = {"cityscapes": ("T", "max", "rankdice"), "voc2012": ("T", "max", "rankdice"), "kvasir_seg": ("T", "rankdice")}
# Number of images that the paper scored; its Kvasir-SEG split is unpublished.
IMAGES = {"cityscapes": 500, "voc2012": 1449, "kvasir_seg": None}
_CAPTION = (
    "Ours under protocol paper, RankDice as in the experiments. Δ = ours − published, in points; "
    "– where the printed number cannot be compared."
)
_OTHER_DATA = "No difference: ours was scored on {ours} images, the paper's number on {theirs}."
_UNKNOWN_SPLIT = "The paper's split of Kvasir-SEG is unpublished: the difference includes that of the data."
_OTHER_NETWORK = "Not the paper's network but {model}: {differs}."
_SEVERAL = "More than one collection holds this cell: {names}. Move one out of the way."
_NONE = label("–")


@dataclass(frozen=True)
class PublishedCell:
    """One cell of the paper, and the id of its log.

    `mdice` and `miou` are in percent, None if the paper prints a symbol.
    """

    dataset: str
    model: str
    backbone: str
    loss: str
    predictor: str
    printed: str
    mdice: float | None
    miou: float | None
    bold: bool
    log: str

    @property
    def values(self) -> tuple[str, ...]:
        """Return the printed numbers as strings, or the symbol alone."""
        if self.mdice is None:
            return (self.printed,)
        return tuple(self.printed.strip("()").replace(". ", ", ").split(", "))


@dataclass(frozen=True)
class Erratum:
    """A known fault of published cells.

    `select` chooses its cells. `scope` is where its mark is printed. `reason` is the note. With `log`, the logged
    values of the cells follow the reason. `spoils` names the numbers that cannot be compared, "dice" or "iou".
    """

    mark: str
    scope: str
    reason: str
    log: bool
    select: Sequence[dict] = field(repr=False)
    spoils: Sequence[str] = ()

    def concerns(self, cell: PublishedCell) -> bool:
        """Return whether any of the selections matches the cell."""
        facts = {**vars(cell), "numeric": cell.mdice is not None, "logged": bool(cell.log)}
        return any(all(facts[key] in wanted for key, wanted in choice.items()) for choice in self.select)


class Published(NamedTuple):
    """The data in saved/published."""

    cells: tuple[PublishedCell, ...]
    logs: dict[str, dict]
    errata: tuple[Erratum, ...]


def load_published(folder: Path = FOLDER) -> Published:
    """Read the published cells, the logs of the authors, and the errata."""
    cells = []
    for row in read_csv(read_text(folder / "cells.csv")):
        numbers: dict[str, Any] = {key: float(row[key]) if row[key] else None for key in ("mdice", "miou")}
        cells.append(PublishedCell(**{**row, **numbers, "bold": row["bold"] == "1"}))
    logs = {log["id"]: log for log in read_json(folder / "logs.json")}
    errata = tuple(Erratum(**item) for item in read_json(folder / "errata.json"))
    return Published(tuple(cells), logs, errata)


def published_tables(data: Published) -> list[Table]:
    """Return the three tables of the paper, cell for cell."""
    return [_table(data, dataset) for dataset in COLUMNS]


def compared_tables(data: Published, groups: Groups, expected: Iterable[Expected] = ()) -> list[Table]:
    """Return each published table with three columns per rule: published, ours and Δ = ours − published.

    If we have no run of the paper's network, that which an experiment names for the row in `paper_rows` is shown.
    """
    substitutes = [block for block in expected if block.paper_rows]
    return [_table(data, dataset, groups, substitutes) for dataset in COLUMNS]


def _table(data: Published, dataset: str, groups: Groups | None = None, substitutes: Sequence[Expected] = ()) -> Table:
    """Return one table: rows model × loss, columns rules, cells (mDice, mIoU) × .01; with ``groups`` also ours."""
    cells = {(c.model, c.loss, c.predictor): c for c in data.cells if c.dataset == dataset}
    numbered: dict[str, str] = {}
    rows = []
    for model, loss in dict.fromkeys((m, lo) for m, lo, _ in cells):
        row = [cells[model, loss, rule] for rule in COLUMNS[dataset]]
        line = [
            label(f"{MODELS[model]} ({row[0].backbone})", _marks(data, row, "model")),
            label(LOSSES[loss], _marks(data, row, "loss")),
        ]
        for cell in row:
            line.append(Cell(cell.values, (cell.bold,) * len(cell.values), _marks(data, [cell], "cell")))
            if groups is not None:
                line += _ours(data, groups, cell, numbered, substitutes)
        rows.append(tuple(line))
    heads = [RULES[rule] for rule in COLUMNS[dataset]]
    if "max" not in COLUMNS[dataset]:  # with two classes, threshold and argmax are one column
        heads[0] = "Threshold/Argmax"
    if groups is not None:
        heads = [f"{rule}: {part}" for rule in heads for part in ("published", "ours", "Δ")]
    notes = {}
    for erratum in data.errata:
        concerned = [cell for cell in cells.values() if erratum.concerns(cell)]
        if concerned:
            notes[erratum.mark] = erratum.reason + (_logged(data, concerned) if erratum.log else "")
    return Table(
        name=f"{'published' if groups is None else 'both'}-{dataset}",
        title=f"{DATASETS[dataset]}: published {'' if groups is None else 'and ours '}(mDice, mIoU) × .01",
        head=("Model", "Loss", *heads),
        rows=tuple(rows),
        labels=2,
        notes={**notes, **{mark: reason for reason, mark in numbered.items()}},
        marks=_marks(data, cells.values(), "table"),
        caption="" if groups is None else _CAPTION,
    )


def _marks(data: Published, cells: Iterable[PublishedCell], scope: str) -> tuple[str, ...]:
    """Return the marks of one scope that concern any of the cells."""
    return tuple(e.mark for e in data.errata if e.scope == scope and any(e.concerns(cell) for cell in cells))


def _logged(data: Published, cells: Sequence[PublishedCell]) -> str:
    """Return the logged values of the cells as text. With more than one cell, each has its name in front."""
    texts = []
    for cell in cells:
        log = data.logs[cell.log]
        name = f"{MODELS[cell.model]} {LOSSES[cell.loss]} {cell.predictor} " if len(cells) > 1 else ""
        texts.append(f"{name}({100 * log['mean_dice']:.1f}, {100 * log['mean_iou']:.1f})")
    return f" {', '.join(texts)}."


def _ours(
    data: Published, groups: Groups, cell: PublishedCell, notes: dict[str, str], substitutes: Sequence[Expected]
) -> tuple[Cell, Cell]:
    """Return our cell and the difference; "–" for other data and for a number that an erratum spoils."""
    found = find_groups(groups, cell.dataset, "paper", cell.model, cell.loss, cell.predictor)
    other_network = ""
    for block in substitutes if not found else ():
        model = block.paper_rows.get(cell.model, {}).get(cell.loss)
        if model and block.dataset == cell.dataset:
            matches = find_groups(groups, cell.dataset, "paper", model, cell.loss, cell.predictor)
            covered = [group for group in matches if not group.reason and block.covers(group)]
            if covered:
                found += covered
                other_network = _OTHER_NETWORK.format(model=model, differs=block.differs)
    if not found:
        return label("missing"), _NONE
    if len(found) > 1:
        names = ", ".join(sorted(group.first.row.collection or "runs" for group in found))
        return label("rejected", [mark_of(_SEVERAL.format(names=names), notes)]), _NONE
    group = found[0]
    ours = our_cell(group, notes, {})
    if other_network:
        ours = replace(ours, marks=(*ours.marks, mark_of(other_network, notes)))
    if group.reason or cell.mdice is None or cell.miou is None:
        return ours, _NONE
    expected, scored = IMAGES[cell.dataset], group.first.num_images
    if expected not in (None, scored):
        return ours, label("–", [mark_of(_OTHER_DATA.format(ours=scored, theirs=expected), notes)])
    spoiled = {part for erratum in data.errata if erratum.concerns(cell) for part in erratum.spoils}
    deltas = []
    for part, value in (("dice", cell.mdice), ("iou", cell.miou)):
        delta = math.nan if part in spoiled else group.summary(part)[0] - value
        deltas.append("–" if math.isnan(delta) else f"{delta:+.2f}".replace("-", "−"))
    marks = (mark_of(_UNKNOWN_SPLIT, notes),) if expected is None else ()
    return ours, Cell(tuple(deltas), marks=marks)


# --- what experiments expect


@dataclass(frozen=True)
class Expected:
    """The scores that an experiment's configuration expects, in percent.

    `tolerance` is in points. `scores[model][loss][rule]` is [mDice, mIoU]; either may be null. `num_images` and
    `collection` restrict the results that are checked; null means no restriction. `paper_rows` maps
    a published row, [model][loss], to our model that is compared with it. `differs` names what is
    not as in the paper.
    """

    path: Path
    dataset: str
    protocol: str
    tolerance: float
    scores: Mapping[str, Mapping[str, Mapping[str, Sequence[float | None]]]]
    num_images: int | None = None
    collection: str | None = None
    paper_rows: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    differs: str = ""

    def covers(self, group: Group) -> bool:
        """Return whether a result has the number of images and the collection of this experiment."""
        images, collection = group.first.num_images, group.first.row.collection
        return self.num_images in (None, images) and self.collection in (None, collection)


def read_expected(configs: Path) -> list[Expected]:
    """Return the blocks `expected` of all experiments below `configs`."""
    found = []
    for path in sorted((configs / "experiment").rglob("*.yaml")):
        block = (read_yaml(path) or {}).get("expected")
        if block:
            try:
                found.append(Expected(path=path, **block))
            except TypeError as error:
                raise UserError(f"{path}: the key 'expected' is invalid: {error}") from None
    return found


def violations(expected: Iterable[Expected], groups: Groups) -> Iterator[str]:
    """Yield one line for each of our numbers that is outside the tolerance of an experiment."""
    for block in expected:
        for model, losses in block.scores.items():
            for loss, rules in losses.items():
                for rule, values in rules.items():
                    for group in find_groups(groups, block.dataset, block.protocol, model, loss, rule):
                        if not group.reason and block.covers(group):
                            yield from _out_of_tolerance(block, group, values)


def _out_of_tolerance(block: Expected, group: Group, values: Sequence[float | None]) -> Iterator[str]:
    for metric, name, value in zip(("dice", "iou"), ("mDice", "mIoU"), values, strict=True):
        mean, first = group.summary(metric)[0], group.first
        if value is not None and not abs(mean - value) <= block.tolerance:
            cell = " ".join(filter(None, (*first.row[2:], first.rule)))
            expects = f"{block.path.name} expects {value:.2f} ± {block.tolerance:g}"
            yield f"{cell}: {name} {mean:.2f}, {expects} ({first.path})"
