"""Running one cell after the other, each in processes of its own, under one line of progress."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from scripts import ROOT
from scripts.grid.cells import Cell

_SCORING = 1  # scoring a cell is estimated to take as long as so many epochs
_POLL = 0.5  # seconds
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Estimate:
    """The time left, from the seconds an epoch took so far: of the same network if known, else of all."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    def add(self, kind: str, epochs: float, seconds: float) -> None:
        """Learn that so many epochs of this kind took so long."""
        total = self.spent.setdefault(kind, [0.0, 0.0])
        total[0], total[1] = total[0] + epochs, total[1] + seconds

    def left(self, work: Sequence[tuple[str, float]]) -> float | None:
        """Seconds for (kind, epochs) of work; None where nothing was timed yet."""
        epochs, seconds = (sum(total[i] for total in self.spent.values()) for i in (0, 1))
        if not epochs:
            return None
        mean = seconds / epochs
        rates = {kind: total[1] / total[0] for kind, total in self.spent.items() if total[0]}
        return sum(rates.get(kind, mean) * count for kind, count in work)


class Display:
    """One line of progress on a terminal; elsewhere a line for each cell and stage."""

    def __init__(self, todo: Sequence[Cell], quiet: bool = False) -> None:
        self.work = {cell.folder: float(remaining(cell)) for cell in todo}
        self.kinds = {cell.folder: cell.kind for cell in todo}
        self.estimate, self.count = Estimate(), len(todo)
        self.bar = tqdm(
            total=sum(self.work.values()) or 1,
            disable=True if quiet else None,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}{postfix}",
            leave=False,
        )

    def show(self, number: int, cell: Cell, stage: str, started: float, before: int) -> None:
        """Refresh the line: where cell ``number`` is, and what is left of all."""
        done = cell.epochs_done() - before
        planned = self.work[cell.folder]
        now = min(float(done), planned)
        self.bar.set_description_str(f"[{number}/{self.count}] {cell}  {stage}", refresh=False)
        ahead = sum(self.work.values())
        self.bar.n = self.bar.total - ahead + now
        work = [(self.kinds[f], epochs - (now if f == cell.folder else 0)) for f, epochs in self.work.items()]
        trial = Estimate()
        trial.spent = {kind: list(total) for kind, total in self.estimate.spent.items()}
        if done:
            trial.add(cell.kind, done, time.monotonic() - started)
        left = trial.left(work)
        self.bar.set_postfix_str("estimating" if left is None else f"about {clock(left)} left", refresh=False)
        self.bar.refresh()

    def finish(self, cell: Cell, seconds: float, worked: bool) -> float | None:
        """Note that a cell is over; return the seconds left, where known."""
        planned = self.work.pop(cell.folder)
        if worked:
            self.estimate.add(cell.kind, planned, seconds)
        return self.estimate.left([(self.kinds[folder], epochs) for folder, epochs in self.work.items()])

    def say(self, text: str) -> None:
        """Print a line above the progress."""
        self.bar.clear()
        print(text, flush=True)

    def close(self) -> None:
        """Take the line away."""
        self.bar.close()


def remaining(cell: Cell) -> int:
    """Epochs to train, and scoring in the same unit."""
    return (0 if cell.trained() else max(cell.cfg.epochs - cell.epochs_done(), 0)) + _SCORING


def call(
    arguments: Sequence[str], log: Path, threads: int | None, tick: Callable[[], None]
) -> tuple[int, str]:
    """Run a command of this repository; return its exit code and its last line on stderr.

    Output goes to the end of ``log``. The child stops, with a checkpoint, if this process is stopped or dies.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    script, *rest = arguments
    with log.open("a", encoding="utf-8") as out:
        print(f"$ python {' '.join(arguments)}", file=out, flush=True)
        begin = out.tell()
        child = subprocess.Popen(
            [sys.executable, str(ROOT / script), *rest],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches it once, from here
            preexec_fn=_die_with_parent if _libc else None,
        )
        try:
            while True:
                try:
                    child.wait(_POLL)
                    break
                except subprocess.TimeoutExpired:
                    tick()
        except BaseException:
            child.terminate()  # train.py saves its state on SIGTERM
            child.wait()
            raise
    with log.open(encoding="utf-8", errors="replace") as text:
        text.seek(begin)
        lines = [line.strip() for line in text.read().splitlines() if line.strip()]
    return child.returncode, lines[-1] if lines else ""


def _die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent is gone, so that nothing trains unseen (PR_SET_PDEATHSIG)."""
    _libc.prctl(1, signal.SIGTERM)  # type: ignore[union-attr]
