"""Patterns drawn: what one query sees on a map, as a picture and as text. Integers and pixels only, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vitzoo.patterns import Pattern

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["draw_pattern", "draw_patterns", "seen", "text_of"]

_PAPER, _LINE, _SEEN, _QUERY, _INK = "#f4f4f2", "#dcdcd8", "#4c78a8", "#e4572e", "#30343b"


def seen(pattern: Pattern, height: int, width: int, query: tuple[int, int] | None = None) -> list[list[bool]]:
    """Which keys a query sees.

    Args:
        pattern: who sees whom.
        height: rows of the map.
        width: its columns.
        query: row and column; None: a third of the way down and across, where most patterns show their border rule.

    Returns:
        ``height`` rows of ``width`` truth values.

    Raises:
        ValueError: the pattern has no meaning on a map of this size, or the query is not on it.
    """
    y, x = query or (height // 3, width // 3)
    if not (0 <= y < height and 0 <= x < width):
        raise ValueError(f"The query ({y}, {x}) is not on a map of {height} x {width}.")
    rows, cols = pattern.keys(y, x, height, width)
    return [[v in rows and u in cols for u in range(width)] for v in range(height)]


def text_of(pattern: Pattern, height: int, width: int, query: tuple[int, int] | None = None) -> str:
    """A pattern as lines of text: ``@`` the query, ``#`` the keys it sees, ``.`` the others; arguments as for :func:`seen`."""
    at = query or (height // 3, width // 3)
    table = seen(pattern, height, width, at)
    return "\n".join(
        " ".join("@" if (v, u) == at else "#" if see else "." for u, see in enumerate(row)) for v, row in enumerate(table)
    )


def draw_pattern(
    pattern: Pattern, height: int = 14, width: int = 14, query: tuple[int, int] | None = None, cell: int = 14
) -> Image.Image:
    """A pattern as a picture: the query red, the keys it sees blue.

    Args:
        pattern: who sees whom.
        height: rows of the map.
        width: its columns.
        query: row and column; None: as in :func:`seen`.
        cell: pixels of a token.

    Returns:
        An RGB picture of ``height * cell + 1`` x ``width * cell + 1`` pixels.

    Raises:
        ValueError: as in :func:`seen`.
    """
    from PIL import Image, ImageDraw

    at = query or (height // 3, width // 3)
    picture = Image.new("RGB", (width * cell + 1, height * cell + 1), _LINE)
    pen = ImageDraw.Draw(picture)
    for v, row in enumerate(seen(pattern, height, width, at)):
        for u, see in enumerate(row):
            colour = _QUERY if (v, u) == at else _SEEN if see else _PAPER
            pen.rectangle((u * cell + 1, v * cell + 1, (u + 1) * cell - 1, (v + 1) * cell - 1), fill=colour)
    return picture


def draw_patterns(
    patterns: Sequence[tuple[str, Pattern, int, int]], columns: int = 4, cell: int = 10, query: tuple[int, int] | None = None
) -> Image.Image:
    """Several patterns side by side, each with a caption.

    Args:
        patterns: caption, pattern, rows and columns of its map.
        columns: pictures in a row.
        cell: pixels of a token on the largest map; smaller maps get larger ones, so that all are of a size.
        query: row and column; None: as in :func:`seen`.

    Returns:
        The picture.

    Raises:
        ValueError: no patterns, or as in :func:`seen`.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not patterns:
        raise ValueError("There are no patterns to draw.")
    edge = cell * max(max(height, width) for _, _, height, width in patterns)
    font = ImageFont.load_default(size=12)
    broad = max(edge, *(round(font.getlength(text)) for caption, *_ in patterns for text in caption.split("\n")))
    high = edge + 18 * max(caption.count("\n") + 1 for caption, *_ in patterns)
    columns = min(columns, len(patterns))
    sheet = Image.new("RGB", (columns * (broad + 16) + 16, -(-len(patterns) // columns) * (high + 16) + 16), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (caption, pattern, height, width) in enumerate(patterns):
        x, y = 16 + (i % columns) * (broad + 16), 16 + (i // columns) * (high + 16)
        sheet.paste(draw_pattern(pattern, height, width, query, max(2, edge // max(height, width))), (x, y))
        pen.multiline_text((x, y + edge + 3), caption, fill=_INK, font=font)
    return sheet
