"""FSDP2: weights, gradients and optimiser states divided among the devices (PyTorch's ``fully_shard``)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

__all__ = ["FSDP2", "blocks_of", "shard"]

_ENTRANCES = ("forward_features", "forward_intermediates", "forward_head", "with_aux")  # called beside ``forward``


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy over all devices of all nodes; checkpoints are whole files, as those of one device.

    ``--trainer.strategy fsdp2`` on the command line.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Count the devices, which Lightning leaves to the configuration."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2, description="weights divided among all devices by PyTorch's fully_shard")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: what lies in lists called ``blocks``, else the members of its outermost lists."""
    named = [module for name, module in model.named_modules() if name.rpartition(".")[0].rpartition(".")[2] == "blocks"]
    return named or [
        part for child in model.children() if isinstance(child, (nn.ModuleList, nn.Sequential)) for part in child.children()
    ]


def shard(model: nn.Module, mesh: Any) -> None:
    """Divide a model among the data-parallel devices of a mesh, block by block, so that one block at a time is whole.

    Args:
        model: in place.
        mesh: Of Lightning's ``ModelParallelStrategy``, with the dimension "data_parallel".
    """
    part = mesh["data_parallel"]
    for block in blocks_of(model):
        if next(block.parameters(), None) is not None:
            fully_shard(block, mesh=part)
    fully_shard(model, mesh=part)
    for name in _ENTRANCES:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
