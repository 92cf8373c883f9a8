"""Calls of match, merge_tokens and unmerge_tokens for the interpreter: one token, ragged tiles, ties, many into one.

As a program, with TRITON_INTERPRET=1, it answers all of them with one line of JSON: the largest error of every result against
fp64, relative to the largest value where that exceeds 1.
"""

from __future__ import annotations

import json
import os
from typing import NamedTuple

import torch
from torch import Tensor


class Match(NamedTuple):
    A: int
    S: int
    D: int = 16
    B: int = 2
    dtype: torch.dtype = torch.float32
    strided: bool = False
    whole: bool = False  # small integers: many products are equal, and all are exact


class Merge(NamedTuple):
    N: int
    r: int
    C: int = 24
    B: int = 2
    dtype: torch.dtype = torch.float32
    into_one: bool = False


MATCHES = {
    "one token, one partner": Match(1, 1, D=8),
    "ragged tiles, every second token": Match(37, 70, D=24, strided=True),
    "rows longer than a step": Match(20, 33, D=130, B=1),
    "ties": Match(40, 90, D=3, whole=True),
    "half precision": Match(33, 18, D=32, dtype=torch.float16),
}
MERGES = {
    "one of three": Merge(3, 1, C=300),
    "half of the tokens": Merge(40, 19, B=3),
    "all into one": Merge(37, 18, C=7, into_one=True),
    "half precision": Merge(21, 6, C=64, dtype=torch.float16),
}


def match_inputs(case: Match, device: str = "cpu") -> tuple[Tensor, Tensor]:
    step = 2 if case.strided else 1
    a, b = (torch.randn(case.B, n * step, case.D, device=device)[:, ::step].to(case.dtype) for n in (case.A, case.S))
    return (a.round(), b.round()) if case.whole else (a, b)


def measure_match(case: Match, device: str = "cpu") -> dict[str, float]:
    """How far best is off, and how much less than the best those are which the kernel found."""
    from vitzoo.ops.match import triton

    a, b = match_inputs(case, device)
    best, index = triton.forward(a, b)
    products = torch.einsum("bid,bjd->bij", a.double(), b.double())
    exact = products.amax(-1)
    scale = exact.abs().max().clamp(min=1)
    found = products.gather(-1, index[..., None])[..., 0]
    errors = {"best": ((best.double() - exact).abs().max() / scale).item(), "index": ((exact - found).max() / scale).item()}
    if case.whole:
        errors["first"] = float((index != products.argmax(-1)).sum())
    return errors


def merge_inputs(case: Merge, device: str = "cpu") -> tuple[Tensor, ...]:
    """x, kept, moved, into, share."""
    order = torch.rand(case.B, case.N, device=device).argsort(1)
    moved, kept = order[:, : case.r], order[:, case.r :].sort(1).values
    into = torch.randint(0, 1 if case.into_one else kept.shape[1], moved.shape, device=device)
    x = torch.randn(case.B, case.N, 2 * case.C, device=device)[..., case.C :].to(case.dtype)
    return x, kept, moved, into, torch.rand(moved.shape, device=device) / case.r


def measure_merge(case: Merge, device: str = "cpu") -> dict[str, float]:
    """Merging, its gradient, unmerging with a token that nothing stands for, and its gradient."""
    from vitzoo.ops import merge_tokens, unmerge_tokens
    from vitzoo.tokens import TokenMap

    x, kept, moved, into, share = merge_inputs(case, device)
    source = TokenMap(kept, moved, into, case.N).source
    source[:, 1] = -1
    results = {}
    for impl, dtype in (("triton", x.dtype), ("reference", torch.float64)):
        before = x.detach().to(dtype).requires_grad_()
        after = merge_tokens(before, kept, moved, into, share, impl=impl)
        weights = torch.arange(after.numel(), device=device).view_as(after).cos().to(dtype)
        (dx,) = torch.autograd.grad(after, before, weights)
        short = x[:, : kept.shape[1]].detach().to(dtype).requires_grad_()
        back = unmerge_tokens(short, source, impl=impl)
        (dy,) = torch.autograd.grad(back, short, torch.arange(back.numel(), device=device).view_as(back).sin().to(dtype))
        results[impl] = {"y": after, "dx": dx, "x": back, "dy": dy}
    return {
        name: ((results["triton"][name].double() - value).abs().max() / value.abs().max().clamp(min=1)).item()
        for name, value in results["reference"].items()
    }


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    answers = {f"match {name}": measure_match(case) for name, case in MATCHES.items()}
    print(json.dumps(answers | {f"merge {name}": measure_merge(case) for name, case in MERGES.items()}))
