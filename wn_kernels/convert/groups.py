"""This file gives a model the forward that prepares the weights of its layers.

The model gets a class of its own, a subclass of the one it had, as a fused layer does (`fused.py`).
Its `forward` is that of its base between `Group.begin` and `Group.end` (`modules/prepared.py`). It
is no hook: a compiler does not trace the hooks of the model that it compiles together with its
forward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..modules.prepared import Group
from ..modules.weight import NormedWeights, WeightNormMixin
from . import fused


def groupable(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the layers that can compute with a weight that was formed elsewhere."""
    for module in model.modules():
        if is_groupable(module):
            yield module


def is_groupable(module: Any) -> bool:
    """Returns whether a module is a layer of ours, or a fused one with the `forward` of one."""
    if not fused.is_fused(module):
        return isinstance(module, WeightNormMixin)
    layer = fused.known_layer(module.plain, *fused.norms(module))
    return layer is not None and issubclass(layer, WeightNormMixin)


def check(model: nn.Module) -> None:
    """Raises a `TypeError` if a model cannot be grouped."""
    name = type(model).__name__
    if any(True for _ in fused.computers(model)) or isinstance(model, NormedWeights):
        raise TypeError(f"{name} is weight-normed itself: a group needs a model that has layers")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{name} is a ScriptModule, whose class cannot change")
    if is_grouped(model) and "_grouped" not in vars(type(model)):
        raise TypeError(
            f"{name} is derived from the class of a grouped model, as `fully_shard` does"
        )


def group(model: Any) -> None:
    """Makes the model, which has passed `check`, compute the weights of its layers together."""
    ungroup(model)
    base: Any = type(model)
    model.__class__ = _class(base)
    model.__dict__["_group"] = Group(model, groupable(model))


def ungroup(model: Any) -> None:
    """Ends the group of a model, if it has one. A class that was derived from the model's stays."""
    if is_grouped(model):
        model.__dict__["_group"] = None
        if "_grouped" in vars(type(model)):
            model.__class__ = type(model)._grouped
            del model.__dict__["_group"]


def is_grouped(model: nn.Module) -> bool:
    """Returns whether the model's class is that of a grouped one."""
    return hasattr(type(model), "_grouped")


@functools.lru_cache(maxsize=256)
def _class(base: Any) -> Any:
    """Returns the class of grouped models. Models of one class get one class, because functions
    such as `torch.func.stack_module_state` compare the classes of models."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        members = self._group
        if members is None or members.model is not self:  # a replica has layers of its own
            return base.forward(self, *args, **kwargs)
        begun = members.begin()
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            members.end(begun)

    def __reduce_ex__(self: Any, protocol: Any) -> tuple:
        return _rebuild, (base,), *base.__reduce_ex__(self, protocol)[2:]

    namespace = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": __reduce_ex__,
        "_grouped": base,
        "forward": forward,
    }
    return type(base.__name__, (base,), namespace)


def _rebuild(base: Any) -> nn.Module:
    """Returns a grouped model without its contents, for `copy` and `pickle`."""
    model = base.__new__(base)
    model.__class__ = _class(base)
    return model
