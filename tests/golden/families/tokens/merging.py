"""ToMe: its schedule, its matchings, and whole models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden.families.tokens.common import compare, outputs, vit, watched
from tests.golden.harness import Golden, Pair, load
from vitzoo import tokens
from vitzoo.tokens import tome
from vitzoo.tokens._map import TokenMap


def tome_schedules(golden: Golden) -> Iterator[Pair]:
    for i, (depth, r) in enumerate(golden.spec["cases"]):
        r = (r[0], float(r[1])) if golden.spec["tuple"][i] else r
        yield Pair(f"r/{i}", torch.tensor(tokens.merge_schedule(depth, r)), golden.tensors[f"r/{i}"])
    yield Pair("output", torch.tensor(tokens.merge_schedule(*golden.spec["cases"][0])).float(), golden.tensors["output"])


def matched(golden: Golden) -> tuple[TokenMap, dict[str, Tensor]]:
    """Our map for a matching of the file, and its parts under the published names."""
    spec, metric = golden.spec, golden.tensors["metric"]
    if spec["kind"] == "bipartite":
        prefix = int(spec["class_token"]) + int(spec["distill_token"])
        step = tome.bipartite_matching(metric, spec["r"], prefix)
        even = step.kept % 2 == 0
        count = int(even[0].sum())
        target = step.kept.gather(1, step.into)
        return step, {
            "index/src_idx": step.moved // 2,
            "index/unm_idx": step.kept[even].view(-1, count) // 2,
            "index/dst_idx": target // 2,
        }
    if spec["kind"] == "kth":
        step = tome.kth_matching(metric, spec["k"])
        return step, {"index/dst_idx": step.into}
    step = tome.random_matching(metric, spec["r"], golden.tensors["rand"][..., 0])
    return step, {"index/a_idx": step.moved, "index/b_idx": step.kept, "index/dst_idx": step.into}


def tome_matching(golden: Golden) -> Iterator[Pair]:
    given = golden.tensors
    step, indices = matched(golden)
    x = given["input"].clone().requires_grad_()
    size = given["size"][..., 0]
    wavg, wavg_size = step.average(x, size)
    ones = torch.ones_like(size)
    (wavg * given["cotangent"]).sum().backward()
    plain, plain_size = step.average(given["input"], ones)
    after = step.kept.shape[1]
    groups = torch.where((step.source[:, None, :] == torch.arange(after)[None, :, None]), 1.0, 0.0)
    ours = {
        **indices,
        **{f"merged/{mode}": step.merge(given["input"], mode) for mode in ("sum", "mean", "amax")},
        "output": wavg,
        "wavg": wavg,
        "wavg_size": wavg_size[..., None],
        "wavg_nosize": plain,
        "wavg_nosize_size": plain_size[..., None],
        "source": groups,
        "grad/input": x.grad,
    }
    if "unmerged" in given:
        ours["unmerged"] = step.unmerge(given["merged/mean"])
    yield from compare(golden, "", ours)


def tome_model(golden: Golden) -> Iterator[Pair]:
    spec = golden.spec
    model = load(vit(golden, {}), golden.below("state/"))
    if "output_no_merge" in golden.tensors:
        yield Pair("output_no_merge", model(golden.tensors["input"]), golden.tensors["output_no_merge"])
    r = spec["r"]
    r = (r[0], float(r[1])) if spec.get("r_tuple") else r
    tokens.reduce(model, "tome", r=r, prop_attn=spec.get("prop_attn", True))
    ours = dict(zip(("r_schedule",), (torch.tensor(model.token_reduction.schedule),), strict=True))
    for how, seen in outputs(golden, model):
        states = [seen[f"state/{i}"] for i in range(len(model.blocks))]
        ours["n_tokens"] = torch.tensor([state.x.shape[1] for state in states])
        ours |= {f"size/{i}": state.size[..., None] for i, state in enumerate(states) if state.size is not None}
        ours["source"] = groups_of(states[-1])
        # tokens after the merge and before the MLP: what the block's second half makes of them is its output
        yield from compare(golden, how, {**ours, **seen})
    for i in range(len(model.blocks)):
        yield Pair(f"tokens/{i}", tokens_of(golden, model, i), golden.tensors[f"tokens/{i}"])


def groups_of(state: Any) -> Tensor:
    """The published source: ``[B, groups, tokens]``, 1 where a token belongs to a group."""
    places = torch.arange(state.x.shape[1])
    return (state.source[:, None, :] == places[None, :, None]).float()


def tokens_of(golden: Golden, model: nn.Module, block: int) -> Tensor:
    """Behind a block: whole in the state."""
    with torch.no_grad(), watched(model) as seen:
        model(golden.tensors["input"])
    return seen[f"state/{block}"].x
