"""A transformer block taken apart: norm, projection, attention's output, residual, MLP. Ours, timm's ViT and timm's EVA.

Blocks and attentions are recognised by the forward that they run, so a subclass that computes something else is refused.
Only public classes of timm are named here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from vitzoo.layers import Block, TokenAttention
from vitzoo.ops import attend
from vitzoo.ops.attend.api import computes_lse


class NotReducibleError(ValueError):
    """A model or block that cannot be reduced; the message says why."""


class QKV(NamedTuple):
    """What attention works on: q, k, v ``[B, L, N, D]``, normalised and rotated, and the factor of q . k.

    ``lse``: the log-sum-exp of the class token's scores ``[B, N]``, where attention has computed it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    dropout: float = 0.0
    lse: Tensor | None = None


class Parts:
    """How one block falls apart.

    Args:
        block: ours, timm's ``Block`` or ``ResPostBlock``, or EVA's.

    Raises:
        NotReducibleError: another block or attention.
    """

    def __init__(self, block: nn.Module) -> None:
        forward: Any = type(block).forward
        known: dict[Any, bool] = {
            vision_transformer.Block.forward: False,
            vision_transformer.ResPostBlock.forward: True,
            eva.EvaBlock.forward: False,
            eva.EvaBlockPostNorm.forward: True,
            Block.forward: bool(getattr(block, "post_norm", False)),
        }
        if forward not in known:
            raise NotReducibleError(
                f"a {type(block).__name__} does not run attention and MLP one after the other in a way that is known here"
            )
        self.block: Any = block
        self.attn: Any = block.attn
        self.post_norm = known[forward]
        self.ours = forward is Block.forward
        attends: Any = getattr(type(self.attn), "forward", None)
        if attends not in (
            TokenAttention.forward,
            Attention.forward,
            AttentionRope.forward,
            eva.EvaAttention.forward,
        ):
            raise NotReducibleError(f"the attention {type(self.attn).__name__} is not one that is known here")

    # -- attention ------------------------------------------------------------------------------------------------

    def read(self, x: Tensor) -> Tensor:
        """What the attention sees of the residual stream: normed, in a pre-norm block."""
        return x if self.post_norm else self.block.norm1(x)

    def project(self, h: Tensor, rope: Tensor | None) -> QKV:
        """q, k and v of tokens ``[B, L, C]``."""
        attn = self.attn
        if getattr(attn, "qkv", None) is not None:
            q, k, v = self._packed(h).view(*h.shape[:2], 3, attn.num_heads, attn.head_dim).unbind(2)
        else:
            q, k, v = (linear(h).view(*h.shape[:2], -1, attn.head_dim) for linear in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            q, k = (self._rotate(t, rope).type_as(v) for t in (q, k))
        groups = getattr(attn, "num_kv_groups", 1)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        drop = getattr(attn, "attn_drop", None)
        rate = drop.p if drop is not None and attn.training else 0.0
        return QKV(q, k, v, attn.head_dim**-0.5, rate)

    def _packed(self, h: Tensor) -> Tensor:
        attn = self.attn
        if getattr(attn, "q_bias", None) is None:
            return attn.qkv(h)
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        return attn.qkv(h) + bias if attn.qkv_bias_separate else F.linear(h, attn.qkv.weight, bias)

    def _rotate(self, t: Tensor, rope: Tensor) -> Tensor:
        prefix = self.attn.num_prefix_tokens
        turned = apply_rot_embed_cat(t[:, prefix:].transpose(1, 2), rope, half=self.attn.rotate_half).transpose(1, 2)
        return torch.cat([t[:, :prefix], turned.to(t.dtype)], dim=1)

    def output(self, out: Tensor, h: Tensor) -> Tensor:
        """Attention's result ``[B, L, N, D]`` through norm, gate and projection; ``h`` is what its queries were read from."""
        attn, out = self.attn, out.flatten(-2)
        if getattr(attn, "norm", None) is not None:
            out = attn.norm(out)
        if getattr(attn, "gate", None) is not None:
            out = out * attn.gate(h).sigmoid()
        return attn.proj_drop(attn.proj(out))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual stream after attention: scale, drop path and, in a post-norm block, norm.

        ``y`` is what ``output`` gave, the caller's own, and may be written to.
        """
        block = self.block
        if self.ours:
            return block.join(x, y)
        if self.post_norm:
            y = block.norm1(y)
        if getattr(block, "ls1", None) is not None:
            y = block.ls1(y)
        elif getattr(block, "gamma_1", None) is not None:
            y = block.gamma_1 * y
        return x + block.drop_path1(y)

    # -- MLP ------------------------------------------------------------------------------------------------------

    def feed(self, x: Tensor) -> Tensor:
        """The second half of the block; ``x`` is the caller's own and may be written to."""
        block = self.block
        if self.ours:
            return block.feed(x)
        y = block.norm2(block.mlp(x)) if self.post_norm else block.mlp(block.norm2(x))
        if getattr(block, "ls2", None) is not None:
            y = block.ls2(y)
        elif getattr(block, "gamma_2", None) is not None:
            y = block.gamma_2 * y
        return x + block.drop_path2(y)


def softmax_attend(qkv: QKV, key_bias: Tensor | None = None) -> Tensor:
    """Attention of q to k and v, a bias ``[B, S]`` on the keys: ``[B, L, N, D]``."""
    q, k, v, scale, dropout, _ = qkv
    if dropout:
        mask = None if key_bias is None else key_bias[:, None, None, :].to(q.dtype)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale).transpose(1, 2)
    return attend(q, k, v, key_bias=key_bias, scale=scale)


def attend_with_lse(qkv: QKV, key_bias: Tensor | None = None) -> tuple[Tensor, QKV]:
    """``softmax_attend``, and the same q, k, v with the class token's log-sum-exp where that costs nothing."""
    if qkv.dropout or not computes_lse(qkv.q, qkv.k, qkv.v, key_bias=key_bias, scale=qkv.scale):
        return softmax_attend(qkv, key_bias), qkv
    out, lse = attend(qkv.q, qkv.k, qkv.v, key_bias=key_bias, scale=qkv.scale, return_lse=True)
    return out, qkv._replace(lse=lse[:, 0])


def class_attention(qkv: QKV, key_bias: Tensor | None = None) -> Tensor:
    """What the class token (token 0) attends to: ``[B, N, S]``, one row of every head's softmax, in at least fp32.

    One product of one query with the keys: no attention matrix, and no second softmax where attention has left its
    log-sum-exp.
    """
    q, k = qkv.q, qkv.k
    scores = (q[:, :1] * qkv.scale * k).sum(dim=-1).transpose(1, 2)  # [B, N, S]; a matrix product would copy k first
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if key_bias is not None:
        scores = scores + key_bias[:, None, :]
    return scores.softmax(dim=-1) if qkv.lse is None else (scores - qkv.lse[..., None]).exp()
