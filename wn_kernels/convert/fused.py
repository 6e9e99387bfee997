"""Layers that PyTorch weight-normalised, made to compute with this package where they are.

Parameters, hooks and state dict stay as they were (`modules/checkpoints.py` has the two forms).
What changes is who computes with them:

- torch's forward pre-hook or parametrization gets a class of ours, whose weight comes from
  `functional.weight_norm`;
- a module with one such tensor and no other claim on it gets a class of its own besides, a subclass
  of the one it had. There the tensor is a property, and where `forward` was torch.nn's, it is that
  of our layer. One class for each module, so that `remove_parametrizations`, which deletes the
  property from the class and goes back to its first base, undoes one module alone; it is built anew
  when the module is copied or unpickled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from .. import functional as WF
from ..backends.shapes import canonical_dim
from ..modules import checkpoints, conv, linear
from ..modules.weight import Operands, WeightNormMixin

# Our layer, by torch.nn's.
LAYERS: dict[type[nn.Module], type[WeightNormMixin]] = {
    nn.Linear: linear.WNLinear,
    nn.Conv1d: conv.WNConv1d,
    nn.Conv2d: conv.WNConv2d,
    nn.Conv3d: conv.WNConv3d,
    nn.ConvTranspose1d: conv.WNConvTranspose1d,
    nn.ConvTranspose2d: conv.WNConvTranspose2d,
    nn.ConvTranspose3d: conv.WNConvTranspose3d,
}

# What of torch.nn's layers our forward stands for.
_FORWARD = ("forward", "_conv_forward")


class Hook(WeightNorm):
    """torch's forward pre-hook, with our weight."""

    def compute_weight(self, module: nn.Module) -> Tensor:
        g, v = (getattr(module, key) for key in checkpoints.keys("weight_norm", self.name))
        return WF.weight_norm(v, g, dim=self.dim)


class LayerHook(Hook):
    """The hook of a module whose class computes the weight: `torch.nn.utils.remove_weight_norm`
    has to find it, and there is nothing else left for it to do."""

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        pass

    def remove(self, module: nn.Module) -> None:
        _bake(module)


class Parametrization(_WeightNorm):
    """torch's parametrization, with our weight."""

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        return WF.weight_norm(weight_v, weight_g, dim=self.dim)


def known_layer(base: type[nn.Module], name: str) -> type[WeightNormMixin] | None:
    """Our layer whose `forward` does what that of `base` does, if there is one."""
    if name != "weight":
        return None
    for plain, layer in LAYERS.items():
        if issubclass(base, plain) and all(
            getattr(base, method, None) is getattr(plain, method, None) for method in _FORWARD
        ):
            return layer
    return None


def _layer_class(base: type[nn.Module], name: str, dim: int | None, form: str) -> Any:
    """The class of one module: `base` with the tensor `name` as a property."""
    key_g, key_v = checkpoints.keys(form, name)
    stored_g, stored_v = key_g.rpartition(".")[2], key_v.rpartition(".")[2]
    nested = form == "parametrizations"

    def holder(self: Any) -> Any:
        return self._modules["parametrizations"]._modules[name] if nested else self

    def tensors(self: Any) -> tuple[Tensor, Tensor]:
        where = holder(self)
        own = where._parameters
        g, v = own.get(stored_g), own.get(stored_v)
        if g is None or v is None:  # replaced by somebody
            return getattr(where, stored_g), getattr(where, stored_v)
        return g, v

    def operands(self: Any) -> Operands:
        g, v = tensors(self)
        own = self._parameters
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401 (lazily)
        return v, g, bias, dim, 0.0

    def read(self: Any) -> Tensor:
        g, v = tensors(self)
        return WF.weight_norm(v, g, dim=dim)

    def set_attribute(self: Any, key: str, value: Any) -> None:
        if key == name and isinstance(getattr(type(self), name, None), property):
            checkpoints.assign(value, *tensors(self), dim)
        else:
            base.__setattr__(self, key, value)

    def reduce(self: Any, protocol: Any) -> tuple:
        return _rebuild, (base, name, dim, form), *base.__reduce_ex__(self, protocol)[2:]

    def bring_into_form(self: Any, state_dict: dict[str, Any], prefix: str) -> None:
        others = {key: t for key, t in self._parameters.items() if key not in (stored_g, stored_v)}
        checkpoints.bring_into(form, state_dict, prefix, name, *tensors(self), dim, others)

    def load(self: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        bring_into_form(self, state_dict, prefix)
        base._load_from_state_dict(self, state_dict, prefix, *rest)

    def extra_repr(self: Any) -> str:
        own = base.extra_repr(self)
        return f"{own}{', ' if own else ''}weight_norm(dim={dim})"

    namespace: dict[str, Any] = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": reduce,
        "__setattr__": set_attribute,
        "_bring_into_form": bring_into_form,
        "_load_from_state_dict": load,
        "_operands": operands,
        "_weight_norm_of": (name, dim, form),
        "extra_repr": extra_repr,
        name: property(read),
    }
    layer = known_layer(base, name)
    if layer is not None:
        namespace["forward"] = layer.forward
    return type(base.__name__, (base,), namespace)


