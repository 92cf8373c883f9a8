"""Heads for probing: what stands on the tokens of a frozen backbone and is all that is trained.

Each reads tokens ``[B, L, C]`` of a map (``[B, C, h, w]`` of the zoo's pyramids as ``x.flatten(2).transpose(1, 2)``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers.attention import check_heads
from vitzoo.ops import attend

torch.fx.wrap("attend")


class EfficientProbing(nn.Module):
    """M learned queries read the tokens themselves; each brings its share of the channels. Psomas et al. 2026.

        out = concat_m softmax(u_m x^T / sqrt(C)) v_m,    v = x W_v in M groups of channels

    "Attention, Please! Revisiting Attentive Probing", ICLR 2026. Published as ``EfficientProbing``, with a batch norm
    without parameters and a linear classifier behind it.

    Args:
        dim: channels C.
        num_queries: learned queries M.
        d_out: by how much the values have fewer channels; C divides by ``d_out * num_queries``.

    Shape: ``[B, L, C]`` to ``[B, C / d_out]``.

    Raises:
        ValueError: channels that do not divide.
    """

    def __init__(self, dim: int, num_queries: int = 32, d_out: int = 1) -> None:
        super().__init__()
        if dim % (d_out * num_queries):
            raise ValueError(
                f"{dim} channels do not divide by d_out {d_out} times {num_queries} queries. Choose fewer queries."
            )
        self.num_queries, self.scale = num_queries, dim**-0.5
        self.cls_token = nn.Parameter(torch.randn(1, num_queries, dim) * 0.02)
        self.v = nn.Linear(dim, dim // d_out, bias=False)

    def weights(self, x: Tensor) -> Tensor:
        """What each query takes of each token: ``[B, M, L]``."""
        return (self.scale * self.cls_token @ x.transpose(1, 2)).softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        values = self.v(x).unflatten(-1, (self.num_queries, -1))
        return torch.einsum("bml,blmd->bmd", self.weights(x), values).flatten(1)


class SimPool(nn.Module):
    """The mean of the tokens asks, their norms answer. Psomas et al. 2023, arXiv:2309.06891, in its attentive form.

        out = softmax((W_q mean(x)) (W_k n)^T / sqrt(D)) n,    n = LayerNorm(x)

    Args:
        dim: channels C.
        num_heads: heads N; C divides by it.
        qkv_bias: bias in both projections.

    Shape: ``[B, L, C]`` to ``[B, C]``.
    """

    def __init__(self, dim: int, num_heads: int = 1, qkv_bias: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, check_heads(dim, num_heads)
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6)
        self.wq = nn.Linear(dim, dim, bias=qkv_bias)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[B, 1, N, D]``, k and v ``[B, L, N, D]``."""
        n = self.norm_patches(x)
        heads = (self.num_heads, self.head_dim)
        q, k, v = self.wq(x.mean(dim=1, keepdim=True)), self.wk(n), n
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)

    def weights(self, x: Tensor) -> Tensor:
        """What is taken of each token: ``[B, N, 1, L]``."""
        q, k, _ = self.project(x)
        return (torch.einsum("bqnd,blnd->bnql", q, k) * self.head_dim**-0.5).softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return attend(*self.project(x)).flatten(1)


class MomentProbing(nn.Module):
    """Logits from a first moment and from second ones. Gao et al. 2023, arXiv:2307.11342.

    The first: a linear layer on the class token (or pooled features). The second: tokens projected to heads, the
    cross-covariances of neighbouring heads, two strided convolutions, a linear layer. The mean of both.

    As published, tokens are centred over themselves and their channels, each covariance has columns of unit length, and
    the size of the last layer is that of 4 heads of 128 channels.

    Args:
        in_dim: channels C.
        num_classes: outputs.
        hidden_dim: channels of all heads.
        num_heads: heads; at least two.

    Shape: class token ``[B, C]`` and tokens ``[B, L, C]`` to ``[B, num_classes]``.

    Raises:
        ValueError: one head, channels that do not divide, or heads too small for the convolutions.
    """

    def __init__(self, in_dim: int, num_classes: int, hidden_dim: int = 512, num_heads: int = 4) -> None:
        super().__init__()
        depth, pairs = check_heads(hidden_dim, num_heads), num_heads - 1
        if not pairs or depth < 7:
            raise ValueError(f"{num_heads} heads of {depth} channels: take at least 2 heads of at least 7 channels.")
        self.num_heads = num_heads
        self.proj = nn.Linear(in_dim, hidden_dim)
        self.ln = nn.LayerNorm(depth)
        convolutions = (nn.Conv2d(pairs, pairs, 3, stride=2, bias=False) for _ in range(2))
        first, second = convolutions
        self.downblocks = nn.ModuleList([nn.Sequential(first, nn.GELU(), second)])
        side = ((depth - 3) // 2 + 1 - 3) // 2 + 1
        self.classifier1 = nn.Linear(in_dim, num_classes)
        self.classifier2 = nn.Linear(pairs * side * side, num_classes)

    def moments(self, x: Tensor) -> Tensor:
        """Cross-covariances of neighbouring heads, ``[B, heads - 1, D, D]``, their columns of unit length."""
        z = self.ln(self.proj(x).unflatten(-1, (self.num_heads, -1))).transpose(1, 2)  # [B, heads, L, D]
        z = z - z.mean(dim=(2, 3), keepdim=True)
        return F.normalize(z[:, :-1].transpose(2, 3) @ z[:, 1:] / x.shape[1], dim=2)

    def forward(self, cls_token: Tensor, x: Tensor) -> Tensor:
        second = self.moments(x)
        for block in self.downblocks:
            second = block(second)
        return (self.classifier1(cls_token) + self.classifier2(second.flatten(1))) / 2
