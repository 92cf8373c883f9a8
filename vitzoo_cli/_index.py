"""What is known of every model without building it: ``weights/index.json``, written by ``python -m vitzoo.models.index``."""

from __future__ import annotations

import difflib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["named", "read", "weights_folder"]


def weights_folder() -> Path:
    """Where manifests, index and shipped weights lie: inside the installed package, or beside it in a checkout."""
    spec = importlib.util.find_spec("vitzoo")  # finds the package and does not run it
    if spec is None or spec.origin is None:
        raise ImportError("The package vitzoo is not installed beside its command.")
    package = Path(spec.origin).parent
    return next((f for f in (package / "weights", package.parent / "weights") if f.is_dir()), package / "weights")


@cache
def read() -> list[dict[str, Any]]:
    """The models, sorted by name.

    Returns:
        For each: name, family, params, gmacs, img_size, strides, top1, license, weights (name, top1, license of each tag).
    """
    return json.loads((weights_folder() / "index.json").read_text(encoding="utf-8"))["models"]


def named(name: str) -> dict[str, Any]:
    """The model of a name, with or without a tag.

    Args:
        name: a name of ``vitzoo list``.

    Returns:
        Its entry.

    Raises:
        ValueError: there is none; the nearest are named.
    """
    bare = name.split(".", 1)[0].removeprefix("vz_")
    names = [model["name"] for model in read()]
    if bare in names:
        return read()[names.index(bare)]
    near = difflib.get_close_matches(bare, names, n=3, cutoff=0.6) or [n for n in names if n.startswith(bare)][:3]
    hint = f"Did you mean {' or '.join(near)}?" if near else "`vitzoo list` shows them all."
    raise ValueError(f"There is no model named '{name}'. {hint}")
