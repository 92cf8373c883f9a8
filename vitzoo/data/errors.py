"""Errors that are the user's to mend: one sentence, no traceback on the command line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection

__all__ = ["UserError", "among", "sentence", "within"]


class UserError(ValueError):
    """Something in the configuration or in the data is wrong; the message names both sides and the way out."""


def sentence(error: BaseException) -> str:
    """The sentence of an error, also where a DataLoader worker wrapped it into its own traceback.

    A worker's exception arrives as the same type whose message ends with the original traceback; its last line is
    the sentence.
    """
    text = str(error).strip()
    if "Original Traceback" not in text:
        return text
    return text.splitlines()[-1].partition(": ")[2]


def within(key: str, value: float | None, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise UserError where a number is not in ``low..high``; None is.

    Args:
        key: Of the config.
        value: What was given.
        low: Least value that is right.
        high: Greatest one.
        open_low: ``low`` itself is wrong too.
    """
    if value is None or ((low < value if open_low else low <= value) and value <= high):
        return
    bounds = f"{'above' if open_low else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    raise UserError(f"{key} is {value} and must be {bounds}.")


def among(key: str, value: str, known: Collection[str]) -> None:
    """Raise UserError, with the nearest name, where a name is not one of those ``known``."""
    if value not in known:
        near = difflib.get_close_matches(str(value), list(known), n=1, cutoff=0.5)
        hint = f" The nearest is {near[0]!r}." if near else ""
        some = ", ".join(sorted(known)[:12]) + (", ..." if len(known) > 12 else "")
        raise UserError(f"{key} is {value!r} and must be one of {some}.{hint}")
