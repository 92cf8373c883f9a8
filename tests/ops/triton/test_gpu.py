"""The kernels on a GPU: the full matrix against fp64, the budget being twice what plain PyTorch gets wrong."""

from __future__ import annotations

import pytest
import torch

from tests.budget import assert_within_budget
from tests.ops.triton import oracle
from tests.ops.triton.attend2d_cases import MAPS
from vitzoo.ops.attend2d import triton
from vitzoo.patterns import everywhere, halo, neighborhood, window

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]

SCALE = 0.3
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(pattern, size, N, D, dtype, B=2, bias=True):
    """q, k, v as views of a packed projection, bias, and cotangents of out and lse."""
    reach_y, reach_x = pattern.reach(*size)
    q, k, v = torch.randn(B, *size, 3, N, D, dtype=dtype, device="cuda").unbind(3)
    table = torch.randn(N, 2 * reach_y + 1, 2 * reach_x + 1, device="cuda") if bias else None
    return q, k, v, table, torch.randn_like(q), torch.randn(q.shape[:4], device="cuda")


def kernels(q, k, v, pattern, bias, dout, dlse):
    ints = pattern.to_ints()
    out, lse = triton.forward(q, k, v, bias, ints, SCALE)
    grads = triton.backward(dout, dlse, q, k, v, bias, out, lse, ints, SCALE)
    names = ("out", "lse", "dq", "dk", "dv", "dbias")[: 6 if bias is not None else 5]
    return dict(zip(names, (out, lse, *grads), strict=False))


def check(pattern, q, k, v, bias, dout, dlse):
    def by_oracle(dtype):
        cast = (None if t is None else t.to(dtype) for t in (bias, dout, dlse))
        table, *cotangents = cast
        return oracle.gradients(*(t.to(dtype) for t in (q, k, v)), pattern, table, SCALE, *cotangents)

    actual, exact, plain = kernels(q, k, v, pattern, bias, dout, dlse), by_oracle(torch.float64), by_oracle(q.dtype)
    assert set(actual) == set(exact)
    for name, value in exact.items():
        result = actual[name].to(plain[name].dtype)  # lse and dbias are more precise than plain PyTorch's
        assert_within_budget(result, plain[name], value, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("pattern", "size"), MAPS, ids=repr)
def test_every_pattern_within_plain_pytorchs_error(nan_memory, pattern, size, bias, dtype):
    check(pattern, *inputs(pattern, size, 3, 32, dtype, bias=bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [8, 16, 20, 24, 40, 48, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("pattern", [window(7, shift=3), neighborhood(5), window(12)], ids=repr)
def test_every_head_dimension(nan_memory, pattern, D, dtype):
    check(pattern, *inputs(pattern, (13, 17), 2, D, dtype))


@pytest.mark.parametrize("heads", [1, 3, 17])
@pytest.mark.parametrize("pattern", [window(7, shift=3), neighborhood(5)], ids=repr)
def test_every_number_of_heads(nan_memory, pattern, heads):
    check(pattern, *inputs(pattern, (13, 17), heads, 24, torch.bfloat16, B=3))


@pytest.mark.parametrize("pattern", [window(4), neighborhood(3)], ids=repr)
def test_strides_of_q_k_and_v_may_differ(nan_memory, pattern):
    q, k, v, bias, dout, dlse = inputs(pattern, (9, 12), 3, 32, torch.bfloat16)
    check(pattern, q[:, :1].expand(q.shape), k.contiguous(), v, bias, dout.transpose(1, 2).contiguous().transpose(1, 2), dlse)


@pytest.mark.parametrize("pattern", [window(7, shift=3), neighborhood(7), window(12), halo(8, 3), everywhere], ids=repr)
def test_fifty_runs_give_the_same_bits(pattern):
    q, k, v, bias, dout, dlse = inputs(pattern, (28, 29), 3, 32, torch.bfloat16, B=8)
    first = kernels(q, k, v, pattern, bias, dout, dlse)
    for _ in range(49):
        again = kernels(q, k, v, pattern, bias, dout, dlse)
        assert all(torch.equal(first[name], value) for name, value in again.items())


def test_more_than_two_to_the_31_elements_in_all():
    q, k, v = torch.randn(7300, 56, 56, 3, 1, 32, dtype=torch.bfloat16, device="cuda").unbind(3)  # 2.2e9 elements
    for pattern in (window(7), neighborhood(7)):
        out, lse = triton.forward(q, k, v, None, pattern.to_ints(), SCALE)
        tail, tail_lse = triton.forward(q[-2:], k[-2:], v[-2:], None, pattern.to_ints(), SCALE)
        assert torch.equal(out[-2:], tail)
        assert torch.equal(lse[-2:], tail_lse)
