"""What a token reduction makes of the patches of a photograph, for ``vitzoo visualize tokens``."""

from __future__ import annotations

import argparse


def draw(args: argparse.Namespace) -> None:
    """Reduce the model, run it on the picture, write what became of each patch."""
    from vitzoo import tokens
    from vitzoo_cli._models import pictured

    named = {"r": args.r, "keep_rate": args.keep_rate}
    options = args.options | {name: value for name, value in named.items() if value is not None}
    model, image, config = pictured(args)
    try:
        tokens.reduce(model, args.method, **options)
    except TypeError as error:
        raise ValueError(f"--method {args.method}: {error}") from None
    tokens.draw_tokens(model, image, path=args.out, mean=config["mean"], std=config["std"])
