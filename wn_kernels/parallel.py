"""Tensor parallelism for linear layers: plans for `parallelize_module`, as torch's own of the same
names are for a plain `nn.Linear`.

    from torch.distributed.tensor.parallel import parallelize_module
    from wn_kernels.parallel import ColwiseParallel, RowwiseParallel

    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

docs/distributed.md says what each moves. Importing this module imports `torch.distributed`.
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
    """Shards `V` along `side`, `g` and the bias with it where they lie along it."""
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
    """Splits the outputs: rows of `V` and the bias, and of `g` for `dim=0`, whose norms then need
    no communication. Arguments as torch's."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _split(module, device_mesh, 0)


class RowwiseParallel(_RowwiseParallel):
    """Splits the inputs: columns of `V`, and of `g` for `dim=1`. For `dim=0` the sums of squares
    are reduced over the processes, and the dots `⟨dW, V⟩` in the backward, a number for each
    output. Arguments as torch's."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _split(module, device_mesh, 1)
