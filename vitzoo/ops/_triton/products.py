"""What attention that never compares two tokens is made of: matrices summed over tokens, and tokens times such matrices.

    outer_sums     parts of a^T b [D, E] and of the sum of a [D], over all tokens
    sum_parts      their sum, in an order that only the shape decides
    times_matrix   tokens times a matrix of their head

Dimension letters: T, the tokens of a tile; D and E, channels, in blocks of BD and BE. One program is one head; heads are the
fastest part of its number, so that heads which share a cache line run side by side. Matrices are fp32. A product of them with
tokens of a half type is a TF32 one, which represents those tokens exactly and has the range of fp32; the matrix is rounded
to it when it is written (ROUND).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitzoo.ops._triton import tuning
from vitzoo.ops._triton.host import architecture, common_strides, common_unit, power, precision, split
from vitzoo.ops._triton.tokens import load_tokens, store_tokens

SIZES = ["tokens", "tiles", "splits", "chunk", "images", "x_b", "x_t", "x_n", "a_b", "a_t", "a_n", "b_b", "b_t", "b_n"]
ONES = ["heads"]


@triton.jit
def nearest_tf32(x):
    """fp32 rounded to the ten bits that a TF32 product looks at; by itself it cuts off the others, always towards zero."""
    rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # noqa: PLR0124  a NaN whose bits are all ones would turn into zero


@triton.jit
def load_matrix(
    matrix, i0, o0, IN: tl.constexpr, OUT: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """The block `[BI, BO]` that begins at (i0, o0) of `[IN, OUT]`, or of the transpose of a stored `[OUT, IN]`."""
    if TRANSPOSED:
        o, i = o0 + tl.arange(0, BO)[:, None], i0 + tl.arange(0, BI)[None, :]
        return tl.trans(tl.load(matrix + o * IN + i, mask=(o < OUT) & (i < IN), other=0.0))
    else:
        i, o = i0 + tl.arange(0, BI)[:, None], o0 + tl.arange(0, BO)[None, :]
        return tl.load(matrix + i * OUT + o, mask=(i < IN) & (o < OUT), other=0.0)


@triton.jit
def rows_times(
    x, offsets, inside, matrix, acc, o0, IN: tl.constexpr, OUT: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc `[T, BO]` + rows `x + offsets` of IN numbers times the columns of the matrix from o0 on."""
    for i0 in tl.static_range(0, IN, BI):
        rows = load_tokens(x, offsets, inside, IN, BI, i0).to(tl.float32)
        acc = tl.dot(rows, load_matrix(matrix, i0, o0, IN, OUT, BI, BO, TRANSPOSED), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ONES)
