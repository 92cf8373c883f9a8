"""Attribution: rollout, flow, relevance, Grad-CAM, norms, probing heads, and what became of reduced tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden.families.tokens.common import watched
from tests.golden.families.tokens.merging import groups_of
from tests.golden.families.tokens.pruning import evit_states
from tests.golden.harness import GIVEN, OPS, Golden, NotYet, Pair, judge, load
from vitzoo import explain, tokens
from vitzoo.explain import activations, gradients, rolling
from vitzoo.explain._record import recording, weights_of
from vitzoo.layers.probing import EfficientProbing, MomentProbing, SimPool
from vitzoo.models.swin import Swin
from vitzoo.models.vit import ViT


def check(golden: Golden) -> list[Pair]:
    case = golden.spec["case"]
    if case not in CHECKS:
        raise NotYet(f"{case} is not in vitzoo yet")
    given = (*GIVEN, "logits", "cls_token", "attn", "value", "ffn_out", "pre_ln1", "pre_ln2", "enc/", "dec/")
    return judge(golden, CHECKS[case](golden), OPS, given)


def rollout(golden: Golden) -> Iterator[Pair]:
    given = golden.tensors
    weights = given["logits"].softmax(dim=-1)
    yield Pair("attn", weights, given["attn"])
    layers = list(weights.mean(dim=2))
    yield Pair("output", rolling.rolled_out(layers), given["output"])
    yield Pair("rollout_start1", rolling.rolled_out(layers, start=1), given["rollout_start1"])
    products = [rolling.rolled_out(layers[: i + 1], residual=False) for i in range(len(layers))]
    joint = [rolling.rolled_out(layers[: i + 1]) for i in range(len(layers))]
    yield Pair("joint_no_residual", per_image(products, given["joint_no_residual"]), given["joint_no_residual"])
    yield Pair("joint_per_layer", per_image(joint, given["joint_per_layer"]), given["joint_per_layer"])
    for name, expected in golden.below("vit_explain/").items():
        fusion, discard = name.split("_")
        fused = [rolling.fuse_heads(w[:1], fusion, float(discard)) for w in weights]
        mask = rolling.rolled_out(fused, by_column=True)[0, 0, 1:]
        yield Pair(f"vit_explain/{name}", (mask / mask.max()).view_as(expected), expected)


def per_image(products: list[Tensor], like: Tensor) -> Tensor:
    """Products up to each layer, in the order of the file: layers, then images or tokens."""
    stacked = torch.stack(products)  # [K, B, L, L]
    return stacked[:, 0] if stacked.ndim > like.ndim else stacked


def flow(golden: Golden) -> Iterator[Pair]:
    given = golden.tensors
    weights = given["logits"].softmax(dim=-1)
    layers = rolling.augmented(weights.mean(dim=1))
    yield Pair("augmented", layers, given["augmented"])
    raw = rolling.flows(layers)
    yield Pair("raw_flow", raw, given["raw_flow"])
    yield Pair("output", raw / raw.sum(dim=-1, keepdim=True), given["output"])


def chefer_rules(golden: Golden) -> Iterator[Pair]:
    given, spec = golden.tensors, golden.spec
    heads, keys, queries = spec["shape"]
    image, own, crossed = torch.eye(keys), torch.eye(queries), torch.zeros(queries, keys)
    for i in range(spec["enc"]):
        weights = given[f"enc/{i}/logits"].softmax(dim=-1)
        yield Pair(f"enc/{i}/attn", weights, given[f"enc/{i}/attn"])
        cam = gradients.gained(weights, given[f"enc/{i}/grad"])
        yield Pair(f"enc/{i}/cam", cam, given[f"enc/{i}/cam"])
        image = gradients.through_self(image, cam)
    assert given["enc/0/logits"].shape[0] == heads
    yield Pair("R_ii", image, given["R_ii"])
    yield Pair("R_ii_normalised", gradients.excess(image), given["R_ii_normalised"])
    for i in range(spec["dec"]):
        logits = {kind: given[f"dec/{i}/{kind}_logits"] for kind in ("self", "cross")}
        cams = {k: gradients.gained(v.softmax(dim=-1), given[f"dec/{i}/{k}_grad"]) for k, v in logits.items()}
        own, crossed = gradients.through_self(own, cams["self"], crossed)
        crossed = gradients.through_cross(own, image, crossed, cams["cross"])
    yield Pair("R_qq", own, given["R_qq"])
    yield Pair("output", crossed, given["output"])


def vit(golden: Golden, **more: Any) -> nn.Module:
    names = ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads")
    kwargs = {name: golden.kwargs[name] for name in names}
    kwargs["img_size"] = tuple(kwargs["img_size"]) if isinstance(kwargs["img_size"], list) else kwargs["img_size"]
    return load(ViT(**kwargs, **more), golden.below("state/"))


def chefer_vit(golden: Golden) -> Iterator[Pair]:
    given, target = golden.tensors, golden.spec["target"]
    model, x = vit(golden), given["input"]
    yield Pair("logits", model(x), given["logits"])
    _, weights, gains = gradients.seen_with_gradients(model, x, target)
    product = torch.eye(weights[0].shape[-1])
    for i, (w, g) in enumerate(zip(weights, gains, strict=True)):
        yield Pair(f"attn/{i}", w, given[f"attn/{i}"])
        yield Pair(f"attn_grad/{i}", g, given[f"attn_grad/{i}"])
        product = gradients.through_self(product, gradients.gained(w, g)[0])
    with torch.no_grad(), recording(model) as records:
        model(x)
    yield Pair("attn/2", weights_of(records[2].op, records[2].call), given["attn/2"], "beside the op")
    yield Pair("R", product, given["R"])
    yield Pair("output", product[0, 1:], given["output"])
    yield Pair("output", explain.relevance(model, x, target).flatten(), given["output"], "of the model")
    yield Pair("attn_gradcam", gradients.attention_gradcam(weights[-1], gains[-1])[0], given["attn_gradcam"])
    yield Pair("rollout", explain.rollout(model, x).flatten(1), given["rollout"])


def gradcam(golden: Golden) -> Iterator[Pair]:
    given, kwargs = golden.tensors, golden.kwargs
    if golden.spec["arch"] == "vit":
        model = vit(golden)
    else:
        names = ("img_size", "patch_size", "num_classes", "embed_dim", "window_size")
        tuples = {name: tuple(kwargs[name]) for name in ("depths", "num_heads")}
        model = load(Swin(**{name: kwargs[name] for name in names}, **tuples), golden.below("state/"))
    x, targets = given["input"], torch.tensor(golden.spec["targets"])
    yield Pair("logits", model(x), given["logits"])
    name = activations.default_layer(model)
    layer = model.get_submodule(name)
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: kept.append(output))
    chosen = model(x).gather(1, targets[:, None]).sum()
    handle.remove()
    activation, gradient = (
        activations.as_map(model, layer, t, x) for t in (kept[0].detach(), *torch.autograd.grad(chosen, kept))
    )
    yield Pair("activation", activation, given["activation"])
    yield Pair("gradient", gradient, given["gradient"])
    yield Pair("weights", gradient.mean(dim=(2, 3)), given["weights"])
    raw = given["cam_raw"]  # with what speaks against the class
    yield Pair("cam_raw", activations.weighed(activation, gradient), raw.clamp(min=0))
    yield Pair("cam_raw", (gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1), raw, "before it is cut at zero")
    yield Pair("output", explain.gradcam(model, x, targets), given["output"])


def globenc(golden: Golden) -> Iterator[Pair]:
    given, state = golden.tensors, golden.below("state/")
    weights = given["logits"].softmax(dim=-1)
    yield Pair("attn", weights, given["attn"])
    mixed = torch.einsum("bnls,bnsd->blnd", weights, given["value"]).flatten(2)
    eps = golden.spec.get("eps", 1e-12)
    before = given["input"] + mixed @ state["dense.weight"].T + state["dense.bias"]
    yield Pair("pre_ln1", before, given["pre_ln1"])
    norms = [(state[f"{name}.weight"], given[f"pre_ln{i}"], eps) for i, name in ((1, "LayerNorm"), (2, "LayerNorm2"))]
    found = explain.norm_attribution(weights, given["value"], state["dense.weight"], given["input"], norms)
    names = {"weighted_norm": "weighted", "summed_norm": "summed", "residual_norm": "residual", "post_ln_norm": "norm/0"}
    for published, ours in {**names, "output": "norm/1"}.items():
        yield Pair(published, found[ours], given[published])


def probe(module: nn.Module, *inputs: str) -> Callable[[Golden], Iterator[Pair]]:
    """Output and gradients of a head; one that takes a class token apart reads the patches behind it."""

    def run(golden: Golden) -> Iterator[Pair]:
        head = module(golden.kwargs)
        head.load_state_dict(golden.below("state/"), strict=True)
        leaves = {name: golden.tensors[name].clone().requires_grad_() for name in inputs}
        out = head(*leaves.values()) if len(inputs) == 1 else head(leaves["cls_token"], leaves["input"][:, 1:])
        yield Pair("output", out, golden.tensors["output"])
        if "attn" in golden.tensors:
            yield Pair("attn", head.weights(golden.tensors["input"]), golden.tensors["attn"])
        (out * golden.tensors["cotangent"]).sum().backward()
        own = {**dict(head.named_parameters()), **leaves}
        for key, expected in golden.below("grad/").items():
            yield Pair(f"grad/{key}", own[key].grad, expected)

    return run


def tome_source(golden: Golden) -> Iterator[Pair]:
    """Which patches each token of the last block stands for, and its value laid on all of them."""
    given, x = golden.tensors, golden.tensors["input"]
    model = vit(golden)
    tokens.reduce(model, "tome", r=golden.spec["r"])
    with torch.no_grad(), watched(model) as seen:
        features = model.forward_features(x)
        logits = model.forward_head(features)
    last = seen[f"state/{len(model.blocks) - 1}"]
    yield Pair("features", features, given["features"])
    yield Pair("logits", logits, given["logits"])
    yield Pair("size", last.size[..., None], given["size"])
    yield Pair("source", groups_of(last), given["source"])
    yield Pair("group", last.source, given["group"])
    yield Pair("vis", tokens.token_groups(model, x)[:, -1], given["vis"])
    (dense,) = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    yield Pair("dense", dense, given["dense"])
    whole = features.gather(1, last.source[..., None].expand(-1, -1, features.shape[-1]))
    yield Pair("output", whole, given["output"])


def evit_places(golden: Golden) -> Iterator[Pair]:
    """Which patch each token is that stays where tokens leave; 0, as published, for one that others were fused into."""
    given, kwargs = golden.tensors, golden.kwargs
    model = vit(golden)
    tokens.reduce(model, "evit", keep_rate=kwargs["keep_rate"], fuse=kwargs["fuse_token"])
    with torch.no_grad(), watched(model) as seen:
        yield Pair("output", model(given["input"]), given["output"])
    shrinking = [i for i, rate in enumerate(kwargs["keep_rate"]) if rate < 1]
    for number, i in enumerate(shrinking):
        before = seen[f"state/{i - 1}"].x
        with torch.no_grad():
            ranked = evit_states(before, model, i, golden)["idx"]
        yield Pair(f"idx/{number}", ranked, given[f"idx/{number}"])
        source = seen[f"state/{i}"].source[:, None, 1:] - 1  # without the class token
        here = source == torch.arange(ranked.shape[1])[None, :, None]
        alone = here.sum(-1) == 1
        yield Pair(f"real_idx/{number}", here.long().argmax(-1) * alone, given[f"real_idx/{number}"])


def moment(kwargs: dict[str, Any]) -> nn.Module:
    return MomentProbing(kwargs["in_dim"], kwargs["num_classes"], kwargs["hidden_dim"], kwargs["num_heads"])


CHECKS: dict[str, Callable[[Golden], Iterator[Pair]]] = {
    "rollout": rollout,
    "flow": flow,
    "chefer_rules": chefer_rules,
    "chefer_vit": chefer_vit,
    "gradcam_vit": gradcam,
    "gradcam_swin": gradcam,
    "globenc_layer": globenc,
    "tome_source": tome_source,
    "evit_real_idx": evit_places,
    "efficient_probing": probe(lambda kwargs: EfficientProbing(**kwargs), "input"),
    "simpool": probe(lambda kwargs: SimPool(**kwargs), "input"),
    "moment_probing": probe(moment, "cls_token", "input"),
}
