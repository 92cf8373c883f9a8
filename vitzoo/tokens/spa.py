"""SPA: select and pack attention. Zhang et al. 2024, arXiv:2410.23608.

A gate selects tokens; those of all images of a batch are written one after the other into containers of one length, and
attention runs inside the containers, between tokens of one image. The others keep their residual. How many are selected
differs from image to image, and nothing is padded but the last container.

Deviations: no code is published; on a plain transformer a container is as long as a whole sequence unless said otherwise,
prefix tokens are always selected, and without boxes a loss holds the share of selected tokens (published: labels drawn from
boxes, which ``selection_loss`` takes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.layers import Linear
from vitzoo.ops import attend
from vitzoo.tokens._method import Method, Step, register
from vitzoo.tokens._parts import NotReducibleError
from vitzoo.tokens._policy import gumbel
from vitzoo.tokens._schedule import check_layers, check_rate
from vitzoo.tokens._state import State


class Packed(NamedTuple):
    """Tokens of several images, one after the other.

    Attributes:
        place: ``[T]``: where each stands among the ``B * L`` tokens of the batch; ascending, so image by image.
        image: ``[T]``: which image it is from.
    """

    place: Tensor
    image: Tensor


def pack(selected: Tensor) -> Packed:
    """What is selected ``[B, L]``, bool, of a batch: as many as there are, so the length depends on the images."""
    index = selected.flatten().nonzero()[:, 0]
    return Packed(index, index // selected.shape[1])


def packed_attend(q: Tensor, k: Tensor, v: Tensor, image: Tensor, container: int, scale: float | None = None) -> Tensor:
    """Attention inside containers of consecutive tokens, between tokens of one image.

    Args:
        q: ``[T, N, D]``.
        k: likewise.
        v: likewise.
        image: ``[T]``: which image each token is from.
        container: tokens in a container; the last is padded.
        scale: factor of q . k; D ** -0.5 unless given.

    Returns:
        ``[T, N, D]``.
    """
    count = len(q)
    fill = -count % container
    tiles = [F.pad(t, (0, 0, 0, 0, 0, fill)).unflatten(0, (-1, container)) for t in (q, k, v)]
    owner = F.pad(image, (0, fill), value=-1).view(-1, container)
    together = (owner[:, :, None] == owner[:, None, :])[:, None]
    bias = torch.where(together, 0.0, -torch.inf).to(q.dtype)
    return attend(*tiles, bias=bias, scale=scale).flatten(0, 1)[:count]


def selection_loss(gates: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of the gates ``[B, N]`` with what should be selected ``[B, N]``, 0 or 1: the published supervision."""
    return torch.stack([F.binary_cross_entropy_with_logits(gate, labels.to(gate.dtype)) for gate in gates]).sum()


@register("spa")
@dataclass(eq=False)
class SPA(Method):
    """Attention among selected tokens only.

    Attributes:
        keep_rate: share of the patches that the loss without labels aims at; 1: nothing is selected, all attend.
        layers: blocks that select; None: the second half.
        container: tokens in a container; None: prefix and all patches of an image.
        threshold: what a gate's probability must exceed in evaluation.
        ratio_weight: of the loss on the share of selected patches.
    """

    keep_rate: float = 0.5
    layers: Sequence[int] | None = None
    container: int | None = None
    threshold: float = 0.5
    ratio_weight: float = 2.0

    noise = staticmethod(gumbel)

    def attach(self, model: Any) -> None:
        if self.rotary:
            raise NotReducibleError("its positions are rotary, and packed tokens have lost theirs")
        layers = range(self.depth // 2, self.depth) if self.layers is None else self.layers
        self.where = frozenset(check_layers(layers, self.depth)) if check_rate(self.keep_rate) < 1 else frozenset()
        like = next(model.blocks.parameters())
        for i in self.where:
            model.blocks[i].gate = Linear(model.embed_dim, 1).to(like.device, like.dtype)

    def detach(self, model: Any) -> None:
        for i in self.where:
            del model.blocks[i].gate

    def divides(self, step: Step, state: State) -> bool:
        return step.layer in self.where

    def mix(self, step: Step, state: State, rope: Tensor | None) -> State:
        parts, x = step.parts, state.x
        batch, length, channels = x.shape
        gate = parts.block.gate(x[:, self.prefix :])[..., 0]
        if parts.block.training:
            both = torch.stack([gate, torch.zeros_like(gate)], dim=-1)
            soft = (both + self.noise(both)).softmax(dim=-1)[..., 0]
            hard = (soft > 0.5).to(soft.dtype)
            chosen = hard - soft.detach() + soft
            state = state._replace(extra=(*state.extra, (gate, chosen)))
        else:
            chosen = (gate.sigmoid() > self.threshold).to(x.dtype)
        weight = torch.cat([x.new_ones(batch, self.prefix), chosen * gate.sigmoid()], dim=1)
        selected = torch.cat([x.new_ones(batch, self.prefix, dtype=torch.bool), chosen.detach() > 0.5], dim=1)
        packed = pack(selected)
        h = (parts.read(x) * weight[..., None]).reshape(batch * length, channels).index_select(0, packed.place)
        q, k, v, scale, *_ = parts.project(h[None], None)
        out = packed_attend(q[0], k[0], v[0], packed.image, self.container or length, scale)
        y = parts.output(out[None], h[None])[0]
        whole = y.new_zeros(batch * length, channels).index_copy(0, packed.place, y)
        return state._replace(x=parts.add(x, whole.view(batch, length, channels)))

    def finish(self, state: State) -> Tensor:
        self.noted = {"chosen": state.extra} if state.extra else {}
        return state.x

    def loss(self, model: Any, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        """Squared distance of each block's share of selected patches from ``keep_rate``."""
        chosen = self.noted.pop("chosen", ())
        if not chosen:
            return None
        shares = torch.stack([choice.mean() for _, choice in chosen])
        return self.ratio_weight * (shares - self.keep_rate).square().mean()
