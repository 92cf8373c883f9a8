"""Kernels compiled ahead of time, as their launches would: no GPU is needed for registers, spills and shared memory.

`recorded` runs a call on meta tensors with the launches themselves replaced; `compile_launch` does for one of them what
Triton's just-in-time path does: types, values worth a specialisation, alignment, then `triton.compile`, cached on disk.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from vitzoo.ops import PointBias
from vitzoo.ops.attend.triton import launch as attend
from vitzoo.ops.attend2d.triton import launch
from vitzoo.ops.attend_routed.triton import launch as routed
from vitzoo.ops.channel_attend.triton import launch as channel_attend
from vitzoo.ops.linear_attend.triton import launch as linear_attend
from vitzoo.ops.sample2d.triton import launch as sample2d
from vitzoo.patterns import Pattern

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}


class Launch(NamedTuple):
    kernel: triton.JITFunction
    arguments: dict[str, object]
    options: dict[str, int]


class Usage(NamedTuple):
    """Per thread: registers and bytes of stack (where spills go); per block: bytes of shared memory, warps."""

    registers: int
    stack: int
    shared: int
    warps: int


def recorded(monkeypatch, arch: int, run: Callable[[], object]) -> list[Launch]:
    """The launches of `run`, which works on meta tensors, as a GPU of capability `arch` would get them."""
    launches = []

    def record(kernel, *positional, grid, warmup, **named):
        arguments = {p.name: p.default for p in kernel.params if p.has_default}
        arguments |= dict(zip(kernel.arg_names, positional, strict=False))
        arguments |= {name: value for name, value in named.items() if name in kernel.arg_names}
        launches.append(Launch(kernel, arguments, {n: value for n, value in named.items() if n not in kernel.arg_names}))

    monkeypatch.setattr(triton.JITFunction, "run", record)
    monkeypatch.setenv("VITZOO_AUTOTUNE", "0")
    for name, module in list(sys.modules.items()):  # wherever a launch looks it up
        if name.startswith("vitzoo.ops.") and hasattr(module, "architecture"):
            monkeypatch.setattr(module, "architecture", lambda tensor: arch)
    run()
    monkeypatch.undo()
    return launches


def run_attend2d(pattern: Pattern, size, N: int, D: int, dtype=torch.bfloat16, bias=True) -> None:
    """A forward and backward of attend2d at batch 256."""
    q, k, v = torch.empty(256, *size, 3, N, D, dtype=dtype, device="meta").unbind(3)
    reach_y, reach_x = pattern.reach(*size)
    table = torch.empty(N, 2 * reach_y + 1, 2 * reach_x + 1, device="meta") if bias else None
    out, lse = launch.forward(q, k, v, pattern, table, 0.1)
    launch.backward(torch.empty_like(out), None, q, k, v, pattern, table, 0.1, out, lse)


def run_attend(L: int, S: int, N: int, D: int, dtype=torch.bfloat16, bias=True, key_bias=True) -> None:
    """A forward and backward of attend at batch 256, k and v out of one projection."""
    q = torch.empty(256, L, N, D, dtype=dtype, device="meta")
    k, v = torch.empty(256, S, 2, N, D, dtype=dtype, device="meta").unbind(2)
    pairs = torch.empty(N, L, S, device="meta") if bias else None
    keys = torch.empty(256, S, device="meta") if key_bias else None
    out, lse = attend.forward(q, k, v, pairs, keys, 0.1)
    attend.backward(torch.empty_like(out), None, q, k, v, pairs, keys, out, lse, 0.1)


def run_attend_at_points(size, S: int, side, N: int, G: int, D: int, dtype=torch.bfloat16) -> None:
    """The same with a table of `side` that is read at S points."""
    H, W = size
    q = torch.empty(256, H * W, N, D, dtype=dtype, device="meta")
    k, v = torch.empty(2, 256, S, N, D, dtype=dtype, device="meta").unbind(0)
    shapes = (N, *side), (256, S, G, 2), (H,), (W,)
    bias = PointBias(*(torch.empty(shape, device="meta") for shape in shapes))
    out, lse = attend.forward(q, k, v, bias, None, 0.1)
    attend.backward(torch.empty_like(out), None, q, k, v, bias, None, out, lse, 0.1)


def run_sample2d(size, S: int, G: int, C: int, dtype=torch.bfloat16) -> None:
    """A forward and backward of sample2d at batch 256."""
    x = torch.empty(256, *size, G, C, dtype=dtype, device="meta")
    points = torch.empty(256, S, G, 2, device="meta")
    sample2d.backward(sample2d.forward(x, points), x, points)


def run_attend_routed(size, K: int, N: int, D: int, dtype=torch.bfloat16) -> None:
    """A forward and backward of attend_routed at batch 256, 7 x 7 regions of which each sees K."""
    q, k, v = torch.empty(256, *size, 3, N, D, dtype=dtype, device="meta").unbind(3)
    graph = torch.empty(256, 49, 1, K, dtype=torch.long, device="meta")
    out, lse = routed.forward(q, k, v, graph, (7, 7), (7, 7), 0.1)
    routed.backward(torch.empty_like(out), None, q, k, v, graph, out, lse, (7, 7), (7, 7), 0.1)


def run_linear_attend(tokens: int, N: int, D: int, dtype=torch.bfloat16) -> None:
    """A forward and backward of linear_attend at batch 256."""
    q, k, v = torch.empty(256, tokens, 3, N, D, dtype=dtype, device="meta").unbind(2)
    out, *saved = linear_attend.forward(q, k, v, 1e-6)
    linear_attend.backward(torch.empty_like(out), q, k, v, out, *saved)


def run_channel_attend(tokens: int, N: int, D: int, dtype=torch.bfloat16) -> None:
    """A forward and backward of channel_attend at batch 256, q, k and v out of one projection."""
    q, k, v = torch.empty(256, tokens, 3, N, D, dtype=dtype, device="meta").unbind(2)
    out, weights = channel_attend.forward(q, k, v, 0.1)
    channel_attend.backward(torch.empty_like(out), q, k, v, weights, 0.1)


def compile_launch(one: Launch, arch: int) -> Usage:
    kernel, target = one.kernel, GPUTarget("cuda", arch, 32)
    backend = type(make_backend(target))
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, one.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            kind, key = native_specialize_impl(
                backend, value, False, not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
            )
            signature[name] = kind
            if kind == "constexpr":
                constants[name] = value
            elif key == "D":
                attributes[(i,)] = [["tt.divisibility", 16]]
    binary = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=one.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", listing))
    return Usage(int(found["REG"]), int(found["STACK"]), binary.metadata.shared, binary.metadata.num_warps)
