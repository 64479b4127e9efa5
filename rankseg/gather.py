"""The one pass over all pixels: power sums of each row, and the few pixels that have to be looked at singly.

A row is one class of one image, its D pixels flattened. The pass works on tiles that fit the processor's
cache (on a GPU: on few, large tiles that bound the extra memory). Probabilities are summed in float64, their
higher powers in the precision of the tile: `exact.log_series` divides Σ p² by λ², so that the 1e-7 of float32 moves a
score by some 1e-11.

Shapes: R rows, D pixels a row, E pixels extracted from all rows together, B rows of a block, W its width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Pixels a tile. A tile needs 28 bytes a pixel: 7 MiB, which a processor's cache holds; 112 MiB on a GPU.
_TILE = {"cpu": 1 << 18, "other": 1 << 22}

# Pixels are looked for in groups of so many; rows are filled up with zeros to a multiple of it.
_GROUP = 8

# Σ p^k for k = 0..ORDER is kept: see `exact.log_series` for why four suffice.
ORDER = 4


class Gathered(NamedTuple):
    """What one pass leaves of R rows: some pixels to be looked at singly, and power sums of the others.

    `chosen` (R, 5): Σ p^k, k = 0..4, over the pixels above `high` (or those of a given mask, unless extracted).
    `rest` (R, 5): the same over the pixels left, their number not counted. `rows` (E,) ascending, `values` (E,)
    float64, `flags` (E,): the extracted pixels, their rows, and whether the given mask holds them. `width` (R,)
    int64: how many were extracted from each row.
    """

    chosen: Tensor
    rest: Tensor
    rows: Tensor
    values: Tensor
    flags: Tensor
    width: Tensor


def tiles(rows: int, pixels: int, device: torch.device, depth: int = 1) -> Iterator[tuple[slice, slice]]:
    """Cut (rows, pixels) into tiles: several whole rows, or a part of one row, in row-major order.

    A pixel may stand for `depth` numbers, such as one for each class.
    """
    size = max(1, _TILE.get(device.type, _TILE["other"]) // depth)
    height, breadth = max(1, size // pixels), min(size, pixels)
    for top in range(0, rows, height):
        for left in range(0, pixels, breadth):
            yield slice(top, min(top + height, rows)), slice(left, min(left + breadth, pixels))


def working_dtype(flat: Tensor) -> torch.dtype:
    """In which tiles are computed: half precision is widened, which rounds nothing."""
    return torch.float64 if flat.dtype == torch.float64 else torch.float32


def tile_of(flat: Tensor, index: list[int], across: slice, along: slice) -> Tensor:
    """Rows `index[across]` of `flat`, columns `along`: a view where they are neighbours, which costs nothing."""
    wanted = index[across]
    first, last = wanted[0], wanted[-1] + 1
    if last - first == len(wanted):
        return flat[first:last, along]
    return flat[wanted, along]


def gather(
    flat: Tensor, index: Tensor, low: Tensor, high: Tensor | None = None, masks: Tensor | None = None
) -> Gathered:
    """Sum and extract the rows `index` (R,) of `flat` (·, D).

    Extracted are the pixels low < p <= high, `low` and `high` (R,), and `chosen` those above.
    With `masks` (·, D) bool in place of `high`, extracted are all p > low, and `chosen` are the others of the mask.
    """
    count, pixels = index.numel(), flat.shape[1]
    chosen = torch.zeros(count, ORDER + 1, dtype=torch.float64, device=flat.device)
    rest = torch.zeros_like(chosen)
    rows, values, flags = [], [], []
    numbers = index.tolist()
    # Where nothing can be above, half of the work is left out.
    some_above = [True] * count if high is None else (high < 1).tolist()
    dtype = working_dtype(flat)
    low = low.to(dtype)[:, None]
    if high is not None:
        high = high.to(dtype)[:, None]
    wide = space = rest.new_empty(0)
    for across, along in tiles(count, pixels, flat.device):
        tile = tile_of(flat, numbers, across, along).to(dtype)
        height, breadth = tile.shape
        if wide.shape != tile.shape:
            # The same memory for every tile: fresh pages would cost more than the arithmetic.
            padded = -(-breadth // _GROUP) * _GROUP
            space = torch.zeros(4, height, padded, dtype=dtype, device=flat.device)
            wide = torch.empty(height, breadth, dtype=torch.float64, device=flat.device)
        marks, below, above, square = space[:, :, :breadth]
        torch.gt(tile, low[across], out=marks)  # 0.0 or 1.0: faster to make and to use than bool
        torch.addcmul(tile, tile, marks, value=-1, out=below)
        if any(some_above[across]):
            if high is not None:
                torch.gt(tile, high[across], out=above)
                chosen[across, 0] += above.sum(1)
                marks -= above
                above *= tile
            else:
                assert masks is not None
                above.copy_(tile_of(masks, numbers, across, along))
                chosen[across, 0] += above.sum(1) - (above * marks).sum(1)
                above *= below
                below -= above
            chosen[across, 1:] += _power_sums(above, square, wide)
        rest[across, 1:] += _power_sums(below, square, wide)
        row, column = _nonzero(space[0])
        if row.numel():
            rows.append(row + across.start)
            values.append(tile[row, column])
            if masks is not None:
                flags.append(tile_of(masks, numbers, across, along)[row, column])
    row_ids = torch.cat(rows) if rows else index.new_zeros(0)
    return Gathered(
        chosen=chosen,
        rest=rest,
        rows=row_ids,
        values=torch.cat(values).double() if values else rest.new_zeros(0),
        flags=torch.cat(flags) if flags else torch.zeros(0, dtype=torch.bool, device=flat.device),
        width=torch.bincount(row_ids, minlength=count),
    )


def nearest(flat: Tensor, index: Tensor, low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest probabilities above `high` and the `count` largest up to `low`: (R, count) each.

    Missing ones are NaN. Rows and brackets are those of `gather`.
    """
    dtype = working_dtype(flat)
    numbers = index.tolist()
    low, high = low.to(dtype)[:, None], high.to(dtype)[:, None]
    above = torch.full((index.numel(), count), torch.inf, dtype=dtype, device=flat.device)
    below = torch.full_like(above, -torch.inf)
    for across, along in tiles(index.numel(), flat.shape[1], flat.device):
        tile = tile_of(flat, numbers, across, along).to(dtype)
        some = min(count, tile.shape[1])
        found = tile.masked_fill(tile <= high[across], torch.inf).topk(some, 1, largest=False).values
        above[across] = torch.cat([above[across], found], 1).topk(count, 1, largest=False).values
        found = tile.masked_fill(tile > low[across], -torch.inf).topk(some, 1).values
        below[across] = torch.cat([below[across], found], 1).topk(count, 1).values
    return tuple(x.masked_fill(x.isinf(), torch.nan).double() for x in (above, below))  # type: ignore[return-value]


