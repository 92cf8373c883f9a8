"""The recurrence in tiles of T tokens by C channels: inside a tile an associative scan, from tile to tile a carried state.

    scan_forward    from the first token to the last       states
    scan_backward   from the last token to the first       du, ddelta, and parts of da and db

A program is BLOCK_C channels of one image. Everything is computed in fp32; there are no atomics: da comes in a part for each
image, db in a part for each block of channels, which the host adds in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = ["L", "C", "blocks"] + [f"{t}_{axis}" for t in "udg" for axis in "bl"]


@triton.jit
def after(fade_0, state_0, fade_1, state_1):
    """Two stretches of tokens as one."""
    return fade_1 * fade_0, fade_1 * state_0 + state_1


@triton.jit
def tile_at(base, tokens, channels, stride, inside):
    """The numbers at `tokens` by `channels` in fp32, zeros where there are none."""
    return tl.load(base + tokens[:, None] * stride + channels[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def scan_forward(
    u, delta, a, b, states, L, C, blocks, u_b, u_l, d_b, d_l,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """states `[B, L, C]`, contiguous, fp32. u, delta: `[B, L, C]` by their strides; a `[C]`, b `[B, L]` contiguous.

    Grid: blocks * B.
    """
    block, image = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channels < C
    rate = tl.load(a + channels, mask=exists, other=0.0).to(tl.float32)
    u += image * u_b
    delta += image * d_b
    b += image * L
    states += image * L * C
    last = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, L, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        inside = (tokens < L)[:, None] & exists[None, :]
        step = tile_at(delta, tokens, channels, d_l, inside)
        enters = tl.load(b + tokens, mask=tokens < L, other=0.0).to(tl.float32)
        added = step * enters[:, None] * tile_at(u, tokens, channels, u_l, inside)
        fade, state = tl.associative_scan((tl.exp(step * rate[None, :]), added), 0, after)
        state += fade * last[None, :]
        tl.store(states + tokens[:, None] * C + channels[None, :], state, mask=inside)
        # a missing token has a step of 0: it keeps the state, so the last row is that of the last token
        last = tl.sum(tl.where((tl.arange(0, BLOCK_T) == BLOCK_T - 1)[:, None], state, 0.0), 0)


@triton.jit(do_not_specialize=_SIZES)
def scan_backward(
    grad, u, delta, a, b, states, du, ddelta, da, db, L, C, blocks, images, g_b, g_l, u_b, u_l, d_b, d_l,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """du, ddelta `[B, L, C]` like u and delta, contiguous; da `[B, C]` and db `[blocks, B, L]`, fp32. Arguments as before.

    grad: that of the states, `[B, L, C]` by its strides. Grid: blocks * B.
    """
    block, image = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channels < C
    rate = tl.load(a + channels, mask=exists, other=0.0).to(tl.float32)
    grad += image * g_b
    u += image * u_b
    delta += image * d_b
    b += image * L
    here = image * L * C
    db += (block * images + image) * L
    first = tl.zeros([BLOCK_C], tl.float32)
    drate = tl.zeros([BLOCK_C], tl.float32)
    tiles = (L + BLOCK_T - 1) // BLOCK_T
    for number in range(0, tiles):
        tokens = (tiles - 1 - number) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (tokens < L)[:, None] & exists[None, :]
        # a state is worth its own gradient and, faded by the step of the next token, what that one's is worth
        following = (tokens + 1 < L)[:, None] & exists[None, :]
        fade = tl.exp(tile_at(delta, tokens + 1, channels, d_l, following) * rate[None, :])
        own = tile_at(grad, tokens, channels, g_l, inside)
        fade, worth = tl.associative_scan((fade, own), 0, after, reverse=True)
        worth += fade * first[None, :]
        first = tl.sum(tl.where((tl.arange(0, BLOCK_T) == 0)[:, None], worth, 0.0), 0)

        step = tile_at(delta, tokens, channels, d_l, inside)
        value = tile_at(u, tokens, channels, u_l, inside)
        enters = tl.load(b + tokens, mask=tokens < L, other=0.0).to(tl.float32)[:, None]
        before = tile_at(states + here, tokens - 1, channels, C, inside & (tokens > 0)[:, None])
        dlog = tl.where(inside, worth * before * tl.exp(step * rate[None, :]), 0.0)
        at = here + tokens[:, None] * C + channels[None, :]
        tl.store(du + at, (worth * enters * step).to(du.dtype.element_ty), mask=inside)
        dstep = dlog * rate[None, :] + worth * enters * value
        tl.store(ddelta + at, dstep.to(ddelta.dtype.element_ty), mask=inside)
        drate += tl.sum(dlog * step, 0)
        tl.store(db + tokens, tl.sum(tl.where(inside, worth * step * value, 0.0), 1), mask=tokens < L)
    tl.store(da + image * C + channels, drate, mask=exists)