def outer_sums(
    a, b, weight, fade, products, sums, heads, tokens, splits, chunk, images,
    a_b, a_t, a_n, b_b, b_t, b_n,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts `[splits, B, N, D, E]` of sum_t weight[t] a[t]^T b[t] and, where wanted, `[splits, B, N, D]` of sum_t fade[t] a[t].

    a `[B, T, N, D]` and b `[B, T, N, E]` by the strides `*_b, *_t, *_n`, counted in UNIT elements; weight and fade `[B, T, N]`,
    fp32, contiguous, or None for ones; sums may be None. Each of the splits takes `chunk` tokens.
    Grid: heads * blocks of E * blocks of D * splits * B.
    """
    blocks_d: tl.constexpr = (D + BD - 1) // BD
    blocks_e: tl.constexpr = (E + BE - 1) // BE
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    e0 = rest % blocks_e * BE
    rest = rest // blocks_e
    d0 = rest % blocks_d * BD
    rest = rest // blocks_d
    split = rest % splits
    image = (rest // splits).to(tl.int64)
    a += (image * a_b + head * a_n) * UNIT
    b += (image * b_b + head * b_n) * UNIT
    if weight is not None:
        weight += image * tokens * heads + head
    if fade is not None:
        fade += image * tokens * heads + head

    acc = tl.zeros([BD, BE], tl.float32)
    total = tl.zeros([BT, BD], tl.float32)  # summed over the tile once, at the end
    for at in range(split * chunk, tl.minimum((split + 1) * chunk, tokens), BT):
        t = at + tl.arange(0, BT)
        inside = t < tokens
        left = load_tokens(a, t * a_t * UNIT, inside, D, BD, d0)
        right = load_tokens(b, t * b_t * UNIT, inside, E, BE, e0)
        if sums is not None:
            if fade is not None:
                total += left.to(tl.float32) * tl.load(fade + t * heads, mask=inside, other=0.0)[:, None]
            else:
                total += left.to(tl.float32)
        if weight is not None:
            weighted = left.to(tl.float32) * tl.load(weight + t * heads, mask=inside, other=0.0)[:, None]
            if PRECISION == "tf32":
                weighted = nearest_tf32(weighted)
            acc = tl.dot(tl.trans(weighted), right.to(tl.float32), acc, input_precision=PRECISION)
        elif left.dtype != right.dtype:
            acc = tl.dot(tl.trans(left.to(tl.float32)), right.to(tl.float32), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)

    here = (split * images + image) * heads + head
    d, e = d0 + tl.arange(0, BD), e0 + tl.arange(0, BE)
    at = here * D * E + d[:, None] * E + e[None, :]
    tl.store(products + at, acc, mask=(d < D)[:, None] & (e < E)[None, :])
    if sums is not None:  # noqa: SIM102  where there are no sums, what follows must not be compiled
        if e0 == 0:
            tl.store(sums + here * D + d, tl.sum(total, 0), mask=d < D)


@triton.jit(do_not_specialize=["parts", "numbers"])
def sum_parts(parts_of, whole, factor, parts, numbers, BLOCK: tl.constexpr, ROUND: tl.constexpr):
    """whole `[numbers]` = factor * the sum of `[parts, numbers]`, one part after another. Grid: ceil(numbers / BLOCK)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, parts):
        total += tl.load(parts_of + i, mask=i < numbers, other=0.0)
        parts_of += numbers
    total *= factor
    if ROUND:
        total = nearest_tf32(total)
    tl.store(whole + i, total, mask=i < numbers)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ONES)
