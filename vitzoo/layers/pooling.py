"""Pooling by attention: class tokens read the map, then are classified."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn

from vitzoo.layers.attention import check_heads
from vitzoo.layers.conv import BatchNorm
from vitzoo.layers.linear import Linear, Mlp
from vitzoo.ops import attend

torch.fx.wrap("attend")


class ClassAttention(nn.Module):
    """Class tokens read the map and go through an MLP; the map stays as it is (Touvron et al. 2021, arXiv:2103.17239).

        c = c + ls1(proj(softmax(q(norm c) k(norm [c, x])^T / sqrt(D)) v(norm [c, x])))
        c = c + ls2(mlp(norm c))

    Args:
        dim: channels C.
        num_heads: heads N; C divides by it.
        hidden: channels between the two layers of the MLP.
        layer_scale: initial value of a learned scale per channel on both branches; None for no scale.
        norm_eps: epsilon of the LayerNorms.
        read_classes: class tokens are among the keys; else they read the map alone.

    Shape: class tokens ``[B, P, C]`` and a map's ``[B, L, C]`` to ``[B, P, C]``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
        read_classes: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, check_heads(dim, num_heads)
        self.read_classes = read_classes
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.q, self.k, self.v, self.proj = (Linear(dim, dim) for _ in range(4))
        self.ls1 = LayerScale(dim, init_values=layer_scale) if layer_scale is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, hidden)
        self.ls2 = LayerScale(dim, init_values=layer_scale) if layer_scale is not None else nn.Identity()

    def project(self, c: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[B, P, N, D]``, k and v ``[B, S, N, D]``, the class tokens' first where they are read."""
        c, x = self.norm1(c), self.norm1(x)
        read = torch.cat([c, x], dim=1) if self.read_classes else x
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (self.q(c), self.k(read), self.v(read)))
        return q, k, v

    def forward(self, c: Tensor, x: Tensor) -> Tensor:
        c = c + self.ls1(self.proj(attend(*self.project(c, x)).flatten(-2)))
        return c + self.ls2(self.mlp(self.norm2(c)))

    def weights(self, c: Tensor, x: Tensor) -> Tensor:
        """What each class token takes of each token of the map, ``[B, N, P, L]``; what it takes of itself is cut off."""
        q, k, _ = self.project(c, x)
        scores = torch.einsum("bpnd,bsnd->bnps", q, k) * self.head_dim**-0.5
        return scores.softmax(dim=-1)[..., k.shape[1] - x.shape[1] :]


class ProjectedHead(nn.Module):
    """A linear layer on every token, batch norm, SiLU, the mean, a classifier (A2Mamba); ``fc``, ``num_features``, ``reset``.

    Args:
        dim: channels C of the map.
        hidden: channels behind the first layer. It is built with the first classifier, and goes with the pooling.
        num_classes: outputs; 0 for none.
        pool_type: "avg", or "" to pass the map as it is.
        drop_rate: dropout before the classifier.

    Shape: ``[B, C, h, w]`` to ``[B, num_classes]``.
    """

    def __init__(self, dim: int, hidden: int, num_classes: int, pool_type: str = "avg", drop_rate: float = 0.0) -> None:
        super().__init__()
        self.dim, self.hidden = dim, hidden
        self.num_features = dim
        self.pool_type = pool_type
        self.proj: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """A fresh classifier, and another pooling where given.

        Args:
            num_classes: outputs; 0 for none.
            pool_type: "avg", or "" to pass the map as it is; None to leave it.

        Raises:
            ValueError: another pooling, or classes without any.
        """
        like = next(self.parameters(), torch.empty(()))
        if pool_type is not None:
            if pool_type not in ("", "avg"):
                raise ValueError(f"This head pools by the mean: global_pool is 'avg' or '', got '{pool_type}'.")
            self.pool_type = pool_type
        if num_classes and not self.pool_type:
            raise ValueError(f"A classifier of {num_classes} classes needs pooled features. Set global_pool to 'avg'.")
        if not self.pool_type:
            self.num_features, self.proj, self.norm = self.dim, nn.Identity(), nn.Identity()
        elif num_classes and isinstance(self.proj, nn.Identity):
            self.num_features, self.proj, self.norm = self.hidden, Linear(self.dim, self.hidden), BatchNorm(self.hidden)
        self.fc: Any = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.to(like.device, like.dtype)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if not self.pool_type:
            return x
        x = x.permute(0, 2, 3, 1)
        if not isinstance(self.proj, nn.Identity):
            x = F.silu(self.norm(self.proj(x)))
        x = self.drop(x.mean(dim=(1, 2)))
        return x if pre_logits else self.fc(x)


