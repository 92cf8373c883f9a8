"""attend through PyTorch: fused attention where PyTorch has it, one batched product after another where it has not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitzoo.ops._softmax import probabilities, safe_logsumexp, settled
from vitzoo.ops.attend.point_bias import PointBias


def supports(call) -> str | None:
    """Takes every call."""
    return None


SCORES_AT_ONCE = 2**22
"""Of an image: a PointBias of more scores is laid out for some rows of queries at a time, so that no matrix of all is kept."""


def run(call) -> tuple[Tensor, Tensor | None]:
    """(out `[B, L, N, D]`, lse `[B, L, N]` or None) of an `AttendCall`."""
    if isinstance(call.bias, PointBias) and not torch.compiler.is_compiling():
        in_a_row = call.q.shape[2] * call.bias.cols.shape[0] * call.k.shape[1]
        rows = max(1, SCORES_AT_ONCE // max(1, in_a_row))
        if rows < call.bias.rows.shape[0]:
            return _by_rows(call, rows)
    return _at_once(call)


def _by_rows(call, rows: int) -> tuple[Tensor, Tensor | None]:
    """The same for so many rows of queries at a time; what a gradient needs is computed again when it is asked for."""
    constants, width = (call.bias.rows, call.bias.cols), call.bias.cols.shape[0]

    def part(q: Tensor, k: Tensor, v: Tensor, table: Tensor, points: Tensor, key_bias: Tensor | None, first: int):
        bias = PointBias(table, points, constants[0][first : first + rows], constants[1])
        return _at_once(call._replace(q=q, k=k, v=v, bias=bias, key_bias=key_bias))

    found = []
    for first in range(0, constants[0].shape[0], rows):
        q = call.q[:, first * width : (first + rows) * width]
        arguments = (q, call.k, call.v, call.bias.table, call.bias.points, call.key_bias, first)
        if torch.is_grad_enabled():
            found.append(checkpoint(part, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(part(*arguments))
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1) if call.return_lse else None


def _at_once(call) -> tuple[Tensor, Tensor | None]:
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    bias = _total_bias(call)
    # PyTorch's fused kernels give no lse, and leave for a slow path when the bias learns
    learns = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    no_keys = not torch.compiler.is_compiling() and k.shape[2] == 0
    if not call.return_lse and _few_keys(k) and not _can_mask(bias):
        return _keys_first(q, k, v, bias, call.scale).transpose(1, 2), None
    if call.return_lse or learns or no_keys:
        out, lse = _plain(q, k, v, bias, call.scale, call.return_lse)
        return out.transpose(1, 2), None if lse is None else lse.transpose(1, 2)
    mask = bias if bias is None else bias.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale).transpose(1, 2)
    return settled(out), None


def _total_bias(call) -> Tensor | None:
    """bias and key_bias as one tensor with four dimensions that broadcasts to `[B, N, L, S]`."""
    bias = call.bias.dense() if isinstance(call.bias, PointBias) else call.bias
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
    if call.key_bias is None:
        return bias
    key_bias = call.key_bias[:, None, None, :]
    return key_bias if bias is None else bias + key_bias


def _plain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Scores, softmax, values; q `[B, N, L, D]`, k and v `[B, N, S, D]`. Rows without a key give 0 and -inf."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = ((q * scale) @ k.transpose(-2, -1)).to(wide)
    if bias is not None:
        scores = scores + bias.to(wide)
    if not return_lse and k.shape[2] != 0 and not _can_mask(bias):
        return scores.softmax(-1).to(q.dtype) @ v, None
    lse = safe_logsumexp(scores)
    return probabilities(scores, lse).to(q.dtype) @ v, lse


FEW_KEYS = 16
"""With fewer, a row of scores fills no vector of a CPU: at 9 keys a fused kernel takes four times as long as below."""


def _few_keys(k: Tensor) -> bool:
    """Whether k ``[B, N, S, D]`` is so short that a CPU had better put the keys first."""
    return not torch.compiler.is_compiling() and k.device.type == "cpu" and 0 < k.shape[2] < FEW_KEYS


def _keys_first(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The same with scores `[B, N, S, L]`, whose softmax runs along the queries, whole vectors at a time."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = ((k * scale) @ q.transpose(-2, -1)).to(wide)
    if bias is not None:
        scores = scores + bias.to(wide).transpose(-2, -1)
    return scores.softmax(-2).to(q.dtype).transpose(-2, -1) @ v


def _can_mask(bias: Tensor | None) -> bool:
    """Whether a row could be masked as a whole; -inf in a bias is only looked for where looking is free of graph breaks."""
    if bias is None:
        return False
    return torch.compiler.is_compiling() or bias.device.type != "cpu" or bool(torch.isneginf(bias).any())
