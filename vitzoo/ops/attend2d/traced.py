"""attend2d for captured graphs: one graph for all sizes, under torch.compile, torch.export and ONNX.

Every axis is covered with tiles of constant size whose number alone depends on the map; the keys of a tile are a rectangle of
constant size too. Tokens are gathered by indices made from arange, and gathered back, so that sizes need to divide nothing.
The idioms keep H and W symbolic, and each was paid for: sizes are sums and floor divisions of H and W and never `-H % w`; no
roll; a tile that is never read where a number of tiles could be 1, since PyTorch specialises a size of 1; the shift that an
axis covered by one window loses is `shift * (1 - 1 // windows)`, not a branch.

Letters: P, Q tiles along the rows and columns, T, S queries and E, F keys of a tile, N heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops._softmax import settled
from vitzoo.patterns import Pattern, Span, everywhere


class Axis(NamedTuple):
    """The tiles of one axis of n coordinates, as index tensors."""

    query: Tensor  # [P, T] coordinate of each query; some coordinate of the map where a tile leaves it
    key: Tensor  # [P, E] likewise
    seen: Tensor | None  # [P, T, E] which pairs count, [P, 1, E] where a tile is a run; None: all
    offset: Tensor  # [P or 1, T, E] key position minus query position
    tile: Tensor  # [n] the tile in which a coordinate is a query
    place: Tensor  # [n] and its place there
    whole: bool = False  # whether a tile is a whole residue class, and so of symbolic size
    run: bool = False  # whether all queries of a tile see the same keys


def attend2d(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """out `[B, H, W, N, D]`, and lse `[B, H, W, N]` where it is asked for."""
    B, H, W, N, D = q.shape
    rows, cols = axis(pattern.rows, H, q.device), axis(pattern.cols, W, q.device)
    if rows.whole != cols.whole:
        return _stripes(q, k, v, rows, cols, bias, scale, return_lse)
    mask = score_bias(bias, rows, cols, N, q.dtype)
    if pattern == everywhere:
        query, key, value = (x.reshape(B, H * W, N, D).transpose(1, 2) for x in (q, k, v))
    else:
        query, key, value = gather(q, rows, cols, "query"), gather(k, rows, cols, "key"), gather(v, rows, cols, "key")
    out, lse = _softmax(query, key, value, mask, scale, return_lse)
    if pattern == everywhere:
        out = settled(out.transpose(1, 2)).reshape(B, H, W, N, D)
        return out, None if lse is None else lse.transpose(1, 2).reshape(B, H, W, N)
    return gather_back(out, rows, cols, N), None if lse is None else gather_back(lse[..., None], rows, cols, N)[..., 0]


def _softmax(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention among the tokens of each tile, and its log-sum-exp where it is asked for."""
    if not return_lse:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale), None
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = ((query * scale) @ key.transpose(-2, -1)).to(wide)
    scores = scores if mask is None else scores + mask
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - lse[..., None]).to(query.dtype) @ value, lse


