"""attend with a table that is read at the points of its keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitzoo.ops import PointBias, attend
from vitzoo.ops.attend import sdpa

IMPLEMENTATIONS = ("sdpa", "reference")


def tensors(B=2, H=3, W=4, S=5, N=4, G=2, D=6, side=(7, 5)) -> tuple[Tensor, ...]:
    """q, k, v, a table of a map of another size, points of which some lie beyond the map, rows and columns of the queries."""
    q = torch.randn(B, H * W, N, D, dtype=torch.float64)
    k, v = torch.randn(2, B, S, N, D, dtype=torch.float64)
    points = (torch.rand(B, S, G, 2, dtype=torch.float64) * 2 - 1) * 1.5
    rows, cols = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (H, W))
    return q, k, v, torch.randn(N, *side, dtype=torch.float64), points, rows, cols


def results(run, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """out, lse and the gradients that both send to q, k, v, table and points."""
    q, k, v, table, points, rows, cols = leaves
    inner = [t.detach().clone().requires_grad_() for t in (q, k, v, table, points)]
    out, lse = run(*inner[:3], PointBias(*inner[3:], rows, cols))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return out.detach(), lse.detach(), *torch.autograd.grad((out * weight).sum() + (lse * weight[..., 0]).sum(), inner)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_bias_at_points_is_the_dense_bias_it_stands_for(impl):
    leaves = tensors()
    expected = results(lambda q, k, v, bias: attend(q, k, v, bias=bias.dense(), return_lse=True, impl="reference"), leaves)
    got = results(lambda q, k, v, bias: attend(q, k, v, bias=bias, return_lse=True, impl=impl), leaves)
    torch.testing.assert_close(got, expected)
    op = results(lambda q, k, v, bias: torch.ops.vitzoo.attend_at_points(q, k, v, *bias, None, q.shape[-1] ** -0.5), leaves)
    torch.testing.assert_close(op, expected)


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
@pytest.mark.parametrize("key_bias", [True, False], ids=["key bias", "alone"])
def test_rows_of_queries_one_after_another_give_what_all_at_once_give(rows, key_bias, monkeypatch):
    leaves = tensors(H=7)
    keys = torch.randn(2, 5, dtype=torch.float64) if key_bias else None

    def run(q, k, v, bias):
        with torch.no_grad():
            alone = attend(q, k, v, bias=bias, key_bias=keys, impl="sdpa")
        out, lse = attend(q, k, v, bias=bias, key_bias=keys, return_lse=True, impl="sdpa")
        torch.testing.assert_close(alone, out)
        return out, lse

    expected = results(run, leaves)
    laid_out = []
    dense = PointBias.dense
    monkeypatch.setattr(PointBias, "dense", lambda bias: laid_out.append(len(bias.rows)) or dense(bias))
    monkeypatch.setattr(sdpa, "SCORES_AT_ONCE", rows * 4 * 4 * 5)  # heads, columns, keys
    torch.testing.assert_close(results(run, leaves), expected)
    assert max(laid_out) == rows


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_key_on_a_query_reads_the_middle_and_far_ones_nothing(impl):
    q, k, v, table, points, rows, cols = tensors(B=1, S=2)
    points[:, 0], points[:, 1] = torch.stack((rows[1], cols[2])), 9.0
    q = torch.zeros_like(q)  # scores are the bias
    _, lse = attend(q, k, v, bias=PointBias(table, points, rows, cols), return_lse=True, impl=impl)
    torch.testing.assert_close(lse[0, 1 * 4 + 2], torch.logaddexp(table[:, 3, 2], torch.zeros_like(table[:, 3, 2])))


@pytest.mark.parametrize("key_bias", [True, False], ids=["key bias", "alone"])
def test_attend_at_points_is_registered_as_opcheck_wants_it(key_bias):
    q, k, v, table, points, rows, cols = tensors(B=1)
    leaves = [t.requires_grad_() for t in (q, k, v, table, points)]
    keys = torch.randn(1, 5, dtype=torch.float64, requires_grad=True) if key_bias else None
    torch.library.opcheck(torch.ops.vitzoo.attend_at_points.default, (*leaves, rows, cols, keys, 0.5))
    out, lse = torch.ops.vitzoo.attend_at_points(*leaves, rows, cols, keys, 0.5)
    saved = [None if t is None else t.detach() for t in (*leaves, rows, cols, keys, out, lse)]
    for dout, dlse in ((saved[-2], saved[-1]), (None, saved[-1])):
        torch.library.opcheck(torch.ops.vitzoo.attend_at_points_backward.default, (dout, dlse, *saved, 0.5))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda b: b._replace(table=b.table[:3]), r"a table \[4, R, C\] and points \[2, 5, G, 2\], got \[3, 7, 5\]"),
        (
            lambda b: b._replace(points=b.points[:, :4]),
            r"points \[2, 5, G, 2\] with a G .* 4 heads, got \[2, 4, 2, 2\]",
        ),
        (lambda b: b._replace(points=torch.zeros(2, 5, 3, 2)), "a G that divides 4 heads"),
        (lambda b: b._replace(rows=b.rows[:2]), r"rows \[H\] and cols \[W\] of 12 = H \* W queries, got \[2\], \[4\]"),
        (lambda b: b._replace(table=b.table.long()), "floating table, points, rows and cols on cpu"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(change, sentence):
    q, k, v, *bias = tensors()
    with pytest.raises(ValueError, match=sentence):
        attend(q, k, v, bias=change(PointBias(*bias)))
