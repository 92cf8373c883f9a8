"""CrossFormer, ++ and the dense backbone, and a bare block, from the arguments of the published classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.golden.harness import GIVEN, MODELS, OPS, Golden, Pair, compare_model, judge, renamed
from vitzoo.models.crossformer import CrossFormer

ARGUMENTS = {
    **{name: name for name in ("num_classes", "embed_dim", "depths", "num_heads", "group_size", "mlp_ratio", "img_size")},
    **{"patch_size": "patch_sizes", "merge_size": "merge_sizes", "crs_interval": "interval", "use_acl": "acl"},
}


def check(golden: Golden) -> list[Pair]:
    if golden.published_class == "CrossFormerBlock":
        return judge(golden, compare_block(golden), OPS, GIVEN, (*INSIDE, *no_gradient(golden)))
    model = CrossFormer(**renamed(golden.kwargs, ARGUMENTS))
    if "state/norm.weight" not in golden.tensors:  # the dense backbone, whose output is its last map
        model.prune_intermediate_layers(len(model.stages), prune_norm=True)
        model.reset_classifier(0, "")
    # a constant of all keys of a softmax, or behind a ReLU that is never positive: what is left of these is rounding
    dead = [f"grad/{name}" for name in golden.spec["dead_parameters"] if f"grad/{name}" in golden.tensors]
    assert all(golden.tensors[name].abs().max() < 1e-6 for name in dead)
    rest = Golden(golden.spec, {name: value for name, value in golden.tensors.items() if name not in dead})
    return judge(rest, compare_model(rest, model), MODELS, GIVEN)


# inside the op, which cuts no groups out and has no mask: output and gradients pin them
INSIDE = tuple(f"mid/{name}" for name in ("attn", "groups", "groups_out", "k", "mask", "q_scaled", "rel_bias", "v"))
INSIDE += ("mid/relative_position_index", "grad/mid/k", "grad/mid/q_scaled", "grad/mid/rel_bias", "grad/mid/v")


def no_gradient(golden: Golden) -> list[str]:
    """What adds a constant to all keys of a softmax: the last bias, and one before a ReLU that is always positive."""
    names = ("grad/attn.pos.pos3.2.bias", "grad/attn.pos.pos3.0.bias")
    return [name for name in names if golden.tensors[name].abs().max() < 1e-4]


def compare_block(golden: Golden) -> Iterator[Pair]:
    """A block alone, as the first or the second of a model, and the bias table that it computes."""
    kwargs = golden.kwargs
    model = CrossFormer(
        **{"embed_dim": kwargs["dim"], "depths": (2,), "num_heads": (kwargs["num_heads"],), "mlp_ratio": kwargs["mlp_ratio"]},
        **{"group_size": (kwargs["group_size"],), "interval": (kwargs["interval"],), "merge_sizes": ((2,),)},
    )
    where = f"stages.0.blocks.{kwargs['lsda_flag']}"
    block = model.get_submodule(where).eval()
    block.load_state_dict(golden.below("state/"), strict=True)
    tables: list[Tensor] = []

    def see(module: object, args: object, table: Tensor) -> None:
        table.retain_grad()
        tables.append(table)

    handle = block.attn.pos.register_forward_hook(see)
    x = golden.tensors["input"].unflatten(1, kwargs["input_resolution"]).requires_grad_()
    out = block(x).flatten(1, 2)
    (out * golden.tensors["cotangent"]).sum().backward()
    handle.remove()
    yield Pair("output", out, golden.tensors["output"])
    for name, table in (("mid/bias_table", tables[0]), ("grad/mid/bias_table", tables[0].grad)):
        yield Pair(name, table.flip(0, 1).flatten(0, 1), golden.tensors[name])  # theirs is query minus key
    yield Pair("grad/input", x.grad.flatten(1, 2), golden.tensors["grad/input"])
    rounding = no_gradient(golden)
    for name, p in block.named_parameters():
        if f"grad/{name}" in rounding:
            assert p.grad.abs().max() < 1e-4
        else:
            yield Pair(f"grad/{name}", p.grad, golden.tensors[f"grad/{name}"])
    with torch.inference_mode():
        yield Pair("output", block(x.detach()).flatten(1, 2), golden.tensors["output"], "(inference)")
