"""The one pass over all pixels: power sums of each row, and the few pixels that have to be looked at singly.

A row is one class of one image, its D pixels flattened. The pass works on tiles that fit the processor's
cache (on a GPU: on few, large tiles that bound the extra memory), and everything is summed in float64.

Shapes: R rows, D pixels a row, E pixels extracted from all rows together, B rows of a block, W its width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Pixels a tile. A tile needs 32 bytes a pixel: 8 MiB, which a processor's cache holds; 128 MiB on a GPU.
_TILE = {"cpu": 1 << 18, "other": 1 << 22}

# Pixels are looked for in blocks of so many; rows are filled up with zeros to a multiple of it.
_BLOCK = 16

# Σ p^k for k = 0..ORDER is kept: see `exact.log_series` for why four suffice.
ORDER = 4


class Gathered(NamedTuple):
    """What one pass leaves of R rows.

    `total` (R, 5): Σ p^k, k = 0..4, over all pixels; `chosen` (R, 5): the same over the pixels above `high` (or
    of a given mask). `rows` (E,) ascending, `values` (E,) float64, `flags` (E,): the extracted pixels, their
    rows, and whether they belong to `chosen`. `width` (R,) int64: how many were extracted from each row.
    """

    total: Tensor
    chosen: Tensor
    rows: Tensor
    values: Tensor
    flags: Tensor
    width: Tensor


def tiles(rows: int, pixels: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cut (rows, pixels) into tiles: several whole rows, or a part of one row, in row-major order."""
    size = _TILE.get(device.type, _TILE["other"])
    height, breadth = max(1, size // pixels), min(size, pixels)
    for top in range(0, rows, height):
        for left in range(0, pixels, breadth):
            yield slice(top, min(top + height, rows)), slice(left, min(left + breadth, pixels))


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

    With `high` (R,): `chosen` are the pixels p > high, extracted are low < p <= high.
    With `masks` (·, D) bool: `chosen` are its pixels, extracted are all p > low.
    """
    count, pixels = index.numel(), flat.shape[1]
    total = torch.zeros(count, ORDER + 1, dtype=torch.float64, device=flat.device)
    chosen = torch.zeros_like(total)
    rows, values, flags = [], [], []
    numbers = index.tolist()
    # Where nothing can be above, half of the work is left out.
    some_above = [True] * count if high is None else (high < 1).tolist()
    low = low.double()[:, None]
    if high is not None:
        high = high.double()[:, None]
    space: Tensor | None = None
    for across, along in tiles(count, pixels, flat.device):
        tile = tile_of(flat, numbers, across, along)
        height, breadth = tile.shape
        padded = -(-breadth // _BLOCK) * _BLOCK
        if space is None or space.shape[1:] != (height, padded):
            # The same memory for every tile: fresh pages would cost more than the arithmetic.
            space = torch.zeros(4, height, padded, dtype=torch.float64, device=flat.device)
        exact, square, weight, inside = space
        exact[:, :breadth].copy_(tile)
        torch.mul(exact, exact, out=square)
        total[across, 0] += breadth
        total[across, 1:] += _sums(exact, square, square)
        torch.gt(exact, low[across], out=inside)  # 0.0 or 1.0: faster to make and to use than bool
        inside[:, breadth:] = 0
        if any(some_above[across]):
            if high is not None:
                torch.gt(exact, high[across], out=weight)
                inside -= weight
            else:
                assert masks is not None
                weight[:, :breadth].copy_(tile_of(masks, numbers, across, along))
            chosen[across, 0] += weight.sum(1)
            picked = weight.mul_(exact)
            chosen[across, 1:] += _sums(picked, exact.mul_(picked), square)
        row, column = _nonzero(inside)
        if row.numel():
            rows.append(row + across.start)
            values.append(tile[row, column])
            if masks is not None:
                flags.append(tile_of(masks, numbers, across, along)[row, column])
    row_ids = torch.cat(rows) if rows else index.new_zeros(0)
    return Gathered(
        total=total,
        chosen=chosen,
        rows=row_ids,
        values=torch.cat(values).double() if values else total.new_zeros(0),
        flags=torch.cat(flags) if flags else torch.zeros(0, dtype=torch.bool, device=flat.device),
        width=torch.bincount(row_ids, minlength=count),
    )


def _sums(first: Tensor, second: Tensor, square: Tensor) -> Tensor:
    """Σ wp^k, k = 1..4, along the rows of a tile from wp, wp² and p²; wp³ and wp⁴ are never formed: (R, 4)."""
    parts = [first.sum(1), second.sum(1), _dot(first, square), _dot(second, square)]
    return torch.stack(parts, dim=1)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise inner products: (R,)."""
    return torch.bmm(left[:, None], right[:, :, None])[:, 0, 0]


def _nonzero(marks: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the ones in `marks` (R, D), which are few: whole blocks of zeros are passed over."""
    grouped = marks.view(marks.shape[0], -1, _BLOCK)
    row, block = grouped.sum(2).nonzero().unbind(1)
    which, offset = grouped[row, block].nonzero().unbind(1)
    return row[which], block[which] * _BLOCK + offset


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
