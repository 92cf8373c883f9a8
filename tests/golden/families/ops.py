"""Bare operators through ``attend2d`` with every implementation that supports them, and the modules around them.

Maps lie in the files as ``[B, heads, H, W, D]``; ours are ``[B, H, W, heads, D]``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.golden.families import byoanet
from tests.golden.harness import GIVEN, OPS, Golden, NotYet, Pair, judge
from vitzoo.layers import ChannelAttention, OnTokens, PatternAttention, Slot
from vitzoo.models.swin import CosineAttention, Swin
from vitzoo.ops.attend2d.api import OP, attend2d
from vitzoo.ops.channel_attend.api import OP as CHANNEL_OP
from vitzoo.ops.channel_attend.api import channel_attend
from vitzoo.patterns import Pattern, Span, grid, neighborhood, window

Named = dict[str, Tensor]


def check(golden: Golden) -> list[Pair]:
    op = golden.spec["op"]
    if op not in CHECKS:
        raise NotYet(f"the op {op} is not in vitzoo yet")
    return CHECKS[op](golden)


def channels_last(x: Tensor) -> Tensor:
    """``[B, heads, H, W, ...]`` to ``[B, H, W, heads, ...]``."""
    return x.movedim(1, 3)


def run_op(
    golden: Golden, prefix: str, pattern: Pattern, bias_name: str, turn: bool, prepare: Callable[..., Any], scale: float
) -> Iterator[Pair]:
    """The op in every implementation: output, log-sum-exp where the file has it, and all gradients.

    ``turn``: the file's table is query minus key, ours key minus query. ``prepare`` makes the op's q and k from the leaves.
    """
    tensors = golden.below(prefix)
    names = ["q", "k", "v", bias_name, *(["logit_scale"] if "logit_scale" in tensors else [])]
    ran = []
    for implementation in OP.implementations:
        leaves = {name: tensors[name].clone().requires_grad_() for name in names}
        q, k = prepare(leaves)
        bias = leaves[bias_name].flip(1, 2) if turn else leaves[bias_name]
        maps = [channels_last(x).contiguous() for x in (q, k, leaves["v"])]
        if implementation.supports(OP.prepare(*maps, pattern, bias=bias, scale=scale)) is not None:
            continue
        ran.append(implementation.name)
        how = f"by {implementation.name}"
        out, lse = attend2d(*maps, pattern, bias=bias, scale=scale, return_lse=True, impl=implementation.name)
        out, lse = out.movedim(3, 1), lse.movedim(3, 1)
        yield Pair(f"{prefix}output", out, tensors["output"], how)
        if "logsumexp" in tensors:
            yield Pair(f"{prefix}logsumexp", lse, tensors["logsumexp"], how)
        (out * tensors["cotangent"]).sum().backward()
        for name in names:
            yield Pair(f"{prefix}grad/{name}", leaves[name].grad, tensors[f"grad/{name}"], how)
        with torch.no_grad():  # another path on a CPU
            out = attend2d(*maps, pattern, bias=bias, scale=scale, impl=implementation.name).movedim(3, 1)
        yield Pair(f"{prefix}output", out, tensors["output"], f"{how}, no gradients")
    needed = {"reference", "sdpa"} | ({"triton"} if os.environ.get("TRITON_INTERPRET") == "1" else set())
    assert needed <= set(ran), f"only {', '.join(ran) or 'nothing'} ran"


def dot_product(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return leaves["q"], leaves["k"]


def cosine(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Swin V2: directions only, and a learned sharpness of at most 100."""
    q, k = (torch.nn.functional.normalize(leaves[name], dim=-1) for name in ("q", "k"))
    return q * leaves["logit_scale"].clamp(max=4.605170185988092).exp()[:, None, None, None], k


def run_module(golden: Golden, module: torch.nn.Module, convert: Callable[[Named], Named]) -> Iterator[Pair]:
    """The attention module around the op, from a map to a map; ``convert`` makes published entries ours, gradients too."""
    module.load_state_dict(convert(golden.below("state/")), strict=True)
    x = golden.tensors["input"].clone().requires_grad_()
    out = module(x)
    yield Pair("output", out, golden.tensors["output"], "of the module")
    (out * golden.tensors["cotangent"]).sum().backward()
    yield Pair("grad/input", x.grad, golden.tensors["grad/input"])
    own = dict(module.named_parameters())
    for key, value in golden.below("grad/").items():
        if key != "input":
            ((name, expected),) = convert({key: value}).items()
            yield Pair(f"grad/{key}", own[name].grad, expected)


