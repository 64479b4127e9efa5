"""An interrupted training ends bit for bit as an uninterrupted one, with any number of workers."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.trainers.forked import SMALL, begin, rows, run_dir, same, state, train, wait_for


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return run_dir(folder)


def assert_same_run(run: Path, whole: Path) -> None:
    """Weights, optimizer, generators, best, configuration, and the journal row by row."""
    for name in ("checkpoint-epoch1.pth", "checkpoint-epoch2.pth", "last.pth"):
        same(state(run / name), state(whole / name), name)
    assert rows(run) == rows(whole)
    assert not list(run.glob(".*tmp*")), "a half-written file was left behind"


def kill_and_resume(folder: Path, kills: int, seed: int) -> None:
    """Train; kill -9 at random moments, so many times; then let it end. Every start has other workers.

    A fast machine can end the run before the third kill; then everything begins again.
    """
    moments = random.Random(seed)
    options = ["epochs=2"] if kills < 5 else ["epochs=6"]
    for _ in range(5):
        if kill_often(folder, kills, moments, options) >= min(kills, 3):
            break
        shutil.rmtree(run_dir(folder))
    else:
        pytest.fail((folder / "killed.txt").read_text())
    train(folder, *options)


def kill_often(folder: Path, kills: int, moments: random.Random, options: list[str]) -> int:
    """How many starts of one run were killed before it ended by itself."""
    run = run_dir(folder)
    for done in range(kills):
        before = stamp(run)
        workers = f"num_workers={(0, 1, 3)[done % 3]}"
        process = begin("train.py", *SMALL, f"save_dir={folder}", workers, *options, log=folder / "killed.txt")
        # After the next state came, somewhere in the steps, the writing, the validation that follow.
        if not wait_for(lambda before=before: stamp(run) != before, process):
            return done
        process.join(moments.uniform(0, 0.15))
        process.kill()
        process.join()
        if process.exitcode == 0:
            return done
    return kills


def stamp(run: Path) -> int:
    path = run / "last.pth"
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def test_killed_thrice_with_other_workers_each_time(whole: Path, tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=3, seed=0)
    assert_same_run(run_dir(tmp_path), whole)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    train(tmp_path / "whole", "epochs=6")
    kill_and_resume(tmp_path / "killed", kills=20, seed=1)
    log = (tmp_path / "killed" / "killed.txt").read_text()
    assert log.count("resuming after epoch") >= 15
    whole, run = run_dir(tmp_path / "whole"), run_dir(tmp_path / "killed")
    same(state(run / "checkpoint-epoch6.pth"), state(whole / "checkpoint-epoch6.pth"))
    assert rows(run) == rows(whole)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_no_number_depends_on_the_workers(workers: int, whole: Path, tmp_path: Path) -> None:
    train(tmp_path, f"num_workers={workers}")
    assert_same_run(run_dir(tmp_path), whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", pytest.param("SIGUSR2", marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_resume(name: str, whole: Path, tmp_path: Path) -> None:
    run, log = run_dir(tmp_path), tmp_path / "stopped.txt"
    process = begin("train.py", *SMALL, f"save_dir={tmp_path}", log=log)
    assert wait_for(lambda: stamp(run) > 0, process)
    os.kill(process.pid or 0, getattr(signal, name))
    process.join()
    printed = log.read_text()
    assert process.exitcode == 75, printed
    assert f"stopped: interrupted by {name}" in printed and "run the same command again" in printed
    assert "Traceback" not in printed
    assert "resuming after epoch" in train(tmp_path)
    assert_same_run(run, whole)
