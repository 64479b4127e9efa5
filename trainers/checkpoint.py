"""Checkpoints that survive a crash: written aside, flushed to the disk, then renamed.

A checkpoint is a dict of plain containers and tensors, so that ``torch.load(weights_only=True)`` reads it:

    format     1
    model      state dict
    config     {"choices": {group: name}, "values": {...}}   how it was made
    epoch      epochs finished
    score      the monitored score of the last validation, or None
    training   optimizer, scaler, progress, random generators: what resuming needs
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainers.lock import PATIENCE, Lock

FORMAT = 1
Reader = Callable[[Path], dict[str, Any]]


def save(payload: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that ``path`` holds, at any moment, either the old file or the whole new one.

    Raises:
        OSError: the disk is full or not writable; the file that was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")  # one name: what a killed process left is written over
    try:
        with aside.open("wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (RuntimeError, OSError) as error:  # torch's writer turns a full disk into a RuntimeError
        reason = str(error).splitlines()[0]
        raise OSError(
            f"{path} could not be written ({reason}): is the disk full? The one before is kept"
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _sync_directory(folder: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoints:
    """A run's checkpoints: ``last.pth`` and the one before it, the best, and every few epochs one to keep.

    Args:
        folder: the run's directory.
        reader: reads and checks one file, raising ValueError or OSError where it cannot.
        keep: how many ``checkpoint-epochN.pth`` to keep (0: all).
    """

    def __init__(self, folder: Path, reader: Reader, keep: int = 0) -> None:
        self.folder, self.reader, self.keep = Path(folder), reader, keep
        self.last, self.previous = self.folder / "last.pth", self.folder / "previous.pth"
        self.best = self.folder / "best_model.pth"

    def claim(self, patience: float = PATIENCE) -> None:
        """Make this process the only one that writes here, until it ends, however it ends.

        Raises:
            ValueError: another process is training here, and still is after `patience` seconds.
        """
        self._lock = Lock(self.folder / ".lock", f"training in {self.folder}", patience)

    def save_last(self, payload: dict[str, Any]) -> None:
        """Write ``last.pth``; the one that was there becomes ``previous.pth``."""
        fresh = self.folder / "next.pth"
        save(payload, fresh)
        if self.last.exists():
            os.replace(self.last, self.previous)
        os.replace(fresh, self.last)

    def save_best(self, payload: dict[str, Any]) -> None:
        """Write ``best_model.pth``, without what only resuming needs."""
        save({key: value for key, value in payload.items() if key != "training"}, self.best)

    def save_epoch(self, payload: dict[str, Any]) -> None:
        """Write ``checkpoint-epochN.pth`` and remove the oldest beyond the number to keep."""
        save(payload, self.folder / f"checkpoint-epoch{payload['epoch']}.pth")
        if self.keep:
            for old in self.epochs()[self.keep :]:
                old.unlink(missing_ok=True)

    def epochs(self) -> list[Path]:
        """The ``checkpoint-epochN.pth`` that are there, newest first."""
        found = [(re.search(r"(\d+)\.pth$", p.name), p) for p in self.folder.glob("checkpoint-epoch*.pth")]
        return [path for _, path in sorted(((int(m[1]), p) for m, p in found if m), reverse=True)]

    def finished(self, epochs: int) -> bool:
        """Whether a training of so many epochs has ended here."""
        return (self.folder / f"checkpoint-epoch{epochs}.pth").exists()

    def clear(self) -> None:
        """Remove every checkpoint, to start over."""
        for path in (self.last, self.folder / "next.pth", self.previous, self.best, *self.epochs()):
            path.unlink(missing_ok=True)

    def newest(self) -> dict[str, Any] | None:
        """The newest whole checkpoint that training can go on from, or None; broken ones are named."""
        for path in (self.last, self.folder / "next.pth", self.previous, *self.epochs()):
            if not path.exists():
                continue
            try:
                payload = self.reader(path)
            except (ValueError, OSError) as error:
                print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr)
                continue
            if "training" in payload:
                return payload
        return None
