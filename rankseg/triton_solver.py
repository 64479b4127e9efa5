"""The exact rules on a GPU in a fixed number of Triton launches, with one synchronisation at the end.

The steps are those of `solver`; every step is one kernel of `triton_kernels` over all rows:

1. `statistics_kernel`: sum, maximum, and a check of the values.
2. `guess_kernel`: Dinkelbach's iteration on a sample of each row; `excess_kernel`: one step on all pixels.
3. `gather_kernel`: power sums, and the pixels inside the bracket, which an atomic cursor places in a window of fixed
   capacity.
4. `solve_kernel`: bounds, proof and quadrature over the sorted window of one row.
5. `equal_kernel`, `select_kernel`: the masks, tied pixels in the order of their position.

The host reads two flags in the end: invalid values, and rows that are not proved or whose window overflowed. `solver`
solves such rows. Overlapping masks are supported, with `smooth` up to the number of pixels. Everything else is left to
the torch path.

RANKSEG_BACKEND=triton selects this module. It is tested with Triton's interpreter (TRITON_INTERPRET=1) and compiles
for a GPU; it has not run on one.

Shapes: R rows, D pixels of a row, C chunks of a row, W capacity of a window.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rankseg.exact import node_table
from rankseg.gather import statistics
from rankseg.masks import RankResult, as_result, rows_of
from rankseg.solver import compares_losses, solve
from rankseg.triton_kernels import (
    bracket_kernel,
    equal_kernel,
    excess_kernel,
    gather_kernel,
    guess_kernel,
    select_kernel,
    solve_kernel,
    statistics_kernel,
    tl,
    triton,
)

_BLOCK = 1024  # pixels that one program reads at once
_CHUNKS = 64  # largest number of programs per row
_SAMPLE = 8192  # largest number of sampled pixels per row
_SMALLEST_WINDOW = 8192


@lru_cache(maxsize=4)
def _table(device: torch.device, power: float) -> Tensor:
    """Return times t, logarithmic weights and u = 1 - e^{-t} of all bands: (3, bands, 64) float64."""
    times, weights = node_table(device, power)
    return torch.stack([times, weights, -torch.expm1(-times)])


def _is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def best_masks(probs: Tensor, score: str, smooth: float, pruning: bool, allow_overlap: bool) -> RankResult | None:
    """See `rankseg.engines.best_masks`; None for invalid values and for unsupported arguments."""
    if not allow_overlap or type(probs) is not Tensor:
        return None
    if not (probs.is_cuda or (_is_interpreted() and probs.device.type == "cpu")):
        return None
    flat = rows_of(probs)
    rows, pixels = flat.shape
    if compares_losses(smooth, pixels):
        return None
    device, dtype = flat.device, torch.float64 if flat.dtype == torch.float64 else torch.float32
    chunks = min(_CHUNKS, triton.cdiv(pixels, _BLOCK))
    span = triton.cdiv(triton.cdiv(pixels, chunks), _BLOCK) * _BLOCK
    least = 0.5 if pruning else 0.0
    dice = score == "dice"
    source = (flat, flat.stride(0), flat.stride(1), pixels)
    grid: Any = (rows, chunks)
    read = {"BLOCK": _BLOCK, "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32}

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    gamma = torch.full((1,), smooth, dtype=torch.float64, device=device)  # a number would be passed in float32
    total, peaks, bad = empty(*grid), empty(*grid, dtype=dtype), empty(*grid, dtype=torch.int32)
    statistics_kernel[grid](*source, span, total, peaks, bad, **read)
    mean, peak = total.sum(1), peaks.amax(1)
    cut, volume, density, excess = empty(rows), empty(rows), empty(rows), empty(*grid)
    guess_kernel[(rows,)](*source, pixels // 4096 | 1, mean, gamma, cut, volume, density, SAMPLE=_SAMPLE, DICE=dice)
    excess_kernel[grid](*source, span, cut, excess, **read)
    low, high = empty(rows, dtype=dtype), empty(rows, dtype=dtype)
    guess = (mean, gamma, peak, cut, volume, density, excess, low, high)
    bracket_kernel[(rows,)](*guess, least, chunks, DICE=dice, CHUNKS=_CHUNKS)
    capacity = min(triton.next_power_of_2(pixels), max(_SMALLEST_WINDOW, triton.next_power_of_2(pixels // 64)))
    window = torch.zeros(rows, capacity, dtype=dtype, device=device)
    cursor = torch.zeros(rows, dtype=torch.int32, device=device)
    sums = empty(*grid, 10)
    gather_kernel[grid](*source, span, low, high, sums, window, cursor, capacity, **read)
    window = window.sort(dim=1, descending=True).values
    tau, tied = empty(rows, dtype=torch.int64), empty(rows, dtype=torch.int64)
    cutpoint, failed = empty(rows, dtype=dtype), empty(rows, dtype=torch.int32)
    scores = empty(rows, capacity + 1)
    solution = (tau, cutpoint, tied, failed, capacity, pixels, least, peak, chunks)
    state = (window, cursor, sums, low, gamma, _table(device, smooth % 1), scores)
    solve_kernel[(rows,)](*state, *solution, DICE=dice, CHUNKS=_CHUNKS, BLOCK=512, num_warps=8)
    equal = empty(*grid, dtype=torch.int32)
    equal_kernel[grid](*source, span, cutpoint, tied, equal, **read)
    before = equal.cumsum(1) - equal
    masks = empty(rows, pixels, dtype=torch.bool)
    select_kernel[grid](*source, span, tau, cutpoint, tied, before, masks.view(torch.int8), **read)
    cutpoint = cutpoint.to(flat.dtype).masked_fill(tau == pixels, 0)

    invalid, unproved = torch.stack([bad.any(), failed.any()]).tolist()  # the only synchronisation
    if invalid:
        return None
    if unproved:
        again = failed.nonzero()[:, 0]
        part = flat[again]
        found = solve(part, statistics(part), score, smooth, pruning)
        fixed = as_result(part[:, None], part, found.tau, found.cutpoint, found.tied)
        masks[again], tau[again], cutpoint[again] = fixed.predict[:, 0], fixed.tau[:, 0], fixed.cutpoint[:, 0]
    shape = probs.shape[:2]
    return RankResult(masks.view(probs.shape), tau.view(shape), cutpoint.view(shape))


def expected(probs: Tensor, masks: Tensor, score: str, smooth: float) -> Tensor | None:
    """Return None: the torch path computes expected scores."""
    return None
