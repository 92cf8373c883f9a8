"""linear_attend's and channel_attend's kernels on a GPU: against fp64, the budget being twice what plain PyTorch gets wrong."""

from __future__ import annotations

import pytest
import torch

from tests.budget import assert_within_budget
from tests.ops.triton.product_cases import Case, channel, inputs, kernels, linear, results
from vitzoo.ops import channel_attend, linear_attend

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FORMULAS = {"linear": linear, "channel": channel}
OPS = {"linear": torch.ops.vitzoo.linear_attend, "channel": torch.ops.vitzoo.channel_attend}
BACKWARDS = {"linear": torch.ops.vitzoo.linear_attend_backward, "channel": torch.ops.vitzoo.channel_attend_backward}


def check(case: Case) -> None:
    arguments = inputs(case, "cuda")
    actual = kernels(case.op, *arguments)
    exact = results(FORMULAS[case.op], *arguments, dtype=torch.float64)
    plain = results(FORMULAS[case.op], *arguments, dtype=case.dtype)
    for name, value in exact.items():
        assert_within_budget(actual[name], plain[name].to(actual[name].dtype), value, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("L", "S"), [(1, 1), (221, 221), (49, 3136), (3136, 49), (3136, 3136)])
@pytest.mark.parametrize("op", FORMULAS)
def test_every_length_within_plain_pytorchs_error(nan_memory, op, L, S, dtype):
    check(Case(op, L, S, D=32, N=3, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "E"), [(8, 8), (20, 20), (24, 24), (40, 8), (48, 48), (64, 96), (96, 96), (130, 72), (256, 256)])
@pytest.mark.parametrize("op", FORMULAS)
def test_every_head_dimension(nan_memory, op, D, E, dtype):
    check(Case(op, 197, 300, D=D, E=E, dtype=dtype))


@pytest.mark.parametrize("N", [1, 3, 17])
@pytest.mark.parametrize("op", FORMULAS)
def test_every_number_of_heads_and_strides_that_differ(nan_memory, op, N):
    check(Case(op, 130, 130, D=24, N=N, B=3, dtype=torch.bfloat16))
    check(Case(op, 130, 130, D=24, N=N, B=3, dtype=torch.bfloat16, packed=False))


@pytest.mark.parametrize("values", [torch.bfloat16, torch.float16], ids=str)
def test_features_may_be_wider_than_values(nan_memory, values):
    check(Case("linear", 300, 300, D=32, values=values))


@pytest.mark.parametrize("op", FORMULAS)
def test_fifty_runs_give_the_same_bits(op):
    arguments = inputs(Case(op, 3136, 3136, D=32, N=3, B=8, dtype=torch.bfloat16), "cuda")
    first = kernels(op, *arguments)
    for _ in range(49):
        assert all(torch.equal(first[name], value) for name, value in kernels(op, *arguments).items())


@pytest.mark.parametrize("op", FORMULAS)
def test_the_op_is_registered_for_cuda(op):
    q, k, v, grad, number = inputs(Case(op, 20, 20, D=16), "cuda")
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(OPS[op].default, (*leaves, number))
    out, *saved = OPS[op](q, k, v, number)
    more = [out, *saved] if op == "linear" else [*saved, number]
    torch.library.opcheck(BACKWARDS[op].default, (grad, q, k, v, *more))


@pytest.mark.parametrize("op", FORMULAS)
def test_compiles_as_one_graph(op):
    def step(q, k, v):
        if op == "linear":
            return linear_attend(q, k, v, impl="triton").square().mean()
        return channel_attend(q, k, v, scale=0.1, impl="triton").square().mean()

    q, k, v, *_ = inputs(Case(op, 300, 300, D=32), "cuda")
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(step(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(got, expected)
