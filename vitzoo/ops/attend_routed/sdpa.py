"""attend_routed through PyTorch: some regions of queries at a time, whose keys are gathered for as long as they are needed.

A piece of the work is so many regions that what is gathered for them takes no more room than all keys and values do, so
memory does not grow with the number of regions that each one sees. Nothing is kept for the gradient but q, k, v and the index:
every piece holds all keys of its queries, so its softmax is computed again. A captured graph, which cannot count pieces whose
number depends on the map, takes one choice at a time instead and joins the results by their log-sum-exp.

Letters: R regions of queries, S of keys, L tokens of a region, K choices, N heads, D and E head dims.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FREE = 2**18
"""Numbers that a piece may gather in any case: on a small map fewer, larger pieces are faster and no memory is at stake."""


def supports(call: object) -> str | None:
    """Takes every call."""
    return None


def run(call) -> tuple[Tensor]:
    """(out `[B, H, W, N, E]`,) of an `AttendRoutedCall`."""
    if torch.compiler.is_compiling():
        return (traced(call),)
    if call.q.numel() == 0 or call.v.numel() == 0:
        nothing = 0 * (call.q.sum() + call.k.sum() + call.v.sum())
        return (call.q.new_zeros(*call.q.shape[:-1], call.v.shape[-1]) + nothing,)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
        return (_AttendRouted.apply(call.q, call.k, call.v, call.graph, call.regions, call.key_regions, call.scale),)
    return (_forward(call.q, call.k, call.v, call.graph, call.regions, call.key_regions, call.scale),)


# -- concrete sizes ---------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Some regions of queries, n of them: indices into the views of `by_region`."""

    query: tuple[Tensor, ...]  # image, row, column of each region: [n] each
    key: tuple[Tensor, ...]  # image, row, column, head of each chosen region: broadcast to [n, N, K]


