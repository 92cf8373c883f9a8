"""Kernels computed from the image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitzoo.layers.attentive import convolve_each, strip_means


@pytest.mark.parametrize("size", [(7, 13), (3, 3), (2, 2), (1, 1), (5, 9)])
def test_strips_are_the_bins_of_adaptive_average_pooling(size):
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    pooled = F.adaptive_avg_pool1d(x.flatten(1, 2).mT, 9).mT
    torch.testing.assert_close(strip_means(x, 9), pooled)


def test_every_image_and_channel_meets_its_own_kernel():
    x, kernels = torch.randn(2, 5, 4, 3), torch.randn(2, 3, 3, 3)
    out = convolve_each(x, kernels)
    for b in range(2):
        for c in range(3):
            alone = F.conv2d(x[None, None, b, ..., c], kernels[None, None, b, c], padding=1)[0, 0]
            torch.testing.assert_close(out[b, ..., c], alone)
