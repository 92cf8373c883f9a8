"""Every kernel at its real tiles for three generations of GPUs, compiled here: registers, spills, shared memory."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import version

import pytest
import torch

from vitzoo.patterns import halo, neighborhood, window

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"),
]

STACK = 64  # bytes a thread may spill, as Triton 3.8 compiles; earlier ones allocate registers worse on sm_100:
OLDER = 8  # there it may be so many times as much
SHARED = 99 << 10  # bytes a block may have on sm_86 and sm_89, the smallest of the generations that run these binaries

# name: pattern, map, heads, head dimension, dtype, bias, bytes a thread may spill
CASES = {
    "window 7": (window(7, shift=3), (56, 56), 3, 32, torch.bfloat16, True, STACK),
    "neighborhood 7": (neighborhood(7), (56, 56), 3, 32, torch.bfloat16, True, STACK),
    "neighborhood 7, d 24, no bias": (neighborhood(7), (56, 56), 3, 24, torch.float16, False, 16),
    "window 12": (window(12), (48, 48), 4, 32, torch.bfloat16, True, 2 * STACK),
    "halo 8+3, d 64, no bias": (halo(8, 3), (56, 56), 4, 64, torch.bfloat16, False, STACK),
    "neighborhood 13, d 256": (neighborhood(13), (28, 28), 2, 256, torch.bfloat16, True, STACK),
    # three products for each: fp32 spills in the table's gradient, and still stays on tensor cores
    "neighborhood 7, fp32": (neighborhood(7), (56, 56), 3, 32, torch.float32, True, 512),
}


# name: queries, keys, heads, head dimension, dtype, bias of pairs, bias of keys, bytes a thread may spill
ATTEND = {
    "197 tokens, sizes": (197, 197, 6, 64, torch.bfloat16, False, True, STACK),
    "49 agents of 3136 keys": (49, 3136, 3, 32, torch.bfloat16, True, False, STACK),
    "d 256": (196, 196, 2, 256, torch.float16, False, False, STACK),
    "fp32": (196, 49, 4, 32, torch.float32, True, True, 2 * STACK),  # three products for each, as above
}


# name: map, points, table, heads, groups, head dimension, dtype, bytes a thread may spill
AT_POINTS = {
    "49 points of 56 x 56, a table": ((56, 56), 49, (111, 111), 2, 1, 32, torch.bfloat16, 0),
    "196 points, d 64, fp32": ((14, 14), 196, (27, 27), 4, 2, 64, torch.float32, STACK),
}


# name: map, points, groups, channels of a group, dtype, bytes a thread may spill
SAMPLE2D = {
    "49 points of 56 x 56": ((56, 56), 49, 1, 64, torch.bfloat16, 0),
    "196 points, d 24, fp32": ((14, 14), 196, 16, 24, torch.float32, 0),
}


# name: map of 7 x 7 regions, of which each sees so many; heads, head dimension, dtype, bytes a thread may spill
ROUTED = {
    "4 of 49 regions of 4 x 4": ((28, 28), 4, 4, 32, torch.bfloat16, 0),
    "1 of 49 regions of 8 x 8, fp32": ((56, 56), 1, 3, 24, torch.float32, STACK),
}


ONCE = (
    "1 of 49 regions of 8 x 8, fp32",
    "neighborhood 13, d 256",
    "neighborhood 7, fp32",
    "196 points, d 64, fp32",
    "196 points, d 24, fp32",
)  # as good as alike on all generations, and slow to compile


@pytest.mark.parametrize(
    ("name", "arch"), [(name, arch) for name in CASES for arch in (80, 90, 100) if arch == 80 or name not in ONCE]
)
def test_kernels_compile_within_registers_and_shared_memory(monkeypatch, name, arch):
    from tests.ops.triton.compiled import recorded, run_attend2d

    *call, stack = CASES[name]
    launches = recorded(monkeypatch, arch, lambda: run_attend2d(*call))
    if name != "neighborhood 7":
        launches = [
            one for one in launches if one.kernel.__name__ not in ("widen_table", "sum_partials")
        ]  # the same everywhere
    check(launches, arch, name, stack)


@pytest.mark.parametrize(("name", "arch"), [(name, arch) for name in ATTEND for arch in (80, 90, 100)])
def test_attends_kernels_compile_within_registers_and_shared_memory(monkeypatch, name, arch):
    from tests.ops.triton.compiled import recorded, run_attend

    *call, stack = ATTEND[name]
    check(recorded(monkeypatch, arch, lambda: run_attend(*call)), arch, name, stack)


@pytest.mark.parametrize(
    ("name", "arch"), [(name, arch) for name in AT_POINTS for arch in (80, 90, 100) if arch == 80 or name not in ONCE]
)
def test_kernels_of_attend_at_points_compile_within_registers_and_shared_memory(monkeypatch, name, arch):
    from tests.ops.triton.compiled import recorded, run_attend_at_points

    *call, stack = AT_POINTS[name]
    check(recorded(monkeypatch, arch, lambda: run_attend_at_points(*call)), arch, name, stack)


@pytest.mark.parametrize(
    ("name", "arch"), [(name, arch) for name in SAMPLE2D for arch in (80, 90, 100) if arch == 80 or name not in ONCE]
)
def test_sample2ds_kernels_compile_within_registers_and_shared_memory(monkeypatch, name, arch):
    from tests.ops.triton.compiled import recorded, run_sample2d

    *call, stack = SAMPLE2D[name]
    check(recorded(monkeypatch, arch, lambda: run_sample2d(*call)), arch, name, stack)


@pytest.mark.parametrize(
    ("name", "arch"), [(name, arch) for name in ROUTED for arch in (80, 90, 100) if arch == 80 or name not in ONCE]
)
def test_attend_routeds_kernels_compile_within_registers_and_shared_memory(monkeypatch, name, arch):
    from tests.ops.triton.compiled import recorded, run_attend_routed

    *call, stack = ROUTED[name]
    check(recorded(monkeypatch, arch, lambda: run_attend_routed(*call)), arch, name, stack)


def check(launches, arch, name, stack):
    from tests.ops.triton.compiled import compile_launch

    if tuple(map(int, version("triton").split(".")[:2])) < (3, 8):
        stack *= OLDER
    too_much = []
    for one in launches:
        usage = compile_launch(one, arch)
        print(f"sm_{arch} {name:30s} {one.kernel.__name__:20s} {usage}")
        if usage.stack > stack or usage.shared > SHARED:
            too_much.append((one.kernel.__name__, usage))
    assert not too_much, f"more than {stack} bytes of stack or {SHARED} of shared memory"


def test_a_new_resolution_or_dilation_compiles_nothing(monkeypatch):
    """Integers of the map are plain arguments: neither their value nor whether 16 divides it makes another kernel."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    from tests.ops.triton.compiled import recorded, run_attend2d

    def keys(pattern, size):
        backend, result = type(make_backend(GPUTarget("cuda", 90, 32))), []
        for kernel, arguments, options in recorded(monkeypatch, 90, lambda: run_attend2d(pattern, size, 3, 32)):
            key = [kernel.__name__, sorted(options.items())]
            for p in kernel.params:
                value = arguments[p.name]
                if p.is_constexpr:
                    key.append((p.name, value))
                elif isinstance(value, int | float):
                    flags = not p.do_not_specialize, not p.do_not_specialize_on_alignment
                    key.append((p.name, native_specialize_impl(backend, value, False, *flags)))
            result.append(key)
        return result

    large = keys(neighborhood(7, dilation=2), (64, 48))
    assert keys(neighborhood(7, dilation=3), (67, 51)) == large
    assert keys(window(7, shift=3), (56, 56)) == keys(window(7, shift=2), (64, 80))
