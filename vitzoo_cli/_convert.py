"""A checkpoint in the authors', timm's or our layout, loaded strictly into its model and written as safetensors.

Without --out it goes into the cache under the name of the published checkpoint, and create_model(NAME, pretrained=True) finds
it there: the way to weights whose host gives them to browsers only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vitzoo_cli import _index
from vitzoo_cli._arguments import options

EXAMPLES = (
    "vitzoo convert dat_pp_tiny ~/Downloads/dat_pp_tiny.pth",
    "vitzoo convert swin_tiny_patch4_window7_224.ms_in22k theirs.pth --out ours.safetensors",
    "vitzoo convert nat_tiny runs/folder/best.ckpt --num-classes 10 --out mine.safetensors",
    """vitzoo convert nat_tiny theirs.pth --options '{"kernel_size": 5, "in_chans": 1}' --out mine.safetensors""",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("model", metavar="NAME", help="a name of `vitzoo list`, with a tag where several are published")
    parser.add_argument("file", type=Path, metavar="FILE", help=".pth, .pt, .bin, .ckpt or .safetensors")
    parser.add_argument("--out", type=Path, help="a .safetensors file (default: the cache)")
    parser.add_argument("--num-classes", type=int, help="classes of the file, where they are not the published ones")
    parser.add_argument("--options", type=options, metavar="JSON", default={}, help="other arguments of the file's model")


def run(args: argparse.Namespace) -> int:
    """Convert, check, write."""
    known = _index.named(args.model)
    if args.out is not None and args.out.suffix != ".safetensors":
        raise ValueError(f"--out {args.out} has to end in .safetensors: that format cannot hold code.")
    import vitzoo
    from vitzoo import weights
    from vitzoo.checkpoints import load, save

    rows = vitzoo.checkpoints_of(known["name"])
    if "." in args.model and args.model not in rows:
        raise ValueError(f"{known['name']} has no weights of that tag. It has: {', '.join(rows) or 'none'}.")
    row = rows.get(args.model) or next(iter(rows.values()), None)
    path = args.out
    given = args.options if args.num_classes is None else {**args.options, "num_classes": args.num_classes}
    if path is None and row is not None and not given:
        path = weights.converted(row)
    if path is None:
        raise ValueError(f"No published checkpoint is known for {args.model}, so say where to write with --out.")
    model = load(vitzoo.create_model(args.model, **given), args.file, adapt=False)
    save(model, path)
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.file} fits {args.model}: {count:,} learned numbers, written to {path}")
    return 0
