from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitzoo.layers import ConvDownsample, OverlapPatchEmbed, PatchEmbed, SpatialReduction

SIZES = [(32, 32), (33, 47), (34, 29), (31, 36)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(7, 4, None), (7, 4, 2), (3, 2, None), (4, 4, 0)], ids=str)
def test_overlapping_patches_round_sizes_up(size, kernel, stride, padding):
    x = OverlapPatchEmbed(5, kernel, stride, padding=padding)(torch.randn(2, 3, *size))
    assert x.shape == (2, *(-(-n // stride) for n in size), 5)


def test_where_a_convolution_rounds_up_by_itself_nothing_is_padded():
    layer, image = OverlapPatchEmbed(5, 7, 4), torch.randn(2, 3, 33, 47)
    assert layer.multiple == (1, 1)
    expected = layer.norm(layer.proj(F.pad(image, (0, 1, 0, 3))).permute(0, 2, 3, 1))
    torch.testing.assert_close(layer(image), expected)


def test_without_padding_what_does_not_fill_a_patch_is_dropped():
    layer, image = PatchEmbed(5, 4, pad=False), torch.randn(2, 3, 35, 42)
    assert torch.equal(layer(image), layer(image[:, :, :32, :40].contiguous()))


@pytest.mark.parametrize("bias", [True, False])
def test_a_downsampler_halves_odd_maps_upwards(bias):
    layer = ConvDownsample(4, 6, bias=bias)
    assert layer(torch.randn(2, 7, 10, 4)).shape == (2, 4, 5, 6)
    assert (layer.reduction.bias is not None) == bias


def test_spatial_reduction_reads_each_cell_once_and_leaves_out_the_rest():
    layer, x = SpatialReduction(4, 3), torch.randn(2, 7, 9, 4)
    cells = x[:, :6].reshape(2, 2, 3, 3, 3, 4).permute(0, 1, 3, 5, 2, 4).flatten(3)
    expected = layer.norm(cells @ layer.proj.weight.flatten(1).T + layer.proj.bias)
    torch.testing.assert_close(layer(x), expected)
