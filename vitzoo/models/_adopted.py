"""Families whose implementation stays timm's: its class, with our attention in it and with what every listed model promises.

    class Twins(Adopted, timm.models.twins.Twins): ...

A family's config has the names of timm's constructor; parameters have timm's names. It says how an image becomes the first
map (``embed``) and what a stage makes of a map (``run_stage``), both NCHW; what timm's class does not do for every size or
does not offer (checkpoints, layouts of intermediates, layers for layer-wise learning rates) is here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from vitzoo.layers import with_our_attention
from vitzoo.models._contract import Backbone, configure, wanted_maps


@dataclass(frozen=True)
class AdoptedConfig:
    """What can be chosen of any of these. A family's config adds its own fields, by the names of timm's constructor.

    Attributes:
        depths: blocks of each stage.
        num_heads: heads of each stage.
        img_size: image size that the weights are for (any size can be fed).
        in_chans: channels of the image.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: "avg", or "" to leave the map as it is.
        drop_rate: dropout before the classifier.
        drop_path_rate: drop path of the last block; it rises linearly from 0.
    """

    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    img_size: int | tuple[int, int] | None = 224
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "avg"
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        stages = len(self.depths)
        for name, value in vars(self).items():
            if isinstance(value, tuple) and name != "img_size" and len(value) != stages:
                raise ValueError(
                    f"{name} {value} names {len(value)} stages, depths {self.depths} {stages}. Give one number for each stage."
                )

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per token of each stage's map."""
        return tuple(4 * 2**i for i in range(len(self.depths)))

    def arguments(self) -> dict[str, Any]:
        """Arguments of timm's constructor. The image size is none of them: nothing is built for one size."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "img_size"}


class Adopted(Backbone):
    """A backbone of timm's class, which stands behind this one among the bases of a family."""

    Config: type[AdoptedConfig]
    STEM = r"^stem"
    BLOCKS: ClassVar[list[tuple[str, Any]]]
    """timm's patterns of every parameter behind the stem."""

    output_fmt = "NCHW"

    # parts that timm's class builds
    stem: Any
    stages: Any
    head: Any

    def __init__(self, cfg: AdoptedConfig | None = None, **overrides: Any) -> None:
        cfg = configure(cfg or self.Config(), overrides)
        super(Backbone, self).__init__(**cfg.arguments())
        self.cfg = cfg
        self.grad_checkpointing = False
        with_our_attention(self)

    # -- what a family defines ------------------------------------------------------------------------------------

    def embed(self, image: Tensor) -> Tensor:
        """Image ``[B, in_chans, H, W]`` to what the first stage takes."""
        raise NotImplementedError

    def run_stage(self, i: int, x: Tensor) -> Tensor:
        """Stage ``i``, its downsampling included: ``[B, C, h, w]`` to ``[B, C', h', w']``."""
        raise NotImplementedError

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm before pooling, on ``[B, C, h, w]``; here none."""
        return x

    def run_block(self, block: Any, *args: Any) -> Tensor:
        """A block, recomputed in the backward pass where checkpoints are on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args)
        return block(*args)

    # -- forward --------------------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """Image ``[B, in_chans, H, W]`` to the last, normed map ``[B, C, h, w]``."""
        x = self.embed(x)
        for i in range(self.stages_left):
            x = self.run_stage(i, x)
        return self.final_norm(x)

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
        """The maps that the stages put out, the last one not normed unless asked for.

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
        stages = self.stages_left
        take, last, channels_first = wanted_maps(
            stages, indices, output_fmt, stop_early=stop_early, intermediates_only=intermediates_only
        )
        maps = []
        x = self.embed(x)
        for i in range(last + 1 if stop_early else stages):
            x = self.run_stage(i, x)
            if i in take:
                y = self.final_norm(x) if norm and i == stages - 1 else x
                maps.append(y.contiguous() if channels_first else y.permute(0, 2, 3, 1))
        return maps if intermediates_only else (self.final_norm(x), maps)

    # -- timm's contract ------------------------------------------------------------------------------------------

    @property
    def stages_left(self) -> int:
        """Stages that pruning has left."""
        return len(self.stages)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As timm's, with every parameter in a layer."""
        blocks = [(re_, None) if coarse and depth == (0,) else (re_, depth) for re_, depth in self.BLOCKS]
        return {"stem": self.STEM, "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return super(Backbone, self).get_classifier()  # type: ignore[misc]  # timm's class comes next

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Record the image size that the model is used at; every size can be fed without this."""
        self.record_input_size(img_size)
