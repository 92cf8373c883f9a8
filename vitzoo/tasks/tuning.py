"""Fine-tuning: start from a file of weights, and train all of a model, its head, what is not frozen, or low-rank additions."""

from __future__ import annotations

import difflib
import fnmatch
import logging
from typing import Any, cast

from torch import nn

from vitzoo import checkpoints
from vitzoo.data.errors import UserError, among

__all__ = ["load_weights", "resting", "tune"]

_log = logging.getLogger(__name__)
TUNE = ("all", "head", "lora")


def load_weights(model: nn.Module, path: str) -> None:
    """Start from a checkpoint of a run, or from a file in any layout that the zoo knows.

    Tables of relative positions and learned positions are resized where window, kernel or image are of another size. A
    classifier of another number of classes stays new.

    Args:
        model: One of the zoo's or of timm's; changed.
        path: The file.

    Raises:
        UserError: It cannot be read safely, or holds another model.
    """
    try:
        if hasattr(model, "from_published"):
            checkpoints.load(model, path)
            return
        state = checkpoints.unwrap(checkpoints.read(path))
    except (ValueError, OSError) as error:
        raise UserError(f"model.weights: {error}") from error
    except Exception as error:  # a damaged file makes torch raise anything
        raise UserError(f"model.weights: {path} cannot be read ({type(error).__name__}: {error}). It is damaged.") from error
    own = model.state_dict()
    left_out = [key for key in own if key in state and own[key].shape != state[key].shape and _of_classifier(model, key)]
    state |= {key: own[key] for key in left_out}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"model.weights: {path} does not fit {type(model).__name__}: {said}") from error


def _of_classifier(model: nn.Module, key: str) -> bool:
    names: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return any(key.startswith(f"{name}.") for name in ([names] if isinstance(names, str) else names))


def tune(model: nn.Module, how: str, frozen: list[str], rank: int, alpha: float, targets: str) -> None:
    """Choose what of a model is trained.

    Args:
        model: Changed: parameters stop asking for a gradient; with "lora" layers get low-rank additions.
        how: "all"; "head": the classifier alone; "lora": the classifier and ``B A x alpha / rank`` beside each Linear whose
            name ends in one of ``targets`` (Hu et al. 2021, arXiv:2106.09685, by the package peft).
        frozen: Wildcards of parameter names not to train.
        rank: Of A and B.
        alpha: See ``how``.
        targets: Last parts of module names, separated by "|".

    Raises:
        UserError: An unknown ``how``, a wildcard or targets that name nothing, peft is not installed.
    """
    among("model.tune", how, TUNE)
    names = [name for name, _ in model.named_parameters()]
    for pattern in frozen:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=2, cutoff=0.3)
            raise UserError(f"model.frozen has {pattern!r}, which names no parameter. Nearest: {', '.join(near) or names[0]}.")
    if how == "lora":
        _add_lora(model, rank, alpha, targets)
    if how != "all":
        _head_alone(model, keep="lora_" if how == "lora" else None)
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in frozen):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("model.tune and model.frozen leave nothing to train.")


def _head_alone(model: nn.Module, keep: str | None) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(keep is not None and keep in name)
    found: Any = model.get_classifier()  # type: ignore[operator]  # a Linear, or several
    heads = found if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
    for head in heads:
        head.requires_grad_(True)


def _add_lora(model: nn.Module, rank: int, alpha: float, targets: str) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("model.tune 'lora' needs the package peft: pip install 'vitzoo[finetune]'.") from error
    ends = tuple(targets.split("|"))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in linear if name.endswith(ends)]
    if not chosen:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise UserError(f"model.lora_targets {targets!r} ends the name of no Linear; their names end in {', '.join(known)}.")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=cast(Any, alpha), target_modules=chosen), model)


def resting(model: nn.Module) -> list[nn.Module]:
    """Modules whose parameters, those of their parts among them, are all frozen: they belong into eval mode.

    A frozen BatchNorm would go on counting, and drop path in frozen blocks would be noise. The topmost ones only.
    """
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            found.append(module)
        else:
            for child in module.children():
                look(child)

    look(model)
    return found
