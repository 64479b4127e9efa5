"""Per-image scores of rules from the files of `test.py`, and their pairs.

A rule's CSV has a row for each image and scored class whose union of prediction and truth is not empty. An
image's score is the mean over its rows; where it has none it is undefined, and undefined scores make no pair.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.text import read_csv

# What must agree for two rules to have seen the same probabilities.
_SAME = ("checkpoint", "dataset", "protocol", "temperature", "correct_focal", "images")


@dataclass(frozen=True)
class RuleScores:
    """One rule on one checkpoint: `cells[image, class]` is a fraction, `record` what the file at `path` holds."""

    path: Path
    rule: str
    metric: str
    cells: dict[tuple[str, int], float]
    record: dict[str, Any]

    def by_image(self) -> dict[str, float]:
        """The mean over the defined classes of each image."""
        return _means({image: [] for image, _ in self.cells}, ((i, v) for (i, _), v in self.cells.items()))

    def by_class(self) -> dict[int, float]:
        """The mean over the defined images of each class."""
        classes = sorted({c for _, c in self.cells})
        return _means({c: [] for c in classes}, ((c, v) for (_, c), v in self.cells.items()))


def _means(empty: dict[Any, list[float]], items: Any) -> dict[Any, float]:
    for key, value in items:
        empty[key].append(value)
    return {key: math.fsum(values) / len(values) for key, values in empty.items()}


def result_folder(path: Path, protocol: str) -> Path:
    """The folder that holds <rule>.csv: given itself, or a run's `results` (`results/paper`), or a record's.

    Raises:
        FileNotFoundError: none of them holds a result.
    """
    inner = ("results/paper", "paper") if protocol == "paper" else ("results",)
    for folder in (*(path / name for name in inner), path):
        if any(folder.glob("*.csv")):
            return folder
    raise FileNotFoundError(
        f"{path} holds no per-image scores (<rule>.csv); score it first: python test.py -r {path}/..."
    )


def rules_in(folder: Path) -> list[str]:
    """The rules that were scored there."""
    return sorted(path.stem for path in folder.glob("*.csv") if path.with_suffix(".json").is_file())


def read_rule(folder: Path, rule: str, metric: str = "dice") -> RuleScores:
    """Read <rule>.csv and <rule>.json, and check that they belong together.

    Raises:
        FileNotFoundError: the rule was not scored there.
        ValueError: a file is corrupt, holds a row twice, or the two disagree.
    """
    table, sidecar = folder / f"{rule}.csv", folder / f"{rule}.json"
    for path in (table, sidecar):
        if not path.is_file():
            have = ", ".join(rules_in(folder)) or "none"
            raise FileNotFoundError(f"{path} does not exist; rules scored there: {have}")
    cells: dict[tuple[str, int], float] = {}
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
        stated = record["scores"]["mean_dice"]
        with open(table, newline="", encoding="utf-8") as file:
            for row in read_csv(file.read()):
                key = (row["image"], int(row["class"]))
                if key in cells:
                    raise ValueError(f"image {key[0]}, class {key[1]} is there twice")
                cells[key] = _score(row, metric)
    except (ValueError, KeyError, TypeError) as error:
        detail = f"no column or key {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{table}: cannot be read with its {sidecar.name}: {detail}") from None
    scores = RuleScores(sidecar, rule, metric, cells, record)
    if metric == "dice" and stated is not None:
        values = scores.by_image().values()
        mean = math.fsum(values) / len(values) if values else math.nan
        if not abs(mean - stated) < 1e-3:
            raise ValueError(
                f"{table}: its mean Dice is {mean:.4f}, {sidecar.name} says {stated:.4f}; score it again"
            )
    return scores


def _score(row: dict[str, str], metric: str) -> float:
    """The score from the counts, which are exact, rather than from its rounded column."""
    inter, predicted, actual = (int(row[name]) for name in ("intersection", "predicted", "actual"))
    if not 0 <= inter <= min(predicted, actual) or predicted + actual == 0:
        raise ValueError(f"impossible counts {inter}, {predicted}, {actual} for image {row['image']}")
    return 2 * inter / (predicted + actual) if metric == "dice" else inter / (predicted + actual - inter)


def check_same_probabilities(one: RuleScores, other: RuleScores) -> None:
    """Refuse two rules that were not scored on the same checkpoint, images and protocol.

    Raises:
        ValueError: names what differs.
    """
    unlike = [key for key in _SAME if one.record.get(key) != other.record.get(key)]
    if unlike:
        raise ValueError(
            f"{one.rule} and {other.rule} were not scored on the same probabilities: they differ in "
            f"{', '.join(unlike)}; score both in one call of test.py"
        )


def paired(one: dict[Any, float], other: dict[Any, float]) -> tuple[list[float], int]:
    """Differences other − one where both are defined, ordered as `one`, and how many had one side only."""
    common = [key for key in one if key in other]
    return [other[key] - one[key] for key in common], len(one.keys() ^ other.keys())
