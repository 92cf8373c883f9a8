"""TransNeXt's attention at sizes that its cells do not divide."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitzoo.layers import Slot
from vitzoo.layers.aggregated import AggregatedAttention, cells, log_keys, pool_map
from vitzoo.ops import using

AWKWARD = [(7, 13, 2), (8, 12, 4), (9, 5, 5), (4, 11, 3)]


@pytest.mark.parametrize(("height", "width", "ratio"), AWKWARD)
def test_cells_are_those_of_adaptive_pooling(height, width, ratio):
    x = torch.randn(2, height, width, 6, generator=torch.Generator().manual_seed(0))
    expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (height // ratio, width // ratio)).permute(0, 2, 3, 1)
    torch.testing.assert_close(pool_map(x, ratio), expected)


@pytest.mark.parametrize(("n", "ratio"), [(7, 2), (8, 4), (13, 3), (9, 5), (6, 1)])
def test_offsets_are_those_from_pooled_positions(n, ratio):
    axis = cells(n, ratio, torch.device("cpu"))
    place = torch.arange(n, dtype=torch.float32)
    pooled = F.adaptive_avg_pool1d(place[None], n // ratio)[0]
    torch.testing.assert_close(axis.values[axis.offset], place[:, None] - pooled)


@pytest.mark.parametrize(("height", "width", "ratio"), AWKWARD)
def test_equals_one_softmax_over_neighbours_and_cells(height, width, ratio):
    torch.manual_seed(0)
    attn = AggregatedAttention(Slot(8, 2, (height, width), kv_ratio=ratio), (height, width), 2, 0).double()
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, height, width, 8, dtype=torch.float64)
    with torch.no_grad(), using("reference"):
        torch.testing.assert_close(attn.attend(x)[0], one_softmax(attn, x[0]))


def one_softmax(attn: AggregatedAttention, x: torch.Tensor) -> torch.Tensor:
    """Token by token, as section 3.2 has it: ``[H, W, C]`` to ``[H, W, N, D]``."""
    height, width, _ = x.shape
    ratio, (heads, dim) = attn.ratio, attn.split
    q = F.normalize(attn.q(x).view(height, width, heads, dim), dim=-1)
    k, v = attn.kv(x).view(height, width, 2, heads, dim).unbind(2)
    pooled = F.adaptive_avg_pool2d(F.gelu(attn.sr(x)).permute(2, 0, 1), (height // ratio, width // ratio)).permute(1, 2, 0)
    pooled_k, pooled_v = attn.kv(attn.norm(pooled)).view(-1, 2, heads, dim).unbind(1)
    ys, xs = (F.adaptive_avg_pool1d(torch.arange(n, dtype=x.dtype)[None], n // ratio)[0] for n in (height, width))
    centres = torch.stack(torch.meshgrid(ys, xs, indexing="ij"), dim=-1).view(-1, 2)
    out = torch.empty(height, width, heads, dim, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            near = [(i + a - 1, j + b - 1, 3 * a + b) for a in range(3) for b in range(3)]
            near = [(a, b, place) for a, b, place in near if 0 <= a < height and 0 <= b < width]
            keys = F.normalize(torch.cat([torch.stack([k[a, b] for a, b, _ in near]), pooled_k]), dim=-1)
            offset = 8 * (torch.tensor([i, j]) - centres) / torch.tensor([height - 1, width - 1])
            bias = attn.cpb(offset.sign() * (offset.abs() + 1).log2() / 3)
            places = [place for _, _, place in near]
            bias = torch.cat([attn.near_bias[:, places].T, bias])
            count = torch.tensor(float(len(keys)), dtype=x.dtype)
            query = (q[i, j] + attn.query_embedding[:, 0]) * F.softplus(attn.temperature[:, 0]) * count.log()
            weights = (torch.einsum("nd,snd->sn", query, keys) + bias).softmax(0)
            own = torch.einsum("nd,ndk->kn", q[i, j], attn.near_keys) + attn.near_weight[:, 0].T
            weights[: len(near)] += own[places]
            values = torch.cat([torch.stack([v[a, b] for a, b, _ in near]), pooled_v])
            out[i, j] = torch.einsum("sn,snd->nd", weights, values)
    return out


def test_a_corner_sees_four_neighbours_and_an_edge_six():
    keys = log_keys(torch.zeros(1, 5, 6, 1), 2).exp().round().int()[:, :, 0, 0] - 2 * 3
    assert keys[0].tolist() == [4, 6, 6, 6, 6, 4]
    assert keys[2].tolist() == [6, 9, 9, 9, 9, 6]
