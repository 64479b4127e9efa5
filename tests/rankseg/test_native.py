"""The compiled kernel against the Python solver, and what happens if it cannot be used."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rankseg
from rankseg import native
from rankseg.nonoverlap import surrogate_objective

RULES = {"dice": rankseg.rank_dice, "iou": rankseg.rank_iou}
EXPECTED = {"dice": rankseg.expected_dice, "iou": rankseg.expected_iou}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SMOOTH = (0.0, 0.0, 1.0, 0.3, 10.0, 1e3, 1e6)


@pytest.fixture
def kernel() -> Iterator[object]:
    if native.library() is None:
        pytest.skip(native.reason())
    library, threads = native.library(), torch.get_num_threads()
    yield library
    library.rankseg_instruction_set(9)
    torch.set_num_threads(threads)


def with_backend(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKSEG_BACKEND", name)
        return function(*arguments, **options)


def with_both(function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    return [with_backend(name, function, *arguments, **options) for name in ("python", "native")]


def random_map(generator: torch.Generator) -> Tensor:
    """A map of random size, distribution, dtype and memory layout."""

    def number(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    shape = (int(number(1, 4)), int(number(1, 5)), int(10 ** number(0, 2.3)), int(10 ** number(0, 2.3)))
    p = torch.rand(shape, generator=generator)
    kinds = (
        lambda: p,
        lambda: torch.softmax(number(0, 20) * torch.randn(shape, generator=generator), 1),
        lambda: (p * 10).round() / 10,
        lambda: ((p - 0.7) * 50).clamp(0, 1),
        lambda: p.pow(8),
        lambda: p * 10 ** number(-4, 0),
        lambda: (p > number(0, 1)).float(),
        lambda: torch.full_like(p, number(0, 1)),
        lambda: torch.where(torch.rand(shape, generator=generator) < 0.01, p, p * 1e-3),
    )
    maps = kinds[int(number(0, len(kinds)))]().to(DTYPES[int(number(0, 4))])
    layout = number(0, 1)
    if layout < 0.2:
        return maps.transpose(2, 3)
    if layout < 0.4:
        return maps.contiguous(memory_format=torch.channels_last)
    return maps[:, :, ::2] if layout < 0.5 else maps


def compare(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        probs = random_map(generator)
        smooth = SMOOTH[int(torch.randint(len(SMOOTH), (), generator=generator))]
        pruning = bool(torch.rand((), generator=generator) < 0.3)
        masks = torch.rand(probs.shape, generator=generator) < torch.rand((), generator=generator)
        for score, rule in RULES.items():
            what = (seed, number, score, tuple(probs.shape), probs.stride(), probs.dtype, smooth, pruning)
            slow, fast = with_both(rule, probs, smooth=smooth, pruning=pruning)
            for one, two in zip(slow, fast, strict=True):
                assert one.dtype == two.dtype and one.shape == two.shape, what
                assert torch.equal(one, two), what
            for mask in (masks, slow.predict):
                # The Python solver sums powers in the precision of the map, which costs digits.
                values = with_both(EXPECTED[score], probs.double(), mask, smooth=smooth)
                torch.testing.assert_close(*values, rtol=1e-11, atol=1e-13, msg=str(what))
                single = with_backend("native", EXPECTED[score], probs, mask, smooth=smooth)
                torch.testing.assert_close(single, values[1], rtol=1e-11, atol=1e-13, msg=str(what))


def test_the_kernel_equals_the_python_solver(kernel) -> None:
    compare(seed=0, count=20)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_the_kernel_equals_the_python_solver_on_many_maps(kernel, seed: int) -> None:
    compare(seed, count=400)


@pytest.mark.parametrize("score", RULES)
def test_non_overlapping_masks_equal(kernel, score: str) -> None:
    """Label maps agree but for pixels whose gains tie to rounding; the objective agrees always."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        probs = random_map(generator)
        probs = probs / probs.sum(1, keepdim=True).clamp(min=1)
        slow, fast = with_both(RULES[score], probs, allow_overlap=False)
        assert int(fast.predict.sum(1).max()) <= 1
        assert torch.equal(fast.tau, fast.predict.flatten(2).sum(2))
        outside = probs.masked_fill(fast.predict, 0).flatten(2).amax(2)
        assert torch.equal(fast.cutpoint, outside)
        present = probs.flatten(2).amax(2) > 0.5
        objectives = []
        for result in (slow, fast):
            labels = torch.where(result.predict.any(1), result.predict.float().argmax(1), probs.shape[1])
            objectives.append(surrogate_objective(probs.double().flatten(2), labels.flatten(1), present, score, 0.0))
        torch.testing.assert_close(*objectives, rtol=1e-6, atol=0)
        assert (slow.predict != fast.predict).sum() <= 1e-3 * probs.numel() + 2


