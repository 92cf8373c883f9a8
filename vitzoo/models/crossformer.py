"""CrossFormer and CrossFormer++. Wang et al. 2022, arXiv:2108.00154; Wang et al. 2023, arXiv:2303.06908.

New here: tokens are read at several scales at once, by convolutions of several kernels side by side, and blocks attend in
turn to neighbours (windows) and to tokens a fixed interval apart (dilated windows). A position bias is computed from the
distance by a small MLP, so it has no size. ++ has groups that grow from stage to stage and, after every third block, a
depthwise convolution and a norm in the stream itself, which keep its amplitude.

Deviations from the published code: none in what is computed. A map whose shorter side is no longer than a group is one group,
as in the dense backbone, without the state that one keeps from call to call. Padded keys are left out instead of masked with
-1e6. Images and maps that do not divide are padded with zeros before the convolutions; the published code refuses them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.layers import Block, DepthwiseConv, Mlp, PatternAttention, pad_map
from vitzoo.models._registry import register_family
from vitzoo.models._trunk import Pyramid, PyramidConfig
from vitzoo.ops import attend2d
from vitzoo.patterns import Pattern, dilated_window, everywhere, window

for _name in ("attend_in_groups", "offsets", "pad_map"):
    torch.fx.wrap(_name)


@dataclass(frozen=True)
class CrossFormerConfig(PyramidConfig):
    """Adds to the pyramid's choices.

    Attributes:
        patch_sizes: kernels of the stem, in pixels; the first is its stride.
        merge_sizes: kernels between the stages, in tokens, for each place or once for all; the first is the stride, 2.
        group_size: for each stage the tokens on a side of a group.
        interval: for each stage how far apart the tokens of a group lie in every second block.
        acl: after every third block a depthwise convolution and a norm in the stream (the ++ models).
    """

    depths: tuple[int, ...] = (2, 2, 6, 2)
    patch_sizes: tuple[int, ...] = (4, 8, 16, 32)
    merge_sizes: tuple[tuple[int, ...], ...] = ((2, 4),)
    group_size: tuple[int, ...] = (7, 7, 7, 7)
    interval: tuple[int, ...] = (8, 4, 2, 1)
    acl: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("group_size", self.group_size), ("interval", self.interval)):
            if len(value) != len(self.depths):
                raise ValueError(
                    f"{name} {value} names {len(value)} stages, depths {self.depths} {len(self.depths)}. "
                    "Give one number for each stage in both."
                )
        if len(self.merge_sizes) not in (1, len(self.depths) - 1):
            raise ValueError(
                f"merge_sizes {self.merge_sizes} names {len(self.merge_sizes)} places between {len(self.depths)} stages. "
                "Give one tuple for each place, or one for all."
            )


class CrossScale(nn.Module):
    """Convolutions of several kernels and one stride side by side, section 3.1; the larger a kernel, the fewer its channels.

    Shape: ``[B, H, W, dim]`` to ``[B, ceil(H / stride), ceil(W / stride), out_dim]``, the stride being the first kernel.
    """

    def __init__(self, dim: int, out_dim: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        stride, last = kernels[0], len(kernels) - 1
        self.multiple = (stride, stride)
        self.projs = nn.ModuleList(
            nn.Conv2d(dim, out_dim // 2 ** min(i + 1, last), kernel, stride=stride, padding=(kernel - stride) // 2)
            for i, kernel in enumerate(kernels)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = pad_map(x, self.multiple).permute(0, 3, 1, 2)
        return torch.cat([proj(x) for proj in self.projs], dim=1).permute(0, 2, 3, 1)


class Stem(CrossScale):
    """The tokens of an image ``[B, in_chans, H, W]``, normed."""

    def __init__(self, dim: int, out_dim: int, kernels: tuple[int, ...]) -> None:
        super().__init__(dim, out_dim, kernels)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(super().forward(image.permute(0, 2, 3, 1)))


class Merging(CrossScale):
    """Half as many tokens a side, twice as wide; normed before."""

    def __init__(self, dim: int, out_dim: int, kernels: tuple[int, ...]) -> None:
        super().__init__(dim, out_dim, kernels)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class PositionMlp(nn.Module):
    """The bias of every offset, section 3.2.2: ``[..., 2]`` to ``[..., heads]``. Offsets are in tokens, as they are."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        width = dim // 16
        self.pos_proj = nn.Linear(2, width)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out)) for out in (width, width, heads)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pos3(self.pos2(self.pos1(self.pos_proj(x))))


