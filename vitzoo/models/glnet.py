"""GLNet: convolution and attention side by side, at different granularity. Zhu et al. 2024, arXiv:2411.14429.

New here: GLMix. Convolutions see the map of all tokens; attention sees a few slots only, into which the tokens are clustered
softly by likeness and from which they take back what the slots have learned of each other. Each slot gathers a thing in the
picture, which can be looked at (``slot_maps``).

Deviations: images whose sides do not divide are padded before non-overlapping patches (``layout="stl"``), so that the strides
hold; ``drop_odd`` leaves rows and columns out instead, as published. The second classifier of ``*_tklb`` takes part in the
logits in training as it does in inference; token labelling itself, which cuts and pastes inside the batch and wants labels of
tokens, is not here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead
from torch import Tensor, nn

from vitzoo.layers import (
    BatchNorm,
    Block,
    ConvNorm,
    ConvNormStem,
    DepthwiseConv,
    DepthwiseMlp,
    Linear,
    Mlp,
    NormedPatches,
    Slot,
    TokenAttention,
    build_mixer,
    register_mixer,
)
from vitzoo.layers.agent import pool_map
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family

torch.fx.wrap("pool_map")

LAYOUTS = ("glnet", "stl")
MIXING = ("glmix", "alternate", "attend")


@dataclass(frozen=True)
class GLNetConfig(PyramidConfig):
    """Adds to the pyramid's choices.

    Attributes:
        mixing: what the blocks of each stage do: "glmix", "attend" among all tokens, or "alternate", which begins with GLMix.
        slots: rows and columns of the cells whose means the slots begin with.
        learned_slots: slots begin with learned vectors, the same for every image.
        layout: "glnet", or "stl" for the shell of Swin-T: patches that do not overlap, no convolutions but GLMix's.
        drop_odd: stl: leave out rows and columns that do not fill a patch, as published, instead of padding them.
        token_head: a second classifier, of tokens; half the largest of its logits is added.
    """

    embed_dim: int | tuple[int, ...] = 64
    depths: tuple[int, ...] = (4, 4, 18, 4)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    mlp_ratio: float | tuple[float, ...] = 3.0
    mixing: tuple[str, ...] = ("glmix", "glmix", "alternate", "attend")
    slots: tuple[int, int] = (8, 8)
    learned_slots: bool = False
    layout: str = "glnet"
    drop_odd: bool = False
    token_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is one of {', '.join(LAYOUTS)}, got '{self.layout}'.")
        if len(self.mixing) != len(self.depths) or not set(self.mixing) <= set(MIXING):
            raise ValueError(
                f"mixing {self.mixing} does not fit {len(self.depths)} stages. Give each one of {', '.join(MIXING)}."
            )


@register_mixer("glmix")
class GLMix(nn.Module):
    """Attention among slots of tokens, and convolutions of the map, in parallel; section 3.2.

    With tokens t and what slots begin with, z, both over their lengths, times a learned number s:

        logits = s z t^T;  c = softmax_tokens(logits) tokens;  softmax_slots(logits)^T attention(c) + convolutions(map)

    Args:
        slot: the place it is built for.
        slots: rows and columns of the cells of the map whose means are z.
        learned_slots: z is learned instead.

    Shape: ``[B, H, W, C]``, unchanged, any H and W.
    """

    def __init__(self, slot: Slot, *, slots: tuple[int, int] = (8, 8), learned_slots: bool = False) -> None:
        super().__init__()
        dim = slot.dim
        self.slots = slots
        self.scale = nn.Parameter(torch.tensor(dim**-0.5))
        self.start = nn.Parameter(torch.empty(1, slots[0] * slots[1], dim)) if learned_slots else None
        self.relation = TokenAttention(dim, slot.num_heads, qkv_bias=slot.qkv_bias)
        self.conv = nn.Sequential(Linear(dim, dim), DepthwiseConv(dim, 5), Linear(dim, dim))
        self.proj_drop = nn.Dropout(slot.proj_drop)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """C ** -0.5 for the scale, normal 0.02 for learned slots."""
        self.scale.fill_(self.relation.qkv.in_features**-0.5)
        if self.start is not None:
            nn.init.normal_(self.start, std=0.02)

    def logits(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """How much tokens and slots are alike, times the scale.

        Args:
            x: ``[B, H, W, C]``.
            source: the map ``[B, H, W, C]`` from which the slots begin; ``x`` unless given.

        Returns:
            ``[B, S, H * W]``.
        """
        start = pool_map(x if source is None else source, self.slots) if self.start is None else self.start
        tokens = F.normalize(x.flatten(1, 2), dim=-1) * self.scale
        return F.normalize(start, dim=-1) @ tokens.mT

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        logits = self.logits(x, source)
        clustered = logits.softmax(dim=2).to(x.dtype) @ x.flatten(1, 2)
        related = logits.softmax(dim=1).mT.to(x.dtype) @ self.relation(clustered)
        return self.proj_drop(related.view_as(x) + self.conv(x))


class GLBlock(Block):
    """A block behind a depthwise 3x3 convolution with a shortcut, where ``positioned``; slots begin before both."""

    def __init__(self, dim: int, attn: nn.Module, *, positioned: bool, **kwargs: Any) -> None:
        super().__init__(dim, attn, **kwargs)
        self.pos_conv = DepthwiseConv(dim) if positioned else None

    def forward(self, x: Tensor, *grid: int) -> Tensor:
        del grid
        source: Any = x
        y = x if self.pos_conv is None else x + self.pos_conv(x)
        return super().forward(y, source) if isinstance(self.attn, GLMix) else super().forward(y)


class FinalNorm(BatchNorm):
    """Batch norm of a map ``[B, H, W, C]`` whose strides, and those of its gradient, are fixed.

    That costs nothing, and without it a compiled backward pass guesses them wrongly where two classifiers read the map.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous()).contiguous()


