"""selective_scan in PyTorch: chunks side by side, then what each hands to the next.

Eager calls walk about sqrt(L) tokens in all chunks at once and about sqrt(L) chunks, with the gradient written out. A graph has
no loop whose length a size decides: there the tokens of a chunk meet in a triangle of fadings, in three levels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops.selective_scan.reference import wide

CHUNK = 16
"""Tokens of a chunk in a graph, and chunks of a group: a triangle takes as many numbers for each token."""


def supports(call: object) -> str | None:
    """Takes every call."""
    return None


def run(call) -> tuple[Tensor]:
    """(states,) of a `SelectiveScanCall`."""
    u, delta, a, b = (t.to(wide(*call)) for t in call)
    if torch.compiler.is_compiling():
        return (traced(delta * a, delta * b[..., None] * u),)
    return (_Scan.apply(u, delta, a, b),)


def scan(fade: Tensor, added: Tensor) -> Tensor:
    """``h[l] = fade[l] h[l - 1] + added[l]`` along dimension 1 of two tensors `[B, L, C]`; not differentiable."""
    B, L, C = added.shape
    if not added.numel():
        return torch.zeros_like(added)
    chunk = max(1, math.isqrt(L))
    count = -(-L // chunk)
    missing = (0, 0, 0, count * chunk - L)
    fades = F.pad(fade, missing, value=1.0).view(B, count, chunk, C).clone(memory_format=torch.contiguous_format)
    states = F.pad(added, missing).view(B, count, chunk, C).clone(memory_format=torch.contiguous_format)
    for t in range(1, chunk):
        states[:, :, t].addcmul_(fades[:, :, t], states[:, :, t - 1])
        fades[:, :, t] *= fades[:, :, t - 1]
    for i in range(1, count):
        states[:, i].addcmul_(fades[:, i], states[:, i - 1, -1:])
    return states.view(B, count * chunk, C)[:, :L]


def gradients(grad: Tensor, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, states: Tensor) -> tuple[Tensor, ...]:
    """du, ddelta, da, db of `states`, all in their dtype: the recurrence runs from the last token to the first."""
    fade = torch.exp(delta * a)
    following = F.pad(fade[:, 1:], (0, 0, 0, 1))  # what the state of a token is faded by on its way to the next
    dadded = scan(following.flip(1), grad.flip(1)).flip(1)
    before = F.pad(states[:, :-1], (0, 0, 1, 0))
    dlog = dadded * before * fade
    dstep = dadded * b[..., None]
    return dstep * delta, dlog * a + dstep * u, (dlog * delta).sum((0, 1)), (dadded * delta * u).sum(-1)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, a, b):
        states = scan(torch.exp(delta * a), delta * b[..., None] * u).contiguous()
        ctx.save_for_backward(u, delta, a, b, states)
        return states

    @staticmethod
    def backward(ctx, grad):
        return gradients(grad, *ctx.saved_tensors)


def traced(log_fade: Tensor, added: Tensor) -> Tensor:
    """The same from the logarithms of the fading, by operations that no size decides; differentiable.

    Tokens are gathered into groups of chunks and back: a view would ask whether a size divides.
    """
    L = added.shape[1]
    groups = (L + CHUNK * CHUNK - 1) // (CHUNK * CHUNK) + 1  # one idle group, so that their number is never 1
    group, chunk = torch.arange(groups, device=added.device), torch.arange(CHUNK, device=added.device)
    token = (group[:, None, None] * CHUNK + chunk[:, None]) * CHUNK + chunk
    missing = (token >= L)[..., None]
    logs, states = (t[:, token.clamp(max=L - 1)].masked_fill(missing, 0.0) for t in (log_fade, added))
    logs, states = _level(logs, states)
    # of each chunk, then of each group, the last token is what the next one meets
    chunk_logs, chunk_states = _level(logs[..., -1, :], states[..., -1, :])
    _, group_states = _level(chunk_logs[..., -1, :], chunk_states[..., -1, :])
    chunk_states = chunk_states + chunk_logs.exp() * _shifted(group_states)[..., None, :]
    met = torch.cat([_shifted(chunk_states[:, :, -1])[:, :, None], chunk_states[:, :, :-1]], dim=2)
    states = states + logs.exp() * met[..., None, :]
    token = torch.arange(L, device=added.device)
    return states[:, token // (CHUNK * CHUNK), token // CHUNK % CHUNK, token % CHUNK]


def _level(logs: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the logarithms, and states that begin from 0, along the dimension before the last: `[..., T, C]`."""
    T = logs.shape[-2]
    sums = logs.cumsum(-2)
    later = torch.arange(T, device=logs.device)
    allowed = later[:, None] >= later
    apart = (sums[..., :, None, :] - sums[..., None, :, :]).masked_fill(~allowed[..., None], float("-inf"))
    return sums, (apart.exp() * added[..., None, :, :]).sum(-2)


def _shifted(states: Tensor) -> Tensor:
    """Each one's predecessor along dimension 1, zeros for the first: `[B, n, C]`."""
    return F.pad(states, (0, 0, 1, -1))
