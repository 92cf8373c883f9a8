"""Token reduction: matchings and schedules, and whole models with a reduction in them. Indices exact, values to 1e-5."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.golden.families import tap_adl
from tests.golden.harness import GIVEN, OPS, Golden, Pair, judge, load, renamed
from vitzoo import tokens
from vitzoo.layers import Block, TokenAttention, tap
from vitzoo.models.vit import ViT
from vitzoo.tokens import evit, tome
from vitzoo.tokens._map import TokenMap, complement

ARGUMENTS = {
    **{name: name for name in ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio")},
    **{name: name for name in ("global_pool", "qkv_bias", "no_embed_class", "in_chans", "distilled", "reg_tokens")},
}
Check = Callable[[Golden], list[Pair]]


def check(golden: Golden) -> list[Pair]:
    family = golden.family.removeprefix("tokens_")
    case = golden.spec["builder"]
    return judge(golden, CHECKS[family, case](golden), OPS, GIVEN_ALSO.get(case, GIVEN))


def vit(golden: Golden, options: dict[str, str | None], **changes: Any) -> ViT:
    """The plain transformer that a published model is at heart, without weights."""
    return ViT(**{**renamed(golden.kwargs, {**ARGUMENTS, **options}), **changes})


def outputs(golden: Golden, model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a forward computes with and without gradients, which take different paths on a CPU."""
    x = golden.tensors["input"].clone().requires_grad_()
    with watched(model) as seen:
        result = model(x)
    if "cotangent" in golden.tensors:
        (result * golden.tensors["cotangent"]).sum().backward()
        seen |= {f"grad/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        seen["grad/input"] = x.grad
    yield "", {**seen, "output": result}
    with torch.no_grad(), watched(model) as seen:
        result = model(golden.tensors["input"])
    yield "(inference)", {**seen, "output": result}


class watched:  # reads as the context that it is
    """The states behind every block of a reduced model, by ``state/<block>``."""

    def __init__(self, model: nn.Module) -> None:
        self.method = model.token_reduction

    def __enter__(self) -> dict[str, Any]:
        self.context = tokens._method.watching(self.method, range(self.method.depth), self.method.depth)
        self.watch = self.context.__enter__()
        self.seen: dict[str, Any] = {}
        return self.seen

    def __exit__(self, *error: Any) -> None:
        self.seen |= {f"state/{i}": state for i, state in self.watch.states.items()}
        self.context.__exit__(*error)


def compare(golden: Golden, how: str, ours: dict[str, Any]) -> Iterator[Pair]:
    """Everything of ours that the file has under the same name."""
    for name, value in ours.items():
        if name in golden.tensors and isinstance(value, Tensor):
            yield Pair(name, value.detach().to(golden.tensors[name].dtype), golden.tensors[name], how)


# -- ToMe -------------------------------------------------------------------------------------------------------------


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


# -- EViT -------------------------------------------------------------------------------------------------------------


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


# -- DynamicViT and dTPS ----------------------------------------------------------------------------------------------


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


# -- ATS --------------------------------------------------------------------------------------------------------------

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


# -- TAP --------------------------------------------------------------------------------------------------------------


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


# -- Sparsifiner ------------------------------------------------------------------------------------------------------


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


# -- FasterVLM --------------------------------------------------------------------------------------------------------


def fastervlm_selection(golden: Golden) -> Iterator[Pair]:
    given = golden.tensors
    score = given["logits"].softmax(-1).mean(1)[:, 0, 1:]
    kept, index, mask = tokens.select_tokens(given["input"][:, 1:], score, golden.spec["keep"])
    yield from compare(golden, "", {"score": score, "mask": mask, "output": kept})


CHECKS: dict[tuple[str, str], Callable[[Golden], Iterator[Pair]]] = {
    ("tome", "tome_parse_r"): tome_schedules,
    ("tome", "tome_ops"): tome_matching,
    ("tome", "tome_model"): tome_model,
    ("evit", "evit_schedule"): evit_schedule,
    ("evit", "evit_model"): evit_model,
    ("evit", "evit_block"): evit_block,
    ("dynamicvit", "policy_softmax"): policy_softmax,
    ("dynamicvit", "dyvit_loss"): dynamic_loss,
    ("dynamicvit", "dyvit_eval"): lambda golden: predictor_pairs(golden, "dynamicvit"),
    ("dynamicvit", "dyvit_train"): dynamic_training,
    ("tps", "tps_model"): lambda golden: predictor_pairs(golden, "tps"),
    ("tps", "tps_module"): squeezing,
    ("ats", "ats_model"): ats_model,
    ("tap", "tap_pool"): tap_pooling,
    ("tap", "adl"): tap_diversification,
    ("tap", "tap_model"): tap_model,
    ("sparsifiner", "sparsifiner"): sparse_model,
    ("fastervlm", "fastervlm"): fastervlm_selection,
}
GIVEN_ALSO = {
    "tome_ops": (*GIVEN, "metric", "size", "rand"),
    "evit_schedule": (*GIVEN, "iters_epoch"),
    "fastervlm": (*GIVEN, "logits"),
    "policy_softmax": (*GIVEN, "policy"),
    "dyvit_loss": (*GIVEN, "labels", "mask", "pred", "score/", "teacher_logits", "teacher_tokens", "token_pred"),
    "dyvit_train": (*GIVEN, "gumbel/"),
    "tps_module": (*GIVEN, "dropped", "keep", "keep_now", "prev"),
}
