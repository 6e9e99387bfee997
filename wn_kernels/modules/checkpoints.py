"""A weight-normalised weight has one of three forms in a state dict. This file converts them.

weight_norm        weight_g, weight_v                          torch.nn.utils.weight_norm and ours
parametrizations   parametrizations.weight.original0, .original1    ...parametrizations.weight_norm
plain              weight                                      no weight norm, or folded
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import is_tensor_like

from .. import functional as WF
from .. import prepare
from ..call import Norm

# These are the names of g and v in each form.
FORMS = {
    "weight_norm": ("{}_g", "{}_v"),
    "parametrizations": ("parametrizations.{}.original0", "parametrizations.{}.original1"),
}


@functools.cache
def keys(form: str, name: str, prefix: str = "") -> tuple[str, str]:
    """Returns the keys of `g` and `v` in a form, for the tensor `name` of a layer."""
    g, v = FORMS[form]
    return prefix + g.format(name), prefix + v.format(name)


def magnitude(v: Tensor, dim: int | None, eps: float, norm: Norm) -> Tensor:
    """Returns the `g` that gives a weight equal to `v`: `max(‖V_j‖, eps)`, and 0 for a slice of
    zeros."""
    g = WF.slice_norm(v, dim=dim, norm=norm)
    return torch.where(g == 0, g, g.clamp(min=eps)) if eps else g


def split(
    weight: Tensor, v: Tensor, dim: int | None, eps: float, norm: Norm
) -> tuple[Tensor, Tensor]:
    """Returns `(g, v)` of a plain weight that replaces `v`.

    A slice of zeros gets `g = 0` and keeps its direction from `v`, so that it can still learn.
    """
    g = magnitude(weight, dim, eps, norm)
    if is_lazy(v) or v.shape != weight.shape or v.device != weight.device:
        return g, weight
    return g, torch.where(g == 0, v.detach().to(weight.dtype), weight)


def assign(weight: Tensor, g: Tensor, v: Tensor, dim: int | None, eps: float, norm: Norm) -> None:
    """Sets `g` and `v` so that the weight is `weight`.

    Raises:
        TypeError, ValueError: `weight` is not a tensor of `v`'s shape.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.shape != v.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {tuple(v.shape)}")
    with torch.no_grad():
        new_g, new_v = split(weight.to(v), v, dim, eps, norm)
        g.copy_(new_g)
        v.copy_(new_v)


def bring_into(
    form: str,
    state_dict: dict[str, Any],
    prefix: str,
    name: str,
    g: Tensor,
    v: Tensor,
    dim: int | None,
    eps: float,
    norm: Norm,
    others: Mapping[str, Tensor | None] | None,
) -> None:
    """Brings a layer's entries of `state_dict`, in place, into the form that the layer loads.

    If one of them does not fit, PyTorch reports it and the layer does not change. `others` are the
    layer's further parameters by name, or `None` for a layer that adapts its entries.
    """
    own_g, own_v = keys(form, name, prefix)
    for other in FORMS:
        for foreign, own in zip(keys(other, name, prefix), (own_g, own_v), strict=True):
            if foreign in state_dict and own not in state_dict:
                state_dict[own] = state_dict.pop(foreign)
    plain = prefix + name
    if plain in state_dict and own_g not in state_dict and own_v not in state_dict:
        weight = state_dict.pop(plain)
        if isinstance(weight, Tensor) and (is_lazy(v) or weight.shape == v.shape):
            if weight.dtype not in prepare.DTYPES:  # a layer of torch.nn loads it as well
                weight = weight.to(v.dtype)
            state_dict[own_g], state_dict[own_v] = split(weight, v, dim, eps, norm)
        else:
            state_dict[own_g], state_dict[own_v] = g, weight

    if others is not None:
        current = {own_g: g, own_v: v} | {prefix + key: t for key, t in others.items()}
        all_or_nothing(state_dict, current)


def other_parameters(module: nn.Module, stored: Container[str]) -> dict[str, Any] | None:
    """Returns the parameters of a layer without its `stored` ones, for `bring_into`."""
    if adapts(module, module._load_state_dict_pre_hooks.values()):
        return None
    return {key: t for key, t in module._parameters.items() if key not in stored}


def adapts(module: Any, hooks: Iterable[Any]) -> bool:
    """Returns whether a module may change entries of a state dict before it loads them: one of
    these hooks, or the loading method of its class, is neither PyTorch's nor of this package."""
    classes = type(module), getattr(type(module), "plain", nn.Module)
    functions = [cls._load_from_state_dict for cls in classes]
    functions += [getattr(hook, "hook", hook) for hook in hooks]
    own = "torch.nn.", "wn_kernels."
    return not all((getattr(f, "__module__", None) or "").startswith(own) for f in functions)


def all_or_nothing(
    state_dict: dict[str, Any],
    current: Mapping[str, Tensor | None],
    adapted: tuple[str, ...] = (),
) -> None:
    """Prevents a partial load. `current` holds the tensors that the entries are loaded into, by
    key. If one entry does not fit its tensor, the entries that fit are replaced by the current
    values. Modules change those whose keys begin with a prefix of `adapted`, which may fit then."""
    loaded = {
        key: t
        for key, t in current.items()
        if isinstance(t, Tensor) and not is_lazy(t) and key in state_dict
    }
    wrong = {
        key
        for key, t in loaded.items()
        if not (_fits(state_dict[key], t) or key.startswith(adapted))
    }
    if wrong:
        state_dict.update((key, t) for key, t in loaded.items() if key not in wrong)


def _fits(given: Any, current: Tensor) -> bool:
    """Returns whether PyTorch loads `given` into `current`. A single number may have a
    dimension."""
    if not is_tensor_like(given):
        return False
    return given.shape == current.shape or (current.ndim == 0 and given.shape == (1,))
