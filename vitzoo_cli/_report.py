"""An evaluation as one HTML page: curves, confusions, the surest mistakes, of a run of train.py."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = ("vitzoo report runs/quickstart --out report.html",)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("run", type=Path, help="folder of a run of train.py")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the run's folder)")


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    if not (args.run / "config.yaml").is_file():
        raise ValueError(f"{args.run} is no folder of a run of train.py: it has no config.yaml.")
    from vitzoo.tasks import html

    path = html.report(args.run, args.out or args.run / "report.html")
    print(f"report in {path}")
    return 0
