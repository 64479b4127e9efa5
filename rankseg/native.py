"""Load the compiled kernel (kernel.cpp) with ctypes, and call it.

The kernel is optional. `setup.py` builds it if there is a C++ compiler; without it, `library` returns None.
"""

from __future__ import annotations

import ctypes
import struct
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankseg import exact, solver
from rankseg.exact import _BANDS
from rankseg.masks import RankResult

_ABI = 2
_FOLDER = Path(__file__).resolve().parent
_NAMES = ("_kernel.so", "_kernel.dylib", "_kernel.pyd", "_kernel.dll")
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_MAX_AXES = 16  # MAX_AXES of kernel.cpp
_OK, _BAD_VALUES = 0, 1

_INT, _DOUBLE, _POINTER = ctypes.c_int32, ctypes.c_double, ctypes.c_void_p


@lru_cache(maxsize=1)
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None and the reason; warn if its file exists but cannot be used."""
    paths = [path for name in _NAMES if (path := _FOLDER / name).exists()]
    if not paths:
        return None, "the compiled kernel is not installed"
    try:
        return _load(paths[0]), ""
    except (OSError, AttributeError, ValueError) as error:
        reason = f"the compiled kernel {paths[0]} cannot be used ({error})"
        warnings.warn(
            f"{reason}; the slower Python implementation is used. Fix: install the package again on this machine.",
            RuntimeWarning,
            stacklevel=4,
        )
        return None, reason


def _load(path: Path) -> ctypes.CDLL:
    with open(path, "rb") as file:
        head = file.read(64)
    if head[:5] == b"\x7fELF\x02" and len(head) == 64:
        # The section table is at the end. A truncated file would load, and crash the process when it is used.
        order = "<" if head[5] == 1 else ">"
        offset, size, number = struct.unpack_from(f"{order}40xQ10xHH", head)
        if offset + size * number > path.stat().st_size:
            raise OSError("the file is incomplete")
    library = ctypes.CDLL(str(path))
    if library.rankseg_abi() != _ABI:
        raise ValueError(f"it has interface {library.rankseg_abi()}, expected {_ABI}")
    # data, dtype, layout, iou, smooth: what all functions begin with
    begin: list[Any] = [_POINTER, _INT, _POINTER, _INT, _DOUBLE]
    rule: list[Any] = [_POINTER, _POINTER, _POINTER, _INT]
    library.rankseg_solve.argtypes = [*begin, _INT, *rule, _INT, _POINTER, _POINTER, _POINTER]
    library.rankseg_expected.argtypes = [*begin, *rule, _INT, _POINTER, _POINTER]
    library.rankseg_one_label.argtypes = [*begin, _INT, _INT, _POINTER, _POINTER, _POINTER]
    library.rankseg_instruction_set.argtypes = [_INT]
    return library


def library() -> ctypes.CDLL | None:
    """Return the compiled kernel, or None if it is not installed or cannot be used."""
    return _loaded()[0]


def reason() -> str:
    """Return why `library` is None."""
    return _loaded()[1]


def supports(probs: Tensor) -> bool:
    """Whether the kernel can read `probs`: an ordinary tensor in the memory of the CPU."""
    return type(probs) is Tensor and probs.device.type == "cpu" and not probs.is_neg() and probs.ndim <= _MAX_AXES


@lru_cache(maxsize=8)
def _rule(power: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return constants, the nodes of all bands (all times, then all weights), and the bands' starts (_BANDS + 1,)."""
    bands = [exact.nodes(band, power) for band in range(_BANDS)]
    sizes = torch.tensor([0, *(len(times) for times, _ in bands)], dtype=torch.int64, device="cpu")
    table = torch.cat([times for times, _ in bands] + [weights for _, weights in bands])
    constants = [exact.NEGLIGIBLE, exact._JACOBI_MAX, solver._TIE]
    return torch.tensor(constants, dtype=torch.float64, device="cpu"), table, sizes.cumsum(0)


def _layout(probs: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """Return N, C, their strides, and number, sizes and strides of the spatial axes; contiguous axes become one."""
    shape, strides = probs.shape, probs.stride()
    axes: list[tuple[int, int]] = []
    for size, stride in zip(shape[2:], strides[2:], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    axes = axes or [(1, 1)]
    sizes, steps = zip(*axes, strict=True)
    numbers = (*shape[:2], *strides[:2], len(axes), *sizes, *steps)
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _begin(probs: Tensor, score: str, smooth: float) -> tuple:
    return probs.data_ptr(), _DTYPES[probs.dtype], _layout(probs), score == "iou", smooth


def _rule_arguments(smooth: float) -> tuple:
    constants, table, starts = _rule(smooth % 1)
    return constants.data_ptr(), table.data_ptr(), starts.data_ptr(), _BANDS


def _is_done(status: int) -> bool:
    if status not in (_OK, _BAD_VALUES):
        raise MemoryError("rankseg: not enough memory")
    return status == _OK


def best_masks(probs: Tensor, score: str, smooth: float, pruning: bool, allow_overlap: bool) -> RankResult | None:
    """See `rankseg.engines.best_masks`; None if a value of `probs` is outside [0, 1] or NaN."""
    kernel = library()
    assert kernel is not None
    shape = probs.shape[:2]
    masks = torch.empty(probs.shape, dtype=torch.bool, device="cpu")
    tau = torch.empty(shape, dtype=torch.int64, device="cpu")
    cutpoint = torch.empty(shape, dtype=torch.float64, device="cpu")
    results = masks.data_ptr(), tau.data_ptr(), cutpoint.data_ptr()
    begin, threads = _begin(probs, score, smooth), torch.get_num_threads()
    if allow_overlap:
        status = kernel.rankseg_solve(*begin, pruning, *_rule_arguments(smooth), threads, *results)
    else:
        status = kernel.rankseg_one_label(*begin, pruning, threads, *results)
    return RankResult(masks, tau, cutpoint.to(probs.dtype)) if _is_done(status) else None


def expected(probs: Tensor, masks: Tensor, score: str, smooth: float) -> Tensor | None:
    """See `rankseg.engines.Engine.expected`."""
    if type(masks) is not Tensor:
        return None
    kernel = library()
    assert kernel is not None
    masks = masks.contiguous()
    value = torch.zeros(probs.shape[:2], dtype=torch.float64, device="cpu")
    end = torch.get_num_threads(), masks.data_ptr(), value.data_ptr()
    begin = _begin(probs, score, smooth)
    return value if _is_done(kernel.rankseg_expected(*begin, *_rule_arguments(smooth), *end)) else None