def _stripes(
    q: Tensor, k: Tensor, v: Tensor, rows: Axis, cols: Axis, bias: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The same where one axis is seen whole, so that a tile has a symbolic side and the other axis a symbolic number of them.

    No dimension is merged or split, which would divide products of sizes by sizes and narrow the graph: every tensor is
    gathered in the shape that it is used in, by lists of tiles and of tokens that are ordered so that only the constant one
    of their two factors divides.
    """
    N = q.shape[3]
    tile = torch.arange(N * rows.query.shape[0] * cols.query.shape[0], device=q.device)
    n, (p, r) = tile % N, _both(tile // N, rows.query.shape[0], cols.query.shape[0], rows.whole)
    (T, S), (E, F_) = (rows.query.shape[1], cols.query.shape[1]), (rows.key.shape[1], cols.key.shape[1])
    (t, s), (e, f) = (_both(torch.arange(a * b, device=q.device), a, b, cols.whole) for a, b in ((T, S), (E, F_)))

    seen_y, seen_x, head = rows.key[p][:, e], cols.key[r][:, f], n[:, None]
    query, key, value = (
        q[:, rows.query[p][:, t], cols.query[r][:, s], head],
        k[:, seen_y, seen_x, head],
        v[:, seen_y, seen_x, head],
    )
    mask = None
    if bias is not None or rows.seen is not None or cols.seen is not None:
        mask = torch.zeros((1, 1, 1), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if bias is not None:
        dy, dx = (
            (each.offset.expand(each.query.shape[0], -1, -1) + size // 2).clamp(0, size - 1)
            for each, size in ((rows, bias.shape[1]), (cols, bias.shape[2]))
        )
        mask = bias.to(mask)[n[:, None, None], dy[p][:, t][:, :, e], dx[r][:, s][:, :, f]]
    for each, number, place, slot in ((rows, p, t, e), (cols, r, s, f)):
        if each.seen is not None:
            seen = each.seen[number] if each.run else each.seen[number][:, place]
            mask = torch.where(seen[:, :, slot], mask, -torch.inf)
    mask = None if mask is None else mask[None].to(q.dtype)
    out, lse = _softmax(query, key, value, mask, scale, return_lse)

    where = _number(rows.tile[:, None], cols.tile, rows.query.shape[0], cols.query.shape[0], rows.whole)[..., None] * N
    where = where + torch.arange(N, device=q.device)
    place = _number(rows.place[:, None], cols.place, T, S, cols.whole)[..., None]
    return out[:, where, place], None if lse is None else lse[:, where, place]


def _both(number: Tensor, first: int, second: int, by_first: bool) -> tuple[Tensor, Tensor]:
    """The two indices, below ``first`` and ``second``, that ``number`` stands for."""
    return (number % first, number // first) if by_first else (number // second, number % second)


def _number(a: Tensor, b: Tensor, first: int, second: int, by_first: bool) -> Tensor:
    """Undoes ``_both``."""
    return a + b * first if by_first else a * second + b


def gather(x: Tensor, rows: Axis, cols: Axis, side: str) -> Tensor:
    """Tiles `[B, N * P * Q, T * S, D]` of x `[B, H, W, N, D]`: those of its queries, or of its keys."""
    B, _, _, N, D = x.shape
    y, u = (rows.query, cols.query) if side == "query" else (rows.key, cols.key)
    (P, T), (Q, S) = y.shape, u.shape
    tiles = x.permute(0, 3, 1, 2, 4)[:, :, y[:, None, :, None], u[None, :, None, :]]
    return tiles.reshape(B, N * P * Q, T * S, D)


def gather_back(tiles: Tensor, rows: Axis, cols: Axis, N: int) -> Tensor:
    """The map `[B, H, W, N, D]` from tiles `[B, N * P * Q, T * S, D]`."""
    B, _, _, D = tiles.shape
    (P, T), (Q, S) = rows.query.shape, cols.query.shape
    tiles = tiles.reshape(B, N, P, Q, T, S, D)
    found = tiles[:, :, rows.tile[:, None], cols.tile[None], rows.place[:, None], cols.place[None]]
    return found.permute(0, 2, 3, 1, 4)


def score_bias(bias: Tensor | None, rows: Axis, cols: Axis, N: int, dtype: torch.dtype) -> Tensor | None:
    """Bias, and -inf where a pair does not count: `[1, N * P * Q, T * S, E * F]`, or None where nothing is added.

    Without a bias `[1, N * P * Q, 1, E * F]` where all queries of a tile see the same keys.
    """
    (P, T), E, (Q, S), F_ = rows.query.shape, rows.key.shape[1], cols.query.shape, cols.key.shape[1]
    if bias is None and rows.seen is None and cols.seen is None:
        return None
    if bias is None and all(each.run or each.seen is None for each in (rows, cols)):
        T = S = 1
    wide = torch.promote_types(dtype, torch.float32)  # the table's gradient is summed in the dtype it is read in
    if bias is None:
        added = torch.zeros((1, 1, 1, 1, 1, 1, 1), dtype=wide, device=rows.query.device)
    else:
        dy, dx = ((each.offset + size // 2).clamp(0, size - 1) for each, size in ((rows, bias.shape[1]), (cols, bias.shape[2])))
        added = bias.to(wide)[:, dy[:, None, :, None, :, None], dx[None, :, None, :, None, :]]
    for seen in (
        None if rows.seen is None else rows.seen[:, None, :, None, :, None],
        None if cols.seen is None else cols.seen[None, :, None, :, None, :],
    ):
        if seen is not None:
            added = torch.where(seen, added, -torch.inf)
    if bias is None or rows.seen is None or cols.seen is None:  # merging expanded dimensions would ask about their sizes
        added = added.expand(N, P, Q, T, S, E, F_).clone(memory_format=torch.contiguous_format)
    return added.reshape(1, N * P * Q, T * S, E * F_).to(dtype)


def axis(span: Span, n: int, device: torch.device) -> Axis:
    """The tiles of `span` on an axis of `n` coordinates, `n` a number or a symbol."""
    if span.step is None:
        return _grid(span.size, n // span.size, device)
    if span.size is None:
        return _whole(span.step, n, device)
    return _tiles(span, n, device)


def _grid(size: int, step: int, device: torch.device) -> Axis:
    """Every residue class is a tile; one more is never read."""
    place, residue = torch.arange(size, device=device), torch.arange(step + 1, device=device)
    tiles = (residue[:, None] + place * step).clamp(max=size * step - 1)
    coordinate = torch.arange(size * step, device=device)
    row = (coordinate[:, None] >= place[1:] * step).sum(1)  # coordinate // step, which ONNX lacks for a symbolic step
    return Axis(tiles, tiles, None, _distance(place), coordinate - row * step, row)


def _whole(step: int, n: int, device: torch.device) -> Axis:
    """Every residue class is a tile, the shorter ones with one pair less at the end."""
    coordinate = torch.arange(n, device=device)
    place = coordinate if step == 1 else torch.arange((n + step - 1) // step, device=device)
    if step == 1:
        return Axis(place[None], place[None], None, _distance(place), torch.zeros_like(place), place, whole=True)
    tiles = torch.arange(step, device=device)[:, None] + place * step
    inside = tiles < n
    seen = inside[:, None, :] | ~inside[:, :, None]
    tiles = tiles.clamp(max=n - 1)
    return Axis(tiles, tiles, seen, _distance(place), coordinate % step, coordinate // step, whole=True)


def _tiles(span: Span, n: int, device: torch.device) -> Axis:
    """Tiles of `tile` queries and `extent` keys, the residue classes side by side."""
    size, step, stride, shift = span.size, span.step, span.stride, span.shift
    tile = stride if span.partitions else max(1, min(max(size, 4), 8) // stride) * stride
    extent, base = tile - stride + size, stride // 2 - size // 2
    longest = (n + step - 1) // step
    lead = 1 if shift or step == 1 else 0  # a tile before the first run: what the shift cuts off, or never read
    if span.edge == "cover":
        shift = shift * (1 - 1 // ((longest + stride - 1) // stride))
    count = (longest - shift + tile - 1) // tile + lead

    index = torch.arange(count * step, device=device)
    residue, order = index % step, index // step
    length = ((n + step - 1 - residue) // step)[:, None]
    begin = ((order - lead) * tile + shift)[:, None]
    place, slot = torch.arange(tile, device=device), torch.arange(extent, device=device)
    query = begin + place
    start, first = begin + place // stride * stride + base, begin + base
    if span.edge == "clamp":
        start, first = (torch.minimum(x.clamp(min=0), length - size) for x in (start, first))
    key = first + slot
    if span.partitions:  # a tile is a run; one without any key, which is never read, sees all
        seen = ((key >= 0) & (key < length) | (first >= length) | (first + extent <= 0))[:, None]
    else:
        inside = (query >= 0) & (query < length)
        in_run = (start[:, :, None] <= key[:, None]) & (key[:, None] < start[:, :, None] + size)
        seen = in_run & ((key >= 0) & (key < length))[:, None] | ~inside[:, :, None]
    offset = key[:, None] - query[:, :, None] if span.edge == "clamp" else (slot + base - place[:, None])[None]

    coordinate = torch.arange(n, device=device)
    position = coordinate // step
    ahead = position - shift + lead * tile
    return Axis(
        (query * step + residue[:, None]).clamp(0, n - 1),
        (key * step + residue[:, None]).clamp(0, n - 1),
        seen,
        offset,
        ahead // tile * step + coordinate % step,
        ahead % tile,
        run=span.partitions,
    )


def _distance(place: Tensor) -> Tensor:
    """Key minus query of all pairs, `[1, T, T]`."""
    return (place[None, :] - place[:, None])[None]
