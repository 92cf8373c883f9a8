"""Times the zoo against its baselines: ``python -m vitzoo.bench`` under another name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

EXAMPLES = (
    "vitzoo bench models nat_tiny --forward-only --rounds 3",
    "vitzoo bench ops --json ops.json",
    "vitzoo bench data nat_tiny --root path/to/imagenet --config configs/imagenet/nat_tiny.yaml --workers 4 8 16",
    "vitzoo bench training",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes: whatever ``vitzoo.bench`` does."""
    parser.add_argument("words", nargs=argparse.REMAINDER, help="as of python -m vitzoo.bench")


def forward(words: Sequence[str]) -> int:
    """Pass the command line on."""
    from vitzoo.bench.__main__ import main

    return main(list(words))
