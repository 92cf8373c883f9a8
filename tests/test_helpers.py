"""The helpers of the tests themselves: a check that cannot fail checks nothing."""

from __future__ import annotations

import pytest
import torch

from tests.budget import assert_within_budget


def products(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    return a.to(dtype) @ b.to(dtype).T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain_pytorch_is_within_its_own_budget(dtype):
    assert_within_budget(products(dtype), products(dtype), products(torch.float64))


@pytest.mark.parametrize("norm", ["rms", "max"])
def test_a_result_four_times_as_wrong_exceeds_the_budget(norm):
    plain, exact = products(torch.bfloat16), products(torch.float64)
    error = plain.double() - exact
    worse = exact + 4 * error
    if norm == "max":  # one element only
        worse = plain.double()
        worse[3, 5] += 4 * error.abs().max()
    with pytest.raises(AssertionError, match=f"{norm} error"):
        assert_within_budget(worse.to(torch.bfloat16), plain, exact)


def test_a_value_that_is_not_finite_exceeds_every_budget():
    wrong = products(torch.float32)
    wrong[0, 0] = torch.nan
    with pytest.raises(AssertionError, match="1 of 1024 values are not finite"):
        assert_within_budget(wrong, products(torch.float32), products(torch.float64))


def test_a_budget_needs_an_exact_value():
    with pytest.raises(AssertionError, match="must be float64"):
        assert_within_budget(products(torch.float32), products(torch.float32), products(torch.float32))


def test_uninitialised_memory_is_nan_where_asked_for(nan_memory):
    assert torch.empty(7).isnan().all()
    assert torch.empty_like(torch.ones(2, 3)).isnan().all()
    assert torch.ones(2).new_empty(5).isnan().all()
    assert torch.empty(3, dtype=torch.bfloat16).isnan().all()


def test_uninitialised_memory_is_left_alone_elsewhere():
    assert not torch.are_deterministic_algorithms_enabled()
