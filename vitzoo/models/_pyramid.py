"""The trunk of hierarchical backbones: a stem, stages of blocks, downsampling between them.

A family derives from ``Pyramid``, says in a config dataclass what can be chosen, and builds the pieces that are its own:
``make_stem``, ``make_block``, ``make_downsample``. Inside maps are ``[B, H, W, C]``; what leaves it is NCHW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates
from timm.models import checkpoint, checkpoint_seq
from torch import Tensor, nn

from vitzoo.layers import Slot, build_mixer
from vitzoo.layers.batchnorm import BATCH_NORMS, statistics_kept
from vitzoo.layers.mixers import MixerChoice, check_mixers, choose_mixer, mixer_options
from vitzoo.models._contract import Backbone, configure, feature_take_indices, pair, wanted_maps


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
        """In eager inference on a CPU, where nothing that should see all of the batch, such as a hook, sees a part of it."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training:
            return False
        if type(x) is not Tensor or x.device.type != "cpu":  # an FX proxy, a subclass, another device
            return False
        return not any(
            m.training or m._forward_hooks or m._forward_pre_hooks or getattr(m, "sees_batch", False)
            for m in self.blocks.modules()
        )


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

    def as_map(self, i: int, x: Tensor) -> Tensor:
        """The map in what stage ``i`` puts out, which is more where a class token travels with it."""
        del i
        return x

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
        take, last, channels_first = wanted_maps(
            len(self.stages), indices, output_fmt, stop_early=stop_early, intermediates_only=intermediates_only
        )
        maps = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                if norm and i == len(self.stages) - 1 and not self.cfg.feature_norm:
                    y = self.norm(x)
                else:
                    y = self.as_map(i, x)
                    y = self.feature_norms[i](y) if self.cfg.feature_norm else y
                maps.append(y.permute(0, 3, 1, 2).contiguous() if channels_first else y)
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