class TokenHead(ClassifierHead):
    """A classifier of the mean, and half the largest logit over all places of a second one, ``aux``, of tokens.

    Shape: ``[B, C, h, w]`` to ``[B, num_classes]``.
    """

    def __init__(self, dim: int, num_classes: int, pool_type: str, drop_rate: float) -> None:
        super().__init__(dim, num_classes, pool_type, drop_rate)
        self.make_aux(num_classes)

    def make_aux(self, num_classes: int) -> None:
        """Build the second classifier; an Identity without classes."""
        self.aux: nn.Module = nn.Linear(self.in_features, num_classes) if num_classes else nn.Identity()

    def reset(self, num_classes: int, pool_type: str | None = None, **kwargs: Any) -> None:
        """Two fresh classifiers, and another pooling where given."""
        like = next(self.parameters(), torch.empty(()))
        super().reset(num_classes, pool_type, **kwargs)
        self.make_aux(num_classes)
        self.to(like.device, like.dtype).train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        out = super().forward(x, pre_logits=pre_logits)
        if pre_logits or isinstance(self.aux, nn.Identity):
            return out
        return out + 0.5 * self.aux(x.permute(0, 2, 3, 1)).amax(dim=(1, 2))


class GLNet(Pyramid):
    """GLNet on the pyramid trunk."""

    Config = GLNetConfig

    cfg: GLNetConfig

    def make_stem(self) -> nn.Module:
        cfg = self.cfg
        if cfg.layout == "stl":
            return NormedPatches(cfg.in_chans, cfg.dims[0], 4, pad=not cfg.drop_odd, stem=True)
        return ConvNormStem(cfg.in_chans, cfg.dims[0] // 2, cfg.dims[0], bias=True)

    def make_downsample(self, i: int) -> nn.Module:
        cfg = self.cfg
        if cfg.layout == "stl":
            return NormedPatches(cfg.dims[i - 1], cfg.dims[i], 2, pad=not cfg.drop_odd)
        return ConvNorm(cfg.dims[i - 1], cfg.dims[i], 3, stride=2, bias=True)

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        dim, hidden, drop = cfg.dims[i], cfg.mlp_dim(i), cfg.proj_drop_rate
        return GLBlock(
            dim,
            self.mixer(i, j, lambda: self.make_mixer(i, j)),
            positioned=cfg.layout == "glnet",
            mlp=Mlp(dim, hidden, drop) if cfg.layout == "stl" else DepthwiseMlp(dim, hidden, drop, residual=True),
            drop_path=drop_path,
            layer_scale=cfg.layer_scale,
            norm_eps=1e-6,
        )

    def make_mixer(self, i: int, j: int) -> nn.Module:
        """GLMix or attention in block ``j`` of stage ``i``."""
        cfg, mixing = self.cfg, self.cfg.mixing[i]
        if mixing == "attend" or (mixing == "alternate" and j % 2):
            return build_mixer("global", self.slot(i, j), {})
        return GLMix(self.slot(i, j), slots=cfg.slots, learned_slots=cfg.learned_slots)

    def make_norm(self) -> nn.Module:
        return FinalNorm(self.num_features)

    def make_head(self) -> Any:
        cfg = self.cfg
        head = TokenHead if cfg.token_head else ClassifierHead
        return head(self.num_features, cfg.num_classes, cfg.global_pool, cfg.drop_rate)

    @torch.jit.ignore
    def get_classifier(self) -> Any:
        return (self.head.fc, self.head.aux) if self.cfg.token_head else self.head.fc

    @torch.no_grad()
    def slot_maps(self, image: Tensor) -> dict[str, Tensor]:
        """How much of every token's answer comes from which slot, in every block with slots.

        Args:
            image: ``[B, in_chans, H, W]``.

        Returns:
            ``[B, S, h, w]`` by the name of the mixer, ``stages.0.blocks.0.attn`` first; over the slots they sum to one.
        """
        maps: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(mixer: GLMix, args: tuple[Tensor, ...]) -> None:
                maps[name] = mixer.logits(*args).softmax(dim=1).unflatten(2, args[0].shape[1:3])

            return hook

        mixers = [(name, m) for name, m in self.named_modules() if isinstance(m, GLMix)]
        handles = [mixer.register_forward_pre_hook(keep(name)) for name, mixer in mixers]
        try:
            self.forward_features(image)
        finally:
            for handle in handles:
                handle.remove()
        return maps

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: GLNetConfig) -> dict[str, Tensor]:
        """From rayleizhu/GLMix, with and without token labelling."""
        ours = {}
        for key, value in state.items():
            for pattern, replacement in (*DOWNSAMPLING[cfg.layout], *PUBLISHED):
                key = re.sub(pattern, replacement, key)
            # what is a linear layer here is a 1x1 convolution there
            value = value.flatten(1) if key.endswith(LINEAR) else value.flatten() if key.endswith(".gamma") else value
            ours[key] = value
        return ours


