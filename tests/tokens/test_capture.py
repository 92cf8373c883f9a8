"""A reduced model in a captured graph, at a fixed image size and any batch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.export import Dim

import vitzoo
from tests.tokens.conftest import host, image
from tests.tokens.test_reduce import ON, reduced
from vitzoo import tokens

RAGGED = ("spa",)
"""How many tokens there are depends on the images: no graph of fixed shape holds that."""
CAPTURED = [
    *(("ours", method) for method in ON if method not in RAGGED),
    ("dinov2 with registers", "tome"),
    ("clip", "evit"),
    ("eva02", "tome"),
]


@pytest.fixture(autouse=True)
def forget_graphs():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "method"), CAPTURED)
def test_compiles_into_one_graph(name, method):
    model, x = reduced(name, method), image()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "method"), CAPTURED)
def test_exports_with_dynamic_batch(name, method):
    model = reduced(name, method)
    shapes = ({0: Dim("batch", min=1, max=64)},)
    exported = torch.export.export(model, (image(),), dynamic_shapes=shapes, strict=False).module()
    with torch.no_grad():
        for batch in (2, 5, 1):
            torch.testing.assert_close(exported(image(batch)), model(image(batch)), rtol=1e-4, atol=1e-5)


def test_compiled_training_gives_the_same_gradients():
    model, x = reduced("ours", "evit").train(), image()

    def gradients(run):
        model.zero_grad()
        run(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    for plain, compiled in zip(
        gradients(model), gradients(torch.compile(model, fullgraph=True, backend="aot_eager")), strict=True
    ):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)


def test_create_model_takes_a_reduction_and_its_options():
    kwargs = dict(img_size=32, num_classes=3)
    for reduction, more in (("tome", {"r": 5}), ({"name": "tome", "r": 5}, {})):
        model = vitzoo.create_model("vit_micro", token_reduction=reduction, **more, **kwargs)
        assert model.token_reduction.schedule == (5,) * 4
        assert model.num_classes == 3
    with pytest.raises(TypeError, match="does not take 'keep_rate'"):
        vitzoo.create_model("vit_micro", token_reduction="tome", keep_rate=0.5)
    with pytest.raises(ValueError, match="no token reduction 'tomme'"):
        vitzoo.create_model("vit_micro", token_reduction="tomme")
    with pytest.raises(ValueError, match="needs a name"):
        vitzoo.create_model("vit_micro", token_reduction={"r": 5})
    maps = vitzoo.create_model("vit_micro", token_reduction="tome", r=5, features_only=True)(torch.randn(1, 3, 40, 52))
    assert [tuple(m.shape) for m in maps] == [(1, 64, 10, 13)] * 3


def test_importing_vitzoo_does_not_import_token_reduction():
    code = "import sys, vitzoo; assert 'vitzoo.tokens' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_keep_rate_follows_the_epochs_in_training_only():
    model = tokens.reduce(host("ours"), "evit", keep_rate=0.5, shrink_start_epoch=2, shrink_epochs=4)
    for epoch, left in ((0.0, 65), (2.0, 65), (4.0, 31), (6.0, 11)):
        model.set_epoch(epoch)
        assert model.train().forward_features(image()).shape[1] == left
        assert model.eval().forward_features(image()).shape[1] == 11


@pytest.mark.parametrize("method", ["dynamicvit", "tps", "sparsifiner", "spa"])
def test_a_methods_own_losses_reach_its_learned_part(method):
    model, x = reduced("ours", method).train(), image()
    if method == "sparsifiner":
        model.token_reduction.reconstruct_epochs = 1
        model.set_epoch(0.0)
    logits = model(x)
    loss = model.extra_loss(x, torch.zeros(2, dtype=torch.long), logits)
    (logits.square().mean() + loss).backward()
    assert loss.isfinite()
    assert loss > 0
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    assert model.extra_loss(x, torch.zeros(2, dtype=torch.long), logits) is None


def test_a_tokenless_loss_is_none():
    model = reduced("ours", "tome").train()
    assert model.extra_loss(image(), torch.zeros(2), model(image())) is None


@pytest.mark.parametrize("method", ["dynamicvit", "sparsifiner"])
def test_training_from_a_file_gives_a_teacher_those_weights(tmp_path, method):
    from vitzoo.tasks.classification import Classification

    kwargs = {"img_size": 32}
    dense = Classification("vit_micro", 10, kwargs=kwargs)
    torch.save({"state_dict": dense.state_dict()}, tmp_path / "dense.ckpt")
    kwargs["token_reduction"] = {"name": method}
    task = Classification("vit_micro", 10, weights=str(tmp_path / "dense.ckpt"), kwargs=kwargs)
    taught = task.model.token_reduction.teacher.model.state_dict()
    for name, value in dense.model.state_dict().items():
        assert torch.equal(taught[name], value)
        assert torch.equal(task.model.state_dict()[name], value)
    torch.save({"state_dict": task.state_dict()}, tmp_path / "reduced.ckpt")
    again = Classification("vit_micro", 10, weights=str(tmp_path / "reduced.ckpt"), kwargs=kwargs)
    for a, b in zip(task.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
