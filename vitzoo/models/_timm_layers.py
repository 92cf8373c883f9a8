"""Layers of timm's Swin, MaxViT, ViT and EVA that ``vitzoo.accelerate`` exchanges for ours, parameters under their names.

What it builds anew it does not exchange layer by layer; these are for the rest: backbones inside other models, feature
extractors, variants that our families have not.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models import eva, maxxvit, swin_transformer, swin_transformer_v2
from torch import Tensor, nn

from vitzoo.layers import WindowAttention, linear, pad_map, takes_the_place_of
from vitzoo.layers.maps import crop_map
from vitzoo.layers.windows import turned
from vitzoo.models.swin import CosineAttention
from vitzoo.ops import attend, attend2d
from vitzoo.patterns import Pattern, grid, window

for _name in ("additive", "attend", "attend2d", "crop_map", "linear", "pad_map", "rotated", "table_of"):
    torch.fx.wrap(_name)

# -- tokens: ViT, DeiT, EVA ---------------------------------------------------------------------------------------------


def additive(mask: Tensor | None, causal: bool, like: Tensor) -> Tensor | None:
    """A mask as PyTorch's attention takes it, boolean or additive, as a bias; ``like`` is ``[B, L, N, D]``."""
    if causal:
        length = like.shape[1]
        return like.new_full((length, length), float("-inf")).triu(1)
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, float("-inf"))


def rotated(x: Tensor, rope: Tensor, prefix: int, half: bool, dtype: torch.dtype) -> Tensor:
    """Rotary positions on the patches of ``[B, L, N, D]``; ``prefix`` tokens before them have none."""
    patches = apply_rot_embed_cat(x[:, prefix:].transpose(1, 2), rope, half=half).transpose(1, 2)
    return torch.cat([x[:, :prefix], patches], dim=1).to(dtype)