# -- Swin -------------------------------------------------------------------------------------------------------------

WHERE = ("layers.0.blocks.0.attn.", "stages.0.blocks.0.attn.")  # of any window attention, published and ours


def window_state(published: Named) -> Named:
    """A published attention module's entries as ours, through the conversion of whole models."""
    renamed = Swin.from_published({WHERE[0] + key: value for key, value in published.items()}, Swin.Config())
    return {key.removeprefix(WHERE[1]): value for key, value in renamed.items()}


def swin_window(golden: Golden) -> list[Pair]:
    spec = golden.spec
    size, heads = spec["window_size"], spec["num_heads"]
    pattern = window(size, shift=spec["shift"])
    cosines = spec["op"].endswith("v2")
    dim = heads * spec["head_dim"]
    if cosines:
        reference = spec["pretrained_window_size"] or size
        module = CosineAttention(dim, heads, pattern, reference=(reference, reference))
    else:
        module = PatternAttention(dim, heads, pattern)

    def pairs() -> Iterator[Pair]:
        scale = 1.0 if cosines else spec["scale"]
        yield from run_op(golden, "op/", pattern, "bias_table", True, cosine if cosines else dot_product, scale)
        yield from run_module(golden, module, window_state)
        if "attn_mask" in golden.tensors:
            yield Pair("attn_mask", mask_of(pattern, spec["map"], size), golden.tensors["attn_mask"])

    given = (*GIVEN, *(f"op/{name}" for name in ("q", "k", "v", "bias_table", "logit_scale", "cotangent")))
    return judge(golden, pairs(), OPS, given)


def mask_of(pattern: Pattern, size: tuple[int, int], w: int) -> Tensor:
    """Swin's mask of rolled windows, said by our pattern: -100 between tokens of a window that do not see each other."""
    s = pattern.rows.shift
    rows, cols = (
        torch.tensor([[j in span.keys(i, n) for j in range(n)] for i in range(n)])
        for span, n in zip((pattern.rows, pattern.cols), size, strict=True)
    )
    sees = (rows[:, None, :, None] & cols[None, :, None, :]).roll((-s,) * 4, (0, 1, 2, 3))
    ny, nx = size[0] // w, size[1] // w
    blocks = sees.view(ny, w, nx, w, ny, w, nx, w)
    within = torch.stack([blocks[y, :, x, :, y, :, x, :] for y in range(ny) for x in range(nx)])
    return torch.where(within.reshape(ny * nx, w * w, w * w), 0.0, -100.0)


# -- MaxViT -----------------------------------------------------------------------------------------------------------


def maxvit(golden: Golden) -> list[Pair]:
    spec = golden.spec
    size, heads = tuple(spec["partition_size"]), spec["num_heads"]
    pattern = window(size) if "block" in spec["op"] else grid(size)
    names = {"rel_pos.relative_position_bias_table": "rel_bias"}  # key minus query already

    def pairs() -> Iterator[Pair]:
        yield from run_op(golden, "op/", pattern, "bias_table", False, dot_product, spec["scale"])
        module = PatternAttention(heads * spec["head_dim"], heads, pattern)
        yield from run_module(golden, module, lambda named: {names.get(key, key): value for key, value in named.items()})

    given = (*GIVEN, *(f"op/{name}" for name in ("q", "k", "v", "bias_table", "cotangent")))
    return judge(golden, pairs(), OPS, given)


# -- neighborhoods ----------------------------------------------------------------------------------------------------


