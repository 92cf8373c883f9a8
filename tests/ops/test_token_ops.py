"""match, merge_tokens and unmerge_tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from vitzoo.ops import explain, match, merge_tokens, unmerge_tokens
from vitzoo.tokens import tome

IMPLEMENTATIONS = ("torch", "reference")


def a_map(batch=2, length=11, r=4):
    """What a matching gives: kept, moved, into, and its source."""
    step = tome.bipartite_matching(torch.randn(batch, length, 3), r, 1)
    return step.kept, step.moved, step.into, step.source


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_best_partner_is_the_first_with_the_largest_product(impl):
    a = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]])
    b = torch.tensor([[[0.0, 2.0], [3.0, 0.0], [3.0, 2.0], [-5.0, 0.0]]])
    best, index = match(a, b, impl=impl)
    assert best.tolist() == [[3.0, 2.0, 5.0]]
    assert index.tolist() == [[1, 0, 3]]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_match_has_the_gradient_of_its_pair(impl):
    a, b = (torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    assert torch.autograd.gradcheck(lambda a, b: match(a, b, impl=impl)[0], (a, b))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_merge_is_the_weighted_mean_and_unmerging_hands_it_out(impl):
    x = torch.tensor([[[10.0], [2.0], [4.0], [100.0]]])
    index = [torch.tensor([each]) for each in ([0, 2], [1, 3], [1, 1])]
    y = merge_tokens(x, *index, torch.tensor([[0.25, 0.25]]), impl=impl)
    assert y[0, :, 0].tolist() == [10.0, 0.5 * 4 + 0.25 * 2 + 0.25 * 100]
    back = unmerge_tokens(y, torch.tensor([[0, 1, 1, -1]]), impl=impl)
    assert back[0, :, 0].tolist() == [10.0, 27.5, 27.5, 0.0]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_merging_and_unmerging_have_the_gradients_of_finite_differences(impl):
    kept, moved, into, source = a_map()
    x = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    share = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: merge_tokens(x, kept, moved, into, s, impl=impl), (x, share))
    assert torch.autograd.gradcheck(lambda y: unmerge_tokens(y, source, impl=impl), y)


def test_what_does_not_fit_is_said_in_a_sentence():
    kept, moved, into, source = a_map()
    x = torch.randn(2, 11, 3)
    with pytest.raises(ValueError, match=r"match needs a \[B, A, D\] and b \[B, S, D\], got \[2, 11, 3\] and \[2, 11, 2\]"):
        match(x, x[..., :2])
    with pytest.raises(ValueError, match=r"moved, into, share \[B, R\], got .*\[2, 3\]"):
        merge_tokens(x, kept, moved, into, torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"source in int64, got torch.int32"):
        unmerge_tokens(x, source.int())
    with pytest.raises(ValueError, match="cannot run as triton"):
        match(x, x, impl="triton")
    assert explain(match, x, x).startswith("-> match torch")


@pytest.mark.parametrize("batch", [1, 2])
def test_the_registered_ops_are_each_others_gradients(batch):
    from vitzoo.ops.merge_tokens.registration import as_source

    kept, moved, into, source = a_map(batch)
    share = torch.rand(batch, 4)
    source, weight = as_source(kept, moved, into, share, 11)
    x, y = torch.randn(batch, 11, 3, requires_grad=True), torch.randn(batch, 7, 3, requires_grad=True)
    torch.testing.assert_close(torch.ops.vitzoo.collect_tokens(x, source, weight, 7), merge_tokens(x, kept, moved, into, share))
    torch.library.opcheck(torch.ops.vitzoo.collect_tokens.default, (x, source, weight, 7))
    torch.library.opcheck(torch.ops.vitzoo.spread_tokens.default, (y, source, weight))
    torch.library.opcheck(torch.ops.vitzoo.match.default, (x, torch.randn(batch, 5, 3, requires_grad=True)))


def test_one_exported_graph_serves_all_batches():
    class Ops(nn.Module):
        def forward(self, x):
            best, index = match(x[:, :3], x[:, 3:])
            places = torch.arange(3, 8).expand(x.shape[0], -1)
            moved = torch.arange(3).expand(x.shape[0], -1)
            return merge_tokens(x, places, moved, index, best.sigmoid())

    graph = torch.export.export(Ops(), (torch.randn(2, 8, 5),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},)).module()
    for batch in (1, 3):
        x = torch.randn(batch, 8, 5)
        torch.testing.assert_close(graph(x), Ops()(x))
