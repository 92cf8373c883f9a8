"""How wrong a result may be: as wrong as plain PyTorch is at the same precision, times a small factor."""

from __future__ import annotations

import torch
from torch import Tensor


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def peak(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def assert_within_budget(actual: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0, name: str = "result") -> None:
    """Assert that ``actual`` is at most ``factor`` times as far from ``exact`` as ``plain`` is.

    Compared in two norms, root mean square (is it as accurate) and maximum (is a single element off), because a wrong
    row of a thousand hides in the first and one unlucky rounding decides the second.

    Args:
        actual: what is tested.
        plain: the same computed by plain PyTorch operations at the precision of ``actual``.
        exact: the same in float64.
        factor: how many times plain PyTorch's error is allowed.
        name: for the message.
    """
    assert exact.dtype == torch.float64, f"{name}: the exact value must be float64, got {exact.dtype}"
    assert actual.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{name} is {actual.dtype}, plain PyTorch gives {plain.dtype}"
    wrong = ~torch.isfinite(actual)
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {actual.numel()} values are not finite"
    error, of_plain = (x.double().cpu() - exact.cpu() for x in (actual, plain))
    half_a_step = torch.finfo(actual.dtype).eps / 2  # what storing the exact value costs, where plain PyTorch is exact
    for norm, size in (("rms", rms), ("max", peak)):
        budget = factor * max(size(of_plain), half_a_step * size(exact))
        assert size(error) <= budget, (
            f"{name}: {norm} error {size(error):.3e} exceeds {factor:g} times plain PyTorch's {size(of_plain):.3e} "
            f"(values: {norm} {size(exact):.3e})"
        )
