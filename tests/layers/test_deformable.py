"""Deformable attention: against loops over single queries and samples, at sizes that nobody trained on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.fx import symbolic_trace

from vitzoo.layers import DeformableAttention
from vitzoo.layers.deformable import BIASES, fixed_bias, place_points, table_bias
from vitzoo.ops import sample2d, using

VERSIONS = (1, 2)
RANGES = (-1.0, 0.0, 2.0)


def attention(bias="table", version=2, **kwargs):
    """A layer of 2 groups with 2 heads each, for a map of 6 x 8, every parameter away from its initial value."""
    layer = DeformableAttention(16, 4, (6, 8), bias=bias, version=version, **{"groups": 2, "stride": 2, **kwargs})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


def bilinear(table, y, x):
    """A table's value between its entries; zeros beyond."""
    total = 0.0
    for i, j in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
        if 0 <= i < table.shape[0] and 0 <= j < table.shape[1]:
            total += (1 - abs(y - i)) * (1 - abs(x - j)) * table[i, j].item()
    return total


def published_position(i, n, offset, f, version):
    """The table of the class's docstring, one coordinate at a time."""
    if version == 1:
        grid = (i + 0.5) / n * 2 - 1
        if f > 0:
            offset = math.tanh(offset) * f / n
        return grid + offset if f >= 0 else math.tanh(grid + offset)
    grid = (i + 0.5) / (n - 1) * 2 - 1
    if f >= 0:
        return grid + math.tanh(offset) * f / (n - 1)
    return min(1.0, max(-1.0, grid + offset))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("f", RANGES)
