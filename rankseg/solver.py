"""The search for the optimal volume of every row: guess, one pass, proof; widen where the proof fails.

1. `surrogate` guesses a bracket of cut-offs for large objects; small objects are taken whole, down to
   probabilities so small that power sums describe the rest exactly.
2. `gather.gather` passes once over the pixels: power sums, and the pixels inside the bracket.
3. `exact.window_scores` evaluates every volume which the bounds of `surrogate.possible` leave over.
4. A row whose bracket does not contain all those volumes comes again with a wider one.

Shapes: R rows (a class of an image each), D pixels a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankseg import surrogate
from rankseg.exact import NEGLIGIBLE, cumulative, power_sums, window_scores
from rankseg.gather import blocks, gather, tile_of, tiles

# Scores that differ by less than rounding are ties; the smallest of tied volumes is taken.
_TIE = 1e-13


class Solution(NamedTuple):
    """Optimal `tau` (R,) int64, largest probability left out `cutpoint` (R,), exact `value` (R,) float64.

    `tied` (R,) int64 counts the selected pixels whose probability equals the cut-off.
    """

    tau: Tensor
    cutpoint: Tensor
    tied: Tensor
    value: Tensor


def solve(flat: Tensor, score: str, smooth: float, pruning: bool) -> Solution:
    """Find the volume of the best mask of each row of `flat` (R, D); `score` is "dice" or "iou".

    With `pruning`, rows whose maximum is at most 1/2 get the empty mask.
    """
    rows = flat.shape[0]
    peak = flat.amax(1)
    tau = torch.zeros(rows, dtype=torch.int64, device=flat.device)
    tied = torch.zeros_like(tau)
    cutpoint = peak.clone()
    value = torch.full((rows,), 1.0 if smooth else 0.0, dtype=torch.float64, device=flat.device)
    value[peak > 0] = torch.nan  # pruned rows are not scored
    todo = (peak > (0.5 if pruning else 0.0)).nonzero()[:, 0]
    low, high = _first_brackets(flat, todo, score, smooth)
    while todo.numel():
        done, found = _attempt(flat, todo, low, high, score, smooth)
        tau[todo] = found.tau
        tied[todo] = found.tied
        cutpoint[todo] = found.cutpoint.to(flat.dtype)
        value[todo] = found.value
        todo, (low, high) = todo[~done], _widened(low[~done], high[~done])
    return Solution(tau, cutpoint, tied, value)


def _first_brackets(flat: Tensor, rows: Tensor, score: str, smooth: float) -> tuple[Tensor, Tensor]:
    """Bracket (low, high) of cut-offs, in the dtype of `flat`, to begin with: (R,) each."""
    mean = _tiled_sum(flat, rows, None)
    low = (0.99 * NEGLIGIBLE * (mean + smooth)).clamp(max=0.1)
    high = torch.ones_like(low)
    large = ((mean + smooth) * NEGLIGIBLE > 1.01).nonzero()[:, 0]
    if large.numel():
        stride = flat.shape[1] // 4096 | 1  # odd, so that the sample of a map spreads over its columns
        members, mean = rows[large], mean[large]
        sample = flat[:, ::stride][members]
        cut, volume, density = surrogate.from_sample(score, sample, stride, mean, smooth)
        # One step on all pixels removes the sampling error.
        excess = _tiled_sum(flat, members, cut) - cut * flat.shape[1]
        cut = surrogate.excess_root(score, cut, excess, volume, mean, smooth)
        low[large], high[large] = surrogate.bracket(cut, density)
    return low.to(flat.dtype), high.to(flat.dtype)


def _widened(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Five times as wide, or down to a quarter of `low`, whichever is nearer; in the end the whole row."""
    width = high - low
    bottom = torch.where(low > 1e-5, low / 4, -1.0)
    return torch.maximum(low - 2 * width, bottom), (high + 2 * width).clamp(max=1)


def _tiled_sum(flat: Tensor, rows: Tensor, floor: Tensor | None) -> Tensor:
    """Σ max(p, floor) of the given rows, (R,) float32: good to six digits, for guesses only."""
    result = torch.zeros(rows.numel(), device=flat.device)
    numbers = rows.tolist()
    space = flat.new_empty(0)
    for across, along in tiles(rows.numel(), flat.shape[1], flat.device):
        tile = tile_of(flat, numbers, across, along)
        if floor is not None:
            space.resize_(tile.shape)  # the same memory for every tile
            tile = torch.maximum(tile, floor[across, None].to(tile.dtype), out=space)
        result[across] += tile.sum(1, dtype=torch.float32)
    return result


