from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitzoo.heads import DynamicHead, detector
from vitzoo.heads.dyhead import DynamicHeadBlock


def maps(channels=32, sizes=((20, 26), (10, 13), (5, 7))):
    return [torch.randn(2, channels, *size) for size in sizes]


def test_maps_keep_their_shapes_and_everything_learns():
    head = DynamicHead(32, blocks=2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    out = head(maps())
    assert [m.shape for m in out] == [m.shape for m in maps()]
    sum(m.square().mean() for m in out).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())


def test_with_zero_offsets_a_block_is_convolutions_weighted_by_scale():
    """The equations, written once more with what they become where no place is moved and no mask learned."""
    torch.manual_seed(0)
    block = DynamicHeadBlock(32)
    for name, parameter in block.named_parameters():
        if not name.startswith("offset"):
            torch.nn.init.normal_(parameter, std=0.2)
    x = maps(sizes=((12, 14), (6, 7)))

    def spatial(part, y):
        return part.norm(0.5 * F.conv2d(y, part.weight, padding=1))  # sigmoid(0) = 1/2

    def scaled(y):
        pi = torch.clamp((F.relu(block.scale(y.mean((2, 3)))) + 3) / 6, 0, 1)
        return pi[..., None, None] * y

    def task(y):
        hidden = block.task.expand(F.relu(block.task.reduce(y.mean((2, 3)))))
        theta = 2 * torch.clamp((3 * hidden + 3) / 6, 0, 1) - 1
        a1, b1, a2, b2 = theta[..., None, None].split(32, dim=1)
        return torch.maximum((1 + a1) * y + b1 / 2, a2 * y + b2 / 2)

    fine = (
        scaled(spatial(block.own, x[0])) + scaled(spatial(block.coarser, F.interpolate(x[1], size=(12, 14), mode="bilinear")))
    ) / 2
    coarse = (scaled(spatial(block.own, x[1])) + scaled(spatial(block.finer, F.avg_pool2d(x[0], 2)))) / 2
    for found, expected in zip(block(x), (task(fine), task(coarse)), strict=True):
        torch.testing.assert_close(found, expected)


def test_offsets_move_where_a_place_looks():
    block = DynamicHeadBlock(16, groups=4)
    x = [torch.zeros(1, 16, 9, 9)]
    x[0][..., 4, 4] = 1.0
    torch.nn.init.zeros_(block.own.weight)
    block.own.weight.data[:, :, 1, 1] = torch.eye(16)
    block.own.norm = torch.nn.Identity()
    guide = torch.zeros(1, 27, 9, 9)
    guide[:, 8] = 2.0  # the centre tap looks two rows down
    out = block.own(x[0], guide[:, :18], torch.ones(1, 9, 9, 9))
    assert out[0, 0].nonzero().tolist() == [[2, 4]]


@pytest.mark.parametrize("kind", ["fcos", "retinanet", "maskrcnn"])
def test_it_is_a_neck_of_any_detector(kind):
    model = detector(kind, "nat_micro", 3, channels=32, head_convs=1, dyhead=1, extra=1, min_size=96, max_size=128)
    target = {"boxes": torch.tensor([[5.0, 8.0, 60.0, 50.0]]), "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, 90, 120, dtype=torch.uint8)
    losses = model([torch.rand(3, 90, 120)], [target])
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in model.backbone.dyhead.parameters())
