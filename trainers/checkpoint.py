"""Checkpoints that survive a crash: each is written to a temporary file, flushed to the disk, then renamed.

A checkpoint is a dict of plain containers and tensors, so that ``torch.load(weights_only=True)`` reads it:

    format     1
    model      state dict
    config     {"choices": {group: name}, "values": {...}}: how it was made
    epoch      epochs finished
    score      the monitored score of the last validation, or None
    classes    names of the classes, in the order of the network's outputs
    data       fingerprints of the training and validation images: names and sizes
    contents   checksums of their contents
    training   optimizer, scaler, progress, random generators: what resuming needs
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError, one_line
from configs.files import lock_file

FORMAT = 1
Reader = Callable[[Path], dict[str, Any]]


def save(payload: dict[str, Any], path: Path, keep_as: Path | None = None) -> None:
    """Write a checkpoint. At any moment, ``path`` holds either the old file or the complete new one.

    The old file is kept as ``keep_as``, if given. Raises OSError if the disk is full or not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a killed process left is overwritten
    try:
        with temporary.open("wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            _copy(path, keep_as)
        os.replace(temporary, path)
    except (RuntimeError, OSError) as error:  # torch's writer turns a full disk into a RuntimeError
        reason = str(error).splitlines()[0]
        raise OSError(
            f"{path} could not be written ({reason}): is the disk full? The previous file is kept."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _copy(source: Path, target: Path) -> None:
    """Give a file a second name by a hard link, or copy it on a disk without hard links."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except (OSError, NotImplementedError, AttributeError):
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_directory(folder: Path) -> None:
    """Make the rename itself durable; Windows cannot open a folder."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def epoch_of(path: Path) -> int:
    """Return the number of finished epochs in a checkpoint, -1 if it cannot be read. Tensors are not read."""
    if not path.is_file():
        return -1
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["epoch"])
    except Exception:  # damaged, or not a checkpoint
        return -1


class Checkpoints:
    """The checkpoints of a run: ``last.pth``, ``previous.pth``, ``best_model.pth`` and ``checkpoint-epochN.pth``.

    ``reader`` reads and checks a file. ``keep`` is how many ``checkpoint-epochN.pth`` to keep (0: all).
    """

    def __init__(self, folder: Path, reader: Reader, keep: int = 0) -> None:
        self.folder, self.reader, self.keep = Path(folder), reader, keep
        self.last, self.previous = self.folder / "last.pth", self.folder / "previous.pth"
        self.best = self.folder / "best_model.pth"

    def claim(self, patience: float = 10.0) -> None:
        """Lock the folder until this process ends; raise BusyError if another holds it for ``patience`` seconds."""
        self._lock = lock_file(self.folder / ".lock", f"training in {self.folder}", patience)

    def save_last(self, payload: dict[str, Any]) -> None:
        """Write ``last.pth``. The old one is kept as ``previous.pth``."""
        save(payload, self.last, keep_as=self.previous)

    def save_best(self, payload: dict[str, Any]) -> None:
        """Write ``best_model.pth``, without the state that only a resumed training needs."""
        save({key: value for key, value in payload.items() if key != "training"}, self.best)

    def save_epoch(self, payload: dict[str, Any]) -> None:
        """Write ``checkpoint-epochN.pth`` and remove the oldest ones beyond the number to keep."""
        save(payload, self.epoch_file(payload["epoch"]))
        if self.keep:
            for old in self.epochs()[self.keep :]:
                old.unlink(missing_ok=True)

    def epoch_file(self, epoch: int) -> Path:
        return self.folder / f"checkpoint-epoch{epoch}.pth"

    def epochs(self) -> list[Path]:
        """List the ``checkpoint-epochN.pth``, newest first."""
        found = [(re.search(r"(\d+)\.pth$", p.name), p) for p in self.folder.glob("checkpoint-epoch*.pth")]
        return [path for _, path in sorted(((int(m[1]), p) for m, p in found if m), reverse=True)]

    def clear(self) -> None:
        """Remove every checkpoint, to start over."""
        for path in (self.last, self.folder / "next.pth", self.previous, self.best, *self.epochs()):
            path.unlink(missing_ok=True)

    def newest(self) -> dict[str, Any] | None:
        """Read the newest checkpoint that training can resume from, or return None; damaged ones are reported."""
        # next.pth: a run that was killed before version 0.2 may have left it.
        for path in (self.last, self.folder / "next.pth", self.previous, *self.epochs()):
            if not path.exists():
                continue
            try:
                payload = self.reader(path)
            except (UserError, OSError) as error:
                print(f"warning: {one_line(error).rstrip('.')}. The next older checkpoint is tried.", file=sys.stderr)
                continue
            if "training" in payload:
                return payload
        return None
