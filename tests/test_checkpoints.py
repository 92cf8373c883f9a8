"""From a file to a model: what is recognised, what is resized, what is refused and how that is said."""

from __future__ import annotations

import logging
import os
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vitzoo
from vitzoo import checkpoints


@pytest.fixture(scope="module")
def swin() -> nn.Module:
    torch.manual_seed(0)
    return vitzoo.create_model("swin_micro").eval()


def published_layout(model: nn.Module) -> dict[str, torch.Tensor]:
    """Our Swin's weights as microsoft/Swin-Transformer would save them, with its buffers."""
    state = {}
    for key, value in model.state_dict().items():
        if key.endswith("rel_bias"):
            key, value = key.replace("rel_bias", "relative_position_bias_table"), value.flip(1, 2).flatten(1).T
        key = re.sub(r"^stages\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        key = key.replace("stages.", "layers.").replace("stem.", "patch_embed.").replace("head.fc.", "head.")
        state[key] = value
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    return state


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    wrong = [key for key, value in other.state_dict().items() if not torch.equal(model.state_dict()[key], value)]
    assert not wrong


WRAPPINGS = {
    "bare": lambda s: s,
    "model": lambda s: {"model": s, "epoch": 299, "config": {"lr": 1e-3}},
    "state_dict": lambda s: {"state_dict": s, "optimizer": {"state": {}}},
    "ddp": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
    "detector": lambda s: {"state_dict": {f"backbone.{k}": v for k, v in s.items()}},
    "ema_first": lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s},
}


@pytest.mark.parametrize("layout", ["ours", "published"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_checkpoint_is_recognised_in_every_wrapping_and_layout(swin, tmp_path, wrapping, layout):
    state = swin.state_dict() if layout == "ours" else published_layout(swin)
    torch.save(WRAPPINGS[wrapping](dict(state)), tmp_path / "weights.pth")
    assert_same_weights(vitzoo.create_model("swin_micro", checkpoint_path=str(tmp_path / "weights.pth")), swin)


def test_conversion_is_linear_so_gradients_go_the_same_way(swin):
    a = published_layout(swin)
    b = {key: torch.randn_like(value) for key, value in a.items() if value.is_floating_point()}
    both = {key: 2 * a[key] - 3 * b[key] for key in b}
    converted = {name: checkpoints.convert(state, swin) for name, state in (("a", a), ("b", b), ("both", both))}
    assert set(converted["both"]) == set(swin.state_dict())
    for key, value in converted["both"].items():
        torch.testing.assert_close(value, 2 * converted["a"][key] - 3 * converted["b"][key])


def test_a_part_of_a_checkpoint_is_converted_by_itself(swin):
    whole = published_layout(swin)
    key = "layers.1.blocks.1.attn.relative_position_bias_table"
    ((name, value),) = checkpoints.convert({key: whole[key]}, swin).items()
    assert name == "stages.1.blocks.1.attn.rel_bias"
    assert torch.equal(value, swin.state_dict()[name])


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path: os.PathLike) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(swin, tmp_path):
    torch.save({"model": swin.state_dict(), "args": Bomb(tmp_path / "it_ran")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="could run code"):
        vitzoo.create_model("swin_micro", checkpoint_path=str(tmp_path / "weights.pth"))
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_damaged_file_is_refused_with_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"not a checkpoint, and long enough to be looked at as one" * 10)
    with pytest.raises(ValueError, match=name):
        checkpoints.read(tmp_path / name)


def test_a_missing_file_is_refused_with_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        checkpoints.read(tmp_path / "nowhere.pth")


def test_a_file_without_tensors_names_what_it_has(swin):
    with pytest.raises(ValueError, match="epoch"):
        checkpoints.convert({"epoch": 3}, swin)


def test_weights_of_another_model_are_refused_with_both_sides(swin, tmp_path):
    save_file(vitzoo.create_model("nat_micro").state_dict(), tmp_path / "nat.safetensors")
    with pytest.raises(ValueError, match=r"does not fit Swin: \d+ missing \(.+\), \d+ unknown \(.+conv1"):
        checkpoints.load(swin, tmp_path / "nat.safetensors")


def test_another_number_of_classes_leaves_the_classifier_as_it_was(swin, tmp_path, caplog):
    save_file(swin.state_dict(), tmp_path / "swin.safetensors")
    torch.manual_seed(5)
    model = vitzoo.create_model("swin_micro", num_classes=7)
    head = model.head.fc.weight.clone()
    with caplog.at_level(logging.WARNING):
        checkpoints.load(model, tmp_path / "swin.safetensors")
    assert torch.equal(model.head.fc.weight, head)
    assert torch.equal(model.stem.proj.weight, swin.stem.proj.weight)
    assert "head.fc.weight" in caplog.text


def test_features_only_loads_a_classifiers_file(swin, tmp_path):
    save_file(swin.state_dict(), tmp_path / "swin.safetensors")
    backbone = vitzoo.create_model("swin_micro", features_only=True, checkpoint_path=str(tmp_path / "swin.safetensors"))
    assert torch.equal(backbone.model.stem.proj.weight, swin.stem.proj.weight)


def test_bias_tables_are_resized_to_a_larger_window_and_keep_a_constant(swin):
    state = swin.state_dict() | {k: torch.full_like(v, 3.0) for k, v in swin.state_dict().items() if "rel_bias" in k}
    wider = vitzoo.create_model("swin_micro", window_size=(6, 6, 3))
    wider.load_state_dict(checkpoints.convert(state, wider), strict=True)
    table = wider.stages[0].blocks[1].attn.rel_bias
    assert table.shape == (1, 11, 11)
    torch.testing.assert_close(table, torch.full_like(table, 3.0))


def test_learned_positions_are_resized_to_another_image(tmp_path):
    vit = vitzoo.create_model("vit_micro").eval()
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    larger = vitzoo.create_model("vit_micro", img_size=(40, 56), checkpoint_path=str(tmp_path / "vit.safetensors")).eval()
    x = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(larger(x), vit(x))


def test_features_need_what_they_are_made_of_and_no_more(tmp_path):
    state = vitzoo.create_model("nat_micro").state_dict()
    bare = {key: value for key, value in state.items() if not key.startswith(("norm.", "head."))}
    save_file(bare, tmp_path / "dense.safetensors")
    backbone = vitzoo.create_model("nat_micro", features_only=True, checkpoint_path=tmp_path / "dense.safetensors")
    assert all(torch.equal(value, bare[key]) for key, value in backbone.model.state_dict().items())
    save_file({key: value for key, value in bare.items() if key != "stem.norm.bias"}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(stem\.norm\.bias\)"):
        vitzoo.create_model("nat_micro", features_only=True, checkpoint_path=tmp_path / "less.safetensors")
