"""Execute the runs of a grid one after the other, each in processes of its own, with one progress bar."""

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
from scripts.grid.runs import Run

_SCORING = 1  # scoring a run takes about as long as this number of epochs
_POLL = 0.5  # seconds
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def format_time(seconds: float) -> str:
    """Return seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display:
    """A progress bar over the epochs of all runs; without a terminal, only the lines printed by `say`."""

    def __init__(self, runs: Sequence[Run], quiet: bool = False) -> None:
        self.left = {run.folder: remaining_epochs(run) for run in runs}
        self.count, self.started = len(runs), time.monotonic()
        self.total = sum(self.left.values()) or 1
        self.bar = tqdm(
            total=self.total,
            disable=True if quiet else None,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}{postfix}",
            leave=False,
        )

    def show(self, number: int, run: Run, stage: str, done: int) -> None:
        """Refresh the bar: run ``number`` is in ``stage`` and has finished ``done`` of its epochs."""
        finished = self.total - sum(self.left.values()) + min(done, self.left[run.folder])
        left = self._seconds_left(finished)
        self.bar.n = finished
        self.bar.set_description_str(f"[{number}/{self.count}] {run}  {stage}", refresh=False)
        self.bar.set_postfix_str(f"about {format_time(left)} left" if left else "estimating", refresh=False)
        self.bar.refresh()

    def finish(self, run: Run) -> float | None:
        """Mark a run as processed; return the estimated seconds for the others, None if unknown."""
        del self.left[run.folder]
        return self._seconds_left(self.total - sum(self.left.values()))

    def _seconds_left(self, finished: int) -> float | None:
        """Estimate the remaining seconds from the mean time of an epoch so far."""
        if not finished:
            return None
        return (self.total - finished) * (time.monotonic() - self.started) / finished

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.bar.clear()
        print(text, flush=True)

    def close(self) -> None:
        """Remove the progress bar."""
        self.bar.close()


def remaining_epochs(run: Run) -> int:
    """Return the epochs that are left to train, plus the cost of scoring in the same unit."""
    return (0 if run.is_trained() else max(run.cfg.epochs - run.epochs_done(), 0)) + _SCORING


def call(
    arguments: Sequence[str], log: Path, threads: int | None, tick: Callable[[], None]
) -> tuple[int, str]:
    """Run a script of this repository; return its exit code and the last line of its output.

    Output is appended to ``log``; ``tick`` is called twice a second. If this process is stopped or killed, the
    child receives SIGTERM and saves a checkpoint.
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
            start_new_session=True,  # Ctrl-C reaches the child once, from here
            preexec_fn=_stop_with_parent if _libc else None,
        )
        try:
            while True:
                try:
                    child.wait(_POLL)
                    break
                except subprocess.TimeoutExpired:
                    tick()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    with log.open(encoding="utf-8", errors="replace") as text:
        text.seek(begin)
        lines = [line.strip() for line in text.read().splitlines() if line.strip()]
    return child.returncode, lines[-1] if lines else ""


def _stop_with_parent() -> None:
    """Ask Linux to send SIGTERM when the parent dies, so that no training runs on unseen (PR_SET_PDEATHSIG)."""
    _libc.prctl(1, signal.SIGTERM)  # type: ignore[union-attr]