class ClassAttentionHead(nn.Module):
    """Class tokens, class attention, LayerNorm, classifier; with ``fc``, ``num_features`` and ``reset`` as timm's heads.

    A family derives from it and says where class tokens come from (``classes``).

    Args:
        dim: channels C of the map.
        num_classes: outputs; 0 for none.
        num_heads: heads.
        hidden: hidden channels of the MLP.
        pool_type: "token", or "" to pass the map as it is; then only the classifier is left of the head.
        drop_rate: dropout before the classifier.
        layer_scale: initial value of the layer scale; None for none.
        norm_eps: epsilon of the LayerNorms.
        read_classes: class tokens are among the keys.

    Shape: ``[B, C, h, w]`` to ``[B, num_classes]``.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_heads: int,
        hidden: int,
        *,
        pool_type: str = "token",
        drop_rate: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
        read_classes: bool = True,
    ) -> None:
        super().__init__()
        self.num_features, self.num_heads, self.hidden = dim, num_heads, hidden
        self.pool_type: str | None = None
        self.layer_scale, self.norm_eps, self.read_classes = layer_scale, norm_eps, read_classes
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """A fresh classifier; with another ``pool_type`` the attention goes, or comes anew.

        Args:
            num_classes: outputs; 0 for none.
            pool_type: "token", or "" to pass the map as it is; None to leave it.

        Raises:
            ValueError: another pooling, or classes without any.
        """
        like = next(self.parameters(), torch.empty(()))
        if pool_type is not None and pool_type != self.pool_type:
            if pool_type not in ("", "token"):
                raise ValueError(f"This head pools by class attention: global_pool is 'token' or '', got '{pool_type}'.")
            self.pool_type = pool_type
            self.make_pooling()
        if num_classes and not self.pool_type:
            raise ValueError(f"A classifier of {num_classes} classes needs pooled features. Set global_pool to 'token'.")
        self.make_classifier(num_classes)
        self.to(like.device, like.dtype)

    def make_pooling(self) -> None:
        """Build what stands before the classifier; nothing where there is no pooling."""
        self.attention: ClassAttention | None = None
        self.norm: nn.Module = nn.Identity()
        if self.pool_type:
            dim, scale, eps = self.num_features, self.layer_scale, self.norm_eps
            self.attention = ClassAttention(
                dim, self.num_heads, self.hidden, layer_scale=scale, norm_eps=eps, read_classes=self.read_classes
            )
            self.norm = nn.LayerNorm(dim, eps=eps)

    def make_classifier(self, num_classes: int) -> None:
        """Build the classifier; an Identity without classes."""
        self.fc: Any = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def classes(self, x: Tensor) -> Tensor:
        """Class tokens ``[B, P, C]`` for the tokens ``[B, L, C]`` of a map."""
        raise NotImplementedError

    def classify(self, c: Tensor, x: Tensor) -> Tensor:
        """From normed class tokens ``[B, P, C]`` and the map's tokens ``[B, L, C]`` to ``[B, num_classes]``."""
        del x
        return self.fc(c[:, 0])

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.attention is None:
            return x
        x = x.flatten(2).transpose(1, 2)
        c = self.drop(self.norm(self.attention(self.classes(x), x)))
        return c.mean(dim=1) if pre_logits or isinstance(self.fc, nn.Identity) else self.classify(c, x)
