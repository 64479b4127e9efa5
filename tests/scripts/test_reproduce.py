"""A grid from one command: what it multiplies out, skips, survives and keeps. Training is played by stand-ins."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from configs import build
from configs.errors import EXIT_BUSY
from scripts import reproduce as grid
from scripts.reproduce import Run, load_runs
from trainers.results import results_folder

ROOT = Path(__file__).resolve().parents[2]

SMALL = ("experiment=smoke", "epochs=3")


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for train.py and test.py; returns the folder of the runs. loss=bce fails, loss=lovasz is in use.

    The folder is relative, so that the tests need the same configurations, which are composed once.
    """

    def play(arguments: list[str], log: Path, threads: int | None, tick: object) -> tuple[int, str]:
        script, *rest = arguments
        if script == "test.py":
            score(Path(rest[1]), [rule for flag, rule in pairwise(rest) if flag == "-p"], rest)
            return 0, ""
        assert {"verify=false", "hydra.mode=RUN"} <= set(rest)
        cell = load_runs([word for word in rest if not word.startswith(("verify=", "hydra."))])[0]
        if cell.cfg.loss.name == "bce":
            return 3, "error: the loss is not finite"
        if cell.cfg.loss.name == "lovasz":
            return EXIT_BUSY, "error: another process (pid 1) is training"
        return train(cell)

    monkeypatch.setattr(grid, "call", play)
    monkeypatch.setattr(grid, "print_table", lambda grid: None)
    monkeypatch.chdir(tmp_path)
    return Path("saved")


def train(cell: Run) -> tuple[int, str]:
    """What train.py leaves behind."""
    cell.folder.mkdir(parents=True)
    (cell.folder / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "epoch": 1, "loss": 1.0}\n')
    OmegaConf.save(cell.cfg, cell.folder / "config.yaml", resolve=True)
    torch.save({"epoch": cell.cfg.epochs}, cell.folder / "last.pth")
    for name in (f"checkpoint-epoch{cell.cfg.epochs}.pth", "best_model.pth"):
        (cell.folder / name).write_text(f"weights of {cell}")
    return 0, ""


def score(checkpoint: Path, rules: list[str], overrides: list[str]) -> None:
    """What test.py leaves behind."""
    folder = checkpoint.parent / results_folder(
        checkpoint.name,
        "results/paper" if "protocol=paper" in overrides else "results",
        threshold=build.threshold(OmegaConf.create(OmegaConf.load(checkpoint.parent / "config.yaml"))),
        calibrated="temperature=fit" in overrides,
        focal_corrected="correct_focal=true" in overrides,
        options=build.rule_options(rules, OmegaConf.create(OmegaConf.load(checkpoint.parent / "config.yaml"))),
    )
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    for rule in rules:
        result = {"scores": {"mean_dice": 0.5}, "checkpoint": {"sha256": digest}}
        (folder / f"{rule}.json").write_text(json.dumps(result))
        (folder / f"{rule}.csv").write_text("image,class\n")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    try:
        grid.main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def test_a_grid_is_every_combination_seeds_slowest() -> None:
    found = [str(cell) for cell in load_runs(["model=tiny,smp_unet", "loss=ce,bce", "seed=0,1"])]
    expected = [f"{m}/{lo}/seed{s}" for s in (0, 1) for m in ("tiny", "smp_unet") for lo in ("ce", "bce")]
    assert found == [f"synthetic/{name}" for name in expected]


def test_an_experiment_says_what_is_swept_and_the_command_line_overrides_it() -> None:
    swept = load_runs(["experiment=paper/kvasir_seg", "model=tiny"])
    names = OmegaConf.load(ROOT / "configs/experiment/paper/kvasir_seg.yaml").hydra.sweeper.params
    assert [cell.cfg.loss.name for cell in swept] == names.loss.split(",")
    assert len(names.model.split(",")) > 1 and {cell.cfg.model.name for cell in swept} == {"tiny"}
    assert {cell.cfg.protocol.name for cell in swept} == {"paper"}


def test_two_runs_in_one_folder_are_rejected() -> None:
    with pytest.raises(ValueError, match="suffix"):
        load_runs(["optimizer.lr=0.1,0.2"])


