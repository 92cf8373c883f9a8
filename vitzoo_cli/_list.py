"""Models of the zoo, filtered and sorted. Figures are the published ones; multiply-adds are counted at the model's own size."""

from __future__ import annotations

import argparse
import fnmatch
import json
from typing import Any

from vitzoo_cli import _index

EXAMPLES = (
    "vitzoo list                                          # all",
    "vitzoo list 'swin*' 'nat*' --sort top1               # best first",
    "vitzoo list --max-params 30 --max-gmacs 5 --sort gmacs",
    "vitzoo list --license mit --pretrained               # a line for every published checkpoint",
    "vitzoo list --family dat --json",
)
SORTS = ("name", "params", "gmacs", "top1", "license")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="names with wildcards; one match is enough")
    parser.add_argument("--family", action="append", default=[], help="of this family only; may be repeated")
    parser.add_argument("--license", help="whose weights' licence contains this, in any case (mit, apache, nc)")
    parser.add_argument("--pretrained", action="store_true", help="a line for every published checkpoint instead of model")
    parser.add_argument("--max-params", type=float, metavar="M", help="at most so many millions of parameters")
    parser.add_argument("--max-gmacs", type=float, metavar="G", help="at most so many billions of multiply-adds")
    parser.add_argument("--min-top1", type=float, metavar="P", help="at least so many percent of ImageNet-1k top-1")
    parser.add_argument("--sort", choices=SORTS, default="name", help="top1: best first; the others ascend")
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    parser.add_argument("--json", action="store_true", help="for scripts")


def rows(models: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """What is asked for, in order; models without a figure that is sorted by come last."""
    found = []
    for model in models:
        base = {k: model[k] for k in ("name", "family", "params", "gmacs", "img_size", "top1", "license")}
        found += [base | w for w in model["weights"]] if args.pretrained else [base | {"weights": len(model["weights"])}]

    def wanted(row: dict[str, Any]) -> bool:
        return (
            (not args.patterns or any(fnmatch.fnmatchcase(row["name"], p) for p in args.patterns))
            and (not args.family or row["family"] in args.family)
            and (not args.license or args.license.lower() in (row["license"] or "").lower())
            and (args.max_params is None or row["params"] <= args.max_params * 1e6)
            and (args.max_gmacs is None or row["gmacs"] <= args.max_gmacs)
            and (args.min_top1 is None or (row["top1"] or 0) >= args.min_top1)
        )

    found = sorted(filter(wanted, found), key=lambda row: row["name"])
    known = [row for row in found if row[args.sort] is not None]
    known.sort(key=lambda row: row[args.sort], reverse=(args.sort == "top1") != args.reverse)
    return known + [row for row in found if row[args.sort] is None]


def run(args: argparse.Namespace) -> int:
    """Print the table; exit status 1 where nothing matches."""
    models = _index.read()
    families = sorted({model["family"] for model in models})
    for family in args.family:
        if family not in families:
            raise ValueError(f"There is no family '{family}'. Families: {', '.join(families)}.")
    found = rows(models, args)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    if not found:
        raise ValueError("No model matches. `vitzoo list` without arguments shows them all.")
    title = ("name", "family", "params", "gmacs", "size", "top-1", "licence")
    table = [
        (
            row["name"],
            row["family"],
            f"{row['params'] / 1e6:.2f} M",
            f"{row['gmacs']:.2f}",
            "x".join(map(str, row["img_size"])) if row["img_size"][0] != row["img_size"][1] else str(row["img_size"][0]),
            "" if row["top1"] is None else f"{row['top1']:.1f}",
            row["license"] or "",
        )
        for row in found
    ]
    widths = [max(len(line[i]) for line in [title, *table]) for i in range(len(title))]
    for line in [title, *table]:
        cells = [f"{c:>{w}}" if i in (2, 3, 4, 5) else f"{c:<{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())
    print(f"{len(found)} {'checkpoints' if args.pretrained else 'models'}")
    return 0
