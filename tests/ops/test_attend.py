"""attend and merge_lse."""

from __future__ import annotations

import math

import pytest
import torch

from tests.budget import assert_within_budget
from vitzoo.ops import attend, attend2d, merge_lse
from vitzoo.ops.attend import sdpa
from vitzoo.patterns import neighborhood

IMPLEMENTATIONS = ("sdpa", "reference")


@pytest.fixture(params=[sdpa.FEW_KEYS, 0], ids=["keys first", "queries first"])
def order(request, monkeypatch):
    """In which order a CPU lays out the scores of the few keys that the tests have."""
    monkeypatch.setattr(sdpa, "FEW_KEYS", request.param)


def tensors(B=2, L=5, S=7, N=3, D=8, dtype=torch.float64):
    q = torch.randn(B, L, N, D, dtype=dtype, requires_grad=True)
    k, v = torch.randn(2, B, S, N, D, dtype=dtype, requires_grad=True).unbind()
    return q, k, v


def test_reference_equals_loops_over_single_queries():
    q, k, v = tensors()
    bias, key_bias = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    out, lse = attend(q, k, v, bias=bias, key_bias=key_bias, scale=0.4, return_lse=True, impl="reference")
    for b in range(2):
        for t in range(5):
            for n in range(3):
                scores = 0.4 * (k[b, :, n] @ q[b, t, n]) + bias[n, t] + key_bias[b]
                torch.testing.assert_close(out[b, t, n], scores.softmax(0) @ v[b, :, n])
                torch.testing.assert_close(lse[b, t, n], scores.logsumexp(0))


BIASES = {
    "none": (None, None),
    "dense": ((2, 3, 5, 7), None),
    "per head": ((3, 5, 7), None),
    "per key": (None, (2, 7)),
    "both": ((1, 5, 1), (2, 7)),
}


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("registered", [False, True], ids=["sdpa", "registered"])
@pytest.mark.parametrize("lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("shapes", BIASES.values(), ids=BIASES)
def test_every_form_gives_out_lse_and_all_gradients_of_the_reference(shapes, lse, registered):
    q, k, v = tensors()
    bias, key_bias = (None if s is None else torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    wanted = [t for t in (q, k, v, bias, key_bias) if t is not None]
    dout, dlse = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)

    def everything(run):
        out, log = run()
        total = (out * dout).sum() + ((log * dlse).sum() if lse else 0)
        return [out, *([log] if lse else []), *torch.autograd.grad(total, wanted)]

    def op(impl):
        answer = attend(q, k, v, bias=bias, key_bias=key_bias, return_lse=lse, impl=impl)
        return answer if lse else (answer, None)

    expected = everything(lambda: op("reference"))
    got = everything(lambda: torch.ops.vitzoo.attend(q, k, v, bias, key_bias, 8**-0.5) if registered else op("sdpa"))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_are_those_of_finite_differences(impl):
    q, k, v = tensors(B=2, L=2, S=3, N=1, D=2)
    bias = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    key_bias = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, b, c: attend(q, k, v, bias=b, key_bias=c, return_lse=True, impl=impl), (q, k, v, bias, key_bias)
    )


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_masked_key_is_as_if_it_were_not_there(impl, learned, lse):
    q, k, v = tensors()
    mask = torch.zeros(2, 7, dtype=torch.float64)
    mask[:, 4:] = -math.inf
    masked = attend(q, k, v, key_bias=mask.requires_grad_(learned), return_lse=lse, impl=impl)
    short = attend(q, k[:, :4], v[:, :4], return_lse=lse, impl=impl)
    torch.testing.assert_close(masked, short)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_query_without_a_key_gets_zeros_and_harms_nobody(impl, learned):
    q, k, v = tensors()
    mask = torch.zeros(2, 7, dtype=torch.float64)
    mask[0] = -math.inf
    mask.requires_grad_(learned)
    for lse in (False, True):
        answer = attend(q, k, v, key_bias=mask, return_lse=lse, impl=impl)
        out = answer[0] if lse else answer
        assert not out[0].any()
        assert out[1].any()
        if lse:
            assert (answer[1][0] == -math.inf).all()
        wanted = (q, k, v, mask) if learned else (q, k, v)
        for gradient in torch.autograd.grad(out.sum() + (answer[1][1].sum() if lse else 0), wanted):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_keys_and_no_images_are_empty_sums(impl):
    q, k, v = tensors()
    out, lse = attend(q, k[:, :0], v[:, :0], return_lse=True, impl=impl)
    assert not out.any()
    assert (lse == -math.inf).all()
    assert not attend(q, k[:, :0], v[:, :0], impl=impl).any()
    assert attend(q[:0], k[:0], v[:0], impl=impl).shape == (0, 5, 3, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_half_precision_errs_at_most_twice_as_much_as_plain_pytorch(dtype, learned):
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in tensors(L=20, S=33))
    bias = torch.randn(3, 20, 33, dtype=torch.float32, requires_grad=learned)

    def run(op, *leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        out = op(*leaves)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    def plain(q, k, v):
        scores = torch.einsum("blnd,bsnd->bnls", q * 8**-0.5, k) + bias.detach().to(q.dtype)
        return torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), v)

    exact = run(lambda *t: attend(*t, bias=bias.double(), impl="reference"), *(t.double() for t in (q, k, v)))
    for got, budget, truth in zip(run(lambda *t: attend(*t, bias=bias), q, k, v), run(plain, q, k, v), exact, strict=True):
        assert_within_budget(got, budget, truth)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(bias=torch.zeros(4, 5, 7)), r"broadcasts to \[2, 3, 5, 7\], got \[4, 5, 7\]"),
        (dict(key_bias=torch.zeros(7)), r"key_bias \[2, 7\], got \[7\]"),
        (dict(q=torch.zeros(2, 5, 4, 8)), r"attend needs q \[B, L, N, D\]"),
        (dict(q=torch.zeros(2, 5, 3)), r"needs q as \[B, L, N, D\]"),
        (dict(v=torch.zeros(2, 7, 3, 8).half()), "of one dtype"),
    ],
)
def test_wrong_arguments_are_told_in_a_sentence(change, sentence):
    arguments = dict(q=torch.zeros(2, 5, 3, 8), k=torch.zeros(2, 7, 3, 8), v=torch.zeros(2, 7, 3, 8))
    with pytest.raises(ValueError, match=sentence):
        attend(**arguments | change)


