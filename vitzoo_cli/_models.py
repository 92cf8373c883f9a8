"""Models for the commands that run one: published, from a file, or from a run of ``train.py``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["classifier", "pictured", "trained"]


def classifier(args: argparse.Namespace) -> tuple[Any, Callable[[Any], Any], Sequence[str]]:
    """The classifier that ``--model`` and ``--checkpoint`` ask for.

    Args:
        args: with ``model``, ``checkpoint``, ``num_classes`` and ``accept_license``.

    Returns:
        It in eval mode, what brings a picture to its input, and names of its classes, as far as they are known.

    Raises:
        ValueError: the model has no classifier, or as ``vitzoo.create_model``.
    """
    from timm.data import create_transform, resolve_model_data_config

    import vitzoo

    own: dict[str, Any] = {}
    classes: Sequence[str] = ()
    if args.model is not None:
        options: dict[str, Any] = {} if args.num_classes is None else {"num_classes": args.num_classes}
        if args.checkpoint is None:
            options |= {"pretrained": True, "accept_license": args.accept_license}
        else:
            options["checkpoint_path"] = str(args.checkpoint)
        model = vitzoo.create_model(args.model, **options)
    else:
        module, classes, data = trained(args.checkpoint, "classification")
        model, own = module.model, _input(data)
    if not getattr(model, "num_classes", 0):
        raise ValueError(f"{args.model} has no classifier: its weights are for feature maps.")
    config = {**resolve_model_data_config(model), **own}
    return model.eval(), create_transform(**config, is_training=False), classes or _names(model)


def pictured(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """The model that is to be looked at and the photograph as it sees it.

    Args:
        args: with ``model``, ``checkpoint``, ``num_classes``, ``random``, ``accept_license`` and ``image``.

    Returns:
        The model in eval mode, the image ``[3, H, W]``, and the data config that made it.
    """
    from timm.data import create_transform, resolve_model_data_config

    import vitzoo
    from vitzoo.data.images import read_image

    given: dict[str, Any] = {} if args.num_classes is None else {"num_classes": args.num_classes}
    if args.checkpoint is not None:
        given["checkpoint_path"] = str(args.checkpoint)
    elif not args.random:
        given |= {"pretrained": True, "accept_license": args.accept_license}
    model = vitzoo.create_model(args.model, **given).eval()
    config = resolve_model_data_config(model)
    return model, create_transform(**config, is_training=False)(read_image(args.image)), config


def _names(model: Any) -> Sequence[str]:
    """The classes of the weights, else ImageNet's where their number says so."""
    from timm.data import ImageNetInfo

    cfg = model.pretrained_cfg
    if cfg.get("label_names") and len(cfg["label_names"]) == model.num_classes:
        return tuple(cfg["label_names"])
    if model.num_classes == 1000:
        return [text.split(", ")[0] for text in (ImageNetInfo("imagenet-1k").index_to_description(i) for i in range(1000))]
    return ()


def trained(path: Path, task: str) -> tuple[Any, Sequence[str], dict[str, Any]]:
    """The module of a run of ``train.py``.

    Args:
        path: its ``best.ckpt`` or ``last.ckpt``.
        task: that it has to be for.

    Returns:
        The module in eval mode, the names of its classes, and the values that its data was made with.

    Raises:
        ValueError: the file is not of a run, or of one for another task.
    """
    from vitzoo import checkpoints
    from vitzoo.tasks.cli import TASKS, quiet

    quiet()
    content = checkpoints.read(path)
    hyper = {k: v for k, v in content.get("hyper_parameters", {}).items() if not k.startswith("_")}
    own = {"classification": "name", "detection": "kind", "segmentation": "kind"}[task]
    decides = {"detection": "detector_kwargs", "segmentation": "inference"}.get(task, own)
    if own not in hyper or decides not in hyper:
        also = " Give --model NAME as well." if task == "classification" else ""
        raise ValueError(f"{path} is no checkpoint of a run of train.py for {task}.{also}")
    module = TASKS[task][0](**{**hyper, "pretrained": False})
    module.load_state_dict(content["state_dict"])
    return module.eval(), content.get("classes", ()), content.get("datamodule_hyper_parameters", {})


def _input(data: dict[str, Any]) -> dict[str, Any]:
    """What a run says of its input, in timm's words."""
    size = data.get("img_size")
    config = {"input_size": (3, size, size) if isinstance(size, int) else None, "crop_pct": data.get("crop_pct")}
    config |= {key: data.get(key) for key in ("interpolation", "mean", "std")}
    return {k: v for k, v in config.items() if v is not None}
