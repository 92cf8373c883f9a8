"""``name`` runs a test for each small model, ``micro`` for each micro one, ``sampled`` for a few; ``model`` is built."""

from __future__ import annotations

from copy import deepcopy

import pytest
from torch import nn

from tests.models.zoo import build, chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    values_of = chosen(metafunc.config.getoption("--models"))
    for fixture, values in zip(("name", "micro", "sampled"), values_of, strict=True):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, values, scope="module")


@pytest.fixture(scope="module")
def shared_model(name: str) -> nn.Module:
    """Built once for all tests of a name. Never changed: tests that change it take ``model``."""
    return build(name)


@pytest.fixture
def model(shared_model: nn.Module) -> nn.Module:
    """A model of one's own."""
    return deepcopy(shared_model)