def _attempt(
    flat: Tensor, rows: Tensor, low: Tensor, high: Tensor, score: str, smooth: float
) -> tuple[Tensor, Solution]:
    """Solve `rows` (R,) within their brackets; also say, (R,) bool, where the solution is proved."""
    pixels = flat.shape[1]
    got = gather(flat, rows, low, high)
    done = torch.zeros_like(rows, dtype=torch.bool)
    tau, tied = torch.zeros_like(rows), torch.zeros_like(rows)
    cutpoint, value = torch.zeros(2, rows.numel(), dtype=torch.float64, device=flat.device)
    for members, values in blocks(got.rows, got.values, got.width):
        chosen, rest, width = got.chosen[members], got.rest[members], got.width[members]
        steps = torch.arange(values.shape[1] + 1, device=flat.device)
        volume = chosen[:, :1] + steps
        captured = chosen[:, 1:2] + cumulative(values)
        mean = captured[:, -1:] + rest[:, 1:2]
        inside = steps <= width[:, None]
        bound = surrogate.lower_bound(score, volume, captured, mean, smooth).where(inside, -torch.inf)
        best = bound.amax(1, keepdim=True)
        wanted = surrogate.possible(score, volume, captured, mean, smooth, best) & inside
        if smooth:
            wanted[:, 0] |= chosen[:, 0] == 0  # the bound says nothing of the empty mask

        done[members] = _proved(
            wanted, best[:, 0], mean[:, 0], chosen[:, 0], width, low[members], smooth, pixels
        )
        skipped, scores = _scores(score, values, chosen, rest, smooth, wanted)
        top = scores.amax(1, keepdim=True)
        step = skipped + (scores >= top * (1 - _TIE)).to(torch.uint8).argmax(1)
        tau[members] = chosen[:, 0].round().long() + step
        padded = torch.nn.functional.pad(values, (0, 1))
        cut = padded.gather(1, step[:, None])
        cutpoint[members] = cut[:, 0]
        tied[members] = ((padded == cut) & (steps < step[:, None])).sum(1)
        value[members] = top[:, 0]
    return done, Solution(tau, cutpoint, tied, value)


def _scores(
    score: str, values: Tensor, chosen: Tensor, rest: Tensor, smooth: float, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores of the wanted volumes, and how many volumes before them are left out: (B, ·), (B,) int64.

    As `exact.window_scores`, after the window (B, W) has been cut down to the pixels that have to be looked at singly:
    those between the first and the last wanted volume, and those too large for the power sums.
    """
    width = values.shape[1]
    marked = wanted.to(torch.uint8)
    first = marked.argmax(1, keepdim=True)
    last = width - marked.flip(1).argmax(1, keepdim=True)
    captured = chosen[:, 1:2] + cumulative(values)
    scale = chosen[:, :1] + first + captured[:, -1:] + rest[:, 1:2] + smooth
    if score == "iou":
        scale = scale - captured.gather(1, first)
    confident = (values > NEGLIGIBLE * scale).sum(1, keepdim=True)  # the first ones, as the window is sorted
    kept = torch.minimum(confident, first)
    skipped, last = first - kept, torch.maximum(last, confident)
    column = torch.arange(width, device=values.device)
    chosen = chosen + power_sums(values, (column >= kept) & (column < first))
    rest = rest + power_sums(values, column >= last)
    step = torch.arange(int((last - skipped).max()) + 1, device=values.device)
    wanted = wanted.gather(1, (step + skipped).clamp(max=width)) & (step >= kept) & (step <= last - skipped)
    column = torch.where(step[:-1] < kept, step[:-1], step[:-1] + skipped)
    if width:
        values = values.gather(1, column.clamp(max=width - 1)) * (column < last)
    return skipped[:, 0], window_scores(score, values, chosen, rest, smooth, wanted)


def _proved(
    wanted: Tensor,
    best: Tensor,
    mean: Tensor,
    above: Tensor,
    width: Tensor,
    low: Tensor,
    smooth: float,
    pixels: int,
) -> Tensor:
    """Whether no volume outside the bracket can be better, and the power sums are accurate: (R,) bool.

    `above` (R,) is the number of pixels above the bracket, `width` (R,) of those in it, `low` (R,) its lower end.
    """
    last = wanted.gather(1, width[:, None])[:, 0]
    # A bracket that leaves pixels above also leaves out the empty mask, whose score is at most 1/μ for γ < 1.
    left = (above == 0) | (~wanted[:, 0] & (best * mean > 1))
    right = (above + width == pixels) | ~last
    largest = torch.where(above > 0, 1.0, low.double().clamp(min=0))
    accurate = largest <= NEGLIGIBLE * (mean + smooth)
    return left & right & accurate