def _rebuild(base: type[nn.Module], name: str, dim: int | None, form: str) -> nn.Module:
    """A fused module without its contents, for `copy` and `pickle`."""
    module = base.__new__(base)
    module.__class__ = _layer_class(base, name, dim, form)
    return module


def is_fused(module: nn.Module) -> bool:
    """Whether a module has a class of its own."""
    return hasattr(type(module), "_weight_norm_of")


def is_wrapped(module: nn.Module) -> bool:
    """Whether somebody has derived another class from a fused module's, as `fully_shard` does."""
    return is_fused(module) and "_weight_norm_of" not in vars(type(module))


def options(module: Any) -> tuple[str, int | None, str]:
    """`(name, dim, form)` of a fused module."""
    return type(module)._weight_norm_of


def tensors(module: Any) -> tuple[Tensor, Tensor]:
    """`(g, v)` of a fused module."""
    name, _, form = options(module)
    g, v = (_attribute(module, key) for key in checkpoints.keys(form, name))
    return g, v


def _attribute(module: nn.Module, key: str) -> Any:
    path, _, name = key.rpartition(".")
    return getattr(module.get_submodule(path), name)


def fuse(module: nn.Module, name: str, dim: int | None, form: str) -> None:
    """Gives a module that holds `g` and `v` in this form a class of its own."""
    base: Any = parametrize.type_before_parametrizations(module)
    if form == "parametrizations":
        _drop_load_hook(module)
    else:
        module.__dict__.pop(name, None)
    ndim = _attribute(module, checkpoints.keys(form, name)[1]).ndim
    module.__class__ = _layer_class(base, name, canonical_dim(dim, ndim), form)


def _drop_load_hook(module: nn.Module) -> None:
    """torch's, for the older form's keys: our class does its work, and it cannot be pickled."""
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        function = getattr(hook, "hook", hook)
        if getattr(function, "__module__", None) == parametrizations.__name__:
            del hooks[key]


def unfuse(module: Any) -> None:
    """Gives a fused module back to PyTorch, with the parameters it has."""
    name, dim, form = options(module)
    g, v = tensors(module)
    module.__class__ = type(module).__bases__[0]
    if form == "weight_norm":
        hook = next((h for h in module._forward_pre_hooks.values() if _is_hook(h, name)), None)
        if hook is None:
            hook = WeightNorm(name, -1 if dim is None else dim)
            module.register_forward_pre_hook(hook)
        hook.__class__ = WeightNorm
        setattr(module, name, hook.compute_weight(module))
    else:
        del module.parametrizations
        module.register_parameter(name, v)
        parametrizations.weight_norm(module, name, -1 if dim is None else dim)
        originals = module.parametrizations[name]
        originals.original0, originals.original1 = g, v


def fold(module: Any) -> None:
    """Leaves a fused module with a plain weight, of the class it had before weight norm."""
    name, _, _ = options(module)
    _bake(module)
    for key, hook in list(module._forward_pre_hooks.items()):
        if _is_hook(hook, name):
            del module._forward_pre_hooks[key]


def _bake(module: Any) -> None:
    name, dim, form = options(module)
    g, v = tensors(module)
    weight = _plain(v, g, dim, 0.0)
    module.__class__ = type(module).__bases__[0]
    if form == "parametrizations":
        del module.parametrizations
    _replace_parameters(module, name, weight)


def fold_own(module: Any) -> None:
    """The same for a layer of this package."""
    weight = _plain(module.weight_v, module.weight_g, module.dim, module.eps)
    module.__class__ = next(plain for plain, own in LAYERS.items() if type(module) is own)
    del module.__dict__["dim"], module.__dict__["eps"]
    _replace_parameters(module, "weight", weight)


def _plain(v: Tensor, g: Tensor, dim: int | None, eps: float) -> nn.Parameter:
    with torch.no_grad():
        weight = WF.weight_norm(v, g, dim=dim, eps=eps)
    return nn.Parameter(weight, requires_grad=v.requires_grad or g.requires_grad)


def _replace_parameters(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Puts the weight first, as torch.nn's layers have it, in the place of `g` and `v`."""
    gone = checkpoints.keys("weight_norm", name)
    rest = {key: t for key, t in module._parameters.items() if key not in gone}
    module._parameters.clear()
    module.register_parameter(name, weight)
    module._parameters.update(rest)


def _is_hook(hook: Callable, name: str) -> bool:
    return isinstance(hook, WeightNorm) and hook.name == name


def parametrized(module: Any) -> dict[str, Any]:
    """torch's parametrization lists by tensor, none where the module has none."""
    return dict(module.parametrizations.items()) if parametrize.is_parametrized(module) else {}