def test_points_are_where_the_published_rule_puts_them(version, f):
    offsets = torch.randn(2, 3, 5, 2, 2, dtype=torch.float64)
    points = place_points(offsets, f, version)
    for b, i, j, g in itertools.product(range(2), range(3), range(5), range(2)):
        for axis, (k, n) in enumerate(((i, 3), (j, 5))):
            expected = published_position(k, n, offsets[b, i, j, g, axis].item(), f, version)
            assert points[b, i, j, g, axis].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_bias_is_the_table_at_the_displacement_in_units_of_the_map(version):
    H, W, Hq, Wq = 5, 4, 3, 6  # the map, and the map that the table was made for
    points = (torch.rand(2, 2, 3, 2, 2, dtype=torch.float64) * 2.6 - 1.3).requires_grad_()
    table = torch.randn(4, 2 * Hq - 1, 2 * Wq - 1, dtype=torch.float64)
    bias = table_bias(table, torch.empty(2, H, W, 16), points, version).detach()
    published = table.flip(1, 2)  # query minus sample

    def query(i, n):
        return (i + 0.5) / n * 2 - 1 if version == 1 else i / (n - 1) * 2 - 1

    for b, h, i, j, s in itertools.product(range(2), range(4), range(H), range(W), range(6)):
        y, x = points[b, s // 3, s % 3, h // 2].tolist()
        row = ((query(i, H) - y) * 0.5 + 1) * (Hq - 1)
        col = ((query(j, W) - x) * 0.5 + 1) * (Wq - 1)
        assert bias[b, h, i * W + j, s].item() == pytest.approx(bilinear(published[h], row, col), abs=1e-12)


def test_the_bias_of_a_sample_on_a_token_is_the_tables_entry_for_their_distance():
    # version 2, table and map of one size: the sample at row i, column j minus the query is a whole number of steps
    H, W = 4, 5
    table = torch.randn(1, 2 * H - 1, 2 * W - 1, dtype=torch.float64)
    y, x = torch.linspace(-1, 1, H, dtype=torch.float64), torch.linspace(-1, 1, W, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)[None, :, :, None]
    bias = table_bias(table, torch.empty(1, H, W, 8), points, 2)[0, 0].unflatten(0, (H, W)).unflatten(2, (H, W))
    for qi, qj, ki, kj in itertools.product(range(H), range(W), range(H), range(W)):
        torch.testing.assert_close(bias[qi, qj, ki, kj], table[0, ki - qi + H - 1, kj - qj + W - 1])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_layer_is_attention_to_the_samples_of_its_points(version):
    layer = attention(version=version)
    x = torch.randn(2, 5, 7, 16)
    with torch.no_grad():
        points = layer.points(x)
        samples = sample2d(x.unflatten(-1, (2, 8)), points.flatten(1, 2)).flatten(2)
        q, k, v = layer.q(x).flatten(1, 2), layer.k(samples), layer.v(samples)
        bias = table_bias(layer.rel_bias, x, points, version)
        expected = torch.empty(2, 35, 16)
        for b, h in itertools.product(range(2), range(4)):
            part = slice(4 * h, 4 * h + 4)
            scores = q[b, :, part] @ k[b, :, part].T / 2 + bias[b, h]
            expected[b, :, part] = scores.softmax(-1) @ v[b, :, part]
        torch.testing.assert_close(layer(x), layer.proj(expected).view_as(x))


def test_groups_share_the_offset_network_and_see_their_own_channels_only():
    layer = attention()
    q = torch.randn(1, 6, 8, 16)
    offsets = layer.offset(q)
    swapped = layer.offset(q.unflatten(-1, (2, 8)).flip(-2).flatten(-2))
    torch.testing.assert_close(swapped, offsets.flip(3))


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [(6, 8), (1, 1), (1, 9), (2, 1), (13, 17)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_any_map_gives_finite_numbers_and_gradients(bias, version, size):
    for pooled, kernel, f in ((False, 3, -1.0), (False, 2, 2.0), (True, 3, -1.0)):
        layer = attention(bias, version, pooled=pooled, kernel_size=kernel, offset_range=f)
        x = torch.randn(2, *size, 16, requires_grad=True)
        out = layer(x)
        assert out.shape == x.shape
        out.square().sum().backward()
        assert out.isfinite().all()
        assert x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        assert layer.points(x).isfinite().all()


@pytest.mark.parametrize("version", VERSIONS)
def test_one_sample_lies_in_the_middle_and_one_query_too(version):
    points = place_points(torch.zeros(1, 1, 1, 1, 2), -1.0, version)
    assert not points.any()
    table = torch.randn(1, 5, 7)
    bias = table_bias(table, torch.empty(1, 1, 1, 4), points, version)
    assert bias.item() == table[0, 2, 3].item()


@pytest.mark.parametrize("bias", BIASES)
def test_a_traced_graph_runs_at_other_sizes(bias):
    for pooled in (False, True):
        layer = attention(bias, pooled=pooled).eval()
        traced = symbolic_trace(layer)
        for size in ((6, 8), (5, 3)):
            x = torch.randn(2, *size, 16)
            torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("bias", BIASES)
def test_one_exported_program_serves_all_sizes(bias):
    layer = attention(bias).eval()
    dims = {0: torch.export.Dim("b", min=1, max=64), 1: torch.export.Dim("h", min=3, max=512)}
    dims[2] = torch.export.Dim("w", min=3, max=512)
    program = torch.export.export(layer, (torch.randn(2, 14, 22, 16),), dynamic_shapes=(dims,), strict=False).module()
    for size in ((2, 14, 22), (1, 3, 9), (3, 6, 8)):
        x = torch.randn(*size, 16)
        torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-5)


def test_a_fixed_bias_is_as_it_is_at_its_size_and_resized_elsewhere():
    table, points = torch.randn(3, 24, 6), torch.zeros(1, 2, 3, 1, 2)
    at_home = fixed_bias(table, torch.empty(1, 4, 6, 8), points, (4, 6, 2, 3))
    assert torch.equal(at_home[0], table)
    constant = fixed_bias(torch.ones(3, 24, 6), torch.empty(1, 7, 5, 8), torch.zeros(1, 4, 2, 1, 2), (4, 6, 2, 3))
    assert constant.shape == (1, 3, 35, 8)
    torch.testing.assert_close(constant, torch.ones_like(constant))
    # a table that depends on the query alone does so after resizing
    by_query = fixed_bias(
        torch.randn(3, 24, 1).expand(3, 24, 6), torch.empty(1, 7, 5, 8), torch.zeros(1, 4, 2, 1, 2), (4, 6, 2, 3)
    )
    torch.testing.assert_close(by_query, by_query[..., :1].expand_as(by_query))


def test_pooled_samples_are_averages_of_cells():
    layer = attention("none", pooled=True)
    x = torch.arange(4.0).view(1, 2, 2, 1).expand(1, 2, 2, 16)
    assert layer.pool(x).unique().tolist() == [1.5]
    assert layer.pool(torch.ones(1, 5, 7, 16)).shape == (1, 2, 3, 16)


def test_the_reference_of_every_op_gives_the_same():
    layer = attention().eval()
    x = torch.randn(2, 5, 7, 16)
    with torch.no_grad():
        expected = layer(x)
        with using("reference"):
            torch.testing.assert_close(layer(x), expected)


def test_half_precision_places_its_points_in_float32():
    layer = attention().eval()
    x = torch.randn(2, 6, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.points(x).dtype == torch.float32
    assert layer.to(torch.bfloat16).points(x.bfloat16()).dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.double().points(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"groups": 3}, "4 heads do not divide into 3 groups"),
        ({"bias": "rpe"}, "bias is one of table, mlp, fixed, conv, none, got 'rpe'"),
        ({"version": 3}, "version is 1 or 2, got 3"),
    ],
)
def test_what_does_not_exist_is_refused_in_a_sentence(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        attention(**kwargs)
