"""A model beside itself in plain PyTorch, one of its modules computed by a formula: same weights, times interleaved.

Plain means ``nn.Linear`` where ours calls oneDNN, and blocks that write every residual and activation to memory of its own.
"""

from __future__ import annotations

import copy
import statistics
import time
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

import vitzoo
from vitzoo.layers import Block, Linear


def compare(name: str, kind: type[nn.Module], formula: Callable[..., Tensor], batch: int = 4, rounds: int = 15) -> None:
    """Check that both give the same, then print what a forward of each costs on one thread.

    Args:
        name: a listed model.
        kind: the modules whose forward ``formula(module, x)`` stands in for.
        formula: what the paper writes.
        batch: images.
        rounds: forwards of each.
    """
    torch.set_num_threads(1)
    ours = vitzoo.create_model(name).eval()
    theirs = copy.deepcopy(ours)
    for module in theirs.modules():
        if isinstance(module, kind):
            module.forward = types.MethodType(formula, module)  # type: ignore[method-assign]
        elif isinstance(module, Linear):
            module.forward = types.MethodType(nn.Linear.forward, module)  # type: ignore[method-assign]
        elif isinstance(module, Block):
            module._may_work_in_place = lambda x: False  # type: ignore[method-assign]
    x = torch.randn(batch, 3, *ours.pretrained_cfg["input_size"][1:])
    times: dict[nn.Module, list[float]] = {ours: [], theirs: []}
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
        for _ in range(rounds):
            for model, taken in times.items():
                begin = time.process_time()
                model(x)
                taken.append(time.process_time() - begin)
    ratios = [f / o for o, f in zip(times[ours], times[theirs], strict=True)]
    mine, plain = (statistics.median(t) * 1e3 for t in times.values())
    answer = f"ours {mine:.0f} ms, formula {plain:.0f} ms, formula / ours {statistics.median(ratios):.3f}"
    print(f"{name} batch {batch}: {answer}")  # noqa: T201  # what it is for
