"""Sparsifiner: sparse, instance-dependent attention. Wei et al. 2023, arXiv:2303.13755.

All tokens stay; every query keeps a few keys. A low-rank predictor in each block estimates the attention matrix from q and k
in fewer channels and fewer keys, and its largest entries say where the real attention looks. The choice has no gradient, so
the predictor first learns to reconstruct dense attention.

Deviations: a predictor belongs to one number of tokens and says so elsewhere; what it learns to reconstruct is the model's own
dense attention at that moment (published: that of a teacher with the same weights); the masked products are computed dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitzoo.layers import Linear
from vitzoo.ops import attend
from vitzoo.tokens._method import Method, Step, register
from vitzoo.tokens._parts import QKV
from vitzoo.tokens._policy import Teacher, logit_distillation, token_distillation
from vitzoo.tokens._schedule import check_rate
from vitzoo.tokens._state import State


class MaskPredictor(nn.Module):
    """A low-rank estimate of attention.

    Args:
        head_dim: channels D of a head.
        num_heads: heads N; the published scale of the scores is N ** -0.5.
        length: tokens L.
        reduce_n: L over the number m of combined keys.
        reduce_c: D over the channels in which they are compared.
        coefficients: how many of the m basis rows each query combines; None: those above ``least_coefficient``.
        least_coefficient: see above.
        least_basis: what of the basis' magnitude counts as zero.

    Shape: q, k ``[B, L, N, D]`` and, where tokens are masked, a policy ``[B, L]``; to coefficients ``[B, N, L - 1, m]`` and
    scores ``[B, N, L - 1, L]``, of all but the class token. Keys as published.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        length: int,
        *,
        reduce_n: float = 6,
        reduce_c: float = 2,
        coefficients: int | None = 8,
        least_coefficient: float = 5e-2,
        least_basis: float = 2e-2,
    ) -> None:
        super().__init__()
        self.scale = num_heads**-0.5
        self.coefficients, self.least_coefficient, self.least_basis = coefficients, least_coefficient, least_basis
        channels, rank = int(head_dim // reduce_c), max(1, int(length // reduce_n))
        self.proj_c_q = Linear(head_dim, channels)
        self.proj_c_k = Linear(head_dim, channels)
        self.proj_n = nn.Parameter(torch.empty(length, rank))
        self.proj_back_n = nn.Parameter(torch.empty(length, rank))
        for weight in (self.proj_c_q.weight, self.proj_c_k.weight, self.proj_n, self.proj_back_n):
            nn.init.trunc_normal_(weight, std=0.02)
        for linear in (self.proj_c_q, self.proj_c_k):
            nn.init.zeros_(linear.bias)

    def basis(self, signed: bool) -> Tensor:
        """Rows that attention is combined from, ``[m, L]``; raw while it learns to reconstruct."""
        rows = self.proj_back_n.T
        if signed:
            return rows
        rows = rows.abs()
        return torch.where(rows > self.least_basis, rows, 0.0)

    def forward(self, q: Tensor, k: Tensor, policy: Tensor | None = None, signed: bool = False) -> tuple[Tensor, Tensor]:
        if k.shape[1] != len(self.proj_n):
            raise ValueError(
                f"Sparsifiner's predictors were built for {len(self.proj_n)} tokens and got {k.shape[1]}. "
                "Reduce a model that was built for this image size."
            )
        q, k = self.proj_c_q(q), self.proj_c_k(k)
        if policy is not None:
            q, k = (t * policy[..., None, None] for t in (q, k))
        low = torch.einsum("bsnc,sm->bncm", k, self.proj_n)
        weight = (q[:, 1:].transpose(1, 2) @ low * self.scale).softmax(dim=-1)
        if signed:
            return weight, weight @ self.basis(signed)
        if self.coefficients is None:
            weight = torch.where(weight > self.least_coefficient, weight, 0.0)
        else:
            best = weight.topk(min(self.coefficients, weight.shape[-1]), dim=-1).indices
            weight = torch.zeros_like(weight).scatter(-1, best, weight.gather(-1, best))
        return weight, weight @ self.basis(signed)


def connect(scores: Tensor, keep: int | None, least: float = 1e-4, policy: Tensor | None = None) -> Tensor:
    """Keys that each query sees.

    Args:
        scores: estimated attention ``[B, N, L - 1, L]``.
        keep: the largest so many of every row; None: those above ``least``.
        least: see above.
        policy: ``[B, L]``: 0 for tokens that are masked, which only the class token still sees.

    Returns:
        ``[B, N, L, L]``, bool; the class token's row, the first, is whole. Not differentiable.
    """
    scores = scores.detach()
    if policy is not None:
        scores = torch.where(policy[:, None, None, :] > 0, scores, -torch.inf)
    if keep is None:
        mask = scores > least
    else:
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(keep, dim=-1).indices, True)
        mask = mask & scores.isfinite()
    return torch.cat([mask.new_ones(*mask.shape[:2], 1, mask.shape[3]), mask], dim=2)


