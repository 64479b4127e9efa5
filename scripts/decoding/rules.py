"""Apply a rule to one case: masks or a label map, counts against the labels, and how good the probabilities are.

``args`` is the command line of scripts/decode.py. Shapes: C channels, *S spatial axes.
"""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rankseg
from rankseg import Predictor
from rankseg.calibration import Reliability
from rankseg.masks import VOID
from scripts.decoding.arrays import scratch
from scripts.decoding.cases import Case, slabs, without_background
from scripts.inference.windows import masks_of, may_overlap, parts_of
from trainers.evaluator import proper_scores
from trainers.fitted import pooled_threshold
from trainers.metrics import Counts, Scoring, count

_SUMS = ("count", "forecast", "observed")  # of a reliability curve


def is_label_map(rule: Predictor, channels: int, write: str) -> bool:
    """Whether a rule's result is written as one label per pixel."""
    return write == "labels" or (write == "auto" and (channels == 1 or not may_overlap(rule)))


def select(probs: Tensor, rule: Predictor, folder: Path, device: torch.device) -> np.ndarray:
    """Return the masks (C, *S) bool of a rule; a class or a slab at a time if the rule allows it."""
    masks = scratch(probs.shape, bool, folder)
    if parts_of(rule)[0] in (rankseg.argmax, pooled_threshold):  # they decide each pixel by itself
        for part in slabs(probs.shape[1:], len(probs)):
            masks[:, part] = rule(probs[None, :, part].to(device))[0].cpu().numpy()
    else:
        for mask, selected in zip(masks, masks_of(probs, rule, device), strict=True):
            mask[...] = selected.cpu().numpy()
    return masks


def label_map(case: Case, masks: np.ndarray, args: Namespace) -> np.ndarray:
    """Return one label per pixel (*S); pixels without a class are background if there is no channel for it."""
    unassigned = 0 if case.first and args.unassigned == "void" else args.unassigned
    fill: int = VOID if unassigned == "void" else 0 if unassigned == "max" else unassigned
    top = max(len(masks) - 1 + case.first, fill, args.void if case.valid is not None else 0)
    dtypes = (np.uint8, np.uint16, np.int16, np.int32)
    dtype = next(t for t in dtypes if np.iinfo(t).min <= fill and top <= np.iinfo(t).max)
    labels = scratch(masks.shape[1:], dtype, args.out)
    for part in slabs(masks.shape[1:], 2 * len(masks)):
        some, probs = torch.from_numpy(masks[None, :, part]), case.probs[None, :, part]
        inside = rankseg.label_map(some, unassigned, probs, first=case.first)[0].numpy()
        labels[part] = inside if case.valid is None else np.where(case.valid[part], inside, args.void)
    return labels


def confidence(written: np.ndarray, case: Case) -> list[float]:
    """Return `rankseg.confidence` of every mask that is written; NaN for a background without a channel."""
    values = [math.nan] * case.first
    for label, channel in enumerate(case.probs, case.first):
        mask = written[label - case.first] if written.ndim == case.probs.ndim else written == label
        part = rankseg.confidence(channel[None, None], torch.from_numpy(np.ascontiguousarray(mask))[None, None])
        values.append(float(part))
    return values


def count_pixels(written: np.ndarray, labels: np.ndarray, classes: int, void: int) -> dict[str, list]:
    """Count masks (C, *S) or a label map (*S) against the labels, slab by slab; return the values of `Counts`.

    If label 0, the background, has no channel, the pixels without a mask are its mask.
    """
    parts = []
    for part in slabs(labels.shape, 2 * classes):
        if written.ndim == labels.ndim:
            found = torch.from_numpy(written[part].astype(np.int64))
            masks = found == torch.arange(classes).view(-1, *[1] * found.dim())
        else:
            masks = torch.from_numpy(np.ascontiguousarray(written[:, part]))
            masks = torch.cat([~masks.any(0, keepdim=True), masks]) if len(masks) < classes else masks
        parts.append(count(masks[None], Scoring(classes, (), void).encode(_long(labels[part])[None])))
    return {name: values.tolist() for name, values in vars(Counts.cat(parts).pooled()).items()}


def observe(case: Case, labels: np.ndarray, args: Namespace) -> dict[str, Any]:
    """Measure the probabilities at the pixels that `trainers.evaluator.sample_pixels` takes.

    Returns:
        "reliability": the lists that `reliability_of` reads; "likelihood": log-loss and Brier score.
    """
    flat = labels.reshape(-1)
    step = max(1, flat.size // (1 << 14))
    truth = Scoring(len(case.probs) + case.first, (), args.void).encode(_long(flat[::step])[None])
    truth = without_background(truth) if case.first else truth
    sample = case.probs.flatten(1)[None, :, ::step].contiguous()
    curve = Reliability()
    curve.update(sample, truth.onehot, truth.valid)
    link = args.link or ("sigmoid" if case.first else "softmax")
    return {
        "reliability": dict(zip(_SUMS, curve.sums.tolist(), strict=True)),
        "likelihood": proper_scores(sample, truth, link)[0].tolist(),
    }


def reliability_of(plain: dict[str, list]) -> Reliability:
    """Return a reliability curve from the lists that JSON holds."""
    curve = Reliability(bins=len(plain["count"][0]))
    curve.add(torch.tensor([plain[name] for name in _SUMS], dtype=torch.float64))
    return curve


def _long(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(labels).astype(np.int64))
