"""DynamicViT, dTPS and Sparsifiner: a predictor decides, in training by noise."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.golden.families.tokens.common import compare, outputs, vit, watched
from tests.golden.harness import Golden, Pair, load
from vitzoo import tokens
from vitzoo.tokens._map import complement


def policy_softmax(golden: Golden) -> Iterator[Pair]:
    x, policy = (golden.tensors[name].clone().requires_grad_() for name in ("input", "policy"))
    y = tokens._policy.policy_softmax(x, policy[..., 0])
    (y * golden.tensors["cotangent"]).sum().backward()
    yield from compare(golden, "", {"output": y, "grad/input": x.grad, "grad/policy": policy.grad})


def dynamic_loss(golden: Golden) -> Iterator[Pair]:
    given, kwargs = golden.tensors, golden.kwargs
    leaves = {name: given[name].clone().requires_grad_() for name in given if f"grad/{name}" in given}
    named = {**given, **leaves}
    decisions = [named[f"score/{i}"] for i in range(len(kwargs["keep_ratio"]))]
    part = {
        "cls": F.cross_entropy(named["pred"], named["labels"]),
        "ratio": tokens._policy.ratio_loss(decisions, kwargs["keep_ratio"]),
        "cls_kl": tokens._policy.logit_distillation(named["pred"], named["teacher_logits"]),
        "token": tokens._policy.token_distillation(
            named["token_pred"], named["teacher_tokens"], named["mask"][..., 0], squares=kwargs["mse_token"]
        ),
    }
    weights = {"cls": kwargs["clf_weight"], "ratio": kwargs["ratio_weight"]}
    weights |= dict.fromkeys(("cls_kl", "token"), kwargs["distill_weight"])
    total = sum(weights[name] * value for name, value in part.items())
    total.backward()
    ours: dict[str, Any] = {f"part/{name}": value.view(1) for name, value in part.items()}
    ours["part/ratio"] = ours["part/ratio"] * len(decisions)  # the file has the sum over stages, the loss their mean
    ours |= {"output": total.view(1), **{f"grad/{name}": leaf.grad for name, leaf in leaves.items()}}
    yield from compare(golden, "", ours)


def predicted(golden: Golden, name: str) -> nn.Module:
    """A model with learned predictors, in which the published weights are."""
    kwargs = golden.kwargs
    layers = kwargs.get("pruning_loc", kwargs.get("prune_loc"))
    keep = kwargs.get("token_ratio", kwargs.get("keep_ratio"))
    size = {"img_size": tuple(golden.spec["input_size"])}
    skip = dict.fromkeys(("pruning_loc", "token_ratio", "distill", "prune_loc", "keep_ratio", "mode"))
    model = tokens.reduce(vit(golden, skip, **size), name, layers=layers, keep_rate=keep, distill=False)
    return load(model, golden.below("state/"))


def predictor_pairs(golden: Golden, name: str) -> Iterator[Pair]:
    model = predicted(golden, name)
    method, prefix = model.token_reduction, 1
    for how, seen in outputs(golden, model):
        states = [seen[f"state/{i}"] for i in range(len(model.blocks))]
        ours: dict[str, Any] = {"n_tokens": torch.tensor([s.x.shape[1] for s in states])}
        with torch.no_grad():
            ours["tokens/last"] = states[-1].x
            ours["features"] = model.norm(states[-1].x)[:, prefix:]
            for k, layer in enumerate(method.rates):
                patches = states[layer - 1].x[:, prefix:]
                log_probability = method.predictors[layer](patches)
                kept = log_probability[..., 0].topk(states[layer].x.shape[1] - prefix, dim=1).indices
                ours |= {f"log_prob/{k}": log_probability, f"keep_idx/{k}": kept}
                gone = complement(kept, patches.shape[1])
                expected = golden.tensors.get(f"drop_idx/{k}")
                ours[f"drop_idx/{k}"] = gone if expected is None else in_order_of(gone, expected)
        yield from compare(golden, how, {**ours, **seen})


def in_order_of(index: Tensor, published: Tensor) -> Tensor:
    """The same indices in the published order, where they are the same: what is pruned has no order of ours."""
    same = torch.equal(index.sort(1).values, published.sort(1).values)
    return published if same else index


def dynamic_training(golden: Golden) -> Iterator[Pair]:
    model = predicted(golden, "dynamicvit").train()
    noise = iter([golden.tensors[f"gumbel/{k}"] for k in range(len(model.token_reduction.rates))])
    model.token_reduction.noise = lambda like: next(noise)
    x = golden.tensors["input"].clone().requires_grad_()
    y = model(x)
    noted = model.token_reduction.noted
    features = model.norm(noted["tokens"])[:, 1:]
    ours = {"output": y, "features": features, "last_mask": noted["decisions"][-1][..., None]}
    ours |= {f"decision/{k}": decision for k, decision in enumerate(noted["decisions"])}
    everything = torch.cat([t.flatten() for t in (y, features, *noted["decisions"])])
    (everything * golden.tensors["cotangent"]).sum().backward()
    ours |= {f"grad/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    yield from compare(golden, "", {**ours, "grad/input": x.grad})


def squeezing(golden: Golden) -> Iterator[Pair]:
    given = golden.tensors
    temperature = golden.kwargs["temperature"]
    leaves = {name: given[name].clone().requires_grad_() for name in ("input", "dropped") if name in given}
    if "dropped" in given:
        y, _ = tokens.tps.squeeze(leaves["input"], leaves["dropped"], temperature)
    else:
        before = given["prev"][..., 0]
        now = given["keep"][..., 0] * before
        assert torch.equal(now, given["keep_now"][..., 0])
        y = tokens.tps.squeeze_masked(leaves["input"], now, before, temperature)
    (y * given["cotangent"]).sum().backward()
    yield from compare(golden, "", {"output": y, **{f"grad/{name}": leaf.grad for name, leaf in leaves.items()}})


def sparse_model(golden: Golden) -> Iterator[Pair]:
    kwargs, cfg = golden.kwargs, {key.removeprefix("SPAR."): value for key, value in golden.spec["cfg"].items()}
    names = ("attn_keep_rate_list", "token_keep_rate_list", "token_pruning_loc_indicator", "reduce_n_factor", "reduce_c_factor")
    model = vit(golden, dict.fromkeys(names))
    tokens.reduce(
        model,
        "sparsifiner",
        attn_keep_rate=kwargs["attn_keep_rate_list"],
        token_keep_rate=kwargs["token_keep_rate_list"],
        prune=[i for i, here in enumerate(kwargs["token_pruning_loc_indicator"]) if here],
        prune_rows=cfg.get("PRUNE_ATTN_MATRIX_ROW", False),
        reduce_n=kwargs["reduce_n_factor"],
        reduce_c=kwargs["reduce_c_factor"],
        coefficients=cfg.get("BASIS_COEF.TOPK", 8) if cfg.get("BASIS_COEF.USE_TOPK", True) else None,
        least_score=None if cfg.get("ATTN_SCORE.USE_TOPK", True) else cfg["ATTN_SCORE.THRESHOLD"],
        distill=False,
    )
    load(model, golden.below("state/"))
    method = model.token_reduction
    if cfg.get("LOSS.USE_ATTN_RECON"):
        model.train()
        method.reconstruct = True
    x = golden.tensors["input"].clone().requires_grad_()
    with watched(model) as seen, sparse_parts(model) as inside:
        y = model(x)
    states = [seen[f"state/{i}"] for i in range(len(model.blocks))]
    ours: dict[str, Any] = {**inside, "output": y, "features": model.norm(states[-1].x)[:, 1:]}
    if not method.reconstruct:
        blocks = range(len(model.blocks))
        masks, weights = ([inside[f"{name}/{i}"] for i in blocks] for name in ("attn_mask", "basis_coef"))
        bases = [model.blocks[i].attn.mask_predictor.basis(signed=False) for i in blocks]
        for name, parts in (("attn_mask", masks), ("basis_coef", weights), ("basis", bases)):
            ours[f"{name}_sparsity"] = torch.stack([(part == 0).float().mean() for part in parts]).mean().view(1)
    ours |= {f"token_mask/{i}": s.policy[:, 1:] for i, s in enumerate(states) if s.policy is not None}
    result = y
    if method.reconstruct:
        result = torch.cat([y.flatten(), *(inside[f"approx_attn/{i}"].flatten() for i in range(len(model.blocks)))])
    (result * golden.tensors["cotangent"]).sum().backward()
    ours |= {f"grad/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    yield from compare(golden, "", {**ours, "grad/input": x.grad})


class sparse_parts:
    """What the blocks of a model computed on their way to sparse attention, under the published names."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.method, self.found = model, model.token_reduction, {}

    def __enter__(self) -> dict[str, Any]:
        self.handles = [
            block.attn.mask_predictor.register_forward_hook(partial(self.note, i)) for i, block in enumerate(self.model.blocks)
        ]
        self.method.connections = self.connections
        return self.found

    def note(self, i: int, predictor: nn.Module, given: tuple[Tensor, ...], result: tuple[Tensor, Tensor]) -> None:
        self.found |= {f"basis_coef/{i}": result[0], f"approx_attn/{i}": result[1]}

    def connections(self, step: Any, state: Any, qkv: Any) -> Any:
        mask, scores = type(self.method).connections(self.method, step, state, qkv)
        with torch.no_grad():
            logits = (qkv.q * qkv.scale).transpose(1, 2) @ qkv.k.permute(0, 2, 3, 1)
            seen = torch.ones_like(mask) if self.method.reconstruct else mask
            attention = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        self.found |= {f"attn_mask/{step.layer}": mask, f"masked_attn/{step.layer}": attention}
        return mask, scores

    def __exit__(self, *error: Any) -> None:
        del self.method.connections
        for handle in self.handles:
            handle.remove()
