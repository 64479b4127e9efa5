"""Our results: read from the files of `test.py`, grouped over seeds, never averaged unless alike."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from configs.stored import NON_RESULT_KEYS

_FREE = NON_RESULT_KEYS | {"seed", "hydra"}  # what may differ within one average
_AT_MOST = 5


@dataclass(frozen=True)
class Result:
    """One rule on one checkpoint; `dice` and `iou` in percent, NaN where nothing was scored.

    `variant` says what was done to the probabilities before the rule, "" for nothing.
    """

    path: Path
    collection: str
    dataset: str
    split: str
    protocol: str
    model: str
    loss: str
    variant: str
    predictor: str
    seed: int
    num_images: int
    checkpoint: str
    dice: float
    iou: float
    identity: dict[str, Any] = field(repr=False)
    config: dict[str, Any] = field(repr=False)

    @property
    def cell(self) -> tuple[str, ...]:
        """What is averaged over seeds: everything that names a cell of a table."""
        return (*self.row, self.predictor)

    @property
    def row(self) -> tuple[str, ...]:
        """A row of a table: collection, protocol, data set, split, model, loss, variant."""
        names = ("collection", "protocol", "dataset", "split", "model", "loss", "variant")
        return tuple(getattr(self, name) for name in names)


@dataclass(frozen=True)
class Problem:
    """A result file that cannot be used, and why."""

    path: Path
    reason: str
    name: str  # the path below the folder that was read


@dataclass(frozen=True)
class Group:
    """The seeds of one cell; `reason` is the reason why they have no average, or empty."""

    results: tuple[Result, ...]
    reason: str = ""

    @property
    def first(self) -> Result:
        """Any of them: what a cell is named by is common to all."""
        return self.results[0]

    def summary(self, metric: str) -> tuple[float, float]:
        """Mean and half the range over seeds of "dice" or "iou", in percent."""
        values = [getattr(result, metric) for result in self.results]
        return math.fsum(values) / len(values), (max(values) - min(values)) / 2


def read_results(saved: Path) -> tuple[list[Result], list[Problem]]:
    """Read every result file below `saved`; what is corrupt comes back as a Problem.

    A result file is a JSON file in a folder `results` of a run (`results/paper` for the paper's protocol) or
    below `saved/results`. The same record found twice, as a run and as its copy in git, counts once.
    """
    results: dict[tuple, Result] = {}
    problems = []
    for path in sorted(
        saved.rglob("*.json"), key=lambda p: ("results" not in p.relative_to(saved).parts[:1], p)
    ):
        inside = path.relative_to(saved.parent).parts[:-1]
        if "results" not in inside or path.name in ("provenance.json", "report.json"):
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(record, dict) and not {"format", "predictor", "scores"} & record.keys():
                continue  # another kind of record beside the results
            result = parse_result(path, saved, record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(Problem(path, _describe(error), str(path.relative_to(saved))))
            continue
        key = (
            *result.cell[1:],
            result.seed,
            result.checkpoint,
            result.dice,
            result.iou,
            str(result.identity),
        )
        results.setdefault(key if result.checkpoint else (path,), result)
    return list(results.values()), problems


def _describe(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON (line {error.lineno}: {error.msg})"
    return f"no key {error}" if isinstance(error, KeyError) else str(error)


def parse_result(path: Path, saved: Path, record: dict[str, Any]) -> Result:
    """What a result file below `saved` says."""
    if record["format"] != 1:
        raise ValueError(f"format {record['format']!r}, this program reads format 1")
    data, scores = record["dataset"], record["scores"]
    run = _run_folder(path)
    return Result(
        path=path,
        collection=_collection(run, saved),
        dataset=str(data["name"]),
        split=str(data["split"]),
        protocol=str(record["protocol"]),
        model=str(record["model"]),
        loss=str(record["loss"]),
        variant=variant_of(record),
        predictor=str(record["predictor"]),
        seed=int(record["seed"]),
        num_images=int(data["num_images"]),
        checkpoint=str((record.get("checkpoint") or {}).get("sha256") or ""),
        dice=_percent(scores, "mean_dice"),
        iou=_percent(scores, "mean_iou"),
        identity={
            "data fingerprint": data["fingerprint"],
            "number of images": data["num_images"],
            "link": record.get("link"),
            "scored classes": record.get("scored"),
            "model": record.get("model_detail"),
            "temperature": None if "temperature_fitted_on" in record else record.get("temperature"),
            "images of the temperature": record.get("temperature_fitted_on"),
            "correct_focal": record.get("correct_focal"),
            "checkpoint": (record.get("checkpoint") or {}).get("file"),
            "configuration": record.get("config_hash"),
        },
        config=_config(run),
    )


def variant_of(record: dict[str, Any]) -> str:
    """What was done to the probabilities before the rules, and an unusual threshold of T: "WORD: REASON; ..."."""
    parts, temperature = [], record.get("temperature")
    if record.get("correct_focal"):
        parts.append("corrected: the bias of the focal loss undone in closed form")
    if "temperature_fitted_on" in record:
        same = record["temperature_fitted_on"] == record["dataset"]["fingerprint"]
        where = ", which are the images scored" if same else ""
        parts.append(f"calibrated: a temperature fitted on the validation images{where}")
    elif temperature not in (None, 1):
        parts.append(f"temperature {temperature:g}: logits divided by it")
    if record.get("calibration"):
        parts.append(
            "calibrated per class: a temperature and a bias per class fitted on the validation images"
        )
    if record.get("gate") not in (None, 0.5):
        parts.append(f"gate {record['gate']}: when ranking rules leave a class out")
    if record.get("threshold") not in (None, 0.5):
        parts.append(f"T at {record['threshold']:g}: another threshold of T")
    return "; ".join(parts)


def short_variant(variant: str) -> str:
    """The words of a variant without their reasons: "corrected, calibrated"."""
    return ", ".join(part.partition(":")[0] for part in variant.split("; "))


def _percent(scores: dict[str, Any], key: str) -> float:
    """A fraction as percent; null is NaN."""
    value = math.nan if scores[key] is None else float(scores[key])
    if not (math.isnan(value) or 0 <= value <= 1):
        raise ValueError(f"{key} is {value}, a fraction between 0 and 1 was expected")
    return 100 * value


def _run_folder(path: Path) -> Path:
    """The folder `seed<k>` that the file belongs to, or the file's own folder."""
    return next((p for p in path.parents if p.name.startswith("seed") and p.name[4:].isdigit()), path.parent)


def _collection(run: Path, saved: Path) -> str:
    """What stands before <dataset>/<model>/<loss>/seed<k>: "" for runs, "demo", "results/kvasir"."""
    parts = run.relative_to(saved).parts
    named = parts[:-4] if run.name.startswith("seed") else parts
    return "/".join(named)


def _config(run: Path) -> dict[str, Any]:
    """The run's configuration, flat, to name a difference by its key; {} where the file is absent."""
    path = run / "config.yaml"
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return {}
    return _flat(tree) if isinstance(tree, dict) else {}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in _FREE:
            continue
        flat.update(_flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def group_seeds(results: Iterable[Result]) -> dict[tuple[str, ...], Group]:
    """Gather the seeds of each cell; what differs in more than its seed is refused with the difference."""
    cells: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        cells.setdefault(result.cell, []).append(result)
    groups = {}
    for cell, members in cells.items():
        members.sort(key=lambda r: (r.seed, str(r.path)))
        found = next((text for other in members[1:] if (text := difference(members[0], other))), "")
        groups[cell] = Group(tuple(members), found or _twice(members))
    return groups


def difference(one: Result, other: Result) -> str:
    """In what two results differ so that they have no common average; empty if in nothing."""
    unlike = [key for key, value in one.identity.items() if value != other.identity[key]]
    keys = []
    if one.config and other.config:  # its keys say more than its hash, and hold the training too
        keys = [key for key in one.config | other.config if one.config.get(key) != other.config.get(key)]
    if keys or len(unlike) > 1:
        unlike = [key for key in unlike if key != "configuration"]
    parts = [f"{key} {one.identity[key]} against {other.identity[key]}" for key in unlike]
    parts += [f"{key} {one.config.get(key)} against {other.config.get(key)}" for key in keys]
    if not parts:
        return ""
    more = f"; and {len(parts) - _AT_MOST} more" if len(parts) > _AT_MOST else ""
    return f"seeds {one.seed} and {other.seed} differ: {'; '.join(parts[:_AT_MOST])}{more}"


def _twice(members: list[Result]) -> str:
    for one, other in pairwise(members):
        if one.seed == other.seed:
            return f"seed {one.seed} is there twice: {one.path.name} of two checkpoints or two scores"
    return ""
