"""BiFormer's three classes, its attention in both versions, and the bare op, from the arguments of the published code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.golden.harness import GIVEN, MODELS, OPS, Golden, Pair, compare_model, judge, renamed
from vitzoo.layers import RoutedAttention, Slot
from vitzoo.layers.routed import region_axis, route
from vitzoo.models.biformer import BiFormer
from vitzoo.ops.attend_routed.api import OP, attend_routed

ARGUMENTS = {
    **{"num_classes": "num_classes", "depth": "depths", "embed_dim": "embed_dim", "mlp_ratios": "mlp_ratio", "topks": "topks"},
    # fixed in all that is released, and given here as released
    **dict.fromkeys(("kv_downsample_mode", "kv_per_wins", "side_dwconv", "before_attn_dwconv", "layer_scale_init_value")),
    **dict.fromkeys(("n_win", "n_wins", "qk_dims", "head_dim", "auto_pad", "norm_layer")),
}


def check(golden: Golden) -> list[Pair]:
    name = golden.published_class
    if name == "regional_routing_attention_torch":
        return judge(golden, compare_op(golden), OPS, ("query", "key", "value", "region_graph", "cotangent"), ("mid/attn",))
    if "topk" in golden.kwargs:
        return judge(golden, compare_attention(golden), OPS, GIVEN, INSIDE)
    kwargs, published = renamed(golden.kwargs, ARGUMENTS), golden.kwargs
    layout = {"BiFormer": "biformer", "BiFormerSTL": "stl", "nchwBiFormerSTL": "stl_nchw"}[name]
    model = BiFormer(
        **kwargs | {"topks": tuple(k if k > 0 else None for k in published["topks"])},
        # attention among all tokens is left at 8 heads
        num_heads=tuple(
            d // published["head_dim"] if k > 0 else 8 for d, k in zip(published["embed_dim"], published["topks"], strict=True)
        ),
        n_win=published.get("n_win") or published["n_wins"][0],
        layout=layout,
        drop_odd=layout != "biformer",
    )
    return judge(golden, compare_model(golden, model), MODELS, GIVEN)


# -- the op -----------------------------------------------------------------------------------------------------------


def compare_op(golden: Golden) -> Iterator[Pair]:
    """The bare op in every implementation; the published one pads with zeros that count as keys."""
    spec, heads = golden.kwargs, golden.tensors["region_graph"].shape[1]
    sizes = {"query": spec["region_size"]}
    sizes |= dict.fromkeys(("key", "value"), spec["kv_region_size"] or spec["region_size"])
    ran = []
    for implementation in OP.implementations:
        leaves = {name: golden.tensors[name].clone().requires_grad_() for name in sizes}
        maps, counts = {}, {}
        for name, (rows, cols) in sizes.items():
            height, width = leaves[name].shape[2:]
            counts[name] = (-(-height // rows), -(-width // cols))
            padding = (0, counts[name][1] * cols - width, 0, counts[name][0] * rows - height)
            maps[name] = nn.functional.pad(leaves[name], padding).permute(0, 2, 3, 1).unflatten(-1, (heads, -1))
        arguments = (*maps.values(), counts["query"], golden.tensors["region_graph"])
        kwargs = {"key_regions": counts["key"], "scale": spec["scale"]}
        if implementation.supports(OP.prepare(*arguments, **kwargs)) is not None:
            continue
        kwargs["impl"] = implementation.name
        ran.append(implementation.name)
        how = f"by {implementation.name}"
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                out = attend_routed(*arguments, **kwargs).flatten(-2).permute(0, 3, 1, 2)
            out = out[:, :, : leaves["query"].shape[2], : leaves["query"].shape[3]]
            yield Pair("output", out, golden.tensors["output"], f"{how}, gradients {grad}")
            if grad:
                (out * golden.tensors["cotangent"]).sum().backward()
        for name, leaf in leaves.items():
            yield Pair(f"grad/{name}", leaf.grad, golden.tensors[f"grad/{name}"], how)
    assert {"reference", "sdpa"} <= set(ran), f"only {', '.join(ran) or 'nothing'} ran"


# -- the attention around it ------------------------------------------------------------------------------------------

# inside our op or our function, so that the output and the gradients pin them
INSIDE = ("mid/attn_weight", "mid/attn_mat", "mid/q_pix", "mid/r_weight", "mid/k_win", "mid/q_win", "mid/q_r", "mid/k_r")
INSIDE += ("mid/routing_logits", "mid/a_r", "mid/core_output", "grad/mid/q", "grad/mid/k", "grad/mid/v")


def compare_attention(golden: Golden) -> Iterator[Pair]:
    """The module, which regions it chooses, and its convolution."""
    kwargs, expected = golden.kwargs, golden.tensors
    late, n_win, heads = golden.published_class == "nchwBRA", kwargs["n_win"], kwargs["num_heads"]
    x = expected["input"].permute(0, 2, 3, 1) if late else expected["input"]
    module = RoutedAttention(Slot(kwargs["dim"], heads, tuple(x.shape[1:3])), n_win=n_win, topk=kwargs["topk"], late=late)
    prefix = "stages.0.blocks.0.attn."

    def ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed_ = BiFormer.from_published({prefix + key: value for key, value in state.items()}, BiFormer.Config())
        return {key.removeprefix(prefix): value for key, value in renamed_.items()}

    module.load_state_dict(ours(golden.below("state/")), strict=True)
    seen: dict[str, Tensor] = {}
    module.qkv.register_forward_hook(lambda m, args, out: seen.update(qkv=out))
    module.lepe.register_forward_hook(lambda m, args, out: seen.update(lepe=out))
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    outwards = (lambda t: t.permute(0, 3, 1, 2)) if late else (lambda t: t)
    yield Pair("output", outwards(out), expected["output"])
    with torch.no_grad():
        yield Pair("output", outwards(module(x)), expected["output"], "(inference)")
    (out * (expected["cotangent"].permute(0, 2, 3, 1) if late else expected["cotangent"])).sum().backward()
    yield Pair("grad/input", outwards(leaf.grad), expected["grad/input"])
    own = dict(module.named_parameters())
    for key, value in golden.below("grad/").items():
        if key != "input" and not key.startswith("mid/"):
            ((name, gradient),) = ours({key: value}).items()
            yield Pair(f"grad/{key}", own[name].grad, gradient)
    q, k, v = seen["qkv"].unflatten(-1, (3, heads, -1)).unbind(3)
    size = tuple(q.shape[1:3])
    axes = tuple(region_axis(n, n_win, late) for n in size)
    padding = (0, 0, 0, 0, 0, axes[1][0] * axes[1][1] - size[1], 0, axes[0][0] * axes[0][1] - size[0])
    chosen = route(*(nn.functional.pad(t, padding) for t in (q, k)), axes, size, kwargs["topk"])
    yield Pair("mid/idx_r" if late else "mid/r_idx", chosen, expected["mid/idx_r" if late else "mid/r_idx"])
    if late:
        for name, value in (("q", q), ("k", k), ("v", v)):
            yield Pair(f"mid/{name}", outwards(value.flatten(-2)), expected[f"mid/{name}"])
    else:
        yield Pair("mid/lepe", seen["lepe"], expected["mid/lepe"])
