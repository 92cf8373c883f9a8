"""attend2d: the reference against loops, and the PyTorch forms against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from tests.budget import assert_within_budget
from tests.ops.cases import CASES, case_id, everything, inputs
from vitzoo.ops import attend, attend2d
from vitzoo.ops.attend2d import eager, reference, traced
from vitzoo.ops.attend2d.segments import segments
from vitzoo.patterns import dilated_window, everywhere, grid, halo, neighborhood, window

FORMS = {
    "eager": lambda *a: eager.attend2d(*a, True),
    "traced": lambda *a: traced.attend2d(*a, True),
    "registered": lambda q, k, v, p, bias, scale: torch.ops.vitzoo.attend2d(q, k, v, bias, p.to_ints(), scale),
}


@pytest.mark.parametrize("pattern", [window(2, shift=1), neighborhood(3), dilated_window(2, interval=2), halo(2, 1)], ids=repr)
def test_reference_equals_loops_over_single_queries(pattern):
    H, W, N = 4, 5, 2
    x = inputs(pattern, (H, W), B=1, N=N, D=3)
    q, k, v = x.views
    out, lse = attend2d(q, k, v, pattern, bias=x.bias, scale=0.7, return_lse=True, impl="reference")
    reach_y, reach_x = pattern.reach(H, W)
    steps = pattern.rows.step, pattern.cols.step
    for y in range(H):
        for c in range(W):
            for n in range(N):
                rows, cols = pattern.keys(y, c, H, W)
                pairs = [(u, w) for u in rows for w in cols]
                scores = torch.stack(
                    [
                        0.7 * (q[0, y, c, n] @ k[0, u, w, n])
                        + x.bias[n, reach_y + (u - y) // steps[0], reach_x + (w - c) // steps[1]]
                        for u, w in pairs
                    ]
                )
                values = torch.stack([v[0, u, w, n] for u, w in pairs])
                torch.testing.assert_close(out[0, y, c, n], scores.softmax(0) @ values)
                torch.testing.assert_close(lse[0, y, c, n], scores.logsumexp(0))


@pytest.mark.parametrize("form", ["reference", *FORMS])
def test_gradients_are_those_of_finite_differences(form):
    pattern = neighborhood((3, 2))
    x = inputs(pattern, (4, 3), B=1, N=2, D=2)
    run = reference.attend2d if form == "reference" else FORMS[form]
    assert torch.autograd.gradcheck(lambda qkv, bias: run(*qkv.unbind(3), pattern, bias, 0.5), (x.qkv, x.bias))


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("pattern", "size"), CASES, ids=case_id)
def test_every_form_gives_out_lse_and_all_gradients_of_the_reference(form, pattern, size):
    x = inputs(pattern, size, D=4 if form == "registered" else 24)
    expected = everything(reference.attend2d, pattern, x)
    for name, value in everything(FORMS[form], pattern, x).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(("pattern", "size"), CASES, ids=case_id)
def test_inference_equals_the_reference_with_and_without_bias(pattern, size):
    x = inputs(pattern, size, N=2, D=8)
    with torch.no_grad():
        for bias in (x.bias, None):
            expected = attend2d(*x.views, pattern, bias=bias, impl="reference")
            torch.testing.assert_close(attend2d(*x.views, pattern, bias=bias, impl="sdpa"), expected)
            scale = 8**-0.5
            torch.testing.assert_close(traced.attend2d(*x.views, pattern, bias, scale, False)[0], expected)


@pytest.mark.parametrize("form", ["eager", "traced"])
def test_a_gradient_may_come_through_lse_alone_or_out_alone(form):
    for pattern in (window(3, shift=1), neighborhood(3)):
        x = inputs(pattern, (5, 7))
        for part in (0, 1):
            got, expected = (
                torch.autograd.grad(run(*x.views, pattern, x.bias, 0.3)[part].sum(), (x.qkv, x.bias))
                for run in (FORMS[form], reference.attend2d)
            )
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_views_of_a_packed_projection_equal_separate_tensors():
    pattern = window(4, shift=1)
    x = inputs(pattern, (9, 8), dtype=torch.float32)
    with torch.no_grad():
        packed = attend2d(*x.views, pattern)
        separate = attend2d(*(t.clone() for t in x.views), pattern)
        swapped = attend2d(*(x.views[i] for i in (0, 2, 1)), pattern)  # not in the order of the projection
        heads_first = attend2d(*(t.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4) for t in x.views), pattern)
    torch.testing.assert_close(packed, separate)
    torch.testing.assert_close(packed, heads_first)
    torch.testing.assert_close(swapped, attend2d(x.views[0], x.views[2], x.views[1], pattern, impl="reference"))


def test_bias_gradient_is_summed_over_windows_and_images():
    pattern = window(2)
    x = inputs(pattern, (4, 4), B=2)
    whole = torch.autograd.grad((attend2d(*x.views, pattern, bias=x.bias) * x.dout).sum(), x.bias)[0]
    parts = torch.zeros_like(whole)
    for b in range(2):
        for y in (0, 2):
            for c in (0, 2):
                piece = (t[b : b + 1, y : y + 2, c : c + 2] for t in x.views)
                out = attend2d(*piece, pattern, bias=x.bias)
                parts += torch.autograd.grad((out * x.dout[b : b + 1, y : y + 2, c : c + 2]).sum(), x.bias)[0]
    torch.testing.assert_close(whole, parts)


def test_bias_is_key_minus_query():
    q = k = torch.zeros(1, 1, 3, 1, 1, dtype=torch.float64)
    v = torch.eye(3, dtype=torch.float64)[None, None, :, None, :]
    q, k = q.expand(1, 1, 3, 1, 3), k.expand(1, 1, 3, 1, 3)
    bias = torch.full((1, 1, 5), -50.0, dtype=torch.float64)
    bias[0, 0, 3] = 0.0  # one to the right
    out = attend2d(q, k, v, window((1, 3)), bias=bias)
    torch.testing.assert_close(out[0, 0, 0, 0], v[0, 0, 1, 0])


def test_everywhere_is_dense_attention_among_tokens():
    x = inputs(everywhere, (3, 5))
    dense = attend(*(t.flatten(1, 2) for t in x.views)).unflatten(1, (3, 5))
    torch.testing.assert_close(attend2d(*x.views, everywhere), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", [window(7, shift=3), neighborhood(5)], ids=repr)
def test_half_precision_errs_at_most_twice_as_much_as_plain_pytorch(pattern, dtype):
    x = inputs(pattern, (13, 17)).to(dtype)

    def plain(q, k, v, p, bias, scale):
        (sees_y, sees_x), (dy, dx) = reference.pair_tables(p, 13, 17, q.device)
        scores = torch.einsum("byxnd,bvund->bnyxvu", q * scale, k) + bias[:, dy[:, None, :, None], dx[None, :, None, :]]
        scores = scores.masked_fill(~(sees_y[:, None, :, None] & sees_x[None, :, None, :]), -math.inf).flatten(-2)
        out = torch.einsum("bnyxs,bsnd->byxnd", scores.softmax(-1), v.flatten(1, 2))
        return out, scores.float().logsumexp(-1).permute(0, 2, 3, 1)

    exact = everything(reference.attend2d, pattern, x.to(torch.float64))
    budget = everything(plain, pattern, x)
    for form in ("eager", "traced"):
        for name, value in everything(FORMS[form], pattern, x).items():
            assert_within_budget(value, budget[name], exact[name], name=f"{form} {name}")
    with torch.no_grad():
        out = attend2d(*x.views, pattern, bias=x.bias, scale=0.3)
    assert_within_budget(out, budget["out"], exact["out"], name="inference")


def test_a_float32_table_serves_bfloat16_tensors_and_autocast():
    pattern = neighborhood(3)
    x = inputs(pattern, (5, 6), dtype=torch.float32)
    low = [t.to(torch.bfloat16) for t in x.views]
    for impl in ("sdpa", "reference"):
        out = attend2d(*low, pattern, bias=x.bias, impl=impl)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        assert x.bias.grad.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = attend2d(*x.views, pattern, bias=x.bias, impl=impl)
        torch.testing.assert_close(under_autocast, out, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_a_batch_of_nothing_gives_nothing_and_zero_gradients(impl):
    x = inputs(window(2, shift=1), (3, 4), B=0)
    out, lse = attend2d(*x.views, window(2, shift=1), bias=x.bias, return_lse=True, impl=impl)
    assert out.shape == (0, 3, 4, 3, 24)
    assert lse.shape == (0, 3, 4, 3)
    dqkv, dbias = torch.autograd.grad(out.sum() + lse.sum(), (x.qkv, x.bias))
    assert dqkv.shape == x.qkv.shape
    assert not dbias.any()


def test_meta_tensors_get_shapes():
    for pattern in (window(4, shift=1), neighborhood(3), grid(2)):
        q = torch.empty(2, 8, 10, 3, 16, device="meta", requires_grad=True)
        for impl in ("sdpa", "reference"):
            out, lse = attend2d(q, q, q, pattern, return_lse=True, impl=impl)
            assert out.shape == q.shape
            assert lse.shape == q.shape[:-1]
            assert out.device.type == "meta"
        with torch.no_grad():
            assert attend2d(q, q, q, pattern).shape == q.shape


def test_the_same_call_gives_the_same_bits():
    pattern = neighborhood(5, dilation=2)
    x = inputs(pattern, (13, 17), dtype=torch.float32)
    first, second = (everything(FORMS["eager"], pattern, x) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_sided_gradients_leave_the_others_alone():
    pattern = window(3, shift=1)
    q, k, v = (t.detach() for t in inputs(pattern, (5, 7)).views)
    bias = torch.zeros(3, 5, 5, dtype=torch.float64)
    for wanted in range(4):
        tensors = [q, k, v, bias]
        tensors[wanted] = tensors[wanted].clone().requires_grad_()
        got, expected = (
            torch.autograd.grad(attend2d(*tensors[:3], pattern, bias=tensors[3], impl=impl).sin().sum(), tensors[wanted])[0]
            for impl in ("sdpa", "reference")
        )
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("pattern", "size"), CASES, ids=case_id)
def test_segments_hold_every_query_once_and_cut_nothing_it_sees(pattern, size):
    for span, n in zip((pattern.rows, pattern.cols), size, strict=True):
        seen: dict[int, list[int]] = {}
        for s in segments(span.resolve(n), n):
            for r in range(s.residue, s.residue + s.residues):
                for t in range(s.tiles):
                    for a in range(s.tile):
                        query = (s.query + t * s.tile + a) * s.step + r
                        keys = [(s.key + t * s.tile + b) * s.step + r for b in range(s.lo[a], s.hi[a])]
                        assert query not in seen
                        seen[query] = keys
        assert seen == {i: list(span.keys(i, n)) for i in range(n)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(pattern=7), "needs a Pattern"),
        (dict(q=torch.zeros(2, 3, 4, 5)), r"needs q as \[B, H, W, N, D\]"),
        (dict(k=torch.zeros(1, 4, 4, 2, 8)), "of one shape"),
        (dict(v=torch.zeros(1, 4, 5, 2, 8, dtype=torch.float64)), "of one dtype"),
        (dict(q=torch.zeros(1, 4, 5, 2, 8, dtype=torch.int64)), "floating q"),
        (dict(q=torch.zeros(1, 4, 5, 2, 8, device="meta")), "on one device"),
        (dict(bias=torch.zeros(2, 3, 5)), r"window\(3\) on a 4 x 5 map with 2 heads .* \[2, 5, 5\], got \[2, 3, 5\]"),
        (dict(pattern=neighborhood(5)), r"neighborhood\(5\) needs 5 rows, got 4"),
    ],
)
def test_wrong_arguments_are_told_in_a_sentence(change, sentence):
    arguments = dict(
        q=torch.zeros(1, 4, 5, 2, 8), k=torch.zeros(1, 4, 5, 2, 8), v=torch.zeros(1, 4, 5, 2, 8), pattern=window(3)
    )
    with pytest.raises(ValueError, match=sentence):
        attend2d(**arguments | change)
