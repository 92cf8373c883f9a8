"""What a model costs: multiply-adds of its products and convolutions, counted on the meta device, where nothing is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vitzoo.patterns import Pattern


def _attend2d_flops(q: Any, k: Any, v: Any, bias: Any, pattern: list[int], *args: Any, **kwargs: Any) -> int:
    """Two products, of a query with every key it sees and of the weights with the values."""
    del k, v, bias, args, kwargs
    batch, height, width, heads, dim = q
    return 4 * batch * heads * dim * Pattern.from_ints(pattern).pairs(height, width)


COUNTED: dict[Any, Any] = {torch.ops.vitzoo.attend2d: _attend2d_flops}  # what torch's counter does not know


def count_gmacs(model: Any, img_size: tuple[int, int]) -> float:
    """Billions of multiply-adds of one image through a model.

    Args:
        model: a model on the meta device, in any mode; it is left as it was.
        img_size: rows and columns of the image in pixels.

    Returns:
        Products and convolutions; norms, activations, additions and the softmax are not counted, as is the custom.
    """
    counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
    training = model.training
    with torch.no_grad(), counter:
        model.eval()(torch.empty(1, model.in_chans, *img_size, device="meta"))
    model.train(training)
    return counter.get_total_flops() / 2e9
