"""TAP: a mean over each token's surroundings, and the loss that keeps attention diverse."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.golden.families import tap_adl
from tests.golden.families.tokens.common import compare
from tests.golden.harness import Golden, Pair
from vitzoo.layers import tap


def tap_pooling(golden: Golden) -> Iterator[Pair]:
    predictor = tap.DilationPredictor(golden.spec["shape"][1], golden.spec["num_scales"]).eval()
    predictor.load_state_dict(golden.below("state/"))
    x = golden.tensors["input"].clone().requires_grad_()
    weight = predictor(x)
    y = tap.pool_tokens(x, weight)
    (y * golden.tensors["cotangent"]).sum().backward()
    pools = torch.stack([x, *(tap.dilated_mean(x, i) for i in range(1, golden.spec["num_scales"]))], dim=-1)
    ours = {"output": y, "mask": weight.permute(0, 2, 3, 1)[:, None], "pools": pools, "grad/input": x.grad}
    yield from compare(golden, "", ours | {f"grad/{name}": p.grad for name, p in predictor.named_parameters()})


def tap_diversification(golden: Golden) -> Iterator[Pair]:
    x = golden.tensors["input"].clone().requires_grad_()
    loss = tap.diversification_loss(x.softmax(-1).unbind(0), golden.spec["th"])
    loss.backward()
    yield from compare(golden, "", {"output": loss.view(1), "grad/input": x.grad})


def tap_model(golden: Golden) -> list[Pair]:
    return tap_adl.check(golden)
