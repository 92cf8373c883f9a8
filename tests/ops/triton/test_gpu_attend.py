"""attend's kernels on a GPU: the full matrix against fp64, the budget being twice what plain PyTorch gets wrong."""

from __future__ import annotations

import pytest
import torch

from tests.budget import assert_within_budget
from tests.ops.triton.attend_cases import oracle
from vitzoo.ops import attend
from vitzoo.ops.attend import triton

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]

SIZES = [(1, 1), (197, 197), (49, 3136), (3136, 49), (130, 17), (16, 1000)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SPREADS = [None, (3, "L", "S"), (2, 3, "L", "S"), (2, 1, "L", "S"), ("L", "S")]


def inputs(L, S, D=32, N=3, B=2, dtype=torch.bfloat16, spread=None, keys=False):
    """q, k, v, bias, key_bias and cotangents of out and lse; k and v out of one projection."""
    q = torch.randn(B, L, N, D, dtype=dtype, device="cuda")
    k, v = torch.randn(B, S, 2, N, D, dtype=dtype, device="cuda").unbind(2)
    sizes = {"L": L, "S": S}
    bias = None if spread is None else torch.randn([sizes.get(n, n) for n in spread], device="cuda")
    key_bias = torch.randn(B, S, device="cuda") if keys else None
    return q, k, v, bias, key_bias, torch.randn_like(q), torch.randn(B, L, N, device="cuda")


def results(run, q, k, v, bias, key_bias, dout, dlse, dtype):
    """out, lse and every gradient by name, everything in `dtype`."""
    given = {"dq": q, "dk": k, "dv": v, "dbias": bias, "dkey_bias": key_bias}
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in given.items() if t is not None}
    out, lse = run(leaves["dq"], leaves["dk"], leaves["dv"], leaves.get("dbias"), leaves.get("dkey_bias"), 0.3)
    loss = (out * dout.to(dtype)).sum() + (lse * dlse.to(dtype)).sum()
    return {"out": out, "lse": lse, **dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))}


def kernels(q, k, v, bias, key_bias, dout, dlse):
    out, lse = triton.forward(q, k, v, bias, key_bias, 0.3)
    grads = triton.backward(dout, dlse, q, k, v, bias, key_bias, out, lse, 0.3)
    return dict(zip(("out", "lse", "dq", "dk", "dv", "dbias", "dkey_bias"), (out, lse, *grads), strict=True))


def check(*args):
    actual, exact = kernels(*args), results(oracle, *args, dtype=torch.float64)
    plain = results(oracle, *args, dtype=args[0].dtype)
    for name, value in exact.items():
        assert_within_budget(actual[name].to(plain[name].dtype), plain[name].detach(), value.detach(), name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [False, True], ids=["", "key bias"])
@pytest.mark.parametrize("spread", SPREADS, ids=str)
@pytest.mark.parametrize(("L", "S"), SIZES)
def test_every_spread_of_biases_within_plain_pytorchs_error(nan_memory, L, S, spread, keys, dtype):
    check(*inputs(L, S, dtype=dtype, spread=spread, keys=keys))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [8, 20, 24, 40, 64, 96, 128, 256])
def test_every_head_dimension(nan_memory, D, dtype):
    check(*inputs(65, 77, D=D, dtype=dtype, spread=(3, "L", "S"), keys=True))


@pytest.mark.parametrize(("L", "S"), [(49, 3136), (3136, 49), (197, 197)])
def test_fifty_runs_give_the_same_bits(L, S):
    args = inputs(L, S, B=4, spread=(3, "L", "S"), keys=True)
    first = kernels(*args)
    for _ in range(49):
        assert all(torch.equal(first[name], value) for name, value in kernels(*args).items())


def test_a_query_without_keys_gives_zeros():
    q, k, v, _, key_bias, *_ = inputs(20, 30, keys=True)
    key_bias[0] = -torch.inf
    out, lse = attend(q, k, v, key_bias=key_bias, return_lse=True, impl="triton")
    assert not out[0].any()
    assert torch.isneginf(lse[0]).all()
    assert torch.isfinite(lse[1]).all()


def test_compiles_as_one_graph():
    def step(q, k, v, bias):
        return attend(q, k, v, bias=bias, impl="triton").square().mean()

    q, k, v, bias, *_ = inputs(49, 500, spread=(3, "L", "S"))
    for t in (q, bias):
        t.requires_grad_()
    expected = torch.autograd.grad(step(q, k, v, bias), (q, bias))
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(q, k, v, bias), (q, bias))
    torch.testing.assert_close(got, expected)
