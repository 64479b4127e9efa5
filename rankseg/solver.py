"""The search for the optimal volume of every row: guess a bracket, pass once over the pixels, prove the result.

1. `surrogate` guesses a bracket of cut-offs for large objects. The bracket of a small object contains every pixel
   whose probability is too large for the power sums.
2. `gather.gather` passes once over the pixels: power sums, and the pixels inside the bracket.
3. `exact.window_scores` evaluates every volume that the bounds of `surrogate` do not exclude.
4. A row is solved again if its bracket does not contain all those volumes: with a few more pixels on both sides,
   or with a wider bracket.

Shapes: R rows (a class of an image each), D pixels of a row, B rows of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankseg import surrogate
from rankseg.exact import NEGLIGIBLE, Window, band_of, band_span, power_sums, window_scores
from rankseg.gather import Statistics, add_extracted, blocks, gather, nearest, row_numbers, tile_of, tiles

# Scores that differ by less than rounding are ties; the smallest of tied volumes is taken.
_TIE = 1e-13

# If at most so many pixels are missing on each side of a bracket, they are added by rank; otherwise it is widened.
_MAX_BY_RANK = 4096


class Solution(NamedTuple):
    """Best volume `tau` (R,) int64, largest probability left out `cutpoint` (R,), score `value` (R,) float64.

    `tied` (R,) int64 counts the selected pixels whose probability equals the cut-off. `value` is NaN for pruned
    rows that are not all 0.
    """

    tau: Tensor
    cutpoint: Tensor
    tied: Tensor
    value: Tensor


def compares_losses(smooth: float, pixels: int) -> bool:
    """Whether volumes are compared by 1 - score, which is more accurate for a large `smooth`."""
    return smooth > pixels


def solve(flat: Tensor, known: Statistics, score: str, smooth: float, pruning: bool) -> Solution:
    """Find the volume of the best mask of each row of `flat` (R, D); `score` is "dice" or "iou".

    `known` are the statistics of `flat`. With `pruning`, rows whose maximum is at most 1/2 get the empty mask.
    """
    rows, peak = flat.shape[0], known.peak
    tau = torch.zeros(rows, dtype=torch.int64, device=flat.device)
    tied = torch.zeros_like(tau)
    cutpoint = peak.clone()
    value = torch.full((rows,), 1.0 if smooth else 0.0, dtype=torch.float64, device=flat.device)
    value.masked_fill_(peak > 0, torch.nan)  # pruned rows are not scored
    todo = (peak > (0.5 if pruning else 0.0)).nonzero()[:, 0]
    low, high = _first_brackets(flat, todo, known.mean[todo], score, smooth)
    reach = 0
    while todo.numel():
        needed, found = _attempt(flat, todo, low, high, reach, score, smooth)
        tau[todo] = found.tau
        tied[todo] = found.tied
        cutpoint[todo] = found.cutpoint.to(flat.dtype)
        value[todo] = found.value
        left = (needed > 0).nonzero()[:, 0]
        if not left.numel():
            break
        todo, low, high, needed = todo[left], low[left], high[left], needed[left]
        near = needed <= (0 if reach else _MAX_BY_RANK)  # not twice in a row: the bracket grows, and the search ends
        reach = int(needed.where(near, 0).amax())
        wide = _widened(low, high)
        low, high = torch.where(near, low, wide[0]), torch.where(near, high, wide[1])
    return Solution(tau, cutpoint, tied, value)


def _first_brackets(flat: Tensor, rows: Tensor, mean: Tensor, score: str, smooth: float) -> tuple[Tensor, Tensor]:
    """First guess of the brackets (low, high) of cut-offs, in the dtype of `flat`: (R,) each."""
    low = (0.99 * NEGLIGIBLE * (mean + smooth)).clamp(max=0.1)
    high = torch.ones_like(low)
    large = ((mean + smooth) * NEGLIGIBLE > 1.01).nonzero()[:, 0]
    if large.numel():
        stride = flat.shape[1] // 4096 | 1  # odd, so that the sample of a map spreads over its columns
        members, mean = rows[large], mean[large]
        sample = flat[:, ::stride][members]
        cut, volume, density = surrogate.from_sample(score, sample, stride, mean, smooth)
        # One step on all pixels removes the sampling error.
        excess = _sum_clamped(flat, members, cut) - cut * flat.shape[1]
        cut = surrogate.excess_root(score, cut, excess, volume, mean, smooth)
        low[large], high[large] = surrogate.bracket(cut, density)
    return low.to(flat.dtype), high.to(flat.dtype)


def _widened(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return brackets five times as wide; `low` falls at most to a quarter, or, from 1e-5 or less, to -1."""
    width = high - low
    bottom = torch.where(low > 1e-5, low / 4, -1.0)
    return torch.maximum(low - 2 * width, bottom), (high + 2 * width).clamp(max=1)


def _sum_clamped(flat: Tensor, rows: Tensor, floor: Tensor) -> Tensor:
    """Σ max(p, floor) of the given rows, (R,) float32: accurate to six digits, for guesses only."""
    result = torch.zeros(rows.numel(), dtype=torch.float32, device=flat.device)
    numbers = row_numbers(rows)
    for row_slice, column_slice in tiles(rows.numel(), flat.shape[1], flat.device):
        tile = tile_of(flat, numbers, row_slice, column_slice)
        result[row_slice] += torch.maximum(tile, floor[row_slice, None].to(tile.dtype)).sum(1, dtype=torch.float32)
    return result


