"""What every test shares: one thread, one seed, uninitialised memory that shows, and golden files from anywhere."""

from __future__ import annotations

import os

# Two pytest processes share two cores, and sums keep their order: before torch is imported, also for subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network is a test that fails elsewhere

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        action="append",
        default=[],
        metavar="DIR",
        help="run the golden files below DIR instead of those of the repository; may be given several times",
    )
    parser.addoption(
        "--models",
        action="append",
        default=[],
        metavar="GLOB",
        help="run contract, export and heads on all listed names that match instead of small ones; may be given several times",
    )


def is_whole_model(path: Path) -> bool:
    """Whether a golden file holds a model's weights and what the model puts out: by its header."""
    from tests.golden.test_files import WHOLE

    with safe_open(path, framework="pt") as file:
        names = file.keys()
        whole = json.loads(file.metadata()["spec"])["family"] in WHOLE
    return whole and any(n.startswith("state/") for n in names) and any(n == "feature/0" for n in names)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture in {"golden_file", "whole_model"} & set(metafunc.fixturenames):
        given = [Path(folder) for folder in metafunc.config.getoption("--golden")]
        for folder in given:
            if not folder.is_dir():
                raise pytest.UsageError(f"--golden {folder}: there is no such folder.")
        files = [
            (path, str(path.relative_to(folder).with_suffix("")))
            for folder in given or [Path(__file__).parent / "golden" / "data"]
            for path in sorted(folder.rglob("*.safetensors"))
        ]
        if not files:
            raise pytest.UsageError("There are no *.safetensors files below the golden folders.")
        if fixture == "whole_model":
            files = [(path, name) for path, name in files if is_whole_model(path)]
        metafunc.parametrize(fixture, [path for path, _ in files], ids=[name for _, name in files])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, in whatever order and process it runs."""
    torch.manual_seed(0)


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """``torch.empty`` and its kin hold NaN, so that reading what nobody wrote shows in the result.

    Filling happens in deterministic mode only; ``warn_only`` keeps ops without a deterministic form running.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