def one_group(height: int, width: int, group: int) -> int:
    """1 where a map has a side no longer than a group and so is one group itself, else 0; sizes may be symbols."""
    return 1 // (1 + (height - 1) // group * ((width - 1) // group))


def reaches(x: Tensor, group: int) -> tuple[int, int]:
    """How far apart two tokens of a group of the map ``x`` ``[B, H, W, ...]`` can be.

    In a captured graph, which has to hold for both kinds of groups, the sum of what either needs (see ``attend_in_groups``).
    """
    height, width = x.shape[1], x.shape[2]
    if torch.compiler.is_compiling():
        rows, cols = small_size(height, width, group)
        return rows + group - 2, cols + group - 2
    return (height - 1, width - 1) if one_group(height, width, group) else (group - 1, group - 1)


def small_size(height: int, width: int, group: int) -> tuple[int, int]:
    """The size itself where a map is one group, else 2 x 2: the divisions, unlike a product, keep it 2 at least."""
    divisor = 1 + (height - 1) // group * ((width - 1) // group) * 2**16
    return (height - 2) // divisor + 2, (width - 2) // divisor + 2


def offsets(x: Tensor, group: int, like: Tensor) -> Tensor:
    """Offsets of queries from keys, ``[2 * reach_y + 1, 2 * reach_x + 1, 2]``, in the dtype of ``like``.

    Descending, since tables of ``attend2d`` are read at key minus query and the published ones at query minus key.
    """
    axes = [reach - torch.arange(2 * reach + 1, device=x.device) for reach in reaches(x, group)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).to(like.dtype)


def attend_in_groups(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, group: int, table: Tensor) -> Tensor:
    """Attention along ``pattern``, or among all tokens where the map is one group: ``[B, H, W, N, D]``, like q, k and v.

    Args:
        q: queries.
        k: keys.
        v: values.
        pattern: a window or a dilated window.
        group: its size.
        table: the bias ``[N, 2 * reach_y + 1, 2 * reach_x + 1]``, with the reach of ``reaches``.

    A captured graph does both, the second on the map or, where it is not asked for, on four tokens of it.
    """
    height, width = q.shape[1], q.shape[2]
    if not torch.compiler.is_compiling():
        return attend2d(q, k, v, everywhere if one_group(height, width, group) else pattern, bias=table)
    rows, cols = small_size(height, width, group)
    index = torch.arange(2 * group - 1, device=q.device)
    near = attend2d(q, k, v, pattern, bias=table[:, (index + (rows - 1))[:, None], (index + (cols - 1))[None]])
    y, u = (torch.arange(2 * n - 1, device=q.device) + (group - 1) for n in (rows, cols))
    some_y, some_u = torch.arange(rows, device=q.device), torch.arange(cols, device=q.device)
    small = (t[:, some_y[:, None], some_u[None]] for t in (q, k, v))
    far = attend2d(*small, everywhere, bias=table[:, y[:, None], u[None]])
    all_y, all_u = torch.arange(height, device=q.device), torch.arange(width, device=q.device)
    far = far[:, all_y.clamp(max=rows - 1)[:, None], all_u.clamp(max=cols - 1)[None]]
    only = one_group(height, width, group)
    return near * (1 - only) + far * only


class GroupAttention(PatternAttention):
    """Attention in groups of ``group`` x ``group`` tokens that lie ``interval`` apart, with a computed position bias."""

    def __init__(self, dim: int, num_heads: int, group: int, interval: int = 1, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, window(group) if interval == 1 else dilated_window(group, interval), **kwargs)
        self.group = group
        self.pos = PositionMlp(dim, num_heads)

    def make_bias(self, table_size: tuple[int, int]) -> None:
        """Nothing: the bias is computed for the reach at hand."""

    def bias(self, x: Tensor) -> Tensor:
        return self.pos(offsets(x, self.group, self.pos.pos_proj.weight)).permute(2, 0, 1)

    def attend(self, x: Tensor) -> Tensor:
        return attend_in_groups(*self.project(x), self.pattern, self.group, self.bias(x))


