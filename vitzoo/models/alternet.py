"""AlterNet. Park, Kim 2022, arXiv:2202.06709 ("How do vision transformers work?").

New here: convolutions and attention in turns, by a rule. Convolutions sharpen and attention blurs a map, so each stage of a
pre-activation ResNet ends in pairs of a convolutional block and a block of window attention, more of them in later stages.

Deviations: any image size; a window that leaves the map holds the tokens that are on it. The published code takes only maps
that divide by the window. Its authors have published no weights of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vitzoo.layers import BatchNorm, Linear, Slot
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family
from vitzoo.ops import attend2d
from vitzoo.patterns import window

torch.fx.wrap("attend2d")


@dataclass(frozen=True)
class AlterNetConfig(PyramidConfig):
    """Adds to the pyramid's choices; ``mlp_ratio`` is for nothing, there are no MLPs.

    Attributes:
        embed_dim: channels inside the blocks of each stage; their output has ``expansion`` times as many.
        attentions: for each stage, blocks of attention, each the last of a pair.
        expansion: 1 for blocks of two 3x3 convolutions, 4 for bottlenecks.
        head_dim: channels of a head, whatever the width.
        window_size: tokens on a side of a window.
        stem_pool: a 7x7 stem of stride 2 and pooling; without it a 3x3 stem of stride 1, for small pictures.
    """

    embed_dim: int | tuple[int, ...] = 64
    depths: tuple[int, ...] = (2, 2, 2, 2)
    attentions: tuple[int, ...] = (0, 1, 1, 1)
    expansion: int = 1
    head_dim: int = 64
    window_size: int = 7
    stem_pool: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = len(self.attentions) == len(self.depths)
        if not fits or any(2 * m > n for m, n in zip(self.attentions, self.depths, strict=True)):
            raise ValueError(
                f"attentions {self.attentions} does not fit depths {self.depths}. Give one number for each stage, "
                "at most half of its blocks."
            )

    @property
    def inner_dims(self) -> tuple[int, ...]:
        """Channels inside the blocks of each stage."""
        return super().dims

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(dim * self.expansion for dim in self.inner_dims)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple((4 if self.stem_pool else 1) * 2**i for i in range(len(self.depths)))

    def attends(self, i: int, j: int) -> bool:
        """Whether block ``j`` of stage ``i`` is one of attention: every second one, counted from the end."""
        left = self.depths[i] - j
        return left % 2 == 1 and left < 2 * self.attentions[i]


class Conv(nn.Conv2d):
    """A convolution without bias: ``[B, H, W, dim]`` to ``[B, ceil(H / stride), ceil(W / stride), out_dim]``."""

    def __init__(self, dim: int, out_dim: int, size: int, stride: int = 1) -> None:
        super().__init__(dim, out_dim, size, stride=stride, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stem(Conv):
    """The first convolution, of an image ``[B, in_chans, H, W]``, and its pooling."""

    def __init__(self, in_chans: int, dim: int, pool: bool) -> None:
        super().__init__(in_chans, dim, *((7, 2) if pool else (3, 1)))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        x = super().forward(image.permute(0, 2, 3, 1))
        return self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvBlock(nn.Module):
    """``shortcut(a) + drop_path(W2 relu(bn(W1 a)))``, ``a = relu(bn(x))``; where width and size stay, x is the shortcut.

    With ``expansion`` 1 two 3x3 convolutions; else a 3x3 one of ``inner`` channels between two 1x1.

    Shape: ``[B, H, W, dim]`` to ``[B, ceil(H / stride), ceil(W / stride), inner * expansion]``.
    """

    def __init__(self, dim: int, inner: int, expansion: int, stride: int, drop_path: float) -> None:
        super().__init__()
        out = inner * expansion
        self.norm = BatchNorm(dim)
        self.act = nn.ReLU()
        self.shortcut = Conv(dim, out, 1, stride) if stride > 1 or dim != out else None
        convs = [Conv(dim, inner, 3, stride), Conv(inner, out, 3)]
        if expansion > 1:
            convs = [Conv(dim, inner, 1), Conv(inner, inner, 3, stride), Conv(inner, out, 1)]
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(BatchNorm(inner) for _ in convs[1:])
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(x))
        skip = x if self.shortcut is None else self.shortcut(y)
        y = self.convs[0](y)
        for norm, conv in zip(self.norms, self.convs[1:], strict=True):
            y = conv(self.act(norm(y)))
        return skip + self.drop_path(y)


class SharedBiasAttention(nn.Module):
    """Attention in windows, with one position bias for all heads, which have their own width.

    Shape: ``[B, H, W, dim]`` to ``[B, H, W, out_dim]``, any H and W.
    """

    def __init__(self, dim: int, out_dim: int, num_heads: int, head_dim: int, size: int) -> None:
        super().__init__()
        self.split, self.pattern = (num_heads, head_dim), window(size)
        self.q = Linear(dim, num_heads * head_dim, bias=False)
        self.kv = Linear(dim, 2 * num_heads * head_dim, bias=False)
        self.rel_bias = nn.Parameter(torch.empty(2 * size - 1, 2 * size - 1))
        self.proj = Linear(num_heads * head_dim, out_dim)

    def init_weights(self) -> None:
        """Normal 0.02 for the position bias, as published."""
        nn.init.normal_(self.rel_bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).unflatten(-1, (2, *self.split)).unbind(-3)
        bias = self.rel_bias.expand(self.split[0], -1, -1)
        return self.proj(attend2d(self.q(x).unflatten(-1, self.split), k, v, self.pattern, bias=bias).flatten(-2))


class AttentionBlock(nn.Module):
    """``x + drop_path(attn(bn(W gelu(bn(x)))))``: ``[B, H, W, dim]``, unchanged, with ``inner`` channels between."""

    def __init__(self, dim: int, inner: int, attn: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1 = BatchNorm(dim)
        self.act = nn.GELU()
        self.conv = Linear(dim, inner, bias=False)
        self.norm2 = BatchNorm(inner)
        self.attn = attn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.attn(self.norm2(self.conv(self.act(self.norm1(x))))))


class AlterNet(Pyramid):
    """AlterNet on the pyramid trunk; its blocks go down themselves."""

    Config = AlterNetConfig

    cfg: AlterNetConfig

    def make_stem(self) -> nn.Module:
        return Stem(self.cfg.in_chans, self.cfg.inner_dims[0], self.cfg.stem_pool)

    def make_downsample(self, i: int) -> nn.Module:
        del i
        return nn.Identity()

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        dim, inner = cfg.dims[i], cfg.inner_dims[i]
        if cfg.attends(i, j):
            kwargs: Any = {"num_heads": cfg.num_heads[i], "head_dim": cfg.head_dim, "size": cfg.window_size}
            mixer = self.mixer(i, j, lambda: SharedBiasAttention(inner, dim, **kwargs))
            if cfg.mixer_of(i, j) is not None and inner != dim:
                mixer = nn.Sequential(mixer, Linear(inner, dim))
            return AttentionBlock(dim, inner, mixer, drop_path)
        before = dim if j else cfg.dims[i - 1] if i else inner
        return ConvBlock(before, inner, cfg.expansion, 2 if i and not j else 1, drop_path)

    def slot(self, i: int, j: int) -> Slot:
        return replace(super().slot(i, j), dim=self.cfg.inner_dims[i])

    def make_norm(self) -> nn.Module:
        return nn.Sequential(BatchNorm(self.num_features), nn.ReLU())

    def init_weights(self) -> None:
        """PyTorch's own for convolutions and linear layers, as published: larger ones grow from block to block."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.reset_parameters()

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: AlterNetConfig) -> dict[str, Tensor]:
        """From xxxnell/how-do-vits-work."""
        ours = {}
        for key, value in state.items():
            for pattern, replacement in PUBLISHED:
                key = re.sub(pattern, replacement, key)
            linear = re.search(r"\.(q|kv|proj|conv)\.weight$", key)
            ours[key] = value.flatten(1) if linear and value.ndim == 4 else value
        return ours


