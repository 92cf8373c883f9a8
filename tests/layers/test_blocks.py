from __future__ import annotations

import pytest
import torch
from torch import nn

from vitzoo.layers import Block, DepthwiseMlp, PatternAttention
from vitzoo.layers import blocks as module
from vitzoo.patterns import window


def block(**kwargs: object) -> Block:
    made = Block(24, PatternAttention(24, 3, window(4), pad_multiple=(4, 4)), **kwargs).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("post_norm", [False, True], ids=["pre", "post"])
@pytest.mark.parametrize("layer_scale", [None, 1e-5])
def test_working_in_place_changes_no_bit(monkeypatch, post_norm, layer_scale):
    made, x = block(post_norm=post_norm, layer_scale=layer_scale), torch.randn(5, 7, 9, 24)
    with torch.no_grad():
        in_place = made(x)
        monkeypatch.setattr(Block, "_may_work_in_place", lambda self, x: False)
        assert torch.equal(in_place, made(x))


@pytest.mark.parametrize("tokens", [1, 150], ids=["image_by_image", "two_images"])
def test_the_mlp_in_pieces_is_the_mlp(monkeypatch, tokens):
    made, x = block(), torch.randn(5, 7, 9, 24)
    with torch.no_grad():
        whole = made(x)
        monkeypatch.setattr(module, "CHUNK_TOKENS", tokens)
        torch.testing.assert_close(made(x), whole)


@pytest.mark.parametrize("post_norm", [False, True], ids=["pre", "post"])
def test_the_input_is_never_written(post_norm):
    x = torch.randn(2, 8, 8, 24)
    before = x.clone()
    with torch.no_grad():
        block(post_norm=post_norm)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("part", ["mlp", "mlp.act", "mlp.fc1", "norm2"])
def test_a_hook_on_a_part_sees_the_whole_batch_or_every_piece_of_it(part):
    made, seen = block(), []
    made.get_submodule(part).register_forward_hook(lambda m, args, out: seen.append(len(out)))
    with torch.no_grad():
        made(torch.randn(3, 8, 8, 24))
    assert sum(seen) == 3


def test_an_empty_batch_passes():
    with torch.no_grad():
        assert block()(torch.randn(0, 8, 8, 24)).shape == (0, 8, 8, 24)


def test_drop_path_keeps_whole_images_and_their_mean():
    made = block(drop_path=0.5).train()
    x = torch.randn(64, 4, 4, 24)
    kept = (made(x) != x).flatten(1).any(1)
    assert 0 < kept.sum() < 64


def test_another_mlp_takes_the_place_of_the_plain_one_in_both_paths():
    made = block(mlp=DepthwiseMlp(24, 36))
    x = torch.randn(3, 7, 9, 24)
    with torch.no_grad():
        in_place = made(x)
    assert made.mlp.dwconv.weight.shape == (36, 1, 3, 3)
    torch.testing.assert_close(in_place, made(x).detach())
