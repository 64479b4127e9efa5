"""The Triton kernels of `triton_solver`: one program per row, or per row and chunk.

Shapes: R rows, D pixels of a row, C chunks of a row, W capacity of a window.
"""

from __future__ import annotations

from rankseg.exact import _BANDS, _JACOBI_MAX, NEGLIGIBLE
from rankseg.solver import _TIE as TIE

try:
    import triton
    import triton.language as tl
except ImportError as error:  # for example on macOS, or with torch for the CPU
    raise RuntimeError(
        "RANKSEG_BACKEND=triton: triton is not installed. Fix: pip install triton, or unset RANKSEG_BACKEND."
    ) from error

_BANDS_ = tl.constexpr(_BANDS)
_NEGLIGIBLE = tl.constexpr(NEGLIGIBLE)
_TIE = tl.constexpr(TIE)
_FEW = tl.constexpr(_JACOBI_MAX)


@triton.jit
def _pixels(flat, row, start, end, stride_row, stride_pixel, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Return BLOCK pixels of a row from `start`, whether each is before `end`, and their places in the row."""
    place = start + tl.arange(0, BLOCK).to(tl.int64)
    inside = place < end
    at = flat + row * stride_row + place * stride_pixel
    return tl.load(at, mask=inside, other=0.0).to(DTYPE), inside, place


@triton.jit
def statistics_kernel(
    flat, stride_row, stride_pixel, pixels, span, total, peak, bad, BLOCK: tl.constexpr, DTYPE: tl.constexpr
):
    """Sum, maximum and number of invalid values of each chunk."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sums = tl.zeros([BLOCK], tl.float64)
    most = tl.zeros([BLOCK], DTYPE)
    wrong = tl.zeros([BLOCK], tl.int32)
    begin = chunk.to(tl.int64) * span
    end = tl.minimum(begin + span, pixels)
    for start in range(begin, end, BLOCK):
        p, inside, _ = _pixels(flat, row, start, end, stride_row, stride_pixel, BLOCK, DTYPE)
        valid = (p >= 0) & (p <= 1)  # false for NaN
        wrong += tl.where(inside & (valid == 0), 1, 0)
        p = tl.where(valid, p, 0.0)
        sums += p
        most = tl.maximum(most, p)
    out = row * tl.num_programs(1) + chunk
    tl.store(total + out, tl.sum(sums, 0))
    tl.store(peak + out, tl.max(most, 0))
    tl.store(bad + out, tl.sum(wrong, 0))


@triton.jit
def _root(cut, excess, volume, mean, gamma, DICE: tl.constexpr):
    """See `surrogate.excess_root`."""
    slope = mean + gamma + 1 if DICE else mean + 2 * gamma
    constant = gamma / 2 if DICE else gamma
    return tl.minimum(tl.maximum(cut + (excess + constant - cut * slope) / (volume + slope), 0.001), 0.999)


@triton.jit
def guess_kernel(
    flat, stride_row, stride_pixel, pixels, step, mean, smooth, cut, volume, density, SAMPLE: tl.constexpr,
    DICE: tl.constexpr,
):  # fmt: skip
    """See `surrogate.from_sample`."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SAMPLE).to(tl.int64) * step
    inside = place < pixels
    p = tl.load(flat + row * stride_row + place * stride_pixel, mask=inside, other=0.0).to(tl.float64)
    mu, gamma = tl.load(mean + row), tl.load(smooth)
    at = mu * 0 + 0.35
    count = mu * 0
    for _ in range(4):
        above = tl.maximum(p - at, 0.0)
        count = tl.sum(tl.where(above > 0, 1.0, 0.0), 0).to(tl.float64) * step
        at = _root(at, tl.sum(above, 0) * step, count, mu, gamma, DICE)
    near = tl.where(inside & (tl.abs(p - at) < 0.05), 1.0, 0.0)
    tl.store(cut + row, at)
    tl.store(volume + row, count)
    tl.store(density + row, (tl.sum(near, 0) + 1) * (step / 0.1))


@triton.jit
def excess_kernel(flat, stride_row, stride_pixel, pixels, span, cut, excess, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Σ max(p - cut, 0) of each chunk."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.load(cut + row)
    sums = tl.zeros([BLOCK], tl.float64)
    begin = chunk.to(tl.int64) * span
    end = tl.minimum(begin + span, pixels)
    for start in range(begin, end, BLOCK):
        p, _, _ = _pixels(flat, row, start, end, stride_row, stride_pixel, BLOCK, DTYPE)
        sums += tl.maximum(p.to(tl.float64) - at, 0.0)
    tl.store(excess + row * tl.num_programs(1) + chunk, tl.sum(sums, 0))


@triton.jit
def bracket_kernel(
    mean, smooth, peak, cut, volume, density, excess, low, high, least, chunks, DICE: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """See `surrogate.bracket`; for small objects it holds all confident pixels, for a peak of at most `least` none."""
    row = tl.program_id(0)
    part = tl.arange(0, CHUNKS)
    total = tl.sum(tl.load(excess + row * chunks + part, mask=part < chunks, other=0.0), 0)
    mu, gamma = tl.load(mean + row), tl.load(smooth)
    at = _root(tl.load(cut + row), total, tl.load(volume + row), mu, gamma, DICE)
    half = 3 * tl.sqrt(at / tl.load(density + row)) + 0.005 * at
    least_alone = (mu + gamma) * _NEGLIGIBLE
    large = least_alone > 1.01
    bottom = tl.where(large, tl.maximum(at - half, 1e-3), tl.minimum(least_alone * 0.99, 0.1))
    top = tl.where(large, at + half, 1.0)
    kept = tl.load(peak + row) > least
    tl.store(low + row, tl.where(kept, bottom, 2.0).to(low.dtype.element_ty))
    tl.store(high + row, tl.where(kept, top, 2.0).to(high.dtype.element_ty))


@triton.jit
def gather_kernel(
    flat, stride_row, stride_pixel, pixels, span, low, high, sums, window, cursor, capacity,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Power sums above (0..4) and below (6..9) the bracket; the pixels inside it go to the window."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    bottom, top = tl.load(low + row), tl.load(high + row)
    n = tl.zeros([BLOCK], tl.float64)
    a1 = tl.zeros([BLOCK], tl.float64)
    a2 = tl.zeros([BLOCK], tl.float64)
    a3 = tl.zeros([BLOCK], tl.float64)
    a4 = tl.zeros([BLOCK], tl.float64)
    b1 = tl.zeros([BLOCK], tl.float64)
    b2 = tl.zeros([BLOCK], tl.float64)
    b3 = tl.zeros([BLOCK], tl.float64)
    b4 = tl.zeros([BLOCK], tl.float64)
    begin = chunk.to(tl.int64) * span
    end = tl.minimum(begin + span, pixels)
    for start in range(begin, end, BLOCK):
        p, inside, _ = _pixels(flat, row, start, end, stride_row, stride_pixel, BLOCK, DTYPE)
        above = p > top
        within = inside & (p > bottom) & (above == 0)
        n += tl.where(above, 1.0, 0.0)
        wide = p.to(tl.float64)
        x = tl.where(above, wide, 0.0)
        y = tl.where(p <= bottom, wide, 0.0)
        a1 += x
        b1 += y
        a2 += x * x
        b2 += y * y
        a3 += x * x * x
        b3 += y * y * y
        a4 += x * x * x * x
        b4 += y * y * y * y
        ones = tl.where(within, 1, 0)
        first = tl.atomic_add(cursor + row, tl.sum(ones, 0))
        place = first + tl.cumsum(ones, 0) - 1
        tl.store(window + row * capacity + place, p, mask=within & (place < capacity))
    out = sums + (row * tl.num_programs(1) + chunk) * 10
    tl.store(out + 0, tl.sum(n, 0))
    tl.store(out + 1, tl.sum(a1, 0))
    tl.store(out + 2, tl.sum(a2, 0))
    tl.store(out + 3, tl.sum(a3, 0))
    tl.store(out + 4, tl.sum(a4, 0))
    tl.store(out + 6, tl.sum(b1, 0))
    tl.store(out + 7, tl.sum(b2, 0))
    tl.store(out + 8, tl.sum(b3, 0))
    tl.store(out + 9, tl.sum(b4, 0))


@triton.jit
def _log1p(x):
    """log(1 + x), accurate for small x."""
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * (x / tl.where(y == 1, 1.0, y - 1)))


@triton.jit
def _band(scale):
    """See `exact.band_of`."""
    return (tl.maximum(tl.floor(tl.log2(scale / _FEW)), -1.0) + 1).to(tl.int32)


@triton.jit
def _values(window, start, width, BLOCK: tl.constexpr):
    step = start + tl.arange(0, BLOCK)
    return step, tl.load(window + step, mask=step < width, other=0.0).to(tl.float64)


@triton.jit
def _loss_bound(total, captured, gamma, DICE: tl.constexpr):
    """See `surrogate.loss_bound`; `total` is volume + mean."""
    if DICE:
        return (total + 1 - 2 * captured) / (total + gamma + 1)
    denominator = total + gamma - captured
    return tl.where(denominator > 0, (total - 2 * captured) / tl.maximum(denominator, 1e-300), 1.0)


@triton.jit
def _series(u, p1, p2, p3, p4):
    """See `exact.log_series`."""
    return -u * (p1 + u * (p2 / 2 + u * (p3 / 3 + u * p4 / 4)))


@triton.jit
def _integrate(
    window, scores, table, band, width, n0, c0, mean, gamma, kept, first, last, stop, c1, c2, c3, c4, r1, r2, r3, r4,
    DICE: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores of the volumes first..last that are of this band; see `exact._integrate`."""
    node = tl.arange(0, K)
    t = tl.load(table + band * 64 + node)[:, None]
    w = tl.load(table + (band + _BANDS_) * 64 + node)[:, None]
    u = tl.load(table + (band + _BANDS_ * 2) * 64 + node)[:, None]
    log_all = _series(u, r1, r2, r3, r4)
    log_window = tl.zeros([K], tl.float64)
    for start in range(0, width, BLOCK):
        step, v = _values(window, start, width, BLOCK)
        v = tl.where((step < kept) | ((step >= first) & (step < stop)), v, 0.0)
        log_window += tl.sum(_log1p(-(v[None, :] * u)), 1)
    log_all += log_window[:, None] + w
    base = tl.zeros([K, 1], tl.float64)
    if DICE:
        log_all += _series(u, c1, c2, c3, c4)
        base += (1 - u) * (c1 + u * (c2 + u * (c3 + u * c4)))
    captured = c0
    for start in range(0, last + 1, BLOCK):
        step, v = _values(window, start, width, BLOCK)
        before = captured + tl.cumsum(v, 0) - v
        captured += tl.sum(v, 0)
        volume = n0 + step + gamma
        scale = volume + mean if DICE else volume + mean - before
        single = tl.where((step < kept) | ((step >= first) & (step < stop)), v, 0.0)[None, :]
        if DICE:
            part = single * (1 - u) / (1 - single * u)
            sums = base + tl.cumsum(part, 1) - part
            found = tl.sum(tl.exp(log_all - volume[None, :] * t) * (gamma + 2 * sums), 0)
        else:
            part = _log1p(-(single * u))
            sums = base + tl.cumsum(part, 1) - part
            found = tl.sum(tl.exp(log_all - sums - volume[None, :] * t), 0) * (before + gamma)
        base += tl.sum(part, 1)[:, None]
        wanted = (step >= first) & (step <= last) & (_band(scale) == band)
        tl.store(scores + step, found, mask=wanted)


@triton.jit
def _denominator(window, width, n0, c0, mean, gamma, volume, BLOCK: tl.constexpr, DICE: tl.constexpr):
    """The mean denominator of the score at n0 + `volume` pixels."""
    value = n0 + volume + mean + gamma
    if not DICE:
        inside = mean * 0
        for start in range(0, width, BLOCK):
            step, v = _values(window, start, width, BLOCK)
            inside += tl.sum(tl.where(step < volume, v, 0.0), 0)
        value -= c0 + inside
    return value


@triton.jit
def solve_kernel(
    window, cursor, sums, low, smooth, table, scores, tau, cutpoint, tied, failed, capacity, pixels, least, peak,
    chunks, DICE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best volume of one row: bounds and proof as in `solver._attempt`, then quadrature."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, CHUNKS)
    at = sums + (row * chunks + part) * 10
    some = part < chunks
    n0 = tl.sum(tl.load(at + 0, mask=some, other=0.0), 0)
    c1 = tl.sum(tl.load(at + 1, mask=some, other=0.0), 0)
    c2 = tl.sum(tl.load(at + 2, mask=some, other=0.0), 0)
    c3 = tl.sum(tl.load(at + 3, mask=some, other=0.0), 0)
    c4 = tl.sum(tl.load(at + 4, mask=some, other=0.0), 0)
    r1 = tl.sum(tl.load(at + 6, mask=some, other=0.0), 0)
    r2 = tl.sum(tl.load(at + 7, mask=some, other=0.0), 0)
    r3 = tl.sum(tl.load(at + 8, mask=some, other=0.0), 0)
    r4 = tl.sum(tl.load(at + 9, mask=some, other=0.0), 0)
    c0 = c1
    count = tl.load(cursor + row)
    width = tl.minimum(count, capacity)
    top = tl.load(peak + row)
    if top > least:
        window += row * capacity
        scores += row * (capacity + 1)
        mean, gamma = c1 + r1, tl.load(smooth)
        for start in range(0, width, BLOCK):
            _, v = _values(window, start, width, BLOCK)
            mean += tl.sum(v, 0)
        loss = mean * 0 + float("inf")
        captured = c0
        for start in range(0, width + 1, BLOCK):
            step, v = _values(window, start, width, BLOCK)
            before = captured + tl.cumsum(v, 0) - v
            captured += tl.sum(v, 0)
            bound = _loss_bound(n0 + step + mean, before, gamma, DICE)
            loss = tl.minimum(loss, tl.min(tl.where(step <= width, bound, float("inf")), 0))
        weight = mean * 0 + 2 if DICE else 2 - loss
        first, last = width + 1, width * 0 - 1
        left = mean * 0
        right = mean * 0
        captured = c0
        for start in range(0, width + 1, BLOCK):
            step, v = _values(window, start, width, BLOCK)
            before = captured + tl.cumsum(v, 0) - v
            captured += tl.sum(v, 0)
            total = n0 + step + mean
            margin = weight * before - (total - 1) + loss * (total + gamma - 1) + 1e-12 * total
            # The bounds do not hold for the empty mask, n0 + step = 0.
            empty = (n0 + step == 0) & (gamma + step > 0)
            wanted = ((margin >= 0) | (_loss_bound(total, before, gamma, DICE) == loss) | empty) & (step <= width)
            first = tl.minimum(first, tl.min(tl.where(wanted, step, width + 1), 0))
            last = tl.maximum(last, tl.max(tl.where(wanted, step, -1), 0))
            left += tl.sum(tl.where(step == 0, margin, 0.0), 0)
            right += tl.sum(tl.where(step == width, margin, 0.0), 0)
        largest = tl.where(n0 > 0, 1.0, tl.load(low + row).to(tl.float64))
        # For γ < 1 the empty mask scores at most 1/μ, and for 0 < γ < 1 this quadrature cannot score it.
        beaten = (gamma >= 1) | ((1 - loss) * mean > 1)
        proved = ((n0 == 0) | (left < 0)) & (beaten | ((n0 == 0) & (gamma == 0)))
        proved = proved & ((right < 0) | (n0 + width == pixels)) & (largest <= (mean + gamma) * _NEGLIGIBLE)
        proved = proved & (count <= capacity)
        # Pixels before the first and after the last wanted volume join the power sums if they are small enough.
        begin = _denominator(window, width, n0, c0, mean, gamma, first, BLOCK, DICE)
        confident = width * 0
        for start in range(0, width, BLOCK):
            _, v = _values(window, start, width, BLOCK)
            confident += tl.sum(tl.where(v > begin * _NEGLIGIBLE, 1, 0), 0)
        kept = tl.minimum(confident, first)
        stop = tl.maximum(last, confident)
        for start in range(0, width, BLOCK):
            step, v = _values(window, start, width, BLOCK)
            x = tl.where((step >= kept) & (step < first), v, 0.0)
            y = tl.where(step >= stop, v, 0.0)
            c1 += tl.sum(x, 0)
            c2 += tl.sum(x * x, 0)
            c3 += tl.sum(x * x * x, 0)
            c4 += tl.sum(x * x * x * x, 0)
            r1 += tl.sum(y, 0)
            r2 += tl.sum(y * y, 0)
            r3 += tl.sum(y * y * y, 0)
            r4 += tl.sum(y * y * y * y, 0)
        end = _denominator(window, width, n0, c0, mean, gamma, last, BLOCK, DICE)
        for band in range(_band(begin), _band(end) + 1):
            if band == 0:
                _integrate(
                    window, scores, table, band, width, n0, c0, mean, gamma, kept, first, last, stop,
                    c1, c2, c3, c4, r1, r2, r3, r4, DICE, 64, 16,
                )  # fmt: skip
            else:
                _integrate(
                    window, scores, table, band, width, n0, c0, mean, gamma, kept, first, last, stop,
                    c1, c2, c3, c4, r1, r2, r3, r4, DICE, 16, 64,
                )  # fmt: skip
        tl.debug_barrier()
        best = mean * 0 - 1
        for start in range(0, width + 1, BLOCK):
            step = start + tl.arange(0, BLOCK)
            found = tl.load(scores + step, mask=(step >= first) & (step <= last), other=-1.0)
            best = tl.maximum(best, tl.max(found, 0))
        chosen = width + 1
        for start in range(0, width + 1, BLOCK):
            step = start + tl.arange(0, BLOCK)
            found = tl.load(scores + step, mask=(step >= first) & (step <= last), other=-1.0)
            chosen = tl.minimum(chosen, tl.min(tl.where(found >= best - best * _TIE, step, width + 1), 0))
        cut = tl.load(window + chosen, mask=chosen < width, other=0.0)
        equal = width * 0
        for start in range(0, width, BLOCK):
            step = start + tl.arange(0, BLOCK)
            v = tl.load(window + step, mask=step < width, other=-1.0)
            equal += tl.sum(tl.where((step < chosen) & (v == cut), 1, 0), 0)
        tl.store(tau + row, (n0 + 0.5).to(tl.int64) + chosen)
        tl.store(cutpoint + row, cut)
        tl.store(tied + row, equal.to(tl.int64))
        tl.store(failed + row, tl.where(proved, 0, 1))
    else:
        tl.store(tau + row, width.to(tl.int64) * 0)
        tl.store(cutpoint + row, top)
        tl.store(tied + row, width.to(tl.int64) * 0)
        tl.store(failed + row, width * 0)


@triton.jit
def equal_kernel(
    flat, stride_row, stride_pixel, pixels, span, cutpoint, tied, equal, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Number of pixels of each chunk that equal the cut-off, for rows with tied pixels."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = tl.zeros([BLOCK], tl.int32)
    if tl.load(tied + row) > 0:
        cut = tl.load(cutpoint + row)
        begin = chunk.to(tl.int64) * span
        end = tl.minimum(begin + span, pixels)
        for start in range(begin, end, BLOCK):
            p, inside, _ = _pixels(flat, row, start, end, stride_row, stride_pixel, BLOCK, DTYPE)
            count += tl.where(inside & (p == cut), 1, 0)
    tl.store(equal + row * tl.num_programs(1) + chunk, tl.sum(count, 0))


@triton.jit
def select_kernel(
    flat, stride_row, stride_pixel, pixels, span, tau, cutpoint, tied, before, masks,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The masks; `before` counts the pixels of earlier chunks that equal the cut-off."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cut, missing = tl.load(cutpoint + row), tl.load(tied + row)
    everything = tl.load(tau + row) == pixels
    seen = tl.load(before + row * tl.num_programs(1) + chunk)
    begin = chunk.to(tl.int64) * span
    end = tl.minimum(begin + span, pixels)
    for start in range(begin, end, BLOCK):
        p, inside, place = _pixels(flat, row, start, end, stride_row, stride_pixel, BLOCK, DTYPE)
        same = tl.where(inside & (p == cut), 1, 0)
        rank = seen + tl.cumsum(same, 0)
        seen += tl.sum(same, 0)
        chosen = (p > cut) | ((same == 1) & (rank <= missing)) | everything
        tl.store(masks + row * pixels + place, chosen.to(tl.int8), mask=inside)
