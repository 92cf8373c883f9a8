from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitzoo.layers import crop_map, pad_map, resize_positions, resize_table
from vitzoo.layers.maps import padded_size


@pytest.mark.parametrize(
    ("n", "multiple", "minimum", "padded"), [(13, 7, 1, 14), (14, 7, 1, 14), (1, 7, 1, 7), (5, 1, 9, 9), (12, 1, 9, 12)]
)
def test_a_padded_size_divides_and_is_large_enough(n, multiple, minimum, padded):
    assert padded_size(n, multiple, minimum) == padded


def test_padding_adds_zeros_below_and_right_and_cropping_takes_them_away():
    x = torch.randn(2, 13, 17, 3)
    padded = pad_map(x, (7, 4), (1, 30))
    assert padded.shape == (2, 14, 30, 3)
    assert torch.equal(padded[:, :13, :17], x)
    assert padded.abs().sum().isclose(x.abs().sum())
    assert torch.equal(crop_map(padded, x), x)


def test_a_map_that_fits_is_not_copied():
    x = torch.randn(2, 14, 21, 3)
    assert pad_map(x, (7, 7)) is x
    assert crop_map(x, x) is x


def test_a_table_of_its_size_is_returned_and_a_constant_one_stays_constant():
    table = torch.full((3, 13, 13), 0.7)
    assert resize_table(table, (13, 13)) is table
    assert torch.allclose(resize_table(table, (23, 31)), torch.full((3, 23, 31), 0.7))


def test_a_resized_table_is_swins_bicubic_picture():
    table = torch.randn(3, 13, 13)
    published = F.interpolate(table.reshape(1, 3, 13, 13), size=(23, 23), mode="bicubic")
    assert torch.equal(resize_table(table, (23, 23)), published[0])


@pytest.mark.parametrize("antialias", [False, True])
def test_positions_at_their_own_size_are_as_learned(antialias):
    positions = torch.randn(1, 6 * 10, 5)
    at_home = resize_positions(positions, torch.empty(2, 6, 10, 5), (6, 10), antialias)
    assert torch.equal(at_home.flatten(1, 2), positions)
    assert resize_positions(positions, torch.empty(2, 7, 13, 5), (6, 10), antialias).shape == (1, 7, 13, 5)


def test_bilinear_positions_are_pvts_picture():
    positions = torch.randn(1, 6 * 10, 5)
    published = F.interpolate(positions.reshape(1, 6, 10, 5).permute(0, 3, 1, 2), size=(9, 4), mode="bilinear")
    resized = resize_positions(positions, torch.empty(2, 9, 4, 5), (6, 10), mode="bilinear")
    torch.testing.assert_close(resized, published.permute(0, 2, 3, 1))
