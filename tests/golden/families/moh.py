"""MoH-ViT and its two attentions, from the arguments of the published classes; routers, their loss and offsets step by step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.golden.harness import GIVEN, MODELS, OPS, Golden, Pair, compare_model, judge, renamed
from vitzoo.layers import Slot
from vitzoo.layers.aggregated import AggregatedAttention, LengthScaledAttention, cells, log_offsets, relative_table
from vitzoo.layers.mixture import chances
from vitzoo.models.moh import MoH

ARGUMENTS = {
    "embed_dims": "embed_dim",
    "mlp_ratios": "mlp_ratio",
    "sr_ratios": "pool_ratios",
    "shared_head": "shared_heads",
    "routed_head": "routed_heads",
    **{name: name for name in ("img_size", "num_classes", "num_heads", "qkv_bias", "depths", "pretrain_size")},
    **dict.fromkeys(("window_size", "patch_size", "norm_layer")),
}


def check(golden: Golden) -> list[Pair]:
    if golden.spec.get("kind") == "op":
        # the softmax is inside our ops; an index of a table of their own is nothing that we have
        return judge(*without_dead(golden, compare_attention), OPS, (*GIVEN, "relative_pos_index"), ("mid/attn",))
    assert set(golden.kwargs["window_size"]) == {3, None}
    return judge(*without_dead(golden, compare_whole), MODELS, GIVEN)


def without_dead(golden: Golden, compare) -> tuple[Golden, list[Pair]]:
    """The file, and its comparisons, but for gradients that are zero in theory, of which only rounding is left: of a bias
    that all keys of a softmax share, and of a router that keeps one head, whose weight is always 1."""
    dead = [f"grad/{name}" for name in golden.spec.get("dead_parameters", ())]
    if golden.spec.get("kind") == "op":
        dead += ["grad/cpb_fc2.bias"] if golden.spec["cls"] == "Attention" else []
    else:
        routed = enumerate(golden.kwargs["routed_head"], 1)
        dead += [f"grad/block{i}.0.attn.wg.weight" for i, heads in routed if heads == 1]
    assert all(golden.tensors[name].abs().max() < 5e-6 for name in dead if name in golden.tensors)
    rest = Golden(golden.spec, {name: value for name, value in golden.tensors.items() if name not in dead})
    return rest, list(compare(rest))


def compare_whole(golden: Golden) -> Iterator[Pair]:
    published = golden.kwargs
    model = MoH(**{"pretrain_size": published["img_size"], **renamed(published, ARGUMENTS)})
    return compare_model(golden, model)


# -- one attention ----------------------------------------------------------------------------------------------------

PLACE = ("block1.0.attn.", "stages.0.blocks.0.attn.")


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published entries of an attention as ours, through the conversion of whole models."""
    ours = MoH.from_published({PLACE[0] + key: value for key, value in state.items()}, MoH.Config())
    return {key.removeprefix(PLACE[1]): value for key, value in ours.items()}


def compare_attention(golden: Golden) -> Iterator[Pair]:
    kwargs, expected = golden.kwargs, golden.tensors
    size, shared, topk = tuple(kwargs["input_resolution"]), kwargs["shared_head"], kwargs["routed_head"]
    ratio = kwargs.get("sr_ratio", 1)
    kind = AggregatedAttention if ratio > 1 else LengthScaledAttention
    slot = Slot(kwargs["dim"], kwargs["num_heads"], size, qkv_bias=kwargs.get("qkv_bias", True), kv_ratio=ratio)
    attn = kind(slot, size, shared, topk)
    attn.load_state_dict(converted(golden.below("state/")), strict=True)
    x = expected["input"].unflatten(1, size).requires_grad_()

    seen: list[Tensor] = []
    attn.router.register_forward_hook(lambda module, args, out: seen.append(out))
    out = attn.eval()(x)
    gates = seen[0]
    gates.retain_grad()
    (out * expected["cotangent"].view_as(out)).sum().backward()
    yield Pair("output", out.flatten(1, 2), expected["output"])
    yield from gradients(golden, attn, "grad/", {"input": x, "mid/masked_gates": gates})
    with torch.inference_mode():
        yield Pair("output", attn(expected["input"].unflatten(1, size)).flatten(1, 2), expected["output"], "(inference)")

    with torch.no_grad():
        gates = gates.flatten(1, 2)
        routed = gates[..., shared:]
        ours = {"masked_gates": gates, "shared_head_gates": gates[..., :shared], "routed_head_gates": routed}
        router = attn.router
        if router.routed is not None:
            ours["gates"] = chances(x.flatten(0, 2), router.routed.weight)
            taken = (routed > 0).flatten(0, 1).float()
            yield Pair("mid/indices", taken, torch.zeros_like(taken).scatter(1, expected["mid/indices"], 1.0))
        if router.balance is not None:
            ours["weight_0"] = 2 * chances(x.flatten(1, 2), router.balance.weight)
        for name, value in ours.items():
            if f"mid/{name}" in expected:
                yield Pair(f"mid/{name}", value, expected[f"mid/{name}"])
        offsets = offsets_of_pairs(attn, x, ratio)
        published = expected["relative_coords_table"][expected["relative_pos_index"].flatten()]
        yield Pair("relative_coords_table", offsets, published)
        name = "mid/pool_bias" if ratio > 1 else "mid/rel_bias"
        yield Pair(name, attn.cpb(offsets).mT.reshape(expected[name].shape), expected[name])

    if "aux_loss" in expected:
        attn.zero_grad()
        x.grad = None
        attn.train()(x)
        loss = router.unevenness
        loss.backward()
        yield Pair("aux_loss", loss.detach()[None], expected["aux_loss"])
        yield from gradients(golden, attn, "aux_grad/", {"input": x})


def gradients(golden: Golden, attn: torch.nn.Module, prefix: str, leaves: dict[str, Tensor]) -> Iterator[Pair]:
    own = dict(attn.named_parameters())
    for key, value in golden.below(prefix).items():
        if key in leaves:
            actual = leaves[key].grad.view_as(value)
        else:
            ((name, value),) = converted({key: value}).items()
            actual = own[name].grad
        yield Pair(f"{prefix}{key}", actual, value)


def offsets_of_pairs(attn: LengthScaledAttention, x: Tensor, ratio: int) -> Tensor:
    """Of every query from every key, ``[L * S, 2]``."""
    height, width = x.shape[1:3]
    if ratio > 1:
        table = log_offsets(x, ratio, attn.reference, x)
        y, x = (cells(n, ratio, x.device).offset for n in (height, width))
    else:
        table = relative_table(x, attn.reference, x)
        y, x = (torch.arange(n)[None] - torch.arange(n)[:, None] + n - 1 for n in (height, width))
    return table[y[:, None, :, None], x[None, :, None, :]].reshape(-1, 2)
