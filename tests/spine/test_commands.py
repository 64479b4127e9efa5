"""The commands as a person runs them, in processes of their own.

They are forked from a process that has imported torch, which takes seconds. Help, an error and a slow test start from
nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.base import spread
from scripts.analysis.scores import scores_from_counts
from tests.trainers.forked import ROOT, begin
from tests.trees import make_folder

SMALL = ("experiment=smoke", "trainer.panels=1")


def call(
    *arguments: str, cwd: Path, expect: int = 0, lines: int = 1, fork: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in `cwd`, in a forked process or in one started from nothing."""
    name, *rest = arguments
    if fork:
        done = forked(name, rest, cwd)
    else:
        command = [sys.executable, str(ROOT / name), *rest]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == expect, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    if expect == 2:
        assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) <= lines, done.stderr
    return done


def forked(name: str, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a forked process."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = begin(name, *arguments, log=out, errors=err, cwd=cwd)
        process.join()
        return subprocess.CompletedProcess([name], process.exitcode or 0, out.read_text(), err.read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small finished run in it."""
    folder = tmp_path_factory.mktemp("saved")
    call("train.py", *SMALL, f"save_dir={folder}", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def run(trained: Path) -> Path:
    return trained / "synthetic" / "tiny" / "ce" / "seed0"


def test_a_run_leaves_what_it_promises(run: Path) -> None:
    names = ("config.yaml", "metrics.jsonl", "provenance.json", "checkpoint-epoch2.pth", "best_model.pth", "last.pth")
    assert all((run / name).stat().st_size > 0 for name in names)
    assert list((run / "tensorboard").glob("events.*"))
    provenance = json.loads((run / "provenance.json").read_text())
    assert {"git_sha", "versions", "seed", "command", "data"} <= set(provenance)


def test_checkpoints_hold_plain_containers(run: Path) -> None:
    torch.load(run / "last.pth", weights_only=True)


def test_the_same_command_again_does_nothing(trained: Path, run: Path) -> None:
    before = (run / "last.pth").stat().st_mtime_ns
    done = call("train.py", *SMALL, f"save_dir={trained}", cwd=trained)
    assert "finished before" in done.stdout and (run / "last.pth").stat().st_mtime_ns == before


def test_another_configuration_in_the_same_place_is_rejected(trained: Path) -> None:
    done = call("train.py", *SMALL, f"save_dir={trained}", "optimizer.lr=0.5", cwd=trained, expect=2)
    assert "optimizer.lr: 0.002 -> 0.5" in done.stderr and "suffix=" in done.stderr


def test_the_folder_of_a_run_without_a_checkpoint_takes_another_configuration(tmp_path: Path) -> None:
    """Images of two sizes need a crop. Rows of a first epoch that a kill left are replaced too."""
    root = make_folder(tmp_path, size=(40, 32))
    for place in ("images/case0.jpg", "masks/case0.png"):
        with Image.open(root / place) as image:
            image.crop((0, 0, 36, 30)).save(root / place)
    train = ["train.py", "dataset=folder", f"dataset.root={root}", "dataset.num_classes=2", "model=tiny", "epochs=1"]
    train += ["trainer.panels=0", f"save_dir={tmp_path}/saved", "batch_size=5"]
    assert "Fix: set dataset.crop" in call(*train, "dataset.crop=null", cwd=tmp_path, expect=2).stderr
    run = next((tmp_path / "saved").rglob("config.yaml")).parent
    (run / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "epoch": 7, "loss": 1.0}\n')
    call(*train, "dataset.crop=32", cwd=tmp_path)
    assert "crop: 32" in (run / "config.yaml").read_text()
    assert '"epoch": 7' not in (run / "metrics.jsonl").read_text()
    (run / "best_model.pth").rename(run / "results")  # results without a checkpoint belong to their configuration
    for path in run.glob("*.pth"):
        path.unlink()
    assert "crop: 32 -> 24" in call(*train, "dataset.crop=24", cwd=tmp_path, expect=2).stderr


def test_damaged_validation_images_stop_a_new_run_also_with_skip(tmp_path: Path) -> None:
    """A damaged training image is skipped. One of the two validation images is not in the sample of 32."""
    root = make_folder(tmp_path, count=102)
    names = (root / "val.txt").read_text().split()
    unsampled = next(index for index in range(len(names)) if index not in spread(len(names), 32))
    bad, train = {names[unsampled], names[spread(len(names), 32)[0]]}, (root / "train.txt").read_text().split()[1]
    for name in (*bad, train):
        path = root / "images" / f"{name}.jpg"
        path.write_bytes(path.read_bytes()[:-300])
    command = ["train.py", "dataset=folder", f"dataset.root={root}", "dataset.num_classes=2", "model=tiny", "epochs=1"]
    command += ["dataset.crop=32", "trainer.panels=0", f"save_dir={tmp_path}/saved", "on_error=skip"]
    done = call(*command, cwd=tmp_path, expect=2, lines=5)
    first, *lines = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert "val has 2 faults" in first and all(any(f"{n}.jpg" in line for line in lines[:2]) for n in bad)
    assert "on_error=skip applies to training images only" in lines[2] and "epoch" not in done.stderr
    assert not list((tmp_path / "saved").rglob("config.yaml"))
    (root / "val.txt").write_text("\n".join(name for name in names if name not in bad))
    assert f"{train}.jpg" in call(*command, cwd=tmp_path).stderr


def test_a_damaged_validation_image_that_comes_later_is_not_skipped(tmp_path: Path) -> None:
    """The steps of the epoch are saved: the same command repeats the validation."""
    root = make_folder(tmp_path)
    path = root / "images" / "case2.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    command = ["train.py", "dataset=folder", f"dataset.root={root}", "dataset.num_classes=2", "model=tiny", "epochs=1"]
    command += ["dataset.crop=32", "trainer.panels=0", f"save_dir={tmp_path}/saved", "on_error=skip", "verify=false"]
    assert "case2.jpg" in call(*command, cwd=tmp_path, expect=2).stderr
    done = call(*command, cwd=tmp_path, expect=2)
    assert "case2.jpg" in done.stderr and "resuming after epoch 0, step" in done.stdout


def test_a_training_that_diverges_says_what_to_lower_and_the_folder_takes_it(tmp_path: Path) -> None:
    done = call("train.py", *SMALL, f"save_dir={tmp_path}", "optimizer.lr=1e9", cwd=tmp_path, expect=3)
    assert "Fix: use a lower optimizer.lr or trainer.clip_norm=1." in done.stderr
    call("train.py", *SMALL, f"save_dir={tmp_path}", "optimizer.lr=0.002", cwd=tmp_path)


def test_other_masks_under_the_same_names_are_another_run(tmp_path: Path) -> None:
    """Masks of the same names and sizes; then another meaning of the values in them."""
    root = make_folder(tmp_path)
    table, mask = root / "classes.yaml", root / "masks" / "case0.png"
    with Image.open(mask) as image:
        before = np.array(image)
    Image.fromarray(before).save(mask, compress_level=0)  # one size for any content
    train = ["train.py", "dataset=folder", f"dataset.root={root}", "dataset.num_classes=2", "model=tiny", "epochs=1"]
    train += ["dataset.crop=32", "trainer.panels=0", f"save_dir={tmp_path}/saved"]
    call(*train, cwd=tmp_path)
    Image.fromarray(1 - before).save(mask, compress_level=0)
    assert "checksum of train" in call(*train, cwd=tmp_path, expect=2).stderr
    Image.fromarray(before).save(mask, compress_level=0)
    assert "finished before" in call(*train, cwd=tmp_path).stdout
    table.write_text("classes: [{name: background, value: 1}, {name: lesion, value: 0}]\n")
    assert "checksum of train" in call(*train, cwd=tmp_path, expect=2).stderr


@pytest.fixture(scope="module")
def scored(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all rules on the validation images."""
    out = tmp_path_factory.mktemp("scored")
    call("test.py", "-r", str(run / "checkpoint-epoch2.pth"), "-p", "all", "split=val", "--out", str(out), cwd=out)
    return out


def test_testing_equals_the_validation_inside_training(run: Path, scored: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {row["kind"]: row for row in rows if row["kind"].startswith("val_") and row["epoch"] == 2}
    for rule in ("T", "max", "rankdice"):
        scores = json.loads((scored / f"{rule}.json").read_text())["scores"]
        for key in ("mean_dice", "mean_iou", "test_loss", "pixel_accuracy", "ece"):
            assert scores[key] == pytest.approx(last[f"val_{rule}"][key], abs=1e-12, nan_ok=True), (rule, key)


def test_train_test_table(trained: Path, run: Path, tmp_path: Path) -> None:
    arguments = ("-r", str(run / "best_model.pth"), "-p", "rankdice", "split=test", "-p", "T")
    done = call("test.py", *arguments, cwd=tmp_path)
    assert "## TESTING Results for Model: tiny + Loss: ce + predict: rankdice ##" in done.stdout
    assert "Mean_Dice" in done.stdout and "predictor" in done.stdout
    result = json.loads((run / "results" / "rankdice.json").read_text())
    assert result["dataset"]["num_images"] == len(result["images"])
    table = call("scripts/paper_tables.py", "--saved", str(trained), cwd=tmp_path)
    assert f"{100 * result['scores']['mean_dice']:.1f}" in table.stdout


@pytest.mark.slow
def test_training_and_testing_from_nothing(tmp_path: Path) -> None:
    call("train.py", *SMALL, f"save_dir={tmp_path}", cwd=tmp_path, fork=False)
    checkpoint = tmp_path / "synthetic" / "tiny" / "ce" / "seed0" / "best_model.pth"
    assert "Mean_Dice" in call("test.py", "-r", str(checkpoint), "-p", "T", cwd=tmp_path, fork=False).stdout


def test_calibrated_scores_have_a_folder_and_rows_of_their_own(trained: Path, run: Path) -> None:
    score = ("test.py", "-r", str(run / "best_model.pth"), "-p", "T", "-p", "max")
    for change in (["temperature=fit"], ["loss=focal", "correct_focal=true"], ["threshold=0.3"]):
        call(*score, *change, cwd=trained)
    call(*score, cwd=trained)
    folders = ("calibrated", "focal_corrected", "threshold_0.3", "")
    read = {name: json.loads((run / "results" / name / "T.json").read_text()) for name in folders}
    assert [read[name]["temperature"] == 1 for name in folders] == [False, True, True, True]
    assert read["calibrated"]["temperature_fitted_on"] != read["calibrated"]["dataset"]["fingerprint"]
    assert len({one["config_hash"] for one in read.values()}) == 4
    table = call("scripts/paper_tables.py", "--saved", str(trained), cwd=trained).stdout
    for row in ("CE, calibrated", "Focal, corrected", "CE, T at 0.3"):
        assert f"| {row}<sup>" in table, table
    assert "refused" not in table


def test_options_of_a_rule_have_a_folder_and_rows_of_their_own(trained: Path, run: Path) -> None:
    score = ("test.py", "-r", str(run / "best_model.pth"), "-p", "T_fit")
    call(*score, "-p", "T", cwd=trained)
    call(*score, "predictor.per_class=true", cwd=trained)
    folders = ("", "T_fit_per_class_true")
    usual, other = (json.loads((run / "results" / name / "T_fit.json").read_text()) for name in folders)
    assert type(usual["fitted"]["at"]) is float and len(other["fitted"]["at"]) == len(other["classes"])
    assert "options" not in usual and other["options"] == {"T_fit": {"per_class": True}}
    assert usual["config_hash"] != other["config_hash"]
    same = json.loads((run / "results" / "T.json").read_text())
    assert same["config_hash"] == usual["config_hash"]
    table = call("scripts/paper_tables.py", "--saved", str(trained), cwd=trained).stdout
    assert "| CE, T_fit per_class=True<sup>" in table, table


def test_a_fault_of_the_protocol_has_a_folder_of_its_own_and_is_in_the_record(trained: Path, run: Path) -> None:
    score = ("test.py", "-r", str(run / "best_model.pth"), "-p", "T", "protocol=paper")
    call(*score, cwd=trained)
    call(*score, "protocol.legacy_bce_iou=true", cwd=trained)
    tables = [run / "results" / "paper" / name / "T.csv" for name in ("", "protocol_legacy_bce_iou_true")]
    usual, halved = (json.loads(path.with_suffix(".json").read_text()) for path in tables)
    assert usual["config_hash"] != halved["config_hash"]
    assert halved["scores"]["mean_iou"] == pytest.approx(halved["scores"]["mean_dice"] / 2, abs=1e-3)
    for path, record in zip(tables, (usual, halved), strict=True):  # as `paper_tables.py --verify` computes them
        again = scores_from_counts(path, record)
        assert again == pytest.approx({key: record["scores"][key] for key in again}, abs=1e-9)


def test_the_rule_of_an_override_is_scored(run: Path, tmp_path: Path) -> None:
    call("test.py", "-r", str(run / "best_model.pth"), "predictor=max", "--out", str(tmp_path), cwd=tmp_path)
    assert {path.name for path in tmp_path.glob("*.json")} == {"max.json"}


def test_fitted_rules_are_scored_stored_and_used_again(run: Path, tmp_path: Path) -> None:
    score = ("test.py", "-r", str(run / "last.pth"), "-p", "all", "-p", "auto", "gate=fit", "calibrate=class")
    first = call(*score, cwd=tmp_path)
    fitted = json.loads((run / "last.fitted.json").read_text())
    assert "calibrate=class" in first.stdout and "T_fit: threshold" in first.stdout and "auto:" in first.stdout
    call(*score, cwd=tmp_path)
    assert json.loads((run / "last.fitted.json").read_text()) == fitted
    folder = run / "results" / "of_last" / "calibrated_class_gate_fit"
    rules = ("T", "T_fit", "max", "rankdice", "rankiou", "pooled_dice", "auto")
    read = {rule: json.loads((folder / f"{rule}.json").read_text()) for rule in rules}
    for rule, record in read.items():
        assert ("fitted" in record) == (rule not in ("T", "max")), rule
        assert len(record["image_confidence"]) == len(record["images"]) and record["gate"] == "fit"
        assert len(record["calibration"]["bias"]) == len(record["classes"]) == len(record["scores"]["volume_ratio"])
        assert all(0 <= value <= 1 for value in record["image_confidence"])
    assert read["auto"]["fitted"]["rule"] in ("T", "max", "T_fit", "rankdice") and read["auto"]["fitted"]["why"]
    rows = (folder / "rankdice.csv").read_text().splitlines()
    assert rows[0].endswith(",confidence") and all(0 <= float(row.split(",")[-1]) <= 1 for row in rows[1:])


def test_confidence_of_two_splits(run: Path, tmp_path: Path) -> None:
    command = ("scripts/confidence.py", "-r", str(run / "last.pth"), "--resplits", "5")
    done = call(*command, "--alpha", "0.5", "--out", str(tmp_path), cwd=tmp_path)
    assert "AURC" in done.stdout and "coverage" in done.stdout
    found = json.loads((tmp_path / "confidence.json").read_text())
    aurc = {name: one["aurc"] for name, one in found["aurc"].items()}
    assert min(aurc.values()) == aurc["oracle"] and 0 <= found["coverage"] <= 1
    assert (tmp_path / "confidence.svg").read_text().lstrip().startswith("<?xml")
    kinds = [entry["kind"] for entry in json.loads((run / "last.fitted.json").read_text())["entries"]]
    assert "margin 0.5" in kinds
    for bad, named in (("--alpha=1.5", "alpha"), ("--alpha=0.001", "alpha=0.001"), ("--on=val", "same images")):
        assert named in call(*command, "--out", str(tmp_path), bad, cwd=tmp_path, expect=2).stderr


def test_rules_that_need_validation_images_say_so(run: Path, tmp_path: Path) -> None:
    for words in (("-p", "T_fit"), ("-p", "auto"), ("calibrate=class",), ("gate=fit",)):
        done = call(
            "test.py", "-r", str(run / "checkpoint-epoch2.pth"), *words, "dataset.splits.val=null",
            "--out", str(tmp_path), cwd=tmp_path, expect=2,
        )  # fmt: skip
        assert "validation split" in done.stderr and "dataset.splits.val" in done.stderr
    for bad, named in (("gate=0.4", "gate="), ("calibrate=scalar", "calibrate=")):
        done = call("test.py", "-r", str(run / "last.pth"), bad, "--out", str(tmp_path), cwd=tmp_path, expect=2)
        assert named in done.stderr
    both = ("temperature=0.7", "calibrate=class")
    assert "temperature=0.7" in call("test.py", "-r", str(run / "last.pth"), *both, cwd=tmp_path, expect=2).stderr


def test_rules_are_scored_on_the_same_probabilities_alone_or_together(run: Path, scored: Path, tmp_path: Path) -> None:
    command = ("test.py", "-r", str(run / "checkpoint-epoch2.pth"), "-p", "T", "split=val", "--out", str(tmp_path))
    call(*command, cwd=tmp_path)
    assert (tmp_path / "T.csv").read_text() == (scored / "T.csv").read_text()


def test_help_is_worth_reading_and_imports_nothing_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # lists on stderr what is imported
    train, test = (call(name, "--help", cwd=tmp_path, fork=False) for name in ("train.py", "test.py"))
    assert "dataset: " in train.stdout and "python train.py experiment=" in train.stdout
    assert "--multirun" in train.stdout and "rankdice" in test.stdout and "examples:" in test.stdout
    for done in (train, test):
        modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert not modules & {"torch._dynamo", "torchvision", "timm", "segmentation_models_pytorch"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["loss=cee"], ["loss=cee", "did you mean ce", "focal"]),
        (["optimizer.lrr=1"], ["optimizer.lrr", "did you mean lr"]),
        (["predictor=rankdise"], ["rankdice"]),
        (["device=cuda"], ["cuda", "device=cpu"]),
        (["trainer.precision=fp8"], ["fp8", "bf16"]),
        (["batch_size=0"], ["batch_size"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_bad_training_input_is_one_line(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    command = ("train.py", *SMALL, f"save_dir={tmp_path}", *arguments)
    done = call(*command, cwd=tmp_path, expect=2, fork=words[0] != "loss=cee")
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("sweep", [(), ("--multirun",)], ids=["run", "sweep"])
def test_a_rejected_configuration_leaves_no_folder(sweep: tuple[str, ...], tmp_path: Path) -> None:
    call("train.py", *sweep, *SMALL, f"save_dir={tmp_path}/saved", "epochs=0", cwd=tmp_path, expect=2, lines=2)
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("saved", "multirun.yaml")]


def test_a_missing_data_set_shows_the_tree_that_is_expected(tmp_path: Path) -> None:
    arguments = (*SMALL, f"save_dir={tmp_path}", "dataset=kvasir_seg", "dataset.root=/nowhere/kvasir")
    done = call("train.py", *arguments, cwd=tmp_path, expect=2, lines=30)
    assert "/nowhere/kvasir" in done.stderr.splitlines()[0] and "images" in done.stderr


def test_bad_checkpoints_are_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>not found</html>")
    (tmp_path / "cut.pth").write_bytes((run / "last.pth").read_bytes()[:2000])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pth")
    for name in ("page.pth", "cut.pth", "other.pth", "absent.pth"):
        command = ("test.py", "-r", str(tmp_path / name), "-p", "T")
        done = call(*command, cwd=tmp_path, expect=2)
        assert name in done.stderr or "checkpoint" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "rankdise"], ["rankdise", "rankdice"]),
        (["-p", "T", "splitt=val"], ["splitt", "split"]),
        (["-p", "T", "split=valid"], ["valid", "train, val, test"]),
        (["-p", "T", "--device", "cuda"], ["cuda"]),
        (["-p", "T", "protocol=papper"], ["paper"]),
        (["-p", "rankdice", "device=cuda"], ["device=cuda", "--device cuda"]),
        (["-p", "T", "-p", "max", "predictor.at=0.3"], ["predictor.at", "predictor=RULE"]),
        (["correct_focal=true"], ["correct_focal=true", "loss=ce", "calibrate=temperature"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_bad_testing_input_is_one_line(run: Path, arguments: list[str], words: list[str], tmp_path: Path) -> None:
    done = call("test.py", "-r", str(run / "best_model.pth"), *arguments, cwd=tmp_path, expect=2)
    assert all(word in done.stderr for word in words), done.stderr
