"""A loader process that dies or hangs in the middle of a training: one line, code 3, and a state to go on from."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from models import read_checkpoint
from tests.trainers.forked import SMALL, ForkServerProcess, begin, run_dir, wait_for
from trainers.checkpoint import Checkpoints

ENDLESS = (*SMALL, "epochs=1000", "num_workers=2", "trainer.keep=1")


def start(folder: Path, *more: str) -> ForkServerProcess:
    """Begin a training that would go on for long, and wait until it has saved two states."""
    process = begin("train.py", *ENDLESS, f"save_dir={folder}", *more, log=folder / "log.txt")
    assert wait_for(lambda: any(folder.rglob("previous.pth")), process), (folder / "log.txt").read_text()
    return process


def workers_of(process: ForkServerProcess) -> list[int]:
    """The processes that the training has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == process.pid:
            found.append(int(path.parent.name))
    return found


def ended(process: ForkServerProcess, folder: Path) -> str:
    """Wait for the end; assert code 3, one line that says what to do, nobody left behind, and a whole state."""
    workers = workers_of(process)
    process.join(120)
    printed = (folder / "log.txt").read_text()
    assert process.exitcode == 3, f"exit code {process.exitcode}\n{printed}"
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "num_workers=0" in errors[0] and "Traceback" not in printed, printed
    assert len(workers) >= 2 and not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
    assert updates(folder) > 0
    return errors[0]


def updates(folder: Path) -> int:
    """How far the newest whole state is."""
    (lock,) = folder.rglob(".lock")
    found = Checkpoints(lock.parent, read_checkpoint).newest()
    return found["training"]["progress"]["updates"] if found else 0


def test_a_worker_that_is_killed_ends_the_training(tmp_path: Path) -> None:
    process = start(tmp_path)
    os.kill(random.Random(0).choice(workers_of(process)), signal.SIGKILL)
    assert "a loader process died" in ended(process, tmp_path)


def test_a_worker_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    """Stopped processes play a disk that does not answer; they continue later, so that they can end."""
    process = start(tmp_path, "loader_timeout=2")
    workers = workers_of(process)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)

    def proceed() -> None:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    timer = threading.Timer(15, proceed)
    timer.start()
    assert "gave no batch for 2 s" in ended(process, tmp_path)
    timer.cancel()


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_resumes(tmp_path: Path) -> None:
    """In a step, while workers are started, in a validation, between the renames of a state."""
    moments, reached = random.Random(0), [0]
    for _ in range(10):
        process = start(tmp_path)
        time.sleep(moments.uniform(0, 0.5))
        os.kill(moments.choice(workers_of(process)), signal.SIGKILL)
        ended(process, tmp_path)
        reached.append(updates(tmp_path))
        (tmp_path / "log.txt").unlink()
        (run_dir(tmp_path) / "previous.pth").unlink()
    # Nothing is lost; a start may only have done a validation again, and then the next one resumes from there.
    assert reached == sorted(reached) and len(set(reached)) > 5
