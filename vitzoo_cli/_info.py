"""One model: its parts with parameters, multiply-adds and activations, who sees whom at each stage, and its checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from vitzoo_cli import _index

EXAMPLES = (
    "vitzoo info nat_tiny",
    "vitzoo info crossformer_tiny --size 320x224 --png who_sees_whom.png",
    "vitzoo info dat_tiny --json",
)


def size_of(text: str) -> tuple[int, int]:
    """``224`` or ``320x224`` as rows and columns."""
    try:
        rows, _, cols = text.partition("x")
        return int(rows), int(cols or rows)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a size is 224 or 320x224 (rows x columns), not '{text}'") from None


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("model", metavar="NAME", help="a name of `vitzoo list`")
    parser.add_argument("--size", type=size_of, metavar="ROWSxCOLS", help="of the image (default: as published)")
    parser.add_argument("--png", type=Path, help="write the patterns of all stages as a picture here")
    parser.add_argument("--no-pictures", action="store_true", help="leave out the patterns drawn as text")
    parser.add_argument("--json", action="store_true", help="for scripts")


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    known = _index.named(args.model)
    import vitzoo
    from vitzoo.models.anatomy import anatomy
    from vitzoo.pictures import draw_patterns, text_of

    parts = anatomy(known["name"], args.size)
    rows = list(vitzoo.checkpoints_of(known["name"]).values())
    if args.json:
        layers = [dataclasses.asdict(part) for part in parts]
        for layer, part in zip(layers, parts, strict=True):
            layer["attention"] = [
                {**dataclasses.asdict(a), "pattern": None if a.pattern is None else repr(a.pattern)} for a in part.attention
            ]
        print(json.dumps({**known, "parts": layers, "weights": [dataclasses.asdict(row) for row in rows]}, indent=1))
        return 0
    size = args.size or tuple(known["img_size"])
    print(f"{known['name']}  (family {known['family']}; a forward pass at {size[0]} x {size[1]})\n")
    title = ("part", "of", "output", "params", "GMACs", "activations", "attention")
    table = [
        (
            part.name,
            part.kind,
            " x ".join(map(str, part.output)),
            f"{part.params / 1e6:.3f} M",
            f"{part.gmacs:.3f}",
            f"{part.activations:.2f} M",
            ", ".join(f"{a.pattern or a.op} x{a.calls}, {a.heads} head{'s'[: a.heads > 1]}" for a in part.attention),
        )
        for part in parts
    ]
    total = (sum(p.params for p in parts), sum(p.gmacs for p in parts), sum(p.activations for p in parts))
    table.append(("total", "", "", f"{total[0] / 1e6:.3f} M", f"{total[1]:.3f}", f"{total[2]:.2f} M", ""))
    widths = [max(len(line[i]) for line in [title, *table]) for i in range(len(title))]
    for line in [title, *table]:
        cells = [f"{c:>{w}}" if i in (3, 4, 5) else f"{c:<{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())
    drawn = {}
    for part in parts:
        for a in part.attention:
            if a.pattern is not None:
                drawn[f"{part.name}\n{a.pattern}"] = (a.pattern, min(a.rows, 28), min(a.cols, 28), a.rows, a.cols)
    if not args.no_pictures:
        _print_patterns({k: v for k, v in drawn.items() if v[3] <= 16 and v[4] <= 16}, text_of)
    if args.png:
        usable = {k: v if _fits(v) else (v[0], v[3], v[4], v[3], v[4]) for k, v in drawn.items()}
        if not usable:
            raise ValueError(f"{known['name']} computes no attention that a pattern describes, so there is nothing to draw.")
        draw_patterns([(k, p, h, w) for k, (p, h, w, _, _) in usable.items()]).save(args.png)
        print(f"\npatterns in {args.png}")
    if rows:
        print("\ncheckpoints")
        for row in rows:
            top1 = "" if row.top1 is None else f", {row.top1:g} % ({row.metric or 'ImageNet-1k top-1'})"
            print(f"  {row.name}: {row.img_size} px{top1}, {row.license}; {row.file or row.hf_hub_id or row.page}")
    else:
        print("\nno published checkpoint is known")
    return 0


def _fits(drawn: tuple) -> bool:
    pattern, height, width, _, _ = drawn
    try:
        pattern.check(height, width)
    except ValueError:
        return False
    return True


def _print_patterns(drawn: dict, text_of: object) -> None:
    """Patterns on maps of at most 16 x 16 as text, side by side where two fit a line."""
    blocks = [(name.replace("\n", ": "), text_of(p, h, w).split("\n")) for name, (p, h, w, _, _) in drawn.items()]  # type: ignore[operator]
    if blocks:
        print("\nwho sees whom (@ a query, # what it sees)")
    while blocks:
        taken = [blocks.pop(0)]
        while blocks and sum(max(len(t), len(lines[0])) + 4 for t, lines in [*taken, blocks[0]]) <= 110:
            taken.append(blocks.pop(0))
        widths = [max(len(title), len(lines[0])) for title, lines in taken]
        print("\n" + "    ".join(f"{title:<{w}}" for (title, _), w in zip(taken, widths, strict=True)).rstrip())
        for i in range(max(len(lines) for _, lines in taken)):
            cells = [f"{lines[i] if i < len(lines) else '':<{w}}" for (_, lines), w in zip(taken, widths, strict=True)]
            print("    ".join(cells).rstrip())
