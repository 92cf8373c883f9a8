"""The Triton kernels against fp64, without a GPU: forward, lse and every gradient, at the borders."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.ops.triton import attend_cases, candidate_cases, point_cases, product_cases, routed_cases, sample_cases, scan_cases
from tests.ops.triton.attend2d_cases import CASES

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is not None
        and tuple(map(int, version("triton").split(".")[:2])) < (3, 8)
        and tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4),
        reason="the interpreter of this Triton makes integers of arrays, which this NumPy refuses",
    ),
]

TOLERANCE = {torch.float32: 4e-6, torch.float16: 3e-3}


@pytest.fixture(scope="module")
def interpreter():
    """A function from the name of a case to its errors: one process answers for all tests of this module."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "tests.ops.triton.interpreted"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
        env=os.environ | {"TRITON_INTERPRET": "1"},
    ) as process:

        def ask(name: str) -> dict[str, float]:
            process.stdin.write(name + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline() or '{"raised": "the process ended"}')
            assert "raised" not in answer, answer["raised"]
            return answer

        yield ask
        process.stdin.close()


@pytest.mark.parametrize("name", CASES)
def test_kernels_give_the_oracles_values_and_gradients(interpreter, name):
    case, errors = CASES[name], interpreter(name)
    assert set(errors) == {"out", "lse", "dq", "dk", "dv"} | ({"dbias"} if case.bias else set())
    wrong = {key: error for key, error in errors.items() if not error <= TOLERANCE[case.dtype] or math.isnan(error)}
    assert not wrong, f"{name}: largest errors {errors}"


@pytest.mark.parametrize("name", attend_cases.CASES)
def test_attend_gives_the_oracles_values_and_gradients(interpreter, name):
    case, errors = attend_cases.CASES[name], interpreter(name)
    biases = {"dbias": case.bias is not None, "dkey_bias": case.key_bias}
    assert set(errors) == {"out", "lse", "dq", "dk", "dv", *(bias for bias, given in biases.items() if given)}
    wrong = {key: error for key, error in errors.items() if not error <= TOLERANCE[case.dtype] or math.isnan(error)}
    assert not wrong, f"{name}: largest errors {errors}"


@pytest.mark.parametrize("name", point_cases.CASES)
def test_attend_at_points_gives_the_oracles_values_and_gradients(interpreter, name):
    case, errors = point_cases.CASES[name], interpreter(name)
    assert set(errors) == {"out", "lse", "dq", "dk", "dv", "dtable", "dpoints"} | ({"dkey_bias"} if case.key_bias else set())
    wrong = {key: error for key, error in errors.items() if not error <= TOLERANCE[case.dtype] or math.isnan(error)}
    assert not wrong, f"{name}: largest errors {errors}"


@pytest.mark.parametrize("name", routed_cases.CASES)
def test_attend_routed_gives_the_oracles_values_and_gradients(interpreter, name):
    case, errors = routed_cases.CASES[name], interpreter(name)
    assert set(errors) == {"out", "lse", "dq", "dk", "dv"}
    wrong = {key: error for key, error in errors.items() if not error <= TOLERANCE[case.dtype] or math.isnan(error)}
    assert not wrong, f"{name}: largest errors {errors}"


@pytest.mark.parametrize("name", sample_cases.CASES)
def test_sample2d_gives_the_oracles_values_and_gradients(interpreter, name):
    case, errors = sample_cases.CASES[name], interpreter(name)
    assert set(errors) == {"out", "dx", "dpoints"}
    wrong = {key: error for key, error in errors.items() if not error <= TOLERANCE[case.dtype] or math.isnan(error)}
    assert not wrong, f"{name}: largest errors {errors}"


@pytest.mark.parametrize("name", product_cases.CASES)
def test_linear_and_channel_attend_give_the_oracles_values_and_gradients(interpreter, name):
    case, errors = product_cases.CASES[name], interpreter(name)
    assert set(errors) == {"out", "dq", "dk", "dv"}
    allowed = TOLERANCE[case.values or case.dtype]
    wrong = {key: error for key, error in errors.items() if not error <= allowed or math.isnan(error)}
    assert not wrong, f"{name}: largest errors {errors}"


@pytest.mark.parametrize("name", scan_cases.CASES)
def test_selective_scan_gives_the_oracles_values_and_gradients(interpreter, name):
    case, errors = scan_cases.CASES[name], interpreter(name)
    assert set(errors) == {"states", "du", "ddelta", "da", "db"}
    wrong = {key: error for key, error in errors.items() if not error <= TOLERANCE[case.dtype] or math.isnan(error)}
    assert not wrong, f"{name}: largest errors {errors}"


@pytest.mark.parametrize("name", candidate_cases.CASES)
def test_whatever_tuning_chooses_computes_the_same(interpreter, name):
    errors = interpreter(name)
    assert len(errors) > 2
    assert max(errors.values()) <= TOLERANCE[torch.float32], errors


def test_jit_functions_answer_as_span_does(interpreter):
    assert interpreter("spans") == {"start": 0, "first": 0, "end": 0}


def test_kernels_give_what_the_golden_files_hold():
    """A neighborhood, windows and a grid; ``TRITON_INTERPRET=1 pytest tests/golden --golden DIR`` takes any others."""
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/golden/test_golden.py"]
    done = subprocess.run(
        [*command, "-k", "ops and (na2d_k3 or win_v1 or maxvit)"],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    files = [
        path.stem
        for path in (root / "tests/golden/data/ops").iterdir()
        if path.stem.startswith(("na2d_k3", "win_v1", "maxvit"))
    ]
    assert f"{len(files)} passed" in done.stdout
