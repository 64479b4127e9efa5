"""The choice between the implementations of the exact rules: Python (torch operations), native (C++), Triton.

All give the same masks, unless the scores of volumes (in non-overlapping masks: the gains of labels) differ only by
rounding. The Python solver is the reference: it runs on any device, and computes what the others do not support. The
environment variable RANKSEG_BACKEND=python|native|triton selects one; it is read at each call.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor

from rankseg import native
from rankseg.gather import statistics
from rankseg.masks import RankResult, as_result, rows_of
from rankseg.nonoverlap import non_overlapping_masks, over_classes
from rankseg.solver import solve
from rankseg.validation import check_values

_NAMES = ("python", "native", "triton")
_TRITON = "rankseg.triton_solver"


class Engine(Protocol):
    """A compiled implementation.

    Both functions return None if a value of `probs` is outside [0, 1] or NaN, or if they do not support the arguments.
    Then the caller checks the values, which raises the error, and uses the Python implementation.
    """

    def best_masks(
        self, probs: Tensor, score: str, smooth: float, pruning: bool, allow_overlap: bool
    ) -> RankResult | None:
        """See `rankseg.engines.best_masks`."""

    def expected(self, probs: Tensor, masks: Tensor, score: str, smooth: float) -> Tensor | None:
        """Return the expected scores (N, C) float64 of `masks` (N, C, *S) bool."""


def backend() -> str:
    """Return "native" if the compiled kernel is used for tensors on the CPU, "python" if torch operations are.

    If RANKSEG_BACKEND is set (python, native or triton), return that backend.

    Raises:
        ValueError: RANKSEG_BACKEND is not a backend.
        RuntimeError: RANKSEG_BACKEND=native, and the compiled kernel cannot be used.
    """
    forced = os.environ.get("RANKSEG_BACKEND", "")
    if forced and forced not in _NAMES:
        raise ValueError(
            f"RANKSEG_BACKEND={forced!r} is invalid: expected one of {', '.join(_NAMES)}. "
            "Fix: unset it to choose automatically."
        )
    if forced == "native" and native.library() is None:
        raise RuntimeError(
            f"RANKSEG_BACKEND=native: {native.reason()}. Fix: install a C++ compiler and the package again, "
            "or unset RANKSEG_BACKEND."
        )
    return forced or ("python" if native.library() is None else "native")


def compiled_engine(probs: Tensor) -> Engine | None:
    """Return the compiled implementation to use for `probs`, or None for the Python implementation."""
    name = backend()
    if name == "native" and native.supports(probs):
        return native
    if name == "triton":
        return cast(Engine, importlib.import_module(_TRITON))
    return None


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Run the CPU operations inside on one thread.

    The solver runs thousands of operations that take microseconds each. Waiting for other threads in each of them costs
    more time than a second thread saves, and far more if other programs use the processor.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def best_masks(
    probs: Tensor,
    score: str,
    smooth: float,
    pruning: bool,
    allow_overlap: bool,
    classes: Sequence[int] | None = None,
) -> RankResult:
    """Select the masks of the highest expected score; `score` is "dice" or "iou".

    `probs` (N, C, *S) has passed `validation.check_form`; its values are checked here. `classes`: see
    `nonoverlap.over_classes`.
    """
    if probs.numel() == 0:
        return non_overlapping_masks(probs, score, smooth, pruning)  # any rule: the result is empty
    if classes is not None:
        return over_classes(
            check_values(probs),
            classes,
            lambda part, overlap: best_masks(part, score, smooth, pruning, overlap),
        )
    engine = compiled_engine(probs)
    if engine is not None:
        found = engine.best_masks(probs, score, smooth, pruning, allow_overlap)
        if found is None:  # raises for invalid values; clamps those outside [0, 1] by rounding
            probs = check_values(probs)
            found = engine.best_masks(probs, score, smooth, pruning, allow_overlap)
        if found is not None:
            return found
    with one_thread(probs.device):
        return _with_torch(probs, score, smooth, pruning, allow_overlap)


def _with_torch(probs: Tensor, score: str, smooth: float, pruning: bool, allow_overlap: bool) -> RankResult:
    """Compute `best_masks` with torch operations."""
    if not allow_overlap:
        return non_overlapping_masks(check_values(probs), score, smooth, pruning)
    flat = rows_of(probs)
    known = statistics(flat)
    if not known.are_valid():
        probs = check_values(probs)
        flat = rows_of(probs)
        known = statistics(flat)
    solution = solve(flat, known, score, smooth, pruning)
    return as_result(probs, flat, solution.tau, solution.cutpoint, solution.tied)