def neighborhood_attention(golden: Golden) -> list[Pair]:
    spec = golden.spec
    kernel, dilation = tuple(spec["kernel_size"]), tuple(spec["dilation"])
    pattern = neighborhood(kernel, dilation=dilation)

    def pairs() -> Iterator[Pair]:
        yield from run_op(golden, "", pattern, "rpb", False, dot_product, spec["scale"])
        for axis, span, n in zip(("row", "col"), (pattern.rows, pattern.cols), golden.tensors["q"].shape[2:4], strict=True):
            keys = torch.tensor([list(span.keys(i, n)) for i in range(n)])
            yield Pair(f"{axis}_index", keys, golden.tensors[f"{axis}_index"])
            yield Pair(f"rpb_{axis}", bias_index(span, keys), golden.tensors[f"rpb_{axis}"])

    given = ("q", "k", "v", "rpb", "cotangent")
    # logits lie inside the op: the log-sum-exp pins their sum, the gradient of q their differences
    return judge(golden, pairs(), OPS, given, excused=("logits",))


def bias_index(span: Span, keys: Tensor) -> Tensor:
    """Rows of the bias table that a query's keys read: key minus query, in steps, counted from the smallest."""
    queries = torch.arange(len(keys))[:, None]
    return (keys - queries) // span.step + span.reach()


# -- channels ---------------------------------------------------------------------------------------------------------


def davit(golden: Golden) -> list[Pair]:
    """Channel attention; whole models of the family are timm's."""
    if not golden.published_class.startswith("ChannelAttention"):
        raise NotYet(f"{golden.published_class} is timm's, with the same keys and numbers")
    excused = ("grad/mid/attention",)  # inside the op: the gradients of q, k and v pin it
    return judge(golden, channel_attention(golden), OPS, GIVEN, excused)


def channel_attention(golden: Golden) -> Iterator[Pair]:
    """The module, and in every implementation the op on what goes into it. Attention on one-hot values is its matrix."""
    expected, heads = golden.tensors, golden.kwargs["num_heads"]
    tokens, dim = expected["input"].shape[1:]
    version = 2 if golden.published_class.endswith("V2") else 1
    module = OnTokens(ChannelAttention(Slot(dim, heads, (1, tokens)), version=version), 0)

    class Row(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.on_tokens = module

        def forward(self, x: Tensor) -> Tensor:
            return self.on_tokens(x, 1, tokens)

    whole = Golden(golden.spec, {name: value for name, value in expected.items() if "mid/" not in name})
    yield from run_module(whole, Row(), lambda named: {f"on_tokens.mixer.{key}": value for key, value in named.items()})
    attention = module.mixer
    depth = dim // heads
    scale = depth**-0.5 if version == 1 else tokens**-0.5
    with torch.no_grad():
        q, k, v = attention.qkv(expected["input"]).unflatten(-1, (3, heads, depth)).unbind(2)
    one_hot = torch.eye(depth)[None, :, None].expand(len(q), depth, heads, depth)
    for implementation in CHANNEL_OP.implementations:
        if implementation.supports(CHANNEL_OP.prepare(q, k, v, scale=scale)) is not None:
            continue
        name = implementation.name
        if version == 2:
            matrix = channel_attend(q, k, one_hot, scale=scale, impl=name)
            yield Pair("mid/attn", matrix.permute(0, 2, 3, 1), expected["mid/attn"], f"by {name}")
            continue
        matrix = channel_attend(k, v, one_hot, scale=scale, impl=name)
        yield Pair("mid/attention", matrix.permute(0, 2, 3, 1), expected["mid/attention"], f"by {name}")
        leaves = {key: expected[f"mid/{key}"].clone().requires_grad_() for key in ("q", "k_scaled", "v")}
        for key, value in (("q", q), ("k_scaled", k * scale), ("v", v)):
            yield Pair(f"mid/{key}", value.transpose(1, 2), expected[f"mid/{key}"])
        out = channel_attend(*(leaves[key].transpose(1, 2) for key in ("k_scaled", "v", "q")), scale=1.0, impl=name)
        total = (attention.proj(out.flatten(2)) * expected["cotangent"]).sum()
        for key, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
            yield Pair(f"grad/mid/{key}", gradient, expected[f"grad/mid/{key}"], f"by {name}")


CHECKS: dict[str, Callable[[Golden], list[Pair]]] = {
    "swin_window_attention_v1": swin_window,
    "swin_window_attention_v2": swin_window,
    "maxvit_block_attention": maxvit,
    "maxvit_grid_attention": maxvit,
    "neighborhood_attention_2d": neighborhood_attention,
    **dict.fromkeys(byoanet.LAYERS, byoanet.layer),
}
