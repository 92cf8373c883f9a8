"""channel_attend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.budget import assert_within_budget
from vitzoo.ops import channel_attend, explain

IMPLEMENTATIONS = ("torch", "reference")


def tensors(B=2, S=7, L=5, N=3, D=4, E=6, dtype=torch.float64):
    shapes = ((B, S, N, D), (B, S, N, E), (B, L, N, E))
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equals_loops_over_single_channels(impl):
    q, k, v = tensors()
    out = channel_attend(q, k, v, scale=0.4, impl=impl)
    for b in range(2):
        for n in range(3):
            for i in range(4):
                weights = (0.4 * (q[b, :, n, i] @ k[b, :, n])).softmax(0)
                torch.testing.assert_close(out[b, :, n, i], v[b, :, n] @ weights)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_are_those_of_finite_differences(impl):
    leaves = tensors(S=3, L=2, N=2, D=3, E=2)
    assert torch.autograd.gradcheck(lambda q, k, v: channel_attend(q, k, v, scale=0.7, impl=impl), leaves)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_tokens_in_another_order_are_the_same_attention(impl):
    q, k, v = (x.detach() for x in tensors())
    order = torch.randperm(7)
    shuffled = channel_attend(q[:, order], k[:, order], v, scale=0.4, impl=impl)
    torch.testing.assert_close(shuffled, channel_attend(q, k, v, scale=0.4, impl=impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_tokens_every_channel_counts_alike(impl):
    q, k, v = tensors()
    out = channel_attend(q[:, :0], k[:, :0], v, scale=0.4, impl=impl)
    torch.testing.assert_close(out, v.mean(-1, keepdim=True).expand(2, 5, 3, 4))
    assert channel_attend(q[:0], k[:0], v[:0], scale=0.4, impl=impl).shape == (0, 5, 3, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_halves_accumulate_in_fp32(impl, dtype):
    # scores of 5000 tokens are sums beyond what a fp16 holds
    q, k, v = (x.detach() for x in tensors(S=5000, dtype=torch.float32))
    halves = [(8 * x.abs()).to(dtype) for x in (q, k)] + [v.to(dtype)]
    out = channel_attend(*halves, scale=1e-4, impl=impl)
    exact = channel_attend(*(x.double() for x in halves), scale=1e-4, impl="reference")
    assert out.dtype == dtype
    assert_within_budget(out, exact.to(dtype), exact)


def test_autocast_casts_all_three():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert channel_attend(*tensors(dtype=torch.float32), scale=1.0).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q, k, v: (q, k, v[0]), r"needs v as \[B, S, N, D\]"),
        (lambda q, k, v: (q[:, 1:], k, v), r"needs q \[B, S, N, D\], k \[B, S, N, E\] and v \[B, L, N, E\]"),
        (lambda q, k, v: (q, k, v[..., 1:]), r"needs q \[B, S, N, D\]"),
        (lambda q, k, v: (q, k.float(), v), "one dtype, got torch.float64, torch.float32, torch.float64"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        channel_attend(*change(*tensors()), scale=1.0)


def test_explain_names_who_would_run():
    assert explain(channel_attend, *tensors(), scale=1.0).startswith("-> channel_attend torch")


def test_one_exported_graph_serves_all_sizes():
    class Op(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return channel_attend(q, k, v, scale=q.shape[1] ** -0.5)

    batch, tokens = Dim("batch", max=64), Dim("tokens", max=4096)
    shapes = {name: {0: batch, 1: tokens} for name in ("q", "k")} | {"v": {0: batch, 1: Dim("others", max=4096)}}
    program = torch.export.export(Op(), tensors(dtype=torch.float32), dynamic_shapes=shapes).module()
    other = tensors(B=3, S=11, L=2, dtype=torch.float32)
    torch.testing.assert_close(program(*other), channel_attend(*other, scale=11**-0.5))
