"""The import graph, stated once. A violation names the file, the line and both modules.

patterns <- ops <- layers <- models <- {tokens <- heads, explain} <- tasks <- train.py
checkpoints and weights below the registry, data below tasks, bench and tests on top, imported by nobody
vitzoo_cli beside the package: what it needs of it is imported inside functions
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# part: the parts it may import. A part of the package that is not here has no place in the graph yet.
GRAPH: dict[str, set[str]] = {
    "patterns": set(),
    "ops": {"patterns"},
    "layers": {"patterns", "ops"},
    "checkpoints": {"layers"},
    "weights": set(),
    "pictures": {"patterns"},
    "exporting": set(),
    "models": {"patterns", "ops", "layers", "checkpoints", "weights"},
    "tokens": {"patterns", "ops", "layers", "checkpoints", "models"},
    "heads": {"patterns", "ops", "layers", "checkpoints", "models", "tokens"},
    "explain": {"patterns", "ops", "layers", "models"},
    "data": set(),
    "tasks": {"patterns", "ops", "layers", "checkpoints", "models", "tokens", "heads", "data", "vitzoo"},
    "vitzoo_cli": {
        "patterns",
        "pictures",
        "exporting",
        "checkpoints",
        "weights",
        "models",
        "tokens",
        "heads",
        "explain",
        "data",
        "tasks",
        "bench",
        "vitzoo",
    },
    "bench": {"patterns", "ops", "layers", "checkpoints", "models", "tokens", "heads", "data", "tasks", "vitzoo"},
    "vitzoo": {"models", "tokens"},  # vitzoo/__init__.py: what `import vitzoo` costs is what this pulls in (tokens: see below)
    "__main__": {"vitzoo_cli"},
    "train": {"data", "tasks", "vitzoo", "vitzoo_cli"},
}

# foreign package: the parts that may import it when they are imported themselves (inside a function: where needed)
AT_IMPORT: dict[str, set[str]] = {
    # patterns: integers only, so that anything may use it; vitzoo_cli: `vitzoo list` answers at once
    "torch": set(GRAPH) - {"patterns", "pictures", "weights", "vitzoo_cli"},
    "vitzoo": set(GRAPH) - {"vitzoo_cli"},
    "lightning": {"tasks", "data", "train", "bench"},  # slow to import, needed for training only
    "triton": {"ops"},
    "vitzoo.tokens": {"tokens", "heads", "tasks", "bench"},  # not by `import vitzoo`: only a reduced model needs it
    "vitzoo.explain": {"explain"},
}

IMPLEMENTATIONS = ("reference", "sdpa", "grid_sample", "triton")
PRIVATE_OF_TIMM = "vitzoo.models._contract"  # the one place that a rename in timm can break


class Import(NamedTuple):
    """``module`` (in ``file``, at ``line``) imports ``target``; at import time unless inside a function."""

    file: str
    line: int
    module: str
    target: str
    at_import: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.module} imports {self.target}"


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """Every import statement of a file, relative ones resolved, names that are modules of ours told from their contents."""
    module = module_name(path, root)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [base])])
            targets = []
            for alias in node.names:
                child = root.joinpath(*base.split("."), alias.name)
                is_module = child.with_suffix(".py").is_file() or child.is_dir()
                targets.append(f"{base}.{alias.name}" if is_module else base)
        else:
            continue
        for target in dict.fromkeys(targets):
            yield Import(str(path.relative_to(root)), node.lineno, module, target, id(node) not in inside)


def library_imports(root: Path) -> list[Import]:
    files = sorted([*(root / "vitzoo").rglob("*.py"), *(root / "vitzoo_cli").rglob("*.py")])
    if (root / "train.py").is_file():
        files.append(root / "train.py")
    return [found for path in files for found in imports_of(path, root)]


def part(module: str) -> str:
    """``vitzoo.models.swin`` is of the part ``models``; the package itself and ``train`` are parts of their own."""
    names = module.split(".")
    return names[1] if names[0] == "vitzoo" and len(names) > 1 else names[0]


def ours(imports: list[Import]) -> list[Import]:
    return [i for i in imports if i.target.split(".")[0] in ("vitzoo", "vitzoo_cli", "train", "tests")]


def against_the_graph(imports: list[Import]) -> list[str]:
    wrong = []
    for i in ours(imports):
        here, there = part(i.module), part(i.target)
        if here not in GRAPH:
            wrong.append(f"{i}: the part '{here}' has no place in GRAPH")
        elif there != here and there not in GRAPH[here]:
            wrong.append(f"{i}: {here} may import {', '.join(sorted(GRAPH[here])) or 'nothing of vitzoo'}")
    return wrong


def against_foreign_rules(imports: list[Import]) -> list[str]:
    wrong = [
        f"{i}: only {', '.join(sorted(allowed))} may, outside a function"
        for i in imports
        for name, allowed in AT_IMPORT.items()
        if i.at_import and f"{i.target}.".startswith(f"{name}.") and part(i.module) not in allowed
    ]
    return wrong + [
        f"{i}: private modules of timm are imported in {PRIVATE_OF_TIMM} only"
        for i in imports
        if i.target.split(".")[0] == "timm" and "._" in i.target and i.module != PRIVATE_OF_TIMM
    ]


def between_families(imports: list[Import]) -> list[str]:
    def family(module: str) -> str | None:
        names = module.split(".")
        return names[2] if names[:2] == ["vitzoo", "models"] and len(names) > 2 and not names[2].startswith("_") else None

    return [
        f"{i}: families never import each other; move what they share to vitzoo.layers"
        for i in imports
        if family(i.module) and family(i.target) and family(i.module) != family(i.target)
    ]


def between_implementations(imports: list[Import]) -> list[str]:
    """Also through the files that an implementation is divided into."""

    def implementation(module: str) -> tuple[str, str] | None:
        names = module.split(".")
        inside = names[:2] == ["vitzoo", "ops"] and len(names) > 3 and names[3] in IMPLEMENTATIONS
        return (names[2], names[3]) if inside else None

    edges: dict[str, list[Import]] = {}
    for i in imports:
        if i.module.startswith("vitzoo.ops.") and i.target.startswith("vitzoo.ops."):
            edges.setdefault(i.module, []).append(i)
    wrong = []
    for start in {m for m in edges if implementation(m)}:
        seen, queue = {start}, [start]
        while queue:
            for i in edges.get(queue.pop(), []):
                other = implementation(i.target)
                if other and other != implementation(start):
                    wrong.append(f"{i}: implementations never import each other (reached from {start})")
                elif i.target not in seen:
                    seen.add(i.target)
                    queue.append(i.target)
    return sorted(wrong)


CHECKS = [against_the_graph, against_foreign_rules, between_families, between_implementations]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_no_import_is(check):
    wrong = check(library_imports(ROOT))
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_library_was_found():
    modules = {i.module for i in library_imports(ROOT)}
    assert {"vitzoo", "vitzoo.models.swin", "vitzoo.models.nat", "vitzoo.ops.attend2d.api"} <= modules


@pytest.mark.parametrize(
    ("check", "file", "line", "said"),
    [
        (
            against_the_graph,
            "vitzoo/ops/x.py",
            "from vitzoo.models.swin import Swin",
            "vitzoo.ops.x imports vitzoo.models.swin",
        ),
        (against_the_graph, "vitzoo/layers/x.py", "from .. import bench", "vitzoo.layers.x imports vitzoo.bench"),
        (against_the_graph, "vitzoo/models/x.py", "import vitzoo", "vitzoo.models.x imports vitzoo"),
        (against_the_graph, "vitzoo/tasks/x.py", "from tests.budget import rms", "imports tests.budget"),
        (against_the_graph, "vitzoo/layers/x.py", "def f():\n    import vitzoo.tasks", "x.py:2: vitzoo.layers.x imports"),
        (against_the_graph, "vitzoo/wild/x.py", "import vitzoo.ops", "'wild' has no place"),
        (against_foreign_rules, "vitzoo/patterns.py", "import torch.nn", "vitzoo.patterns imports torch.nn"),
        (against_foreign_rules, "vitzoo/models/x.py", "import lightning.pytorch as pl", "imports lightning.pytorch"),
        (against_foreign_rules, "vitzoo/layers/x.py", "from timm.models._input import y", "imports timm.models._input"),
        (against_foreign_rules, "vitzoo/__init__.py", "from vitzoo.tokens import reduce", "vitzoo imports vitzoo.tokens: only"),
        (against_foreign_rules, "vitzoo/__init__.py", "from vitzoo.explain import flow", "vitzoo imports vitzoo.explain: only"),
        (between_families, "vitzoo/models/nat.py", "from vitzoo.models.swin import Swin", "families never import"),
        (between_families, "vitzoo/models/nat.py", "from .swin import Swin", "families never import"),
        (between_implementations, "vitzoo/ops/attend/sdpa.py", "from .reference import run", "never import each other"),
        (
            between_implementations,
            "vitzoo/ops/attend/shared.py",
            "from . import reference",
            "reached from vitzoo.ops.attend.sdpa",
        ),
    ],
    ids=lambda value: value.replace("\n", " ") if isinstance(value, str) else value.__name__,
)
def test_a_forbidden_import_is_reported_with_its_place(tmp_path, check, file, line, said):
    for name in ("", "ops/", "ops/attend/", "layers/", "models/", "bench/", "tasks/"):
        (tmp_path / "vitzoo" / name).mkdir(exist_ok=True, parents=True)
        (tmp_path / "vitzoo" / name / "__init__.py").touch()
    for name in ("models/swin.py", "ops/attend/reference.py"):
        (tmp_path / "vitzoo" / name).touch()
    (tmp_path / "vitzoo/ops/attend/sdpa.py").write_text("from vitzoo.ops.attend import shared")
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    if file.endswith("sdpa.py"):
        (tmp_path / "vitzoo/ops/attend/shared.py").touch()
    wrong = check(library_imports(tmp_path))
    assert any(said in message for message in wrong), wrong
