"""The picture of a run: learning curve and confusion matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitzoo.tasks.draw import Surest, sheet

__all__ = ["draw", "draw_answers", "draw_dense", "draw_groups", "draw_pairs"]

INK, TRAIN, VAL = "#30343b", "#b0602a", "#1f6f8b"


def draw(rows: list[dict[str, Any]], confusion: np.ndarray, classes: list[str], title: str, path: str | Path) -> None:
    """Draw one PNG with losses and top-1 over the epochs, and the confusion matrix.

    Args:
        rows: Of :class:`vitzoo.tasks.history.History`.
        confusion: Counts ``[C, C]``, rows are the true classes.
        classes: C names.
        title: Over both.
        path: Of the PNG; its folder exists.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(12.5, 5.4), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, color=INK, x=0.012, ha="left", weight="bold")
    curve, matrix = figure.subplots(1, 2, width_ratios=(1.25, 1))

    epochs = [row["epoch"] + 1 for row in rows]
    marker = "o" if len(rows) <= 40 else None
    curve.plot(epochs, [row["train_loss"] for row in rows], color=TRAIN, marker=marker, ms=3.5, label="training loss")
    val_loss = [np.nan if row["val_loss"] is None else row["val_loss"] for row in rows]
    curve.plot(epochs, val_loss, color=TRAIN, ls="--", lw=1.4, label="held-out loss")
    curve.set_xlabel("epoch")
    curve.set_ylabel("loss", color=TRAIN)
    curve.set_ylim(bottom=0)
    curve.xaxis.set_major_locator(MaxNLocator(integer=True))
    right = curve.twinx()
    top1 = [np.nan if row["val_top1"] is None else row["val_top1"] for row in rows]
    right.plot(epochs, top1, color=VAL, marker=marker, ms=3.5, lw=2, label="held-out top-1")
    right.set_ylabel("top-1", color=VAL)
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if np.isfinite(top1).any():
        best = int(np.nanargmax(top1))
        right.annotate(
            f"{100 * top1[best]:.2f} %",
            (epochs[best], top1[best]),
            xytext=(-4, -20),
            textcoords="offset points",
            ha="right",
            color=VAL,
            weight="bold",
            arrowprops={"arrowstyle": "-", "color": VAL, "lw": 0.8},
        )
    curve.grid(axis="x", color="#e3e5e8", lw=0.7)
    right.grid(axis="y", color="#e3e5e8", lw=0.7)
    for axis in (curve, right):
        axis.spines[["top"]].set_visible(False)
    handles = [*curve.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    right.legend(handles, [line.get_label() for line in handles], loc="center right", frameon=False)

    share = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    drawn = matrix.imshow(share, cmap="Blues", vmin=0, vmax=1)
    matrix.set_title("confusion on held-out pictures (share of the true class)", fontsize=10, color=INK)
    matrix.set_xlabel("predicted")
    matrix.set_ylabel("true")
    count = len(classes)
    if count <= 40:
        wide = max(map(len, classes)) > 2
        small = 9 if count <= 12 else 6
        matrix.set_xticks(range(count), classes, rotation=45 if wide else 0, ha="right" if wide else "center", size=small)
        matrix.set_yticks(range(count), classes, size=small)
    if count <= 20:
        for true, predicted in zip(*confusion.nonzero(), strict=True):
            shade = "white" if share[true, predicted] > 0.5 else INK
            matrix.text(predicted, true, int(confusion[true, predicted]), ha="center", va="center", size=8, color=shade)
    figure.colorbar(drawn, ax=matrix, shrink=0.85, format=PercentFormatter(1.0, decimals=0))
    figure.savefig(path)


def draw_dense(rows: list[dict[str, Any]], key: str, label: str, sheet: Any, title: str, path: str | Path) -> None:
    """Draw one PNG with loss and figure over the epochs, and a sheet of held-out pictures with what the model says.

    Args:
        rows: Of :class:`vitzoo.tasks.history.History`.
        key: Of the figure in ``rows``, without ``val_``.
        label: Its name.
        sheet: A picture.
        title: Over both.
        path: Of the PNG; its folder exists.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(15, 7.5), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, color=INK, x=0.012, ha="left", weight="bold")
    curve, pictures = figure.subplots(1, 2, width_ratios=(1, 2))
    epochs = [row["epoch"] + 1 for row in rows]
    curve.plot(epochs, [row["train_loss"] for row in rows], color=TRAIN, marker="o", ms=3, label="training loss")
    curve.set_xlabel("epoch")
    curve.set_ylabel("loss", color=TRAIN)
    curve.set_ylim(bottom=0)
    curve.xaxis.set_major_locator(MaxNLocator(integer=True))
    right = curve.twinx()
    validated = [row for row in rows if row[f"val_{key}"] is not None]
    where, values = [row["epoch"] + 1 for row in validated], [row[f"val_{key}"] for row in validated]
    right.plot(where, values, color=VAL, marker="o", ms=3, lw=2, label=f"held-out {label}")
    right.set_ylabel(label, color=VAL)
    right.set_ylim(0, 1.02)
    right.grid(axis="y", color="#e3e5e8", lw=0.7)
    handles = [*curve.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    right.legend(handles, [line.get_label() for line in handles], loc="center right", frameon=False)
    pictures.imshow(np.asarray(sheet))
    pictures.set_title("held-out pictures: truth, prediction", fontsize=10, color=INK)
    pictures.axis("off")
    figure.savefig(path)


def draw_groups(groups: list[tuple[str, list[Image.Image], list[str]]], path: str | Path, edge: int = 160) -> None:
    """Draw sheets of pictures below each other, each with a heading.

    Args:
        groups: Heading, pictures and their captions; a group without pictures is left out.
        path: Of the PNG; its folder exists.
        edge: Pixels of a picture.
    """
    sheets = [(text, sheet(pictures, 8, edge, captions)) for text, pictures, captions in groups if pictures]
    if not sheets:
        return
    line = 26
    canvas = Image.new("RGB", (max(s.width for _, s in sheets), sum(s.height + line for _, s in sheets)), "white")
    pen, font, top = ImageDraw.Draw(canvas), ImageFont.load_default(size=15), 0
    for text, drawn in sheets:
        pen.text((8, top + 5), text, fill=INK, font=font)
        canvas.paste(drawn, (0, top + line))
        top += drawn.height + line
    canvas.save(path)


def draw_answers(
    images: Any, classes: list[str], samples: list[list[float]], mistakes: list[list[float]], path: str | Path
) -> None:
    """Draw some pictures with what the classifier says, and its most confident mistakes.

    Args:
        images: The split; :class:`vitzoo.data.images.Images`.
        classes: Names.
        samples: Rows of :class:`vitzoo.tasks.figures.Kept`.
        mistakes: Likewise.
        path: Of the PNG; its folder exists.
    """

    def group(text: str, rows: list[list[float]]) -> tuple[str, list[Image.Image], list[str]]:
        pictures, captions = [], []
        for _, number, true, said, confidence in rows:
            pictures.append(images.picture(int(number)))
            answer = classes[int(said)] if said == true else f"{classes[int(said)]}, not {classes[int(true)]}"
            captions.append(f"{100 * confidence:.0f} % {answer}"[:26])
        return text, pictures, captions

    draw_groups([group("held-out pictures", samples), group("surest mistakes", mistakes)], path)


def draw_pairs(shown: list[tuple[Image.Image, Image.Image]], surest: Surest, path: str | Path) -> None:
    """Draw some held-out pictures, truth and answer side by side, and those with the most confident mistakes.

    Args:
        shown: Pairs.
        surest: Pairs with the share or score of what is wrong.
        path: Of the PNG; its folder exists.
    """
    first = [picture for pair in shown for picture in pair]
    worst = [picture for _, *pair in surest.pairs for picture in pair]
    captions = [text for key, *_ in surest.pairs for text in ("", f"mistaken: {key:.2f}")]
    draw_groups([("held-out pictures: truth, answer", first, []), ("surest mistakes: truth, answer", worst, captions)], path)
