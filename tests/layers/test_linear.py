from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.budget import assert_within_budget
from vitzoo.layers import DepthwiseMlp, Linear, linear


def operands(*shape: int, out: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return torch.randn(*shape, dtype=dtype), torch.randn(out, shape[-1], dtype=dtype), torch.randn(out, dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 7), (13, 17, 24), (2, 3, 5, 96), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no_bias"])
def test_inference_is_as_exact_as_pytorch(shape, biased):
    x, w, b = operands(*shape, out=11)
    b = b if biased else None
    with torch.no_grad():
        plain, exact = F.linear(x, w, b), F.linear(x.double(), w.double(), None if b is None else b.double())
        assert_within_budget(linear(x, w, b), plain, exact, factor=4)


def test_a_map_with_permuted_strides_is_read_right():
    x, w, b = operands(2, 5, 7, 24, out=9)
    permuted = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    with torch.no_grad():
        assert torch.equal(linear(permuted, w, b), linear(x, w, b))


def test_no_rows_give_no_rows():
    x, w, b = operands(0, 24, out=9)
    with torch.no_grad():
        assert linear(x, w, b).shape == (0, 9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_pytorch_to_the_bit(dtype):
    x, w, b = operands(13, 24, out=9, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(linear(x, w, b), F.linear(x, w, b))


def test_with_gradients_it_is_pytorch_to_the_bit():
    x, w, b = operands(13, 24, out=9)
    assert torch.equal(linear(x, w, b), F.linear(x, w, b))


def test_autocast_decides_the_dtype():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(*operands(13, 24, out=9)).dtype == torch.bfloat16


def test_a_flop_counter_sees_every_multiplication():
    layer, x = Linear(24, 9), torch.randn(13, 24)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 13 * 24 * 9


def test_a_captured_graph_has_no_private_operator():
    layer, x = Linear(24, 9).eval(), torch.randn(13, 24)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
    assert "mkldnn" not in str(program.graph)


@pytest.mark.parametrize("residual", [False, True])
def test_a_depthwise_mlp_sees_the_eight_neighbours_and_no_more(residual):
    mlp, x = DepthwiseMlp(6, 10, residual=residual), torch.randn(2, 7, 9, 6, requires_grad=True)
    (seen,) = torch.autograd.grad(mlp(x)[0, 3, 4].sum(), x)
    touched = seen[0].abs().sum(-1) > 0
    assert touched[2:5, 3:6].all()
    assert touched.sum() == 9
    assert not seen[1].any()


def test_a_depthwise_mlp_with_a_centred_kernel_is_an_mlp():
    mlp, x = DepthwiseMlp(6, 10), torch.randn(2, 7, 9, 6)
    with torch.no_grad():
        mlp.dwconv.weight.zero_()[:, :, 1, 1] = 1
        mlp.dwconv.bias.zero_()
        torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x))))
