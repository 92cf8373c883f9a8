"""MaxViT: multi-axis vision transformer. Tu et al. 2022, arXiv:2204.01697.

New here: every block attends twice, among neighbours in windows and among tokens spread evenly over the map (a grid), so
one block sees the whole image at a cost that grows linearly with it. A squeezed and excited inverted bottleneck (MBConv)
stands before both, goes down where a stage begins, and tells positions from each other.

Two flavors are published, and weights know which one they were trained in. "tf" is google-research/maxvit's, whose weights
timm converted: TensorFlow's "same" padding, tanh GELU, a 2x2 mean as shortcut. "tv" is torchvision's ``maxvit_t``: symmetric
padding, exact GELU, a 3x3 mean that counts the zeros around the map, a convolution in every strided shortcut, no bias where
a norm or nothing follows, and scores divided by the root of the block's width instead of the head's.

Deviations from the published code:
- any image size, where the published code asks for maps that windows and grid divide. Strided convolutions round up; a
  window is cut at the border; for the grid a map is padded after the norm, before the projection, and padded tokens take
  part as keys. At published sizes nothing is cut or padded;
- the window is chosen (``window_size``), not derived from ``img_size``;
- the features are those of the stages (strides 4 to 32); timm's begin with the stem's at stride 2;
- drop path rises to its full rate (timm's rule and torchvision's; the official one ends one block before it), weights are
  drawn from a truncated normal, and a table for another window is resized bicubically (officially bilinearly).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, NormMlpClassifierHead, SqueezeExcite, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from vitzoo.layers import Block, Mlp, PatternAttention, linear
from vitzoo.layers.batchnorm import affine, may_fold
from vitzoo.layers.maps import padded_size
from vitzoo.models._contract import pair
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family
from vitzoo.ops import attend2d
from vitzoo.patterns import Pattern, grid, window

for _name in ("attend2d", "mean_of_cells", "pad_same"):
    torch.fx.wrap(_name)


@dataclass(frozen=True)
class MaxViTConfig(PyramidConfig):
    """Adds to the pyramid's choices.

    Attributes:
        stem_width: channels of the stem.
        window_size: tokens on a side of a window and of the grid, one number or (rows, columns).
        expand_ratio: hidden channels of an MBConv over those it puts out.
        se_ratio: channels between the two layers of squeeze and excite over those that the MBConv puts out.
        head_hidden_size: channels of the classifier's hidden layer; None: those of the last stage.
        flavor: "tf" or "tv"; see the top of this file.
    """

    embed_dim: int | tuple[int, ...] = 64
    depths: tuple[int, ...] = (2, 2, 5, 2)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    stem_width: int = 64
    window_size: int | tuple[int, int] = 7
    expand_ratio: float = 4.0
    se_ratio: float = 0.25
    head_hidden_size: int | None = None
    flavor: str = "tf"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flavor not in ("tf", "tv"):
            raise ValueError(f"flavor is 'tf' or 'tv', got '{self.flavor}'.")

    @property
    def gelu(self) -> str:
        """What the flavor takes for a GELU, in PyTorch's words."""
        return "tanh" if self.flavor == "tf" else "none"


def pad_same(x: Tensor) -> Tensor:
    """Zeros around a map ``[B, C, H, W]`` for a 3x3 convolution of stride 2, as TensorFlow's "same" puts them.

    After the map always one, before it one only where its size is odd; the convolution then gives ``ceil(n / 2)``.
    """
    height, width = x.shape[2], x.shape[3]
    return F.pad(x, (padded_size(width, 2) - width, 1, padded_size(height, 2) - height, 1))


