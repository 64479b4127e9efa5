"""review.csv: how sure each mask is, the least sure first. The list that a reviewer starts from.

A row is an image and a predicted class: area in pixels, confidence (the expected Dice), and the lower bound of the
Dice, confidence - margin, which holds for a share 1 - alpha of new images like those that fitted the margin. An image
without any mask has one row with an empty class; its confidence is the smallest P(class absent) of its classes.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import UserError
from configs.files import read_text, write_text
from rankseg.confidence import absence, confidence
from trainers.text import csv_text

COLUMNS = ("image", "class", "area", "confidence", "lower_bound")
Row = tuple[str, str, int, float, float | None]


class Review:
    """The rows of review.csv; those of images that are not segmented again are kept.

    Args:
        path: the file.
        classes: names of the classes.
        scored: the classes that are reviewed.
        margins: class -> margin of the bound; empty for none.

    Raises:
        UserError: the file is there and is not a review.
    """

    def __init__(
        self, path: Path, classes: Sequence[str], scored: Sequence[int], margins: Mapping[str, float | None]
    ) -> None:
        self.path, self.classes, self.scored, self.margins = path, classes, scored, margins
        self.rows: dict[str, list[Row]] = {}
        for row in _read(path) if path.exists() else ():
            self.rows.setdefault(row[0], []).append(row)

    def start(self, image: str) -> None:
        """Forget the rows of an image."""
        self.rows[image] = []
        self._empty = torch.ones((), dtype=torch.float64)

    def add(self, image: str, index: int, probs: Tensor, mask: Tensor) -> None:
        """Add one class of an image: probabilities and mask, (H, W)."""
        if index not in self.scored:
            return
        area = int(mask.sum())
        if not area:
            self._empty = self._empty.minimum(absence(probs[None, None])[0, 0].cpu())
            return
        sure = float(confidence(probs[None, None], mask[None, None]))
        margin = self.margins.get(str(index))
        bound = None if margin is None else max(0.0, sure - margin)
        self.rows[image].append((image, self.classes[index], area, sure, bound))

    def finish(self, image: str) -> None:
        """Add the row of an image without any mask."""
        if not self.rows[image]:
            self.rows[image] = [(image, "", 0, float(self._empty), None)]

    def save(self) -> None:
        """Write the file, the least sure first."""
        rows = sorted((row for rows in self.rows.values() for row in rows), key=lambda row: (row[3], row[:2]))
        shown = [
            (image, name, area, f"{sure:.4f}", "" if bound is None else f"{bound:.4f}")
            for image, name, area, sure, bound in rows
        ]
        write_text(self.path, csv_text([COLUMNS, *shown]))


def _read(path: Path) -> list[Row]:
    from trainers.text import read_csv

    try:
        text = read_text(path)
        if text.partition("\n")[0].rstrip("\r") != ",".join(COLUMNS):
            raise ValueError("another header")
        return [
            (
                row["image"],
                row["class"],
                int(row["area"]),
                float(row["confidence"]),
                float(row["lower_bound"]) if row["lower_bound"] else None,
            )
            for row in read_csv(text)
        ]
    except (ValueError, KeyError, TypeError, OSError, csv.Error):
        raise UserError(
            f"{path} is not a review that was written here. Fix: move it, or choose another --out."
        ) from None
