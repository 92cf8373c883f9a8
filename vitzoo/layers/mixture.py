"""Mixture of heads: each token weighs the heads of an attention, and takes only some of them.

Jin et al. 2024, arXiv:2410.11842 (MoH).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.layers.attention import TokenAttention
from vitzoo.layers.mixers import Slot, register_mixer
from vitzoo.ops import attend

for _name in ("attend", "weigh_heads"):
    torch.fx.wrap(_name)


def chances(x: Tensor, weight: Tensor) -> Tensor:
    """``softmax(W x)``: ``[..., C]`` and ``[R, C]`` to ``[..., R]``."""
    return (x @ weight.mT).softmax(-1)


def weigh_heads(
    x: Tensor, shared: Tensor | None, routed: Tensor | None, balance: Tensor | None, num_shared: int, topk: int
) -> tuple[Tensor, Tensor | None]:
    """The weight of every head at every token, section 3.2, and how unevenly routed heads are used, equation 9.

    Routers run in fp32 at least, so that half precision changes few choices.

    Args:
        x: tokens ``[B, ..., C]``.
        shared: what weighs shared heads, ``[S, C]``; None where S is 0 or 1.
        routed: what chooses among routed heads, ``[R, C]``; None without any.
        balance: what weighs both kinds, ``[2, C]``; None where there is one kind only.
        num_shared: heads that every token takes, the first ones.
        topk: routed heads that a token takes.

    Returns:
        Weights ``[B, ..., S + R]``, 1 each where every router is undecided, 0 for heads not taken; and a scalar, 1 where all
        routed heads are taken equally often, more else; None without routed heads.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        weights: list[Tensor] = []
        tokens, unevenness = x.to(wide), None
        if shared is not None:
            weights.append(num_shared * chances(tokens, shared.to(wide)))
        elif num_shared:
            weights.append(torch.ones_like(tokens[..., :1]))
        if routed is not None:
            chance = chances(tokens, routed.to(wide))
            with torch.no_grad():
                taken = torch.zeros_like(chance).scatter(-1, chance.topk(topk, dim=-1).indices, 1.0)
            kept = chance * taken
            weights.append(topk * kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).eps))
            dims = tuple(range(x.ndim - 1))
            unevenness = (chance.mean(dims) * taken.mean(dims)).mean() * routed.shape[0] ** 2
        if balance is not None:
            kinds = 2 * chances(tokens, balance.to(wide))
            weights = [weight * kinds[..., i : i + 1] for i, weight in enumerate(weights)]
        return torch.cat(weights, dim=-1).to(x.dtype), unevenness


class HeadRouter(nn.Module):
    """Weights of heads from tokens: ``[B, ..., C]`` to ``[B, ..., N]``. In training it keeps how unevenly it routed.

    Args:
        dim: channels C.
        num_heads: heads N.
        shared: heads that every token takes, the first ones.
        topk: heads that a token takes of the others; 0 where all are shared.

    Raises:
        ValueError: heads that are neither shared nor routed, or more to take than there are.
    """

    def __init__(self, dim: int, num_heads: int, shared: int, topk: int) -> None:
        super().__init__()
        routed = num_heads - shared
        if routed < 0 or not (1 <= topk <= routed if routed else topk == 0):
            raise ValueError(
                f"Of {num_heads} heads {shared} are shared and {topk} of the others taken, which cannot be. "
                "Share at most all of them, and take 1 to as many as are left."
            )
        self.num_shared, self.topk = shared, topk
        self.shared = nn.Linear(dim, shared, bias=False) if shared > 1 else None
        self.routed = nn.Linear(dim, routed, bias=False) if routed else None
        self.balance = nn.Linear(dim, 2, bias=False) if shared and routed else None
        self.unevenness: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        layers: tuple[Any, ...] = (self.shared, self.routed, self.balance)
        parts = [None if layer is None else layer.weight for layer in layers]
        weights = weigh_heads(x, parts[0], parts[1], parts[2], self.num_shared, self.topk)
        if self.training:
            self.unevenness = weights[1]
        return weights[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "unevenness": None}  # part of a graph, which cannot be copied

    def extra_repr(self) -> str:
        return f"shared={self.num_shared}, topk={self.topk}"


ROUTING_WEIGHT = 0.01
"""Of the routers' loss, beside that of the task; section 3.2."""


def routing_loss(model: nn.Module) -> Tensor | None:
    """The weighted mean of how unevenly the routers of a model routed in its last forward in training; None without any."""
    found = []
    for router in (m for m in model.modules() if isinstance(m, HeadRouter)):
        if router.unevenness is not None:
            found.append(router.unevenness)
            router.unevenness = None
    return ROUTING_WEIGHT * torch.stack(found).mean() if found else None


@register_mixer("mixture_of_heads", prefix=True)
class MixtureOfHeads(TokenAttention):
    """Softmax attention among all tokens, whose heads are shared or chosen by each token.

    ``proj(concat_i(g_i head_i))``, g from a router. All heads are computed; those not taken are multiplied by 0, as published.

    Args:
        slot: the place.
        shared: heads that every token takes; None: a fourth of them.
        topk: heads that a token takes of the others; None: half of them, at least one.

    Shape: ``[B, H, W, C]``, unchanged; tokens ``[B, P + H * W, C]`` in ``forward_tokens``.
    """

    def __init__(self, slot: Slot, *, shared: int | None = None, topk: int | None = None) -> None:
        super().__init__(slot.dim, slot.num_heads, qkv_bias=slot.qkv_bias, proj_drop=slot.proj_drop)
        shared = slot.num_heads // 4 if shared is None else shared
        routed = slot.num_heads - shared
        self.router = HeadRouter(slot.dim, slot.num_heads, shared, (routed + 1) // 2 if topk is None else topk)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_tokens(x.flatten(1, 2)).view_as(x)

    def forward_tokens(self, x: Tensor, height: int = 0, width: int = 0) -> Tensor:
        """Tokens ``[B, P + H * W, C]``, prefix tokens like all others."""
        del height, width
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        out = attend(q, k, v) * self.router(x).unsqueeze(-1)
        return self.proj_drop(self.proj(out.flatten(-2)))