class CoolingBlock(Block):
    """A block and the amplitude cooling layer behind it (++, section 3.4): it replaces the stream, with no residual."""

    def __init__(self, dim: int, attn: nn.Module, **kwargs: Any) -> None:
        super().__init__(dim, attn, **kwargs)
        self.ex_conv = DepthwiseConv(dim)
        self.ex_ln = nn.LayerNorm(dim)

    def forward(self, x: Tensor, *grid: int) -> Tensor:
        return self.ex_ln(self.ex_conv(super().forward(x, *grid)))


class CrossFormer(Pyramid):
    """CrossFormer on the pyramid trunk."""

    Config = CrossFormerConfig

    cfg: CrossFormerConfig

    def make_stem(self) -> nn.Module:
        return Stem(self.cfg.in_chans, self.cfg.dims[0], self.cfg.patch_sizes)

    def make_downsample(self, i: int) -> nn.Module:
        return Merging(self.cfg.dims[i - 1], self.cfg.dims[i], self.cfg.merge_sizes[min(i, len(self.cfg.merge_sizes)) - 1])

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        interval = cfg.interval[i] if j % 2 else 1
        kwargs: Any = {"qkv_bias": cfg.qkv_bias, "proj_drop": cfg.proj_drop_rate}
        cooled = cfg.acl and j % 3 == 2 and j < cfg.depths[i] - 1
        return (CoolingBlock if cooled else Block)(
            cfg.dims[i],
            self.mixer(i, j, lambda: GroupAttention(cfg.dims[i], cfg.num_heads[i], cfg.group_size[i], interval, **kwargs)),
            mlp=Mlp(cfg.dims[i], cfg.mlp_dim(i), cfg.proj_drop_rate),
            drop_path=drop_path,
            layer_scale=cfg.layer_scale,
        )

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: CrossFormerConfig) -> dict[str, Tensor]:
        """From cheerss/CrossFormer, both branches, and its dense backbones."""
        del cfg
        ours = {}
        for key, value in state.items():
            if key.endswith((".biases", ".relative_position_index", ".attn_mask")):
                continue  # buffers of the first version, rebuilt in forward
            # published at the end of stage s, ours at the start of the next one
            key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", key)
            key = key.replace("layers.", "stages.").replace(".reductions.", ".projs.").replace("patch_embed.", "stem.")
            ours[re.sub(r"^head\.(?!fc\.)", "head.fc.", key)] = value
        return ours


def _cross(embed_dim: int, depths: tuple[int, ...], drop_path_rate: float) -> CrossFormerConfig:
    heads = tuple(embed_dim // 32 * 2**i for i in range(4))
    return CrossFormerConfig(embed_dim=embed_dim, depths=depths, num_heads=heads, drop_path_rate=drop_path_rate)


def _cross_pp(embed_dim: int, depths: tuple[int, ...], drop_path_rate: float) -> CrossFormerConfig:
    return replace(_cross(embed_dim, depths, drop_path_rate), group_size=(4, 4, 14, 7), interval=(4, 2, 1, 1), acl=True)


VARIANTS = {
    "crossformer_micro": CrossFormerConfig(
        embed_dim=32,
        depths=(2, 1, 4),
        num_heads=(1, 2, 4),
        mlp_ratio=2.0,
        group_size=(3, 3, 2),
        interval=(2, 1, 2),
        patch_sizes=(4, 8),
        acl=True,
        img_size=32,
    ),
    "crossformer_tiny": _cross(64, (1, 1, 8, 6), 0.1),
    "crossformer_small": _cross(96, (2, 2, 6, 2), 0.2),
    "crossformer_base": _cross(96, (2, 2, 18, 2), 0.3),
    "crossformer_large": _cross(128, (2, 2, 18, 2), 0.5),
    "crossformer_pp_small": _cross_pp(64, (2, 2, 18, 2), 0.2),
    "crossformer_pp_base": _cross_pp(96, (2, 2, 18, 2), 0.3),
    "crossformer_pp_large": _cross_pp(128, (2, 2, 18, 2), 0.5),
    "crossformer_pp_huge": _cross_pp(128, (6, 6, 18, 2), 0.5),
}

register_family(__name__, CrossFormer, VARIANTS, first_conv="stem.projs.0")
