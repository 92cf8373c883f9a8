"""Calls of attend2d: every pattern on awkward maps for a GPU, and for the interpreter as many as it can run in a minute."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tests.ops.triton import oracle
from vitzoo.patterns import (
    Pattern,
    Span,
    axial,
    dilated_window,
    everywhere,
    grid,
    halo,
    neighborhood,
    stripe,
    window,
)

MAPS = [
    (window(7), (14, 14)),
    (window(7, shift=3), (13, 17)),
    (window((8, 4), shift=(4, 1)), (19, 23)),
    (window(7, shift=3, edge="cover"), (6, 15)),
    (window(3, shift=1, edge="cover"), (1, 1)),
    (window(12, shift=6), (25, 31)),
    (window(16), (32, 17)),
    (grid(7), (14, 21)),
    (dilated_window(4, interval=5), (23, 18)),
    (stripe(rows=2), (9, 37)),
    (stripe(cols=7), (21, 20)),
    (axial("row"), (3, 130)),
    (everywhere, (14, 13)),
    (halo(8, 3), (21, 26)),
    (halo(4, 1), (13, 17)),
    (neighborhood(3), (13, 17)),
    (neighborhood(7), (7, 7)),
    (neighborhood(7), (29, 23)),
    (neighborhood(13), (27, 33)),
    (neighborhood(7, dilation=3), (22, 27)),
    (neighborhood(5, stride=2), (17, 22)),
    (neighborhood((3, 9), dilation=(4, 1), stride=(2, 3)), (19, 21)),
    (Pattern(Span(5, 2, 3, 1), Span(None, 2)), (18, 19)),
]
"""The full matrix, for a GPU."""


class Case(NamedTuple):
    pattern: Pattern
    size: tuple[int, int]
    D: int = 16
    N: int = 2
    B: int = 1
    bias: bool = True
    dlse: bool = True
    dtype: torch.dtype = torch.float32
    packed: bool = True
    settings: dict[str, int] = {}


CASES = {
    "window": Case(window(3), (7, 8), D=24, N=3),
    "shifted window, two images": Case(window(4, shift=1), (6, 7), B=2),
    "rectangular window, half precision": Case(window((3, 5), shift=(1, 2)), (5, 11), dtype=torch.float16),
    "shifted windows cut at the borders": Case(window(4, shift=2), (6, 7), N=1, settings={"JOIN_FROM": 100}),
    "shifted windows joined across the borders": Case(window(7, shift=3), (14, 13), N=1, settings={"JOIN_FROM": 1}),
    "several small windows to a tile": Case(window(2, shift=1), (5, 7), D=24, N=3, B=2),
    "several narrow windows to a tile, no bias": Case(dilated_window((3, 1), interval=2), (9, 7), bias=False),
    "cover": Case(window(7, shift=3, edge="cover"), (6, 11)),
    "one key": Case(window(3, shift=1, edge="cover"), (1, 1), N=3),
    "grid": Case(grid((3, 2)), (6, 8), dlse=False),
    "dilated window": Case(dilated_window(3, interval=3), (10, 13), N=1),
    "stripe": Case(stripe(cols=3), (7, 8), D=40),
    "axial, longer than a tile": Case(axial("row"), (2, 70), N=1, bias=False),
    "wide window": Case(window(12, shift=5), (13, 17), N=1),
    "halo": Case(halo(4, 1), (9, 14)),
    "neighborhood on a ragged map": Case(neighborhood(3), (13, 17), D=24, N=1),
    "dilated neighborhood, q k v apart": Case(neighborhood(5, dilation=2), (11, 10), N=1, packed=False),
    "strided neighborhood, half precision": Case(neighborhood(5, stride=2), (9, 11), dtype=torch.float16),
    "any five integers": Case(Pattern(Span(4, 2, 3, 1), Span(5, 1, 3, 2)), (9, 11), bias=False, dlse=False),
    # a table of several blocks, each program with a run of tiles, partials in two passes
    "table in blocks": Case(neighborhood((5, 3)), (7, 9), N=3, settings={"TABLE_SIDE": 4, "PARTIALS": 1, "LEAST_PROGRAMS": 40}),
    "long rows": Case(everywhere, (4, 5), D=130, N=1),
}  # fmt: skip


USUAL = {"TABLE_SIDE": 64, "JOIN_FROM": 1.4, "PARTIALS": 1 << 21, "LEAST_PROGRAMS": 512}


def measure(case: Case) -> dict[str, float]:
    from vitzoo.ops.attend2d import triton
    from vitzoo.ops.attend2d.triton import choose, launch

    for name, usual in USUAL.items():
        setattr(choose if hasattr(choose, name) else launch, name, case.settings.get(name, usual))
    torch.manual_seed(0)
    (H, W), scale = case.size, 0.3
    reach_y, reach_x = case.pattern.reach(H, W)
    qkv = torch.randn(case.B, H, W, 3, case.N, case.D, dtype=case.dtype)
    q, k, v = qkv.unbind(3)
    if not case.packed:  # different strides for each: as they come from a norm, a slice and an expanded global query
        q, k = q[:, :1].expand(q.shape), k.clone(memory_format=torch.contiguous_format)
    bias = torch.randn(case.N, 2 * reach_y + 1, 2 * reach_x + 1) if case.bias else None
    dout, dlse = torch.randn(q.shape, dtype=case.dtype), torch.randn(q.shape[:4]) if case.dlse else None
    ints = case.pattern.to_ints()
    out, lse = triton.forward(q, k, v, bias, ints, scale)
    grads = triton.backward(dout, dlse, q, k, v, bias, out, lse, ints, scale)
    actual = dict(zip(("out", "lse", "dq", "dk", "dv", "dbias"), (out, lse, *grads), strict=True))
    exact = oracle.gradients(
        *(None if t is None else t.double() if isinstance(t, torch.Tensor) else t
          for t in (q, k, v, case.pattern, bias, scale, dout, dlse))
    )  # fmt: skip
    return {
        name: ((actual[name].double() - value).abs().max() / value.abs().max().clamp(min=1)).item()
        for name, value in exact.items()
    }


def spans() -> dict[str, int]:
    """How many of the positions of many spans the jit functions answer differently from `Span`."""
    from tests.ops.triton.span_answers import answers

    wrong = {"start": 0, "first": 0, "end": 0}
    for size in range(1, 8):
        for stride in range(1, size + 1):
            for shift in range(stride):
                for edge in ("truncate", "clamp"):
                    length = size + 3 * stride + shift
                    span = Span(size, 1, stride, shift, edge)
                    result = torch.zeros(3, 64, dtype=torch.int32)
                    answers[(1,)](result, length, size, stride, shift, int(edge == "clamp"))
                    for row, name in zip(result.tolist(), wrong, strict=True):
                        wrong[name] += row[:length] != [getattr(span, name)(m, length) for m in range(length)]
    return wrong
