"""Multi-head self-attention on maps (who sees whom is a pattern) and on tokens (everybody sees everybody)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers.conv import DepthwiseConv
from vitzoo.layers.embed import SpatialReduction
from vitzoo.layers.linear import Linear
from vitzoo.layers.maps import crop_map, global_table, pad_map, resize_table
from vitzoo.ops import attend, attend2d
from vitzoo.patterns import Pattern, everywhere

for _name in ("attend", "attend2d", "crop_map", "enlarge_map", "global_table", "pad_map"):
    torch.fx.wrap(_name)


def check_heads(dim: int, num_heads: int) -> int:
    """The head dimension ``dim / num_heads``; raises ValueError where it is no whole number."""
    if dim % num_heads:
        raise ValueError(f"{dim} channels do not divide into {num_heads} heads. Choose a width that is a multiple of it.")
    return dim // num_heads


def unit_length(x: Tensor) -> Tensor:
    """``x`` ``[..., D]`` over its norm; a vector of zeros (the k of a padded token) stays one.

    The published epsilon is 1e-12, which is 0 in fp16.
    """
    return F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny))


class PatternAttention(nn.Module):
    """Self-attention along a 2-D pattern, with a trained relative position bias.

    ``softmax(q k^T / sqrt(D) + bias) v`` over the keys that the pattern lets a query see, between one linear layer
    for q, k, v and one for the output.

    The map is padded *before* the projection where the pattern needs it, so padded tokens are real keys that carry
    the bias of the projection: the behaviour that Swin's dense backbone and NATTEN up to 0.15 were trained with.

    Args:
        dim: channels C.
        num_heads: heads N; C divides by it.
        pattern: who sees whom.
        pad_multiple: rows and columns that the padded map divides by (a window's size).
        pad_minimum: rows and columns that it has at least (kernel times dilation).
        qkv_bias: learn a bias in the projection to q, k, v.
        table_size: size of the bias table, needed where the pattern's reach depends on the map (global attention):
            there the table is resized to the map.
        proj_drop: dropout after the output projection.

    Shape: ``[B, H, W, C]`` to ``[B, H, W, C]``, any H and W.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pattern: Pattern,
        *,
        pad_multiple: tuple[int, int] = (1, 1),
        pad_minimum: tuple[int, int] = (1, 1),
        qkv_bias: bool = True,
        table_size: tuple[int, int] | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.pattern = pattern
        self.pad_multiple = pad_multiple
        self.pad_minimum = pad_minimum
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.make_bias(table_size or table_shape(pattern))
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def make_bias(self, table_size: tuple[int, int]) -> None:
        """Create what the bias is computed from: here the table itself, key minus query."""
        self.rel_bias = nn.Parameter(torch.empty(self.num_heads, *table_size))
        nn.init.trunc_normal_(self.rel_bias, std=0.02)

    def bias(self, x: Tensor) -> Tensor:
        """The bias table ``[N, Ey, Ex]`` for the (padded) map ``x``."""
        return global_table(self.rel_bias, x) if self.pattern == everywhere else self.rel_bias

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``[B, H, W, N, D]``: views of one packed projection."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return q, k, v

    def attend(self, x: Tensor) -> Tensor:
        """Attention on the padded map: ``[B, H', W', C]`` to ``[B, H', W', N, D]``."""
        q, k, v = self.project(x)
        return attend2d(q, k, v, self.pattern, bias=self.bias(x))

    def forward(self, x: Tensor) -> Tensor:
        out = self.attend(pad_map(x, self.pad_multiple, self.pad_minimum))
        return self.proj_drop(self.proj(crop_map(out, x).flatten(-2)))

    @torch.no_grad()
    def set_pattern(self, pattern: Pattern, pad_multiple: tuple[int, int], pad_minimum: tuple[int, int]) -> None:
        """Use another window or kernel from now on; the trained table is resized to its reach."""
        self.pattern, self.pad_multiple, self.pad_minimum = pattern, pad_multiple, pad_minimum
        if pattern != everywhere:
            self.rel_bias = nn.Parameter(resize_table(self.rel_bias.detach(), table_shape(pattern)))

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, pattern={self.pattern!r}"


def table_shape(pattern: Pattern) -> tuple[int, int]:
    """Rows and columns of the relative position table of a pattern whose reach does not depend on the map."""
    return 2 * pattern.rows.reach() + 1, 2 * pattern.cols.reach() + 1


class TokenAttention(nn.Module):
    """Self-attention among all tokens of a sequence, prefix tokens included; keys named as in timm's ``Attention``.

    Args:
        dim: channels C.
        num_heads: heads N.
        qkv_bias: learn a bias in the projection to q, k, v.
        qk_norm: normalise q and k per head (LayerNorm over D).
        proj_drop: dropout after the output projection.

    Shape: ``[B, L, C]`` to ``[B, L, C]``.
    """

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool = True, qk_norm: bool = False, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        out = attend(self.q_norm(q), self.k_norm(k), v)
        return self.proj_drop(self.proj(out.flatten(-2)))


def enlarge_map(x: Tensor, like: Tensor) -> Tensor:
    """A map ``[B, h, w, C]`` in the size of ``like`` ``[B, H, W, ...]``, bilinear, pixels as areas."""
    size = (like.shape[1], like.shape[2])
    return F.interpolate(x.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


class MixedAttention(nn.Module):
    """What stands around a mixer of queries, keys and values: their projections, a local term, the output projection.

        proj(mix(q, k, v) + local(v))

    A mixer derives from it and defines ``mix``; ``mix_tokens`` where it fits beside prefix tokens; ``local`` where v
    adds more than LePE to its own place; ``enlarge`` where v gets back to the size of the map in another way.

    Keys are the published ones: ``qkv``, or ``q`` and ``kv``; ``sr`` where k and v come from a reduced map; ``get_v`` for
    LePE; ``proj``.

    Args:
        dim: channels C.
        num_heads: heads N; C divides by it.
        packed: one linear layer for q, k, v; else (and wherever ``kv_ratio`` is not 1) one for q and one for k and v.
        kv_ratio: k and v come from cells of ``kv_ratio`` x ``kv_ratio`` tokens (PVT); the map is padded to whole cells.
        lepe: add a depthwise 3x3 convolution of v to the output (CSWin).
        prefix_tokens: tokens before the map's in ``forward_tokens``.
        qkv_bias: learn a bias in the projections to q, k, v.
        proj_drop: dropout after the output projection.

    Shape: ``[B, H, W, C]``, unchanged; tokens ``[B, P + H * W, C]`` in ``forward_tokens``, unchanged.

    Raises:
        ValueError: ``kv_ratio`` beside prefix tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        packed: bool = True,
        kv_ratio: int = 1,
        lepe: bool = False,
        prefix_tokens: int = 0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if kv_ratio > 1 and prefix_tokens:
            raise ValueError(f"kv_ratio {kv_ratio} reduces a map, and {prefix_tokens} prefix token(s) are on none. Leave it 1.")
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.kv_ratio, self.prefix_tokens = kv_ratio, prefix_tokens
        self.packed = packed and kv_ratio == 1
        if self.packed:
            self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        else:
            self.q = Linear(dim, dim, bias=qkv_bias)
            self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.sr = SpatialReduction(dim, kv_ratio) if kv_ratio > 1 else nn.Identity()
        self.get_v = DepthwiseConv(dim) if lepe else None
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    # -- what a mixer defines -------------------------------------------------------------------------------------

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From q ``[B, H, W, C]`` and k, v ``[B, h, w, C]`` to ``[B, H, W, C]``."""
        raise NotImplementedError

    def mix_tokens(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        """The same on tokens ``[B, P + height * width, C]``, the prefix first."""
        raise NotImplementedError

    def local(self, v: Tensor) -> Tensor | None:
        """What v, a map ``[B, H, W, C]``, adds to the output: LePE, or None."""
        return None if self.get_v is None else self.get_v(v)

    def enlarge(self, v: Tensor, like: Tensor) -> Tensor:
        """v ``[B, h, w, C]`` of a reduced map in the size of ``like``, for ``local``: bilinear."""
        return enlarge_map(v, like)

    # -- forward --------------------------------------------------------------------------------------------------

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q in the shape of x, ``[B, ..., C]``; k and v likewise, or of the reduced map: views of packed projections."""
        if self.packed:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return q, k, v
        reduced = x if self.kv_ratio == 1 else self.sr(pad_map(x, (self.kv_ratio, self.kv_ratio)))
        k, v = self.kv(reduced).chunk(2, dim=-1)
        return self.q(x), k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        out = self.mix(q, k, v)
        local = self.local(v if self.kv_ratio == 1 else self.enlarge(v, x))
        return self.proj_drop(self.proj(out if local is None else out + local))

    def forward_tokens(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens ``[B, P + height * width, C]``; prefix tokens take part in the mixing and have no local term."""
        q, k, v = self.project(x)
        out = self.mix_tokens(q, k, v, height, width)
        prefix = self.prefix_tokens
        local = self.local(v[:, prefix:].unflatten(1, (height, width)))
        if local is not None:
            out = torch.cat([out[:, :prefix], out[:, prefix:] + local.flatten(1, 2)], dim=1)
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}"


class FullAttention(MixedAttention):
    """Softmax attention among all tokens of a map ``[B, H, W, C]``, or of a sequence ``[B, L, C]``."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (self.num_heads, self.head_dim)
        return attend(*(t.flatten(1, -2).unflatten(-1, heads) for t in (q, k, v))).reshape(q.shape)