def by_region(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """A map `[B, H, W, N, D]` as a view `[B, rows of regions, columns of regions, N, rows, columns, D]`."""
    x = x.unflatten(2, (regions[1], x.shape[2] // regions[1])).unflatten(1, (regions[0], x.shape[1] // regions[0]))
    return x.permute(0, 1, 3, 5, 2, 4, 6)


def pieces(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, regions: tuple[int, int], key_regions: tuple[int, int], scores: bool
):
    """The work in pieces; with `scores`, also their scores take no more room than all keys and values."""
    total, count, choices = len(q) * regions[0] * regions[1], regions[0] * regions[1], index.shape[-1]
    room = max(k.numel() + v.numel(), FREE)
    key_tokens = choices * (k.shape[1] // key_regions[0]) * (k.shape[2] // key_regions[1])
    query_tokens = (q.shape[1] // regions[0]) * (q.shape[2] // regions[1])
    # of queries a copy and the result, of keys a copy, of values two for a moment
    one = q.shape[3] * (query_tokens * (q.shape[-1] + v.shape[-1]) + key_tokens * (k.shape[-1] + 2 * v.shape[-1]))
    if scores:
        one = max(one, key_tokens * q.shape[3] * query_tokens)
    size = max(1, room // one)

    def cut() -> Iterator[Piece]:
        for first in range(0, total, size):
            number = torch.arange(first, min(first + size, total), device=q.device)
            image, region = number // count, number % count
            chosen = index[image, region]  # [n, N or 1, K]
            head = torch.arange(q.shape[3], device=q.device)[:, None]
            row, col = chosen // key_regions[1], chosen % key_regions[1]
            yield Piece((image, region // regions[1], region % regions[1]), (image[:, None, None], row, col, head))

    return cut()


def _gathered(q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    """q `[n, N, L, D]`, k `[n, N, K * L, D]` and v `[n, N, K * L, E]` of a piece, from views of `by_region`."""
    return q[piece.query].flatten(2, 3), k[piece.key].flatten(2, 4), v[piece.key].flatten(2, 4)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, regions: tuple[int, int], key_regions: tuple[int, int], scale: float
) -> Tensor:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    target = by_region(out, regions)
    views = by_region(q, regions), by_region(k, key_regions), by_region(v, key_regions)
    for piece in pieces(q, k, v, index, regions, key_regions, scores=False):
        part = F.scaled_dot_product_attention(*_gathered(*views, piece), scale=scale)
        target[piece.query] = part.unflatten(2, target.shape[4:6])
    return out


class _AttendRouted(torch.autograd.Function):
    """Keeps q, k and v."""

    @staticmethod
    def forward(ctx, q, k, v, index, regions, key_regions, scale):
        ctx.save_for_backward(q, k, v, index)
        ctx.settings = regions, key_regions, scale
        return _forward(q, k, v, index, regions, key_regions, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        with torch.autocast(dout.device.type, enabled=False):
            return *_backward(dout, *ctx.saved_tensors, *ctx.settings), None, None, None, None


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    regions: tuple[int, int],
    key_regions: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """With P the softmax: dS = P (dout v^T - sum(P dout v^T)), then one product each; keys sum over who has seen them."""
    wide = torch.promote_types(q.dtype, torch.float32)
    views = by_region(q, regions), by_region(k, key_regions), by_region(v, key_regions)
    douts = by_region(dout, regions)
    dq = q.new_empty(q.shape)
    target = by_region(dq, regions)
    dk, dv = (torch.zeros(x.shape[:4].numel(), x.shape[4:].numel(), dtype=wide, device=q.device) for x in views[1:])
    for piece in pieces(q, k, v, index, regions, key_regions, scores=True):
        query, key, value = (x.to(wide) for x in _gathered(*views, piece))
        grad = douts[piece.query].flatten(2, 3).to(wide)
        softmax = torch.softmax(scale * query @ key.transpose(-2, -1), -1)
        weighed = softmax * (grad @ value.transpose(-2, -1))
        dscore = (weighed - softmax * weighed.sum(-1, keepdim=True)) * scale
        target[piece.query] = (dscore @ key).to(q.dtype).unflatten(2, target.shape[4:6])
        image, row, col, head = piece.key
        place = ((image * key_regions[0] + row) * key_regions[1] + col) * q.shape[3] + head
        for total, product in ((dk, dscore.transpose(-2, -1) @ query), (dv, softmax.transpose(-2, -1) @ grad)):
            total.index_add_(0, place.flatten(), product.reshape(place.numel(), -1))
    return dq, _map_of(dk, views[1], k), _map_of(dv, views[2], v)


def _map_of(total: Tensor, view: Tensor, like: Tensor) -> Tensor:
    """Sums in the order of the regions' view as a map like `like`."""
    return total.view(view.shape).permute(0, 1, 4, 2, 5, 3, 6).reshape(like.shape).to(like.dtype)


# -- captured graphs --------------------------------------------------------------------------------------------------


def traced(call: Any) -> Tensor:
    """The same as one graph for all sizes: an online softmax over the choices, whose number is fixed."""
    q, k, v, index = call.q, call.k, call.v, call.graph
    wide = torch.promote_types(q.dtype, torch.float32)
    query, key, value = (tokens(x, r) for x, r in ((q, call.regions), (k, call.key_regions), (v, call.key_regions)))
    idle = torch.arange(key.shape[3], device=q.device) == key.shape[3] - 1
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
    head = torch.arange(q.shape[3], device=q.device)
    out = lse = None
    for j in range(index.shape[-1]):
        seen = batch, index[..., j], head
        scores = ((query * call.scale) @ key[seen].transpose(-2, -1)).to(wide)
        scores = torch.where(idle, -torch.inf, scores)
        part_lse = torch.logsumexp(scores, -1, keepdim=True)
        part = torch.exp(scores - part_lse).to(q.dtype) @ value[seen]
        if out is None or lse is None:
            out, lse = part.to(wide), part_lse
        else:
            total = torch.logaddexp(lse, part_lse)
            out, lse = out * torch.exp(lse - total) + part * torch.exp(part_lse - total), total
    assert out is not None
    rows, cols = call.regions
    height, width = q.shape[1] // rows, q.shape[2] // cols
    (row, y), (col, x) = (
        _split(torch.arange(n * size, device=q.device), n, size) for n, size in ((rows, height), (cols, width))
    )
    return out.to(q.dtype).transpose(2, 3)[:, row[:, None] * cols + col, y[:, None] * width + x]


def _split(coordinate: Tensor, parts: int, size: int) -> tuple[Tensor, Tensor]:
    """The part of each coordinate, and its place there; by comparing, since ONNX divides by no symbol."""
    part = (coordinate[:, None] >= torch.arange(1, parts + 1, device=coordinate.device) * size).sum(1)
    return part, coordinate - part * size


def tokens(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """`[B, H, W, N, D]` to `[B, R, N, L + 1, D]`. The last token is idle: PyTorch specialises a size that could be 1."""
    rows, cols = regions
    height, width = x.shape[1] // rows, x.shape[2] // cols
    row, col = _split(torch.arange(height * width + 1, device=x.device), height + 1, width)
    y = (torch.arange(rows, device=x.device)[:, None] * height + row).clamp(max=rows * height - 1)
    u = torch.arange(cols, device=x.device)[:, None] * width + col
    found = x[:, y[:, None], u[None]]  # [B, rows, cols, L + 1, N, D]
    return found.permute(0, 1, 2, 4, 3, 5).flatten(1, 2)
