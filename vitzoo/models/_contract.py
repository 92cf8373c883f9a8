"""timm's model contract, once: what every backbone answers, whatever its trunk.

timm, segmentation_models_pytorch, Hugging Face and torchvision know a backbone by these methods. A trunk adds
``forward_features``, ``forward_head``, ``forward_intermediates`` and ``prune_intermediate_layers``; a family adds nothing.
Everything that is imported from timm's private modules is imported here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from timm.layers import trunc_normal_
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from vitzoo.layers.mixture import routing_loss

__all__ = ["Backbone", "FeatureGetterNet", "configure", "feature_take_indices", "pair", "wanted_maps"]

Config = TypeVar("Config")


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """``7`` to ``(7, 7)``; a pair (rows, columns) stays one."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def configure(cfg: Config, overrides: Mapping[str, Any]) -> Config:
    """A config with some fields replaced; lists (from YAML or JSON) become tuples.

    Args:
        cfg: a frozen dataclass.
        overrides: new values by field.

    Returns:
        A config of the same class.

    Raises:
        TypeError: a name that the config does not have, with the nearest one that it has.
    """
    known = {field.name for field in dataclasses.fields(cfg)}  # type: ignore[arg-type]  # Config is a dataclass
    for name in overrides:
        if name == "output_stride":
            raise ValueError(
                f"{type(cfg).__name__[:-6]} has no output_stride: its strides are fixed by its stages. "
                "Choose a decoder that takes a pyramid (FPN, UPerNet, Unet) instead of a dilated backbone."
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"It takes: {', '.join(sorted(known))}."
            raise TypeError(f"{type(cfg).__name__[:-6]} does not take '{name}'. {hint}")
    return dataclasses.replace(cfg, **{name: _frozen(value) for name, value in overrides.items()})  # type: ignore[type-var]


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((name, _frozen(entry)) for name, entry in value.items())
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def wanted_maps(
    stages: int, indices: int | list[int] | None, output_fmt: Any, *, stop_early: bool, intermediates_only: bool
) -> tuple[list[int], int, bool]:
    """What ``forward_intermediates`` of a pyramid was asked for.

    Args:
        stages: that the model has.
        indices: which of them: the last n for an int, all for None; negative ones count from the end.
        output_fmt: "NCHW" or "NHWC", as a word or timm's enumeration.
        stop_early: not to run stages after the last one asked for.
        intermediates_only: not to return the final map.

    Returns:
        The stages to take, the last of them, and whether channels come first.

    Raises:
        ValueError: another ``output_fmt``, or ``stop_early`` where the final map is asked for but not reached.
    """
    output_fmt = getattr(output_fmt, "value", output_fmt)
    if output_fmt not in ("NCHW", "NHWC"):
        raise ValueError(f"output_fmt is 'NCHW' or 'NHWC', got '{output_fmt}'.")
    take, last = feature_take_indices(stages, indices)
    if stop_early and not intermediates_only and last + 1 < stages:
        raise ValueError(
            f"stop_early ends after stage {last} of {stages}, before the final map. Ask for intermediates_only=True as well."
        )
    return take, last, output_fmt == "NCHW"


class Backbone(nn.Module):
    """What every model of the zoo has in common.

    Attributes:
        cfg: the frozen config it was built from.
        num_features: channels of ``forward_features``.
        head_hidden_size: channels of ``forward_head(x, pre_logits=True)``.
        feature_info: one dict per output of ``forward_intermediates``: ``num_chs``, ``reduction`` (pixels), ``module``.
        num_classes: outputs of the classifier; 0 without one.
        in_chans: channels of the image.
    """

    NO_DECAY: ClassVar[tuple[str, ...]] = ("rel_bias", "pos_embed", "cls_token", "reg_token", "dist_token")
    """Parts of parameter names that take no weight decay (1-D parameters never do, by timm's rule)."""

    STEM: ClassVar[str]
    """Pattern of the parameters before the first block."""

    cfg: Any
    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    num_classes: int
    in_chans: int

    def init_weights(self) -> None:
        """Truncated normal 0.02 for every linear layer, zero biases; then each module's own ``init_weights``."""
        if next(self.parameters()).is_meta:  # there is nothing to fill, and PyTorch takes its time over it
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            own = getattr(module, "init_weights", None)
            if module is not self and own is not None:
                own()

    def init_non_persistent_buffers(self) -> None:
        """Nothing to do: no model of the zoo has buffers. Indices are rebuilt in forward, at no cost worth a cache."""

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay."""
        own = {name for name, _ in self.named_parameters() if any(part in name.split(".") for part in self.NO_DECAY)}
        for prefix, module in self.named_modules():
            own |= {
                f"{prefix}.{name}"
                for name in getattr(module, "NO_DECAY", ())
                if module is not self and getattr(module, name, None) is not None
            }
        return own

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put every parameter into a layer, for layer-wise learning rates."""
        raise NotImplementedError

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable  # type: ignore[assignment]  # a plain bool on stages and Plain

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an Identity."""
        raise NotImplementedError

    def extra_loss(self, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        """What parts of the model learn beside the labels, from the last forward in training.

        Args:
            images: of that forward; every ``extra_loss`` takes them, and the next two, whether it looks at them or not.
            labels: what they show.
            logits: what came out.

        Returns:
            A scalar to be added to the task's loss; None where there is nothing to learn.
        """
        del images, labels, logits
        return routing_loss(self)

    def record_input_size(self, img_size: int | tuple[int, int] | None, **model_args: Any) -> None:
        """Tell timm the nominal image size of this instance, so that data configs built from it are right."""
        if img_size is not None:
            self.cfg = dataclasses.replace(self.cfg, img_size=img_size)
            update_model_input_size(self, img_size, **model_args)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: Any) -> dict[str, Tensor]:
        """Rename (and reshape) the entries of a published or timm checkpoint to ours.

        Must be linear in the values, so that gradients travel the same way, and must take a part of a checkpoint.

        Args:
            state: entries under their published names, without wrapping or prefixes.
            cfg: config of the model that they are for.

        Returns:
            The same values under our names.
        """
        del cfg
        return state

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
