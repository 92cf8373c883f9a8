"""Exported files equal eager at the image sizes that they were made for and at others, or are not written.

``pytest tests/test_exporting.py --models '*_micro'`` writes every micro model as ONNX, half a minute each.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitzoo
from tests.models.zoo import build
from vitzoo import exporting


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return build("vit_micro", depth=1)


def test_a_program_runs_at_other_sizes(vit, tmp_path):
    checks = exporting.to_program(vit, tmp_path / "vit.pt2", (64, 96))
    assert [(c.batch, c.height, c.width) for c in checks] == [(2, 64, 96), (1, 37, 109)]
    assert max(c.error for c in checks) < 1e-5
    loaded = torch.export.load(tmp_path / "vit.pt2").module()
    x = torch.randn(3, 3, 50, 41)
    torch.testing.assert_close(loaded(x), vit(x), atol=1e-5, rtol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["vit.pt2"]


def test_a_file_that_differs_from_eager_is_not_written(vit, tmp_path, monkeypatch):
    captured = exporting._captured

    def wrong(model, *rest):
        changed = build("vit_micro", depth=1)
        changed.head.bias.data[7] += 100
        return captured(changed, *rest)

    monkeypatch.setattr(exporting, "_captured", wrong)
    with pytest.raises(ValueError, match=r"was not written: at batch 2, 64 x 96 it differs from eager by .* more than 0\.0001"):
        exporting.to_program(vit, tmp_path / "vit.pt2", (64, 96), dynamic="none")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said(vit, tmp_path):
    with pytest.raises(ValueError, match='dynamic must be "all", "batch" or "none", got \'size\''):
        exporting.to_program(vit, tmp_path / "vit.pt2", (64, 96), dynamic="size")
    with pytest.raises(ValueError, match="at least 2 images"):
        exporting.to_onnx(vit, tmp_path / "vit.onnx", (64, 96), batch=1)


def test_a_graph_that_pytorch_cannot_capture_is_said_in_a_sentence(tmp_path):
    class Chooses(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r'^Chooses does not export with dynamic="all": .*"batch", or "none"') as refused:
        exporting.to_program(Chooses(), tmp_path / "chooses.pt2", (64, 96))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_every_listed_model_is_onnx_at_two_sizes(request, tmp_path):
    """Here one of a single block; those of --models as they are."""
    patterns = request.config.getoption("--models")
    models = {name: build(name) for p in patterns for name in vitzoo.list_models(p)} or {"vit": build("vit_micro", depth=1)}
    failed = {}
    for name, model in models.items():
        try:
            exporting.to_onnx(model, tmp_path / f"{name}.onnx", (64, 96))
        except Exception as error:
            failed[name] = str(error)
    assert not failed, failed
