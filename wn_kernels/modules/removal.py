"""This file removes weight norm: a plain weight replaces `g` and `v`. Our functions and both of
PyTorch's can do it, whichever form the layer has.

`torch.nn.utils.remove_weight_norm(module, name)` searches `module._forward_pre_hooks.items()` for
a `WeightNorm` of that name, and calls its `remove`. `Hooks` is a dictionary that lists such a
`Handle` in `items()` and nowhere else. It is empty unless a hook is registered, so that a forward
has no extra cost.

`torch.nn.utils.parametrize.remove_parametrizations(module, name)` reads `module.parametrizations`.
It takes the tensor's entry out, deletes the property from the module's class and registers the
parameter. When no tensor is parametrized any more, it gives the module the class's first base.
`Parametrizations` replaces that dictionary on a layer that has none. Its length is zero, so that
`is_parametrized(module)` stays false. The layer finishes the removal when the parameter is
registered (`finish`).

These functions need four methods of a module:

    _normed()                   returns the names of its weight-normed tensors
    _tensors(name)              returns the `g` and `v` of one
    _expose(name)               gives the module a class that may be changed
    _bake(name, weight=None)    replaces the `g` and `v` of one by a plain parameter
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from .. import functional as WF
from ..call import Norm
from . import checkpoints, reading

# --- the weight ----------------------------------------------------------------------------------


def plain_weight(weight: Tensor, requires_grad: bool) -> nn.Parameter:
    """Returns a parameter of these values. It can be trained and saved even if it was made under
    inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        values = weight.clone() if weight.is_inference() else weight.detach()
        return nn.Parameter(values, requires_grad=requires_grad)


def baked(v: Tensor, g: Tensor, dim: int | None, eps: float, norm: Norm) -> nn.Parameter:
    """Returns the weight of `v` and `g` as a parameter. It is trainable if one of them is."""
    with torch.inference_mode(False), torch.no_grad():
        weight = WF.weight_norm(v, g, dim=dim, eps=eps, norm=norm)
    return plain_weight(weight, v.requires_grad or g.requires_grad)


def check_held(module: nn.Module, name: str, holder: nn.Module, keys: Iterable[str]) -> None:
    """Checks that `g` and `v` are parameters of the module that should hold them.

    Raises:
        RuntimeError: one of them is itself computed, as by pruning.
    """
    for key in keys:
        if key not in holder._parameters:
            raise RuntimeError(
                f"{name} of {type(module).__name__} cannot become a plain parameter: its {key} is "
                "pruned or parametrized; make that permanent first, with "
                "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations"
            )


def order(module: Any) -> list[str]:
    """Returns the names of a recurrent layer's parameters in torch.nn's order."""
    if isinstance(module, nn.RNNBase):
        return module._flat_weights_names
    is_cell = isinstance(module, nn.RNNCellBase)
    return ["weight_ih", "weight_hh", "bias_ih", "bias_hh"] if is_cell else []


