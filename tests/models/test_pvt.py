"""PVT, where the contract does not look: odd maps, the positions of V1, what the keys are read from."""

from __future__ import annotations

import pytest
import torch

import vitzoo
from tests.models.zoo import build, image


def test_odd_maps_are_padded_or_lose_their_last_row_and_column():
    x = image(76, 108)
    for drop_odd, sizes in ((False, [(19, 27), (10, 14), (5, 7)]), (True, [(19, 27), (9, 13), (4, 6)])):
        maps = build("pvt_micro", drop_odd=drop_odd).forward_intermediates(x, intermediates_only=True)
        assert [tuple(m.shape[2:]) for m in maps] == sizes


def test_dropping_odd_rows_changes_nothing_where_there_are_none():
    x = image(64, 96)
    with torch.no_grad():
        assert torch.equal(build("pvt_micro", drop_odd=True)(x), build("pvt_micro")(x))


def test_positions_are_resized_for_good_by_the_sizes_that_the_maps_have():
    model = build("pvt_micro", drop_odd=True)
    model.set_input_size((76, 108))
    assert [patches.grid_size for patches in (model.stem, *(stage.downsample for stage in model.stages[1:]))] == [
        (19, 27),
        (9, 13),
        (4, 6),
    ]
    assert model.stages[1].downsample.pos_embed.shape == (1, 9 * 13, 32)


def test_keys_come_from_whole_cells_alone():
    attn = build("pvt_micro").stages[0].blocks[0].attn
    x = torch.randn(1, 10, 9, 16)
    other = x.clone()
    other[:, 8:], other[:, :, 8:] = 0, 0  # beyond the last cell of 4 x 4
    with torch.no_grad():
        torch.testing.assert_close(attn(x)[:, :8, :8], attn(other)[:, :8, :8])
        assert not torch.equal(attn(x)[:, 8:], attn(other)[:, 8:])


def test_a_class_token_of_the_first_pvt_is_refused_by_name(tmp_path):
    model = build("pvt_micro")
    torch.save({**model.state_dict(), "cls_token": torch.zeros(1, 1, 64)}, tmp_path / "pvt.pth")
    with pytest.raises(ValueError, match="cls_token"):
        vitzoo.create_model("pvt_micro", checkpoint_path=str(tmp_path / "pvt.pth"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"version": 3}, "version is 1 or 2, got 3"), ({"sr_ratios": (8, 4)}, r"sr_ratios \(8, 4\) names 2 stages")],
)
def test_a_config_that_does_not_fit_is_refused_in_a_sentence(wrong, said):
    with pytest.raises(ValueError, match=said):
        vitzoo.create_model("pvt_micro", **wrong)


def test_v2_refuses_a_second_norm_of_its_maps():
    with pytest.raises(ValueError, match="feature_norm"):
        vitzoo.create_model("pvt_v2_micro", feature_norm=True)