PUBLISHED = (
    (r"^layer0\.layer0\.0\.", "stem."),
    (r"^layer([1-9])\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"\.bn\.", ".norm."),
    (r"\.shortcut\.0\.", ".shortcut."),
    (r"\.conv1\.", ".convs.0."),
    (r"\.conv([23])\.0\.", lambda m: f".norms.{int(m[1]) - 2}."),
    (r"\.conv([23])\.2\.", lambda m: f".convs.{int(m[1]) - 1}."),
    (r"\.attn\.attn\.to_(q|kv)\.", r".attn.\1."),
    (r"\.attn\.attn\.to_out\.0\.", ".attn.proj."),
    (r"\.attn\.pos_embedding$", ".attn.rel_bias"),
    (r"^classifier\.0\.norm\.", "norm.0."),
    (r"^classifier\.0\.dense\.", "head.fc."),
)


def _alternet(depths: tuple[int, ...], attentions: tuple[int, ...] = (0, 1, 3, 2), expansion: int = 4) -> AlterNetConfig:
    return AlterNetConfig(depths=depths, attentions=attentions, expansion=expansion, drop_path_rate=0.1)


VARIANTS = {
    "alternet_micro": AlterNetConfig(
        embed_dim=16,
        depths=(1, 2, 2),
        attentions=(0, 1, 1),
        num_heads=(1, 2, 4),
        expansion=2,
        head_dim=16,
        window_size=3,
        stem_pool=False,
        img_size=32,
    ),
    "alternet_18": _alternet((2, 2, 2, 2), (0, 1, 1, 1), 1),
    "alternet_34": _alternet((3, 4, 6, 4), expansion=1),
    "alternet_50": _alternet((3, 4, 6, 4)),
    "alternet_101": _alternet((3, 4, 23, 4)),
    "alternet_152": _alternet((3, 8, 36, 4)),
}

register_family(__name__, AlterNet, VARIANTS, first_conv="stem")
