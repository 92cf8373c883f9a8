"""Class attention, and heads that pool by it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitzoo.layers import ClassAttention, ClassAttentionHead

MAP = torch.randn(2, 12, 3, 5, generator=torch.Generator().manual_seed(0))
TOKENS = MAP.flatten(2).transpose(1, 2)


class MeanHead(ClassAttentionHead):
    def classes(self, x: Tensor) -> Tensor:
        return x.mean(dim=1, keepdim=True)


def off_its_start(module: nn.Module) -> nn.Module:
    """The module with every parameter off the value that it begins with."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


@pytest.mark.parametrize("read_classes", [True, False])
def test_class_attention_is_softmax_attention_of_the_class_tokens(read_classes: bool):
    block = off_its_start(ClassAttention(12, 3, 24, layer_scale=0.5, read_classes=read_classes))
    c = torch.randn(2, 2, 12)
    normed = block.norm1(torch.cat([c, TOKENS], dim=1))
    read = normed if read_classes else normed[:, 2:]
    q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (block.q(normed[:, :2]), block.k(read), block.v(read)))
    weights = (q @ k.mT / 2).softmax(dim=-1)
    expected = c + block.ls1(block.proj((weights @ v).transpose(1, 2).flatten(2)))
    expected = expected + block.ls2(block.mlp(block.norm2(expected)))
    torch.testing.assert_close(block(c, TOKENS), expected)
    torch.testing.assert_close(block.weights(c, TOKENS), weights[..., -15:])
    assert (block.weights(c, TOKENS).sum(-1) < 0.9999).all() == read_classes  # what class tokens take of themselves is cut off


def test_without_pooling_a_head_has_no_parameters_and_with_it_gets_them_again():
    head = MeanHead(12, 5, 3, 24)
    parameters = sum(p.numel() for p in head.parameters())
    head.reset(0, "")
    assert list(head.parameters()) == []
    assert head(MAP) is MAP
    head.reset(5, "token")
    assert sum(p.numel() for p in head.parameters()) == parameters
    assert head(MAP).shape == (2, 5)
    assert head(MAP, pre_logits=True).shape == (2, 12)


def test_a_head_keeps_its_precision_when_it_is_reset():
    head = MeanHead(12, 5, 3, 24).double()
    head.reset(7)
    assert head(MAP.double()).dtype == torch.float64


def test_another_pooling_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="global_pool is 'token' or '', got 'avg'"):
        MeanHead(12, 5, 3, 24, pool_type="avg")
    with pytest.raises(ValueError, match="classifier of 5 classes needs pooled features"):
        MeanHead(12, 5, 3, 24, pool_type="")
