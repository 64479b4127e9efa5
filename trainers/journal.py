"""What a run writes while it goes: ``metrics.jsonl`` and TensorBoard events."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    return value


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that no reader, and no restart after a crash, sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, the whole file at once."""
    write_text(path, json.dumps(finite_or_none(value), indent=1) + "\n")


class Journal:
    """Rows of a run, each with the global step it belongs to.

    Args:
        folder: the run's directory; None writes nothing (ranks other than 0).
        step: the global step to go on from; rows of later steps, left by an interrupted run, are dropped.
        tensorboard: whether to write TensorBoard events as well.
    """

    def __init__(self, folder: Path | None, step: int = 0, tensorboard: bool = True) -> None:
        self.path = None if folder is None else Path(folder) / "metrics.jsonl"
        self.events: Any = None
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_rows(self.path) if row["step"] <= step] if step else []
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(
                str(self.path.parent / "tensorboard"), purge_step=step + 1 if step else None
            )

    def log(self, step: int, kind: str, **values: Any) -> None:
        """Append a row, and its numbers as TensorBoard scalars ``kind/name``."""
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite_or_none({"step": step, "kind": kind, **values})) + "\n")
        if self.events is not None:
            for name, value in _flatten(values):
                self.events.add_scalar(f"{kind}/{name}", value, step)

    def image(self, step: int, name: str, picture: Tensor) -> None:
        """Add a picture, uint8 (3, H, W), to TensorBoard."""
        if self.events is not None:
            self.events.add_image(name, picture, step)

    def hparams(self, settings: dict[str, Any], scores: dict[str, float]) -> None:
        """Say what the run was and how it ended, for TensorBoard's table of runs."""
        if self.events is not None:
            self.events.add_hparams(settings, scores, run_name=".")

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self.events is not None:
            self.events.close()


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and math.isfinite(value):
            flat.append((f"{prefix}{name}", float(value)))
    return flat


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