def extended(got: Gathered, above: Tensor, below: Tensor) -> Gathered:
    """Move pixels from the power sums to the extracted ones: `above` and `below` (R, ·), NaN for none."""
    more = torch.cat([above, below], 1)
    row, column = (~more.isnan()).nonzero().unbind(1)
    rows, order = torch.cat([got.rows, row]).sort(stable=True)
    powers = torch.arange(ORDER + 1, dtype=torch.float64, device=more.device)

    def sums(values: Tensor) -> Tensor:
        return (values[..., None] ** powers).nansum(1) - (values.isnan().sum(1, keepdim=True) * (powers == 0))

    rest = got.rest - sums(below)
    rest[:, 0] = 0
    return Gathered(
        chosen=got.chosen - sums(above),
        rest=rest,
        rows=rows,
        values=torch.cat([got.values, more[row, column]])[order],
        flags=got.flags,
        width=torch.bincount(rows, minlength=got.width.numel()),
    )


def _power_sums(values: Tensor, square: Tensor, wide: Tensor) -> Tensor:
    """Σ p^k, k = 1..4, along the rows of a tile: (R, 4). All three tiles are used up; `wide` is float64."""
    parts = [wide.copy_(values).sum(1)]
    torch.mul(values, values, out=square)
    parts += [square.sum(1), values.mul_(square).sum(1), square.mul_(square).sum(1)]
    return torch.stack([part.double() for part in parts], dim=1)


def _nonzero(marks: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the ones in `marks` (R, D), which are few: groups of zeros are passed over.

    A group takes its pixels from all over the row, so that adding up all groups is adding a few long vectors.
    """
    grouped = marks.view(marks.shape[0], _GROUP, -1)
    row, group = grouped.sum(1).nonzero().unbind(1)
    which, place = grouped[row, :, group].nonzero().unbind(1)
    return row[which], place * grouped.shape[2] + group[which]


def blocks(rows: Tensor, values: Tensor, width: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pack ragged rows (see `Gathered`) into few dense blocks: row numbers (B,) and values (B, W), sorted.

    Rows of like width (up to the same power of two) share a block, so that a single long row does not
    stretch the others, and the number of blocks grows with the logarithm of the longest. Each row is sorted
    in decreasing order and filled up with zeros, which add nothing to any sum that follows.
    """
    start = width.cumsum(0) - width
    size_class = torch.ceil(torch.log2(width.clamp(min=32).double())).long()
    for exponent in torch.unique(size_class).tolist():
        members = (size_class == exponent).nonzero()[:, 0]
        longest = int(width[members].max())
        columns = torch.arange(longest, device=rows.device)
        inside = columns < width[members, None]
        dense = values.new_zeros(members.numel(), longest)
        if longest:
            place = (start[members, None] + columns).clamp(max=values.numel() - 1)
            dense = torch.where(inside, values[place], dense)
        yield members, dense.sort(dim=1, descending=True).values
