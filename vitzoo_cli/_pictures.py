"""What a model attends to on a photograph, for ``vitzoo visualize attention``, ``rollout`` and ``gradcam``."""

from __future__ import annotations

import argparse
from typing import Any


def draw(args: argparse.Namespace) -> None:
    """Look at the photograph through the model and write the map over it."""
    import vitzoo
    from vitzoo import explain
    from vitzoo_cli._models import pictured

    model, image, config = pictured(args)
    if args.kind != "gradcam":
        model = vitzoo.accelerate(model)  # one of timm's shows what it attends to when its attention is ours
    heat = {"attention": _attention, "rollout": _rollout, "gradcam": _gradcam}[args.kind](explain, model, image[None], args)
    explain.draw(image, heat[0], path=args.out, mean=config["mean"], std=config["std"])


def _attention(explain: Any, model: Any, x: Any, args: argparse.Namespace) -> Any:
    return explain.attention_heat(model, x, layer=args.layer, head=args.head)


def _rollout(explain: Any, model: Any, x: Any, args: argparse.Namespace) -> Any:
    return explain.rollout(model, x) if args.target is None else explain.relevance(model, x, args.target)


def _gradcam(explain: Any, model: Any, x: Any, args: argparse.Namespace) -> Any:
    return explain.gradcam(model, x, args.target)
