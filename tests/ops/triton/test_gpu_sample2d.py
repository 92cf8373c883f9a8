"""sample2d's kernels on a GPU: the full matrix against fp64, the budget being twice what plain PyTorch gets wrong."""

from __future__ import annotations

import pytest
import torch

from tests.budget import assert_within_budget
from tests.ops.triton.sample_cases import CASES, Case, gradients, inputs, kernels
from vitzoo.ops import sample2d

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]

MATRIX = [
    *CASES.values(),
    Case((56, 56), 49, G=1, C=64),
    Case((14, 14), 196, G=6, C=64),
    Case((224, 3), 1000, G=2, C=7),
    Case((7, 7), 49, G=1, C=768),
    Case((65, 63), 4095, G=1, C=33, reach=1.01),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_samples_and_gradients_within_plain_pytorchs_error(nan_memory, case, dtype):
    given = inputs(case._replace(dtype=dtype), "cuda")
    exact = gradients(*given, torch.float64, torch.float64)
    plain = gradients(*given, dtype, torch.float32)
    for name, value in kernels(*given).items():
        assert_within_budget(value, plain[name], exact[name], name=name)


@pytest.mark.parametrize("case", MATRIX[-5:], ids=str)
def test_fifty_runs_give_the_same_bits(case):
    given = inputs(case._replace(dtype=torch.bfloat16, B=8), "cuda")
    first = kernels(*given)
    for _ in range(49):
        assert all(torch.equal(first[name], value) for name, value in kernels(*given).items())


def test_pytorchs_way_is_deterministic_where_that_is_asked_for(nan_memory):
    x, points, dout = inputs(MATRIX[-5], "cuda")

    def everything():
        leaves = x.clone().requires_grad_(), points.clone().requires_grad_()
        return torch.autograd.grad(sample2d(*leaves, impl="grid_sample"), leaves, dout)

    first, exact = everything(), gradients(x, points, dout, torch.float64, torch.float64)
    for got, name in zip(first, ("dx", "dpoints"), strict=True):
        torch.testing.assert_close(got.double(), exact[name], rtol=1e-4, atol=1e-4)
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(everything(), first, strict=True))


def test_the_op_is_registered_for_cuda():
    x, points, dout = inputs(CASES["sample2d: 17 groups, a map and points by strides"], "cuda")
    torch.library.opcheck(torch.ops.vitzoo.sample2d.default, (x.requires_grad_(), points.requires_grad_()))
    torch.library.opcheck(torch.ops.vitzoo.sample2d_backward.default, (dout, x.detach(), points.detach()))


def test_compiles_as_one_graph():
    def step(x, points):
        return sample2d(x, points, impl="triton").square().mean()

    leaves = [t.requires_grad_() for t in inputs(MATRIX[-5], "cuda")[:2]]
    expected = torch.autograd.grad(step(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(got, expected)
