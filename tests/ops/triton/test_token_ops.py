"""The kernels of match, merge_tokens and unmerge_tokens: interpreted, compiled for three generations, and on a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.triton.token_cases import MATCHES, MERGES, Match, Merge, measure_match, measure_merge

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
TOLERANCE = {torch.float32: 4e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}


@needs_triton
def test_kernels_give_the_definitions_values_and_gradients():
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "tests.ops.triton.token_cases"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    cases = {f"match {name}": case for name, case in MATCHES.items()} | {f"merge {name}": c for name, c in MERGES.items()}
    assert set(answers) == set(cases)
    wrong = {name: errors for name, errors in answers.items() if not within(errors, cases[name].dtype)}
    assert not wrong, wrong


def within(errors: dict[str, float], dtype: torch.dtype) -> bool:
    return all(error <= TOLERANCE[dtype] for error in errors.values())  # and not NaN


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_without_spills(monkeypatch, arch):
    from tests.ops.triton import compiled
    from vitzoo.ops.match.triton import launch as matching
    from vitzoo.ops.merge_tokens.triton import launch as merging

    def run() -> None:
        for dtype in (torch.bfloat16, torch.float32):
            metric = torch.empty(256, 197, 64, dtype=dtype, device="meta")
            matching.forward(metric[:, 0::2], metric[:, 1::2])
            x = torch.empty(256, 197, 384, dtype=dtype, device="meta")
            source, weight = torch.empty(256, 197, dtype=torch.int64, device="meta"), torch.empty(256, 197, device="meta")
            merging.spread(merging.collect(x, source, weight, 184), source, weight)

    launches = compiled.recorded(monkeypatch, arch, run)
    assert [one.kernel.__name__ for one in launches] == ["best_partner", "collect", "spread"] * 2
    monkeypatch.setitem(compiled.POINTERS, torch.int64, "*i64")
    for one in launches:
        usage = compiled.compile_launch(one, arch)
        print(f"sm_{arch} {one.kernel.__name__:14s} {usage}")
        assert usage.stack <= 64, (one.kernel.__name__, usage)
        assert usage.shared <= 99 << 10, (one.kernel.__name__, usage)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*MATCHES.values(), Match(99, 98, D=64, B=256), Match(1, 5000, D=384)], ids=str)
def test_matches_on_a_gpu(nan_memory, case, dtype):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    assert within(measure_match(case._replace(dtype=dtype), "cuda"), dtype)
    torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*MERGES.values(), Merge(197, 13, C=384, B=256), Merge(4096, 2000, C=768)], ids=str)
def test_merges_and_unmerges_on_a_gpu(nan_memory, case, dtype):
    assert within(measure_merge(case._replace(dtype=dtype), "cuda"), dtype)
