"""The transformer block: a token mixer and an MLP, each with norm, layer scale, drop path and residual."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from vitzoo.layers.conv import DepthwiseConv
from vitzoo.layers.linear import Mlp

CHUNK_TOKENS = 3200
"""Tokens that the in-place path takes through the MLP at once. On a CPU an allocation above 32 MiB is mapped and
page-faulted anew at every call, which costs more than the GELU that writes it."""


def _joined(x: Tensor, y: Tensor) -> Tensor:
    """``x + y`` with the strides of ``y``, as in place; of ``x`` in an exported graph, where those of ``y`` ask for sizes."""
    return x + y if torch.compiler.is_exporting() else y + x


class Block(nn.Module):
    """``x + drop_path(scale(mixer(norm(x))))``, then the same with an MLP; or with the norm behind (Swin V2).

    Args:
        dim: channels C.
        attn: the token mixer, a module from ``[B, ..., C]`` to ``[B, ..., C]`` whose output is not a view of its input.
        mlp_ratio: hidden channels of the MLP over C.
        drop_path: probability of skipping a branch for one image, in training.
        proj_drop: dropout in the MLP.
        layer_scale: initial value of a learned scale per channel on both branches; None for no scale.
        norm_eps: epsilon of the LayerNorms.
        post_norm: normalise the branch's output (residual post-norm) instead of its input.
        mlp: the MLP; two linear layers with a GELU between unless given.
        norm_layer: makes both norms from C; LayerNorm with ``norm_eps`` unless given.

    Shape: ``[B, H, W, C]`` or ``[B, L, C]``, unchanged.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-5,
        post_norm: bool = False,
        mlp: nn.Module | None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=norm_eps)
        self.norm1 = norm_layer(dim)
        self.attn = attn
        self.ls1 = LayerScale(dim, init_values=layer_scale) if layer_scale is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp: Any = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop) if mlp is None else mlp
        self.ls2 = LayerScale(dim, init_values=layer_scale) if layer_scale is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, *grid: int) -> Tensor:
        """The block on ``x``; ``grid``, rows and columns, is for a mixer that sees a map in the tokens."""
        if self._may_work_in_place(x):
            return self._forward_in_place(x, *grid)
        if self.post_norm:
            x = _joined(x, self.drop_path1(self.ls1(self.norm1(self.attn(x, *grid)))))
            return x + self.drop_path2(self.ls2(self.norm2(self.mlp(x))))
        x = _joined(x, self.drop_path1(self.ls1(self.attn(self.norm1(x), *grid))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _may_work_in_place(self, x: Tensor) -> bool:
        """In inference on a CPU, eager, and where nobody watches or has replaced the parts that are bypassed."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training:
            return False
        if type(x) is not Tensor or x.device.type != "cpu":  # an FX proxy, a subclass, another device
            return False
        if not isinstance(self.mlp, Mlp) or type(self.mlp.act) is not nn.GELU:
            return False
        return not any(m._forward_hooks or m._forward_pre_hooks for m in (self.mlp, self.mlp.act))

    def _forward_in_place(self, x: Tensor, *grid: int) -> Tensor:
        """The same numbers, with the residual, the GELU and the MLP's hidden map in reused memory.

        To the last bit, too, unless the batch is so large that the MLP takes it in pieces: products of fewer rows may sum
        in another order.

        The mixer's output belongs to this block, so it becomes the residual stream; ``x`` is never written.
        """
        y = self.attn(x, *grid) if self.post_norm else self.attn(self.norm1(x), *grid)
        return self._feed_in_place(self._join_in_place(x, y))

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """The first half's residual alone: ``x`` and the mixer's output ``y``, the caller's own, which may be written to."""
        if self._may_work_in_place(x):
            return self._join_in_place(x, y)
        return _joined(x, self.drop_path1(self.ls1(self.norm1(y) if self.post_norm else y)))

    def _join_in_place(self, x: Tensor, y: Tensor) -> Tensor:
        return self.ls1(self.norm1(y) if self.post_norm else y).add_(x)

    def feed(self, y: Tensor) -> Tensor:
        """The second half of the block alone, the MLP and its residual; ``y`` is the caller's own and may be written to."""
        if self._may_work_in_place(y):
            return self._feed_in_place(y)
        out = self.norm2(self.mlp(y)) if self.post_norm else self.mlp(self.norm2(y))
        return y + self.drop_path2(self.ls2(out))

    def _feed_in_place(self, y: Tensor) -> Tensor:
        tokens = max(1, y[0].numel() // y.shape[-1]) if len(y) else 1
        for part in y.split(max(1, CHUNK_TOKENS // tokens)):
            hidden = self.mlp.hidden(part if self.post_norm else self.norm2(part))
            torch.ops.aten.gelu_(hidden, approximate=self.mlp.act.approximate)
            out = self.mlp.fc2(hidden)
            part.add_(self.ls2(self.norm2(out) if self.post_norm else out))
        return y


class PositionedBlock(Block):
    """A block behind a depthwise 3x3 convolution with a shortcut, which tells positions (BiFormer)."""

    def __init__(self, dim: int, attn: nn.Module, **kwargs: Any) -> None:
        super().__init__(dim, attn, **kwargs)
        self.pos_embed = DepthwiseConv(dim)

    def forward(self, x: Tensor, *grid: int) -> Tensor:
        return super().forward(x + self.pos_embed(x), *grid)


class PostNormBlock(nn.Module):
    """``norm(y + drop(mlp(y)))`` with ``y = norm(x + drop(attn(x)))``: ``[B, H, W, C]``, unchanged.

    ``drop`` leaves out single elements, with the probability that elsewhere whole paths have; as published (SOFT).
    """

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop: float) -> None:
        super().__init__()
        self.attn, self.mlp, self.drop = attn, mlp, nn.Dropout(drop)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.drop(self.attn(x)))
        return self.norm2(x + self.drop(self.mlp(x)))
