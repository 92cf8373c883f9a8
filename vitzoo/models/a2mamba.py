"""A2Mamba, an attention-augmented state space model. Lou et al. 2025, arXiv:2507.16624.

New here: neighborhood attention, near with half of the heads and dilated with the other, and a state space model that reads
its states through the same weights: a state that was scanned row by row is gathered again from the neighbours that attention
chose, so it says where things are in two dimensions.

Deviations from the published code:
- any image size. The dilation follows the map, as published; where a map has fewer rows or columns than the kernel, which the
  published code refuses, attention sees all of them;
- the bias of the last stage's global attention is resized to the map, as published, in one bicubic picture of all pairs;
- the weights are computed twice, for values and for states, instead of being stored.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vitzoo.layers import ConvNorm, DeepStem, DepthwiseConv, Linear, ProjectedHead, Slot, init_truncated, register_mixer
from vitzoo.layers.attention import check_heads
from vitzoo.layers.neighbors import attend_near
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family
from vitzoo.ops import attend, selective_scan

for _name in ("attend", "attend_near", "fuse_heads", "resize_pairs", "rotate", "selective_scan"):
    torch.fx.wrap(_name)


@dataclass(frozen=True)
class A2MambaConfig(PyramidConfig):
    """Adds to the pyramid's choices.

    Attributes:
        layer_scale: not looked at; see ``scale_init``.
        kernel_size: tokens on a side of a neighborhood, for each stage.
        scale_init: initial value of each stage's learned scales; None for none.
        scale_skip: scale what a branch is added to, instead of the branch.
        head_hidden_size: channels between the two layers of the classifier.
    """

    embed_dim: int | tuple[int, ...] = (32, 64, 128, 192)
    depths: tuple[int, ...] = (2, 2, 8, 2)
    num_heads: tuple[int, ...] = (2, 2, 4, 8)
    mlp_ratio: float | tuple[float, ...] = (4, 4, 3, 3)
    kernel_size: tuple[int, ...] = (11, 9, 7, 7)
    scale_init: tuple[float | None, ...] = (None, None, None, None)
    scale_skip: bool = False
    head_hidden_size: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("kernel_size", self.kernel_size), ("scale_init", self.scale_init)):
            if len(value) != len(self.depths):
                raise ValueError(f"{name} {value} names {len(value)} stages, depths {self.depths} {len(self.depths)}.")


EPS = 1e-6
"""Of all LayerNorms."""


def rotate(x: Tensor) -> Tensor:
    """Turn pairs of channels by angles that grow with the row (first half) and the column; ``[B, H, W, N, D]``, D of fours.

    Su et al. 2021, arXiv:2104.09864, in two dimensions; speeds from 1 to 1 / 10,000.
    """
    height, width, _, dim = x.shape[1:]
    wide = torch.promote_types(x.dtype, torch.float32)
    speed = 10000 ** -torch.linspace(0, 1, dim // 4, device=x.device, dtype=wide)
    down, right = (torch.arange(n, device=x.device, dtype=wide)[:, None] * speed for n in (height, width))
    size = (height, width, dim // 4)
    angle = torch.cat([down[:, None].expand(size), right[None].expand(size)], dim=-1)[:, :, None]
    even, odd = x.to(wide).unflatten(-1, (dim // 2, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


def resize_pairs(table: Tensor, like: Tensor) -> Tensor:
    """A bias for each pair of tokens, ``[N, L, L]``, for the map ``like`` ``[B, H, W, ...]``: bicubic, a picture of pairs."""
    tokens = like.shape[1] * like.shape[2]
    if not torch.compiler.is_compiling() and tokens == table.shape[-1]:
        return table
    return F.interpolate(table[None].float(), size=(tokens, tokens), mode="bicubic", align_corners=False)[0].to(table.dtype)


def fuse_heads(x: Tensor, weight: Tensor) -> Tensor:
    """Heads mixed by ``weight`` ``[N, N]``, each channel of theirs alike: ``[B, H, W, N, D]``, unchanged."""
    if torch.compiler.is_compiling():  # a product of matrices reshapes, and asks in a graph whether sizes divide
        return (x[..., None, :, :] * weight[:, :, None]).sum(-2)
    return weight @ x


class StateSpace(nn.Module):
    """A scan along the rows of a map, one state for each channel; section 3.2.

        h[l] = exp(-exp(A) d[l]) h[l - 1] + d[l] b[l] u[l],  d = softplus(W2 W1 u + bias)

    ``states`` gives u, h and c of every token; what neighbours make of h comes back to ``read``: ``c h' + D u``.

    Shape: ``[B, H, W, C]``, unchanged; c is ``[B, H, W, 1]``.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.rank = math.ceil(dim / 16)
        self.conv = DepthwiseConv(dim, 5)
        self.x_proj = Linear(dim, self.rank + 2, bias=False)
        self.dt_proj = Linear(self.rank, dim)
        self.rate = nn.Parameter(torch.empty(dim))
        self.skip = nn.Parameter(torch.empty(dim))
        self.fusion = Linear(num_heads, num_heads)
        self.init_weights()

    def init_weights(self) -> None:
        """Steps between 0.001 and 0.1, evenly in their logarithm; rates of -1."""
        step = torch.exp(torch.empty_like(self.dt_proj.bias).uniform_(math.log(1e-3), math.log(1e-1)))
        with torch.no_grad():
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        nn.init.zeros_(self.rate)
        nn.init.ones_(self.skip)

    def states(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, h and c of a map ``[B, H, W, C]``; h in at least fp32."""
        u = F.silu(self.conv(x))
        rank, b, c = self.x_proj(u).split((self.rank, 1, 1), dim=-1)
        step = F.softplus(self.dt_proj(rank))
        tokens = [t.flatten(1, 2) for t in (u, step, b[..., 0])]
        h = selective_scan(tokens[0], tokens[1], -self.rate.exp(), tokens[2])
        return u, h.unflatten(1, (x.shape[1], x.shape[2])), c

    def read(self, u: Tensor, gathered: Tensor, c: Tensor) -> Tensor:
        """From u, the gathered states by head ``[B, H, W, N, D]`` and c to the map ``[B, H, W, C]``."""
        fused = (fuse_heads(gathered, self.fusion.weight) + self.fusion.bias[:, None]).flatten(-2)
        return fused * c + u * self.skip


@register_mixer("attention_scan")
class AttentionScan(nn.Module):
    """Two neighborhoods, then a scan whose states are gathered by the same weights, or global attention; section 3.1.

    Half of the heads attend to the ``size`` x ``size`` nearest tokens; the others, whose values have been told what those
    found, to as many spread over the map.

    Args:
        slot: the place. An odd number of heads is doubled; each has fours of channels.
        size: tokens on a side of a neighborhood.
        scan: scan and gather; else attend globally, with a bias for each pair of tokens of the slot's map.

    Shape: ``[B, H, W, C]``, unchanged.
    """

    def __init__(self, slot: Slot, *, size: int = 7, scan: bool = True) -> None:
        super().__init__()
        dim, heads = slot.dim, slot.num_heads
        heads += heads % 2 * heads  # half of them look far
        head_dim = check_heads(dim, heads)
        if head_dim % 4:
            raise ValueError(f"{dim} channels in {heads} heads are {head_dim} for each, which are not fours. Choose others.")
        self.heads, self.size = (heads, head_dim), size
        self.qkv = Linear(dim, 3 * dim, bias=slot.qkv_bias)
        self.gate = ConvNorm(dim, dim, 1, bias=True)
        self.lepe = DepthwiseConv(dim, 5)
        self.rel_bias = nn.Parameter(torch.zeros(heads // 2, 2 * size - 1, 2 * size - 1))
        tokens = slot.map_size[0] * slot.map_size[1]
        self.pair_bias = None if scan else nn.Parameter(torch.zeros(heads, tokens, tokens))
        self.ssm = StateSpace(dim, heads) if scan else None
        self.norm, self.out_norm = (nn.LayerNorm(dim, eps=EPS) for _ in range(2))
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(slot.proj_drop)

    def resize_state(self, value: Tensor) -> Tensor:
        """A published bias of pairs, of another image size, in the size of this one."""
        return F.interpolate(value[None], size=self.pair_bias.shape[1:], mode="bicubic", align_corners=False)[0]  # type: ignore[union-attr]  # it has one

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, *self.heads)).unbind(-3)
        local = self.lepe(v.flatten(-2))
        q, k = rotate(q), rotate(k)
        near_q, far_q = q.chunk(2, dim=-2)
        near_k, far_k = k.chunk(2, dim=-2)
        values = v.chunk(2, dim=-2)
        first = attend_near(near_q, near_k, values[0], self.rel_bias, self.size)
        second = attend_near(far_q, far_k, first + values[1], self.rel_bias, self.size, spread=True)
        found = torch.cat([first, second], dim=-2)
        if self.ssm is None:
            pairs = resize_pairs(self.pair_bias, x)  # type: ignore[arg-type]  # there is one where there is no scan
            out = attend(*(t.flatten(1, 2) for t in (q, k, found)), bias=pairs).reshape(x.shape)
        else:
            u, h, c = self.ssm.states(found.flatten(-2))
            states = h.to(v.dtype).unflatten(-1, self.heads).chunk(2, dim=-2)
            first = attend_near(near_q, near_k, states[0], self.rel_bias, self.size)
            second = attend_near(far_q, far_k, states[1], self.rel_bias, self.size, spread=True)
            out = self.ssm.read(u, torch.cat([first, second], dim=-2), c)
        out = (self.norm(out) + local) * F.silu(self.gate(x))
        return self.proj_drop(self.proj(self.out_norm(out)))


class LocalMlp(nn.Module):
    """``W2 (h + dw3x3(h))`` with ``h = gelu(W1 x)``: ``[B, H, W, C]``, unchanged."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.fc1(x))
        return self.drop(self.fc2(h + self.dwconv(h)))


class Affine(nn.Module):
    """A learned scale and shift of each channel: ``[..., C]``, unchanged."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), init))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class A2Block(nn.Module):
    """A mixer and an MLP, a depthwise 3x3 convolution added before each: ``[B, H, W, C]``, unchanged.

    ``x + drop_path(scale(f(norm(x))))``, or with ``skip`` ``scale(x) + drop_path(f(norm(x)))``.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float, scale: float | None, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.cpe1, self.cpe2 = DepthwiseConv(dim), DepthwiseConv(dim)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=EPS) for _ in range(2))
        self.attn, self.mlp = attn, mlp
        self.ls1, self.ls2 = (nn.Identity() if scale is None else Affine(dim, scale) for _ in range(2))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.cpe1(x)
        x = self.add(x, self.attn(self.norm1(x)), self.ls1)
        x = x + self.cpe2(x)
        return self.add(x, self.mlp(self.norm2(x)), self.ls2)

    def add(self, x: Tensor, branch: Tensor, scale: nn.Module) -> Tensor:
        """What a branch makes of the residual stream."""
        return scale(x) + self.drop_path(branch) if self.skip else x + self.drop_path(scale(branch))


