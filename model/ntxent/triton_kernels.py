"""NT-Xent's GPU kernels that walk the similarities, in Triton; `model.ntxent.triton_launch` starts them.

    scan      one stretch of the columns: maximum and sum of exponentials of s over the negatives, going online
    merge     the stretches of `scan` → log-sum-exp and maximum
    survey    the columns' log-sum-exps → how far apart they are, and each one's share of its weights
    gradient  one stretch of the columns: s again, its weights, and their product with the columns

Rows are stored as `triton_rows` says. Where they have two parts, a product is high·high + high·low + low·high. Products
add up in fp32, exponentials are powers of two. A program owns some rows of one view and one stretch of the columns.
Tails of rows and columns repeat the last one, and are masked after that.

Offsets within a tile are 32-bit, those of tiles 64-bit.

Legend: R = 2N rows (view 1, then view 2); C columns; P width of a part of a stored row; S stretches.
"""

import math

import triton
import triton.language as tl

from model.ntxent.triton_rows import SCALE, UNIT

UNSCALED = tl.constexpr(1.0 / SCALE.value**2)
LOG2E = tl.constexpr(math.log2(math.e))
FLOOR = tl.constexpr(-1e30)  # a maximum of nothing: finite, so that a difference of two is no NaN
WEIGHT_BITS = tl.constexpr(13.0)  # weights are at most 2: times 2^13 they fit fp16, which then keeps small ones
NARROW = tl.constexpr(100.0)  # of log-sum-exps in powers of two: 2^±100 has room in fp32 for what differs between rows


