"""attend_routed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.budget import assert_within_budget
from vitzoo.ops import attend, attend2d, attend_routed, explain
from vitzoo.ops.attend_routed import sdpa
from vitzoo.patterns import window

IMPLEMENTATIONS = ("sdpa", "reference")


def tensors(size=(6, 10), keys=None, B=2, N=3, D=4, E=6, dtype=torch.float64):
    q = torch.randn(B, *size, N, D, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(B, *(keys or size), N, d, dtype=dtype, requires_grad=True) for d in (D, E))
    return q, k, v


def choices(B: int, R: int, S: int, K: int, N: int | None = None) -> Tensor:
    """K different ones of S regions for each of R, in any order."""
    shape = (B, R) if N is None else (B, N, R)
    return torch.rand(*shape, S).argsort(-1)[..., :K]


def gradients(run, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = run(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equals_loops_over_single_queries(impl):
    q, k, v = tensors((6, 4), keys=(4, 9))
    index = choices(2, 6, 6, 2, N=3)
    out = attend_routed(q, k, v, (3, 2), index, key_regions=(2, 3), scale=0.3, impl=impl)
    for b in range(2):
        for y in range(6):
            for x in range(4):
                for n in range(3):
                    seen = [divmod(int(s), 3) for s in index[b, n, y // 2 * 2 + x // 2]]
                    keys, values = (
                        torch.cat([t[b, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3, n].flatten(0, 1) for r, c in seen])
                        for t in (k, v)
                    )
                    torch.testing.assert_close(out[b, y, x, n], torch.softmax(0.3 * keys @ q[b, y, x, n], 0) @ values)


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per head"])
@pytest.mark.parametrize(
    ("size", "regions", "K"),
    [((6, 10), (3, 5), 4), ((5, 14), (5, 2), 3), ((3, 3), (3, 3), 9), ((7, 1), (1, 1), 1), ((4, 6), (2, 1), 2)],
    ids=str,
)
def test_output_and_gradients_are_the_references(size, regions, K, per_head, monkeypatch):
    index = choices(2, regions[0] * regions[1], regions[0] * regions[1], K, 3 if per_head else None)
    leaves = tensors(size)
    expected = gradients(lambda *t: attend_routed(*t, regions, index, impl="reference"), leaves)
    for free in (sdpa.FREE, 0):  # one piece; as many as a large map has
        monkeypatch.setattr(sdpa, "FREE", free)
        torch.testing.assert_close(gradients(lambda *t: attend_routed(*t, regions, index, impl="sdpa"), leaves), expected)
        with torch.no_grad():
            torch.testing.assert_close(attend_routed(*leaves, regions, index), expected[0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_are_those_of_finite_differences(impl):
    index = torch.tensor([[[1, 0], [1, 1], [3, 2], [0, 3]]])
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend_routed(q, k, v, (2, 2), index, impl=impl), tensors((4, 2), B=1, N=2, D=2, E=3)
    )


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per head"])
def test_attend_routed_is_registered_as_opcheck_wants_it(per_head):
    q, k, v = tensors((6, 4), keys=(4, 9), B=1)
    index = choices(1, 6, 6, 2, N=3 if per_head else None)
    graph = index.transpose(1, 2) if per_head else index[:, :, None]
    arguments = q, k, v, graph, [3, 2], [2, 3]
    out, lse = torch.ops.vitzoo.attend_routed(*arguments, 0.5)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad(out, (q, k, v), dout)
    expected = attend_routed(q, k, v, (3, 2), index, key_regions=(2, 3), scale=0.5, impl="reference")
    torch.testing.assert_close((out, *got), (expected, *torch.autograd.grad(expected, (q, k, v), dout)))
    torch.library.opcheck(torch.ops.vitzoo.attend_routed.default, (*arguments, 0.5))
    saved = [t.detach() for t in (q, k, v, graph, out, lse)]
    for cotangents in ((dout, dlse), (None, dlse)):
        torch.library.opcheck(torch.ops.vitzoo.attend_routed_backward.default, (*cotangents, *saved, [3, 2], [2, 3], 0.5))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_all_regions_chosen_is_attention_among_all_tokens(impl):
    q, k, v = tensors(E=4)
    index = choices(2, 6, 6, 6)
    out = attend_routed(q, k, v, (3, 2), index, impl=impl)
    everybody = attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2))
    torch.testing.assert_close(out.flatten(1, 2), everybody)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_region_choosing_itself_is_window_attention(impl):
    q, k, v = tensors((6, 9), E=4)
    out = attend_routed(q, k, v, (2, 3), torch.arange(6).expand(2, 6)[..., None], impl=impl)
    torch.testing.assert_close(out, attend2d(q, k, v, window(3)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_region_chosen_again_and_again_counts_as_often_and_changes_nothing_alone(impl):
    leaves = tensors()
    same = torch.full((2, 6, 5), 4)
    expected = gradients(lambda *t: attend_routed(*t, (3, 2), same[..., :1], impl=impl), leaves)
    torch.testing.assert_close(gradients(lambda *t: attend_routed(*t, (3, 2), same, impl=impl), leaves), expected)
    assert not expected[2][:, :3].any()  # keys of the upper regions, which nobody has chosen
    twice = torch.tensor([0, 0, 1]).expand(2, 6, 3)
    once = torch.tensor([0, 1]).expand(2, 6, 2)
    assert not torch.equal(attend_routed(*leaves, (3, 2), twice, impl=impl), attend_routed(*leaves, (3, 2), once, impl=impl))


def test_memory_does_not_grow_with_the_number_of_regions_seen(monkeypatch):
    monkeypatch.setattr(sdpa, "FREE", 0)
    q, k, v = tensors((28, 28), B=1, dtype=torch.float32)
    for K in (4, 16):
        index = choices(1, 49, 49, K)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            attend_routed(q, k, v, (7, 7), index)
        assert sum(t.numel() for t in kept if t.is_floating_point()) == q.numel() + k.numel() + v.numel()
        for scores in (False, True):
            work = list(sdpa.pieces(q, k, v, index[:, :, None], (7, 7), (7, 7), scores))
            assert sum(len(piece.query[0]) for piece in work) == 49
            gathered = max(k[0, :4, :4].numel() * K * len(piece.query[0]) for piece in work)
            assert gathered <= k.numel()


def test_strided_views_of_a_packed_projection_and_the_same_step_twice_give_the_same_bits():
    packed = torch.randn(2, 6, 6, 3, 2, 8)
    index = choices(2, 9, 9, 3)

    def step(packed: Tensor) -> tuple[Tensor, ...]:
        return gradients(lambda p: attend_routed(*p.unbind(3), (3, 3), index), (packed.clone().requires_grad_(),))

    first, again = step(packed), step(packed)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    apart = [x.contiguous() for x in packed.unbind(3)]
    torch.testing.assert_close(first[0], attend_routed(*apart, (3, 3), index, impl="reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_halves_are_as_good_as_plain_pytorch_in_halves(impl, dtype):
    q, k, v = (x.detach().to(dtype) for x in tensors((8, 8), D=32, E=32, dtype=torch.float32))
    index = choices(2, 4, 4, 2)
    exact = attend_routed(*(x.double() for x in (q, k, v)), (2, 2), index, impl="reference")
    low = attend_routed(q, k, v, (2, 2), index, impl=impl)
    assert low.dtype == dtype
    assert_within_budget(low, exact.to(dtype), exact)


def test_autocast_casts_the_inputs_and_gradients_come_back_wide():
    q, k, v = tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend_routed(q, k, v, (2, 2), choices(2, 4, 4, 2))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in (q, k, v))


def test_no_images_are_no_images():
    q, k, v = tensors(B=0)
    out = attend_routed(q, k, v, (2, 2), torch.zeros(0, 4, 1, dtype=torch.long))
    assert out.shape == (0, 6, 10, 3, 6)
    assert torch.autograd.grad(out.sum(), v)[0].shape == v.shape


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q, k, v, i: (q[0], k, v, (2, 2), i), r"needs q as \[B, H, W, N, D\]"),
        (lambda q, k, v, i: (q, k[:, 1:], v, (2, 2), i), r"k \[B, Y, X, N, D\] and v"),
        (lambda q, k, v, i: (q, k, v.float(), (2, 2), i), "one dtype"),
        (lambda q, k, v, i: (q, k, v, (4, 2), i), "cannot cut a 6 x 10 map of queries into 4 x 2"),
        (lambda q, k, v, i: (q, k, v, (2, 2), i[:, 1:]), r"index \[2, 4, K\] or \[2, 3, 4, K\].*got \[2, 3, 2\]"),
        (lambda q, k, v, i: (q, k, v, (2, 2), i[..., :0]), "K of at least 1"),
        (lambda q, k, v, i: (q, k, v, (2, 2), i.double()), "integers on cpu"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        attend_routed(*change(*tensors(), choices(2, 4, 4, 2)))


def test_explain_names_who_would_run():
    assert explain(attend_routed, *tensors(), (2, 2), choices(2, 4, 4, 2)).startswith("-> attend_routed sdpa")


class Padded(nn.Module):
    """The op behind padding to regions, as a model calls it."""

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        x = nn.functional.pad(x, (0, 0, 0, 0, 0, (W + 2) // 3 * 3 - W, 0, (H + 1) // 2 * 2 - H))
        return attend_routed(x, x, x, (2, 3), index)


def test_one_exported_graph_serves_all_sizes():
    batch, height, width = Dim("batch", min=2, max=64), Dim("height", min=2, max=512), Dim("width", min=2, max=512)
    example = torch.randn(2, 13, 17, 2, 8), choices(2, 6, 6, 3)
    shapes = {"x": {0: batch, 1: height, 2: width}, "index": {0: batch}}
    program = torch.export.export(Padded(), example, dynamic_shapes=shapes).module()
    for B, H, W in ((2, 13, 17), (3, 2, 3), (2, 7, 30)):
        x, index = torch.randn(B, H, W, 2, 8), choices(B, 6, 6, 3)
        torch.testing.assert_close(program(x, index), Padded()(x, index))


def test_a_compiled_graph_has_the_same_gradients():
    torch._dynamo.reset()
    x, index = torch.randn(2, 5, 7, 2, 8, requires_grad=True), choices(2, 6, 6, 3)
    compiled = torch.compile(Padded(), fullgraph=True, backend="aot_eager")
    for got, expected in zip(*(gradients(lambda t, f=f: f(t, index), (x,)) for f in (compiled, Padded())), strict=True):
        torch.testing.assert_close(got, expected)
