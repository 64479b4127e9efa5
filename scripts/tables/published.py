"""The published tables: cells as printed, with the known errata as marks and notes."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.files import read_json
from scripts import ROOT
from scripts.tables.layout import DATASETS, LOSSES, MODELS, Cell, Note, Table, label

FOLDER = ROOT / "saved" / "published"
COLUMNS = {
    "cityscapes": ("T", "max", "rankdice"),
    "voc2012": ("T", "max", "rankdice"),
    "kvasir_seg": ("T", "rankdice"),
}
HEADS = {"T": "Threshold (at 0.5)", "max": "Argmax", "rankdice": "mRankDice"}


@dataclass(frozen=True)
class PublishedCell:
    """One cell of the paper; `mdice` and `miou` in percent, None if the paper prints a symbol."""

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
    """A known fault: its cells (`select`), the place of its mark (`scope`), its reason, and the numbers it spoils."""

    mark: str
    scope: str
    reason: str
    show_log: bool
    spoils: tuple[str, ...]
    select: tuple[dict, ...] = field(repr=False)

    def concerns(self, cell: PublishedCell) -> bool:
        """Return whether one of the selections fits the cell."""
        facts = {"numeric": cell.mdice is not None, "logged": bool(cell.log)}

        def fits(key: str, want: Any) -> bool:
            return facts[key] == want if key in facts else getattr(cell, key) in want

        return any(all(fits(key, want) for key, want in choice.items()) for choice in self.select)


@dataclass(frozen=True)
class Published:
    """The data in saved/published."""

    cells: tuple[PublishedCell, ...]
    logs: dict[str, dict]
    errata: tuple[Erratum, ...]


def load_published(folder: Path = FOLDER) -> Published:
    """Read cells, logs and errata."""
    with open(folder / "cells.csv", newline="", encoding="utf-8") as file:
        cells = tuple(_cell(row) for row in csv.DictReader(file))
    logs = {log["id"]: log for log in read_json(folder / "logs.json")}
    errata = tuple(
        Erratum(
            item["mark"],
            item["scope"],
            item["reason"],
            item["log"],
            tuple(item.get("spoils", ())),
            tuple(item["select"]),
        )
        for item in read_json(folder / "errata.json")
    )
    return Published(cells, logs, errata)


def _cell(row: dict[str, str]) -> PublishedCell:
    number = {key: float(row[key]) if row[key] else None for key in ("mdice", "miou")}
    return PublishedCell(**{**row, **number, "bold": row["bold"] == "1"})


def published_tables(data: Published) -> list[Table]:
    """Return the three tables of the paper, cell for cell."""
    return [published_table(data, dataset) for dataset in COLUMNS]


def published_table(data: Published, dataset: str) -> Table:
    """Return one table: rows model × loss, columns rules, (mDice, mIoU) × .01."""
    cells = {(c.model, c.loss, c.predictor): c for c in data.cells if c.dataset == dataset}
    rows = []
    for model, loss in dict.fromkeys((m, lo) for m, lo, _ in cells):
        row = [cells[model, loss, rule] for rule in COLUMNS[dataset]]
        head = row_labels(data, row)
        rows.append((*head, *(_layout(data, cell) for cell in row)))
    return Table(
        name=f"published-{dataset}",
        title=f"{DATASETS[dataset]}: published (mDice, mIoU) × .01",
        head=("Model", "Loss", *heads(dataset)),
        rows=tuple(rows),
        labels=2,
        parts=("mDice", "mIoU"),
        notes=tuple(notes(data, cells.values())),
        marks=marks(data, cells.values(), "table"),
    )


def heads(dataset: str) -> tuple[str, ...]:
    """Return the column titles; with two classes, threshold and argmax are one column."""
    if "max" not in COLUMNS[dataset]:
        return ("Threshold/Argmax", HEADS["rankdice"])
    return tuple(HEADS[rule] for rule in COLUMNS[dataset])


def row_labels(data: Published, row: Sequence[PublishedCell]) -> tuple[Cell, Cell]:
    """Return model and loss of a row as the paper prints them, with the marks of the whole row."""
    first = row[0]
    model = f"{MODELS[first.model]} ({first.backbone})"
    return label(model, marks(data, row, "model")), label(LOSSES[first.loss], marks(data, row, "loss"))


def marks(data: Published, cells: Iterable[PublishedCell], scope: str) -> tuple[str, ...]:
    """Return the marks of one scope that concern any of the cells."""
    cells = list(cells)
    return tuple(e.mark for e in data.errata if e.scope == scope and any(map(e.concerns, cells)))


def notes(data: Published, cells: Iterable[PublishedCell]) -> list[Note]:
    """Return the notes of a table, with the logged values of cells that differ from their logs."""
    cells, found = list(cells), []
    for erratum in data.errata:
        concerned = [cell for cell in cells if erratum.concerns(cell)]
        if concerned:
            found.append(
                Note(erratum.mark, erratum.reason + (_logged(data, concerned) if erratum.show_log else ""))
            )
    return found


def _logged(data: Published, cells: Sequence[PublishedCell]) -> str:
    """Return the logged values of the cells as text; several cells are named."""
    texts = []
    for cell in cells:
        log = data.logs[cell.log]
        name = f"{MODELS[cell.model]} {LOSSES[cell.loss]} {cell.predictor} " if len(cells) > 1 else ""
        texts.append(f"{name}({100 * log['mean_dice']:.1f}, {100 * log['mean_iou']:.1f})")
    return f" {', '.join(texts)}."


def _layout(data: Published, cell: PublishedCell) -> Cell:
    bold = (cell.bold,) * len(cell.values)
    return Cell(cell.values, bold, marks(data, [cell], "cell"))