@register("sparsifiner")
@dataclass(eq=False)
class Sparsifiner(Method):
    """Let every query see a few keys, and mask patches beside where asked.

    Attributes:
        attn_keep_rate: share of the keys that a query sees; or a list with one for every block.
        token_keep_rate: share of the patches left by the blocks of ``prune``; or a list with one for every block.
        prune: blocks that mask patches which the class token does not attend to.
        prune_rows: masked patches do not attend either.
        least_score: see keys by a threshold on estimated attention instead of by share.
        reduce_n: see ``MaskPredictor``.
        reduce_c: likewise.
        coefficients: likewise.
        least_coefficient: likewise.
        least_basis: likewise.
        reconstruct_epochs: epochs at the start of a training in which attention stays dense and predictors learn it
            (published: 5 of 50).
        distill: learn from a copy of the model as it is now.
        distill_weight: of the losses to the teacher's logits and patches.
    """

    NEEDS_CLASS: ClassVar[bool] = True

    attn_keep_rate: float | Sequence[float] = 0.25
    token_keep_rate: float | Sequence[float] = 1.0
    prune: Sequence[int] = ()
    prune_rows: bool = True
    least_score: float | None = None
    reduce_n: float = 6
    reduce_c: float = 2
    coefficients: int | None = 8
    least_coefficient: float = 5e-2
    least_basis: float = 2e-2
    reconstruct_epochs: float = 0.0
    distill: bool = True
    distill_weight: float = 0.5

    reconstruct: ClassVar[bool] = False

    def attach(self, model: Any) -> None:
        self.attn_rates, self.token_rates = (self._each(rate) for rate in (self.attn_keep_rate, self.token_keep_rate))
        self.where = frozenset(i for i, rate in enumerate(self.attn_rates) if rate < 1 or self.least_score is not None)
        self.pruned = frozenset(i for i in self.prune if self.token_rates[i] < 1)
        self.teacher = Teacher(model) if self.distill and self.where else None
        height, width = getattr(model, "grid_size", None) or model.patch_embed.grid_size
        for i in self.where:
            attn = model.blocks[i].attn
            like = attn.proj.weight
            predictor = MaskPredictor(
                attn.head_dim,
                attn.num_heads,
                height * width + self.prefix,
                reduce_n=self.reduce_n,
                reduce_c=self.reduce_c,
                coefficients=self.coefficients,
                least_coefficient=self.least_coefficient,
                least_basis=self.least_basis,
            )
            attn.mask_predictor = predictor.to(like.device, like.dtype)

    def _each(self, rate: float | Sequence[float]) -> list[float]:
        rates = [rate] * self.depth if isinstance(rate, int | float) else list(rate)
        if len(rates) != self.depth:
            raise ValueError(f"{len(rates)} keep rates for {self.depth} blocks. Give one for each, or one number.")
        return [check_rate(r) for r in rates]

    def detach(self, model: Any) -> None:
        for i in self.where:
            del model.blocks[i].attn.mask_predictor

    def reconstructs(self, step: Step) -> bool:
        """Whether predictors are learning dense attention at this point of a training."""
        early = self.epoch is not None and self.epoch < self.reconstruct_epochs
        return (early or self.reconstruct) and bool(step.parts.block.training)

    def divides(self, step: Step, state: State) -> bool:
        return step.layer in self.where or step.layer in self.pruned or state.policy is not None

    def connections(self, step: Step, state: State, qkv: QKV) -> tuple[Tensor | None, Tensor | None]:
        """Where this block's queries look ``[B, N, L, L]``, None for everywhere, and the estimated scores."""
        if step.layer not in self.where:
            return self._alive(None, state), None
        signed = self.reconstructs(step)
        _, scores = step.parts.attn.mask_predictor(qkv.q, qkv.k, state.policy, signed)
        keep = None if self.least_score is not None else math.ceil(self.attn_rates[step.layer] * state.x.shape[1])
        return self._alive(connect(scores, keep, self.least_score or 0.0, state.policy), state), scores

    def mix(self, step: Step, state: State, rope: Tensor | None) -> State:
        qkv = step.parts.project(self.read(step, state.x), rope)
        if state.policy is not None:
            alive = state.policy[..., None, None]
            qkv = qkv._replace(q=qkv.q * alive, k=qkv.k * alive, v=qkv.v * alive)
        mask, scores = self.connections(step, state, qkv)
        if scores is not None and self.reconstructs(step):
            dense = ((qkv.q * qkv.scale).transpose(1, 2) @ qkv.k.permute(0, 2, 3, 1)).softmax(dim=-1).detach()
            state = state._replace(extra=(*state.extra, (scores - dense[:, :, 1:]).square().sum() / dense.shape[0]))
            mask = None
        bias = None if mask is None else torch.where(mask, 0.0, -torch.inf).to(qkv.q.dtype)
        out = attend(qkv.q, qkv.k, qkv.v, bias=bias, scale=qkv.scale)
        y = step.parts.add(state.x, step.parts.output(out, state.x))
        return self._rank(step, state._replace(x=y), qkv, bias)

    def _alive(self, mask: Tensor | None, state: State) -> Tensor | None:
        """Masked patches do not attend where ``prune_rows`` says so, and no other patch sees them."""
        if state.policy is None:
            return mask
        alive = state.policy > 0
        length = alive.shape[1]
        if mask is None:
            seen = alive[:, None, None, :] | (torch.arange(length, device=alive.device) == 0)[:, None]
            mask = seen.expand(-1, 1, length, length)
        return mask & alive[:, None, :, None] if self.prune_rows else mask

    def _rank(self, step: Step, state: State, qkv: QKV, bias: Tensor | None) -> State:
        if step.layer not in self.pruned:
            return state
        row = torch.einsum("bnd,bsnd->bns", qkv.q[:, 0] * qkv.scale, qkv.k)
        row = row if bias is None else row + bias[:, :, 0]
        scores = row.softmax(dim=-1).mean(dim=1)[:, self.prefix :]
        count = math.ceil(self.token_rates[step.layer] * scores.shape[1])
        kept = torch.zeros_like(scores).scatter(1, scores.topk(count, dim=1).indices, 1.0)
        return state._replace(policy=torch.cat([kept.new_ones(kept.shape[0], self.prefix), kept], dim=1))

    def after(self, step: Step, state: State) -> State:
        return state if state.policy is None else state._replace(x=state.x * state.policy[..., None])

    def finish(self, state: State) -> Tensor:
        self.noted = {"reconstruction": state.extra, "tokens": state.x, "policy": state.policy}
        return state.x

    def loss(self, model: Any, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        """Reconstruction while predictors learn, the teacher afterwards."""
        noted, self.noted = self.noted, {}
        if not noted:
            return None
        if noted["reconstruction"]:
            return torch.stack(noted["reconstruction"]).sum()
        if self.teacher is None:
            return None
        features, taught = self.teacher(images)
        ours, theirs = model.norm(noted["tokens"])[:, self.prefix :], features[:, self.prefix :]
        alive = ours.new_ones(ours.shape[:2]) if noted["policy"] is None else noted["policy"][:, self.prefix :]
        return self.distill_weight * (logit_distillation(logits, taught) + token_distillation(ours, theirs, alive))