@triton.jit(do_not_specialize=["first"])  # it differs from rank to rank
def scan_kernel(
    rows,
    columns,
    maxima,
    sums,
    num_rows,
    num_columns,
    first,
    stretch,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Maximum of s, and Σ 2^(s − maximum), over the negatives of one stretch of columns, in units of log 2.

    Args:
        rows: fp16 [R, PARTS, P].
        columns: fp16 [C, PARTS, P].
        maxima: fp32 [S, R]; FLOOR where there is no negative.
        sums: fp32 [S, R].
        num_rows: R.
        num_columns: C.
        first: where the rows start among the columns; negative if nowhere.
        stretch: columns of a program, a multiple of COLUMNS.
        PADDED: P.
        PARTS: 1 or 2.
        CHUNK: of P at a time.
        ROWS: of a program.
        COLUMNS: of a tile.
    """
    top, num = _program_rows(num_rows, ROWS)
    row = tl.arange(0, ROWS)
    own = _tile(rows, top, top + num, tl.arange(0, CHUNK), PARTS * PADDED, ROWS)
    own_high, own_low = _load_parts(own, PADDED, PARTS)
    largest = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    begin = tl.program_id(1) * stretch
    for start in range(begin, min(begin + stretch, num_columns), COLUMNS):
        others = _tile(columns, start, num_columns, tl.arange(0, CHUNK), PARTS * PADDED, COLUMNS)
        high, low = _load_parts(others, PADDED, PARTS)
        s = _similarity(own, own_high, own_low, others, high, low, PADDED, PARTS, CHUNK)
        s = _only_negatives(s, top, start, num_rows, num_columns, first)
        now = tl.maximum(largest, tl.max(s, axis=1) * UNSCALED)
        total = total * tl.exp2(largest - now) + tl.sum(tl.exp2(s * UNSCALED - now[:, None]), axis=1)
        largest = now
    place = tl.cast(tl.program_id(1), tl.int64) * num_rows + top + row
    tl.store(maxima + place, largest, mask=row < num)
    tl.store(sums + place, total, mask=row < num)


@triton.jit
def merge_kernel(maxima, sums, lse, hardest, num_rows, num_stretches, BLOCK: tl.constexpr):
    """Log-sum-exp and maximum, in units of s, from those of the stretches; −∞ where there are no negatives.

    Args:
        maxima: fp32 [S, R].
        sums: fp32 [S, R].
        lse: fp32 [R].
        hardest: fp32 [R].
        num_rows: R.
        num_stretches: S.
        BLOCK: rows of a program.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    largest = tl.full([BLOCK], FLOOR, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for stretch in range(num_stretches):
        place = tl.cast(stretch, tl.int64) * num_rows + row
        maximum = tl.load(maxima + place, mask=inside, other=FLOOR)
        now = tl.maximum(largest, maximum)
        total = total * tl.exp2(largest - now) + tl.load(sums + place, mask=inside, other=0.0) * tl.exp2(maximum - now)
        largest = now
    tl.store(lse + row, (largest + tl.log2(total)) / LOG2E, mask=inside)
    tl.store(hardest + row, tl.where(largest > FLOOR, largest / LOG2E, -float("inf")), mask=inside)


@triton.jit
def survey_kernel(lse, shares, extent, num_columns, BLOCK: tl.constexpr):
    """What the columns have in common, in one program.

    Args:
        lse: fp32 [C], L.
        shares: fp32 [C], 2^(least L − L), L as `_load_lse` gives it.
        extent: fp32 [2], the least and the greatest of these L.
        num_columns: C.
        BLOCK: columns at a time.
    """
    least, greatest = tl.full([BLOCK], float("inf"), tl.float32), tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, num_columns, BLOCK):
        some = _load_lse(lse, start, num_columns, BLOCK)
        least, greatest = tl.minimum(least, some), tl.maximum(greatest, some)
    lowest = tl.min(least, axis=0)
    tl.store(extent, lowest)
    tl.store(extent + 1, tl.max(greatest, axis=0))
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        some = tl.exp2(lowest - _load_lse(lse, start, num_columns, BLOCK))
        tl.store(shares + column, some, mask=column < num_columns)


@triton.jit(do_not_specialize=["first"])  # it differs from rank to rank
def gradient_kernel(
    rows,
    columns,
    row_lse,
    column_lse,
    shares,
    extent,
    sums,
    num_rows,
    num_columns,
    first,
    stretch,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Σ_j (e^{s_ij − L_i} + e^{s_ij − L_j}) u_j over the negatives of one stretch of columns, OUT numbers of it.

    Where the L of all these rows and columns are close, both exponentials are made of one: 2^s (2^−L_i + 2^−L_j).

    Args:
        rows: as `scan_kernel`'s, and so are all that are not named here.
        columns: see `rows`.
        row_lse: fp32 [R], L of the rows.
        column_lse: fp32 [C], L of the columns.
        shares: fp32 [C] of `survey_kernel`.
        extent: fp32 [2] of `survey_kernel`.
        sums: fp32 [S, R, P].
        num_rows: see `rows`.
        num_columns: see `rows`.
        first: see `rows`.
        stretch: see `rows`.
        PADDED: see `rows`.
        PARTS: see `rows`.
        CHUNK: of P at a time; P itself, or less than OUT.
        OUT: of P that a program makes.
        ROWS: see `rows`.
        COLUMNS: see `rows`.
    """
    top, num = _program_rows(num_rows, ROWS)
    begin = tl.program_id(1) * stretch
    end = min(begin + stretch, num_columns)
    own_lse = _load_lse(row_lse, top, top + num, ROWS)
    lowest, highest = tl.load(extent), tl.load(extent + 1)
    own_share = tl.exp2(lowest - own_lse)
    close = tl.maximum(highest, tl.max(own_lse, axis=0)) - tl.minimum(lowest, tl.min(own_lse, axis=0)) < NARROW
    own = _tile(rows, top, top + num, tl.arange(0, CHUNK), PARTS * PADDED, ROWS)
    own_high, own_low = _load_parts(own, PADDED, PARTS)
    out = tl.program_id(2) * OUT + tl.arange(0, OUT)
    total = tl.zeros([ROWS, OUT], tl.float32)
    for start in range(begin, end, COLUMNS):
        others = _tile(columns, start, num_columns, tl.arange(0, CHUNK), PARTS * PADDED, COLUMNS)
        if PADDED == CHUNK:
            high, low = _load_parts(others, PADDED, PARTS)
        else:
            high, low = _load_parts(_tile(columns, start, num_columns, out, PARTS * PADDED, COLUMNS), PADDED, PARTS)
        s = _similarity(own, own_high, own_low, others, high, low, PADDED, PARTS, CHUNK)
        s = _only_negatives(s, top, start, num_rows, num_columns, first) * UNSCALED
        other_lse = _load_lse(column_lse, start, num_columns, COLUMNS)
        other_share = _load_repeating(shares, start, num_columns, COLUMNS)
        if close:
            weights = tl.exp2(s - lowest) * (own_share[:, None] + other_share[None, :])
        else:
            weights = tl.exp2(s - own_lse[:, None]) + tl.exp2(s - other_lse[None, :])
        weights_high = weights.to(tl.float16)
        weights_low = weights_high
        if PARTS == 2:
            weights_low = (weights - weights_high.to(tl.float32)).to(tl.float16)
        total = _add_product(weights_high, weights_low, high, low, total, PARTS)
    total *= 1.0 / (2.0**WEIGHT_BITS * UNIT)
    place = sums + (tl.cast(tl.program_id(1), tl.int64) * num_rows + top) * PADDED
    row = tl.arange(0, ROWS)[:, None]
    tl.store(place + row * PADDED + out[None, :], total, mask=row < num)


@triton.jit
def _program_rows(num_rows, ROWS: tl.constexpr):
    """The first row of this program, and how many there are from there on in the same view."""
    half = num_rows // 2
    num_blocks = tl.cdiv(half, ROWS)
    start = (tl.program_id(0) % num_blocks) * ROWS
    return (tl.program_id(0) // num_blocks) * half + start, half - start


@triton.jit
def _tile(rows, start, end, at, WIDTH: tl.constexpr, NUM: tl.constexpr):
    """Where the numbers `at` of NUM rows from `start` on lie; rows from `end` on are the last one."""
    row = tl.minimum(tl.arange(0, NUM), end - 1 - start)
    return rows + tl.cast(start, tl.int64) * WIDTH + row[:, None] * WIDTH + at[None, :]


@triton.jit
def _load_parts(place, PADDED: tl.constexpr, PARTS: tl.constexpr):
    high = tl.load(place)
    low = high
    if PARTS == 2:
        low = tl.load(place + PADDED)
    return high, low


@triton.jit
def _load_repeating(pointer, start, end, NUM: tl.constexpr):
    """NUM numbers from `start` on; those from `end` on are the last one."""
    return tl.load(pointer + tl.minimum(start + tl.arange(0, NUM), end - 1))


@triton.jit
def _load_lse(lse, start, end, NUM: tl.constexpr):
    """L in units of log 2, less WEIGHT_BITS, which magnifies the weights."""
    return _load_repeating(lse, start, end, NUM) * LOG2E - WEIGHT_BITS


@triton.jit
def _similarity(
    own, own_high, own_low, others, high, low, PADDED: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr
):
    """SCALE²·s of a tile in units of log 2, of the parts that are given if they are all, or else of what lies there."""
    s = tl.zeros([own.shape[0], others.shape[0]], tl.float32)
    if PADDED == CHUNK:
        s = _add_product(own_high, own_low, high.T, low.T, s, PARTS)
    else:
        for at in range(0, PADDED, CHUNK):
            left_high, left_low = _load_parts(own + at, PADDED, PARTS)
            right_high, right_low = _load_parts(others + at, PADDED, PARTS)
            s = _add_product(left_high, left_low, right_high.T, right_low.T, s, PARTS)
    return s


@triton.jit
def _add_product(left_high, left_low, right_high, right_low, total, PARTS: tl.constexpr):
    """`total` plus a product of matrices.

    Tensor cores cut off, rather than round, what they add to. So where it matters, a product of its own is summed
    from its small terms on, and what is long added to is rounded, outside of them.
    """
    if PARTS == 1:
        return tl.dot(left_high, right_high, total)
    product = tl.dot(left_high, right_low, tl.zeros_like(total))
    product = tl.dot(left_low, right_high, product)
    return total + tl.dot(left_high, right_high, product)


@triton.jit
def _only_negatives(s, top, start, num_rows, num_columns, first):
    """−∞ for a row itself, its positive, and beyond the last column; few tiles have any of these."""
    ROWS: tl.constexpr = s.shape[0]
    COLUMNS: tl.constexpr = s.shape[1]
    half = num_rows // 2
    to_positive = tl.where(top < half, half, -half)
    itself = first + top
    positive = itself + to_positive
    meets = (start < itself + ROWS) & (itself < start + COLUMNS)
    meets |= (start < positive + ROWS) & (positive < start + COLUMNS)
    if ((first >= 0) & meets) | (start + COLUMNS > num_columns):
        row = (itself + tl.arange(0, ROWS))[:, None]
        column = (start + tl.arange(0, COLUMNS))[None, :]
        negative = (first < 0) | ((column != row) & (column != row + to_positive))
        s = tl.where(negative & (column < num_columns), s, -float("inf"))
    return s