class A2Mamba(Pyramid):
    """A2Mamba on the pyramid trunk."""

    Config = A2MambaConfig

    cfg: A2MambaConfig

    def make_stem(self) -> nn.Module:
        dim = self.cfg.dims[0]
        return DeepStem(self.cfg.in_chans, (dim // 2, dim // 2, dim, dim), (2, 1, 2, 1))

    def make_downsample(self, i: int) -> nn.Module:
        return ConvNorm(self.cfg.dims[i - 1], self.cfg.dims[i], stride=2)

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg, last = self.cfg, i == len(self.cfg.depths) - 1
        mixer = self.mixer(i, j, lambda: AttentionScan(self.slot(i, j), size=cfg.kernel_size[i], scan=not last))
        mlp = LocalMlp(cfg.dims[i], cfg.mlp_dim(i), cfg.proj_drop_rate)
        return A2Block(cfg.dims[i], mixer, mlp, drop_path, cfg.scale_init[i], cfg.scale_skip)

    def make_norm(self) -> nn.Module:
        return nn.Identity()  # the head has it

    def make_head(self) -> nn.Module:
        cfg = self.cfg
        return ProjectedHead(self.num_features, cfg.head_hidden_size, cfg.num_classes, cfg.global_pool, cfg.drop_rate)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features

    def init_weights(self) -> None:
        super().init_weights()
        init_truncated(self)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: A2MambaConfig) -> dict[str, Tensor]:
        """From LMMMEng/A2Mamba, classifiers and dense backbones."""
        del cfg
        ours = {}
        for key, value in state.items():
            if key.endswith((".rope.angle", ".rpb.1")):
                continue  # computed in forward; the same table under a second name
            for pattern, replacement in PUBLISHED:
                key = re.sub(pattern, replacement, key)
            if key.endswith((".ssm.rate", ".ls1.weight", ".ls2.weight")):
                value = value.flatten()
            elif key.endswith(".pair_bias") and value.ndim == 4:
                value = value.flatten(0, 1)
            elif key.endswith("weight") and value.shape[2:] == (1, 1) and ".gate." not in key:
                value = value.flatten(1)  # a linear layer here is a 1x1 convolution there
            ours[key] = value
        return ours


PUBLISHED = (
    (r"^patch_embed\.(\d+)\.", lambda m: f"stem.{int(m[1]) // 3 * 2}.{('conv', 'norm')[int(m[1]) % 3]}."),
    (r"^layers\.(\d)\.blocks\.", lambda m: f"stages.{int(m[1]) // 2}.blocks."),
    (r"^layers\.(\d)\.0\.", lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample.conv."),
    (r"^layers\.(\d)\.1\.", lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample.norm."),
    (r"\.layer_scale(\d)\.", r".ls\1."),
    (r"\.token_mixer\.", ".attn."),
    (r"\.gate\.0\.", ".gate.conv."),
    (r"\.gate\.1\.", ".gate.norm."),
    (r"\.attn\.proj\.0\.", ".attn.out_norm."),
    (r"\.attn\.proj\.1\.", ".attn.proj."),
    (r"\.rpb\.0$", ".rel_bias"),
    (r"\.rpb\.2$", ".pair_bias"),
    (r"\.ssm\.conv2d\.", ".ssm.conv."),
    (r"\.ssm\.x_proj_weight$", ".ssm.x_proj.weight"),
    (r"\.ssm\.dt_projs_(weight|bias)$", r".ssm.dt_proj.\1"),
    (r"\.ssm\.A_logs$", ".ssm.rate"),
    (r"\.ssm\.Ds$", ".ssm.skip"),
    (r"\.ssm\.state_fusion\.", ".ssm.fusion."),
    (r"^classifier\.0\.", "head.proj."),
    (r"^classifier\.1\.", "head.norm."),
    (r"^classifier\.4\.", "head.fc."),
)

_BASE: Any = {"num_heads": (4, 8, 12, 16), "scale_init": (1.0, 1.0, 1e-6, 1e-6)}

VARIANTS = {
    "a2mamba_micro": A2MambaConfig(
        embed_dim=(16, 32, 48),
        depths=(1, 1, 1),
        num_heads=(2, 2, 4),
        mlp_ratio=2.0,
        kernel_size=(5, 3, 3),
        scale_init=(None, 1.0, 1.0),
        head_hidden_size=64,
        img_size=32,
    ),
    "a2mamba_n": A2MambaConfig(),
    "a2mamba_t": A2MambaConfig(embed_dim=(48, 96, 256, 448), depths=(2, 2, 10, 2), num_heads=(2, 4, 8, 16), drop_path_rate=0.1),
    "a2mamba_s": A2MambaConfig(
        embed_dim=(64, 128, 320, 512),
        depths=(2, 4, 12, 4),
        num_heads=(2, 4, 10, 16),
        scale_init=(None, None, 1.0, 1.0),
        scale_skip=True,
        drop_path_rate=0.2,
    ),
    "a2mamba_b": A2MambaConfig(
        embed_dim=(96, 192, 384, 512), depths=(4, 6, 12, 6), mlp_ratio=(4, 4, 3.75, 3.75), drop_path_rate=0.4, **_BASE
    ),
    "a2mamba_l": A2MambaConfig(
        embed_dim=(96, 192, 448, 672),
        depths=(4, 6, 18, 6),
        mlp_ratio=4.0,
        drop_path_rate=0.5,
        **{**_BASE, "num_heads": (4, 8, 16, 24)},
    ),
}

register_family(__name__, A2Mamba, VARIANTS, first_conv="stem.0.conv")
