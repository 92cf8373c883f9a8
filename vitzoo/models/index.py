"""``python -m vitzoo.models.index`` writes ``weights/index.json``, from which ``vitzoo list`` answers without torch.

Multiply-adds are counted again only for models that are new or whose parameters changed; ``--fresh`` counts all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitzoo.models import list_models, model_info
from vitzoo.models._registry import checkpoints_of

__all__ = ["entry", "published", "write"]


def published(name: str) -> list[dict[str, Any]]:
    """What the index says of a model's checkpoints.

    Args:
        name: of ``vitzoo.list_models()``.

    Returns:
        Name with tag, ImageNet-1k top-1 and licence of each.
    """
    rows = checkpoints_of(name).values()
    return [{"name": row.name, "top1": None if row.metric else row.top1, "license": row.license} for row in rows]


def entry(name: str, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the index says of a model.

    Args:
        name: of ``vitzoo.list_models()``.
        known: its earlier entry, whose multiply-adds are taken over where everything else that they depend on is equal.

    Returns:
        Plain values.
    """
    info = model_info(name)
    weights = published(name)
    best = max((w for w in weights if w["top1"] is not None), key=lambda w: w["top1"], default=None)
    found: dict[str, Any] = {
        "name": name,
        "family": info.family,
        "params": info.params,
        "img_size": list(info.img_size),
        "strides": list(info.strides),
        "top1": best and best["top1"],
        "license": (best or (weights[0] if weights else {"license": None}))["license"],
    }
    same = known is not None and all(known[key] == found[key] for key in ("params", "img_size", "strides"))
    return {**found, "gmacs": known["gmacs"] if same and known else round(info.gmacs, 3), "weights": weights}


def write(path: Path, fresh: bool = False) -> int:
    """Write the index.

    Args:
        path: the file.
        fresh: count the multiply-adds of every model again.

    Returns:
        How many models it holds.
    """
    old = {} if fresh or not path.is_file() else {m["name"]: m for m in json.loads(path.read_text())["models"]}
    models = [entry(name, old.get(name)) for name in list_models()]
    lines = ",\n".join(json.dumps(model) for model in models)
    path.write_text(f'{{"models": [\n{lines}\n]}}\n', encoding="utf-8")
    return len(models)


if __name__ == "__main__":
    file = Path(__file__).resolve().parents[2] / "weights" / "index.json"
    print(f"{write(file, '--fresh' in sys.argv[1:])} models in {file}")  # noqa: T201
