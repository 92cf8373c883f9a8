"""Captured graphs: registration, torch.compile, torch.export and ONNX, one graph for all sizes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch.export import Dim

from vitzoo.ops import attend, attend2d, channel_attend, linear_attend
from vitzoo.patterns import Pattern, dilated_window, everywhere, grid, halo, neighborhood, stripe, window

torch.fx.wrap("attend2d")


def op_inputs(bias_shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return (*torch.randn(3, 2, 5, 6, 2, 4).unbind(), torch.randn(bias_shape))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_attend2d_is_registered_as_opcheck_wants_it(bias):
    q, k, v, table = op_inputs((2, 5, 5))
    leaves = [t.requires_grad_() for t in (q.clone(), k.clone(), v.clone())] + [table.requires_grad_() if bias else None]
    ints = window(3, shift=1).to_ints()
    torch.library.opcheck(torch.ops.vitzoo.attend2d.default, (*leaves, ints, 0.5))
    out, lse = torch.ops.vitzoo.attend2d(*leaves, ints, 0.5)
    saved = [None if t is None else t.detach() for t in (*leaves, out, lse)]
    for dout, dlse in ((saved[4], saved[5]), (saved[4], None), (None, saved[5])):
        torch.library.opcheck(torch.ops.vitzoo.attend2d_backward.default, (dout, dlse, *saved, ints, 0.5))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_attend_is_registered_as_opcheck_wants_it(bias):
    q = torch.randn(2, 3, 2, 4, requires_grad=True)
    k, v = (torch.randn(2, 5, 2, 4, requires_grad=True) for _ in range(2))
    added = [torch.randn(2, 1, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)] if bias else [None, None]
    torch.library.opcheck(torch.ops.vitzoo.attend.default, (q, k, v, *added, 0.5))
    out, lse = torch.ops.vitzoo.attend(q, k, v, *added, 0.5)
    saved = [None if t is None else t.detach() for t in (q, k, v, *added, out, lse)]
    for dout, dlse in ((saved[5], saved[6]), (saved[5], None), (None, saved[6])):
        torch.library.opcheck(torch.ops.vitzoo.attend_backward.default, (dout, dlse, *saved, 0.5))


@pytest.mark.parametrize(
    ("op", "shapes", "option"),
    [
        (linear_attend, ((2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 3)), {"eps": 0.1}),
        (channel_attend, ((2, 3, 2, 4), (2, 3, 2, 5), (2, 6, 2, 5)), {"scale": 0.7}),
    ],
)
def test_attention_by_products_is_registered_as_opcheck_wants_it_and_is_what_is_defined(op, shapes, option):
    forward, backward = (getattr(torch.ops.vitzoo, name).default for name in (op.__name__, f"{op.__name__}_backward"))
    (number,) = option.values()
    leaves = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    torch.library.opcheck(forward, (*leaves, number))
    out, *saved = forward(*leaves, number)
    torch.testing.assert_close(out, op(*leaves, **option, impl="reference"))
    assert torch.autograd.gradcheck(lambda *tensors: forward(*tensors, number)[0], leaves)
    more = [out, *saved] if op is linear_attend else [*saved, number]
    arguments = [t.detach() if isinstance(t, Tensor) else t for t in (torch.rand_like(out), *leaves, *more)]
    torch.library.opcheck(backward, tuple(arguments))


class Mixer(nn.Module):
    """Patches of 4 x 4 pixels, padded to a size that the pattern takes, one attention."""

    def __init__(self, pattern: Pattern, multiple: int = 1, least: int = 1) -> None:
        super().__init__()
        self.pattern, self.multiple, self.least = pattern, multiple, least
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        sized = pattern.rows.size is not None and pattern.cols.size is not None
        shape = (2, 2 * pattern.rows.reach() + 1, 2 * pattern.cols.reach() + 1) if sized else (0,)
        self.table = nn.Parameter(torch.randn(shape)) if sized else None

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).permute(0, 2, 3, 1).contiguous()
        H, W = x.shape[1:3]
        padded = [(n + self.multiple - 1) // self.multiple * self.multiple for n in (H, W)]
        if self.least > 1:
            padded = [torch.sym_max(n, self.least) for n in padded]
        x = nn.functional.pad(x, (0, 0, 0, padded[1] - W, 0, padded[0] - H))
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(3)
        x = attend2d(q, k, v, self.pattern, bias=self.table)
        return self.proj(x.flatten(-2))


MIXERS = {
    "window": lambda: Mixer(window(4, shift=1), 4),
    "window, covered": lambda: Mixer(window(7, shift=3, edge="cover"), 7),
    "grid": lambda: Mixer(grid(3), 3),
    "long distance": lambda: Mixer(dilated_window(2, interval=3)),
    "stripe": lambda: Mixer(stripe(rows=2)),
    "stripe on a padded map": lambda: Mixer(stripe(cols=3), 3),
    "everywhere": lambda: Mixer(everywhere),
    "halo": lambda: Mixer(halo(4, 1)),
    "neighborhood": lambda: Mixer(neighborhood(5), 1, 5),
    "dilated neighborhood": lambda: Mixer(neighborhood(3, dilation=2), 1, 6),
}
SIZES = ((2, 3, 54, 70), (1, 3, 33, 120), (3, 3, 28, 28), (2, 3, 64, 37))


@pytest.mark.parametrize("name", MIXERS)
def test_one_exported_program_serves_all_sizes(name):
    model = MIXERS[name]().eval()
    sizes = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=9, max=2048), 3: Dim("width", min=9, max=2048)}
    program = torch.export.export(model, (torch.randn(SIZES[0]),), dynamic_shapes=(sizes,)).module()
    for size in SIZES:
        image = torch.randn(size)
        torch.testing.assert_close(program(image), model(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["window", "everywhere"])
def test_one_compiled_graph_serves_all_sizes_forward_and_backward(name):
    torch._dynamo.reset()
    model = MIXERS[name]()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    for size in SIZES[0], SIZES[3]:
        image = torch.randn(size)
        expected = torch.autograd.grad(model(image).square().sum(), model.parameters())
        got = torch.autograd.grad(compiled(image).square().sum(), model.parameters())
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert graphs.frame_count == 1


def test_the_registered_op_is_one_node_of_a_compiled_graph():
    torch._dynamo.reset()
    ints = neighborhood(3).to_ints()
    q, k, v, table = op_inputs((2, 5, 5))
    graphs = EagerAndRecordGraphs()

    def loss(q, k, v, table):
        return torch.ops.vitzoo.attend2d(q, k, v, table, ints, 0.5)[0].square().sum()

    for t in (q, k, v, table):
        t.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    torch.testing.assert_close(compiled(q, k, v, table), loss(q, k, v, table))
    targets = [node.target for node in graphs.graphs[0].graph.nodes]
    assert targets.count(torch.ops.vitzoo.attend2d.default) + targets.count(torch.ops.vitzoo.attend2d) == 1
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        *(torch.autograd.grad(f(q, k, v, table), (q, k, v, table)) for f in (compiled, loss)), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_attend_compiles_for_all_lengths():
    torch._dynamo.reset()

    def run(q, k, v, bias):
        out, lse = attend(q, k, v, bias=bias, return_lse=True)
        return out + attend(q, k, v, key_bias=lse[:, 0, :1].expand(k.shape[:2])), lse

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    for L, S in ((5, 7), (4, 9)):
        q, k, v = torch.randn(2, L, 3, 8), torch.randn(2, S, 3, 8), torch.randn(2, S, 3, 8)
        bias = torch.randn(3, L, S)
        torch.testing.assert_close(compiled(q, k, v, bias), run(q, k, v, bias))


def test_fx_keeps_attend2d_as_one_node_that_runs_at_other_sizes():
    model = nn.Sequential(Split(), Attend(window(4, shift=1)))
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes].count(attend2d) == 1
    for size in ((1, 8, 8, 48), (2, 5, 11, 48)):
        x = torch.randn(size)
        torch.testing.assert_close(traced(x), model(x))
    for same in (copy.deepcopy(traced), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(same(x), model(x))


class Split(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (3, 2, 8))


class Attend(nn.Module):
    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern

    def forward(self, qkv: Tensor) -> Tensor:
        return attend2d(qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :], self.pattern)


@pytest.mark.parametrize("name", ["window, covered", "dilated neighborhood"])
def test_onnx_runs_at_other_sizes(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = MIXERS[name]().eval()
    sizes = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=9, max=2048), 3: Dim("width", min=9, max=2048)}
    program = torch.onnx.export(model, (torch.randn(SIZES[0]),), dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    program.save(tmp_path / "mixer.onnx")
    session = runtime.InferenceSession(tmp_path / "mixer.onnx")
    for size in SIZES:
        image = torch.randn(size)
        got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0])
        torch.testing.assert_close(got, model(image), rtol=1e-4, atol=1e-5)