def mean_of_cells(x: Tensor) -> Tensor:
    """Means of 2x2 cells of ``[B, C, H, W]``, sizes rounded up: a cell that the border cuts is averaged over what it has."""
    if not torch.compiler.is_compiling():
        return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    # the same in sizes that simplify: rounding up inside the pooling asks whether its last window begins in the map
    height, width = x.shape[2], x.shape[3]
    padding = (0, padded_size(width, 2) - width, 0, padded_size(height, 2) - height)
    inside = x.new_ones(1, 1, height, width)
    return F.avg_pool2d(F.pad(x, padding), 2) / F.avg_pool2d(F.pad(inside, padding), 2)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of ``[B, C, H, W]`` with the flavor's padding; the two differ where it is strided.

    ``convolve`` is the same with another weight and bias, those that a norm was folded into.
    """

    def __init__(self, dim: int, out_dim: int, stride: int, flavor: str, **kwargs: Any) -> None:
        self.same = stride == 2 and flavor == "tf"
        super().__init__(dim, out_dim, 3, stride=stride, padding=0 if self.same else 1, **kwargs)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(pad_same(x) if self.same else x, weight, bias, self.stride, self.padding, 1, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, self.bias)


def activate(x: Tensor, act: nn.Module) -> Tensor:
    """The GELU of a map that belongs to the caller: written over it where nothing remembers the input."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(act) is not nn.GELU:
        return act(x)
    return torch.ops.aten.gelu_(x, approximate=act.approximate)


def init_convolutions(module: nn.Module) -> None:
    """Truncated normal 0.02 for every convolution, zero biases."""
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            trunc_normal_(each.weight, std=0.02)
            if each.bias is not None:
                nn.init.zeros_(each.bias)


@register_notrace_module
class Stem(nn.Module):
    """Two 3x3 convolutions with norm and GELU between: ``[B, in_chans, H, W]`` to ``[B, ceil(H / 2), ceil(W / 2), C]``."""

    def __init__(self, dim: int, in_chans: int, flavor: str, gelu: str) -> None:
        super().__init__()
        self.conv1 = Conv3x3(in_chans, dim, 2, flavor, bias=flavor == "tf")
        self.norm1 = nn.BatchNorm2d(dim, eps=1e-3, momentum=0.01)
        self.act = nn.GELU(gelu)
        self.conv2 = Conv3x3(dim, dim, 1, flavor)

    def init_weights(self) -> None:
        init_convolutions(self)

    def forward(self, image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=torch.channels_last)
        if may_fold(image, (self.norm1,), (self.conv1, self.act)):
            scale, shift = affine(self.norm1)
            bias = shift if self.conv1.bias is None else shift + scale * self.conv1.bias
            x = activate(self.conv1.convolve(image, self.conv1.weight * scale[:, None, None, None], bias), self.act)
        else:
            x = self.act(self.norm1(self.conv1(image)))
        return self.conv2(x).permute(0, 2, 3, 1)


class Shortcut(nn.Module):
    """What goes past a strided MBConv: a mean that halves the map, then a 1x1 convolution where there is one."""

    def __init__(self, dim: int, out_dim: int, flavor: str) -> None:
        super().__init__()
        self.flavor = flavor
        self.expand = nn.Conv2d(dim, out_dim, 1) if dim != out_dim or flavor == "tv" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(mean_of_cells(x) if self.flavor == "tf" else F.avg_pool2d(x, 3, 2, 1))


