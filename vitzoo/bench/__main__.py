"""``python -m vitzoo.bench models``: times the zoo against its baselines and prints one Markdown table.

Ratios are baseline over ours, so above 1 is faster or smaller than the baseline.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import timm
import torch

import vitzoo
from vitzoo.bench import models


def environment() -> dict[str, str]:
    """Commit, versions and processor that a table was measured with."""
    root = Path(__file__).resolve().parents[2]
    git = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "commit": git.stdout.strip() or "unknown",
        "vitzoo": vitzoo.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "device": cpu,
        "threads": str(torch.get_num_threads()),
        "dtype": "float32",
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vitzoo.bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("models", help="whole models against timm's, or against an unfold")
    sub.add_argument("names", nargs="*", help="listed models; none: the default table")
    sub.add_argument("--batch", type=int, default=8, help="images (default 8)")
    sub.add_argument("--size", type=int, default=224, help="pixels on a side (default 224)")
    sub.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default 9)")
    sub.add_argument("--forward-only", action="store_true", help="leave out training")
    sub.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the CPU")
    sub.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    cases = [models.Case(n, args.batch, args.size, args.forward_only) for n in args.names] or list(models.CASES)
    facts = environment()
    print(f"`python -m vitzoo.bench {' '.join(sys.argv[1:] if argv is None else argv)}`")
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    results = []
    for i, case in enumerate(cases):
        print(f"[{i + 1}/{len(cases)}] {case.model}, batch {case.batch}, {case.size} px ...", file=sys.stderr, flush=True)
        results.append(models.measure(case, args.rounds))
    print(models.table(results))
    if args.json:
        args.json.write_text(json.dumps({"environment": facts, "results": [asdict(r) for r in results]}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
