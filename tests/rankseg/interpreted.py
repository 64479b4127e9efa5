"""The kernels of `rankseg.triton_solver` in Triton's interpreter against the Python solver.

Run by test_triton.py in a process of its own, because Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import traceback
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rankseg
from rankseg import triton_solver as kernels
from tests.rankseg.claiming import _VIEWS, _WAITS

slow = pytest.mark.slow
RULES = {"dice": rankseg.rank_dice, "iou": rankseg.rank_iou}


def maps() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1, 1, 9, 11, generator=generator)
    large = torch.rand(1, 1, 75, 80, generator=generator)  # the bracket is a guess
    return {
        "uniform": values,
        "tiny objects": values**20,
        "tied": (values * 6).round() / 6,
        "zeros and ones": (values < 0.3).float(),
        "half precision, strided": values.half().transpose(2, 3),
        "double precision": values.double(),
        "nothing likely": values / 4,
        "large": large,
        "large, tied": (large * 50).round() / 50,
    }


@pytest.mark.parametrize("score", ["dice", "iou"])
@pytest.mark.parametrize("kind", [k for k in maps() if not k.startswith("large")])
def test_against_the_python_solver(kind: str, score: str) -> None:
    compare(maps()[kind], score)


@pytest.mark.parametrize("smooth", [0.7, 90.0, *(pytest.param(value, marks=slow) for value in (1e-3, 1.0, 2.5))])
@pytest.mark.parametrize("score", ["dice", "iou"])
@pytest.mark.parametrize("kind", ["uniform", "tiny objects", "tied", "zeros and ones"])
def test_smoothed_scores(kind: str, score: str, smooth: float) -> None:
    compare(maps()[kind], score, smooth)


@slow
@pytest.mark.parametrize("score", ["dice", "iou"])
@pytest.mark.parametrize("kind", ["large", "large, tied"])
def test_large_objects(kind: str, score: str) -> None:
    compare(maps()[kind], score)
    compare(maps()[kind], score, smooth=700.0)


def compare(probs: Tensor, score: str, smooth: float = 0.0) -> None:
    for pruning in (True, False):
        found = kernels.best_masks(probs, score, smooth, pruning, True)
        want = RULES[score](probs, smooth=smooth, pruning=pruning)
        for mine, other in zip(found, want, strict=True):
            assert mine.dtype == other.dtype and torch.equal(mine, other)


def test_an_overflowing_window_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SMALLEST_WINDOW", 16)
    compare(maps()["uniform"], "dice")


def test_bounded_costs() -> None:
    """Launches of torch and of Triton, and synchronisations (one more is the flags that the host reads in the end)."""
    kinds: Counter[str] = Counter()

    class Ledger(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            frames = traceback.walk_stack(None)
            if not any("/triton/" in frame.f_code.co_filename for frame, _ in frames):
                kinds[func.overloadpacket.__name__] += 1  # the interpreter copies the arguments of each kernel
            return func(*args, **(kwargs or {}))

    probs = maps()["uniform"]
    kernels.best_masks(probs, "dice", 0.0, True, True)  # fills the caches
    with Ledger():
        kernels.best_masks(probs, "dice", 0.0, True, True)
    assert sum(kinds[name] for name in _WAITS) + 1 <= 5, kinds
    assert sum(n for name, n in kinds.items() if name not in _VIEWS) + 8 <= 150, kinds


def test_what_it_leaves_to_others() -> None:
    probs = maps()["uniform"]
    assert kernels.best_masks(probs, "dice", 100.0, True, True) is None  # more than pixels
    assert kernels.best_masks(probs, "dice", 0.0, True, False) is None
    for wrong in (float("nan"), 1.5, -0.1):
        assert kernels.best_masks(probs.masked_fill(probs > 0.99, wrong), "dice", 0.0, True, True) is None


def test_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels leave to others is solved all the same; invalid values get the words of the Python solver."""
    probs, calls, best_masks = maps()["uniform"], [], kernels.best_masks
    monkeypatch.setattr(kernels, "best_masks", lambda *given: calls.append(given) or best_masks(*given))
    printed = []
    for backend in ("python", "triton"):
        monkeypatch.setenv("RANKSEG_BACKEND", backend)
        with pytest.raises(ValueError, match=r"probs must be in \[0, 1\]") as caught:
            rankseg.rank_dice(probs * 2)
        taus = [rankseg.rank_dice(probs, smooth=smooth).tau.tolist() for smooth in (0.0, 1.0, 1e9)]
        printed.append((taus, str(caught.value)))
        assert bool(calls) == (backend == "triton")
    assert printed[0] == printed[1]
