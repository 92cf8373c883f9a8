"""What FAN and RVT share here: pooling in front of attention, and the diversification loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitzoo.layers import Block
from vitzoo.layers.tap import PooledNorm, heard_diversification, listen
from vitzoo.models._pyramid import Pyramid, PyramidConfig


@dataclass(frozen=True)
class RobustConfig(PyramidConfig):
    """Adds to the pyramid's choices; a stage begins by going down wherever the width changes.

    Attributes:
        patch_size: pixels per token of the first stage.
        num_scales: neighbourhoods that a token chooses from, itself among them.
        diversify: weight of the diversification loss, published: 1; 0 keeps nothing for it.
    """

    patch_size: int = 16
    num_scales: int = 4
    diversify: float = 1.0

    def goes_down(self, i: int) -> bool:
        """Whether stage ``i`` begins with a smaller map than the one before ends with."""
        return i > 0 and self.dims[i] != self.dims[i - 1]

    def place(self, index: int, first: int = 0) -> tuple[int, int]:
        """Stage and block of the ``index``-th block, counted from the beginning of stage ``first``."""
        while index >= self.depths[first]:
            index, first = index - self.depths[first], first + 1
        return first, index

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.patch_size * 2 ** sum(self.goes_down(k) for k in range(i + 1)) for i in range(len(self.depths)))


class Robust(Pyramid):
    """A pyramid whose attention reads pooled tokens and whose queries are driven apart."""

    cfg: RobustConfig

    def pooled(self, i: int, block: Block) -> Block:
        """The block with its tokens pooled before attention."""
        block.norm1 = PooledNorm(self.cfg.dims[i], self.cfg.num_scales)
        return block

    def forward_features(self, x: Tensor) -> Tensor:
        if not (self.training and self.cfg.diversify):
            return super().forward_features(x)
        listen(self, True)
        x = super().forward_features(x)
        listen(self, False)  # what a checkpoint computes again is not to be kept
        return x

    def extra_loss(self, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        """The weighted diversification loss of the last forward in training; None without one.

        Args:
            images: not looked at; every ``extra_loss`` takes them, and the next two.
            labels: see ``images``.
            logits: see ``images``.

        Returns:
            A scalar, or None.
        """
        del images, labels, logits
        loss = heard_diversification(self)
        return None if loss is None else self.cfg.diversify * loss