def times_matrix(
    x, matrix, added, out, factor, heads, tokens, tiles, x_b, x_t, x_n,
    IN: tl.constexpr, OUT: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr,
    TRANSPOSED: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, o] = factor * sum_i x[t, i] matrix[i, o] + added[o], for every image and head.

    x: `[B, T, N, IN]` by the strides `x_*`, counted in UNIT elements; matrix: `[B, N, IN, OUT]`, TRANSPOSED: `[B, N, OUT, IN]`;
    added: `[B, N, OUT]` or None; both fp32. out: `[B, T, N, OUT]`. All but x are contiguous.
    Grid: heads * blocks of OUT * tiles * B.
    """
    blocks: tl.constexpr = (OUT + BO - 1) // BO
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    o0 = rest % blocks * BO
    rest = rest // blocks
    t = rest % tiles * BT + tl.arange(0, BT)
    image = (rest // tiles).to(tl.int64)
    inside = t < tokens
    x += (image * x_b + head * x_n) * UNIT
    matrix += (image * heads + head) * IN * OUT
    acc = tl.zeros([BT, BO], tl.float32)
    acc = rows_times(x, t * x_t * UNIT, inside, matrix, acc, o0, IN, OUT, BI, BO, TRANSPOSED, PRECISION) * factor
    if added is not None:
        o = o0 + tl.arange(0, BO)
        acc += tl.load(added + (image * heads + head) * OUT + o, mask=o < OUT, other=0.0)[None, :]
    store_tokens(out + image * tokens * heads * OUT, (t * heads + head) * OUT, inside, acc, OUT, BO, o0)


# ---- launches ------------------------------------------------------------------------------------------------------------

LEAST_CHUNK = 256
"""Tokens that are worth a part of their own."""


class Tiles(NamedTuple):
    """Tokens of a tile, channels of a block on either side of the matrix, warps, stages of the software pipeline."""

    T: int
    left: int
    right: int
    warps: int
    stages: int


def block(channels: int) -> int:
    """Channels of a block: all of them up to 64."""
    return max(16, min(64, power(channels)))


def precision_of(*tensors: Tensor) -> str:
    """That of their products with an fp32 matrix: TF32 unless one of them is fp32 itself, see `host.precision`."""
    return precision(torch.float32 if any(t.dtype == torch.float32 for t in tensors) else torch.float16)


def choose(
    name: str, tokens: int, left: int, right: int, dtype: torch.dtype, arch: int, run: Callable[[Tiles], object]
) -> Tiles:
    """Tiles for a pass over `tokens` tokens with a matrix of `left` x `right` channels, which `run` launches."""
    most = max(16, min(64, power(tokens)))
    rows = min(most, 32 if dtype == torch.float32 else 64)
    rule = Tiles(rows, block(left), block(right), 4, 2)

    def others() -> list[Tiles]:
        more = [rule._replace(stages=3), rule._replace(T=2 * rows), rule._replace(T=2 * rows, warps=8)]
        return more if tokens > rows else more[:1]

    return tuning.choose((name, most, rule.left, rule.right, dtype, arch), rule, others, run)


def summed_products(
    a: Tensor, b: Tensor, factor: float = 1.0, weight: Tensor | None = None, fade: Tensor | None = None, sums: bool = True
) -> tuple[Tensor, Tensor | None]:
    """factor * sum_t weight[t] a[t]^T b[t] `[B, N, D, E]` and, where wanted, factor * sum_t fade[t] a[t] `[B, N, D]`, fp32.

    a: `[B, T, N, D]`, b: `[B, T, N, E]`; weight and fade: `[B, T, N]`, fp32, contiguous, or None for ones.
    """
    parts = products_in_parts(a, b, weight, fade, sums)
    rounded = precision_of(a, b) == "tf32"
    return _whole(parts[0], factor, rounded), None if parts[1] is None else _whole(parts[1], factor, False)


def _whole(parts: Tensor, factor: float, rounded: bool) -> Tensor:
    whole = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    numbers = whole.numel()
    sum_parts[(-(-numbers // 1024),)](parts, whole, factor, len(parts), numbers, BLOCK=1024, ROUND=int(rounded))
    return whole


def products_in_parts(
    a: Tensor, b: Tensor, weight: Tensor | None = None, fade: Tensor | None = None, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same as parts `[parts, ...]`, without a factor: for a second pass that does more than to sum them."""
    B, T, N, D = a.shape
    E = b.shape[3]
    unit = common_unit(a, b)

    def run(tiles: Tiles) -> tuple[Tensor, Tensor | None]:
        blocks = -(-D // tiles.left) * -(-E // tiles.right)
        parts, chunk = split(B * N * blocks, T, tiles.T, LEAST_CHUNK)
        products = a.new_empty((parts, B, N, D, E), dtype=torch.float32)
        total = a.new_empty((parts, B, N, D), dtype=torch.float32) if sums else None
        outer_sums[(N * blocks * parts * B,)](
            a, b, weight, fade, products, total, N, T, parts, chunk, B, **common_strides(unit, "btn", a=a, b=b),
            D=D, E=E, BD=tiles.left, BE=tiles.right, BT=tiles.T, UNIT=unit, PRECISION=precision_of(a, b),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return products, total

    wide = torch.promote_types(a.dtype, b.dtype)
    return run(choose("outer_sums", T, D, E, wide, architecture(a), run))


def multiplied(
    x: Tensor, matrix: Tensor, dtype: torch.dtype, transposed: bool = False, added: Tensor | None = None, factor: float = 1.0
) -> Tensor:
    """factor * x[t] times the matrix of its head, plus `added`: `[B, T, N, OUT]` in `dtype`, contiguous.

    x: `[B, T, N, IN]`; matrix: `[B, N, IN, OUT]`, transposed: `[B, N, OUT, IN]`; added: `[B, N, OUT]`; both fp32, contiguous.
    """
    B, T, N, IN = x.shape
    OUT = matrix.shape[2 if transposed else 3]
    unit = common_unit(x)
    out = x.new_empty((B, T, N, OUT), dtype=dtype)
    if out.numel() == 0:
        return out

    def run(tiles: Tiles) -> None:
        count = -(-T // tiles.T)
        times_matrix[(N * -(-OUT // tiles.right) * count * B,)](
            x, matrix, added, out, factor, N, T, count, **common_strides(unit, "btn", x=x),
            IN=IN, OUT=OUT, BI=tiles.left, BO=tiles.right, BT=tiles.T, TRANSPOSED=int(transposed), UNIT=unit,
            PRECISION=precision_of(x), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    run(choose("times_transposed" if transposed else "times_matrix", T, IN, OUT, x.dtype, architecture(x), run))
    return out
