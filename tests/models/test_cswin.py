"""CSWin, where the contract does not look: who sees whom, LePE at the borders of stripes, padding."""

from __future__ import annotations

import pytest
import torch

import vitzoo
from vitzoo.models.cswin import CrossShapedAttention, cut_out, fold, pad_around, unfold
from vitzoo.ops import attend2d


def attention(split: int | None) -> CrossShapedAttention:
    torch.manual_seed(0)
    return CrossShapedAttention(16, 4, split).double()


def seen(split: int | None, size: tuple[int, int], y: int, x: int) -> torch.Tensor:
    """Which places of the map change the output at (y, x)."""
    inputs = torch.randn(1, *size, 16, dtype=torch.double, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(split)(inputs)[0, y, x].sum(), inputs)
    return gradient[0].abs().sum(-1) > 0


def test_a_token_sees_a_cross_as_wide_as_its_stripes():
    expected = torch.zeros(9, 12, dtype=torch.bool)
    expected[3:6], expected[:, 6:9] = True, True
    assert torch.equal(seen(3, (9, 12), 4, 7), expected)


def test_one_branch_sees_everything():
    assert seen(None, (5, 7), 0, 6).all()


@pytest.mark.parametrize("branch", [0, 1], ids=["vertical", "horizontal"])
def test_lepe_is_the_convolution_of_each_stripe_by_itself(branch):
    attn, qkv = attention(3), torch.randn(2, 6, 9, 3, 2, 4, dtype=torch.double)
    dim = 1 if branch else 2
    q, k, v = qkv.unbind(3)
    with torch.no_grad():
        lepe = attn.branch(branch, qkv) - attend2d(q, k, v, attn.patterns[branch])
        stripes = [attn.get_v[branch](part.flatten(-2)) for part in v.split(3, dim=dim)]
        torch.testing.assert_close(lepe.flatten(-2), torch.cat(stripes, dim=dim))


@pytest.mark.parametrize(("along", "dim"), [("rows", 1), ("cols", 2)])
def test_stripes_fold_to_images_and_back(along, dim):
    x = torch.randn(2, 6, 9, 4)
    stripes = fold(x, along, 3)
    assert torch.equal(stripes[1], x[0].narrow(dim - 1, 3, 3))
    assert torch.equal(unfold(stripes, x, along, 3), x)


@pytest.mark.parametrize("size", [(5, 7), (6, 9), (1, 2), (8, 4)], ids=str)
def test_padding_lies_around_the_map_the_larger_half_behind(size):
    x = torch.rand(2, *size, 3) + 1
    padded = pad_around(x, (3, 4))
    assert padded.shape[1] % 3 == padded.shape[2] % 4 == 0
    before = [(padded.shape[i] - x.shape[i]) // 2 for i in (1, 2)]
    assert torch.equal(padded[:, before[0] : before[0] + size[0], before[1] : before[1] + size[1]], x)
    assert padded.count_nonzero() == x.numel()
    assert torch.equal(cut_out(padded, x), x)


def test_where_stripes_cover_the_map_two_branches_are_one():
    two, one = attention(9), attention(None)
    state = two.state_dict()
    for name in ("weight", "bias"):
        state[f"get_v.0.{name}"] = torch.cat([state[f"get_v.0.{name}"], state.pop(f"get_v.1.{name}")])
    one.load_state_dict(state)
    x = torch.randn(2, 9, 9, 16, dtype=torch.double)
    torch.testing.assert_close(two(x), one(x))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_heads": (3, 2, 4)}, "3 heads do not divide"),
        ({"split_size": (1, None)}, r"split_size \(1, None\) names 2 stages"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_a_sentence(wrong, said):
    with pytest.raises(ValueError, match=said):
        vitzoo.create_model("cswin_micro", **wrong)
