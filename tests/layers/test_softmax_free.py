"""Softmax-free attention: inverses, their gradients, and who is told of whom."""

from __future__ import annotations

import pytest
import torch

import vitzoo
from vitzoo.layers import softmax_free
from vitzoo.layers.beside import ClassNorm, beside


def kernel(batch: int = 3, marks: int = 6) -> torch.Tensor:
    points = 2 * torch.randn(batch, marks, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return softmax_free.gaussian(points, points)


def test_newton_finds_the_inverse_with_a_hundredth_on_the_diagonal():
    p = kernel()
    expected = torch.linalg.inv(p + 0.01 * torch.eye(6, dtype=p.dtype))
    torch.testing.assert_close(softmax_free.inverse(p, 20), expected)


def test_the_gradient_is_that_of_an_inverse_not_of_its_steps():
    p, twin = kernel().requires_grad_(), kernel().requires_grad_()
    weight = torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p)
    (softmax_free.inverse(p, 20) * weight).sum().backward()
    (torch.linalg.inv(twin + 0.01 * torch.eye(6, dtype=p.dtype)) * weight).sum().backward()
    torch.testing.assert_close(p.grad, twin.grad)


@pytest.mark.parametrize("dims", [(0, 1), (1,)], ids=["batch", "image"])
def test_the_normed_inverse_is_scaled_by_the_roots_of_the_sums(dims):
    p = kernel()
    root = p.sum(-1).rsqrt()
    expected = root[:, :, None] * torch.linalg.inv(p) * root[:, None]
    torch.testing.assert_close(softmax_free.normed_inverse(p, 40, dims), expected)


@pytest.mark.parametrize(("statistic", "alone"), [(True, False), (False, True)])
def test_with_the_statistic_of_the_batch_its_other_images_matter(statistic, alone):
    torch.manual_seed(0)
    model = vitzoo.create_model("soft_norm_micro", batch_statistic=statistic, newton_steps=3).eval()
    x = torch.randn(2, 3, 32, 32)
    x[1] = 0  # its landmarks are all alike, and their sums the largest that there are
    with torch.no_grad():
        together, single = model(x)[:1], model(x[:1])
    assert torch.allclose(together, single, atol=1e-6) == alone


def test_the_mean_of_a_normed_map_is_the_normed_class_token():
    norm = ClassNorm(8)
    patches, classes = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 8)
    pooled = norm(beside(patches, classes)).mean((1, 2))
    torch.testing.assert_close(pooled, torch.nn.functional.layer_norm(classes[:, 0], (8,)))
