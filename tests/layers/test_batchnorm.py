from __future__ import annotations

import pytest
import torch
from torch import nn

from vitzoo.layers.batchnorm import affine, may_fold, statistics_kept


def norm() -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(5, eps=1e-3).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    made.running_mean.normal_()
    made.running_var.uniform_(0.1, 3)
    return made


def test_affine_is_the_norm_in_eval_mode():
    made, x = norm(), torch.randn(2, 5, 3, 4)
    scale, shift = affine(made)
    torch.testing.assert_close(x * scale[:, None, None] + shift[:, None, None], made(x))


def test_folds_in_eager_inference_on_a_cpu():
    with torch.no_grad():
        assert may_fold(torch.randn(1, 5, 2, 2), [norm()])


@pytest.mark.parametrize("why", ["gradients", "training", "hook", "hook_beside", "another_class", "half", "autocast"])
def test_does_not_fold(why):
    made, beside, x = norm(), nn.Identity(), torch.randn(1, 5, 2, 2)
    if why == "training":
        made.train()
    if why.startswith("hook"):
        (made if why == "hook" else beside).register_forward_hook(lambda *args: None)
    if why == "another_class":
        made = nn.SyncBatchNorm.convert_sync_batchnorm(made)
    if why == "half":
        x = x.bfloat16()
    with torch.set_grad_enabled(why == "gradients"), torch.autocast("cpu", enabled=why == "autocast"):
        assert not may_fold(x, [made], [beside])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_kept_and_outputs_the_same(momentum):
    made, x = nn.BatchNorm2d(5, momentum=momentum), torch.randn(2, 5, 3, 4)
    expected = made(x)
    before = {key: value.clone() for key, value in made.state_dict().items()}

    def recompute() -> None:
        with statistics_kept(made):
            assert torch.equal(made(x), expected)
            raise KeyError  # as a checkpoint stops a recomputation that has given enough

    with pytest.raises(KeyError):
        recompute()
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())
    made(x + 1)
    assert int(made.num_batches_tracked) == 2
    assert not torch.equal(made.running_mean, before["running_mean"])