def test_long_rows_are_shared_by_threads(kernel) -> None:
    """Rows above a million pixels are cut into chunks: any number of threads, layout or instruction set is equal."""
    generator = torch.Generator().manual_seed(4)
    probs = torch.rand(1, 2, 1100, 1000, generator=generator).pow(3)
    probs[0, 1] = (probs[0, 1] * 100).round() / 100
    expected = with_backend("python", rankseg.rank_dice, probs)
    for threads, level in itertools.product((1, 3), (0, 1, 2)):
        torch.set_num_threads(threads)
        kernel.rankseg_instruction_set(level)
        for maps in (probs, probs.contiguous(memory_format=torch.channels_last)):
            found = with_backend("native", rankseg.rank_dice, maps)
            assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def test_the_order_of_the_threads_does_not_change_a_mask(kernel) -> None:
    """Equal pixels of a chunk become few runs, so that the count of pixels in the bracket falls while others rise."""
    generator = torch.Generator().manual_seed(9)
    distinct, equal, certain = torch.zeros(3, 16, 1 << 16, dtype=torch.bool)
    distinct[:8] = torch.rand(8, 1 << 16, generator=generator).argsort(1) < 7130
    equal[8:11, : 30 * 2048] = True
    near = int(distinct.sum() + equal.sum())
    certain[:8] = ~distinct[:8]
    certain &= certain.flatten().cumsum(0).view_as(certain) <= int(1.4 * near)
    ones = int(certain.sum())
    cut = ((ones**2 + ones * near) ** 0.5 - ones) / near
    spread = cut * (1 + 5e-5 * (torch.rand(16, 1 << 16, generator=generator, dtype=torch.float64) - 0.5))
    probs = torch.where(distinct, spread, cut * (1 - 1e-5) * equal.double()) + certain.double()
    probs = probs.float().view(1, 1, 1024, 1024)
    torch.set_num_threads(1)
    expected = with_backend("native", rankseg.rank_dice, probs)
    torch.set_num_threads(2)
    for _ in range(100):
        found = with_backend("native", rankseg.rank_dice, probs)
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize("flush", [False, True])
def test_every_number_of_half_precision_is_read(kernel, flush: bool) -> None:
    """The expected Dice of one pixel is its probability. float16 has values that are subnormal, but not as floats."""
    probs = torch.arange(0x3C00 + 1, dtype=torch.int16).view(torch.float16)
    probs = torch.cat([probs, -probs[:1]])
    expected = probs.double()
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this processor always reads subnormal numbers")
    try:
        for level in (0, 1, 2):
            kernel.rankseg_instruction_set(level)
            masks = torch.ones(len(probs), 1, 1, dtype=torch.bool)
            found = with_backend("native", rankseg.expected_dice, probs.view(-1, 1, 1), masks)
            torch.testing.assert_close(found.flatten(), expected, rtol=1e-14, atol=0)
            row = torch.cat([torch.full((9999,), 1e-4), probs[: 1 << 10]]).half().view(1, 1, -1)  # single precision
            dice = with_backend("native", rankseg.expected_dice, row, row > 0, smooth=1.0)
            torch.testing.assert_close(
                dice,
                with_backend("native", rankseg.expected_dice, row.double(), row > 0, smooth=1.0),
                rtol=1e-10,
                atol=0,
            )
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("pixels, p", [(14_746, 0.04), (60_000, 1.234e-4), (1_000_000, 1.3e-5)])
def test_the_empty_mask_of_a_long_map_is_accurate(kernel, pixels: int, p: float) -> None:
    """P(no object pixel) = (1 - p)^n: rounding must not grow with n."""
    probs = torch.full((1, 1, pixels), p, dtype=torch.float64)
    found = with_backend(
        "native", rankseg.expected_dice, probs, torch.zeros_like(probs, dtype=torch.bool), smooth=1e-300
    )
    assert math.log(float(found)) == pytest.approx(pixels * math.log1p(-p), rel=0, abs=1e-12)


@pytest.mark.parametrize("score", RULES)
def test_maps_of_zeros_and_ones_need_no_large_bracket(kernel, score: str) -> None:
    """No pixel is near the cut-off, and millions are equal: the objects themselves, at the cost of any other map."""
    object_at = torch.rand(1, 2, 160, 160, 160, generator=torch.Generator().manual_seed(5)) < 0.3
    object_at[0, 1] = True
    result = with_backend("native", RULES[score], object_at.half())
    assert torch.equal(result.predict, object_at)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 1.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("overlap", [True, False])
