"""Pages that are written from the code when the site is built: families, patterns drawn, tables as measured."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = (
    ("window(7)", "window(7, shift=3)", "grid(4)", "dilated_window(7, 4)"),
    ("stripe(rows=3)", "halo(4, 3)", "neighborhood(7)", "neighborhood(5, dilation=3)"),
)


def docstring_of(family: str) -> str:
    """What the family's module says of itself, as Markdown."""
    module = ROOT / "vitzoo" / "models" / f"{family}.py"
    path = module if module.is_file() else module.with_suffix("") / "__init__.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.replace(":\n- ", ":\n\n- ")


def table(title: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A table in Markdown; what is None stays empty."""
    lines = [title, ("---",) * len(title), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def picture_of(models: list[dict[str, Any]]) -> bytes | None:
    """Who sees whom in each stage of the family's smallest published model; None where no pattern says it."""
    from vitzoo.models.anatomy import anatomy
    from vitzoo.pictures import draw_patterns

    published = [model for model in models if "micro" not in model["name"]] or models
    smallest = min(published, key=lambda model: model["params"])
    drawn = {}
    for part in anatomy(smallest["name"], None):
        for call in part.attention:
            if call.pattern is not None:
                side = min(call.rows, 28), min(call.cols, 28)
                try:
                    call.pattern.check(*side)
                except ValueError:
                    side = call.rows, call.cols
                drawn[f"{smallest['name']}, {part.name}\n{call.pattern}"] = (call.pattern, *side)
    return as_png(draw_patterns([(name, *rest) for name, rest in drawn.items()])) if drawn else None


def nouns() -> Any:
    """The picture ``docs/patterns.png``, which README shows too: ``python docs/hooks.py`` draws it anew."""
    from vitzoo import patterns
    from vitzoo.pictures import draw_patterns

    calls = [call for line in PATTERNS for call in line]
    return draw_patterns([(call, eval(call, vars(patterns)), 28, 28) for call in calls])  # noqa: S307  # the constants above


def as_png(picture: Any) -> bytes:
    """The bytes of a picture file."""
    content = io.BytesIO()
    picture.save(content, format="PNG", optimize=True)
    return content.getvalue()


def page_of(family: str, models: list[dict[str, Any]], drawn: bool) -> str:
    """A family: what is new, its pattern, its variants, its weights."""
    import vitzoo

    title, _, rest = docstring_of(family).partition("\n\n")
    parts = [f"# {family}\n\n{title}", rest]
    if drawn:
        parts.append(f"A query red, the keys it sees blue:\n\n![who sees whom]({family}.png)")
    rows = [(f"`{m['name']}`", f"{m['params'] / 1e6:.2f} M", f"{m['gmacs']:.2f}", m["img_size"][0], m["top1"]) for m in models]
    note = (
        "Multiply-adds are counted at the image size that stands beside them; top-1 on ImageNet-1k is what the authors report."
    )
    parts.append(f"## Models\n\n{table(('name', 'parameters', 'GMACs', 'size', 'top-1'), rows)}\n\n{note}")
    weights = [row for model in models for row in vitzoo.checkpoints_of(model["name"]).values()]
    if weights:
        rows = [
            (f"`{w.name}`", w.img_size, w.top1, w.license, f"[{place(w)}]({w.page})" if w.url else place(w)) for w in weights
        ]
        parts.append(f"## Weights\n\n{table(('name', 'size', 'top-1', 'licence', 'from'), rows)}")
    return "\n\n".join(parts) + "\n"


def place(row: Any) -> str:
    """Where a checkpoint comes from, with a link."""
    name = "shipped" if row.file else row.hf_hub_id or row.source
    return f"[{name}]({row.page})" if row.url else name


def on_files(files: Any, config: Any) -> Any:
    """mkdocs calls this with the files of the site: the generated ones are added."""
    from mkdocs.structure.files import File

    def add(uri: str, content: str | bytes) -> None:
        files.append(File.generated(config, uri, content=content))

    models = json.loads((ROOT / "weights" / "index.json").read_text(encoding="utf-8"))["models"]
    families: dict[str, list[dict[str, Any]]] = {}
    for model in models:
        families.setdefault(model["family"], []).append(model)
    rows = []
    for family, members in sorted(families.items()):
        picture = picture_of(members)
        if picture:
            add(f"families/{family}.png", picture)
        add(f"families/{family}.md", page_of(family, members, bool(picture)))
        rows.append((f"[{family}]({family}.md)", docstring_of(family).split("\n\n")[0].replace("\n", " "), len(members)))
    add("families/index.md", f"# Families\n\n{table(('family', 'paper', 'models'), rows)}\n")
    tables = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks" / "results").glob("*.md"))]
    add("performance.md", "\n\n".join([(Path(__file__).parent / "performance.txt").read_text(encoding="utf-8"), *tables]))
    return files


if __name__ == "__main__":
    nouns().save(ROOT / "docs" / "patterns.png", optimize=True)
