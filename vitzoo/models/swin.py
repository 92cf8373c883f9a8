"""Swin Transformer, versions 1 and 2. Liu et al. 2021, arXiv:2103.14030; Liu et al. 2022, arXiv:2111.09883.

New here: attention inside windows that shift by half a window from block to block, so cost grows linearly with the
image while neighbouring windows exchange information. V2 normalises the outputs of the branches, compares directions
instead of dot products (cosine attention) and computes the position bias from log-spaced offsets with a small MLP.

Deviations from the published code:
- any image size, padded as in the published dense-prediction backbone: after the norm, before the projection, padded
  tokens taking part as keys;
- the shift is dropped on each axis that one window covers (timm's rule), instead of on both as soon as one is covered.
  ``shift_rule="map"`` is the published classifier's rule, which also shrinks the window, for the one image size it is
  built for; ``"keep"`` is the published dense backbone's, which never drops it. On square maps of the published sizes
  all three agree;
- PatchMerging stands at the start of a stage, and the bias table is stored key minus query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitzoo.layers import Block, Linear, Mlp, PatchEmbed, PatchMerging, PatternAttention, linear, resize_positions
from vitzoo.layers.attention import unit_length
from vitzoo.models._contract import pair
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family
from vitzoo.ops import attend2d
from vitzoo.patterns import Pattern, window

for _name in ("attend2d", "linear", "resize_positions", "unit_length"):
    torch.fx.wrap(_name)


@dataclass(frozen=True)
class SwinConfig(PyramidConfig):
    """Adds to the pyramid's choices.

    Attributes:
        patch_size: pixels on a side of a patch.
        window_size: tokens on a side of a window, one number or one per stage.
        ape: learned absolute positions, added after the patches.
        shift_rule: "axis", "map" or "keep"; see the top of this file.
        version: 1 or 2.
        pretrained_window_sizes: V2: window of each stage in pre-training, which its position MLP was scaled by; 0 where
            it is the window itself.
    """

    patch_size: int = 4
    window_size: int | tuple[int, ...] = 7
    ape: bool = False
    shift_rule: str = "axis"
    version: int = 1
    pretrained_window_sizes: tuple[int, ...] = ()

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.patch_size * 2**i for i in range(len(self.depths)))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift_rule not in ("axis", "map", "keep"):
            raise ValueError(f"shift_rule is 'axis', 'map' or 'keep', got '{self.shift_rule}'.")
        for name, value in (("window_size", self.window_size), ("pretrained_window_sizes", self.pretrained_window_sizes)):
            if isinstance(value, tuple) and value and len(value) != len(self.depths):
                raise ValueError(f"{name} {value} names {len(value)} stages, depths {self.depths} {len(self.depths)}.")


class SwinStem(PatchEmbed):
    """Patches with a LayerNorm and, where ``ape``, learned absolute positions, resized to the map."""

    def __init__(self, cfg: SwinConfig) -> None:
        super().__init__(cfg.dims[0], cfg.patch_size, cfg.in_chans, norm=True)
        height, width = pair(cfg.img_size or 224)
        self.grid_size = (-(-height // cfg.patch_size), -(-width // cfg.patch_size))
        tokens = self.grid_size[0] * self.grid_size[1]
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, cfg.dims[0])) if cfg.ape else None

    def init_weights(self) -> None:
        """Truncated normal 0.02 for the positions."""
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, image: Tensor) -> Tensor:
        x = super().forward(image)
        return x if self.pos_embed is None else x + resize_positions(self.pos_embed, x, self.grid_size)


class CosineAttention(PatternAttention):
    """V2's window attention: ``softmax(cos(q, k) * exp(min(s, log 100)) + bias) v``, section 3 of its paper.

    The bias of an offset is ``16 * sigmoid(mlp(t))``, t its sign times the log of its size, scaled by ``reference``
    (the window of pre-training), so a model moves to another window without resizing a table. k has no bias.
    """

    def __init__(self, dim: int, num_heads: int, pattern: Pattern, *, reference: tuple[int, int], **kwargs: Any) -> None:
        super().__init__(dim, num_heads, pattern, **kwargs)
        self.reference = reference
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), 10.0).log())

    def make_bias(self, table_size: tuple[int, int]) -> None:
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, self.num_heads, bias=False))

    def bias(self, x: Tensor) -> Tensor:
        axes = []
        for span, reference in zip((self.pattern.rows, self.pattern.cols), self.reference, strict=True):
            reach = span.reach()
            query_minus_key = torch.arange(reach, -reach - 1, -1, device=x.device, dtype=torch.float32)
            t = query_minus_key * (8 / max(reference - 1, 1))
            axes.append(t.sign() * torch.log2(1 + t.abs()) / 3)
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).to(self.logit_scale.dtype)
        return 16 * torch.sigmoid(self.cpb_mlp(coords).permute(2, 0, 1))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        scale = self.logit_scale.clamp(max=4.605170185988092).exp().squeeze(-1)  # at most 100
        return unit_length(q) * scale.to(q.dtype), unit_length(k), v

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return attend2d(q, k, v, self.pattern, bias=self.bias(x), scale=1.0)

    def set_pattern(self, pattern: Pattern, pad_multiple: tuple[int, int], pad_minimum: tuple[int, int]) -> None:
        """Use another window from now on; ``reference`` stays, that is what it is for."""
        self.pattern, self.pad_multiple, self.pad_minimum = pattern, pad_multiple, pad_minimum


class Swin(Pyramid):
    """Swin Transformer V1 or V2 on the pyramid trunk."""

    Config = SwinConfig
    NO_DECAY: ClassVar[tuple[str, ...]] = (*Pyramid.NO_DECAY, "cpb_mlp", "logit_scale")

    cfg: SwinConfig

    def make_stem(self) -> nn.Module:
        return SwinStem(self.cfg)

    def make_downsample(self, i: int) -> nn.Module:
        return PatchMerging(self.cfg.dims[i - 1], self.cfg.dims[i], post_norm=self.cfg.version == 2)

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        pattern, size = self.window_of(i, j)
        kwargs: dict[str, Any] = {"pad_multiple": size, "qkv_bias": cfg.qkv_bias, "proj_drop": cfg.proj_drop_rate}
        if cfg.version == 2:
            pretrained = cfg.pretrained_window_sizes[i] if cfg.pretrained_window_sizes else 0
            kwargs["reference"] = (pretrained, pretrained) if pretrained else size
        attention = CosineAttention if cfg.version == 2 else PatternAttention
        return Block(
            cfg.dims[i],
            self.mixer(i, j, lambda: attention(cfg.dims[i], cfg.num_heads[i], pattern, **kwargs)),
            mlp=Mlp(cfg.dims[i], cfg.mlp_dim(i), cfg.proj_drop_rate),
            drop_path=drop_path,
            layer_scale=cfg.layer_scale,
            post_norm=cfg.version == 2,
        )

    def window_of(self, i: int, j: int) -> tuple[Pattern, tuple[int, int]]:
        """The pattern of block ``j`` of stage ``i`` (odd blocks shift), and the window's rows and columns."""
        cfg = self.cfg
        size = cfg.window_size if isinstance(cfg.window_size, int) else cfg.window_size[i]
        shift = size // 2 if j % 2 else 0
        if cfg.shift_rule == "map":
            smaller = min(-(-n // cfg.strides[i]) for n in pair(cfg.img_size or 224))
            size, shift = min(size, smaller), shift if smaller > size else 0
        edge = "cover" if cfg.shift_rule == "axis" else "truncate"
        return window(size, shift=shift, edge=edge), (size, size)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        window_size: int | tuple[int, ...] | None = None,
    ) -> None:
        """Record another image size and, where given, change the window: V1's tables are resized bicubically.

        Args:
            img_size: pixels; every size can be fed without this.
            window_size: tokens on a side of a window, one number or one per stage.
        """
        self.record_input_size(img_size, window_size=window_size)
        if window_size is not None:
            self.cfg = type(self.cfg)(**{**vars(self.cfg), "window_size": window_size})
        for i, stage in enumerate(self.stages):
            for j, block in enumerate(stage.get_submodule("blocks").children()):
                pattern, size = self.window_of(i, j)
                attn: Any = block.get_submodule("attn")
                if self.cfg.mixer_of(i, j) is None and pattern != attn.pattern:
                    attn.set_pattern(pattern, size, (1, 1))

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: Any) -> dict[str, Tensor]:
        """From the layouts of microsoft/Swin-Transformer, its dense-prediction backbone, and timm."""
        del cfg
        # the published code merges at the end of stage i, timm (as we do) at the start of stage i + 1
        timm = "layers.0.downsample.reduction.weight" not in state and any(key.startswith("head.fc.") for key in state)
        ours = {}
        for key, value in state.items():
            head, *rest = key.split(".")
            if rest and rest[-1] in ("relative_position_index", "relative_coords_table", "attn_mask"):
                continue  # buffers, rebuilt in forward
            if head == "layers":
                i = int(rest[0]) + (rest[1] == "downsample" and not timm)
                key = ".".join(["stages", str(i), *rest[1:]])
            elif head == "patch_embed":
                key = ".".join(["stem", *rest])
            elif head == "absolute_pos_embed":
                key = "stem.pos_embed"
            elif head == "head" and rest[0] != "fc":
                key = ".".join(["head.fc", *rest])
            elif head.startswith("norm") and head != "norm":
                key = ".".join(["feature_norms", head[4:], *rest])
            if key.endswith("relative_position_bias_table"):
                key = key.replace("relative_position_bias_table", "rel_bias")
                side = round(len(value) ** 0.5)
                value = value.view(side, side, -1).permute(2, 0, 1).flip(1, 2)  # query minus key to key minus query
            ours[key] = value
        return ours


