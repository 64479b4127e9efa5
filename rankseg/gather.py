"""The main pass over all pixels: power sums of each row, and the few pixels that need a logarithm each.

A row is one class of one image, its D pixels flattened. On the CPU the pass works on tiles that fit the cache. On
other devices it works on a few large tiles: the numbers of launches and of synchronisations do not depend on the size.
Σ p is summed in float64. For brackets on the CPU, higher powers are summed in the precision of the tile. Their relative
error of 1e-7 changes a score by up to 2e-11, because `exact.log_series` multiplies Σ p² by u²/2, and u is about 1/λ.
λ is the mean of the score's denominator, and u is defined in docs/method.md.

Shapes: R rows, D pixels of a row, E pixels extracted from all rows together, B rows of a block, W its width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Pixels of a tile. A tile needs 12 bytes per pixel: 3 MiB, which a processor's cache holds.
_TILE = {"cpu": 1 << 18}
# On other devices: smallest number of pixels per tile (about 60 MiB), and largest number of tiles.
_MIN_DEVICE_TILE, _MAX_DEVICE_TILES = 1 << 22, 2

# Pixels of a group; a group without a pixel above `low` is skipped. The padding, -2, is below every `low`.
_GROUP = 8

# Largest ratio of widths in a block, except for the narrowest rows, on the CPU and on other devices. Largest number of
# blocks on other devices.
_BLOCK_RATIO, _DEVICE_RATIO, _DEVICE_BLOCKS = 2, 16, 3

# Σ p^k for k = 0..ORDER is kept: `exact.NEGLIGIBLE` says why four suffice.
ORDER = 4


class Gathered(NamedTuple):
    """The result of one pass over R rows: the extracted pixels, and power sums of the others.

    `included` (R, 5): Σ p^k, k = 0..4, over the pixels above the bracket, or over the pixels of a given mask that were
    not extracted (see `gather`).
    `excluded` (R, 5): the same over the remaining pixels, without their number (k = 0). `rows` (E,) ascending, `values`
    (E,) float64 and `flags` (E,): the rows of the extracted pixels, their probabilities, and whether the given mask
    contains them (empty if no mask is given). `width` (R,) int64: how many were extracted from each row.
    """

    included: Tensor
    excluded: Tensor
    rows: Tensor
    values: Tensor
    flags: Tensor
    width: Tensor


def tiles(rows: int, pixels: int, device: torch.device, depth: int = 1) -> Iterator[tuple[slice, slice]]:
    """Cut (rows, pixels) into tiles: several whole rows, or a part of one row, in row-major order.

    A pixel may consist of `depth` numbers, such as one for each class.
    """
    size = _TILE.get(device.type) or max(_MIN_DEVICE_TILE, -(-rows * pixels * depth // _MAX_DEVICE_TILES))
    size = max(1, size // depth)
    height, breadth = max(1, size // pixels), min(size, pixels)
    if device.type not in _TILE:  # no small tile at the end
        height = max(1, -(-size // pixels))
        breadth = -(-pixels // (pixels // breadth)) if breadth < pixels else pixels
    for top in range(0, rows, height):
        for left in range(0, pixels, breadth):
            yield slice(top, min(top + height, rows)), slice(left, min(left + breadth, pixels))


def working_dtype(flat: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic on tiles: float32 instead of half precision, which is exact."""
    return torch.float64 if flat.dtype == torch.float64 else torch.float32


def row_numbers(index: Tensor) -> list[int] | Tensor:
    """Return the row numbers for `tile_of`: a list on the CPU, else the tensor (reading it would synchronise)."""
    return index.tolist() if index.device.type == "cpu" else index


def tile_of(flat: Tensor, index: list[int] | Tensor, row_slice: slice, column_slice: slice) -> Tensor:
    """Return the rows `index[row_slice]` (ascending) of `flat`, columns `column_slice`.

    The result is a view for neighbouring rows on the CPU, and for all rows on other devices.
    """
    if isinstance(index, Tensor):
        if index.numel() == flat.shape[0]:
            return flat[row_slice, column_slice]
        return flat[:, column_slice].index_select(0, index[row_slice])
    wanted = index[row_slice]
    first, last = wanted[0], wanted[-1] + 1
    if last - first == len(wanted):
        return flat[first:last, column_slice]
    return flat[wanted, column_slice]


