"""Attention modules by themselves, on maps ``[B, C, H, W]``; ours take ``[B, H, W, C]``."""

from __future__ import annotations

from torch import Tensor

from tests.golden.families.ops import run_module
from tests.golden.harness import GIVEN, OPS, Golden, NotYet, Pair, judge
from vitzoo.layers import AttentiveConv, Slot


class ChannelsFirst(AttentiveConv):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def check(golden: Golden) -> list[Pair]:
    module = golden.spec["builder"].removeprefix("op:")
    if module != "atconv":
        raise NotYet(f"the module {module} is not in vitzoo yet")
    kwargs = golden.kwargs
    ours = ChannelsFirst(Slot(kwargs["dim"], 1, (14, 14)), size=kwargs["kernel_size"])
    # a linear layer here is a 1x1 convolution there
    return judge(golden, run_module(golden, ours, lambda named: {key: flat(value) for key, value in named.items()}), OPS, GIVEN)


def flat(value: Tensor) -> Tensor:
    return value.flatten(1) if value.ndim == 4 else value
