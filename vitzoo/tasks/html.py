"""A run's folder as one HTML page that needs nothing else: no network, no script, pictures inside."""

from __future__ import annotations

import base64
import csv
import json
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

__all__ = ["report"]

INK, LINE, COLOURS = "#30343b", "#e3e5e8", ("#b0602a", "#1f6f8b", "#6a8d3a", "#8a4f9e")
MATRIX = 60  # classes up to which the confusion matrix is a table
STAGES = {"val": "held-out pictures", "test": "test pictures"}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #30343b; max-width: 1180px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #e3e5e8 }
table { border-collapse: collapse } td, th { padding: 2px 10px 2px 0; text-align: left; font-variant-numeric: tabular-nums }
img { max-width: 100%; border: 1px solid #e3e5e8 } pre { background: #f6f7f8; padding: 1em; overflow: auto }
.big td { font-size: 1.3em } .matrix td { padding: 1px 4px; text-align: center; font-size: 12px }
.matrix th { font-size: 12px; padding: 1px 4px } .curves svg { margin-right: 12px } .scroll { overflow: auto; max-height: 34em }
"""


def report(run: Path, path: Path) -> Path:
    """Write the page of a run of ``train.py``, whatever of it there is yet.

    Args:
        run: Its folder; ``config.yaml`` is in it.
        path: Of the page.

    Returns:
        ``path``.

    Raises:
        ValueError: The folder holds no ``config.yaml``.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is no folder of a run of train.py: it has no config.yaml.")
    text = (run / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    model = config.get("model", {})
    name = model.get("name") or f"{model.get('kind')} on {model.get('backbone')}"
    parts = [
        f"<h1>{escape(str(name))}</h1>",
        f"<p>{escape(str(config.get('task', 'classification')))} &middot; {escape(str(run))}</p>",
    ]
    for stage, of in STAGES.items():
        parts += _evaluation(run, stage, of)
    history = _rows(run / "metrics.csv")
    parts += ["<h2>Learning curves</h2>", _curves(history) if history else "<p>No epoch has ended yet.</p>"]
    for stage, of in STAGES.items():
        parts += _tables(run, stage, of)
    pictures = [p for p in sorted(run.glob("*.png")) if p.name != "result.png"]
    for picture in [*pictures, *([run / "result.png"] if (run / "result.png").is_file() else [])]:
        parts += [f"<h2>{escape(_heading(picture.stem))}</h2>", _image(picture)]
    parts += [
        "<h2>Configuration</h2>",
        _settings(config),
        f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>",
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(str(name))}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, path)
    return path


def _heading(stem: str) -> str:
    stage, _, what = stem.partition("_")
    return (
        f"{what.capitalize()}: {STAGES[stage]}"
        if stage in STAGES and what
        else "The run at a glance"
        if stem == "result"
        else stem
    )


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    top = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><tr>{top}</tr>\n{body}</table>'


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'


def _evaluation(run: Path, stage: str, of: str) -> list[str]:
    path = run / f"{stage}_figures.json"
    if not path.is_file():
        return [] if stage == "test" else ["<p>Not evaluated yet: train.py validate, or the end of the run, does it.</p>"]
    found = json.loads(path.read_text(encoding="utf-8"))
    names = _names(found.get("task", "classification"))
    shown = {names.get(key, key): f"{value:.4f}" for key, value in found["figures"].items()}
    if found.get("images_per_second"):
        shown["img/s"] = f"{found['images_per_second']:.0f}"
    heading = f"<h2>{found['pictures']} {of}</h2>"
    return [heading, _table(list(shown), [list(shown.values())], "big"), f"<p>weights {escape(str(found['weights']))}</p>"]


def _names(task: str) -> dict[str, str]:
    from vitzoo.tasks.cli import TASKS

    return dict(TASKS[task][0].FIGURES) if task in TASKS else {}


def _tables(run: Path, stage: str, of: str) -> list[str]:
    parts = []
    classes = _rows(run / f"{stage}_classes.csv")
    if classes:
        by = next((key for key in ("accuracy", "iou", "ap") if key in classes[0]), None)
        ordered = sorted(classes, key=lambda row: float(row[by] or "inf")) if by else classes
        parts += [
            f"<h2>Classes: {of}, the hardest first</h2>",
            f'<div class="scroll">{_table(list(ordered[0]), [list(row.values()) for row in ordered])}</div>',
        ]
    path = run / f"{stage}_confusion.csv"
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as file:
            head, *lines = list(csv.reader(file))
        parts += [f"<h2>Confusion: {of}</h2>", _confusion(head[1:], [[int(cell) for cell in line[1:]] for line in lines])]
    return parts


def _confusion(classes: list[str], counts: list[list[int]]) -> str:
    """A shaded table, rows are the true classes; of many classes the pairs that are confused most."""
    if len(classes) > MATRIX:
        pairs = [(counts[i][j], classes[i], classes[j]) for i in range(len(classes)) for j in range(len(classes)) if i != j]
        most = sorted((pair for pair in pairs if pair[0]), reverse=True)[:40]
        return _table(["times", "true", "predicted"], most)
    rows = []
    for name, line in zip(classes, counts, strict=True):
        total = max(1, sum(line))
        shares = [(n, n / total) for n in line]
        cells = "".join(
            f'<td style="background: rgb(31 111 139 / {share:.2f}); color: {"white" if share > 0.5 else INK}">{n or ""}</td>'
            for n, share in shares
        )
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in classes)
    return f'<div class="scroll"><table class="matrix"><tr><th></th>{head}</tr>\n{chr(10).join(rows)}</table></div>'


