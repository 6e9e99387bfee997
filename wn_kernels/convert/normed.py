"""This file lists the weight-normed tensors of a model, whichever form they have: layers of this
package, layers that `fuse` converted, and both forms of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from ..call import Norm, canonical_dim
from ..modules import checkpoints
from ..modules.weight import NormedWeights
from . import fused


@dataclass(frozen=True)
class Normed:
    """Describes a weight-normed tensor of a model.

    Attributes:
        name: the module's name in the model, and the tensor's name if that is not `weight`.
        module: the module that uses the tensor.
        tensor: the tensor's name in the module.
        dim: the dimension whose slices are normalised, or `None` for the whole tensor.
        eps: the smallest norm.
        norm: the norm of a slice, as in `Call`.
        form: the form of the state dict (`modules/checkpoints.py`).
    """

    name: str
    module: Any
    tensor: str
    dim: int | None
    eps: float
    norm: Norm
    form: str

    @property
    def kind(self) -> str:
        """Returns the name of the module's class."""
        return fused.kind(self.module)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Returns `(g, v)`. They are parameters, unless `fault` says otherwise."""
        holder, *keys = _place(self.module, self.tensor, self.form)
        g, v = (getattr(holder, key) for key in keys)
        return g, v

    @property
    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Returns the parameters that `g` is, or is computed from, and those of `v`."""
        holder, *keys = _place(self.module, self.tensor, self.form)
        g, v = (_origins(holder, key) for key in keys)
        return g, v

    @property
    def is_transposed(self) -> bool:
        """Returns whether the weight is that of a transposed convolution, whose rows are inputs."""
        return getattr(self.module, "transposed", False)

    @property
    def groups(self) -> int:
        """Returns the number of groups of a convolution, and 1 for any other layer."""
        return getattr(self.module, "groups", 1)

    def refresh(self) -> None:
        """Computes the plain attribute in which PyTorch's older form keeps the weight."""
        for hook in self.module._forward_pre_hooks.values():
            if type(hook) is WeightNorm and hook.name == self.tensor:
                with torch.enable_grad():
                    setattr(self.module, self.tensor, hook.compute_weight(self.module))

    @property
    def fault(self) -> str:
        """Returns why `g` and `v` do not determine the weight, or an empty string if they do."""
        if fused.is_replaced(self.module, self.tensor):
            return "its g or v is itself computed"
        if fused.is_stacked(self.module, self.tensor):
            return "a second parametrization of the tensor"
        return ""

    @property
    def layer(self) -> type[NormedWeights] | None:
        """Returns our linear layer or convolution whose `forward` does what that of the module
        does, or `None`."""
        cls: Any = type(self.module)
        if not issubclass(cls, (nn.Linear, _ConvNd)):
            return None
        if isinstance(self.module, NormedWeights):
            ours = (layer for layer in fused.LAYERS.values() if issubclass(cls, layer))
            return next((layer for layer in ours if cls.forward is layer.forward), None)
        base = self.module.plain if fused.is_fused(self.module) else None
        base = base or parametrize.type_before_parametrizations(self.module)
        return fused.known_layer(base, self.tensor)


def weights(model: nn.Module) -> Iterator[Normed]:
    """Yields the weight-normed tensors of a model in the order of its modules. A module that occurs
    several times is visited once.

    Raises:
        ValueError: a lazy layer has no shape yet.
    """
    for prefix, module in model.named_modules():
        for found in _found(module):
            tensor = found[0]
            parts = [prefix] if tensor == "weight" else [prefix, tensor]
            normed = Normed(".".join(filter(None, parts)), module, *found)
            if any(is_lazy(t) for t in normed.tensors):
                raise ValueError(f"{normed.name} has no shape yet: run the model once")
            yield normed


def _place(module: nn.Module, tensor: str, form: str) -> tuple[nn.Module, str, str]:
    """Returns the module that holds `g` and `v`, and their names in it."""
    key_g, key_v = checkpoints.keys(form, tensor)
    key_g, key_v = (key.rpartition(".")[2] for key in (key_g, key_v))
    holder = fused.parametrized(module)[tensor] if form == "parametrizations" else module
    return holder, key_g, key_v


def _origins(holder: nn.Module, key: str) -> list[nn.Parameter]:
    """Returns the parameters of a tensor, which may be pruned or parametrized itself."""
    if key in fused.parametrized(holder):
        return list(fused.parametrized(holder)[key].parameters())
    own = (holder._parameters.get(name) for name in (key, f"{key}_orig"))
    return [p for p in own if p is not None]


def _found(module: Any) -> Iterator[tuple[str, int | None, float, Norm, str]]:
    if isinstance(module, NormedWeights):
        for tensor in module._normed():
            yield tensor, module.dim, module.eps, module.norm, "weight_norm"
        return
    fused_norms = fused.norms(module)
    for tensor, norm in fused_norms.items():
        yield tensor, norm.dim, 0.0, norm.norm, norm.form
    for tensor, form, computer in fused.computers(module):
        if tensor not in fused_norms:
            holder, _, key_v = _place(module, tensor, form)
            dim = canonical_dim(computer.dim, getattr(holder, key_v).ndim)
            yield tensor, dim, 0.0, "l2", form
