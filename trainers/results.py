"""Results as files: a JSON of averages and provenance, and a CSV of counts per image and class.

Every average, interval and paired difference can be computed again from the counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.files import write_json, write_text
from rankseg.expected import image_confidence
from trainers.metrics import Counts
from trainers.text import csv_text

FORMAT = 1
COLUMNS = ("image", "class", "intersection", "predicted", "actual", "dice", "iou")


@dataclass(frozen=True)
class EvalResult:
    """What one rule scored on one set of images."""

    predictor: str
    names: list[str]  # of the images, in order
    counts: Counts  # pixels per image and class
    scored: tuple[int, ...]  # the classes in the means
    scores: dict[str, Any]  # averages as fractions, by name
    seconds: float  # time of the rule, without the network
    confidence: Tensor | None = None  # (N, C) expected Dice of each mask; for an empty mask, P(class absent)

    def save(self, folder: Path, details: Mapping[str, Any]) -> Path:
        """Write ``<predictor>.json`` and ``<predictor>.csv`` into the folder; return the path of the JSON.

        ``details`` is the origin of the numbers: protocol, dataset, model, loss, seed, checkpoint, provenance.
        """
        path = Path(folder) / f"{self.predictor}.json"
        content = {
            "format": FORMAT,
            "predictor": self.predictor,
            **details,
            "scored": list(self.scored),
            "scores": self.scores,
            "seconds": round(self.seconds, 4),
            "images": self.names,
        }
        if self.confidence is not None:
            scored = list(self.scored)
            by_image = image_confidence(self.confidence[:, scored], self.counts.predicted[:, scored] > 0)
            content["image_confidence"] = [round(x, 6) for x in by_image.tolist()]
        write_json(path, content)
        columns = COLUMNS if self.confidence is None else (*COLUMNS, "confidence")
        write_text(path.with_suffix(".csv"), csv_text([columns, *self._rows()]))
        return path

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        """Yield a row for each image and scored class that is predicted or present."""
        counts = self.counts
        pixels = torch.stack([counts.intersection, counts.predicted, counts.actual], dim=2).tolist()
        scores = [counts.dice(), counts.iou(), *([] if self.confidence is None else [self.confidence])]
        fractions = torch.stack([score.double() for score in scores], dim=2).tolist()
        for i, name in enumerate(self.names):
            for c in self.scored:
                if any(pixels[i][c]):
                    yield (name, c, *pixels[i][c], *(f"{x:.6f}" for x in fractions[i][c]))

    def block(self, model: str, loss: str) -> str:
        """Return the result as text in the form of the paper's logs."""
        lines = [f"## TESTING Results for Model: {model} + Loss: {loss} + predict: {self.predictor} ##"]
        for label in ("test_loss", "Pixel_Accuracy", "Mean_IoU", "Mean_Dice", "Class_IoU", "Class_Dice"):
            value = self.scores[label.lower()]
            if isinstance(value, dict):
                text = "{" + ", ".join(f"{name}: {score:.3f}" for name, score in value.items()) + "}"
            else:
                text = f"{value:.5f}" if label == "test_loss" else f"{value:.3f}"
            lines.append(f"     {label:<15}: {text}")
        return "\n".join(lines)


def results_folder(
    checkpoint: str,
    results: str,
    *,
    threshold: float = 0.5,
    calibrated: bool = False,
    per_class: bool = False,
    focal_corrected: bool = False,
    gate: float | str = 0.5,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Return the folder of results below that of a run, different for every variant and every checkpoint.

    ``results`` is the folder of the protocol. Results of ``best_model.pth`` are in it, those of ``last.pth`` in its
    ``of_last``. The options that change the masks name a further sub-folder, such as ``calibrated_gate_fit``.
    ``per_class``: each class has its own temperature and bias. ``options`` are those of rules and of the protocol that
    differ from their files: ``{"T_fit": {"per_class": True}}`` names the sub-folder ``T_fit_per_class_true``.
    """
    changes = [
        re.sub(r"[^\w.+-]+", "-", f"{owner}_{key}_{value if isinstance(value, str) else json.dumps(value)}")
        for owner, changed in (options or {}).items()
        for key, value in changed.items()
    ]
    variants = {
        "focal_corrected": focal_corrected,
        "calibrated_class" if per_class else "calibrated": calibrated,
        f"threshold_{threshold:g}": threshold != 0.5,
        f"gate_{gate}": gate != 0.5,
        **dict.fromkeys(changes, True),
    }
    variant = "_".join(name for name, here in variants.items() if here)
    stem = Path(checkpoint).stem
    return Path(results, "" if stem == "best_model" else f"of_{stem}", variant)


def comparison_table(results: Mapping[str, EvalResult]) -> str:
    """Return a table of all rules in percent; ``*`` marks the best of each column."""
    columns = {
        "mDice": "mean_dice", "mIoU": "mean_iou",
        "pooled Dice": "pooled_mean_dice", "pooled IoU": "pooled_mean_iou",
    }  # fmt: skip
    found = {key: [result.scores[key] for result in results.values()] for key in columns.values()}
    best = {key: max(filter(math.isfinite, values), default=math.nan) for key, values in found.items()}
    rows = [["predictor", *columns, "rule's seconds"]]
    for name, result in results.items():
        scores = {key: result.scores[key] for key in columns.values()}
        cells = [f"{100 * value:.2f}{'*' if value == best[key] else ' '}" for key, value in scores.items()]
        rows.append([name, *cells, f"{result.seconds:.2f}"])
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        "  ".join([row[0].ljust(first), *(cell.rjust(w) for cell, w in zip(row[1:], others, strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def fingerprint(value: Any) -> str:
    """Return a short hash of a JSON value. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
