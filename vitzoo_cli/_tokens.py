"""What a token reduction makes of the patches of a photograph, for ``vitzoo visualize tokens``."""

from __future__ import annotations

import argparse
import json
from typing import Any


def draw(args: argparse.Namespace) -> None:
    """Reduce the model, run it on the picture, write what became of each patch."""
    from vitzoo import tokens
    from vitzoo_cli._models import pictured

    options = options_of(args)
    model, image, config = pictured(args)
    try:
        tokens.reduce(model, args.method, **options)
    except TypeError as error:
        raise ValueError(f"--method {args.method}: {error}") from None
    tokens.draw_tokens(model, image, path=args.out, mean=config["mean"], std=config["std"])


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the method: ``--r``, ``--keep-rate`` and those of ``--options``.

    Args:
        args: with those three.

    Returns:
        Keywords of ``vitzoo.tokens.reduce``.

    Raises:
        ValueError: ``--options`` is no JSON object.
    """
    options: dict[str, Any] = {}
    if args.options is not None:
        try:
            options = json.loads(args.options)
        except json.JSONDecodeError:
            options = None  # type: ignore[assignment]
        if not isinstance(options, dict):
            raise ValueError(f"--options takes a JSON object such as '{{\"layers\": [3, 6]}}', got {args.options}.")
    named = {"r": args.r, "keep_rate": args.keep_rate}
    return options | {name: value for name, value in named.items() if value is not None}
