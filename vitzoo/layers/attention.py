"""Multi-head self-attention on maps (who sees whom is a pattern) and on tokens (everybody sees everybody)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitzoo.layers.linear import Linear
from vitzoo.layers.maps import crop_map, global_table, pad_map, resize_table
from vitzoo.ops import attend, attend2d
from vitzoo.patterns import Pattern, everywhere

for _name in ("attend", "attend2d", "crop_map", "global_table", "pad_map"):
    torch.fx.wrap(_name)


def check_heads(dim: int, num_heads: int) -> int:
    """The head dimension ``dim / num_heads``; raises ValueError where it is no whole number."""
    if dim % num_heads:
        raise ValueError(f"{dim} channels do not divide into {num_heads} heads. Choose a width that is a multiple of it.")
    return dim // num_heads


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
