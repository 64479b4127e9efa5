"""The published tables: cell for cell as printed, in three forms, and as the experiments expect them."""

from __future__ import annotations

import csv
import json
import re

import pytest
import yaml

from scripts.tables.layout import Cell, Table, csv_tables, latex, markdown
from scripts.tables.published import COLUMNS, load_published, published_tables, read_expected

DATASETS = {"CityScapes": "cityscapes", "VOC": "voc2012", "kvasirSEG": "kvasir_seg"}


@pytest.mark.golden
def test_published_tables_reproduce_every_printed_cell_and_its_bold(recordings):
    recorded = json.loads((recordings / "full" / "tables.json").read_text())
    tables = dict(zip(COLUMNS, published_tables(load_published()), strict=True))
    laid = {name: iter([c for row in t.rows for c in row[t.labels :]]) for name, t in tables.items()}
    for cell in recorded:
        ours = next(laid[DATASETS[cell["dataset"]]])
        printed = cell["raw"].replace("*", "").replace(". ", ", ")  # one cell has a full stop for a comma
        assert ours.text == printed, cell
        assert all(ours.bold) == cell["bold"] if cell["mDice"] is not None else True, cell
    assert len(recorded) == 132
    assert all(next(rest, None) is None for rest in laid.values())


@pytest.mark.golden
def test_logs_are_the_published_logs(recordings):
    recorded = json.loads((recordings / "full" / "published_logs.json").read_text())
    logs = list(load_published().logs.values())
    assert len(logs) == len(recorded) == 136
    for ours, theirs in zip(logs, recorded, strict=True):
        assert ours["mean_dice"] == theirs["Mean_Dice"] and ours["test_loss"] == theirs["test_loss"]
        assert ours["class_iou"] == list(theirs["Class_IoU"].values())
        assert ours["class_dice"] == list(theirs["Class_Dice"].values())


def test_every_disagreement_between_table_and_log_carries_a_mark():
    data = load_published()
    for cell in data.cells:
        own = {e.mark for e in data.errata if e.scope == "cell" and e.concerns(cell)}
        if cell.mdice is None:
            assert bool(own & {"k", "f"}) == bool(cell.log), cell
            continue
        log = data.logs[cell.log]
        agrees = abs(100 * log["mean_dice"] - cell.mdice) < 0.051 and abs(100 * log["mean_iou"] - cell.miou) < 0.051
        assert bool(own & {"b", "c", "d"}) != agrees, cell
        assert ("a" in own) == (abs(cell.miou - cell.mdice / 2) < 0.051), cell


def test_counts_of_the_errata():
    data = load_published()
    count = {e.mark: sum(map(e.concerns, data.cells)) for e in data.errata}
    assert count["a"] == 26 and count["b"] == count["c"] == 1 and count["d"] == 6
    assert count["k"] + count["f"] == 25
    assert len({e.mark for e in data.errata}) == len(data.errata)
    assert {e.scope for e in data.errata} == {"cell", "loss", "model", "table"}


def test_every_mark_of_a_table_has_its_reason_and_every_reason_its_mark():
    for table in published_tables(load_published()):
        used = {mark for row in table.rows for cell in row for mark in cell.marks} | set(table.marks)
        assert used == set(table.notes)


def test_markdown_latex_and_csv_hold_the_same_cells():
    for table in published_tables(load_published()):
        cells = [[cell.text for cell in row[table.labels :]] for row in table.rows]
        text = re.sub(r"<sup>.*?</sup>|\*", "", markdown(table))
        lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
        assert [re.split(r" *\| *", line.strip("| "))[-len(cells[0]) :] for line in lines[1:]] == cells
        tex = latex(table)
        bare = re.sub(r"\\textbf\{([\d.]+)\}", r"\1", re.sub(r"\$\^\{[\w,]+\}\$", "", tex))
        body = [line.removesuffix(r" \\").split(" & ")[2:] for line in bare.splitlines() if " & " in line]
        assert body[1:] == cells
        assert tex.count(r"\textbf") == sum(b for row in table.rows for c in row for b in c.bold)
        assert tex.count("{") == tex.count("}") and tex.count(r"\midrule") == 3
        rows = list(csv.DictReader(csv_tables([table]).splitlines()))
        for row, line in zip(rows, cells, strict=True):
            pairs = [(row[f"{head} mDice"], row[f"{head} mIoU"]) for head in table.head[2:]]
            assert [f"({a}, {b})" if b else a for a, b in pairs] == line


def test_latex_escapes_what_latex_would_read():
    table = Table("t", "50% & a_b", ("x",), ((Cell(("±1 #",)),),), 0)
    text = latex(table)
    assert r"50\% \& a\_b" in text and r"$\pm$1 \#" in text


def test_expectations_of_the_experiments_are_the_logs(root):
    data = load_published()
    found = {e.dataset: e for e in read_expected(root / "configs") if e.path.parent.name == "paper"}
    assert set(found) == set(COLUMNS)
    for dataset, expected in found.items():
        held = {(m, lo, r): v for m, a in expected.scores.items() for lo, b in a.items() for r, v in b.items()}
        logged = {
            (c.model, c.loss, c.predictor): data.logs[c.log] for c in data.cells if c.dataset == dataset and c.log
        }
        assert held.keys() == logged.keys()
        for key, (dice, iou) in held.items():
            assert dice == pytest.approx(100 * logged[key]["mean_dice"], abs=1e-9)
            halved = key[1] in ("bce", "b_soft_dice")
            assert iou is None if halved else iou == pytest.approx(100 * logged[key]["mean_iou"], abs=1e-9)


@pytest.mark.parametrize("dataset", list(COLUMNS))
def test_the_grid_of_an_experiment_covers_the_published_cells(root, dataset):
    text = yaml.safe_load((root / "configs" / "experiment" / "paper" / f"{dataset}.yaml").read_text())
    params = text["hydra"]["sweeper"]["params"]
    grid = {(m, lo) for m in params["model"].split(",") for lo in params["loss"].split(",")}
    published = {(c.model, c.loss) for c in load_published().cells if c.dataset == dataset}
    assert text["hydra"]["mode"] == "MULTIRUN" and len(grid) == 18
    assert published <= grid and len(published) == (12 if dataset == "kvasir_seg" else 18)
