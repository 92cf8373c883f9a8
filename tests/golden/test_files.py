"""What the authors' training scripts save, we load: through ``vitzoo convert`` and ``create_model(checkpoint_path=...)``.

The weights of every golden file that holds a whole model, in the wrappings that published files come in.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vitzoo
from tests.golden.families import ADAPTERS
from tests.golden.harness import Golden
from vitzoo import checkpoints
from vitzoo.models import _registry
from vitzoo_cli import main

WHOLE = {name for name in ADAPTERS if name in (*vitzoo.list_families(), "swinv2")}

# as published: (what stands around the weights, what stands before each name)
WRAPPINGS = (
    (lambda state: state, ""),
    (lambda state: {"model": state, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=1e-3, data="/data")}, ""),
    (lambda state: {"state_dict": state, "epoch": 299, "best_acc1": np.float64(83.2), "arch": "swin"}, "module."),
    (lambda state: {"state_dict": {}, "state_dict_ema": state, "metric": np.float32(83.2)}, "module."),
    (lambda state: {"model": {k: v + 1 for k, v in state.items()}, "model_ema": state}, ""),
)


class Found(Exception):
    """The adapter has built the model and asks for its weights: state and model."""


def built(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], Any]:
    """The published state of a file and our model for it."""

    def convert(state: Mapping[str, Tensor], model: nn.Module) -> None:
        raise Found(state, model)

    golden = Golden.read(path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "convert", convert)
        with pytest.raises(Found) as found:
            ADAPTERS[golden.family](golden)
    return found.value.args


def name_and_arguments(model: Any) -> tuple[str, dict[str, Any]]:
    """How a user asks for such a model: the variant that is nearest to it, and what of that differs."""
    fields = {field.name: getattr(model.cfg, field.name) for field in dataclasses.fields(model.cfg)}
    differ = {
        entry.name: {name: value for name, value in fields.items() if value != getattr(entry.cfg, name)}
        for entry in _registry._ENTRIES.values()
        if entry.cls is type(model)
    }
    name = min(differ, key=lambda name: (None in differ[name].values(), len(differ[name])))  # timm passes no None on
    return name, differ[name]


def plain(value: Any) -> Any:
    """As JSON has it."""
    return dict(value) if isinstance(value, Mapping) else str(value) if isinstance(value, Path) else list(value)


def assert_same(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(own[key], value), key


def test_the_weights_of_a_published_file_are_loaded_from_their_wrapping(whole_model, request, tmp_path, monkeypatch, capsys):
    # here one of the wrappings for each file, all for those given with --golden
    turn = zlib.crc32(whole_model.stem.encode()) % len(WRAPPINGS)
    wrappings = WRAPPINGS if request.config.getoption("--golden") else WRAPPINGS[turn : turn + 1]
    published, model = built(whole_model, monkeypatch)
    expected = checkpoints.convert(published, model)
    name, arguments = name_and_arguments(model)
    # a dense backbone without a norm behind it
    bare = not model.num_classes and type(getattr(model, "norm", None)) is nn.Identity
    bare = bare and not getattr(model.cfg, "feature_norm", False)
    dense = {"features_only": True, "out_indices": range(len(model.feature_info))} if bare else {}
    stale = {"total_ops": torch.zeros(1), "head.total_params": torch.zeros(1)}  # what a profiler has left
    for number, (wrap, prefix) in enumerate(wrappings):
        file = tmp_path / f"{number}.pth"
        torch.save(wrap({prefix + key: value for key, value in (published | stale).items()}), file)
        loaded = vitzoo.create_model(name, checkpoint_path=file, **arguments, **dense)
        assert_same(loaded.model if bare else loaded, expected)
    if bare:
        return
    ours = tmp_path / "ours.safetensors"
    words = ["convert", name, str(file), "--options", json.dumps(arguments, default=plain), "--out", str(ours)]
    assert main(words) == 0, capsys.readouterr().err
    assert_same(vitzoo.create_model(name, checkpoint_path=ours, **arguments), expected)
    theirs = tmp_path / "theirs.safetensors"
    save_file({key: value.contiguous().clone() for key, value in published.items()}, theirs)
    assert_same(vitzoo.create_model(name, checkpoint_path=theirs, **arguments), expected)


SMALLER: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", dict(depths=(1, 1), num_heads=(1, 2), embed_dim=16)),
    "swinv2": ("swinv2_tiny_window8_256", dict(depths=(1, 1), num_heads=(1, 2), embed_dim=16, window_size=8)),
    "vit": ("vit_tiny_patch16_224", dict(depth=1)),
    "deit": ("deit_tiny_distilled_patch16_224", dict(depth=1)),
}


@pytest.mark.parametrize(("family", "ending"), [("swin", ".pth"), ("swinv2", ".safetensors"), ("vit", ".bin"), ("deit", ".pt")])
def test_timms_layout_is_loaded_from_a_file(family, ending, tmp_path, capsys):
    name, smaller = SMALLER[family]
    theirs = timm.create_model(name, **smaller).eval()
    file, ours = tmp_path / f"theirs{ending}", tmp_path / "ours.safetensors"
    state = {key: value + 0.01 if value.is_floating_point() else value for key, value in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    (torch.save if ending == ".pth" else save_file)(state, file)
    assert main(["convert", name, str(file), "--options", json.dumps(smaller), "--out", str(ours)]) == 0, (
        capsys.readouterr().err
    )
    x = torch.randn(1, 3, *theirs.pretrained_cfg["input_size"][1:])
    with torch.inference_mode():
        expected = theirs(x)
        for path in (file, ours):
            found = vitzoo.create_model(name, checkpoint_path=path, **smaller).eval()(x)
            torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
