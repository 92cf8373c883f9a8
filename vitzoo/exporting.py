"""Models as files for other programs: ONNX and torch.export's, each checked against eager before it is handed over."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim

__all__ = ["Check", "sizes_to_check", "to_onnx", "to_program"]

LEAST = 33  # pixels of the smallest image that an exported graph takes; at 32 and below some maps have a single token


@dataclass(frozen=True)
class Check:
    """One comparison of an exported model with eager.

    Attributes:
        batch: images.
        height: rows of them.
        width: columns of them.
        error: largest difference, relative to the largest value of eager's output.
    """

    batch: int
    height: int
    width: int
    error: float


def sizes_to_check(size: tuple[int, int], batch: int, dynamic: str) -> list[tuple[int, int, int]]:
    """Batch, rows and columns that an exported model is checked at: those of the example, and where it is dynamic an odd one.

    Args:
        size: rows and columns of the example.
        batch: its images.
        dynamic: what may differ from the example.

    Returns:
        One or two triples.
    """
    first = (batch, *size)
    odd = (1, max(LEAST, size[0] - 27) | 1, max(LEAST, size[1] + 13) | 1)
    return {"all": [first, odd], "batch": [first, (1, *size)], "none": [first]}[dynamic]


def to_program(
    model: nn.Module,
    path: str | Path,
    size: tuple[int, int],
    *,
    batch: int = 2,
    dynamic: str = "all",
    tolerance: float = 1e-4,
) -> list[Check]:
    """Write a model as torch.export's program (``torch.export.load(path).module()``).

    Args:
        model: in eval mode, on the CPU.
        path: a ``.pt2`` file.
        size: rows and columns of the example.
        batch: its images, at least 2 where the batch may differ.
        dynamic: what may differ from the example: "all" (batch and image size), "batch" or "none".
        tolerance: see :class:`Check`.

    Returns:
        What was compared.

    Raises:
        ValueError: PyTorch cannot capture the model with these sizes dynamic, or the file differs from eager by more than
            ``tolerance``. It is not written.
    """
    path = Path(path)
    program = _captured(model, size, batch, dynamic)
    with _whole(path) as beside:
        torch.export.save(program, beside)
        loaded = torch.export.load(beside).module()
        return _checked(model, loaded, sizes_to_check(size, batch, dynamic), tolerance, path)


def to_onnx(
    model: nn.Module,
    path: str | Path,
    size: tuple[int, int],
    *,
    batch: int = 2,
    dynamic: str = "all",
    tolerance: float = 1e-4,
    opset: int = 18,
) -> list[Check]:
    """Write a model as ONNX: input ``image`` ``[batch, channels, height, width]``, outputs ``output_0`` and on.

    Args:
        model: in eval mode, on the CPU.
        path: a ``.onnx`` file.
        size: rows and columns of the example.
        batch: its images, at least 2 where the batch may differ.
        dynamic: what may differ from the example: "all" (batch and image size), "batch" or "none".
        tolerance: see :class:`Check`.
        opset: of the file.

    Returns:
        What was compared, by onnxruntime on the CPU.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: PyTorch cannot capture the model with these sizes dynamic, or the file differs from eager by more than
            ``tolerance``. It is not written.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f'ONNX needs {error.name}: pip install "vitzoo[export]".') from error
    path = Path(path)
    program = _captured(model, size, batch, dynamic)
    with _whole(path) as beside:
        with _quiet():
            exported: Any = torch.onnx.export(
                program, dynamo=True, opset_version=opset, input_names=["image"], optimize=True, verbose=False
            )
        exported.save(beside)
        session = onnxruntime.InferenceSession(str(beside), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run(image: Tensor) -> list[Tensor]:
            return [torch.from_numpy(value) for value in session.run(None, {name: image.numpy()})]

        return _checked(model, run, sizes_to_check(size, batch, dynamic), tolerance, path)


def _captured(model: nn.Module, size: tuple[int, int], batch: int, dynamic: str) -> Any:
    if dynamic not in ("all", "batch", "none"):
        raise ValueError(f'dynamic must be "all", "batch" or "none", got {dynamic!r}.')
    if dynamic != "none" and batch < 2:
        raise ValueError("A batch that may differ needs an example of at least 2 images: a graph of one is made for one.")
    height, width = size
    shapes = {} if dynamic == "none" else {0: Dim("batch", min=1, max=4096)}
    if dynamic == "all":
        shapes |= {2: Dim("height", min=LEAST, max=4096), 3: Dim("width", min=LEAST, max=4096)}
        # no map of the example may have a single row or column, nor as many rows as columns: the graph would be made for that
        height, width = max(height, 270), max(width, 350)
        width += 32 * (height == width)
    example = torch.zeros(batch, getattr(model, "in_chans", 3), height, width)
    options: dict[str, Any] = {"dynamic_shapes": (shapes or None,), "strict": False}
    with torch.no_grad(), _quiet():
        try:
            return torch.export.export(model, (example,), **options)
        except (UserError, RuntimeError):
            pass  # a guard that all sizes meet, and that the solver cannot prove (RVT): asked of each image when it runs
        try:
            return torch.export.export(model, (example,), **options, prefer_deferred_runtime_asserts_over_guards=True)
        except (UserError, RuntimeError) as error:  # the latter: values of the image decide
            said = str(error).strip().splitlines()[0]
            raise ValueError(
                f'{type(model).__name__} does not export with dynamic="{dynamic}": {said} '
                'Give sizes that stay as they are (dynamic="batch", or "none").'
            ) from error


def _checked(
    model: nn.Module, run: Callable[[Tensor], Any], sizes: Sequence[tuple[int, int, int]], tolerance: float, path: Path
) -> list[Check]:
    draw = torch.Generator().manual_seed(0)
    found = []
    for batch, height, width in sizes:
        image = torch.randn(batch, getattr(model, "in_chans", 3), height, width, generator=draw)
        with torch.no_grad():
            expected, got = _list(model(image)), _list(run(image))
        pairs = zip(expected, got, strict=True)
        error = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in pairs)
        if not error <= tolerance:
            raise ValueError(
                f"{path} was not written: at batch {batch}, {height} x {width} it differs from eager by {error:.1e}, "
                f"more than {tolerance:g}."
            )
        found.append(Check(batch, height, width, error))
    return found


def _list(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A place beside ``path`` whose file becomes it if nothing goes wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters print about their own progress."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