class Statistics(NamedTuple):
    """Smallest value, largest value and mean volume μ = Σ p of each row, (R,).

    The first two are NaN if a value is NaN. The mean volume is a float32 number and serves for guesses only.
    """

    least: Tensor
    peak: Tensor
    mean: Tensor

    def are_valid(self) -> bool:
        """Whether all values are in [0, 1]."""
        return bool(((self.least >= 0) & (self.peak <= 1)).all())


def statistics(flat: Tensor) -> Statistics:
    """Return the statistics of all rows of `flat` (R, D), which is read once."""
    least = flat.new_full(flat.shape[:1], torch.inf)
    peak = torch.full_like(least, -torch.inf)
    mean = torch.zeros(flat.shape[0], dtype=torch.float32, device=flat.device)
    for row_slice, column_slice in tiles(flat.shape[0], flat.shape[1], flat.device):
        tile = flat[row_slice, column_slice]
        torch.minimum(least[row_slice], tile.amin(1), out=least[row_slice])
        torch.maximum(peak[row_slice], tile.amax(1), out=peak[row_slice])
        mean[row_slice] += tile.sum(1, dtype=torch.float32)
    return Statistics(least, peak, mean)


def gather(
    flat: Tensor, index: Tensor, low: Tensor, high: Tensor | None = None, masks: Tensor | None = None
) -> Gathered:
    """Compute the power sums of the rows `index` (R,) of `flat` (·, D), and extract their pixels in the bracket.

    The pixels with low < p <= high are extracted; `low` and `high` are (R,). `included` sums the pixels above `high`.
    With `masks` (·, D) bool instead of `high`, all pixels with p > low are extracted, and `included` sums the other
    pixels of the mask.
    """
    dtype = working_dtype(flat)
    low = low.to(dtype)[:, None]
    high = None if high is None else high.to(dtype)[:, None]
    if flat.device.type == "cpu" and high is not None:
        return _gather_bracket(flat, index, low, high)
    return _gather_marked(flat, index, low, high, masks)


