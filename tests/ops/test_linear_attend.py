"""linear_attend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.budget import assert_within_budget
from vitzoo.ops import explain, linear_attend

IMPLEMENTATIONS = ("torch", "reference")


def tensors(B=2, L=5, S=7, N=3, D=4, E=6, dtype=torch.float64):
    """Features that are not negative, values that are."""
    q, k = (torch.rand(B, n, N, D, dtype=dtype, requires_grad=True) for n in (L, S))
    return q, k, torch.randn(B, S, N, E, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equals_loops_over_single_queries(impl):
    q, k, v = tensors()
    out = linear_attend(q, k, v, eps=0.3, impl=impl)
    for b in range(2):
        for t in range(5):
            for n in range(3):
                weights = k[b, :, n] @ q[b, t, n]
                torch.testing.assert_close(out[b, t, n], weights @ v[b, :, n] / (weights.sum() + 7 * 0.3))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_are_those_of_finite_differences(impl):
    assert torch.autograd.gradcheck(lambda q, k, v: linear_attend(q, k, v, eps=0.1, impl=impl), tensors(L=3, S=4, N=2))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_query_gets_a_mean_of_the_values_and_fades_to_zeros_where_it_meets_no_key(impl):
    q, k, v = (x.detach() for x in tensors())
    ones = torch.ones_like(v)
    torch.testing.assert_close(linear_attend(q, k, ones, eps=0.0, impl=impl), torch.ones(2, 5, 3, 6, dtype=torch.float64))
    assert not linear_attend(torch.zeros_like(q), k, v, eps=1e-6, impl=impl).any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_eps_means_the_same_on_a_map_of_any_size(impl):
    q, k, v = (x.detach() for x in tensors())
    twice = linear_attend(q, torch.cat([k, k], 1), torch.cat([v, v], 1), eps=0.3, impl=impl)
    torch.testing.assert_close(twice, linear_attend(q, k, v, eps=0.3, impl=impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_keys_and_no_images_are_zeros(impl):
    q, k, v = tensors()
    out = linear_attend(q, k[:, :0], v[:, :0], impl=impl)
    assert out.shape == (2, 5, 3, 6)
    assert not out.any()
    assert linear_attend(q[:0], k[:0], v[:0], impl=impl).shape == (0, 5, 3, 6)


def test_strided_views_of_a_packed_projection_give_the_same():
    packed = torch.rand(2, 35, 3, 2, 8, dtype=torch.float64)
    q, k, v = packed.unbind(2)
    apart = (x.contiguous() for x in (q, k, v))
    torch.testing.assert_close(linear_attend(q, k, v), linear_attend(*apart, impl="reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_halves_accumulate_in_fp32(impl, dtype):
    # 5000 keys whose features sum to more than a fp16 holds, and to more than a bf16 counts
    q, k, v = (x.detach() for x in tensors(S=5000, dtype=torch.float32))
    halves = [(20 * x).to(dtype) for x in (q, k, v)]
    out = linear_attend(*halves, impl=impl)
    exact = linear_attend(*(x.double() for x in halves), impl="reference")
    assert out.dtype == dtype
    assert_within_budget(out, exact.to(dtype), exact)


def test_autocast_leaves_features_wide_and_the_output_is_of_the_values_dtype():
    q, k, v = (x.detach() for x in tensors(dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.float16):
        out = linear_attend(q * 1e-9, k, v.half(), eps=0.0)
    assert out.dtype == torch.float16
    expected = linear_attend(q, k, v.half().float(), eps=0.0)
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q, k, v: (q[0], k, v), r"needs q as \[B, L, N, D\]"),
        (lambda q, k, v: (q, k[:, 1:], v), r"needs q \[B, L, N, D\], k \[B, S, N, D\] and v \[B, S, N, E\]"),
        (lambda q, k, v: (q[..., 1:], k, v), r"needs q \[B, L, N, D\]"),
        (lambda q, k, v: (q.float(), k, v), "q and k of one dtype, got torch.float32 and torch.float64"),
        (lambda q, k, v: (q, k, v.long()), "needs a floating v"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        linear_attend(*change(*tensors()))


def test_a_negative_eps_is_refused_and_explain_names_who_would_run():
    with pytest.raises(ValueError, match=r"eps of at least 0, got -0\.1"):
        linear_attend(*tensors(), eps=-0.1)
    assert explain(linear_attend, *tensors()).startswith("-> linear_attend torch")


def test_one_exported_graph_serves_all_sizes():
    class Op(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return linear_attend(q, k, v)

    batch, queries, keys = Dim("batch", max=64), Dim("queries", max=4096), Dim("keys", max=4096)
    shapes = {"q": {0: batch, 1: queries}, "k": {0: batch, 1: keys}, "v": {0: batch, 1: keys}}
    program = torch.export.export(Op(), tensors(dtype=torch.float32), dynamic_shapes=shapes).module()
    other = tensors(B=3, L=11, S=2, dtype=torch.float32)
    torch.testing.assert_close(program(*other), linear_attend(*other))
