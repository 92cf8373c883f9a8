"""Pictures of what a model does: attention, rollout, Grad-CAM and tokens on a photograph; pattern: who sees whom."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vitzoo_cli._arguments import options
from vitzoo_cli._info import size_of

KINDS = ("attention", "rollout", "gradcam", "tokens", "pattern")
EXAMPLES = (
    "vitzoo visualize pattern --pattern 'neighborhood(5, dilation=2)' --size 20x28 --out natten.png",
    "vitzoo visualize pattern --model swin_tiny_patch4_window7_224 --out swin.png",
    "vitzoo visualize attention --model deit_tiny_patch16_224 --image photo.jpg --layer -1 --out attention.png",
    "vitzoo visualize tokens --model deit_small_patch16_224 --method tome --r 13 --image photo.jpg --out tokens.png",
    "vitzoo visualize gradcam --model nat_micro.digits --image digit.png --out gradcam.png",
)
NOUNS = ("window", "grid", "dilated_window", "stripe", "axial", "halo", "neighborhood", "everywhere", "Span", "Pattern")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("kind", choices=KINDS, help="what is drawn")
    parser.add_argument("--out", type=Path, required=True, help="a picture file")
    parser.add_argument("--model", metavar="NAME", help="a name of `vitzoo list` or of timm's, with its published weights")
    parser.add_argument("--checkpoint", type=Path, help="weights of yours instead")
    parser.add_argument("--random", action="store_true", help="random weights instead")
    parser.add_argument("--num-classes", type=int, help="of the weights given with --checkpoint")
    parser.add_argument("--image", type=Path, help="the photograph")
    parser.add_argument(
        "--layer", type=int, default=-1, help="attention: which one, in the order in which they run (default: last)"
    )
    parser.add_argument("--head", type=int, help="attention: one head (default: their mean)")
    parser.add_argument(
        "--target",
        type=int,
        help="gradcam: the class (default: the likeliest); rollout: show relevance for it instead",
    )
    parser.add_argument("--method", default="tome", help="tokens: the reduction (default tome)")
    parser.add_argument("--r", type=int, help="tokens: how many merge in each block (tome)")
    parser.add_argument("--keep-rate", type=float, help="tokens: share of the patches that stays (evit, dynamicvit, ...)")
    parser.add_argument("--options", type=options, metavar="JSON", default={}, help="tokens: further options of the method")
    parser.add_argument("--pattern", metavar="CALL", help=f"pattern: a call of vitzoo.patterns ({', '.join(NOUNS[:-2])})")
    parser.add_argument("--size", type=size_of, metavar="ROWSxCOLS", help="pattern: of the map (default 14)")
    parser.add_argument("--query", type=size_of, metavar="ROWxCOL", help="pattern: the token that looks")
    parser.add_argument("--accept-license", action="store_true", help="its non-commercial licence has been read")


def run(args: argparse.Namespace) -> int:
    """Draw."""
    if not args.out.parent.is_dir():
        raise ValueError(f"There is no folder {args.out.parent} to write {args.out.name} in.")
    if args.kind == "pattern":
        return _pattern(args)
    if args.model is None or args.image is None:
        raise ValueError(f"visualize {args.kind} takes --model NAME and --image FILE.")
    if not args.image.is_file():
        raise ValueError(f"There is no picture at {args.image}.")
    from vitzoo_cli import _pictures, _tokens

    (_tokens if args.kind == "tokens" else _pictures).draw(args)
    print(f"{args.kind} in {args.out}")
    return 0


def _pattern(args: argparse.Namespace) -> int:
    """Of a model's stages, or of one call."""
    if (args.model is None) == (args.pattern is None):
        raise ValueError("visualize pattern takes --model NAME or --pattern 'window(7, shift=3)': one of the two.")
    if args.model is not None:
        from vitzoo_cli import main

        size = () if args.size is None else ("--size", "x".join(map(str, args.size)))
        return main(["info", args.model, "--no-pictures", "--png", str(args.out), *size])
    pattern = parse(args.pattern)
    from vitzoo.pictures import draw_pattern, text_of

    height, width = args.size or (14, 14)
    draw_pattern(pattern, height, width, args.query).save(args.out)
    if width <= 40:
        print(text_of(pattern, height, width, args.query))
    print(f"{pattern} on {height} x {width}, {pattern.pairs(height, width):,} pairs, in {args.out}")
    return 0


def parse(call: str) -> Any:
    """``neighborhood(7, dilation=2)`` as a pattern: one call with plain values, nothing is evaluated.

    Args:
        call: of a constructor of ``vitzoo.patterns``, or ``everywhere``.

    Returns:
        The pattern.

    Raises:
        ValueError: it is something else, or its values make no pattern.
    """
    import ast

    from vitzoo import patterns

    if call.strip() == "everywhere":
        return patterns.everywhere
    try:
        node = ast.parse(call.strip(), mode="eval").body
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NOUNS[:-3]):
            raise SyntaxError
        values = [ast.literal_eval(a) for a in node.args]
        keywords = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg}
    except (SyntaxError, ValueError):
        raise ValueError(f"'{call}' is no pattern. Patterns: {', '.join(NOUNS[:-2])}, as in 'window(7, shift=3)'.") from None
    try:
        return getattr(patterns, node.func.id)(*values, **keywords)
    except TypeError as error:
        raise ValueError(f"'{call}': {error}.") from None
