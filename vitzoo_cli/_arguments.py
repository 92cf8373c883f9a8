"""Values that several commands take."""

from __future__ import annotations

import argparse
import json
from typing import Any

__all__ = ["options"]


def options(text: str) -> dict[str, Any]:
    """``{"layers": [3, 6]}`` as keywords: lists become tuples, which is what configs hold.

    Args:
        text: a JSON object.

    Returns:
        Its entries.

    Raises:
        ArgumentTypeError: it is something else.
    """

    def fixed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fixed(entry) for key, entry in value.items()}
        return tuple(map(fixed, value)) if isinstance(value, list) else value

    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"takes a JSON object such as '{{\"layers\": [3, 6]}}', got {text}")
    return fixed(found)