def _curves(history: list[dict[str, str]]) -> str:
    columns = [key for key in history[0] if key not in ("epoch", "step", "seconds")]
    groups = [[key for key in columns if key.endswith("loss")], *([key] for key in columns if not key.endswith("loss"))]
    return '<div class="curves">' + "\n".join(_curve(history, keys) for keys in groups if keys) + "</div>"


def _curve(history: list[dict[str, str]], keys: list[str], width: int = 360, height: int = 210) -> str:
    """Columns of metrics.csv over the epochs, as SVG; a point says its value when it is pointed at."""
    lines = {key: [(int(row["epoch"]) + 1, float(row[key])) for row in history if row.get(key)] for key in keys}
    lines = {key: points for key, points in lines.items() if points}
    if not lines:
        return ""
    every = [point for points in lines.values() for point in points]
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    low, high = min(0.0, *(y for _, y in every)), max(y for _, y in every)
    left, top, right, bottom = 56, 22, width - 10, height - 24

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return left + across * (right - left), bottom - up * (bottom - top)

    drawn = [f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="{LINE}"/>']
    for i, (key, points) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        at = [place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(points) <= 400:
            drawn += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{colour}"><title>epoch {epoch}: {value:g}</title></circle>'
                for (x, y), (epoch, value) in zip(at, points, strict=True)
            ]
        drawn.append(f'<text x="{left + 110 * i}" y="14" font-size="12" fill="{colour}">{escape(key)}</text>')
    for value, y in ((low, bottom), (high, top + 4)):
        drawn.append(f'<text x="{left - 6}" y="{y}" font-size="11" text-anchor="end" fill="{INK}">{value:.4g}</text>')
    for epoch, x in dict.fromkeys([(first, left), (last, right)] if last > first else [(first, (left + right) / 2)]):
        drawn.append(f'<text x="{x}" y="{height - 6}" font-size="11" text-anchor="middle" fill="{INK}">{epoch}</text>')
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{"".join(drawn)}</svg>'


def _settings(config: dict[str, Any]) -> str:
    """The keys of the three parts that are set, side by side."""
    parts = {
        part: {k: v for k, v in (config.get(part) or {}).items() if v not in (None, [], {})}
        for part in ("model", "data", "trainer")
    }
    cells = [f"<td valign='top'>{_table([part, ''], values.items())}</td>" for part, values in parts.items()]
    return f"<table><tr>{''.join(cells)}</tr></table>"