def _attempt(
    flat: Tensor, rows: Tensor, low: Tensor, high: Tensor, reach: int, score: str, smooth: float
) -> tuple[Tensor, Solution]:
    """Solve `rows` (R,) within their brackets, and within `reach` more pixels on either side.

    Return the result of `_needed` and the solution.
    """
    pixels = flat.shape[1]
    got = gather(flat, rows, low, high)
    if reach:
        got = add_extracted(got, *nearest(flat, rows, low, high, reach))
    needed = torch.zeros(rows.numel(), dtype=torch.float64, device=flat.device)
    tau, tied = torch.zeros_like(rows), torch.zeros_like(rows)
    cutpoint, value = torch.zeros(2, rows.numel(), dtype=torch.float64, device=flat.device)
    losses = compares_losses(smooth, pixels)
    for members, values in blocks(got.rows, got.values, got.width):
        window, width = Window(values, got.included[members], got.excluded[members]), got.width[members]
        above = window.included[:, 0]
        volume, captured, mean = window.volume(), window.captured(), window.mean()
        steps = torch.arange(volume.shape[1], device=flat.device)
        inside = steps <= width[:, None]
        bound = surrogate.loss_bound(score, volume, captured, mean, smooth).where(inside, torch.inf)
        loss = bound.amin(1, keepdim=True)
        margin = surrogate.margin(score, volume, captured, mean, smooth, loss)
        margins = torch.stack([margin[:, 0], margin.gather(1, width[:, None])[:, 0]])
        edges = torch.stack([high[members], low[members]]).double()
        needed[members] = _needed(score, margins, edges, loss[:, 0], mean[:, 0], above, width, smooth, pixels)
        wanted = (margin >= 0) & inside
        if smooth:
            wanted[:, 0] |= above == 0  # the bounds do not hold for the empty mask
        wanted |= bound == loss  # so that rounding cannot leave out every volume
        skipped, scores = _scores(score, window, smooth, wanted, losses)
        top = scores.amax(1, keepdim=True)
        tolerance = _TIE * (mean + 1) / (mean + 1 + smooth) if losses else _TIE * top
        step = skipped + (scores >= top - tolerance).to(torch.uint8).argmax(1)
        tau[members] = above.round().long() + step
        padded = torch.nn.functional.pad(values, (0, 1))
        cut = padded.gather(1, step[:, None])
        cutpoint[members] = cut[:, 0]
        tied[members] = ((padded == cut) & (steps < step[:, None])).sum(1)
        value[members] = top[:, 0] + 1 if losses else top[:, 0]
    return needed, Solution(tau, cutpoint, tied, value)


def _scores(score: str, window: Window, smooth: float, wanted: Tensor, losses: bool) -> tuple[Tensor, Tensor]:
    """Score the wanted volumes: return the number of volumes before them, (B,) int64, and their scores, (B, ·).

    First the window (B, W) is reduced to the pixels that need a logarithm each: those between the first and the last
    wanted volume, and those too large for the power sums. Then `exact.window_scores` is called.
    """
    values = window.values
    width = values.shape[1]
    marked = wanted.to(torch.uint8)
    first = marked.argmax(1, keepdim=True)
    last = width - marked.flip(1).argmax(1, keepdim=True)
    denominator = window.denominator(score, smooth)
    confident = (values > NEGLIGIBLE * denominator.gather(1, first)).sum(1, keepdim=True)  # they come first: sorted
    kept = torch.minimum(confident, first)
    skipped, last = first - kept, torch.maximum(last, confident)
    longest, span = (last - skipped).amax(), None
    if values.device.type != "cpu":  # one read of everything that the host has to know
        longest, *span = torch.cat([longest.view(1), band_span(band_of(denominator), wanted)]).tolist()
    step = torch.arange(int(longest) + 1, device=values.device)
    column = torch.arange(width, device=values.device)
    included = window.included + power_sums(values, (column >= kept) & (column < first))
    excluded = window.excluded + power_sums(values, column >= last)
    wanted = wanted.gather(1, (step + skipped).clamp(max=width)) & (step >= kept) & (step <= last - skipped)
    column = torch.where(step[:-1] < kept, step[:-1], step[:-1] + skipped)
    if width:
        values = values.gather(1, column.clamp(max=width - 1)) * (column < last)
    reduced = Window(values, included, excluded)
    return skipped[:, 0], window_scores(score, reduced, smooth, wanted, losses, span=span)


def _needed(
    score: str,
    margins: Tensor,
    edges: Tensor,
    loss: Tensor,
    mean: Tensor,
    above: Tensor,
    width: Tensor,
    smooth: float,
    pixels: int,
) -> Tensor:
    """Return how many more pixels are needed on each side to prove that no other volume is better: (R,).

    0 if it is proved, infinite if no number of pixels proves it.

    `margins`, `edges`, `loss`: see `surrogate.ranks_needed`. `above` (R,) is the number of pixels above the bracket,
    `width` (R,) that of the pixels in it.
    """
    needed = surrogate.ranks_needed(score, margins, edges, loss).masked_fill_(margins < 0, 0)
    if smooth < 1:
        # If pixels are above the bracket, the empty mask was not scored. Its score is at most 1/μ for γ < 1.
        needed[0].masked_fill_((1 - loss) * mean <= 1, torch.inf)
    needed = torch.minimum(needed, torch.stack([above, pixels - above - width])).amax(0)
    largest = edges[1].masked_fill(above > 0, 1.0)
    return needed.masked_fill_(largest > NEGLIGIBLE * (mean + smooth), torch.inf)