def test_invalid_values_are_reported_in_the_same_words(kernel, value: float, dtype: torch.dtype, overlap: bool) -> None:
    probs = torch.full((2, 3, 50, 41), 0.25, dtype=dtype)
    probs[1, 2, 49, 40] = value
    messages = []
    for name, rule in itertools.product(("python", "native"), RULES.values()):
        with pytest.raises(ValueError) as error:
            with_backend(name, rule, probs, allow_overlap=overlap)
        messages.append(str(error.value))
    for name, score in itertools.product(("python", "native"), EXPECTED.values()):
        with pytest.raises(ValueError) as error:
            with_backend(name, score, probs, probs > 0.1)
        messages.append(str(error.value))
    assert len(set(messages)) == 1 and "probs" in messages[0]


def test_rounding_outside_of_the_range_is_clamped(kernel) -> None:
    probs = torch.rand(1, 2, 30, 30, generator=torch.Generator().manual_seed(6))
    probs[0, 0, 0, 0], probs[0, 1, 3, 3] = 1 + 5e-6, -5e-6
    before = probs.clone()
    slow, fast = with_both(rankseg.rank_dice, probs)
    assert all(torch.equal(*pair) for pair in zip(slow, fast, strict=True))
    assert torch.equal(probs, before)


def bytes_of(masks: Tensor) -> bytes:
    """The memory of a tensor, without an operation of torch: these may wait for OpenMP threads that a fork has lost."""
    return ctypes.string_at(masks.data_ptr(), masks.numel())


def test_a_forked_process_has_threads_of_its_own(kernel) -> None:
    torch.set_num_threads(3)
    probs = torch.rand(2, 4, 300, 300, generator=torch.Generator().manual_seed(7))
    expected = with_backend("native", rankseg.rank_dice, probs)
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            found = with_backend("native", rankseg.rank_dice, probs)
            os.write(write, b"equal" if bytes_of(found.predict) == bytes_of(expected.predict) else b"different")
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 100) == b"equal"
    os.waitpid(child, 0)


@pytest.mark.parametrize("damage", ["none", "absent", "garbage", "cut", "other interface"])
def test_a_library_that_cannot_be_loaded_is_reported_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    built = next((path for name in native._NAMES if (path := root / "rankseg" / name).exists()), None)
    if built is None and damage not in ("absent", "garbage"):
        pytest.skip("the compiled kernel is not installed")
    target = tmp_path / native._NAMES[0]
    if damage == "garbage":
        target.write_bytes(b"\x7fELF" + bytes(1000))
    elif damage == "cut":
        target.write_bytes(built.read_bytes()[: built.stat().st_size // 2])
    elif damage != "absent":
        shutil.copy(built, target)
    monkeypatch.delenv("RANKSEG_BACKEND", raising=False)
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    if damage == "other interface":
        monkeypatch.setattr(native, "_ABI", -1)
    probs = torch.rand(1, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    expected = with_backend("python", rankseg.rank_dice, probs)
    native._loaded.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                assert torch.equal(rankseg.rank_dice(probs).predict, expected.predict)
            assert rankseg.backend() == ("native" if damage == "none" else "python")
        assert len(caught) == (damage not in ("none", "absent"))
        assert all(str(target) in str(warning.message) for warning in caught)
        if damage != "none":
            with pytest.raises(RuntimeError, match="RANKSEG_BACKEND=native"):
                with_backend("native", rankseg.rank_dice, probs)
    finally:
        native._loaded.cache_clear()


def test_a_backend_that_does_not_exist_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSEG_BACKEND", "fortran")
    with pytest.raises(ValueError, match=r"RANKSEG_BACKEND='fortran'.*python, native, triton"):
        rankseg.rank_dice(torch.zeros(1, 1, 2, 2))


def test_the_python_solver_uses_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Barriers of thousands of small operations cost seconds on a busy machine. The setting is as before afterwards."""
    monkeypatch.setenv("RANKSEG_BACKEND", "python")
    module, seen = sys.modules["rankseg.engines"], []
    for name in ("solve", "non_overlapping_masks"):
        original = getattr(module, name)

        def spy(*arguments: Any, original: Callable[..., Any] = original) -> Any:
            seen.append(torch.get_num_threads())
            return original(*arguments)

        monkeypatch.setattr(module, name, spy)
    threads, probs = torch.get_num_threads(), torch.rand(1, 2, 9, 9)
    try:
        torch.set_num_threads(3)
        rankseg.rank_dice(probs)
        rankseg.rank_dice(probs, allow_overlap=False)
        with pytest.raises(ValueError, match="probs"):
            rankseg.rank_dice(probs + 1)
        assert seen == [1, 1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
