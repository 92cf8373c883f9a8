"""The launches of a forward and of a backward, from tensors to results; and with which tiles.

The choice looks at shapes, dtype and the GPU's generation, never at how many multiprocessors it has: a call gives the same bits
on every card of a generation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitzoo.ops._triton import tuning
from vitzoo.ops._triton.host import (
    ENOUGH_PROGRAMS,
    Tiles,
    architecture,
    common_strides,
    common_unit,
    flash_tiles,
    on_device,
    power,
    precision,
    readable,
    split,
)
from vitzoo.ops.attend.point_bias import PointBias
from vitzoo.ops.attend.triton import flash, table
from vitzoo.ops.merge import merge_lse

LEAST_CHUNK = 256
"""Partners that are worth a part of their own."""
TABLE_SIDE = 64
"""A larger table's gradient is summed in blocks of this side."""
PARTIALS = 1 << 22
"""Numbers that the parts of a table's gradient may take."""


def choose_tiles(name: str, q: Tensor, k: Tensor, bias: Any, key_bias: Tensor | None, run: Callable[[Tiles], object]) -> Tiles:
    """The tiles of a pass, which `run` launches: the rule's, or what is known or measured to be faster."""
    (_, L, _, D), S, at_points, arch = q.shape, k.shape[1], isinstance(bias, PointBias), architecture(q)
    usual = flash_tiles(name, L, S, D, q.dtype, arch, at_points)
    biases = "points" if at_points else "none" if bias is None else "bias"
    lengths = (max(16, min(64, power(n))) for n in (L, S))  # a rule looks no further
    key = ("attend", name, *lengths, max(16, power(D)), arch, q.dtype, biases, "keys" if key_bias is not None else "none")

    def others() -> list[Tiles]:
        own, partner = ("BK", "BQ") if name == "dkv" else ("BQ", "BK")
        tokens, partners = getattr(usual, own), getattr(usual, partner)
        found = [usual._replace(stages=3 - usual.stages)]
        if tokens > 16:
            found.append(usual._replace(**{own: tokens // 2}, warps=max(1, usual.warps // 2)))
        if tokens < min(128, power(S if name == "dkv" else L)):
            found.append(usual._replace(**{own: 2 * tokens}, warps=min(8, 2 * usual.warps)))
        if partners < min(64, power(L if name == "dkv" else S)):
            found.append(usual._replace(**{partner: 2 * partners}))
        return found

    return tuning.choose(key, usual, others, run)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | PointBias | None, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out `[B, L, N, D]` and lse `[B, L, N]`; arguments as those of `attend`, already validated and supported."""
    B, L, N, D = q.shape
    S = k.shape[1]

    def run(tiles: Tiles) -> tuple[Tensor, Tensor]:
        count = -(-L // tiles.BQ)
        parts, chunk = split(B * N * count, S, tiles.BK, LEAST_CHUNK)
        out = torch.empty((parts, B, L, N, D), dtype=q.dtype if parts == 1 else torch.float32, device=q.device)
        lse = torch.empty((parts, B, L, N), dtype=torch.float32, device=q.device)
        if q.numel():
            flash.flash_forward[(N * count * parts * B,)](
                q, k, v, _pairs(bias), _sizes(key_bias), out, lse, **_shared(scale, q, k, v, bias, key_bias, tiles),
                tiles=count, splits=parts, chunk=chunk, images=B,
            )  # fmt: skip
        return out, lse

    with on_device(q):
        out, lse = run(choose_tiles("forward", q, k, bias, key_bias, run))
    if len(out) == 1:
        return out[0], lse[0]
    merged = merge_lse(list(out.unbind(0)), list(lse.unbind(0)))
    return merged.to(q.dtype), torch.logsumexp(lse, 0)


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | PointBias | None,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | tuple[Tensor, Tensor] | None, Tensor | None]:
    """dq, dk, dv like q, k, v, contiguous; dbias and dkey_bias in the shape of theirs, None where there is none.

    A PointBias has two gradients, that of its table and that of its points.
    grad_out, grad_lse: gradients of out and lse, either may be None. The same call gives the same bits every time.
    """
    B, L, N, D = q.shape
    S, at_points = k.shape[1], isinstance(bias, PointBias)
    if not q.numel() or not S:
        zeros = [None if t is None else t.new_zeros(t.shape) for t in (*(bias[:2] if at_points else [bias]), key_bias)]
        dbias = tuple(zeros[:2]) if at_points else zeros[0]
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dbias, zeros[-1]
    grad = readable(grad_out, out)
    dlse = None if grad_lse is None else grad_lse.float().contiguous()
    sizes = _sizes(key_bias)
    delta = torch.empty_like(lse)

    def empty(parts: int, tokens: int) -> Tensor:
        return torch.empty((parts, B, tokens, N, D), dtype=q.dtype if parts == 1 else torch.float32, device=q.device)

    def whole(part: Tensor) -> Tensor:
        return part[0] if len(part) == 1 else part.sum(0).to(q.dtype)

    def by_queries(tiles: Tiles) -> Tensor:
        count = -(-L // tiles.BQ)
        parts, chunk = split(B * N * count, S, tiles.BK, LEAST_CHUNK)
        dq = empty(parts, L)
        flash.flash_dq[(N * count * parts * B,)](
            q, k, v, _pairs(bias), sizes, out, lse, grad, dlse, delta, dq,
            **_shared(scale, q, k, v, bias, key_bias, tiles, grad), tiles=count, splits=parts, chunk=chunk, images=B,
        )  # fmt: skip
        return dq

    def by_keys(tiles: Tiles) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        count = -(-S // tiles.BK)
        parts, chunk = split(B * N * count, L, tiles.BQ, LEAST_CHUNK)
        dk, dv = empty(parts, S), empty(parts, S)
        dkey = None if key_bias is None else torch.empty((parts, B, S, N), dtype=torch.float32, device=q.device)
        shares = None  # of every head in the gradient of its group's points
        if at_points:
            shares = torch.empty((parts, B, S, N, 2), dtype=torch.float32, device=q.device)
        flash.flash_dkv[(N * count * parts * B,)](
            q, k, v, _pairs(bias), sizes, lse, grad, delta, dk, dv, dkey,
            **_shared(scale, q, k, v, bias, key_bias, tiles, grad), tiles=count, splits=parts, chunk=chunk, images=B,
            **({} if shares is None else {"dpoints": shares}),
        )  # fmt: skip
        return dk, dv, dkey, shares

    with on_device(q):
        dq = by_queries(choose_tiles("dq", q, k, bias, key_bias, by_queries))
        dk, dv, dkey, shares = by_keys(choose_tiles("dkv", q, k, bias, key_bias, by_keys))
        dbias = None
        if shares is not None:
            dtable = _table_gradient(q, k, v, bias, key_bias, lse, grad, delta, scale)
            dbias = dtable, shares.sum(0).unflatten(2, (bias.points.shape[2], -1)).sum(3).to(bias.points.dtype)
        elif bias is not None:
            dbias = _bias_gradient(q, k, v, bias, key_bias, lse, grad, delta, scale)
    dkey_bias = None if key_bias is None or dkey is None else dkey.sum((0, 3)).to(key_bias.dtype)
    return whole(dq), whole(dk), whole(dv), dbias, dkey_bias


def _bias_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    key_bias: Tensor | None,
    lse: Tensor,
    grad: Tensor,
    delta: Tensor,
    scale: float,
) -> Tensor:
    B, L, N, D = q.shape
    S = k.shape[1]
    four = bias[(None,) * (4 - bias.ndim)]
    dbias = torch.empty((four.shape[0], four.shape[1], L, S), dtype=torch.float32, device=q.device)
    images, heads = (B if four.shape[0] == 1 else 1), (N if four.shape[1] == 1 else 1)

    def run(tiles: Tiles) -> None:
        count, key_tiles = -(-L // tiles.BQ), -(-S // tiles.BK)
        flash.flash_dbias[(key_tiles * count * (N // heads) * (B // images),)](
            q, k, v, bias, _sizes(key_bias), lse, grad, delta, dbias, **_shared(scale, q, k, v, bias, key_bias, tiles, grad),
            tiles=count, key_tiles=key_tiles, images_each=images, heads_each=heads,
            to_b=dbias.stride(0) if four.shape[0] > 1 else 0, to_n=dbias.stride(1) if four.shape[1] > 1 else 0,
        )  # fmt: skip

    run(choose_tiles("dbias", q, k, bias, key_bias, run))
    return dbias.view(bias.shape).to(bias.dtype)


def _table_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: PointBias,
    key_bias: Tensor | None,
    lse: Tensor,
    grad: Tensor,
    delta: Tensor,
    scale: float,
) -> Tensor:
    B, _, N, _ = q.shape
    _, rows, cols = bias.table.shape
    sides = tuple(max(16, min(TABLE_SIDE, power(n))) for n in (rows, cols))
    blocks_y, blocks_x = (-(-n // side) for n, side in zip((rows, cols), sides, strict=True))
    pairs = B * k.shape[1]
    programs = min(2 * ENOUGH_PROGRAMS // (N * blocks_y * blocks_x), PARTIALS // (N * rows * cols), pairs)
    chunk = -(-pairs // max(1, programs))
    parts = torch.empty((-(-pairs // chunk), N, rows, cols), dtype=torch.float32, device=q.device)
    shared = _shared(scale, q, k, v, bias, key_bias, Tiles(0, 0, 4, 1), grad)
    shared = {name: value for name, value in shared.items() if name not in ("BQ", "BK", "bias_b", "bias_n", "bias_l", "bias_s")}
    table.flash_dtable[(N * blocks_y * blocks_x * len(parts),)](
        q, k, v, _sizes(key_bias), lse, grad, delta, parts, **shared, pairs=pairs, chunk=chunk,
        blocks=blocks_y * blocks_x, blocks_x=blocks_x, QY=16, QX=16, TY=sides[0], TX=sides[1],
    )  # fmt: skip
    return parts.sum(0).to(bias.table.dtype)


def _pairs(bias: Tensor | PointBias | None) -> Tensor | None:
    return None if isinstance(bias, PointBias) else bias


def _sizes(key_bias: Tensor | None) -> Tensor | None:
    return None if key_bias is None else key_bias.contiguous()


def _shared(
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | PointBias | None,
    key_bias: Tensor | None,
    tiles: Tiles,
    grad: Tensor | None = None,
) -> dict[str, Any]:
    """What all kernels are told of a call, by parameter name."""
    tensors = {"q": q, "k": k, "v": v, **({} if grad is None else {"g": grad})}
    unit = common_unit(*tensors.values())
    values: dict[str, Any] = {"scale": scale, "heads": q.shape[2], "L": q.shape[1], "S": k.shape[1], "D": q.shape[3]}
    values |= {"BLOCK_D": max(16, power(q.shape[3])), "UNIT": unit, "PRECISION": precision(q.dtype)}
    values |= {"BQ": tiles.BQ, "BK": tiles.BK, "num_warps": tiles.warps, "num_stages": tiles.stages}
    values |= common_strides(unit, "bln", **tensors)
    steps = (0, 0, 0, 0)
    if isinstance(bias, PointBias):
        places = (t.float().contiguous() for t in bias[1:])
        values |= {"table": bias.table.contiguous(), **dict(zip(("points", "row_at", "col_at"), places, strict=True))}
        values |= {"table_height": bias.table.shape[1], "table_width": bias.table.shape[2], "map_width": len(bias.cols)}
        values |= {"heads_each": q.shape[2] // bias.points.shape[2]}
    elif bias is not None:
        four = bias[(None,) * (4 - bias.ndim)]
        steps = tuple(0 if n == 1 else four.stride(dim) for dim, n in enumerate(four.shape))  # type: ignore[assignment]
    values |= {f"bias_{axis}": step for axis, step in zip("bnls", steps, strict=True)}
    return values | {"key_b": 0 if key_bias is None else key_bias.shape[1]}
