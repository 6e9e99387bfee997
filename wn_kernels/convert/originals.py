"""This file makes what PyTorch itself gives to a parametrized module, by PyTorch's own functions:
its class, the properties of that class, and the hook for the keys of the older form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize


def property_of(name: str) -> property:
    """Returns the property that PyTorch adds to a class for a parametrized tensor."""
    module = nn.Module()
    module.register_buffer(name, torch.zeros(()))
    parametrize.register_parametrization(module, name, nn.Identity())
    return vars(type(module))[name]


def give_class(module: nn.Module, normed: Iterable[str] = ()) -> None:
    """Gives the module PyTorch's class of a parametrized module, and PyTorch's hook for the keys of
    the older form.

    PyTorch's functions make both, from placeholders that replace the module's own parametrizations
    meanwhile.
    """
    modules = dict(module._modules)
    lists: Any = module._modules.pop("parametrizations", None)
    if lists is None:
        return
    lists.__class__ = nn.ModuleDict
    with torch.inference_mode(False):
        for name in lists:
            module._parameters[name] = nn.Parameter(torch.zeros(1, 1))
            if name in normed:
                parametrizations.weight_norm(module, name)
            else:
                parametrize.register_parametrization(module, name, nn.Identity())
    module._modules.clear()
    module._modules.update(modules)


def drop_load_hook(module: nn.Module) -> None:
    """Drops PyTorch's hook for the keys of the older form. Our class does its work, and the hook
    cannot be pickled."""
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        function = getattr(hook, "hook", hook)
        if getattr(function, "__module__", None) == parametrizations.__name__:
            del hooks[key]