def _v1(embed_dim: int, depth: int, window_size: int | tuple[int, ...] = 7, img_size: int = 224, **kwargs: Any) -> SwinConfig:
    first = embed_dim // 32
    kwargs.setdefault("num_heads", tuple(first * 2**i for i in range(4)))
    kwargs.setdefault("drop_path_rate", {6: 0.2, 18: 0.3 if embed_dim == 96 else 0.5}[depth])
    return SwinConfig(embed_dim=embed_dim, depths=(2, 2, depth, 2), window_size=window_size, img_size=img_size, **kwargs)


def _v2(embed_dim: int, depth: int, window: int, img_size: int, pretrained: int = 0) -> SwinConfig:
    # at the published size the last map is smaller than the window, which shrinks to it
    last = min(window, img_size // 32)
    return _v1(
        embed_dim,
        depth,
        window_size=(window, window, window, last),
        img_size=img_size,
        version=2,
        pretrained_window_sizes=(pretrained, pretrained, pretrained, pretrained // 2) if pretrained else (),
    )


VARIANTS = {
    "swin_tiny_patch4_window7_224": _v1(96, 6),
    "swin_small_patch4_window7_224": _v1(96, 18),
    "swin_base_patch4_window7_224": _v1(128, 18),
    "swin_base_patch4_window12_384": _v1(128, 18, 12, 384),
    "swin_large_patch4_window7_224": _v1(192, 18, drop_path_rate=0.2),
    "swin_large_patch4_window12_384": _v1(192, 18, 12, 384, drop_path_rate=0.2),
    "swin_tiny_c24_patch4_window8_256": _v1(96, 6, 8, 256, num_heads=(4, 8, 16, 32)),
    "swin_micro": SwinConfig(
        embed_dim=32, depths=(2, 2, 2), num_heads=(1, 2, 4), window_size=(4, 4, 2), patch_size=2, img_size=32
    ),
    "swinv2_tiny_window8_256": _v2(96, 6, 8, 256),
    "swinv2_tiny_window16_256": _v2(96, 6, 16, 256),
    "swinv2_small_window8_256": _v2(96, 18, 8, 256),
    "swinv2_small_window16_256": _v2(96, 18, 16, 256),
    "swinv2_base_window8_256": _v2(128, 18, 8, 256),
    "swinv2_base_window16_256": _v2(128, 18, 16, 256),
    "swinv2_base_window12_192": _v2(128, 18, 12, 192),
    "swinv2_base_window12to16_192to256": _v2(128, 18, 16, 256, pretrained=12),
    "swinv2_base_window12to24_192to384": _v2(128, 18, 24, 384, pretrained=12),
    "swinv2_large_window12_192": _v2(192, 18, 12, 192),
    "swinv2_large_window12to16_192to256": _v2(192, 18, 16, 256, pretrained=12),
    "swinv2_large_window12to24_192to384": _v2(192, 18, 24, 384, pretrained=12),
    "swinv2_micro": SwinConfig(
        embed_dim=32, depths=(2, 2, 2), num_heads=(1, 2, 4), window_size=(4, 4, 2), patch_size=2, img_size=32, version=2
    ),
}

register_family(__name__, Swin, VARIANTS, first_conv="stem.proj")