LINEAR = ("attn.conv.0.weight", "attn.conv.2.weight", "mlp.fc1.weight", "mlp.fc2.weight")

DOWNSAMPLING = {
    "glnet": (
        (r"^downsample_layers\.0\.1\.", "stem.conv1.conv."),
        (r"^downsample_layers\.0\.2\.", "stem.conv1.norm."),
        (r"^downsample_layers\.0\.4\.", "stem.conv2.conv."),
        (r"^downsample_layers\.0\.5\.", "stem.conv2.norm."),
        (r"^downsample_layers\.(\d)\.0\.", r"stages.\1.downsample.conv."),
        (r"^downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.norm."),
    ),
    "stl": (
        (r"^downsample_layers\.0\.0\.", "stem.proj."),
        (r"^downsample_layers\.0\.1\.", "stem.norm."),
        (r"^downsample_layers\.(\d)\.0\.", r"stages.\1.downsample.norm."),
        (r"^downsample_layers\.(\d)\.1\.", r"stages.\1.downsample.proj."),
    ),
}

PUBLISHED = (
    (r"\.slot_scale$", ".attn.scale"),
    (r"\.init_slots$", ".attn.start"),
    (r"\.relation_mha\.", ".attn.relation."),
    (r"\.mha_op\.", ".attn."),
    (r"\.in_proj_(weight|bias)$", r".qkv.\1"),
    (r"\.out_proj\.", ".proj."),
    (r"\.feature_conv\.", ".attn.conv."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.1\.", ".mlp.dwconv."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^tklb_aux_head\.", "head.aux."),
    (r"^head\.(?!fc\.|aux\.)", "head.fc."),
)

_4G: Any = {"drop_path_rate": 0.15}
_9G: Any = {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.3}
_16G: Any = {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "layer_scale": 1e-4, "drop_path_rate": 0.4}
_TKLB: Any = {"token_head": True, "drop_path_rate": 0.1}
_STL: Any = {
    **_9G,
    "depths": (2, 2, 6, 2),
    "mlp_ratio": 4.0,
    "mixing": ("glmix", "glmix", "glmix", "attend"),
    "layout": "stl",
    "drop_path_rate": 0.1,
}

VARIANTS = {
    "glnet_micro": GLNetConfig(
        embed_dim=16,
        depths=(1, 2, 1),
        num_heads=(1, 2, 4),
        mlp_ratio=2.0,
        mixing=("glmix", "alternate", "attend"),
        slots=(2, 2),
        token_head=True,
        img_size=32,
    ),
    "glnet_4g": GLNetConfig(**_4G),
    "glnet_9g": GLNetConfig(**_9G),
    "glnet_16g": GLNetConfig(**_16G),
    "glnet_4g_tklb": GLNetConfig(**{**_4G, **_TKLB}),
    "glnet_9g_tklb": GLNetConfig(**{**_9G, **_TKLB}),
    "glnet_stl": GLNetConfig(**_STL),
    "glnet_stl_paramslot": GLNetConfig(**_STL, learned_slots=True),
}

for _stl, _token in ((False, False), (False, True), (True, False)):
    _members = {n: c for n, c in VARIANTS.items() if ((c.layout == "stl"), c.token_head) == (_stl, _token)}
    _classifier = ("head.fc", "head.aux") if _token else "head.fc"
    _first_conv = "stem.proj" if _stl else "stem.conv1.conv"
    register_family(__name__, GLNet, _members, first_conv=_first_conv, classifier=_classifier)
