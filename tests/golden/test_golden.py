"""What the published code computes, we compute.

One case for each file below tests/golden/data, or below the folders given with ``--golden DIR``. A file holds the seeded
input, the published class's weights (``state/``), its output, features and gradients, and the spec it was built from.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.golden.families import ADAPTERS
from tests.golden.harness import Golden, NotYet, Pair, judge


def test_golden(golden_file: Path):
    golden = Golden.read(golden_file)
    if golden.family not in ADAPTERS:
        pytest.skip(f"family {golden.family} is not in vitzoo yet")
    try:
        pairs = ADAPTERS[golden.family](golden)
    except NotYet as reason:
        pytest.skip(str(reason))
    print("worst first:", *pairs, sep="\n")  # pytest -rP shows it


def test_the_repository_carries_a_case_of_every_family_that_has_an_adapter_in_20_megabytes():
    files = sorted((Path(__file__).parent / "data").rglob("*.safetensors"))
    assert {Golden.read(file).family for file in files} == set(ADAPTERS)
    assert sum(file.stat().st_size for file in files) <= 20e6


def golden_with(**tensors: torch.Tensor) -> Golden:
    return Golden({"family": "none"}, tensors)


def test_a_wrong_tensor_is_reported_with_how_far_it_is_off():
    golden = golden_with(output=torch.tensor([1.0, -2.0]))
    pair = Pair("output", torch.tensor([1.0, -2.01]), golden.tensors["output"])
    with pytest.raises(AssertionError, match=r"output: off by 1\.00e-02 of 2\.00e\+00 \(relative 5\.0e-03\)"):
        judge(golden, [pair], 1e-4, given=())


def test_a_small_tensor_has_no_more_room_than_a_large_one():
    golden = golden_with(grad=torch.full((3,), 1e-6))
    with pytest.raises(AssertionError, match="off by"):
        judge(golden, [Pair("grad", torch.full((3,), 1.1e-6), golden.tensors["grad"])], 1e-4, given=())


def test_float32_rounding_gives_room_but_not_without_end():
    golden = golden_with(grad=torch.ones(3))
    for off, rounding, accepted in ((5e-4, 0.0, False), (5e-4, 3e-4, True), (5e-3, 3e-3, False)):
        pair = Pair("grad", torch.full((3,), 1 + off), golden.tensors["grad"], rounding=rounding)
        assert (pair.error <= pair.allowed(1e-4)) == accepted


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_is_wrong(wrong):
    golden = golden_with(output=torch.ones(2))
    with pytest.raises(AssertionError, match="off by"):
        judge(golden, [Pair("output", torch.tensor([1.0, wrong]), golden.tensors["output"])], 1e-4, given=())


def test_a_tensor_that_nobody_compared_is_an_error():
    golden = golden_with(output=torch.ones(2), attention=torch.ones(2))
    with pytest.raises(AssertionError, match="not compared: attention"):
        judge(golden, [Pair("output", torch.ones(2), torch.ones(2))], 1e-4, given=())
