"""selective_scan."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.ops.triton.scan_cases import gradients, oracle
from vitzoo.ops import explain, selective_scan

IMPLEMENTATIONS = ("torch", "reference")


def tensors(B=2, L=7, C=3, dtype=torch.float64):
    u, b = torch.randn(B, L, C, dtype=dtype), torch.randn(B, L, dtype=dtype)
    delta, a = torch.rand(B, L, C, dtype=dtype), -torch.rand(C, dtype=dtype)
    return tuple(t.requires_grad_() for t in (u, delta, a, b))


@pytest.mark.parametrize("length", [1, 2, 13, 70])
@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "op"])
def test_states_and_gradients_are_those_of_sums_over_all_tokens_before(impl, length):
    run = torch.ops.vitzoo.selective_scan if impl == "op" else lambda *t: selective_scan(*t, impl=impl)
    given = (*tensors(L=length), torch.randn(2, length, 3))
    ours, sums = (gradients(each, *given, dtype=torch.float64) for each in (run, oracle))
    for name, value in ours.items():
        torch.testing.assert_close(value, sums[name])


def test_a_step_of_no_length_keeps_the_state_and_a_long_one_forgets_it():
    u, delta, a, b = (t.detach() for t in tensors(L=3, C=1))
    delta[:, 1], delta[:, 2] = 0, 1e4
    states = selective_scan(u, delta, a - 1, b)
    assert torch.equal(states[:, 1], states[:, 0])
    torch.testing.assert_close(states[:, 2], 1e4 * b[:, 2, None] * u[:, 2])


def test_halves_are_scanned_in_fp32_and_autocast_changes_nothing():
    u, delta, a, b = (t.detach().bfloat16() for t in tensors(L=300))
    exact = selective_scan(*(t.double() for t in (u, delta, a, b)), impl="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = selective_scan(u, delta, a, b)
    assert states.dtype == torch.float32
    torch.testing.assert_close(states.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_tokens_and_no_images_give_none(impl):
    assert selective_scan(*tensors(L=0), impl=impl).shape == (2, 0, 3)
    assert selective_scan(*tensors(B=0), impl=impl).shape == (0, 7, 3)


def test_it_is_registered_as_opcheck_wants_it():
    given = tensors(L=4)
    torch.library.opcheck(torch.ops.vitzoo.selective_scan.default, given)
    saved = [t.detach() for t in (*given, torch.ops.vitzoo.selective_scan(*given))]
    torch.library.opcheck(torch.ops.vitzoo.selective_scan_backward.default, (torch.rand_like(saved[-1]), *saved))


def test_one_exported_graph_serves_all_lengths():
    class Op(nn.Module):
        def forward(self, u: Tensor, delta: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return selective_scan(u, delta, a, b)

    batch, length = Dim("batch", max=64), Dim("length", max=4096)
    shapes = {"u": {0: batch, 1: length}, "delta": {0: batch, 1: length}, "a": None, "b": {0: batch, 1: length}}
    given = [t.detach() for t in tensors(dtype=torch.float32)]
    program = torch.export.export(Op(), tuple(given), dynamic_shapes=shapes).module()
    for other in (tensors(B=3, L=1, dtype=torch.float32), tensors(B=1, L=600, dtype=torch.float32)):
        torch.testing.assert_close(program(*other), selective_scan(*other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda u, delta, a, b: (u[0], delta, a, b), r"needs u as \[B, L, C\]"),
        (lambda u, delta, a, b: (u, delta, a[1:], b), r"a \[C\] and b \[B, L\], got .*\[2\], \[2, 7\]"),
        (lambda u, delta, a, b: (u, delta[:, 1:], a, b), r"needs u and delta \[B, L, C\]"),
        (lambda u, delta, a, b: (u, delta, a, b.long()), "needs a floating b"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        selective_scan(*change(*tensors()))


def test_explain_names_who_would_run_and_why_not_the_kernels():
    said = explain(selective_scan, *tensors())
    assert said.startswith("-> selective_scan torch")
    assert "needs a CUDA device" in said or "it runs float16" in said