def place(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Registers the weight in torch.nn's order and removes `name_g` and `name_v`. The weight comes
    first, or at its place among the weights of a recurrent layer."""
    gone = (name, *checkpoints.keys("weight_norm", name))
    parameters = {name: weight} | {k: t for k, t in module._parameters.items() if k not in gone}
    names = order(module)
    parameters = dict(
        sorted(parameters.items(), key=lambda item: names.index(item[0]) if item[0] in names else 0)
    )
    for key in reading.STATE:
        module.__dict__.pop(key, None)
    module._buffers.pop(name, None)
    module._parameters.clear()
    module._parameters.update(parameters)


# --- what torch.nn.utils.remove_weight_norm finds ------------------------------------------------


class Handle(WeightNorm):
    """This forward pre-hook has no effect. PyTorch's removal function searches for it."""

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        pass

    def remove(self, module: Any) -> None:
        hooks = module._forward_pre_hooks
        keys = [key for key, hook in OrderedDict.items(hooks) if hook is self]
        module._bake(self.name)
        for key in keys:
            hooks[key] = self  # `remove_weight_norm` deletes it


def _key(name: str) -> Any:
    """Returns the key of a handle. The keys of hooks are integers."""
    return f"weight_norm of {name}"


class Hooks(OrderedDict):
    """Holds the forward pre-hooks of a layer. Only `items()` and `values()` list the handles. In
    the latter, `torch.nn.utils.weight_norm` finds that the layer is weight-normed already.

    Args:
        names: the weight-normed tensors.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        super().__init__()
        self.handles = {_key(name): Handle(name, -1) for name in names}

    def items(self) -> Any:
        return [*super().items(), *self.handles.items()]

    def values(self) -> Any:
        return [hook for _, hook in self.items()]

    def __delitem__(self, key: Any) -> None:
        if isinstance(key, str):
            self.handles.pop(key, None)
        else:
            super().__delitem__(key)

    def __reduce__(self) -> tuple:
        names = tuple(handle.name for handle in self.handles.values())
        kind, arguments = (type(self), (names,)) if names else (OrderedDict, ())
        return kind, arguments, None, None, iter(list(super().items()))


def attach(module: nn.Module, names: Iterable[str]) -> None:
    """Adds a handle for each name to the module's forward pre-hooks."""
    hooks: Any = module._forward_pre_hooks
    if not hooks and not isinstance(hooks, Hooks):
        module.__dict__["_forward_pre_hooks"] = Hooks(names)
        return
    # A dictionary with hooks stays the same object, because the handles of its hooks refer to it.
    handles = hooks.handles if isinstance(hooks, Hooks) else hooks
    for name in names:
        handles[_key(name)] = Handle(name, -1)


def detach(module: nn.Module, name: str) -> None:
    """Removes the handle of a name, and PyTorch's hook if there is one."""
    hooks: Any = module._forward_pre_hooks
    handles = hooks.handles if isinstance(hooks, Hooks) else hooks
    handles.pop(_key(name), None)
    for key, hook in list(OrderedDict.items(hooks)):
        if isinstance(hook, WeightNorm) and hook.name == name:
            del hooks[key]


# --- what torch.nn.utils.parametrize.remove_parametrizations finds -------------------------------


class Parametrizations(nn.ModuleDict):
    """Replaces `module.parametrizations` of a layer that is not parametrized, for PyTorch's removal
    function.

    It stores nothing, so its length is zero. But it contains each weight-normed tensor.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.__dict__["of"] = module

    def __contains__(self, name: Any) -> bool:
        return name in self.__dict__["of"]._normed()

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return Parametrization(self.__dict__["of"], name)

    def __getattr__(self, name: str) -> Any:
        return self[name] if name in self else super().__getattr__(name)

    def __delitem__(self, name: str) -> None:
        pass  # `finish` does it


def parametrizations(module: Any) -> nn.ModuleDict:
    """Returns `module.parametrizations`: PyTorch's, or what stands in its place."""
    own = module.__dict__.get("_modules", {}).get("parametrizations")
    return Parametrizations(module) if own is None else own


class Parametrization:
    """Replaces one tensor's list of parametrizations. It has the attributes that
    `remove_parametrizations` reads of a list with one original tensor."""

    is_tensor = True

    def __init__(self, module: Any, name: str) -> None:
        self.module = module
        self.name = name

    @property
    def original(self) -> nn.Parameter:
        """Returns the parameter that receives the weight. It gives the module a class of its own,
        from which the property may be deleted."""
        return self.module._expose(self.name)

    @property
    def original0(self) -> Tensor:
        """Returns `g`, which has this name in PyTorch."""
        return self.module._tensors(self.name)[0]

    @property
    def original1(self) -> Tensor:
        """Returns `v`, which has this name in PyTorch."""
        return self.module._tensors(self.name)[1]

    def append(self, parametrization: nn.Module) -> None:
        """Refuses a second parametrization, as PyTorch's hook form does.

        Raises:
            ValueError: always.
        """
        layer = type(self.module).__name__
        raise ValueError(
            f"{type(parametrization).__name__} cannot be registered on {self.name!r} of {layer}, "
            f"which holds {self.name}_g and {self.name}_v: normalise the layer with "
            "torch.nn.utils.parametrizations.weight_norm to stack parametrizations on it, or "
            f"register on {self.name}_g or {self.name}_v"
        )


class Lists(nn.ModuleDict):
    """Replaces `module.parametrizations` of a fused layer. It records whether the tensor that was
    removed last is trained, because `remove_parametrizations` loses this under `no_grad`."""

    trainable = True

    def __delitem__(self, key: str) -> None:
        self.__dict__["trainable"] = any(p.requires_grad for p in originals(self[key]))
        super().__delitem__(key)

    def _get_name(self) -> str:
        return "ModuleDict"


def originals(parametrization: Any) -> list[Tensor]:
    """Returns `[g, v]` of one of PyTorch's lists of parametrizations."""
    return [parametrization.original0, parametrization.original1]


def finish(module: Any, name: str, weight: Tensor | None) -> None:
    """Finishes the removal when `remove_parametrizations` registers the weight."""
    module._bake(name, weight)
    if parametrize.is_parametrized(module):
        return
    # Next, it deletes `module.parametrizations` and gives the module the first base of its class.
    module._modules.setdefault("parametrizations", nn.ModuleDict())
    after = type(module)
    module.__class__ = type(after.__name__, (after,), {"__module__": after.__module__})