def _gather_bracket(flat: Tensor, index: Tensor, low: Tensor, high: Tensor) -> Gathered:
    """Compute `gather` on the CPU. All tiles share one buffer, because new memory for every tile is slower."""
    count, pixels = index.numel(), flat.shape[1]
    included = torch.zeros(count, ORDER + 1, dtype=torch.float64, device=flat.device)
    excluded = torch.zeros_like(included)
    rows, values = [], []
    numbers = row_numbers(index)
    some_above = (high[:, 0] < 1).tolist()  # if high = 1, no pixel is above it
    floors = low ** torch.arange(1, ORDER + 1, device=flat.device)
    size = min(count, max(1, _TILE["cpu"] // pixels)) * (min(pixels, _TILE["cpu"]) + _GROUP)
    space = low.new_empty(2, size)
    for row_slice, column_slice in tiles(count, pixels, flat.device):
        tile = tile_of(flat, numbers, row_slice, column_slice).to(low.dtype)
        floor, ceiling = low[row_slice], high[row_slice]
        kept = _candidates(tile, floor, space[0])
        # Group g of G has the pixels g, g + G, g + 2G, ... here, not neighbours: `sum(1)` adds eight long vectors.
        groups = kept.unflatten(1, (_GROUP, kept.shape[1] // _GROUP))
        flags, square = space[:, : kept.numel()].view(2, *kept.shape)
        torch.gt(kept, floor, out=flags)  # 0.0 or 1.0: faster to make and to use than bool
        inside = flags.view(groups.shape).sum(1)
        above_low = inside.sum(1, keepdim=True)
        if any(some_above[row_slice]):
            torch.gt(kept, ceiling, out=flags)
            above = flags.view(groups.shape).sum(1)
            inside -= above
            included[row_slice, 0] += above.sum(1)
            included[row_slice, 1:] += _power_sums(flags.mul_(kept), square)
        # Pixels above `low` are replaced by `low`. What they add, above_low · low^k, is subtracted.
        part, square = space[:, : tile.numel()].view(2, *tile.shape)
        torch.minimum(tile, floor, out=part)
        excluded[row_slice, 1:] += _power_sums(part, square) - above_low.double() * floors[row_slice]
        row, group = inside.nonzero().unbind(1)
        rows.append(row + row_slice.start)
        values.append(groups[row, :, group])
    row_ids = torch.cat(rows) if rows else index.new_zeros(0)
    window = torch.cat(values) if values else low.new_zeros(0, _GROUP)
    found = (window > low[row_ids]) & (window <= high[row_ids])
    row_ids = row_ids[:, None].expand_as(found)[found]
    return Gathered(
        included=included,
        excluded=excluded,
        rows=row_ids,
        values=window[found].double(),
        flags=row_ids.new_zeros(0, dtype=torch.bool),
        width=torch.bincount(row_ids, minlength=count),
    )


def _candidates(tile: Tensor, floor: Tensor, space: Tensor) -> Tensor:
    """Return the pixels of `tile` (R, D) that can exceed `floor` (R, 1), filled up with -2 to whole groups.

    From a part of one row, only the groups of neighbours that contain such a pixel are returned. From several rows,
    all pixels are returned.
    """
    height, breadth = tile.shape
    extra = breadth % _GROUP
    if height > 1:
        return torch.nn.functional.pad(tile, (0, _GROUP - extra), value=-2.0) if extra else tile
    body = tile[:, : breadth - extra]
    # Comparing into floats and copying them to bool is faster than comparing into bool.
    marks = torch.gt(body[0], floor[0], out=space[: body.numel()]).bool()
    # The bools of a group, read as one integer, are not 0 if one of them is set.
    kept = body.reshape(-1, _GROUP).index_select(0, marks.view(torch.int64).nonzero()[:, 0]).view(1, -1)
    rest = torch.nn.functional.pad(tile[:, breadth - extra :], (0, -extra % _GROUP), value=-2.0)
    return torch.cat([kept, rest], 1) if extra else kept


def _power_sums(part: Tensor, square: Tensor) -> Tensor:
    """Σ p^k, k = 1..4, along the rows of `part` (R, D): (R, 4) float64. Overwrites both arguments."""
    torch.mul(part, part, out=square)
    sums = [part.sum(1, dtype=torch.float64), square.sum(1), _dots(part, square), _dots(square, square)]
    return torch.stack([x.double() for x in sums], dim=1)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Σ ab along the rows of `a` and `b` (R, D): (R,). Overwrites `a`."""
    # torch.dot is twice as fast and sums less accurately, which suffices for third and fourth powers.
    return torch.dot(a[0], b[0])[None] if a.shape[0] == 1 else a.mul_(b).sum(1)


def _gather_marked(flat: Tensor, index: Tensor, low: Tensor, high: Tensor | None, masks: Tensor | None) -> Gathered:
    """Compute `gather` with a single synchronisation: mark the pixels in each tile, and extract them at the end."""
    count, pixels = index.numel(), flat.shape[1]
    included = torch.zeros(count, ORDER + 1, dtype=torch.float64, device=flat.device)
    excluded = torch.zeros_like(included)
    marked = torch.empty(count, pixels, dtype=torch.bool, device=flat.device)
    numbers = row_numbers(index)
    for row_slice, column_slice in tiles(count, pixels, flat.device):
        tile = tile_of(flat, numbers, row_slice, column_slice).to(low.dtype)
        inside = torch.gt(tile, low[row_slice], out=marked[row_slice, column_slice])
        below = tile.masked_fill(inside, 0)
        if high is not None:
            above = tile > high[row_slice]
            included[row_slice, 0] += above.sum(1)
            inside.logical_and_(above.logical_not_())
            above = tile.masked_fill(above, 0)
        else:
            assert masks is not None
            selected = tile_of(masks, numbers, row_slice, column_slice)
            included[row_slice, 0] += (selected & ~inside).sum(1)
            above = below * selected
            below -= above
        for values, sums in ((above, included), (below, excluded)):
            square, wide = values * values, torch.float64
            parts = [values.sum(1, dtype=wide), square.sum(1, dtype=wide)]
            parts += [values.mul_(square).sum(1, dtype=wide), square.square_().sum(1, dtype=wide)]
            sums[row_slice, 1:] += torch.stack(parts, dim=1)
    row, column = marked.nonzero().unbind(1)
    source = row if count == flat.shape[0] else index[row]
    return Gathered(
        included=included,
        excluded=excluded,
        rows=row,
        values=flat[source, column].double(),
        flags=row.new_zeros(0, dtype=torch.bool) if masks is None else masks[source, column],
        width=marked.sum(1),
    )


def nearest(flat: Tensor, index: Tensor, low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` smallest probabilities above `high` and the `count` largest up to `low`: (R, count) each.

    Missing ones are NaN. Rows and brackets are those of `gather`.
    """
    dtype = working_dtype(flat)
    numbers = row_numbers(index)
    low, high = low.to(dtype)[:, None], high.to(dtype)[:, None]
    above = torch.full((index.numel(), count), torch.inf, dtype=dtype, device=flat.device)
    below = torch.full_like(above, -torch.inf)
    for row_slice, column_slice in tiles(index.numel(), flat.shape[1], flat.device):
        tile = tile_of(flat, numbers, row_slice, column_slice).to(dtype)
        some = min(count, tile.shape[1])
        found = tile.masked_fill(tile <= high[row_slice], torch.inf).topk(some, 1, largest=False).values
        above[row_slice] = torch.cat([above[row_slice], found], 1).topk(count, 1, largest=False).values
        found = tile.masked_fill(tile > low[row_slice], -torch.inf).topk(some, 1).values
        below[row_slice] = torch.cat([below[row_slice], found], 1).topk(count, 1).values
    above, below = (x.masked_fill(x.isinf(), torch.nan).double() for x in (above, below))
    return above, below


def add_extracted(got: Gathered, above: Tensor, below: Tensor) -> Gathered:
    """Move pixels from the power sums to the extracted ones: `above` and `below` (R, ·), NaN for none."""
    more = torch.cat([above, below], 1)
    exists = ~more.isnan()
    row, column = exists.nonzero().unbind(1)
    rows, order = torch.cat([got.rows, row]).sort(stable=True)
    powers = torch.arange(ORDER + 1, dtype=torch.float64, device=more.device)

    def sums(values: Tensor) -> Tensor:
        known = values.nan_to_num()[..., None]
        return (known**powers * ~values.isnan()[..., None]).sum(1)

    excluded = got.excluded - sums(below) * (powers > 0)
    return Gathered(
        included=got.included - sums(above),
        excluded=excluded,
        rows=rows,
        values=torch.cat([got.values, more[row, column]])[order],
        flags=got.flags,
        width=got.width + exists.sum(1),
    )


def blocks(rows: Tensor, values: Tensor, width: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pack ragged rows (see `Gathered`) into few dense blocks: row numbers (B,) and values (B, W), sorted.

    Rows of similar width share a block, so that a single wide row does not widen the others. The number of blocks grows
    with the logarithm of the largest width; on other devices than the CPU there are at most three. Each row is sorted
    in decreasing order and filled up with zeros, which add nothing to any sum that follows.
    """
    widths = width.tolist()
    order = width.argsort(stable=True)
    start = width.cumsum(0) - width
    for first, last, longest in _size_classes(sorted(widths), width.device.type == "cpu"):
        members = order[first:last]
        columns = torch.arange(longest, device=rows.device)
        inside = columns < width[members, None]
        dense = values.new_zeros(last - first, longest)
        if longest:
            place = (start[members, None] + columns).clamp(max=values.numel() - 1)
            dense = torch.where(inside, values[place], dense)
        yield members, dense.sort(dim=1, descending=True).values


def _size_classes(widths: list[int], on_cpu: bool) -> Iterator[tuple[int, int, int]]:
    """Cut ascending `widths` into classes of similar width: (first, last, longest) of each."""
    first, ratio = 0, _BLOCK_RATIO if on_cpu else _DEVICE_RATIO
    bounds: list[int] = []
    bound = max(widths, default=0)
    while bound > 32 and (on_cpu or len(bounds) < _DEVICE_BLOCKS - 1):
        bounds.append(bound)
        bound //= ratio
    bounds.append(max(bound, 32))
    for bound in reversed(bounds):
        last = first
        while last < len(widths) and widths[last] <= bound:
            last += 1
        if last > first:
            yield first, last, widths[last - 1]
        first = last
