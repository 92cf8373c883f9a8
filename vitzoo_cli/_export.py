"""A model as ONNX (.onnx) or as a program of torch.export (.pt2), any batch and image size, checked against eager."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vitzoo_cli import _index
from vitzoo_cli._info import size_of

EXAMPLES = (
    "vitzoo export nat_micro.digits --out digits.onnx",
    "vitzoo export swin_tiny_patch4_window7_224 --random --out swin.pt2",
    "vitzoo export dat_tiny --checkpoint mine.safetensors --num-classes 10 --size 384x512 --features --out dat.onnx",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("model", metavar="NAME", help="a name of `vitzoo list`; its published weights are exported")
    parser.add_argument("--out", type=Path, required=True, help="a .onnx or .pt2 file")
    parser.add_argument("--checkpoint", type=Path, help="weights of yours instead")
    parser.add_argument("--random", action="store_true", help="random weights instead")
    parser.add_argument("--num-classes", type=int, help="of the classifier")
    parser.add_argument("--features", action="store_true", help="the NCHW maps instead of the classifier")
    parser.add_argument("--size", type=size_of, metavar="ROWSxCOLS", help="of the example image (default: as published)")
    parser.add_argument(
        "--dynamic",
        choices=["all", "batch", "none"],
        default="all",
        help="what may differ from the example: batch and image size (default; ONNX takes a minute), the batch, nothing",
    )
    parser.add_argument("--batch", type=int, default=2, help="of the example (default 2)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference from eager (default 1e-4)")
    parser.add_argument("--accept-license", action="store_true", help="its non-commercial licence has been read")


def run(args: argparse.Namespace) -> int:
    """Export and check."""
    if args.out.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"--out {args.out} has to end in .onnx or .pt2, which says what is written.")
    known = _index.named(args.model)
    import torch

    import vitzoo
    from vitzoo import exporting

    options: dict[str, Any] = {"features_only": True} if args.features else {}
    if args.num_classes is not None:
        options["num_classes"] = args.num_classes
    if args.checkpoint is not None:
        options["checkpoint_path"] = str(args.checkpoint)
    elif not args.random:
        options |= {"pretrained": True, "accept_license": args.accept_license}
    torch.manual_seed(0)
    model = vitzoo.create_model(args.model, **options).eval()
    size = args.size or tuple(known["img_size"])
    write = exporting.to_onnx if args.out.suffix == ".onnx" else exporting.to_program
    checks = write(model, args.out, size, batch=args.batch, dynamic=args.dynamic, tolerance=args.tolerance)
    for check in checks:
        print(f"batch {check.batch}, {check.height} x {check.width}: largest difference from eager {check.error:.1e}")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    return 0
