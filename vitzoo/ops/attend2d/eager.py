"""attend2d on concrete sizes: the map falls into regions of equal tiles, each region is one batched attention.

A region is a pair of segments, one per axis (`segments.py`). Strided views find its tiles, so there is no roll, no
partition copy beyond the one that lines up a tile's tokens, and no mask but the few shapes of a region's cut, broadcast over
its tiles. A shifted window makes nine regions (head, interior, tail of each axis), a neighborhood too.

Letters: G tiles of a region over the whole batch, L queries and E keys of a tile, N heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops.attend2d.segments import Segment, segments
from vitzoo.patterns import Pattern

Region = tuple[Segment, Segment]


def attend2d(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """out `[B, H, W, N, D]`, and lse `[B, H, W, N]` where it is asked for."""
    if q.numel() == 0:
        return _empty(q, k, v, bias, return_lse)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias))
    if needs_grad:
        return _Attend2d.apply(q, k, v, bias, pattern, scale, return_lse)
    if return_lse or _prefers_products(pattern, q):
        out, lse, _ = _forward(q, k, v, bias, pattern, scale, return_lse, keep=False)
        return out, lse
    return _fused_forward(q, k, v, bias, pattern, scale), None


def _prefers_products(pattern: Pattern, q: Tensor) -> bool:
    """Whether two batched products and a softmax beat PyTorch's fused attention, which uses a second core badly.

    So they do on several threads of a CPU for tiles of the size of Swin's windows, measured for 49 queries and keys: 9.2
    against 12.9 ms for 1536 of them on two threads, 19.1 against 17.5 on one. Their scores have to be of a size that the
    allocator reuses.
    """
    if q.device.type != "cpu" or q.dtype != torch.float32 or torch.get_num_threads() == 1:
        return False
    scores = 0
    for rows, cols in regions(pattern, q):
        queries, keys = rows.tile * cols.tile, rows.extent * cols.extent
        if max(queries, keys) > 64:
            return False
        scores += rows.residues * rows.tiles * cols.residues * cols.tiles * queries * keys
    return 4 * q.shape[0] * q.shape[3] * scores <= 8 * 2**20


def _empty(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Nothing in, nothing out, and gradients of zero."""
    out = q * k * v if bias is None else q * k * v * bias.sum().to(q.dtype)
    return out, out.sum(-1, dtype=torch.promote_types(q.dtype, torch.float32)) if return_lse else None


def _fused_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pattern: Pattern, scale: float) -> Tensor:
    """The output alone, each region by PyTorch's fused attention."""
    out, packed = q.new_empty(q.shape), _packed(q, k, v)
    for region in regions(pattern, q):
        if packed is not None and queries_are_keys(region):
            tiles = tokens(packed, region, "key").unflatten(2, (3, q.shape[3])).unbind(2)
        else:
            tiles = (tokens(q, region, "query"), tokens(k, region, "key"), tokens(v, region, "key"))
        mask = score_bias(bias, region, q)
        query, key, value = (t.transpose(1, 2) for t in tiles)
        part = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        target = view(out, region, "query")
        target.copy_(part.transpose(1, 2).view(target.shape))
    return out


def _packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """q, k, v as one view `[B, H, W, 3 * N, D]` where they follow each other in one projection: one copy lines up all three."""
    N, D = q.shape[3:]
    together = q.stride() == k.stride() == v.stride() and q.stride()[3:] == (D, 1)
    together = together and q.device.type == "cpu" and q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    bytes_apart = (k.data_ptr() - q.data_ptr(), v.data_ptr() - k.data_ptr()) if together else ()
    if bytes_apart != (N * D * q.element_size(),) * 2:
        return None
    return q.as_strided((*q.shape[:3], 3 * N, D), q.stride(), q.storage_offset())


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pattern: Pattern, scale: float, return_lse: bool, keep: bool
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Output, lse where asked for, and if `keep` what each region's gradient needs, by batched products.

    Kept are the softmax `[G * N, L, E]` and, where they take no more room than q, k and v, the tiles of these.
    """
    out, kept, tiles_kept = q.new_empty(q.shape), [], keep and tiles_are_enough(pattern, q)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(q.shape[:-1], dtype=wide) if return_lse else None
    for region in regions(pattern, q):
        query, key, value = heads(q, region, "query"), heads(k, region, "key"), heads(v, region, "key")
        scores = torch.baddbmm(query.new_empty(1), query, key.transpose(1, 2), beta=0, alpha=scale)
        mask = score_bias(bias, region, q)
        if mask is not None:
            scores.view(-1, q.shape[3], *mask.shape[2:]).add_(mask)
        softmax = torch.softmax(scores, -1)
        target = view(out, region, "query", by_head=True)
        target.copy_(torch.bmm(softmax, value).view(target.shape))
        if lse is not None:
            target = view(lse[..., None], region, "query", by_head=True)
            target.copy_(torch.logsumexp(scores.to(wide), -1).view(target.shape))
        if keep:
            kept += [softmax, query, key, value] if tiles_kept else [softmax]
    return out, lse, kept


class _Attend2d(torch.autograd.Function):
    """Keeps the softmax of each region, as PyTorch's own graph would, and q, k, v once: not copy after copy."""

    @staticmethod
    def forward(ctx, q, k, v, bias, pattern, scale, return_lse):
        out, lse, kept = _forward(q, k, v, bias, pattern, scale, return_lse, keep=True)
        tiles_kept = tiles_are_enough(pattern, q)
        ctx.save_for_backward(bias, *(() if tiles_kept else (q, k, v)), *kept)
        ctx.tiles_kept, ctx.pattern, ctx.scale = tiles_kept, pattern, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * 7
        with torch.autocast((dlse if dout is None else dout).device.type, enabled=False):
            return *_backward(ctx, dout, dlse), None, None, None


