"""Results as files: a JSON of averages and provenance, a CSV of counts per image and class.

The counts are the sufficient statistic: every average, interval and paired difference can be made from them again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.files import write_json, write_text
from rankseg.confidence import image_confidence
from trainers.metrics import Counts
from trainers.text import csv_text

FORMAT = 1
COLUMNS = ("image", "class", "intersection", "predicted", "actual", "dice", "iou")


@dataclass(frozen=True)
class EvalResult:
    """What one rule scored on one set of images.

    Attributes:
        predictor: the rule's name.
        names: the images, in order.
        counts: (N, C) pixels per image and class.
        scored: the classes that the means run over.
        scores: averages as fractions, by name.
        seconds: spent in the rule alone.
        confidence: (N, C) expected Dice of each mask, P(class absent) of an empty one; None if it was not computed.
    """

    predictor: str
    names: list[str]
    counts: Counts
    scored: tuple[int, ...]
    scores: dict[str, Any]
    seconds: float
    confidence: Tensor | None = None

    def image_confidence(self) -> Tensor | None:
        """The confidence of each image, (N,): the mean over its predicted classes; None if it was not computed."""
        if self.confidence is None:
            return None
        scored = list(self.scored)
        return image_confidence(self.confidence[:, scored], self.counts.predicted[:, scored] > 0)

    def save(self, folder: Path, details: Mapping[str, Any]) -> Path:
        """Write ``<predictor>.json`` and ``<predictor>.csv`` into the folder; return the JSON's path.

        ``details`` describes the origin of the numbers: protocol, dataset, model, loss, seed, checkpoint, provenance.
        """
        path = Path(folder) / f"{self.predictor}.json"
        by_image = self.image_confidence()
        write_json(
            path,
            {
                "format": FORMAT,
                "predictor": self.predictor,
                **details,
                "scored": list(self.scored),
                "scores": self.scores,
                "seconds": round(self.seconds, 4),
                "images": self.names,
                **(
                    {} if by_image is None else {"image_confidence": [round(x, 6) for x in by_image.tolist()]}
                ),
            },
        )
        columns = COLUMNS if self.confidence is None else (*COLUMNS, "confidence")
        write_text(path.with_suffix(".csv"), csv_text([columns, *self._rows()]))
        return path

    def _rows(self) -> list[tuple[Any, ...]]:
        dice, iou = self.counts.dice().tolist(), self.counts.iou().tolist()
        inter, predicted, actual = (
            getattr(self.counts, name).tolist() for name in ("intersection", "predicted", "actual")
        )
        known = None if self.confidence is None else self.confidence.tolist()
        return [
            (name, c, inter[i][c], predicted[i][c], actual[i][c], f"{dice[i][c]:.6f}", f"{iou[i][c]:.6f}")
            + (() if known is None else (f"{known[i][c]:.6f}",))
            for i, name in enumerate(self.names)
            for c in self.scored
            if predicted[i][c] + actual[i][c]
        ]

    def block(self, model: str, loss: str) -> str:
        """The result as text, in the form of the paper's logs."""
        lines = [f"## TESTING Results for Model: {model} + Loss: {loss} + predict: {self.predictor} ##"]
        for label, key in (
            ("test_loss", "test_loss"),
            ("Pixel_Accuracy", "pixel_accuracy"),
            ("Mean_IoU", "mean_iou"),
            ("Mean_Dice", "mean_dice"),
            ("Class_IoU", "class_iou"),
            ("Class_Dice", "class_dice"),
        ):
            value = self.scores[key]
            if isinstance(value, dict):
                text = "{" + ", ".join(f"{name}: {score:.3f}" for name, score in value.items()) + "}"
            else:
                text = f"{value:.5f}" if key == "test_loss" else f"{value:.3f}"
            lines.append(f"     {label:<15}: {text}")
        return "\n".join(lines)


def results_folder(
    checkpoint: str,
    results: str,
    *,
    threshold: float = 0.5,
    calibrated: bool | str = False,
    focal_corrected: bool = False,
    gate: float | str = 0.5,
) -> Path:
    """Return the folder of results below a run's, so that no variant and no other checkpoint replaces them.

    Args:
        checkpoint: the file's name. Results of ``best_model.pth`` are in ``results`` itself, those of ``last.pth`` in
            ``results/of_last``, and so on.
        results: of the protocol, such as ``results`` or ``results/paper``.
        calibrated: whether a temperature was applied, or "class" for a calibration of each class.
        threshold, focal_corrected, gate: other scores of their own, in a sub-folder.
    """
    variants = {
        "focal_corrected": focal_corrected,
        "calibrated_class" if calibrated == "class" else "calibrated": bool(calibrated),
        f"threshold_{threshold:g}": threshold != 0.5,
        f"gate_{gate}": gate != 0.5,
    }
    variant = "_".join(name for name, here in variants.items() if here)
    stem = Path(checkpoint).stem
    return Path(results, "" if stem == "best_model" else f"of_{stem}", variant)


def comparison(results: Mapping[str, EvalResult]) -> str:
    """One table over all rules, in percent, the best of each column marked with ``*``."""
    columns = [
        ("mDice", "mean_dice"),
        ("mIoU", "mean_iou"),
        ("pooled Dice", "pooled_mean_dice"),
        ("pooled IoU", "pooled_mean_iou"),
    ]
    best = {key: max(result.scores[key] for result in results.values()) for _, key in columns}
    header = ["predictor", *(label for label, _ in columns), "rule's seconds"]
    rows = [
        [
            name,
            *(f"{100 * r.scores[key]:.2f}{'*' if r.scores[key] == best[key] else ' '}" for _, key in columns),
            f"{r.seconds:.2f}",
        ]
        for name, r in results.items()
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    line = [
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join([line[0], "-" * len(line[0]), *line[1:]])


def fingerprint(value: Any) -> str:
    """Return a short hash of a JSON value. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
