"""Decode one case with several rules: masks or label maps, and their counts against the labels.

Shapes: C classes, *S spatial axes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rankseg
from configs.errors import UserError
from rankseg import Predictor
from rankseg.calibration import Reliability
from rankseg.label_map import VOID
from scripts.decoding.arrays import scratch
from scripts.decoding.cases import Case, slabs
from scripts.inference.windows import may_overlap, one_by_one, parts_of
from trainers.evaluator import proper_scores
from trainers.fitted import pooled_threshold
from trainers.metrics import Counts, Truth, count, encode


@dataclass(frozen=True)
class Output:
    """What is written for a case.

    Attributes:
        write: "labels", "masks", or "auto": labels for one class and for rules whose masks do not overlap.
        unassigned: label of pixels without a class, as in `rankseg.label_map`.
        foreground_only: channels are the labels 1, 2, …; label 0, the background, has no channel. None: if there is
            one channel.
        void: label value of pixels that are not scored.
        confidence: whether to compute the expected Dice of every mask.
        link: of the network, if known; decides which log-loss is reported.
    """

    write: str = "auto"
    unassigned: str | int = "void"
    foreground_only: bool | None = None
    void: int = 255
    confidence: bool = False
    link: str | None = None

    def first(self, classes: int) -> int:
        """Return the label of the first channel."""
        alone = classes == 1 if self.foreground_only is None else self.foreground_only
        return int(alone)

    def as_labels(self, rule: Predictor, classes: int) -> bool:
        """Whether a rule's result is written as one label per pixel."""
        if self.write != "auto":
            return self.write == "labels"
        return classes == 1 or not may_overlap(rule)


@dataclass
class Decoded:
    """The result of one rule on one case: an array to write, seconds, counts (1, C) if there are labels, confidence."""

    array: np.ndarray
    key: str
    seconds: float
    counts: Counts | None = None
    confidence: list[float] | None = None


@dataclass
class Scored:
    """The results of one case by rule, the reliability of its probabilities, their log-loss and Brier score."""

    rules: dict[str, Decoded] = field(default_factory=dict)
    reliability: Reliability = field(default_factory=Reliability)
    likelihood: list[float] = field(default_factory=list)


def decode(
    case: Case,
    rules: Mapping[str, Predictor],
    output: Output,
    folder: Path,
    device: torch.device,
    other: Callable[[Any], Case],
) -> Scored:
    """Apply every rule to the probabilities of one case.

    Args:
        folder: of temporary files.
        other: loads the case with the ``to_probs`` of a rule that has probabilities of its own.
    """
    result = Scored()
    classes = len(case.probs)
    first = output.first(classes)
    labels = None if case.labels is None else mask_labels(case.labels, case.valid, output.void)
    if labels is not None:
        check_labels(labels, classes + first, output.void)
    for name, rule in rules.items():
        of_rule = other(rule.to_probs) if hasattr(rule, "to_probs") else case
        started = time.perf_counter()
        masks = _masks(of_rule.probs, rule, folder, device)
        seconds = time.perf_counter() - started
        if output.as_labels(rule, classes):
            array = _label_map(of_rule, masks, output, first, folder)
            found = Decoded(array, "labels", seconds)
        else:
            found = Decoded(masks, "masks", seconds)
        if labels is not None:
            found.counts = _counts(found, labels, classes, first, output.void)
        if output.confidence:
            found.confidence = _confidence(found, of_rule.probs, first)
        result.rules[name] = found
    if labels is not None:
        _observe(result, case.probs, labels, first, output.void, output.link)
    return result


def _confidence(found: Decoded, probs: Tensor, first: int) -> list[float]:
    """Return `rankseg.confidence` of every mask that is written; NaN for a background without a channel."""
    values = [float("nan")] * first
    for c, channel in enumerate(probs):
        mask = found.array[c] if found.key == "masks" else found.array == c + first
        part = rankseg.confidence(channel[None, None], torch.from_numpy(np.ascontiguousarray(mask))[None, None])
        values.append(float(part))
    return values


def check_labels(labels: np.ndarray, count: int, void: int) -> None:
    """Raise UserError for labels without a channel."""
    wrong = set[int]()
    for part in slabs(labels.shape):
        wrong |= {int(v) for v in np.unique(labels[part])} - {*range(count), void}
    if wrong:
        raise UserError(
            f"labels {sorted(wrong)[:5]} are neither in 0..{count - 1} nor void={void}. "
            "Fix: pass --void VALUE or --foreground-only, or change the labels."
        )


def mask_labels(labels: np.ndarray, valid: np.ndarray | None, void: int) -> np.ndarray:
    """Labels with void outside the field of view."""
    return labels if valid is None else np.where(valid, labels, np.asarray(void, np.int64))


