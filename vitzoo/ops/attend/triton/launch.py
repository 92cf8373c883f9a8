"""The launches of a forward and of a backward, from tensors to results; and with which tiles.

The choice looks at shapes, dtype and the GPU's generation, never at how many multiprocessors it has: a call gives the same bits
on every card of a generation.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitzoo.ops._triton.host import (
    architecture,
    common_strides,
    common_unit,
    on_device,
    power,
    precision,
    readable,
    split,
)
from vitzoo.ops.attend.triton import flash
from vitzoo.ops.merge import merge_lse

LEAST_CHUNK = 256
"""Partners that are worth a part of their own."""


class Tiles(NamedTuple):
    """Tokens of a query tile and of a key tile, warps, stages of the software pipeline."""

    BQ: int
    BK: int
    warps: int
    stages: int


# (pass, BLOCK_D, arch, dtype) -> Tiles, where a measurement beats the rule. None was made yet on a GPU.
TUNED: dict[tuple, Tiles] = {}


@functools.lru_cache(1024)
def choose_tiles(name: str, L: int, S: int, D: int, dtype: torch.dtype, arch: int) -> Tiles:
    """64 x 64 tokens where they fit, fewer for long rows, no more than there are."""
    block_d, bits = max(16, power(D)), torch.finfo(dtype).bits
    tuned = TUNED.get((name, block_d, arch, dtype))
    if tuned:
        return tuned
    row = block_d * bits // 16  # 16-bit numbers of a row
    short = row <= 64 and bits == 16
    side = 64 if short else 32 if row <= 256 else 16
    # from sm_100 on a product of 64 rows goes to tcgen05, which doubles the work per thread; 32 rows stay with mma.sync
    own_side = min(side, 32) if arch >= 100 else side
    other_side = side if name == "forward" or not short else 32
    own_tokens, other_tokens = (S, L) if name == "dkv" else (L, S)
    own, partner = max(16, min(own_side, power(own_tokens))), max(16, min(other_side, power(other_tokens)))
    warps = 2 if own <= 32 and short else 4 if row <= 256 else 8
    stages = 2 if row <= 128 else 1
    return Tiles(partner, own, warps, stages) if name == "dkv" else Tiles(own, partner, warps, stages)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out `[B, L, N, D]` and lse `[B, L, N]`; arguments as those of `attend`, already validated and supported."""
    B, L, N, D = q.shape
    S = k.shape[1]
    tiles = choose_tiles("forward", L, S, D, q.dtype, architecture(q))
    count = -(-L // tiles.BQ)
    parts, chunk = split(B * N * count, S, tiles.BK, LEAST_CHUNK)
    out = torch.empty((parts, B, L, N, D), dtype=q.dtype if parts == 1 else torch.float32, device=q.device)
    lse = torch.empty((parts, B, L, N), dtype=torch.float32, device=q.device)
    if q.numel():
        with on_device(q):
            flash.flash_forward[(N * count * parts * B,)](
                q, k, v, bias, _sizes(key_bias), out, lse, **_shared(scale, q, k, v, bias, key_bias, tiles),
                tiles=count, splits=parts, chunk=chunk, images=B,
            )  # fmt: skip
    if parts == 1:
        return out[0], lse[0]
    merged = merge_lse(list(out.unbind(0)), list(lse.unbind(0)))
    return merged.to(q.dtype), torch.logsumexp(lse, 0)


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv like q, k, v, contiguous; dbias and dkey_bias in the shape of theirs, None where there is none.

    grad_out, grad_lse: gradients of out and lse, either may be None. The same call gives the same bits every time.
    """
    B, L, N, D = q.shape
    S = k.shape[1]
    arch = architecture(q)
    if not q.numel() or not S:
        like = (None if t is None else torch.zeros(t.shape, dtype=t.dtype, device=q.device) for t in (bias, key_bias))
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), *like
    grad = readable(grad_out, out)
    dlse = None if grad_lse is None else grad_lse.float().contiguous()
    sizes = _sizes(key_bias)
    delta = torch.empty_like(lse)

    def empty(parts: int, tokens: int) -> Tensor:
        return torch.empty((parts, B, tokens, N, D), dtype=q.dtype if parts == 1 else torch.float32, device=q.device)

    def whole(part: Tensor) -> Tensor:
        return part[0] if len(part) == 1 else part.sum(0).to(q.dtype)

    with on_device(q):
        tiles = choose_tiles("dq", L, S, D, q.dtype, arch)
        count = -(-L // tiles.BQ)
        parts, chunk = split(B * N * count, S, tiles.BK, LEAST_CHUNK)
        dq = empty(parts, L)
        flash.flash_dq[(N * count * parts * B,)](
            q, k, v, bias, sizes, out, lse, grad, dlse, delta, dq, **_shared(scale, q, k, v, bias, key_bias, tiles, grad),
            tiles=count, splits=parts, chunk=chunk, images=B,
        )  # fmt: skip
        tiles = choose_tiles("dkv", L, S, D, q.dtype, arch)
        count = -(-S // tiles.BK)
        parts, chunk = split(B * N * count, L, tiles.BQ, LEAST_CHUNK)
        dk, dv = empty(parts, S), empty(parts, S)
        dkey = None if key_bias is None else torch.empty((parts, B, S, N), dtype=torch.float32, device=q.device)
        flash.flash_dkv[(N * count * parts * B,)](
            q, k, v, bias, sizes, lse, grad, delta, dk, dv, dkey, **_shared(scale, q, k, v, bias, key_bias, tiles, grad),
            tiles=count, splits=parts, chunk=chunk, images=B,
        )  # fmt: skip
        dbias = None if bias is None else _bias_gradient(q, k, v, bias, key_bias, lse, grad, delta, scale)
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
    tiles = choose_tiles("dbias", L, S, D, q.dtype, architecture(q))
    count, key_tiles = -(-L // tiles.BQ), -(-S // tiles.BK)
    images, heads = (B if four.shape[0] == 1 else 1), (N if four.shape[1] == 1 else 1)
    flash.flash_dbias[(key_tiles * count * (N // heads) * (B // images),)](
        q, k, v, bias, _sizes(key_bias), lse, grad, delta, dbias, **_shared(scale, q, k, v, bias, key_bias, tiles, grad),
        tiles=count, key_tiles=key_tiles, images_each=images, heads_each=heads,
        to_b=dbias.stride(0) if four.shape[0] > 1 else 0, to_n=dbias.stride(1) if four.shape[1] > 1 else 0,
    )  # fmt: skip
    return dbias.view(bias.shape).to(bias.dtype)


def _sizes(key_bias: Tensor | None) -> Tensor | None:
    return None if key_bias is None else key_bias.contiguous()


def _shared(
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
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
    if bias is not None:
        four = bias[(None,) * (4 - bias.ndim)]
        steps = tuple(0 if n == 1 else four.stride(dim) for dim, n in enumerate(four.shape))  # type: ignore[assignment]
    values |= {f"bias_{axis}": step for axis, step in zip("bnls", steps, strict=True)}
    return values | {"key_b": 0 if key_bias is None else key_bias.shape[1]}
