"""Filters of the whole map, and what becomes of them at another size."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

import vitzoo
from tests.models.zoo import build, image
from vitzoo.models.spectformer import filter_map, resize_filter


def test_a_filter_is_a_circular_convolution_as_large_as_the_map():
    x, kernel = torch.randn(1, 6, 5, 2), torch.randn(6, 5, 2)
    weight = torch.view_as_real(torch.fft.rfft2(kernel, dim=(0, 1)))
    shifts = ((dy, dx) for dy in range(6) for dx in range(5))
    expected = sum(kernel[dy, dx] * x.roll((dy, dx), (1, 2)) for dy, dx in shifts)
    torch.testing.assert_close(filter_map(x, weight), expected)


def test_a_resized_filter_scales_the_mean_as_before():
    weight = torch.randn(8, 5, 3, 2)
    for size in ((8, 8), (13, 7), (1, 1), (5, 32)):
        flat = torch.ones(1, *size, 3)
        torch.testing.assert_close(filter_map(flat, weight), flat * weight[0, 0, :, 0])


def test_a_filter_of_its_own_size_is_left_alone():
    weight = torch.randn(8, 5, 3, 2)
    assert resize_filter(weight, (8, 5)) is weight


def test_weights_load_into_a_model_of_another_image_size(tmp_path):
    for name in ("spectformer_micro", "spectformer_h_micro"):
        trained = build(name)
        save_file(trained.state_dict(), tmp_path / "weights.safetensors")
        larger = vitzoo.create_model(name, img_size=48, checkpoint_path=str(tmp_path / "weights.safetensors")).eval()
        grids = [m.complex_weight.shape[:2] for m in larger.modules() if hasattr(m, "complex_weight")]
        assert grids[0] == (12, 7)
        with torch.no_grad():
            x = image(48, 48)
            torch.testing.assert_close(larger(x), trained(x), rtol=1e-4, atol=1e-4)
