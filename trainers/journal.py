"""Log a run while it trains: ``metrics.jsonl`` and TensorBoard events.

The tags of TensorBoard group the values to compare: ``val/mean_dice/RULE``, ``val_class_dice/CLASS/RULE``.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.errors import UserError
from configs.files import finite_or_none, name_file_in_errors, parse_json, read_text, write_text


class Journal:
    """Rows of a run, each with the global step it belongs to.

    Args:
        folder: the run's directory; None writes nothing (ranks other than 0).
        step: the global step to resume from; rows of later steps, which an interrupted run wrote, are dropped.
    """

    def __init__(
        self, folder: Path | None, step: int = 0, tensorboard: bool = True, classes: Sequence[str] = ()
    ) -> None:
        unique = (name if classes.count(name) == 1 else f"{name}_{c}" for c, name in enumerate(classes))
        self.classes = [re.sub(r"[^-\w.]", "_", name) for name in unique]  # what TensorBoard allows in a tag
        self.path = None if folder is None else Path(folder) / "metrics.jsonl"
        self.events: Any = None
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_rows(self.path) if row["step"] <= step] if step else []
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            _quieten_writers()
            self.folder = self.path.parent / "tensorboard"
            with name_file_in_errors(self.folder):
                _date_back(self.folder)
                self.events = SummaryWriter(str(self.folder), purge_step=step + 1)
                self.events.add_custom_scalars(_charts(self.classes))

    def log(self, step: int, kind: str, **values: Any) -> None:
        """Append a row of a kind, ``train`` or ``val_RULE``, and its numbers as TensorBoard scalars."""
        if self.path is None:
            return
        with name_file_in_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite_or_none({"step": step, "kind": kind, **values})) + "\n")
        for tag, value in _scalars(kind, values, self.classes):
            self._call("add_scalar", tag, value, step)

    def _call(self, method: str, *values: Any, **options: Any) -> None:
        if self.events is not None:
            with name_file_in_errors(self.folder):
                getattr(self.events, method)(*values, **options)

    def log_image(self, step: int, name: str, picture: Tensor) -> None:
        """Add a picture, uint8 (3, H, W), to TensorBoard."""
        self._call("add_image", name, picture, step)

    def log_hparams(self, settings: dict[str, Any], best: float) -> None:
        """Write TensorBoard's row of the run: its settings, best score, and the last score of each rule."""
        if self.events is not None and self.path is not None:
            last = {row["kind"]: row for row in read_rows(self.path) if "mean_dice" in row}
            scores = {f"hparam/{kind}_mean_dice": row["mean_dice"] or 0.0 for kind, row in last.items()}
            self._call("add_hparams", settings, {"hparam/best_mean_dice": best, **scores}, run_name=".")

    def close(self) -> None:
        """Write the remaining events of TensorBoard."""
        self._call("close")


def _date_back(folder: Path) -> None:
    """Rename all event files to past dates if one is not in the past, such as after a clock was set back.

    TensorBoard reads files in the order of the dates in their names. A new file with an earlier date would be read
    first, and its steps would be dropped.
    """
    now, prefix = int(time.time()), "events.out.tfevents."
    files = sorted(folder.glob(f"{prefix}*"))
    dates = [re.match(rf"{prefix}(\d+)", path.name) for path in files]
    if any(date and int(date[1]) >= now for date in dates):
        for number, path in enumerate(files, now - len(files)):
            path.rename(folder / f"{prefix}{number:010d}.{path.name.split('.', 4)[-1]}")


def _quieten_writers() -> None:
    """Suppress the tracebacks of TensorBoard's threads: their error is raised again when the next event is added."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            before(args)

    if before.__module__ != __name__:
        threading.excepthook = hook


def _scalars(kind: str, values: dict[str, Any], classes: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yield the tags and numbers of a row; numbers that are not finite are left out."""
    group, _, rule = kind.partition("_")
    for name, value in values.items():
        if isinstance(value, dict):
            named = dict(zip(classes, value.values(), strict=True)) if len(classes) == len(value) else value
            items = {f"{group}_{name}/{part}": number for part, number in named.items()}
        else:
            items = {} if rule and name == "epoch" else {f"{group}/{name}": value}
        for tag, number in items.items():
            if isinstance(number, (int, float)) and math.isfinite(number):
                yield f"{tag}/{rule}".rstrip("/"), float(number)


def _charts(classes: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the layout of TensorBoard's custom scalars: a chart of all rules for each score and for each class."""
    scores = ("mean_dice", "mean_iou", "pooled_mean_dice", "pooled_mean_iou", "ece")
    return {
        "rules": {name: ["Multiline", [f"^val/{name}/"]] for name in scores},
        "rules, Dice of each class": {name: ["Multiline", [f"^val_class_dice/{re.escape(name)}/"]] for name in classes},
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.jsonl`` up to the first invalid line: a crash cuts off the last one."""
    rows = []
    for line in read_text(path, errors="replace").splitlines() if path.exists() else []:
        try:
            row = parse_json(line, str(path))
        except UserError:
            break
        if not (isinstance(row, dict) and {"step", "kind"} <= set(row) and type(row["step"]) is int):
            break
        rows.append(row)
    return rows
