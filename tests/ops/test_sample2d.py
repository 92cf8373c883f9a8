"""sample2d."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.budget import assert_within_budget
from vitzoo.ops import _bilinear, sample2d

IMPLEMENTATIONS = ("grid_sample", "reference")


def tensors(B=2, H=5, W=4, G=3, C=6, S=7, reach=1.3, dtype=torch.float64):
    """A map, and points of which some lie beyond it."""
    x = torch.randn(B, H, W, G, C, dtype=dtype, requires_grad=True)
    points = ((torch.rand(B, S, G, 2, dtype=dtype) * 2 - 1) * reach).requires_grad_()
    return x, points


def by_hand(x, y, u):
    """One bilinear sample of x `[H, W, C]` at row y and column u; zeros beyond the map."""
    H, W, C = x.shape
    total = torch.zeros(C, dtype=x.dtype)
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(u), math.floor(u) + 1):
            if 0 <= i < H and 0 <= j < W:
                total += (1 - abs(y - i)) * (1 - abs(u - j)) * x[i, j]
    return total


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_sample_is_the_weighted_sum_of_the_four_tokens_around_it(impl):
    x, points = (t.detach() for t in tensors())
    out = sample2d(x, points, impl=impl)
    for b in range(2):
        for s in range(7):
            for g in range(3):
                y, u = ((points[b, s, g, axis].item() + 1) / 2 * (n - 1) for axis, n in ((0, 5), (1, 4)))
                torch.testing.assert_close(out[b, s, g], by_hand(x[b, :, :, g], y, u))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_corners_of_the_map_are_at_minus_one_and_one_and_rows_come_first(impl):
    x = torch.arange(12.0).view(1, 3, 4, 1, 1)
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [0.0, -1.0]]).view(1, 5, 1, 2)
    assert sample2d(x, corners, impl=impl).flatten().tolist() == [0, 3, 8, 11, 4]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_beyond_the_map_lie_zeros_and_half_a_token_fades(impl):
    x = torch.ones(1, 3, 3, 1, 2)
    points = torch.tensor([[2.1, 0.0], [0.0, -5.0], [1.5, 0.0]]).view(1, 3, 1, 2)
    assert sample2d(x, points, impl=impl)[0, :, 0, 0].tolist() == [0, 0, 0.5]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1)])
def test_an_axis_of_one_token_is_sampled_wherever_the_point_lies(impl, size):
    x = torch.randn(1, *size, 1, 2)
    points = torch.tensor([[-1.0, -1.0], [0.3, -1.0], [-1.0, 0.3]]).view(1, 3, 1, 2)
    out = sample2d(x, points, impl=impl)
    assert torch.equal(out[:, 0], x[:, 0, 0])
    if size[0] == 1:
        assert torch.equal(out[:, 1], x[:, 0, 0])
    if size[1] == 1:
        assert torch.equal(out[:, 2], x[:, 0, 0])


@pytest.mark.parametrize("size", [(5, 4), (1, 7), (13, 17)])
def test_grid_sample_gives_the_samples_and_gradients_of_the_reference(size):
    x, points = tensors(H=size[0], W=size[1])
    dout = torch.randn(2, 7, 3, 6, dtype=torch.float64)

    def everything(impl):
        out = sample2d(x, points, impl=impl)
        return [out, *torch.autograd.grad(out, (x, points), dout)]

    for got, expected in zip(everything("grid_sample"), everything("reference"), strict=True):
        torch.testing.assert_close(got, expected)


def test_where_grid_sample_has_no_deterministic_gradient_indexing_gives_the_same(nan_memory, monkeypatch):
    ran = []
    gathered = _bilinear.gathered
    x, points = tensors()
    points.data[0, 0], points.data[0, 1] = 1, 1e20  # on the last token, where the cell behind it is empty; far away
    expected = sample2d(x, points)
    gradients = torch.autograd.grad(expected.square().sum(), (x, points))
    monkeypatch.setattr(_bilinear, "gathered", lambda *given: ran.append(len(given)) or gathered(*given))
    monkeypatch.setattr(_bilinear, "sums_by_atomics", lambda device: True)
    out = sample2d(x, points)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (x, points)), gradients)
    assert ran


def test_sample2d_is_registered_as_opcheck_wants_it():
    x, points = tensors(B=1)
    torch.library.opcheck(torch.ops.vitzoo.sample2d.default, (x, points))
    dout = torch.randn(1, 7, 3, 6, dtype=torch.float64)
    torch.library.opcheck(torch.ops.vitzoo.sample2d_backward.default, (dout, x.detach(), points.detach()))
    out = sample2d(x, points)
    torch.testing.assert_close(torch.ops.vitzoo.sample2d(x, points), out)
    expected = torch.autograd.grad(out, (x, points), dout)
    torch.testing.assert_close(torch.ops.vitzoo.sample2d_backward(dout, x.detach(), points.detach()), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_are_those_of_finite_differences(impl):
    x, points = tensors(B=1, H=3, W=4, G=2, C=2, S=3)
    assert torch.autograd.gradcheck(lambda x, p: sample2d(x, p, impl=impl), (x, points))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_groups_and_images_sample_on_their_own(impl):
    x, points = (t.detach() for t in tensors())
    out = sample2d(x, points, impl=impl)
    alone = sample2d(x[1:, :, :, 2:], points[1:, :, 2:], impl=impl)
    torch.testing.assert_close(out[1:, :, 2:], alone)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_strides_give_the_same_and_nothing_is_written(impl):
    x, points = (t.detach() for t in tensors())
    expected = sample2d(x, points, impl=impl)
    sliced = torch.zeros(2, 7, 9, 4, 8, dtype=x.dtype)[:, 1:6, 2:6, :3, 1:7].copy_(x)
    swapped = points.flip(-1).contiguous().flip(-1).transpose(1, 2).contiguous().transpose(1, 2)
    kept = sliced.clone(), swapped.clone()
    torch.testing.assert_close(sample2d(sliced, swapped, impl=impl), expected)
    assert torch.equal(sliced, kept[0])
    assert torch.equal(swapped, kept[1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_points_and_no_images_are_empty(impl):
    x, points = tensors()
    assert sample2d(x, points[:, :0], impl=impl).shape == (2, 0, 3, 6)
    assert sample2d(x[:0], points[:0], impl=impl).shape == (0, 7, 3, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_at_most_twice_as_much_as_rounding_the_map(dtype):
    x, points = (t.detach() for t in tensors(H=56, W=40, C=16, S=49))
    points = points.float()
    x = x.to(dtype)
    exact = sample2d(x.double(), points.double(), impl="reference")
    out = sample2d(x, points)
    assert out.dtype == dtype
    assert_within_budget(out, exact.to(dtype), exact)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_changes_nothing(impl):
    x, points = (t.detach().float() for t in tensors())
    expected = sample2d(x, points, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sample2d(x, points, impl=impl), expected)


def test_one_exported_program_serves_all_sizes():
    class Sampler(torch.nn.Module):
        def forward(self, x, points):
            return sample2d(x, points)

    batch, points_dim = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("points", min=2, max=4096)
    height, width = torch.export.Dim("height", min=2, max=512), torch.export.Dim("width", min=2, max=512)
    shapes = ({0: batch, 1: height, 2: width}, {0: batch, 1: points_dim})
    example = (torch.randn(2, 5, 4, 3, 6), torch.rand(2, 7, 3, 2))
    program = torch.export.export(Sampler(), example, dynamic_shapes=shapes, strict=False).module()
    for B, H, W, S in ((2, 5, 4, 7), (1, 8, 3, 20), (3, 2, 2, 3)):
        x, points = torch.randn(B, H, W, 3, 6), torch.rand(B, S, 3, 2) * 2 - 1
        torch.testing.assert_close(program(x, points), sample2d(x, points))


def test_equals_grid_sample_on_one_group():
    x, points = (t.detach() for t in tensors(G=1))
    theirs = F.grid_sample(x[:, :, :, 0].permute(0, 3, 1, 2), points.flip(-1), align_corners=True)
    torch.testing.assert_close(sample2d(x, points)[:, :, 0], theirs[..., 0].transpose(1, 2))


@pytest.mark.parametrize(
    ("x", "points", "sentence"),
    [
        (torch.zeros(2, 5, 4, 6), torch.zeros(2, 7, 3, 2), r"needs x as \[B, H, W, G, C\], got \[2, 5, 4, 6\]"),
        (torch.zeros(2, 5, 4, 3, 6), torch.zeros(2, 7, 2), r"needs points as \[B, S, G, 2\], got \[2, 7, 2\]"),
        (torch.zeros(2, 5, 4, 3, 6), torch.zeros(2, 7, 2, 2), r"got \[2, 5, 4, 3, 6\], \[2, 7, 2, 2\]"),
        (torch.zeros(2, 5, 4, 3, 6), torch.zeros(1, 7, 3, 2), r"got \[2, 5, 4, 3, 6\], \[1, 7, 3, 2\]"),
        (torch.zeros(2, 5, 4, 3, 6), torch.zeros(2, 7, 3, 3), r"got \[2, 5, 4, 3, 6\], \[2, 7, 3, 3\]"),
        (torch.zeros(2, 5, 4, 3, 6), torch.zeros(2, 7, 3, 2, dtype=torch.long), "floating points"),
        (torch.zeros(2, 5, 4, 3, 6), torch.zeros(2, 7, 3, 2, device="meta"), "on one device, got cpu and meta"),
    ],
)
def test_wrong_arguments_are_told_in_a_sentence(x, points, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample2d(x, points)
