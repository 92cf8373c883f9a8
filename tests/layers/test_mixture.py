"""Mixture of heads: what a token takes, and what teaches routers to use all heads."""

from __future__ import annotations

import pytest
import torch

import vitzoo
from vitzoo.layers.mixture import ROUTING_WEIGHT, HeadRouter, routing_loss, weigh_heads


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_undecided_routers_weigh_all_heads_that_are_taken_alike():
    router = HeadRouter(8, 7, shared=3, topk=2)
    for parameter in router.parameters():
        torch.nn.init.zeros_(parameter)
    weights = router(tokens(2, 5, 8))
    torch.testing.assert_close(weights.sort(-1).values, torch.tensor([0.0, 0, 1, 1, 1, 1, 1]).expand(2, 5, -1))
    assert (weights[..., :3] == 1).all()


def test_every_token_takes_the_shared_heads_and_as_many_others_as_are_asked_for():
    weights = HeadRouter(8, 9, shared=2, topk=3)(tokens(2, 3, 5, 8))
    assert (weights[..., :2] > 0).all()
    assert ((weights[..., 2:] > 0).sum(-1) == 3).all()
    assert len((weights[..., 2:] > 0).flatten(0, 2).unique(dim=0)) > 1


def test_uneven_routing_costs_more_than_even():
    even, one = torch.eye(4), torch.eye(4)[:1].expand(4, -1)
    cost = [weigh_heads(20 * x, None, torch.eye(4), None, 0, 1)[1] for x in (even, one)]
    torch.testing.assert_close(torch.stack(cost), torch.tensor([1.0, 4.0]))


def test_what_routers_learn_beside_the_labels_is_asked_for_once():
    model = vitzoo.create_model("moh_micro", num_classes=10).train()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 7])
    logits = model(images)
    loss = model.extra_loss(images, labels, logits)
    assert ROUTING_WEIGHT * 0.5 < loss.item() < ROUTING_WEIGHT * 4
    loss.backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and "router" in name}
    assert {name for name in learned if name.endswith("router.routed.weight")}
    assert routing_loss(model) is None
    model.eval()(images)
    assert model.extra_loss(images, labels, logits) is None


def test_heads_that_are_neither_shared_nor_taken_are_an_error():
    with pytest.raises(ValueError, match=r"Of 4 heads 1 are shared and 4 of the others taken"):
        HeadRouter(8, 4, shared=1, topk=4)
