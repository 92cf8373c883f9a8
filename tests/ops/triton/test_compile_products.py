"""The kernels of linear_attend and channel_attend at their real tiles for three generations of GPUs, see `test_compile`."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from tests.ops.triton.test_compile import STACK, check

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"),
]

# name: op, tokens, heads, head dimension, dtype, bytes a thread may spill
CASES = {
    "linear": ("linear_attend", 3136, 3, 32, torch.bfloat16, 0),
    "channel": ("channel_attend", 3136, 3, 32, torch.bfloat16, 0),
    # three products for each, in blocks: as good as alike on all generations, and slow to compile
    "channel, d 96, fp32": ("channel_attend", 784, 4, 96, torch.float32, STACK),
}


@pytest.mark.parametrize(
    ("name", "arch"), [(name, arch) for name, case in CASES.items() for arch in (80, 90, 100) if arch == 80 or case[3] == 32]
)
def test_kernels_compile_within_registers_and_shared_memory(monkeypatch, name, arch):
    from tests.ops.triton import compiled

    op, *call, stack = CASES[name]
    launches = compiled.recorded(monkeypatch, arch, lambda: getattr(compiled, f"run_{op}")(*call))
    if name == "channel":  # passes over tokens are linear_attend's
        launches = [one for one in launches if one.kernel.__name__.startswith("channel")]
    assert launches
    check(launches, arch, name, stack)
