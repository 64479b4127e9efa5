"""The tables of our results: from result files, rejected results, differences to the published, checks, markers."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

from scripts.paper_tables import inject, main
from scripts.tables.layout import csv_tables, latex, markdown
from scripts.tables.published import (
    COLUMNS,
    Expected,
    compared_tables,
    load_published,
    read_expected,
    violations,
)
from scripts.tables.results import group_seeds, our_tables, read_results
from tests.exits import exit_code
from trainers.text import csv_text


def record(**changes) -> dict:
    """A result file as test.py writes it; a key `a__b` changes entry b of entry a."""
    base = {
        "format": 1,
        "predictor": "T",
        "protocol": "paper",
        "dataset": {"name": "cityscapes", "split": "val", "fingerprint": "f00d", "num_images": 500},
        "model": "pspnet",
        "model_detail": {"weights": None},
        "loss": "ce",
        "link": "softmax",
        "seed": 0,
        "checkpoint": {"file": "best_model.pth", "epoch": 3, "sha256": "aa"},
        "classes": ["road", "person"],
        "scored": [0, 1],
        "scores": {"mean_dice": 0.5, "mean_iou": 0.4},
        "images": ["a", "b"],
        "config_hash": "c0de",
    }
    for key, value in changes.items():
        node, name = base, key
        if "__" in key:
            outer, name = key.split("__")
            node = base[outer]
        node[name] = value
    return base


@pytest.fixture
def saved(tmp_path):
    """An empty folder of runs and a function that puts a result into it."""
    folder = tmp_path / "saved"
    folder.mkdir()

    def put(config=None, where="", **changes) -> Path:
        data = record(**changes)
        run = folder / where / data["dataset"]["name"] / data["model"] / data["loss"] / f"seed{data['seed']}"
        path = run / "results" / ("paper" if data["protocol"] == "paper" else "") / f"{data['predictor']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))
        if config:
            (run / "config.yaml").write_text(yaml.safe_dump(config))
        return path

    put.folder = folder
    return put


def tables_of(folder):
    results, problems = read_results(folder)
    return our_tables(group_seeds(results), problems)


def table_of(saved):
    (table,) = tables_of(saved.folder)
    return table


# --- ours


def test_seeds_become_mean_and_half_range_and_the_best_is_bold(saved):
    for seed, dice in enumerate((0.50, 0.53, 0.512)):
        saved(seed=seed, checkpoint__sha256=f"s{seed}", scores__mean_dice=dice)
        saved(
            seed=seed,
            checkpoint__sha256=f"s{seed}",
            predictor="rankdice",
            scores__mean_dice=dice + 0.02,
            scores__mean_iou=0.3,
        )
    table = table_of(saved)
    assert table.name == "ours-paper" and table.head[3:] == ("Threshold (at 0.5)", "mRankDice")
    (row,) = table.rows
    assert "3 seeds" in row[2].text
    assert row[3].text == "(51.40 ± 1.50, 40.00 ± 0.00)" and row[3].bold == (False, True)
    assert row[4].text == "(53.40 ± 1.50, 30.00 ± 0.00)" and row[4].bold == (True, False)


def test_equal_as_printed_is_bold_alike(saved):
    saved(scores__mean_dice=0.500001)
    saved(predictor="max", scores__mean_dice=0.500002)
    table = table_of(saved)
    assert table.rows[0][3].bold == table.rows[0][4].bold == (True, True)


def test_missing_cells_say_so(saved):
    saved()
    saved(predictor="rankdice")
    saved(loss="focal")
    table = table_of(saved)
    assert [row[4].text for row in table.rows] == ["(50.00, 40.00)", "missing"]


def test_runs_of_the_grid_that_were_not_made_are_missing_too(saved):
    saved(model="pspnet", loss="ce")
    saved(model="pspnet", loss="focal", checkpoint__sha256="b")
    saved(model="fcn8", loss="ce", checkpoint__sha256="c")
    saved(model="fcn8", loss="bce", dataset__name="voc2012", checkpoint__sha256="d")
    table = table_of(saved)
    found = {(row[0].text.split()[0], row[1].text, row[2].text): row[3].text for row in table.rows}
    absent = {key for key, text in found.items() if text == "missing"}
    assert len(found) == 5 and absent == {("Cityscapes", "FCN8", "Focal")}


def test_calibrated_scores_have_rows_of_their_own(saved):
    """Fitted temperatures differ from seed to seed and are averaged; raw and calibrated scores never are."""
    for seed in (0, 1):
        run = {"seed": seed, "loss": "focal", "checkpoint__sha256": f"s{seed}"}
        saved(**run, temperature=1.0, scores__mean_dice=0.5)
        fitted = record(**run, temperature=1.2 + seed, temperature_fitted_on="abcd", scores__mean_dice=0.6 + seed / 10)
        corrected = record(**run, correct_focal=True, config_hash="c", scores__mean_dice=0.7)
        here = saved.folder / "cityscapes" / "pspnet" / "focal" / f"seed{seed}" / "results" / "paper"
        for name, data in (("calibrated", fitted), ("focal_corrected", corrected)):
            (here / name).mkdir()
            (here / name / "T.json").write_text(json.dumps(data))
    table = table_of(saved)
    found = {row[2].text: (row[3].text, row[2].marks) for row in table.rows}
    assert found == {
        "Focal (2 seeds)": ("(50.00 ± 0.00, 40.00 ± 0.00)", ()),
        "Focal, calibrated (2 seeds)": ("(65.00 ± 5.00, 40.00 ± 0.00)", ("1",)),
        "Focal, corrected (2 seeds)": ("(70.00 ± 0.00, 40.00 ± 0.00)", ("2",)),
    }
    assert "temperature fitted on the validation images." in table.notes["1"]
    assert "bias of the focal loss" in table.notes["2"]
    _, rows = _both(saved.folder)
    assert rows["PSPNet", "Focal"][1].text == "(50.00 ± 0.00, 40.00 ± 0.00)"  # the paper's are raw


def test_a_temperature_fitted_on_the_scored_images_says_so(saved):
    saved(temperature=1.2, temperature_fitted_on="f00d")
    saved(seed=1, temperature=1.2, temperature_fitted_on="beef", checkpoint__sha256="bb")
    table = table_of(saved)
    assert [row[2].text for row in table.rows] == ["CE, calibrated"] * 2
    assert sum("which are the images scored" in note for note in table.notes.values()) == 1


def test_temperatures_fitted_on_unlike_images_are_rejected(saved):
    saved(temperature=1.2, temperature_fitted_on="one")
    saved(seed=1, temperature=1.3, temperature_fitted_on="two", checkpoint__sha256="bb")
    table = table_of(saved)
    assert table.rows[0][3].text == "rejected" and "images of the temperature one against two" in table.notes["2"]


def test_other_temperatures_and_thresholds_are_told_apart(saved):
    saved(temperature=2.0)
    table = table_of(saved)
    assert table.rows[0][2].text == "CE, temperature 2"
    saved(temperature=1.0, threshold=0.3)
    table = table_of(saved)
    assert table.rows[0][2].text == "CE, T at 0.3"


def test_protocols_and_collections_stay_apart(saved):
    saved(scores__mean_dice=0.1)
    saved(protocol="corrected", scores__mean_dice=0.2)
    saved(where="demo", scores__mean_dice=0.3)
    found = {t.name: t.rows[0][3].values[0] for t in tables_of(saved.folder)}
    assert found == {"ours-paper": "10.00", "ours-corrected": "20.00", "demo-paper": "30.00"}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dataset__fingerprint": "beef"}, "data fingerprint f00d against beef"),
        ({"dataset__num_images": 80}, "number of images 500 against 80"),
        ({"config_hash": "other"}, "configuration c0de against other"),
        ({"checkpoint__file": "last.pth"}, "checkpoint best_model.pth against last.pth"),
        ({"model_detail": {"weights": "x"}}, "model {'weights': None} against {'weights': 'x'}"),
    ],
)
def test_unlike_results_are_rejected_with_the_difference(saved, change, words, capsys):
    saved()
    saved(seed=1, checkpoint__sha256="bb", **change)
    table = table_of(saved)
    assert table.rows[0][3].text == "rejected"
    assert words in table.notes["1"] and "seeds 0 and 1" in table.notes["1"]
    assert main(["--saved", str(saved.folder)]) == 0
    assert words in capsys.readouterr().err


def test_the_difference_is_named_by_the_configuration_key(saved):
    saved(config={"epochs": 6, "seed": 0, "optimizer": {"lr": 0.1}})
    saved(config={"epochs": 10, "seed": 1, "optimizer": {"lr": 0.1}}, seed=1, checkpoint__sha256="bb")
    table = table_of(saved)
    assert "epochs: 6 -> 10" in table.notes["1"] and "lr" not in table.notes["1"]


def test_seed_and_path_may_differ(saved):
    saved(config={"seed": 0, "run_dir": "a", "dataset": {"root": "/x"}})
    saved(config={"seed": 1, "run_dir": "b", "dataset": {"root": "/y"}}, seed=1, checkpoint__sha256="bb")
    table = table_of(saved)
    assert table.rows[0][3].text == "(50.00 ± 0.00, 40.00 ± 0.00)"


def test_rules_of_unlike_checkpoints_are_not_compared(saved):
    saved()
    saved(predictor="rankdice", checkpoint__sha256="other", scores__mean_dice=0.9)
    table = table_of(saved)
    assert not any(any(cell.bold) for cell in table.rows[0])
    assert "checkpoints" in table.notes["1"]


def test_a_run_and_its_record_in_git_count_once(saved):
    saved()
    saved(where="results")
    assert [t.name for t in tables_of(saved.folder)] == ["results-paper"]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "not JSON"),
        ("[]", ""),
        (json.dumps({"format": 1}), "no key 'dataset'"),
        (json.dumps(record(format=2)), "format=2"),
        (json.dumps(record(scores__mean_dice=51.0)), "mean_dice is 51.0"),
    ],
)
def test_corrupt_files_are_named_skipped_and_counted(saved, text, reason, capsys):
    saved()
    bad = saved(predictor="max")
    bad.write_text(text)
    assert main(["--saved", str(saved.folder)]) == 0
    shown = capsys.readouterr()
    assert "(50.00, 40.00)" in shown.out
    assert "cityscapes/pspnet/ce/seed0/results/paper/max.json" in shown.out
    assert f"skipped: {bad}: {reason}" in shown.err and "1 result file could not be read" in shown.err
    assert "1 result file could not be read and was skipped" in shown.out


def test_a_report_next_to_recorded_results_is_not_a_result(saved, capsys):
    path = saved(where="results/kept")
    report = path.parents[2] / "report" / "report.json"
    report.parent.mkdir()
    report.write_text(json.dumps({"scores": {}, "threshold": {}}))
    assert main(["--saved", str(saved.folder)]) == 0
    shown = capsys.readouterr()
    assert "skipped" not in shown.err and "(50.00, 40.00)" in shown.out


def test_hostile_names_in_a_result_are_printed_not_interpreted(saved):
    """Protocol, model, loss and collection come from files of other people."""
    hostile = "x}\\input{/etc/passwd}|a\nb<script>"
    saved(protocol=hostile.replace("/", ""), model="=cmd()", loss="a|b\n# head")
    table = table_of(saved)
    tex, text, data = latex(table), markdown(table), csv_tables([table])
    assert "\\input" not in tex and re.search(r"\\label\{tab:[\w:.-]*\}", tex)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1 and len(rows) == 3
    assert "<script>" not in text and "\n# head" not in text
    assert any("'=cmd()" in line for line in data.splitlines()) and ",=cmd()" not in data


def test_nothing_scored_is_undefined_not_zero(saved):
    saved(scores__mean_dice=None, scores__mean_iou=None)
    table = table_of(saved)
    assert table.rows[0][3].text == "(undefined, undefined)"


def test_plain_call_writes_the_csv_too(saved, capsys):
    saved()
    assert main(["--saved", str(saved.folder)]) == 0
    rows = list(csv.reader((saved.folder / "tables.csv").read_text().splitlines()))
    assert rows[1][4:6] == ["50.00", "40.00"]


def test_without_results_no_file_is_written(tmp_path, capsys):
    assert main(["--saved", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "No results yet.\n" and not list(tmp_path.iterdir())


def test_a_folder_that_is_none_is_bad_input(tmp_path, capsys):
    assert exit_code(main, ["--saved", str(tmp_path / "none")]) == 2
    assert "--saved=" in capsys.readouterr().err


# --- both, expectations


def _both(folder, dataset="cityscapes", expected=()):
    results, _ = read_results(folder)
    table = compared_tables(load_published(), group_seeds(results), expected)[list(COLUMNS).index(dataset)]
    return table, {(row[0].text.split()[0], row[1].text): row[2:] for row in table.rows}


def test_both_shows_the_difference_in_points(saved):
    saved(scores__mean_dice=0.58, scores__mean_iou=0.49)
    saved(loss="bce", scores__mean_dice=0.5, scores__mean_iou=0.4)
    _, rows = _both(saved.folder)
    published, ours, delta = rows["PSPNet", "CE"][:3]
    assert (published.text, ours.text, delta.text) == ("(57.50, 49.60)", "(58.00, 49.00)", "(+0.50, −0.60)")
    assert rows["PSPNet", "BCE"][2].text == "(−1.40, –)"  # the printed mIoU is half the Dice
    assert rows["FCN8", "CE"][1].text == "missing"


def test_both_compares_the_paper_protocol_alone(saved):
    saved(protocol="corrected")
    _, rows = _both(saved.folder)
    assert rows["PSPNet", "CE"][1].text == "missing"


def test_no_difference_to_a_number_on_other_images(saved):
    saved(dataset__num_images=30)
    table, rows = _both(saved.folder)
    assert rows["PSPNet", "CE"][2].text == "–"
    assert any("30 images" in note for note in table.notes.values())


def test_both_takes_the_last_epoch_as_the_paper_did(saved):
    best = saved(scores__mean_dice=0.6)
    last = saved(scores__mean_dice=0.58, scores__mean_iou=0.49)
    (best.parent / "of_last").mkdir()
    last.rename(best.parent / "of_last" / last.name)
    saved(scores__mean_dice=0.6)
    _, rows = _both(saved.folder)
    assert rows["PSPNet", "CE"][2].text == "(+0.50, −0.60)"


def test_both_shows_a_nearest_network_and_says_what_differs(saved):
    saved(model="smp_pspnet-small", scores__mean_dice=0.58, scores__mean_iou=0.49)
    common = {"path": saved.folder, "dataset": "cityscapes", "protocol": "corrected", "tolerance": 1, "scores": {}}
    block = Expected(**common, paper_rows={"pspnet": {"ce": "smp_pspnet-small"}}, differs="a small encoder")
    other = Expected(**common, paper_rows={"pspnet": {"ce": "smp_not-run", "focal": "smp_pspnet-small"}}, differs="x")
    assert _both(saved.folder)[1]["PSPNet", "CE"][1].text == "missing"
    table, rows = _both(saved.folder, expected=[block, other])
    assert rows["PSPNet", "CE"][2].text == "(+0.50, −0.60)"
    (mark,) = rows["PSPNet", "CE"][1].marks
    assert table.notes[mark].endswith("smp_pspnet-small: a small encoder.")
    assert rows["PSPNet", "Focal"][1].text == "missing"
    saved(scores__mean_dice=0.6, scores__mean_iou=0.49)  # the paper's own network comes first
    assert _both(saved.folder, expected=[block])[1]["PSPNet", "CE"][2].text == "(+2.50, −0.60)"


def test_a_number_outside_its_tolerance_is_found(saved, tmp_path):
    saved(scores__mean_dice=0.58)
    folder = tmp_path / "configs" / "experiment"
    folder.mkdir(parents=True)
    block = {"dataset": "cityscapes", "protocol": "paper", "tolerance": 1.0}
    text = {"expected": {**block, "scores": {"pspnet": {"ce": {"T": [57.5, 41.5]}}}}}
    (folder / "x.yaml").write_text(yaml.safe_dump(text))
    groups = group_seeds(read_results(saved.folder)[0])
    (line,) = violations(read_expected(tmp_path / "configs"), groups)
    assert "mIoU 40.00" in line and "41.50 ± 1" in line
    text["expected"]["num_images"] = 1449
    (folder / "x.yaml").write_text(yaml.safe_dump(text))
    assert not list(violations(read_expected(tmp_path / "configs"), groups))
    text["expected"]["tolerence"] = 1
    (folder / "x.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(ValueError, match=r"x\.yaml.*expected"):
        read_expected(tmp_path / "configs")


# --- generated files


@pytest.fixture
def repository(saved, tmp_path):
    """A root with records in git, a run that is not, and a README with a marker."""
    saved(where="results")
    saved(seed=1, scores__mean_dice=0.9)
    (tmp_path / "configs" / "experiment").mkdir(parents=True)
    (tmp_path / "README.md").write_text("before\n<!-- table:ours -->\nold\n<!-- /table:ours -->\nafter\n")
    return tmp_path


def test_write_then_check_and_a_stale_file_fails(repository, capsys):
    assert main(["--check"], repository) == 1
    assert main(["--write"], repository) == 0
    first = {p: p.read_bytes() for p in repository.rglob("tables.*")}
    assert main(["--check"], repository) == 0
    capsys.readouterr()
    assert main(["--write"], repository) == 0
    assert capsys.readouterr().out == ""
    assert first == {p: p.read_bytes() for p in repository.rglob("tables.*")} and len(first) == 6
    readme = (repository / "README.md").read_text()
    assert (
        readme.startswith("before\n<!-- table:ours -->\n") and "(50.00, 40.00)" in readme and "stale text" not in readme
    )
    assert "90.00" not in readme  # a run that is not in git changes no file that is
    stale = repository / "saved" / "published" / "tables.tex"
    stale.write_text(stale.read_text() + " ")
    assert main(["--check"], repository) == 1
    assert "stale: saved/published/tables.tex" in capsys.readouterr().err


def test_check_fails_on_a_number_outside_its_tolerance(repository, capsys):
    block = {
        "dataset": "cityscapes",
        "protocol": "paper",
        "tolerance": 1.0,
        "scores": {"pspnet": {"ce": {"T": [60, None]}}},
    }
    (repository / "configs" / "experiment" / "x.yaml").write_text(yaml.safe_dump({"expected": block}))
    main(["--write"], repository)
    assert main(["--check"], repository) == 1
    assert "out of tolerance" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["<!-- table:a -->\nx", "x <!-- /table:a -->", "<!-- table:a -->\n<!-- /table:b -->"])
def test_a_lone_marker_is_rejected(text):
    with pytest.raises(ValueError, match="no partner"):
        inject(text, {"a": "t", "b": "t"})


def test_a_marker_of_no_table_names_those_there_are():
    with pytest.raises(ValueError, match=r"table:x.*a, b"):
        inject("<!-- table:x -->\n<!-- /table:x -->", {"a": "", "b": ""})


# --- evidence


@pytest.fixture
def evidence(repository, capsys):
    """A repository with one record, its counts, its manifest and its tables."""
    path = repository / "saved/results/cityscapes/pspnet/ce/seed0/results/paper/T.json"
    # a: Dice (2·3/(4+4) + 0)/2, b: 2·1/(1+2); the other averages follow from these
    rows = [("a", 0, 3, 4, 4), ("a", 1, 0, 1, 0), ("b", 0, 1, 1, 2)]
    dice = round(((6 / (8 + 1e-5) + 0) / 2 + 2 / (3 + 1e-5)) / 2, 3)
    iou = round(((3 / (5 + 1e-5) + 0) / 2 + 1 / (2 + 1e-5)) / 2, 3)
    path.write_text(json.dumps(record(scores={"mean_dice": dice, "mean_iou": iou})))
    columns = ("image", "class", "intersection", "predicted", "actual")
    path.with_suffix(".csv").write_text(csv_text([columns, *rows]))
    assert main(["--write"], repository) == 0 and main(["--verify"], repository) == 0
    capsys.readouterr()
    return repository


def test_tables_follow_from_the_counts(evidence, capsys):
    """A score that the counts do not give is found even if it is listed and the tables agree with it."""
    path = next((evidence / "saved/results").rglob("T.json"))
    content = json.loads(path.read_text())
    assert f"({100 * content['scores']['mean_dice']:.2f}," in (evidence / "saved/results/tables.md").read_text()
    content["scores"]["mean_dice"] += 0.01
    path.write_text(json.dumps(content))
    manifest = evidence / "saved/results/MANIFEST.sha256"
    manifest.write_text("".join(x for x in manifest.read_text().splitlines(True) if "T.json" not in x))
    assert main(["--write"], evidence) == 0 and main(["--check"], evidence) == 0
    assert main(["--verify"], evidence) == 1
    assert "does not follow from the counts: saved/results/tables.md" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes().replace(b"a,0,3,", b"a,0,2,")), "changed"),
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.with_name("max.csv").write_text("image\n"), "not in MANIFEST.sha256"),
        (lambda path: path.write_text(path.read_text() + "a,0,3,4,4\n"), "occurs twice"),
        (lambda path: path.write_text(path.read_text() + "c,0,3,4,4\n"), "image c is not in the record"),
        (lambda path: path.write_text(path.read_text() + "b,1,3,2,4\n"), "intersection=3"),
    ],
)
def test_a_changed_record_is_found_and_not_listed_again(evidence, change, words, capsys):
    change(next((evidence / "saved/results").rglob("T.csv")))
    assert main(["--verify"], evidence) == 1
    assert words in capsys.readouterr().err
    if words in ("changed", "missing"):  # `make tables` must not hide it
        main(["--write"], evidence)
        assert main(["--verify"], evidence) == 1
