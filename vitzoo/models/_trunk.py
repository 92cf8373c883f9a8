"""The two trunks: ``Pyramid`` (stem, stages of blocks, downsampling between) and ``Plain`` (ViT: tokens of one width).

A family derives from one, says in a config dataclass what can be chosen, and builds the pieces that are its own:
``make_stem``, ``make_block``, ``make_downsample``. Inside a pyramid maps are ``[B, H, W, C]``; what leaves it is NCHW.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models import checkpoint, checkpoint_seq
from torch import Tensor, nn

from vitzoo.layers import Block, OnTokens, PatchEmbed, Slot, TokenAttention, build_mixer, resize_positions
from vitzoo.layers.batchnorm import BATCH_NORMS, statistics_kept
from vitzoo.models._contract import Backbone, configure, feature_take_indices, pair

torch.fx.wrap("resize_positions")

MixerChoice = str | tuple[str, int] | None
"""A mixer's name, a name for the first n blocks (the others keep the host's own), or None for the host's own."""


def choose_mixer(choice: MixerChoice, block: int) -> str | None:
    """The name that ``choice`` gives a block; None for the host's own mixer."""
    if isinstance(choice, tuple):
        name, count = choice
        return name if block < count else None
    return choice


def check_mixers(choices: tuple[Any, ...], stages: int) -> None:
    """Raise ValueError unless there is one valid choice for every stage."""
    if len(choices) != stages:
        raise ValueError(f"mixer {choices} names {len(choices)} stages, the model has {stages}. Give one choice for each.")
    for choice in choices:
        pair_of = isinstance(choice, tuple) and len(choice) == 2 and isinstance(choice[0], str) and isinstance(choice[1], int)
        if not (choice is None or isinstance(choice, str) or pair_of):
            raise ValueError(f"A mixer is a name, (name, number of blocks) or None, got {choice!r}.")


def mixer_options(args: Mapping[str, Any] | tuple[tuple[str, Any], ...], place: int, places: int) -> dict[str, Any]:
    """A mixer's keywords at one stage (or block): a tuple with an entry for each place gives that place's entry."""
    return {
        name: value[place] if isinstance(value, tuple) and len(value) == places else value for name, value in dict(args).items()
    }


@dataclass(frozen=True)
class PyramidConfig:
    """What can be chosen of any pyramid. A family's config adds its own fields.

    Attributes:
        embed_dim: channels of the first stage, each next one having ``widen`` times as many; or one number per stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        mlp_ratio: hidden channels of the MLPs over their width, one number or one per stage.
        qkv_bias: bias in the projection to q, k, v.
        layer_scale: initial value of the learned scale on both branches of a block; None for none.
        widen: factor between the widths of neighbouring stages.
        mixer: a mixer of ``vitzoo.list_mixers()`` in place of the family's own: one for all stages, or for each stage a
            name, a name and to how many blocks it goes (("agent", 2)), or None for the family's own.
        mixer_args: options of the mixer by name; a tuple with one entry for each stage gives each its own.
        img_size: image size that the weights are for (any size can be fed).
        in_chans: channels of the image.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: timm's pooling types; "" to leave the map as it is.
        feature_norm: give every map of ``forward_intermediates`` a LayerNorm of its own, and the classifier none
            (the layout of published dense-prediction backbones).
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after projections and in MLPs.
        drop_path_rate: drop path of the last block; it rises linearly from 0.
    """

    embed_dim: int | tuple[int, ...] = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    mlp_ratio: float | tuple[float, ...] = 4.0
    qkv_bias: bool = True
    layer_scale: float | None = None
    widen: int = 2
    mixer: str | tuple[MixerChoice, ...] | None = None
    mixer_args: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    img_size: int | tuple[int, int] | None = 224
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "avg"
    feature_norm: bool = False
    drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"depths {self.depths} names {len(self.depths)} stages, num_heads {self.num_heads} names "
                f"{len(self.num_heads)}. Give one number for each stage in both."
            )
        for name, value in (("embed_dim", self.embed_dim), ("mlp_ratio", self.mlp_ratio)):
            if isinstance(value, tuple) and len(value) != len(self.depths):
                raise ValueError(
                    f"{name} {value} names {len(value)} stages, depths {self.depths} {len(self.depths)}. "
                    "Give one number for each stage in both."
                )
        if isinstance(self.mixer, tuple):
            check_mixers(self.mixer, len(self.depths))

    def mlp_dim(self, i: int) -> int:
        """Hidden channels of the MLPs of stage ``i``."""
        return int(self.dims[i] * (self.mlp_ratio[i] if isinstance(self.mlp_ratio, tuple) else self.mlp_ratio))

    def mixer_of(self, i: int, j: int) -> str | None:
        """Name of the mixer in block ``j`` of stage ``i``; None for the family's own."""
        return choose_mixer(self.mixer[i], j) if isinstance(self.mixer, tuple) else self.mixer

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        if isinstance(self.embed_dim, tuple):
            return self.embed_dim
        return tuple(self.embed_dim * self.widen**i for i in range(len(self.depths)))

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per token of each stage's map."""
        return tuple(4 * 2**i for i in range(len(self.depths)))


