"""selective_scan's kernels: compiled for three generations of GPUs here, run on one where there is one."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from tests.budget import assert_within_budget
from tests.ops.triton.scan_cases import CASES, Case, gradients, inputs, kernels, oracle
from vitzoo.ops import selective_scan

compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="triton is not installed, or interprets",
)


@compiles
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_within_registers_and_shared_memory(monkeypatch, arch):
    from tests.ops.triton.compiled import recorded
    from tests.ops.triton.test_compile import STACK, check
    from vitzoo.ops.selective_scan.triton import launch

    def run() -> None:
        u, delta = torch.empty(256, 3136, 2, 96, dtype=torch.bfloat16, device="meta").unbind(2)
        a, b = torch.empty(96, device="meta"), torch.empty(256, 3136, device="meta")
        states = launch.forward(u, delta, a, b)
        launch.backward(torch.empty_like(states), u, delta, a, b, states)

    check(recorded(monkeypatch, arch, run), arch, "scan of 56 x 56", STACK)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES.values(), Case(3136, 96, B=3), Case(196, 448), Case(65, 33, B=70)], ids=str)
def test_states_and_gradients_within_plain_pytorchs_error(case, dtype):
    torch.manual_seed(0)
    given = inputs(case._replace(dtype=dtype), "cuda")
    run = oracle if case.L < 1000 else lambda *leaves: selective_scan(*leaves, impl="torch")
    exact = gradients(run, *given, dtype=torch.float64)
    plain = gradients(lambda *leaves: selective_scan(*leaves, impl="torch"), *given, dtype=torch.float32)
    for name, value in kernels(*given).items():
        assert_within_budget(value, plain[name].to(value.dtype), exact[name], factor=4.0, name=name)


@pytest.mark.gpu
def test_fifty_runs_give_the_same_bits():
    given = inputs(Case(3136, 96, B=8, dtype=torch.bfloat16), "cuda")
    first = kernels(*given)
    for _ in range(49):
        assert all(torch.equal(first[name], value) for name, value in kernels(*given).items())
