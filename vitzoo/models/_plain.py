"""The trunk of plain vision transformers: patches, prefix tokens, blocks of one width."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import checkpoint, checkpoint_seq
from torch import Tensor, nn

from vitzoo.layers import Block, OnTokens, PatchEmbed, Slot, TokenAttention, build_mixer, resize_positions
from vitzoo.layers.mixers import MixerChoice, check_mixers, choose_mixer, mixer_options
from vitzoo.models._contract import Backbone, configure, feature_take_indices, pair

torch.fx.wrap("resize_positions")


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
        return self.finish(x, grid)

    def finish(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the last block put out, as ``forward_features`` returns it; ``grid`` is its rows and columns of patches."""
        del grid
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
            The outputs, or ``(what forward_features returns, outputs)``.

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
        return outputs if intermediates_only else (self.finish(x, (height, width)), outputs)

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