CACHED_TOKENS = 6400
"""Tokens that a stage takes through its blocks at once in inference on a CPU: whole images whose maps stay in the cache."""


class Stage(nn.Module):
    """Downsampling (none in the first stage), blocks on a map ``[B, H, W, C]``, and a norm where the family has one."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.run_blocks(self.downsample(x)))

    def run_blocks(self, x: Tensor) -> Tensor:
        """The blocks in turn: with checkpoints, or some images at a time, or plainly."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return self._recomputed(x)
        if self._may_be_cut(x):
            images = max(1, CACHED_TOKENS // (x.shape[1] * x.shape[2]))
            if images < len(x):
                return torch.cat([self.blocks(part) for part in x.split(images)])
        return self.blocks(x)

    def _recomputed(self, x: Tensor) -> Tensor:
        """The blocks with a checkpoint each; what is run a second time does not count twice in a batch norm's statistics."""
        if torch.compiler.is_compiling() or not any(isinstance(m, BATCH_NORMS) for m in self.blocks.modules()):
            return checkpoint_seq(self.blocks, x)  # a compiled graph recomputes values only
        for block in self.blocks.children():
            x = checkpoint(
                block, x, use_reentrant=False, context_fn=lambda block=block: (nullcontext(), statistics_kept(block))
            )
        return x

    def _may_be_cut(self, x: Tensor) -> bool:
        """In eager inference on a CPU, where no hook and no batch norm in training would see a part of the batch."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training:
            return False
        if type(x) is not Tensor or x.device.type != "cpu":  # an FX proxy, a subclass, another device
            return False
        return not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in self.blocks.modules())


class Pyramid(Backbone):
    """Stem, stages, norm, pooled classifier.

    ``forward_features`` returns ``[B, C, ceil(H / s), ceil(W / s)]`` with s the last stride. Any image of at least
    32 x 32 pixels works, odd and non-square ones too.
    """

    Config: type[PyramidConfig] = PyramidConfig
    STEM = r"^stem"

    output_fmt = "NCHW"

    def __init__(self, cfg: PyramidConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        self.cfg = cfg = configure(cfg or self.Config(), overrides)
        self.num_classes, self.in_chans = cfg.num_classes, cfg.in_chans
        self.num_features = cfg.dims[-1]
        rates: Any = calculate_drop_path_rates(cfg.drop_path_rate, list(cfg.depths), stagewise=True)

        self.stem = self.make_stem()
        self.stages = nn.Sequential(
            *(
                Stage(
                    self.make_downsample(i) if i else nn.Identity(),
                    [self.make_block(i, j, rates[i][j]) for j in range(depth)],
                    self.make_stage_norm(i),
                )
                for i, depth in enumerate(cfg.depths)
            )
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(cfg.dims, cfg.strides, strict=True))
        ]
        if cfg.feature_norm:
            if any(not isinstance(stage.norm, nn.Identity) for stage in self.stages.children()):
                raise ValueError(f"{type(self).__name__} norms the output of every stage already. Leave feature_norm False.")
            self.feature_norms = nn.ModuleList(nn.LayerNorm(dim) for dim in cfg.dims)
        self.norm = nn.Identity() if cfg.feature_norm else self.make_norm()
        self.head = self.make_head()
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    # -- what a family builds -------------------------------------------------------------------------------------

    def make_stem(self) -> nn.Module:
        """From the image to the first map."""
        raise NotImplementedError

    def make_downsample(self, i: int) -> nn.Module:
        """What stands before stage ``i`` (from 1 on); an Identity where the map keeps its size."""
        raise NotImplementedError

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        """Block ``j`` of stage ``i``."""
        raise NotImplementedError

    def slot(self, i: int, j: int) -> Slot:
        """The place of block ``j`` of stage ``i``, as a mixer needs to know it."""
        cfg = self.cfg
        height, width = (-(-n // cfg.strides[i]) for n in pair(cfg.img_size or 224))
        return Slot(cfg.dims[i], cfg.num_heads[i], (height, width), i, j, qkv_bias=cfg.qkv_bias, proj_drop=cfg.proj_drop_rate)

    def mixer(self, i: int, j: int, own: Callable[[], nn.Module]) -> nn.Module:
        """The mixer of block ``j`` of stage ``i``: the one that the config names, else what ``own`` builds."""
        name = self.cfg.mixer_of(i, j)
        if name is None:
            return own()
        return build_mixer(name, self.slot(i, j), mixer_options(self.cfg.mixer_args, i, len(self.cfg.depths)))

    def make_stage_norm(self, i: int) -> nn.Module | None:
        """The norm of stage ``i``'s output, for the next stage as for the features; None for none."""
        del i
        return None

    def make_norm(self) -> nn.Module:
        """The norm before the classifier."""
        return nn.LayerNorm(self.num_features)

    def make_head(self) -> Any:
        """The pooled classifier, with what timm's heads have: ``fc``, ``num_features`` and ``reset``."""
        cfg = self.cfg
        return ClassifierHead(self.num_features, cfg.num_classes, cfg.global_pool, cfg.drop_rate)

    # -- forward --------------------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """Image ``[B, in_chans, H, W]`` to the last, normed map ``[B, C, h, w]`` (a view of a channels-last map)."""
        return self.norm(self.stages(self.stem(x))).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool ``[B, C, h, w]`` and classify: ``[B, num_classes]``, or ``[B, C]`` with ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps that the stages put out.

        Args:
            x: image ``[B, in_chans, H, W]``.
            indices: which stages: the last n for an int, all for None; negative ones count from the end.
            norm: put the last map through the final norm as well.
            stop_early: do not run stages after the last one asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone.

        Returns:
            The maps, or ``(forward_features(x), maps)``.

        Raises:
            ValueError: another ``output_fmt``, or ``stop_early`` where the final map is asked for but not reached.
        """
        output_fmt = getattr(output_fmt, "value", output_fmt)
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is 'NCHW' or 'NHWC', got '{output_fmt}'.")
        take, last = feature_take_indices(len(self.stages), indices)
        if stop_early and not intermediates_only and last + 1 < len(self.stages):
            raise ValueError(
                f"stop_early ends after stage {last} of {len(self.stages)}, before the final map. "
                "Ask for intermediates_only=True as well."
            )
        maps = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                y = x
                if self.cfg.feature_norm:
                    y = self.feature_norms[i](y)
                elif norm and i == len(self.stages) - 1:
                    y = self.norm(y)
                maps.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return maps
        return self.norm(x).permute(0, 3, 1, 2), maps

    # -- timm's contract ------------------------------------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last index, and the final norm and head where asked; returns the indices kept."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if self.cfg.feature_norm:
            self.feature_norms = nn.ModuleList(
                norm if i in take else nn.Identity() for i, norm in enumerate(self.feature_norms[: last + 1])
            )
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = (
            r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99999,)),
                (r"^norm|^feature_norms|^head", (99999,)),
            ]
        )
        return {"stem": self.STEM, "blocks": blocks}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier with ``num_classes`` outputs (0: none), and another pooling where given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Record the image size that the model is used at; every size can be fed without this."""
        self.record_input_size(img_size)


@dataclass(frozen=True)
class PlainConfig:
    """What can be chosen of a plain vision transformer; field names are timm's.

    Attributes:
        patch_size: pixels on a side of a patch.
        embed_dim: channels.
        depth: blocks.
        num_heads: heads.
        mlp_ratio: hidden channels of the MLPs over their width.
        qkv_bias: bias in the projection to q, k, v.
        qk_norm: LayerNorm on q and k, per head.
        init_values: initial value of the layer scale; None for none.
        class_token: prepend a learned class token.
        distilled: a second learned token after it (DeiT's distillation token), without its head.
        reg_tokens: register tokens after the class token.
        no_embed_class: positions are for patches only, prefix tokens get none.
        pre_norm: LayerNorm before the blocks.
        mixer: a mixer of ``vitzoo.list_mixers()`` in place of softmax attention, in all blocks or, as (name, n), in the
            first n.
        mixer_args: options of the mixer by name; a tuple with one entry for each block gives each its own.
        fc_norm: norm after pooling instead of before; None: where the pooling is an average.
        img_size: image size that the positions were learned at (any size can be fed).
        in_chans: channels of the image.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: "token", "avg" or "" (all tokens).
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after projections and in MLPs.
        drop_path_rate: drop path of the last block; it rises linearly from 0.
    """

    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_norm: bool = False
    init_values: float | None = None
    class_token: bool = True
    distilled: bool = False
    reg_tokens: int = 0
    no_embed_class: bool = False
    pre_norm: bool = False
    mixer: MixerChoice = None
    mixer_args: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    fc_norm: bool | None = None
    img_size: int | tuple[int, int] = 224
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "token"
    drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.global_pool not in ("", "token", "avg"):
            raise ValueError(f"global_pool is 'token', 'avg' or '', got '{self.global_pool}'.")
        check_mixers((self.mixer,), 1)
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool 'token' needs class_token=True. Pool with 'avg' instead.")

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: class, distillation, registers."""
        return int(self.class_token) + int(self.distilled) + self.reg_tokens

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches at ``img_size``."""
        height, width = pair(self.img_size)
        return -(-height // self.patch_size), -(-width // self.patch_size)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per token after each block."""
        return (self.patch_size,) * self.depth


PLAIN_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "medium": {"embed_dim": 512, "num_heads": 8},
    "base": {"embed_dim": 768, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
"""What the field calls a small or a large vision transformer."""


class Plain(Backbone):
    """A vision transformer: patches, prefix tokens, positions, blocks of one width. Keys are timm's ``VisionTransformer``'s.

    ``forward_features`` returns tokens ``[B, prefix + h * w, C]``. Any image works: it is padded to whole patches and the
    learned positions are resized to its grid (bicubic with low-pass, as timm does).
    """

    Config: type[PlainConfig] = PlainConfig
    STEM = r"^cls_token|^dist_token|^reg_token|^pos_embed|^patch_embed|^norm_pre"
    NORM_EPS = 1e-6

    def __init__(self, cfg: PlainConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        self.cfg = cfg = configure(cfg or self.Config(), overrides)
        self.num_classes, self.in_chans, self.global_pool = cfg.num_classes, cfg.in_chans, cfg.global_pool
        self.num_features = self.embed_dim = self.head_hidden_size = dim = cfg.embed_dim
        self.num_prefix_tokens = cfg.prefix_tokens
        self.grid_size = cfg.grid_size
        self.grad_checkpointing = False
        after_pool = cfg.global_pool == "avg" if cfg.fc_norm is None else cfg.fc_norm

        self.patch_embed = PatchEmbed(dim, cfg.patch_size, cfg.in_chans)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if cfg.class_token else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, dim)) if cfg.distilled else None
        self.reg_token = nn.Parameter(torch.empty(1, cfg.reg_tokens, dim)) if cfg.reg_tokens else None
        positions = self.grid_size[0] * self.grid_size[1] + self.embedded_prefix
        self.pos_embed = nn.Parameter(torch.empty(1, positions, dim))
        self.norm_pre = nn.LayerNorm(dim, eps=self.NORM_EPS) if cfg.pre_norm else nn.Identity()
        rates: Any = calculate_drop_path_rates(cfg.drop_path_rate, cfg.depth)
        self.blocks = nn.Sequential(*(self.make_block(i, rates[i]) for i in range(cfg.depth)))
        self.norm = nn.Identity() if after_pool else nn.LayerNorm(dim, eps=self.NORM_EPS)
        self.fc_norm = nn.LayerNorm(dim, eps=self.NORM_EPS) if after_pool else nn.Identity()
        self.head_drop = nn.Dropout(cfg.drop_rate)
        self.head = self.make_head(cfg.num_classes)
        self.feature_info = [{"num_chs": dim, "reduction": cfg.patch_size, "module": f"blocks.{i}"} for i in range(cfg.depth)]
        self.init_weights()

    @property
    def embedded_prefix(self) -> int:
        """Prefix tokens that have a position of their own."""
        return 0 if self.cfg.no_embed_class else self.num_prefix_tokens

    def make_block(self, i: int, drop_path: float) -> nn.Module:
        """Block ``i``."""
        cfg = self.cfg
        return Block(
            cfg.embed_dim,
            self.make_mixer(i),
            mlp_ratio=cfg.mlp_ratio,
            drop_path=drop_path,
            proj_drop=cfg.proj_drop_rate,
            layer_scale=cfg.init_values,
            norm_eps=self.NORM_EPS,
        )

    def make_mixer(self, i: int) -> nn.Module:
        """The attention of block ``i``, or the mixer that the config names for it."""
        cfg = self.cfg
        kwargs: Any = {"qkv_bias": cfg.qkv_bias, "proj_drop": cfg.proj_drop_rate}
        name = choose_mixer(cfg.mixer, i)
        if name is None:
            return TokenAttention(cfg.embed_dim, cfg.num_heads, qk_norm=cfg.qk_norm, **kwargs)
        slot = Slot(cfg.embed_dim, cfg.num_heads, cfg.grid_size, block=i, prefix_tokens=cfg.prefix_tokens, **kwargs)
        return OnTokens(build_mixer(name, slot, mixer_options(cfg.mixer_args, i, cfg.depth)), cfg.prefix_tokens)

    def make_head(self, num_classes: int) -> nn.Module:
        """A linear classifier, or an Identity without classes."""
        return nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.dist_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)

    # -- forward --------------------------------------------------------------------------------------------------

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image to tokens ``[B, prefix + h * w, C]`` and the grid ``(h, w)``."""
        x = self.patch_embed(x)
        batch, height, width = x.shape[0], x.shape[1], x.shape[2]
        prefix = [t.expand(batch, -1, -1) for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        split = self.embedded_prefix
        x = (x + resize_positions(self.pos_embed[:, split:], x, self.grid_size, antialias=True)).flatten(1, 2)
        if prefix:
            tokens = torch.cat(prefix, dim=1)
            x = torch.cat([tokens + self.pos_embed[:, :split] if split else tokens, x], dim=1)
        return self.norm_pre(x), (height, width)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image ``[B, in_chans, H, W]`` to normed tokens ``[B, prefix + h * w, C]``."""
        x, grid = self.embed(x)
        if any(self.takes_grid(i) for i in range(len(self.blocks))):
            for i in range(len(self.blocks)):
                x = self.run_block(i, x, grid)
        elif self.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def takes_grid(self, i: int) -> bool:
        """Whether block ``i`` is told the rows and columns of the map in its tokens."""
        return choose_mixer(self.cfg.mixer, i) is not None

    def run_block(self, i: int, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Block ``i`` on tokens ``[B, prefix + h * w, C]``; one whose mixer works on a map is told the ``grid`` (h, w)."""
        args = (x, *grid) if self.takes_grid(i) else (x,)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.blocks[i], *args)
        return self.blocks[i](*args)

    def pool(self, x: Tensor) -> Tensor:
        """Tokens ``[B, L, C]`` to ``[B, C]`` (or unchanged where ``global_pool`` is "")."""
        if self.global_pool == "avg":
            return x[:, self.num_prefix_tokens :].mean(dim=1)
        return x[:, 0] if self.global_pool == "token" else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify tokens: ``[B, num_classes]``, or ``[B, C]`` with ``pre_logits``."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What the blocks put out, as maps or as tokens.

        Args:
            x: image ``[B, in_chans, H, W]``.
            indices: which blocks: the last n for an int, all for None; negative ones count from the end.
            return_prefix_tokens: pair every map with its prefix tokens ``[B, prefix, C]``.
            norm: put every output through the final norm.
            stop_early: do not run blocks after the last one asked for.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: return the list alone.

        Returns:
            The outputs, or ``(normed tokens, outputs)``.

        Raises:
            ValueError: another ``output_fmt``.
        """
        output_fmt = getattr(output_fmt, "value", output_fmt)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is 'NCHW' or 'NLC', got '{output_fmt}'.")
        take, last = feature_take_indices(len(self.blocks), indices)
        outputs = []
        x, (height, width) = self.embed(x)
        for i in range(last + 1 if stop_early else len(self.blocks)):
            x = self.run_block(i, x, (height, width))
            if i in take:
                y = self.norm(x) if norm else x
                prefix, y = y[:, : self.num_prefix_tokens], y[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    y = y.reshape(y.shape[0], height, width, self.embed_dim).permute(0, 3, 1, 2).contiguous()
                outputs.append((y, prefix) if return_prefix_tokens and self.num_prefix_tokens else y)
        return outputs if intermediates_only else (self.norm(x), outputs)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: PlainConfig) -> dict[str, Tensor]:
        """From timm's layout, which is ours but for blocks with a chosen mixer: they hold it in ``attn.mixer``."""
        ours = {}
        for key, value in state.items():
            place = re.match(r"blocks\.(\d+)\.attn\.(?!mixer\.)", key)
            if place and choose_mixer(cfg.mixer, int(place[1])) is not None:
                key = f"{place[0]}mixer.{key[place.end() :]}"
            ours[key] = value
        return ours

    # -- timm's contract ------------------------------------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last index, and the norms and head where asked; returns the indices kept."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        del coarse
        return {"stem": self.STEM, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.|^fc_norm|^head", (99999,))]}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier with ``num_classes`` outputs (0: none), and another pooling where given."""
        weight = self.pos_embed
        self.num_classes = num_classes
        if global_pool is not None:
            self.cfg = configure(self.cfg, {"global_pool": global_pool})
            self.global_pool = global_pool
        self.head = self.make_head(num_classes).to(weight.device, weight.dtype).train(self.training)

    @torch.no_grad()
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Resize the learned positions to another image size, for good. Every size can be fed without this."""
        if img_size is None:
            return
        self.record_input_size(img_size)
        grid, split = self.cfg.grid_size, self.embedded_prefix
        if grid != self.grid_size:
            like = self.pos_embed.new_empty(1, *grid, 0)
            resized = resize_positions(self.pos_embed[:, split:], like, self.grid_size, antialias=True).flatten(1, 2)
            self.pos_embed = nn.Parameter(torch.cat([self.pos_embed[:, :split], resized], dim=1))
            self.grid_size = grid