def test_merging_disjoint_key_sets_equals_attending_to_their_union():
    q, k, v = tensors(S=9)
    parts = [attend(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 2), (2, 7), (7, 9))]
    merged = merge_lse(*zip(*parts, strict=True))
    whole = attend(q, k, v)
    torch.testing.assert_close(merged, whole)
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (merged, whole)), strict=True):
        torch.testing.assert_close(a, b)


def test_registers_beside_a_neighborhood():
    q, k, v = torch.randn(3, 2, 5, 6, 3, 8, dtype=torch.float64).unbind()
    rk, rv = torch.randn(2, 2, 4, 3, 8, dtype=torch.float64).unbind()
    near, near_lse = attend2d(q, k, v, neighborhood(3), return_lse=True)
    far, far_lse = attend(q.flatten(1, 2), rk, rv, return_lse=True)
    merged = merge_lse([near, far.view_as(near)], [near_lse, far_lse.view_as(near_lse)])
    rows, cols = neighborhood(3).keys(0, 5, 5, 6)
    keys, values = (
        torch.cat([t[:, rows.start : rows.stop, cols.start : cols.stop].flatten(1, 2), r], 1) for t, r in ((k, rk), (v, rv))
    )
    torch.testing.assert_close(merged[:, 0, 5], attend(q[:, 0, 5:6], keys, values)[:, 0])


def test_merging_with_an_empty_set_changes_nothing():
    q, k, v = tensors()
    out, lse = attend(q, k, v, return_lse=True)
    nothing, minus_infinity = attend(q, k[:, :0], v[:, :0], return_lse=True)
    torch.testing.assert_close(merge_lse([out, nothing], [lse, minus_infinity]), out)
    assert not merge_lse([nothing, nothing], [minus_infinity, minus_infinity]).any()


def test_merge_refuses_what_does_not_belong_together():
    out, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="2 outputs and 1 lses"):
        merge_lse([out, out], [lse])
    with pytest.raises(ValueError, match="agree up to D"):
        merge_lse([out], [lse[:1]])