class TokenAttention(nn.Module):
    """Attention among tokens with the parts of timm's layer: packed or separate projections, norms, gate, rotary positions.

    Args:
        theirs: timm's layer.

    Shape: ``[B, L, C]``, unchanged.
    """

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.num_heads, self.num_prefix_tokens = theirs.num_heads, getattr(theirs, "num_prefix_tokens", 0)
        self.groups, self.rotate_half = getattr(theirs, "num_kv_groups", 1), getattr(theirs, "rotate_half", False)
        for name in ("qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "norm", "gate", "proj", "proj_drop"):
            setattr(self, name, getattr(theirs, name, None))
        for name in ("q_bias", "v_bias"):  # EVA's; its k has none
            self.register_parameter(name, getattr(theirs, name, None))

    # parts that timm's layer brings; None for what it has not
    qkv: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    q_norm: Any
    k_norm: Any
    norm: Any
    gate: Any
    proj: Any
    proj_drop: Any
    q_bias: Any
    v_bias: Any

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``[B, L, N, D]``, k and v with fewer heads where queries share them."""
        if self.qkv is None:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            depth = q.shape[-1] // self.num_heads
            return q.unflatten(-1, (-1, depth)), k.unflatten(-1, (-1, depth)), v.unflatten(-1, (-1, depth))
        bias = self.qkv.bias
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return q, k, v

    def mix(self, x: Tensor, rope: Tensor | None, mask: Tensor | None, causal: bool) -> Tensor:
        q, k, v = self.project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (rotated(t, rope, self.num_prefix_tokens, self.rotate_half, v.dtype) for t in (q, k))
        if self.groups > 1:
            k, v = k.repeat_interleave(self.groups, dim=2), v.repeat_interleave(self.groups, dim=2)
        out = attend(q, k, v, bias=additive(mask, causal, q)).flatten(2)
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


@takes_the_place_of(Attention, on_request=True)
class ViTAttention(TokenAttention):
    """That of ViT and DeiT, called with a mask."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.mix(x, None, attn_mask, is_causal)


@takes_the_place_of(AttentionRope, eva.EvaAttention, on_request=True)
class RotaryAttention(TokenAttention):
    """That of EVA, called with rotary positions."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return self.mix(x, rope, attn_mask, is_causal)


# -- windows: Swin, versions 1 and 2 --------------------------------------------------------------------------------------


def uneven(theirs: Any) -> str | None:
    """Whether timm would roll a map of Swin's before it pads it, which no cut window equals: the reason, or None."""
    size, windows = theirs.input_resolution, theirs.window_size
    if any(theirs.shift_size) and any(n % w for n, w in zip(size, windows, strict=True)):
        return (
            f"timm rolls its {size[0]} x {size[1]} map before it pads it to windows of {windows[0]} x {windows[1]}, so that "
            "tokens of two borders meet, and a window of ours is cut there. Choose an image size that the windows divide."
        )
    return None


class SwinAttention(WindowAttention):
    """Window attention with the table directly below it, as timm's Swin has it."""

    def __init__(self, theirs: Any, pattern: Pattern) -> None:
        super().__init__(theirs, pattern)
        self.relative_position_bias_table = theirs.relative_position_bias_table

    def bias(self) -> Tensor:
        return turned(self.relative_position_bias_table, self.size)


def cosine_attention(theirs: Any, pattern: Pattern, size: tuple[int, int]) -> CosineAttention:
    """Swin V2's attention with the parts of timm's layer."""
    pretrained = tuple(theirs.pretrained_window_size)
    with torch.device("meta"):
        reference = pretrained if pretrained[0] else size
        ours = CosineAttention(theirs.dim, theirs.num_heads, pattern, pad_multiple=size, reference=reference)
    for name in ("qkv", "proj", "proj_drop", "cpb_mlp", "logit_scale", "q_bias", "v_bias"):
        setattr(ours, name, getattr(theirs, name))
    return ours


@takes_the_place_of(swin_transformer.SwinTransformerBlock, swin_transformer_v2.SwinTransformerV2Block, on_request=True)
class SwinBlock(nn.Module):
    """A block of Swin, ``[B, H, W, C]``, unchanged; the second version's norms stand behind its branches."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.post_norm = isinstance(theirs, swin_transformer_v2.SwinTransformerV2Block)
        size, shift = tuple(theirs.window_size), tuple(theirs.shift_size)
        pattern = window(size, shift=shift)
        self.attn: nn.Module = (
            cosine_attention(theirs.attn, pattern, size) if self.post_norm else SwinAttention(theirs.attn, pattern)
        )
        self.norm1, self.drop_path1 = theirs.norm1, theirs.drop_path1
        self.norm2, self.mlp, self.drop_path2 = theirs.norm2, theirs.mlp, theirs.drop_path2

    @staticmethod
    def refuses(theirs: Any) -> str | None:
        """Why a block of timm's cannot be exchanged."""
        if isinstance(theirs, swin_transformer_v2.SwinTransformerV2Block) and theirs.attn.q_bias is None:
            return "its projections have no bias, which no published Swin V2 is without. Build it with qkv_bias=True."
        return uneven(theirs)

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = x + self.drop_path1(self.norm1(self.attn(x)))
            return x + self.drop_path2(self.norm2(self.mlp(x)))
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


# -- windows and grids: MaxViT --------------------------------------------------------------------------------------------


def table_of(bias: Tensor, size: tuple[int, int]) -> Tensor:
    """The table ``[N, 2 h - 1, 2 w - 1]`` behind a relative bias ``[1, N, h w, h w]`` of a window: each offset's first pair."""
    h, w = size
    dy, dx = (torch.arange(1 - n, n, device=bias.device) for n in size)
    query = (-dy).clamp(min=0)[:, None] * w + (-dx).clamp(min=0)
    key = dy.clamp(min=0)[:, None] * w + dx.clamp(min=0)
    return bias[0][:, query, key]


class PartitionAttention(nn.Module):
    """Attention in windows or on a grid of a map ``[B, H, W, C]``, with whatever makes timm's relative bias."""

    def __init__(self, theirs: Any, pattern: Pattern, size: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads, self.head_first, self.pattern, self.size = theirs.num_heads, theirs.head_first, pattern, size
        self.qkv, self.rel_pos, self.proj, self.proj_drop = theirs.qkv, theirs.rel_pos, theirs.proj, theirs.proj_drop

    def forward(self, x: Tensor) -> Tensor:
        qkv = linear(pad_map(x, self.size), self.qkv.weight, self.qkv.bias)
        if self.head_first:
            q, k, v = qkv.unflatten(-1, (self.num_heads, 3, -1)).unbind(-2)
        else:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        bias = None if self.rel_pos is None else table_of(self.rel_pos.get_bias(), self.size)
        out = crop_map(attend2d(q, k, v, self.pattern, bias=bias), x).flatten(-2)
        return self.proj_drop(linear(out, self.proj.weight, self.proj.bias))


@takes_the_place_of(maxxvit.PartitionAttentionCl, on_request=True)
class PartitionBlock(nn.Module):
    """Half a block of MaxViT: attention in windows or on the grid, then an MLP; ``[B, H, W, C]``, unchanged."""

    def __init__(self, theirs: maxxvit.PartitionAttentionCl) -> None:
        super().__init__()
        size = theirs.partition_size
        pattern = window(size) if theirs.partition_block else grid(size)
        self.attn = PartitionAttention(theirs.attn, pattern, size)
        self.norm1, self.norm2, self.mlp = theirs.norm1, theirs.norm2, theirs.mlp
        self.ls1, self.ls2, self.drop_path1, self.drop_path2 = theirs.ls1, theirs.ls2, theirs.drop_path1, theirs.drop_path2

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