@register_notrace_module  # traced apart its norms would not be folded, and the last bits would differ
class MBConv(nn.Module):
    """Inverted bottleneck, pre-norm, with squeeze and excite; it goes down in the depthwise convolution.

    ``shortcut(x) + conv1x1(se(gelu(bn(dw3x3(gelu(bn(conv1x1(bn(x)))))))))``; section 3.3 and appendix of the paper.

    Args:
        dim: channels of the map.
        out_dim: channels of the next one, which the ratios are taken of.
        stride: 1 or 2.
        cfg: ratios, flavor.
        drop_path: probability of skipping the branch for one image, in training.

    Shape: ``[B, H, W, dim]`` to ``[B, ceil(H / stride), ceil(W / stride), out_dim]``.
    """

    def __init__(self, dim: int, out_dim: int, stride: int, cfg: MaxViTConfig, drop_path: float) -> None:
        super().__init__()
        hidden = int(out_dim * cfg.expand_ratio)
        batch_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
        self.shortcut = Shortcut(dim, out_dim, cfg.flavor) if stride == 2 else nn.Identity()
        self.pre_norm = batch_norm(dim)
        self.conv1_1x1 = nn.Conv2d(dim, hidden, 1, bias=False)
        self.norm1 = batch_norm(hidden)
        self.conv2_kxk = Conv3x3(hidden, hidden, stride, cfg.flavor, groups=hidden, bias=False)
        self.norm2 = batch_norm(hidden)
        self.act = nn.GELU(cfg.gelu)
        self.se = SqueezeExcite(hidden, rd_channels=int(out_dim * cfg.se_ratio), act_layer=nn.SiLU)
        self.conv3_1x1 = nn.Conv2d(hidden, out_dim, 1)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def init_weights(self) -> None:
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        norms = (self.pre_norm, self.norm1, self.norm2)
        if may_fold(x, norms, (self.conv1_1x1, self.conv2_kxk, self.act, self.conv3_1x1, *self.se.children(), self.se)):
            return self._forward_folded(x)
        x = x.permute(0, 3, 1, 2)
        y = self.act(self.norm1(self.conv1_1x1(self.pre_norm(x))))
        y = self.act(self.norm2(self.conv2_kxk(y)))
        y = self.conv3_1x1(self.se(y))
        return (self.shortcut(x) + self.drop_path(y)).permute(0, 2, 3, 1)

    def _forward_folded(self, x: Tensor) -> Tensor:
        """The same in eval mode with each norm inside a convolution, 1x1 convolutions as linear layers."""
        (before, offset), (scale1, shift1), (scale2, shift2) = map(affine, (self.pre_norm, self.norm1, self.norm2))
        weight = self.conv1_1x1.weight.flatten(1)
        bias = shift1 + scale1 * (weight * offset).sum(1)
        y = activate(linear(x, weight * before * scale1[:, None], bias), self.act)
        y = self.conv2_kxk.convolve(y.permute(0, 3, 1, 2), self.conv2_kxk.weight * scale2[:, None, None, None], shift2)
        y = activate(y.permute(0, 2, 3, 1), self.act)
        squeezed = self.se.act(linear(y.mean((1, 2), keepdim=True), self.se.fc1.weight.flatten(1), self.se.fc1.bias))
        gate = self.se.gate(linear(squeezed, self.se.fc2.weight.flatten(1), self.se.fc2.bias))
        y = y * gate if torch.is_grad_enabled() else y.mul_(gate)
        y = linear(y, self.conv3_1x1.weight.flatten(1), self.conv3_1x1.bias)
        return y + self.shortcut(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def multiple_of(pattern: Pattern) -> tuple[int, int]:
    """Rows and columns that a map must divide by: a grid's; a window is cut at the border."""
    rows, cols = (span.size if span.step is None else 1 for span in (pattern.rows, pattern.cols))
    return rows or 1, cols or 1


class WidthScaledAttention(PatternAttention):
    """Scores over the root of the width C instead of the head's D: torchvision's slip, kept for its weights."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return attend2d(q, k, v, self.pattern, bias=self.bias(x), scale=(self.num_heads * self.head_dim) ** -0.5)


class MaxViTBlock(nn.Module):
    """MBConv, attention in windows, attention on the grid: ``[B, H, W, dim]`` to ``[B, H', W', out_dim]``."""

    def __init__(self, conv: MBConv, attn_block: Block, attn_grid: Block) -> None:
        super().__init__()
        self.conv = conv
        self.attn_block = attn_block
        self.attn_grid = attn_grid

    def forward(self, x: Tensor) -> Tensor:
        return self.attn_grid(self.attn_block(self.conv(x)))


class MaxViTHead(NormMlpClassifierHead):
    """Pool, LayerNorm, linear, tanh, linear; timm's, the last layer without bias where ``bias`` is False."""

    def __init__(self, *args: Any, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last_bias = bias
        self._drop_bias()

    def reset(self, *args: Any, **kwargs: Any) -> None:
        super().reset(*args, **kwargs)
        self._drop_bias()

    def _drop_bias(self) -> None:
        if not self.last_bias and not isinstance(self.fc, nn.Identity):
            self.fc.bias = None


class MaxViT(Pyramid):
    """MaxViT on the pyramid trunk, in the official and in torchvision's flavor.

    Any image of at least 32 x 32 pixels works. Windows are cut at the border of a map that they do not divide, so a token
    then sees fewer; for the grid such a map is padded with zeros, which take part as keys. ``window_size=img_size // 32``
    is what weights were published with (7 at 224, 12 at 384, 16 at 512), and there neither happens.
    """

    Config = MaxViTConfig

    cfg: MaxViTConfig

    def make_stem(self) -> nn.Module:
        cfg = self.cfg
        return Stem(cfg.stem_width, cfg.in_chans, cfg.flavor, cfg.gelu)

    def make_downsample(self, i: int) -> nn.Module:
        del i
        return nn.Identity()  # a stage goes down in its first block

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        dims = (cfg.stem_width, *cfg.dims)
        conv = MBConv(dims[i + 1] if j else dims[i], dims[i + 1], 1 if j else 2, cfg, drop_path)
        size = pair(cfg.window_size)
        return MaxViTBlock(conv, *(self.make_half(i, j, pattern, drop_path) for pattern in (window(size), grid(size))))

    def make_half(self, i: int, j: int, pattern: Pattern, drop_path: float) -> Block:
        """Attention along ``pattern`` and an MLP, for block ``j`` of stage ``i``."""
        cfg = self.cfg
        attention = PatternAttention if cfg.flavor == "tf" else WidthScaledAttention
        kwargs: Any = {"pad_multiple": multiple_of(pattern), "qkv_bias": cfg.qkv_bias, "proj_drop": cfg.proj_drop_rate}
        attn = self.mixer(i, j, lambda: attention(cfg.dims[i], cfg.num_heads[i], pattern, **kwargs))
        mlp = Mlp(cfg.dims[i], cfg.mlp_dim(i), drop=cfg.proj_drop_rate, gelu=cfg.gelu)
        return Block(cfg.dims[i], attn, drop_path=drop_path, layer_scale=cfg.layer_scale, mlp=mlp)

    def make_norm(self) -> nn.Module:
        return nn.Identity()  # the head has it, behind the pooling

    def make_head(self) -> nn.Module:
        cfg = self.cfg
        return MaxViTHead(
            self.num_features,
            cfg.num_classes,
            hidden_size=cfg.head_hidden_size or self.num_features,
            pool_type=cfg.global_pool,
            drop_rate=cfg.drop_rate,
            norm_layer=partial(LayerNorm2d, eps=1e-5),
            bias=cfg.flavor == "tf",
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:  # its norm and hidden layer too: nothing trains them any more
            self.head.reset(0, "", reset_other=True)
        return take

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, window_size: int | tuple[int, int] | None = None
    ) -> None:
        """Record another image size and, where given, change window and grid: their tables are resized bicubically.

        Args:
            img_size: pixels; every size can be fed without this.
            window_size: tokens on a side of a window and of the grid.
        """
        self.record_input_size(img_size, window_size=window_size)
        if window_size is None:
            return
        self.cfg = type(self.cfg)(**{**vars(self.cfg), "window_size": window_size})
        size = pair(window_size)
        for block in (m for m in self.modules() if isinstance(m, MaxViTBlock)):
            for half, pattern in ((block.attn_block, window(size)), (block.attn_grid, grid(size))):
                if isinstance(half.attn, PatternAttention):
                    half.attn.set_pattern(pattern, multiple_of(pattern), (1, 1))

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: MaxViTConfig) -> dict[str, Tensor]:
        """From timm's layout of the official weights and from torchvision's."""
        del cfg
        ours = {}
        for key, value in state.items():
            name = key
            if name.endswith(("relative_position_index", "height_lookup", "width_lookup")):
                continue  # buffers, rebuilt in forward
            for pattern, replacement in TORCHVISION:
                name = re.sub(pattern, replacement, name)
            name = name.replace("rel_pos.relative_position_bias_table", "rel_bias")
            if name.endswith("relative_position_bias_table"):  # torchvision's, query minus key; timm's is as ours
                name = name.replace("relative_position_bias_table", "rel_bias")
                side = round(len(value) ** 0.5)
                value = value.view(side, side, -1).permute(2, 0, 1).flip(1, 2)
            ours[name] = value
        return ours


# what torchvision calls something, and our name for it; the first two make the others short
TORCHVISION = (
    (r"^blocks\.(\d+)\.layers\.(\d+)\.layers\.", r"stages.\1.blocks.\2."),
    (r"\.MBconv\.(layers\.)?", ".conv."),
    (r"\.conv\.proj\.1\.", ".conv.shortcut.expand."),
    (r"\.conv_a\.0\.", ".conv1_1x1."),
    (r"\.conv_a\.1\.", ".norm1."),
    (r"\.conv_b\.0\.", ".conv2_kxk."),
    (r"\.conv_b\.1\.", ".norm2."),
    (r"\.squeeze_excitation\.", ".se."),
    (r"\.conv_c\.", ".conv3_1x1."),
    (r"\.window_attention\.", ".attn_block."),
    (r"\.grid_attention\.", ".attn_grid."),
    (r"\.attn_layer\.0\.", ".norm1."),
    (r"\.attn_layer\.1\.", ".attn."),
    (r"\.to_qkv\.", ".qkv."),
    (r"\.merge\.", ".proj."),
    (r"\.mlp_layer\.0\.", ".norm2."),
    (r"\.mlp_layer\.1\.", ".mlp.fc1."),
    (r"\.mlp_layer\.3\.", ".mlp.fc2."),
    (r"^stem\.0\.0\.", "stem.conv1."),
    (r"^stem\.0\.1\.", "stem.norm1."),
    (r"^stem\.1\.0\.", "stem.conv2."),
    (r"^classifier\.2\.", "head.norm."),
    (r"^classifier\.3\.", "head.pre_logits.fc."),
    (r"^classifier\.5\.", "head.fc."),
)


def _published(size: str, img_size: int) -> MaxViTConfig:
    embed_dim, stem_width, deep, drop_path_rate = {
        "tiny": (64, 64, False, 0.2),
        "small": (96, 64, False, 0.3),
        "base": (96, 64, True, 0.4),
        "large": (128, 128, True, 0.6),
        "xlarge": (192, 192, True, 0.6),
    }[size]
    return MaxViTConfig(
        embed_dim=embed_dim,
        depths=(2, 6, 14, 2) if deep else (2, 2, 5, 2),
        num_heads=tuple(embed_dim // 32 * 2**i for i in range(4)),
        stem_width=stem_width,
        window_size=img_size // 32,
        img_size=img_size,
        drop_path_rate=drop_path_rate,
    )


VARIANTS = {
    "maxvit_micro": MaxViTConfig(
        embed_dim=32,
        depths=(2, 1, 1),
        num_heads=(1, 2, 4),
        mlp_ratio=2.0,
        stem_width=32,
        window_size=2,
        expand_ratio=2.0,
        img_size=32,
    ),
    **{
        f"maxvit_{size}_tf_{img_size}": _published(size, img_size)
        for size in ("tiny", "small", "base", "large", "xlarge")
        for img_size in (224, 384, 512)
    },
    "maxvit_t_tv": MaxViTConfig(flavor="tv", drop_path_rate=0.2),
}

register_family(__name__, MaxViT, VARIANTS, first_conv="stem.conv1", data={"crop_pct": 1.0}, borrow=True)
