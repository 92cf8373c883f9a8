"""EViT, ATS and FasterVLM: tokens that go because attention says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.golden.families.tokens.common import compare, outputs, vit
from tests.golden.harness import Golden, Pair, load, renamed
from vitzoo import tokens
from vitzoo.layers import Block, TokenAttention
from vitzoo.models.vit import ViT
from vitzoo.tokens import evit
from vitzoo.tokens._map import complement


def evit_schedule(golden: Golden) -> Iterator[Pair]:
    spec = golden.spec
    rate = tokens.KeepRate(spec["base"], spec["start"], spec["epochs"])
    per_epoch = spec["iters_per_epoch"]
    ours = [rate.at(iteration / per_epoch) for iteration, _ in golden.tensors["iters_epoch"].tolist()]
    yield Pair("output", torch.tensor(ours, dtype=torch.float64), golden.tensors["output"])


def evit_states(step_before: Tensor, model: nn.Module, block: int, golden: Golden) -> dict[str, Tensor]:
    """The ranking inside a block whose input is known."""
    method = model.token_reduction
    parts = model.blocks[block].forward.args[0].parts
    qkv = parts.project(parts.read(step_before), None)
    scores = tokens._parts.class_attention(qkv).mean(1)[:, method.prefix :]
    count = method.kept(model.blocks[block].forward.args[0], scores.shape[1])
    index = evit.attentive_tokens(scores, count)
    return {"cls_attn": scores, "idx": index, "compl": complement(index, scores.shape[1])}


def evit_model(golden: Golden) -> Iterator[Pair]:
    kwargs = golden.kwargs
    state = golden.below("state/")
    size = golden.spec["input_size"]
    if size[0] != kwargs["img_size"]:  # published: positions resampled at run time without a low-pass; ours have one
        state["pos_embed"] = resampled(state["pos_embed"], size[0] // kwargs["patch_size"])
    model = vit(golden, {"keep_rate": None, "fuse_token": None}, img_size=size[0])
    load(model, state)
    tokens.reduce(model, "evit", keep_rate=kwargs["keep_rate"], fuse=kwargs["fuse_token"])
    for how, seen in outputs(golden, model):
        states = [seen[f"state/{i}"] for i in range(len(model.blocks))]
        ours: dict[str, Any] = {"n_tokens": torch.tensor([s.x.shape[1] for s in states])}
        for i, s in enumerate(states):
            ours[f"tokens/{i}"] = s.x
            if f"idx/{i}" in golden.tensors:
                with torch.no_grad():
                    ranked = evit_states(states[i - 1].x, model, i, golden)
                ours |= {f"{name}/{i}": value for name, value in ranked.items()}
        if "grad/pos_embed" in seen and size[0] != kwargs["img_size"]:
            published = golden.tensors["state/pos_embed"].clone().requires_grad_()
            side = size[0] // kwargs["patch_size"]
            (seen["grad/pos_embed"],) = torch.autograd.grad(resampled(published, side), published, seen["grad/pos_embed"])
        yield from compare(golden, how, {**ours, **seen})


def resampled(positions: Tensor, side: int) -> Tensor:
    cls, grid = positions[:, :1], positions[:, 1:]
    old = round(grid.shape[1] ** 0.5)
    grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)


def evit_block(golden: Golden) -> Iterator[Pair]:
    kwargs, x = golden.kwargs, golden.tensors["input"].clone().requires_grad_()
    dim = kwargs["dim"]
    block = Block(dim, TokenAttention(dim, kwargs["num_heads"]), norm_eps=1e-5)
    block.load_state_dict(golden.below("state/"))
    holder = ViT(embed_dim=dim, num_heads=kwargs["num_heads"], depth=1, patch_size=4, img_size=32, num_classes=0)
    holder.blocks = nn.Sequential(block.eval())
    count = golden.spec.get("forward", {}).get("tokens")
    tokens.reduce(holder, "evit", keep_rate=kwargs["keep_rate"], layers=(0,), fuse=kwargs["fuse_token"], tokens=count)
    y = holder.blocks(x)
    (y * golden.tensors["cotangent"]).sum().backward()
    ours = {"output": y, "grad/input": x.grad, "n_tokens": torch.tensor(1 + len(golden.tensors["idx"][0]))}
    ours |= {f"grad/{name}": p.grad for name, p in block.named_parameters()}
    with torch.no_grad():
        ours |= evit_states(x, holder, 0, golden)
    yield from compare(golden, "", ours)


ATS_ARGUMENTS = {
    **{"IMG_SIZE": "img_size", "PATCH_SIZE": "patch_size", "EMBED_DIM": "embed_dim", "DEPTH": "depth"},
    **{"NUM_HEADS": "num_heads", "ATS_BLOCKS": None, "NUM_TOKENS": None, "DROP_TOKENS": None},
}


def ats_model(golden: Golden) -> Iterator[Pair]:
    classes = golden.tensors["output"].shape[1]
    model = ViT(**renamed(golden.kwargs, ATS_ARGUMENTS), num_classes=classes)
    published = golden.below("state/")
    state = {key: value for key, value in published.items() if not key.endswith("out_zero_mask")}  # zeros, never trained
    load(model, state)
    where = golden.kwargs["ATS_BLOCKS"]
    pack = golden.kwargs["DROP_TOKENS"]
    tokens.reduce(model, "ats", layers=where, pack=pack)
    for how, seen in outputs(golden, model):
        if pack and not how:
            continue  # while gradients are taken nothing is packed, so shapes are others
        states = [seen[f"state/{i}"] for i in range(len(model.blocks))]
        ours: dict[str, Any] = {"n_tokens": torch.tensor([s.x.shape[1] for s in states])}
        for i in where:
            ours[f"policy/{i}"] = states[i].policy[..., None]
            ours[f"policy_full/{i}"] = F.pad(states[i].policy, (0, states[i - 1].x.shape[1] - states[i].x.shape[1]))[..., None]
            ours[f"tokens/{i}"] = states[i].x
            with torch.no_grad():
                parts = model.blocks[i].forward.args[0].parts
                qkv = parts.project(parts.read(states[i - 1].x), None)
                scores = tokens.ats.significance(qkv, tokens.ats._masked(states[i - 1]))[:, 1:]
                ranked, order = (scores / scores.sum(1, keepdim=True)).sort(dim=1)
            ours |= {f"sorted_scores/{i}": ranked, f"sorted_idx/{i}": tied_order(order, golden.tensors, i)}
        yield from compare(golden, how, {**ours, **seen})


def tied_order(order: Tensor, published: dict[str, Tensor], block: int) -> Tensor:
    """Ours, except among published scores that are equal: there any order is right."""
    theirs, scores = published[f"sorted_idx/{block}"], published[f"sorted_scores/{block}"]
    tied = torch.zeros_like(theirs, dtype=torch.bool)
    equal = (scores[:, 1:] - scores[:, :-1]) < 1e-7
    tied[:, 1:] |= equal
    tied[:, :-1] |= equal
    return torch.where(tied, theirs, order)


def fastervlm_selection(golden: Golden) -> Iterator[Pair]:
    given = golden.tensors
    score = given["logits"].softmax(-1).mean(1)[:, 0, 1:]
    kept, index, mask = tokens.select_tokens(given["input"][:, 1:], score, golden.spec["keep"])
    yield from compare(golden, "", {"score": score, "mask": mask, "output": kept})
