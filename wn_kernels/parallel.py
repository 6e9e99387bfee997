"""This module provides tensor parallelism for linear layers. Its classes are plans for
`parallelize_module`. They correspond to torch's own of the same names for a plain `nn.Linear`.

    from torch.distributed.tensor.parallel import parallelize_module
    from wn_kernels.parallel import ColwiseParallel, RowwiseParallel

    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

docs/distributed.md lists what each communicates. Importing this module imports
`torch.distributed`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel as _ColwiseParallel
from torch.distributed.tensor.parallel import RowwiseParallel as _RowwiseParallel

from .convert import fused
from .modules import checkpoints
from .modules.weight import WeightNormMixin


def _split(module: nn.Module, mesh: DeviceMesh, side: int) -> None:
    """Shards `V` along `side`. It also shards `g` and the bias if they extend along `side`."""
    if isinstance(module, WeightNormMixin):
        dim, form = module.dim, "weight_norm"
    elif fused.is_fused(module):
        dim, form, *_ = fused.norms(module)["weight"]
    else:
        return
    key_g, key_v = checkpoints.keys(form, "weight")
    _distribute(module, key_v, mesh, Shard(side))
    _distribute(module, key_g, mesh, Shard(side) if dim == side else Replicate())
    _distribute(module, "bias", mesh, Shard(0) if side == 0 else Replicate())


def _distribute(module: nn.Module, key: str, mesh: DeviceMesh, placement: Any) -> None:
    path, _, name = key.rpartition(".")
    holder = module.get_submodule(path)
    p = getattr(holder, name)
    if p is not None:
        shards = distribute_tensor(p.detach(), mesh, [placement])
        setattr(holder, name, nn.Parameter(shards, requires_grad=p.requires_grad))


class ColwiseParallel(_ColwiseParallel):
    """Splits the outputs: the rows of `V`, the bias and, for `dim=0`, `g`. The norms of `dim=0`
    then need no communication. The arguments are those of torch's class."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _split(module, device_mesh, 0)


class RowwiseParallel(_RowwiseParallel):
    """Splits the inputs: the columns of `V` and, for `dim=1`, of `g`. For `dim=0`, the sums of
    squares and, in the backward, the dots `⟨dW, V⟩` are reduced over the processes. Each reduction
    moves one number per output. The arguments are those of torch's class."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _split(module, device_mesh, 1)
