"""FLatten: what the published checkpoints hold, and how they are evaluated."""

from __future__ import annotations

import pytest
import torch

import vitzoo
from tests.models.zoo import build, image
from vitzoo import checkpoints
from vitzoo.layers import resize_positions

# multiply-adds that a counter finds in the published classes, in billions
COUNTED = {
    "flatten_pvt_tiny": 2.04,
    "flatten_pvt_v2_b2": 4.25,
    "flatten_swin_tiny": 4.48,
    "flatten_swin_base_384": 46.38,
    "flatten_cswin_tiny": 4.32,
}


@pytest.mark.parametrize(("listed", "counted"), COUNTED.items())
def test_costs_what_the_published_class_costs(listed, counted):
    assert vitzoo.model_info(listed).gmacs == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("host", ["swin_micro", "pvt_v2_micro", "cswin_micro"])
def test_positions_of_another_image_size_are_resized_as_a_picture(host):
    small, large = (build(host, mixer="focused_linear", img_size=size) for size in (32, 64))
    state = checkpoints.convert(small.state_dict(), large)
    large.load_state_dict(state)
    key = next(key for key in state if key.endswith("positional_encoding"))
    value, side = small.state_dict()[key], large.get_submodule(key.rpartition(".")[0]).grid_size
    half = (side[0] // 2, side[1] // 2)
    torch.testing.assert_close(state[key], resize_positions(value, torch.empty(1, *side, 0), half).flatten(1, 2))
    x = image(64, 64)
    with torch.no_grad():  # which is what the small model does at that size
        torch.testing.assert_close(large(x), small(x), rtol=1e-4, atol=1e-4)


def test_positions_that_cannot_be_a_square_map_are_refused_by_name(tmp_path):
    small, large = (build("swin_micro", mixer="focused_linear", img_size=size) for size in ((32, 48), 64))
    torch.save(small.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"positional_encoding is \(1, 384, 32\)"):
        checkpoints.load(large, tmp_path / "weights.pth")


@pytest.mark.parametrize(("listed", "crop"), [("flatten_swin_tiny", 0.875), ("flatten_swin_base_384", 1.0)])
def test_is_evaluated_on_squashed_pictures(listed, crop):
    with torch.device("meta"):
        given = vitzoo.create_model(listed).pretrained_cfg
    assert (given["crop_mode"], given["crop_pct"]) == ("squash", crop)


def test_linear_blocks_see_the_whole_map_at_any_size_and_the_others_their_windows():
    with torch.device("meta"):
        model = vitzoo.create_model("flatten_swin_base_384")
    kinds = [{type(block.attn).__name__ for block in stage.blocks} for stage in model.stages]
    assert kinds == [{"FocusedLinearAttention"}] * 2 + [{"PatternAttention"}] * 2
    assert model.stages[2].blocks[1].attn.pattern.rows.size == 12
