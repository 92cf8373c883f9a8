"""Errors that are the user's to mend: one sentence, no traceback on the command line."""

from __future__ import annotations

__all__ = ["UserError", "sentence"]


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
