"""Graph capture: FX, torch.compile and torch.export, at sizes that the example did not have."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.export import Dim
from torch.fx import symbolic_trace

from tests.models.test_contract import assert_close, step
from tests.models.zoo import build, image

# Seconds, not minutes: a symbolic size that does not simplify makes the solver run for minutes. Generous for a slow machine.
SECONDS = 120


@pytest.fixture(scope="module")
def micro_model(micro: str) -> torch.nn.Module:
    return build(micro)


@pytest.fixture(autouse=True)
def forget_graphs():
    yield
    torch._dynamo.reset()


def test_a_traced_graph_runs_at_other_sizes(micro_model):
    traced = symbolic_trace(micro_model)
    for size in ((64, 80), (33, 47)):
        with torch.no_grad():
            assert_close(traced(image(*size)), micro_model(image(*size)))


# every kind of block once, tracing takes seconds for each
FEWER = {
    "agent_micro": {"depths": (1, 2, 1)},
    "flatten_micro": {"depths": (1, 2, 1)},
    "nat_micro": {"depths": (1, 1, 1)},
    "swin_micro": {"depths": (2, 1, 1)},
    "swinv2_micro": {"depths": (2, 1, 1)},
}


@pytest.mark.timeout(SECONDS)
def test_compiled_training_gives_the_same_gradients(micro):
    model = build(micro, **FEWER.get(micro, {})).train()
    x = image(70, 93)
    expected, grads = step(model, x)
    output, again = step(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert_close(output, expected)
    for name, gradient in again.items():
        assert_close(gradient, grads[name.removeprefix("_orig_mod.")], 1e-4)


@pytest.mark.timeout(SECONDS)
def test_infers_in_one_graph_for_all_sizes(sampled):
    model = build(sampled, **FEWER.get(sampled, {}))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((96, 128), (70, 93), (250, 330)):
            assert_close(compiled(image(*size)), model(image(*size)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ and there is no g++")
def test_inductor_compiles_a_whole_model():
    model = build("nat_micro", depths=(1, 1, 1))  # one block of a kind: the C++ compiler takes seconds for each
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(image(33, 47)), model(image(33, 47)), 1e-4)


@pytest.mark.timeout(SECONDS)
def test_exports_with_dynamic_batch_height_and_width(micro):
    model = build(micro, **FEWER.get(micro, {}))
    shapes = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=33, max=2048), 3: Dim("width", min=33, max=2048)}
    exported = torch.export.export(model, (image(270, 350),), dynamic_shapes=(shapes,), strict=False).module()
    for height, width, batch in ((270, 350, 2), (33, 47, 1), (64, 64, 3), (224, 37, 2), (97, 250, 1)):
        x = image(height, width, batch=batch)
        with torch.no_grad():
            assert_close(exported(x), model(x))