def _masks(probs: Tensor, rule: Predictor, folder: Path, device: torch.device) -> np.ndarray:
    """The masks (C, *S) bool of a rule; a class or a slab at a time if the rule allows it."""
    masks = scratch(probs.shape, bool, folder)
    if one_by_one(rule):
        for c, channel in enumerate(probs):
            masks[c] = rule(channel[None, None].to(device))[0, 0].cpu().numpy()
    elif parts_of(rule)[0] in (rankseg.argmax, pooled_threshold):  # each pixel by itself
        for part in slabs(probs.shape[1:], len(probs)):
            masks[:, part] = rule(probs[None, :, part].to(device))[0].cpu().numpy()
    else:
        masks[:] = rule(probs[None].to(device))[0].cpu().numpy()
    return masks


def _label_map(case: Case, masks: np.ndarray, output: Output, first: int, folder: Path) -> np.ndarray:
    """One label per pixel (*S); pixels without a class are background if there is no channel for it."""
    unassigned: str | int = output.unassigned
    if first and unassigned == "void":
        unassigned = 0
    fill = unassigned if isinstance(unassigned, int) else VOID if unassigned == "void" else 0
    top = max(len(masks) - 1 + first, fill, output.void if case.valid is not None else 0)
    dtype = next(
        t for t in (np.uint8, np.uint16, np.int16, np.int32) if np.iinfo(t).min <= fill and top <= np.iinfo(t).max
    )
    labels = scratch(masks.shape[1:], dtype, folder)
    for part in slabs(masks.shape[1:], 2 * len(masks)):
        inner = rankseg.label_map(
            torch.from_numpy(masks[None, :, part]), unassigned, case.probs[None, :, part], first=first
        )[0].numpy()
        labels[part] = inner if case.valid is None else np.where(case.valid[part], inner, output.void)
    return labels


def _counts(found: Decoded, labels: np.ndarray, classes: int, first: int, void: int) -> Counts:
    """Count what is written against the labels, slab by slab; channel 0 is the background if it has no other."""
    total: Counts | None = None
    for part in slabs(labels.shape, 2 * (classes + first)):
        truth = encode(_long(labels[part])[None], classes + first, void)
        if found.key == "labels":
            written = torch.from_numpy(found.array[part].astype(np.int64))
            index = torch.arange(classes + first).view(-1, *[1] * written.dim())
            masks = written == index
        else:
            masks = torch.from_numpy(np.ascontiguousarray(found.array[:, part]))
            if first:
                masks = torch.cat([~masks.any(0, keepdim=True), masks])
        one = count(masks[None], truth)
        total = one if total is None else Counts(
            *(getattr(total, f.name) + getattr(one, f.name) for f in fields(Counts))
        )  # fmt: skip
    assert total is not None
    return total


def _observe(result: Scored, probs: Tensor, labels: np.ndarray, first: int, void: int, link: str | None) -> None:
    """Measure the probabilities at the pixels that `trainers.evaluator.observe` takes."""
    flat = labels.reshape(-1)
    step = max(1, flat.size // (1 << 14))
    truth = encode(_long(flat[::step])[None], len(probs) + first, void)
    truth = Truth(truth.onehot[:, first:], truth.valid, truth.actual[:, first:], truth.pixels)
    sample = probs.flatten(1)[None, :, ::step].contiguous()
    result.reliability.update(sample, truth.onehot, truth.valid)
    link = link or ("sigmoid" if first else "softmax")
    result.likelihood = proper_scores(sample, truth, link)[0].tolist()


def _long(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(labels).astype(np.int64))


def counts_to_plain(counts: Counts) -> dict[str, list[int]]:
    """Counts (1, C) as lists, for JSON."""
    return {f.name: getattr(counts, f.name)[0].tolist() for f in fields(Counts)}


def counts_from_plain(plain: Mapping[str, Any]) -> Counts:
    """The inverse of `counts_to_plain`."""
    return Counts(*(torch.as_tensor(plain[f.name], dtype=torch.int64)[None] for f in fields(Counts)))


def reliability_to_plain(reliability: Reliability) -> dict[str, list]:
    """The sums of a reliability curve as lists, for JSON."""
    return {name: getattr(reliability, name).tolist() for name in ("count", "forecast", "observed")}


def reliability_from_plain(plain: Mapping[str, Any]) -> Reliability:
    """The inverse of `reliability_to_plain`."""
    reliability = Reliability(bins=len(plain["count"][0]))
    for name in ("count", "forecast", "observed"):
        setattr(reliability, name, torch.as_tensor(plain[name], dtype=torch.float64))
    return reliability