def test_the_time_left_follows_from_the_epochs_done(
    stand_ins: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three epochs and the scoring, twice: after four of these eight, which took 40 s, another 40 s are left."""
    now, play = [0.0], grid.call

    def slowly(arguments: list[str], *more: object) -> tuple[int, str]:
        now[0] += 40.0 if arguments[0] == "train.py" else 0.0
        return play(arguments, *more)

    monkeypatch.setattr(grid, "call", slowly)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    command = ["--losses", "ce,focal", *SMALL, f"save_dir={stand_ins}", "--rules", "T", "--protocols", "corrected"]
    assert run(monkeypatch, *command) == 0
    first, second = (line for line in capfd.readouterr().out.splitlines() if "mDice" in line)
    assert first.endswith("(00:40, about 00:40 left)") and second.endswith("(00:40, about 00:00 left)")


def test_a_failed_run_is_named_and_finished_runs_are_skipped(
    stand_ins: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["--losses", "ce,bce,focal", *SMALL, f"save_dir={stand_ins}", "--rules", "T,max"]
    assert run(monkeypatch, *command) == 3
    out, err = capfd.readouterr()
    assert "3 runs, 0 finished before, 3 to do" in out and "mDice T 50.00  max 50.00" in out
    assert "1 of 3 runs failed" in err and "exit 3" in err and "the loss is not finite" in err
    assert "[3/3] synthetic/tiny/focal/seed0: mDice" in out  # went on after the failure
    assert (stand_ins / "synthetic/tiny/focal/seed0/results/paper/max.json").exists()

    before = {path: path.stat().st_mtime_ns for path in stand_ins.rglob("*") if "bce" not in str(path)}
    assert run(monkeypatch, *command) == 3
    assert "3 runs, 2 finished before, 1 to do" in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in stand_ins.rglob("*") if "bce" not in str(path)}

    # A checkpoint that changed is scored again, another configuration is not taken for this one.
    (stand_ins / "synthetic/tiny/ce/seed0/best_model.pth").write_text("better weights")
    assert run(monkeypatch, *command, "--dry-run") == 0
    assert "3 runs, 1 finished" in capfd.readouterr().out
    assert run(monkeypatch, *command, "optimizer.lr=0.5", "--dry-run") == 0
    assert "3 runs, 0 finished" in capfd.readouterr().out


def test_a_run_that_another_process_trains_is_not_a_failure(
    stand_ins: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["--losses", "lovasz,ce", *SMALL, f"save_dir={stand_ins}", "--rules", "T"]
    assert run(monkeypatch, *command) == EXIT_BUSY
    out, err = capfd.readouterr()
    assert "failed" not in out + err and "pid 1" in err and "1 of 2 runs" in err
    assert "[2/2] synthetic/tiny/ce/seed0: mDice" in out  # the other run was trained


def test_calibrated_scores_are_made_once_and_recorded(
    stand_ins: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = stand_ins.parent / "kept"
    command = ["--losses", "ce,focal", *SMALL, f"save_dir={stand_ins}", "--rules", "T"]
    assert run(monkeypatch, *command) == 0
    assert run(monkeypatch, *command, "--calibrate", "--dry-run") == 0
    assert "2 runs, 0 finished" in capfd.readouterr().out
    assert run(monkeypatch, *command, "--calibrate", "--record", str(kept)) == 0
    folders = ["", "/calibrated", "/paper", "/paper/calibrated"]
    wanted = {"ce": folders, "focal": [*folders, "/focal_corrected", "/paper/focal_corrected"]}
    for loss, expected in wanted.items():
        cell = f"synthetic/tiny/{loss}/seed0/results"
        made = {str(path.parent.relative_to(stand_ins / cell)) for path in (stand_ins / cell).rglob("T.json")}
        assert made == {folder.strip("/") or "." for folder in expected}
        for folder in expected:
            copy = f"{cell}{folder}/T.json"
            assert (kept / copy).read_bytes() == (stand_ins / copy).read_bytes()
    capfd.readouterr()
    assert run(monkeypatch, *command, "--calibrate", "--dry-run") == 0
    assert "2 runs, 2 finished" in capfd.readouterr().out


def test_a_threshold_of_its_own_has_a_folder_of_its_own(
    stand_ins: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [
        *SMALL,
        f"save_dir={stand_ins}",
        "--rules",
        "T",
        "predictor=T",
        "predictor.at=0.3",
        "--calibrate",
    ]
    assert run(monkeypatch, *command) == 0
    assert "mDice T 50.00" in capfd.readouterr().out
    assert {path.parent.name for path in stand_ins.rglob("T.json")} == {
        "threshold_0.3", "calibrated_threshold_0.3",
    }  # fmt: skip
    assert run(monkeypatch, *command, "--dry-run") == 0
    assert "1 runs, 1 finished" in capfd.readouterr().out


def test_options_of_a_rule_have_a_folder_of_their_own(
    stand_ins: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [*SMALL, f"save_dir={stand_ins}", "--rules", "T,rankdice_trna", "predictor=rankdice_trna"]
    command += ["predictor.app=2", "--protocols", "corrected"]
    assert run(monkeypatch, *command) == 0
    assert {path.parent.name for path in stand_ins.rglob("T.json")} == {"rankdice_trna_app_2"}
    assert run(monkeypatch, *command, "--dry-run") == 0
    assert "1 runs, 1 finished" in capfd.readouterr().out


def test_an_undefined_score_is_not_printed_as_zero(
    stand_ins: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grid, "read_json", lambda path: {"scores": {"mean_dice": None}})
    assert run(monkeypatch, *SMALL, f"save_dir={stand_ins}", "--rules", "T") == 0
    assert "mDice T undefined" in capfd.readouterr().out


def test_a_damaged_configuration_of_one_run_does_not_stop_the_others(
    stand_ins: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["--losses", "ce,focal", *SMALL, f"save_dir={stand_ins}", "--rules", "T"]
    assert run(monkeypatch, *command) == 0
    (stand_ins / "synthetic/tiny/ce/seed0/config.yaml").write_text("[1")
    capfd.readouterr()
    assert run(monkeypatch, *command, "--dry-run") == 0
    assert "2 runs, 1 finished" in capfd.readouterr().out


def test_bad_input_is_reported_before_anything_runs(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="rankdise"):
        run(monkeypatch, *SMALL, f"save_dir={stand_ins}", "--rules", "rankdise")
    with pytest.raises(ValueError, match="papper"):
        run(monkeypatch, *SMALL, f"save_dir={stand_ins}", "--protocols", "papper")
    with pytest.raises(ValueError, match="nowhere"):
        run(monkeypatch, "dataset=kvasir_seg", "dataset.root=/nowhere", f"save_dir={stand_ins}")
    assert not stand_ins.exists()


def test_a_record_holds_small_files_and_no_absolute_path(
    stand_ins: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    assert run(monkeypatch, *SMALL, f"save_dir={stand_ins.absolute()}", "--record", str(kept)) == 0
    names = {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()}
    cell = "synthetic/tiny/ce/seed0"
    expected = {f"{cell}/results/{sub}{rule}.{kind}" for sub in ("", "paper/") for rule in ("T", "max", "rankdice")
                for kind in ("json", "csv")}  # fmt: skip
    assert names == expected | {f"{cell}/config.yaml", f"{cell}/metrics.jsonl"}
    assert OmegaConf.load(kept / cell / "config.yaml").save_dir == os.path.relpath(stand_ins, ROOT)


def test_the_data_is_named_relative_to_the_repository(tmp_path: Path) -> None:
    cell = load_runs(["dataset=kvasir_seg", f"dataset.root={ROOT.parent}/elsewhere", f"save_dir={tmp_path}"])[0]
    cell.folder.mkdir(parents=True)
    OmegaConf.save(cell.cfg, cell.folder / "config.yaml", resolve=True)
    assert cell.record(tmp_path / "kept", ROOT) == 1
    copy = OmegaConf.load(tmp_path / "kept" / str(cell) / "config.yaml")
    assert copy.dataset.root == "../elsewhere" and copy.dataset.source.root == "../elsewhere"


def test_what_is_left_of_an_interrupted_run(tmp_path: Path) -> None:
    cell = load_runs([*SMALL, f"save_dir={tmp_path}"])[0]
    assert cell.epochs_left() == 4  # three epochs and the scoring
    cell.folder.mkdir(parents=True)
    rows = [{"step": 9, "kind": "train", "epoch": e, "loss": 1} for e in (1, 2)]
    (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cell.epochs_left() == 2 and not cell.is_trained()


@pytest.fixture
def speaker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in the place of train.py, and the log that it writes to."""
    script = "import sys, time\nprint('epoch 1')\nprint('error: ' + sys.argv[1], file=sys.stderr)\n"
    (tmp_path / "train.py").write_text(script + "time.sleep(float(sys.argv[2]))\nsys.exit(3)\n")
    monkeypatch.setattr(grid, "ROOT", tmp_path)
    return tmp_path / "run" / "reproduce.log"


def test_a_process_writes_to_the_log_and_its_last_line_is_the_reason(speaker: Path) -> None:
    assert grid.call(["train.py", "first", "0"], speaker, 1, lambda: None) == (3, "error: first")
    assert grid.call(["train.py", "second", "0"], speaker, 1, lambda: None) == (3, "error: second")
    text = speaker.read_text()
    assert text.count("$ python train.py") == 2 and "epoch 1" in text and "error: first" in text


def test_the_process_stops_when_the_command_is_stopped(speaker: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        grid.call(["train.py", "x", "300"], speaker, 1, stop)
    assert time.monotonic() - started < 100  # it waited for the child, which had 300 seconds to go


GRID = ("experiment=grid_smoke", "model=smp_unet,smp_fpn", "loss=ce", "epochs=12")


def command(script: str, save_dir: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(ROOT / script), *GRID, f"save_dir={save_dir}", *more]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, text: str, process: subprocess.Popen[str]) -> None:
    """Until a file holds a text, while the process lives."""
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None or process.returncode == -signal.SIGKILL, process.communicate()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The grid trained in one process by train.py, and scored: the folder of the runs and the table."""
    folder = tmp_path_factory.mktemp("whole") / "saved"
    trained = command("train.py", folder)
    assert trained.wait() == 0, trained.communicate()
    out, err = (scored := command("scripts/reproduce.py", folder, "--protocols", "corrected")).communicate()
    assert scored.returncode == 0, err
    return folder, out[out.index("**Our results") :]


@pytest.mark.slow
def test_two_commands_on_one_grid_share_the_work(tmp_path: Path) -> None:
    """The second command finds the first run in use, trains the other one, and reports no failure.

    The training of the first command is stopped meanwhile, so that it surely is in use.
    """
    saved = tmp_path / "saved"
    run = saved / "synthetic/smp_unet/ce/seed0"
    first = command("scripts/reproduce.py", saved, "epochs=40", "--protocols", "corrected")
    wait_for(run / "metrics.jsonl", '"epoch": 1', first)
    training = int((run / ".lock").read_text().split()[0])
    os.kill(training, signal.SIGSTOP)
    try:
        second = command("scripts/reproduce.py", saved, "epochs=40", "--protocols", "corrected")
        out, err = second.communicate()
    finally:
        os.kill(training, signal.SIGCONT)
    assert second.returncode == EXIT_BUSY, err
    assert "failed" not in out + err and "in use" in err and f"pid {training}" in out + err
    _, err = first.communicate()
    assert first.returncode == 0 and "failed" not in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_half_way_and_resumed(number: signal.Signals, uninterrupted: tuple[Path, str], tmp_path: Path) -> None:
    """The real commands: a signal while the second run trains, then the same command again, to the table."""
    saved, (whole, table) = tmp_path / "saved", uninterrupted
    first, second = (saved / f"synthetic/{model}/ce/seed0" for model in ("smp_unet", "smp_fpn"))
    process = command("scripts/reproduce.py", saved, "--protocols", "corrected")
    wait_for(second / "metrics.jsonl", '"epoch": 2', process)
    process.send_signal(number)
    _, err = process.communicate()
    wait_for(second / "reproduce.log", "interrupted by SIGTERM", process)  # the training ends with its parent
    if number == signal.SIGTERM:
        assert process.returncode == 75 and "run the same command again" in err
    assert not (second / "checkpoint-epoch12.pth").exists()
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}

    out, err = (again := command("scripts/reproduce.py", saved, "--protocols", "corrected")).communicate()
    assert again.returncode == 0, err
    assert "2 runs, 1 finished before, 1 to do" in out
    assert "resuming after epoch" in (second / "reproduce.log").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    assert out[out.index("**Our results") :] == table
    for run in (first, second):
        ours, theirs = (
            torch.load(folder / run.relative_to(saved) / "last.pth", weights_only=True)["model"]
            for folder in (saved, whole)
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