def _backward(ctx, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients from the kept softmax P: dS = P (dP - rowsum(dP P) + dlse), then one product each."""
    bias, *kept = ctx.saved_tensors
    maps: Any = (None, None, None) if ctx.tiles_kept else [kept.pop(0) for _ in range(3)]
    q, k, v = maps
    if dout is not None:
        shape = dout.shape
    elif dlse is not None:  # one of the two is there, or nobody would ask
        shape = dlse.shape + kept[-1].shape[-1:] if ctx.tiles_kept else q.shape
    dlse = None if dlse is None else dlse[..., None]
    dq, dk, dv = (kept[0].new_empty(shape) for _ in range(3))
    dbias = None
    if ctx.needs_input_grad[3]:
        dbias = torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))
    if not ctx.tiles_kept:
        dk.zero_(), dv.zero_()
    for region in regions(ctx.pattern, dq):
        softmax = kept.pop(0)
        if ctx.tiles_kept:
            query, key, value = (kept.pop(0) for _ in range(3))
        else:
            query, key, value = heads(q, region, "query"), heads(k, region, "key"), heads(v, region, "key")
        if dout is None:
            dvalue, dscore = torch.zeros_like(value), torch.zeros_like(softmax)
        else:
            dtile = heads(dout, region, "query")
            dvalue, dprob = torch.bmm(softmax.transpose(1, 2), dtile), torch.bmm(dtile, value.transpose(1, 2))
            dscore = torch.ops.aten._softmax_backward_data(dprob, softmax, -1, softmax.dtype)
        if dlse is not None:
            dscore = dscore + softmax * heads(dlse, region, "query").to(softmax.dtype)
        nothing = query.new_empty(1)
        target = view(dq, region, "query", by_head=True)
        target.copy_(torch.baddbmm(nothing, dscore, key, beta=0, alpha=ctx.scale).view(target.shape))
        dkey = torch.baddbmm(nothing, dscore.transpose(1, 2), query, beta=0, alpha=ctx.scale)
        scatter(dk, dkey, region, overlap=not ctx.tiles_kept)
        scatter(dv, dvalue, region, overlap=not ctx.tiles_kept)
        if dbias is not None:
            dbias += table_gradient(dscore, region, dbias)
    return dq, dk, dv, None if dbias is None else dbias.to(bias.dtype)


# Where a region's tiles lie.


def regions(pattern: Pattern, x: Tensor) -> list[Region]:
    """The regions of a map `[B, H, W, ...]`: all pairs of a row segment and a column segment."""
    H, W = x.shape[1:3]
    resolved = pattern.resolve(H, W)
    return [(rows, cols) for rows in segments(resolved.rows, H) for cols in segments(resolved.cols, W)]


def queries_are_keys(region: Region) -> bool:
    """Whether the tiles of a region see exactly themselves."""
    return all(s.query == s.key and s.tile == s.extent for s in region)


def tiles_are_enough(pattern: Pattern, x: Tensor) -> bool:
    """Whether every token is in exactly one tile, as query and as key, so that the tiles take no more room than the maps."""
    return all(queries_are_keys(region) for region in regions(pattern, x))


def view(x: Tensor, region: Region, side: str, by_head: bool = False) -> Tensor:
    """A region's tiles as a view of x `[B, H, W, N, D]`.

    `[B, residues, tiles, residues, tiles, rows, cols, N, D]`, or with `by_head` `[..., N, rows, cols, D]`. Key tiles overlap
    where the pattern's runs do.
    """
    B, H, W, N, D = x.shape
    batch, *axes, head, channel = x.stride()
    outer, inner, start = [], [], x.storage_offset()
    for s, stride in zip(region, axes, strict=True):
        first, count = (s.query, s.tile) if side == "query" else (s.key, s.extent)
        start += (s.residue + first * s.step) * stride
        outer += [(s.residues, stride), (s.tiles, s.tile * s.step * stride)]
        inner += [(count, s.step * stride)]
    tail = [(N, head), *inner] if by_head else [*inner, (N, head)]
    size, strides = zip((B, batch), *outer, *tail, (D, channel), strict=True)
    return x.as_strided(size, strides, start)


def tokens(x: Tensor, region: Region, side: str) -> Tensor:
    """A region's tiles as `[G, L or E, N, D]`."""
    tiles = view(x, region, side)
    *outer, rows, cols, N, D = tiles.shape
    return tiles.reshape(_product(outer), rows * cols, N, D)


def heads(x: Tensor, region: Region, side: str) -> Tensor:
    """A region's tiles as `[G * N, L or E, D]`."""
    tiles = view(x, region, side, by_head=True)
    *outer, rows, cols, D = tiles.shape
    return tiles.reshape(_product(outer), rows * cols, D)


def _product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def scatter(grad: Tensor, tiles: Tensor, region: Region, overlap: bool) -> None:
    """Add key tiles `[G * N, E, D]` into grad `[B, H, W, N, D]`; where tiles do not overlap, write them."""
    tiles = tiles.view(view(grad, region, "key", by_head=True).shape)
    if not overlap:
        view(grad, region, "key", by_head=True).copy_(tiles)
        return
    rows, cols = region
    for y in range(0, rows.extent, rows.tile):  # pieces no larger than the way to the next tile do not overlap
        for x in range(0, cols.extent, cols.tile):
            height, width = min(rows.tile, rows.extent - y), min(cols.tile, cols.extent - x)
            piece = (
                rows._replace(key=rows.key + y, extent=height),
                cols._replace(key=cols.key + x, extent=width),
            )
            view(grad, piece, "key", by_head=True).add_(tiles[..., y : y + height, x : x + width, :])


# What is added to a region's scores.


def score_bias(bias: Tensor | None, region: Region, q: Tensor) -> Tensor | None:
    """Bias, and -inf at the cuts, `[1, N or 1, L, E]` in the dtype of q; None where nothing is added."""
    rows, cols = region
    masked = rows.masked or cols.masked
    if bias is None and not masked:
        return None
    added = q.new_zeros((1, 1, 1, 1, 1))
    if bias is not None:
        added = tile_bias(bias.to(q.dtype), region)
    if masked:
        sees_y, sees_x = (sees(s, q.device) for s in region)
        seen = sees_y[:, None, :, None] & sees_x[None, :, None, :]
        added = torch.where(seen, added, -torch.inf)
    return added.reshape(1, -1, rows.tile * cols.tile, rows.extent * cols.extent)


def tile_bias(table: Tensor, region: Region) -> Tensor:
    """The bias `[N, rows, cols, key rows, key cols]` of a tile, from the table `[N, Ey, Ex]`.

    With the queries counted backwards the entry of a pair is where query plus key says: a view, and one copy turns it round.
    Where cut pairs lie beyond the reach, entries are gathered instead.
    """
    starts = [s.offset + entries // 2 - (s.tile - 1) for s, entries in zip(region, table.shape[1:], strict=True)]
    stops = [start + s.tile + s.extent - 1 for start, s in zip(starts, region, strict=True)]
    if min(starts) < 0 or stops[0] > table.shape[1] or stops[1] > table.shape[2]:
        dy, dx = (offsets(s, entries, table.device) for s, entries in zip(region, table.shape[1:], strict=True))
        return table[:, dy[:, None, :, None], dx[None, :, None, :]]
    head, y, x = table.stride()
    rows, cols = region
    size, stride = (table.shape[0], rows.tile, cols.tile, rows.extent, cols.extent), (head, y, x, y, x)
    return table.as_strided(size, stride, table.storage_offset() + starts[0] * y + starts[1] * x).flip(1, 2)


def offsets(s: Segment, entries: int, device: torch.device) -> Tensor:
    """Row (or column) of the bias table for each (query, key) of a tile; pairs beyond the reach, all cut, are clamped."""
    distance = torch.arange(s.extent, device=device) - torch.arange(s.tile, device=device)[:, None] + s.offset
    return (distance + entries // 2).clamp(0, entries - 1)


def sees(s: Segment, device: torch.device) -> Tensor:
    """Which (query, key) of a tile are allowed."""
    lo, hi = torch.tensor((s.lo, s.hi), device=device)[..., None]
    key = torch.arange(s.extent, device=device)
    return (lo <= key) & (key < hi)


def table_gradient(dscore: Tensor, region: Region, table: Tensor) -> Tensor:
    """Sum of dscore `[G * N, L, E]` over all pairs of one offset: the bias table's gradient `[N, Ey, Ex]`.

    Two products with one-hot matrices, one per axis, so that the sum has a fixed order on every device.
    """
    rows, cols = region
    N, Ey, Ex = table.shape
    total = dscore.view(-1, N, rows.tile * cols.tile * rows.extent * cols.extent).sum(0, dtype=table.dtype)
    total = total.view(N, rows.tile, cols.tile, rows.extent, cols.extent).transpose(2, 3)
    by_y, by_x = (
        F.one_hot(offsets(s, size, table.device).flatten(), size).to(table.dtype) for s, size in ((rows, Ey), (cols, Ex))
    )
    return by_y.T @ total.reshape(N, rows.tile * rows.extent, cols.tile * cols.extent) @ by_x
