"""This file makes layers that PyTorch weight-normalised compute with this package, in place.

Parameters, hooks and state dict stay as they were (`modules/checkpoints.py` lists the two forms).
The computation of the weight changes:

- PyTorch's forward pre-hook or parametrization gets a class of ours, which computes the weight by
  `functional.weight_norm`.
- The module gets a class of its own, a subclass of the one it had (`layer_class`). There each
  weight-normed tensor is a property. If the module's `forward` was that of torch.nn, it becomes
  that of our layer. Every module has its own class, because `remove_parametrizations` deletes the
  property from the class and then gives the module the first base of that class. A copied or
  unpickled module gets a new class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from .. import call
from .. import functional as WF
from ..call import canonical_dim
from ..modules import checkpoints, conv, linear, reading, recurrent, removal
from ..modules.norms import Norm, parts, weights
from ..modules.weight import NormedWeights, Operands, WeightNormMixin
from . import operands, originals

# This maps each layer of torch.nn to ours.
LAYERS: dict[type[nn.Module], type[NormedWeights]] = {
    layer.plain: layer
    for layer in (
        linear.WNLinear,
        conv.WNConv1d,
        conv.WNConv2d,
        conv.WNConv3d,
        conv.WNConvTranspose1d,
        conv.WNConvTranspose2d,
        conv.WNConvTranspose3d,
        recurrent.WNRNN,
        recurrent.WNLSTM,
        recurrent.WNGRU,
        recurrent.WNRNNCell,
        recurrent.WNLSTMCell,
        recurrent.WNGRUCell,
    )
}

# Our `forward` replaces these methods of torch.nn's layers.
_FORWARD = ("forward", "_conv_forward")


class Hook(removal.Handle):
    """Replaces PyTorch's forward pre-hook on a module whose class computes the weight.

    Attributes:
        norm: the norm of a slice. PyTorch has no other than l2.
    """

    norm: call.Norm = "l2"

    def compute_weight(self, module: nn.Module) -> Tensor:
        return getattr(module, self.name)


class Parametrization(_WeightNorm):
    """Replaces PyTorch's parametrization. It computes the weight with this package."""

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        return WF.weight_norm(weight_v, weight_g, dim=self.dim)


# --- the class of a fused module -----------------------------------------------------------------


class _Fused:
    """Holds the methods of the class of a fused module. They are copied into that class, whose only
    base has to be the class that the module had."""

    plain: Any  # the class that the module had
    _norms: dict[str, Norm]

    def _normed(self: Any) -> tuple[str, ...]:
        return tuple(self._norms)

    def _holder(self: Any, name: str) -> Any:
        """Returns the module that holds `g` and `v`."""
        if self._norms[name].form == "weight_norm":
            return self
        return self._modules["parametrizations"]._modules[name]

    def _holders(self: Any) -> dict[str, dict[str, Any]] | None:
        """Returns the parameters of what holds `g` and `v` of a weight, if it is not the layer, or
        `None` if another parametrization claims a weight."""
        stacked = [name for name, norm in self._norms.items() if norm.form != "weight_norm"]
        holders = {name: self._holder(name) for name in stacked}
        claimed = any(map(is_claimed, holders.values()))
        return None if claimed else {name: h._parameters for name, h in holders.items()}

    def _tensors(self: Any, name: str) -> tuple[Tensor, Tensor]:
        """Returns `(g, v)`."""
        norm = self._norms[name]
        return parts(self._holder(name), norm.key_g, norm.key_v)

    def _normalisation(self: Any, name: str = "weight") -> tuple[int | None, float, call.Norm]:
        """Returns `(dim, eps, norm)`."""
        norm = self._norms[name]
        return norm.dim, 0.0, norm.norm

    def _held(self: Any) -> tuple[dict[str, Any], str, str]:
        """Returns where `g` and `v` are held: a dictionary and their keys."""
        norm = self._norms["weight"]
        return self._holder("weight")._parameters, norm.key_g, norm.key_v

    def _operands(self: Any) -> Operands | None:
        """Returns the operands of our `forward`, or `None` if it has to form the weight."""
        find = None if is_compiling() else operands.find
        if find is not None and (found := find(self, self._rule)) is not None:
            return found
        norm, holder = self._norms["weight"], self
        if norm.form != "weight_norm":
            holder = self._modules["parametrizations"]._modules["weight"]
            if is_claimed(holder):
                return None
        if self._is_read:
            reading.warn_of_writes(self)
        g, v = parts(holder, norm.key_g, norm.key_v)
        own = self._parameters
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401 (lazily)
        return v, g, bias, norm.dim, 0.0, norm.norm

    _prepared_weight = WeightNormMixin._prepared_weight
    __prepare_scriptable__ = NormedWeights.__prepare_scriptable__

    def _is_claimed(self: Any, name: str) -> bool:
        """Returns whether more than `g` and `v` of the layer determines a weight."""
        norm, holder = self._norms[name], self._holder(name)
        if not {norm.key_g, norm.key_v} <= holder._parameters.keys():  # as by pruning
            return True
        return holder is not self and is_claimed(holder)

    def _form(self: Any, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the weight in the dtype of `v`, or in a wider one."""
        norm, holder = self._norms[name], self._holder(name)
        if holder is not self and is_claimed(holder):
            weight = holder()
            return weight if dtype is None else weight.to(dtype)
        g, v = parts(holder, norm.key_g, norm.key_v)
        wide = v if dtype is None else v.to(dtype)
        return WF.weight_norm(wide, g, dim=norm.dim, norm=norm.norm)

    def _forms(
        self: Any, names: Sequence[str], places: Mapping[str, Tensor] | None
    ) -> list[Tensor]:
        """Returns several weights. One call computes those that no other parametrization
        claims."""
        holders = {name: self._holder(name) for name in names}
        claimed = {n: h() for n, h in holders.items() if h is not self and is_claimed(h)}
        free = {name: self._norms[name] for name in names if name not in claimed}
        tensors = [parts(holders[name], norm.key_g, norm.key_v) for name, norm in free.items()]
        to = [places[name] for name in free] if places else None
        dims, kinds = ([getattr(norm, key) for norm in free.values()] for key in ("dim", "norm"))
        computed = weights(tensors, to, dims, norm=kinds)
        found = claimed | dict(zip(free, computed, strict=True))
        return [found[name] for name in names]

    def apply(self: Any, fn: Callable[[nn.Module], None]) -> Any:
        """Does what `nn.Module.apply` does. Writes of `fn` into the weight take effect."""
        return reading.apply(self, fn)

    def __setattr__(self: Any, key: str, value: Any) -> None:
        if key not in self._norms:
            self.plain.__setattr__(self, key, value)
            return
        if is_stacked(self, key):
            self._holder(key).right_inverse(value)
        else:
            g, v = self._tensors(key)
            checkpoints.assign(value, g, v, *self._normalisation(key))
        reading.forget(self)

    def __reduce_ex__(self: Any, protocol: Any) -> tuple:
        state, *rest = self.plain.__reduce_ex__(self, protocol)[2:]
        state = state | {"_store": None}
        if isinstance(self, nn.RNNBase):
            state["_flat_weights"] = [None] * len(self._flat_weights_names)
        others = [tensor for tensor in parametrized(self) if tensor not in self._norms]
        return _rebuild, (self.plain, self._norms, others), state, *rest

    def _bring_into_form(self: Any, state_dict: dict[str, Any], prefix: str) -> None:
        stored = {key for norm in self._norms.values() for key in (norm.key_g, norm.key_v)}
        others = checkpoints.other_parameters(self, stored)
        for name, norm in self._norms.items():
            g, v = self._tensors(name)
            dim, eps, kind = self._normalisation(name)
            checkpoints.bring_into(
                norm.form, state_dict, prefix, name, g, v, dim, eps, kind, others
            )

    def _load_from_state_dict(
        self: Any, state_dict: dict[str, Any], prefix: str, *rest: Any
    ) -> None:
        self._bring_into_form(state_dict, prefix)
        self.plain._load_from_state_dict(self, state_dict, prefix, *rest)

    def extra_repr(self: Any) -> str:
        own = self.plain.extra_repr(self)
        if list(self._norms) == ["weight"]:
            norms = self._norms["weight"].options()
        else:
            norms = ", ".join(f"{name}: {norm.options()}" for name, norm in self._norms.items())
        return f"{own}{', ' if own else ''}weight_norm({norms})"

    # The following methods serve the removal of weight norm (modules/removal.py).

    def register_parameter(self: Any, name: str, param: Any) -> None:
        if name in self._norms:
            removal.finish(self, name, param)
        else:
            self.plain.register_parameter(self, name, param)

    def register_buffer(self: Any, name: str, tensor: Any, persistent: bool = True) -> None:
        if name in self._norms:  # PyTorch registers a weight without gradient as a buffer
            removal.finish(self, name, tensor)
        else:
            self.plain.register_buffer(self, name, tensor, persistent)

    def _expose(self: Any, name: str) -> nn.Parameter:
        if is_wrapped(self):
            raise TypeError(f"{type(self).__name__} is derived from the class of a fused layer")
        g, v = self._tensors(name)
        return removal.baked(v, g, self._norms[name].dim, 0.0, self._norms[name].norm)

    def _bake(self: Any, name: str, weight: Tensor | None = None) -> None:
        """Replaces `g` and `v` by a plain weight. `weight` is given if they are removed already."""
        if self._norms[name].form == "weight_norm":
            weight = _baked_parameter(self, name)
            for key in checkpoints.keys("weight_norm", name):
                del self._parameters[key]
        else:
            if weight is None:
                weight = _baked_parameter(self, name)
                del self.parametrizations[name]
            weight = removal.plain_weight(weight, self.parametrizations.trainable)
            if not self.parametrizations:
                del self._modules["parametrizations"]
        rest = {key: norm for key, norm in self._norms.items() if key != name}
        _set_class(self, self.plain, rest)
        removal.place(self, name, weight)
        removal.detach(self, name)
        if isinstance(self, nn.RNNBase):
            self._init_flat_weights()


class _OwnForward(recurrent.FlatWeights):
    """Holds the methods of a fused recurrent layer that has a `forward` of its own. That of
    torch.nn finds the weights in a list, which holds them until the next call."""

    def _update_flat_weights(self: Any) -> None:
        self._flat_weights = recurrent.flat_weights(self)


def layer_class(base: Any, norms: dict[str, Norm], others: Iterable[str] = ()) -> Any:
    """Returns the class of one fused module.

    Args:
        base: the class that the module had.
        norms: its weight-normed tensors. Each becomes a property.
        others: its tensors that have parametrizations, but no weight norm.
    """
    operands.connect()
    layer = known_layer(base, *norms)
    methods = dict(vars(_Fused))
    if issubclass(base, nn.RNNBase):
        methods |= vars(recurrent.FlatWeights)
        methods |= vars(_OwnForward) if layer is None else {}
    namespace = {key: value for key, value in methods.items() if callable(value)}
    namespace |= {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "_is_read": False,
        "_norms": norms,
        "_rules": {name: (n.key_g, n.key_v, n.dim, 0.0, n.norm) for name, n in norms.items()},
        "_rule": operands.rule(norms["weight"], Parametrization) if "weight" in norms else None,
        "_store": None,
        "_traced": None,
        "_watches": reading.WATCHES,
        "plain": base,
    }
    if not any(norm.form == "parametrizations" for norm in norms.values()):
        namespace["parametrizations"] = property(removal.parametrizations)
    if layer is not None:
        namespace["forward"] = layer.forward
    namespace |= {name: reading.reader(name) for name in norms}
    namespace |= {name: originals.property_of(name) for name in others}
    return type(base.__name__, (base,), namespace)


def known_layer(base: type[nn.Module], *names: str) -> type[NormedWeights] | None:
    """Returns our layer whose `forward` does what that of `base` does, or `None`."""
    for plain, layer in LAYERS.items():
        serves = (
            bool(names) if issubclass(layer, recurrent.RecurrentMixin) else names == ("weight",)
        )
        if (
            serves
            and issubclass(base, plain)
            and all(
                getattr(base, method, None) is getattr(plain, method, None) for method in _FORWARD
            )
        ):
            return layer
    return None


def _rebuild(base: type[nn.Module], norms: dict[str, Norm], others: list[str]) -> nn.Module:
    """Returns a fused module without its contents, for `copy` and `pickle`."""
    module = base.__new__(base)
    module.__class__ = layer_class(base, norms, others)
    return module


def _set_class(module: nn.Module, base: Any, norms: dict[str, Norm]) -> None:
    """Gives the module the class for these weight-normed tensors and its other parametrized
    tensors."""
    others = [tensor for tensor in parametrized(module) if tensor not in norms]
    if norms:
        module.__class__ = layer_class(base, norms, others)
    else:
        module.__class__ = base
        originals.give_class(module)


# --- what a module is ----------------------------------------------------------------------------


def parametrized(module: Any) -> dict[str, Any]:
    """Returns PyTorch's lists of parametrizations by tensor. It is empty if the module has none."""
    children = module._modules  # a look-up of an attribute that is missing costs 2 µs
    if "parametrizations" not in children or not parametrize.is_parametrized(module):
        return {}
    return dict(children["parametrizations"].items())


def is_fused(module: nn.Module) -> bool:
    """Returns whether a module has the class of a fused one."""
    return hasattr(type(module), "_norms")


def is_wrapped(module: nn.Module) -> bool:
    """Returns whether a fused module's class was derived from, as `fully_shard` does."""
    return is_fused(module) and "_norms" not in vars(type(module))


def kind(module: nn.Module) -> str:
    """Returns the name of a module's class, without the prefix of PyTorch's parametrizations."""
    cls = type(module)
    if not is_fused(module):
        cls = parametrize.type_before_parametrizations(module)
    return cls.__name__


def norms(module: Any) -> dict[str, Norm]:
    """Returns the weight-normed tensors of a fused module. It is empty for another module."""
    return getattr(type(module), "_norms", {})


def is_claimed(parametrization: Any) -> bool:
    """Returns whether PyTorch's list of parametrizations has to be called for the weight. It has to
    be if another parametrization follows, or if a hook is registered there, which may fetch `g` and
    `v`."""
    parts = parametrization._modules
    first = parts["0"]
    of_list, of_first = parametrization.__dict__, first.__dict__
    return bool(
        len(parts) > 1
        or type(parametrization) is not parametrize.ParametrizationList
        or type(first) is not Parametrization
        or of_list["_forward_pre_hooks"]
        or of_list["_forward_hooks"]
        or of_list["_backward_pre_hooks"]
        or of_list["_backward_hooks"]
        or of_first["_forward_pre_hooks"]
        or of_first["_forward_hooks"]
        or of_first["_backward_pre_hooks"]
        or of_first["_backward_hooks"]
        or _global_forward_pre_hooks
        or _global_forward_hooks
        or "forward" in of_list
        or "forward" in of_first
    )


def is_stacked(module: nn.Module, name: str) -> bool:
    """Returns whether another parametrization follows the weight norm of a tensor."""
    return len(parametrized(module).get(name, [None])) > 1


def is_replaced(module: nn.Module, name: str) -> bool:
    """Returns whether `g` or `v` of a tensor is itself computed, as by pruning."""
    holder, keys = module, checkpoints.keys("weight_norm", name)
    if name in parametrized(module):
        holder, keys = parametrized(module)[name], ("original0", "original1")
    return any(key not in holder._parameters for key in keys)


# --- conversion of one module --------------------------------------------------------------------


def computers(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Yields `(tensor, form, computer)` of every tensor that PyTorch weight-normalised. The
    computer is PyTorch's hook, or its parametrization if that is the tensor's first."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm) and type(hook) is not removal.Handle:
            yield hook.name, "weight_norm", hook
    for name, items in parametrized(module).items():
        if isinstance(items[0], _WeightNorm):
            yield name, "parametrizations", items[0]


def is_known(module: nn.Module, computer: Any) -> bool:
    """Returns whether the weight follows PyTorch's formula and the module's class may change."""
    known = type(computer) in (WeightNorm, _WeightNorm)
    return known and not isinstance(module, torch.jit.ScriptModule)


def fuse(module: Any, found: Iterable[tuple[str, str, Any]]) -> None:
    """Fuses these tensors of the module and keeps their forms."""
    base = parametrize.type_before_parametrizations(module)
    new = dict(norms(module))
    if new:
        base = module.plain
    nested = []
    for name, form, computer in found:
        if form == "weight_norm":
            computer.__class__ = Hook
            module.__dict__.pop(name, None)
            v = getattr(module, checkpoints.keys(form, name)[1])
        else:
            computer.__class__ = Parametrization
            nested.append(name)
            v = parametrized(module)[name].original1
        kind: call.Norm = getattr(computer, "norm", "l2")
        new[name] = Norm.of(name, canonical_dim(computer.dim, v.ndim), form, kind)
    if nested:
        module.parametrizations.__class__ = removal.Lists
        originals.drop_load_hook(module)
        removal.attach(module, nested)
    _set_class(module, base, new)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def unfuse(module: Any) -> None:
    """Gives a fused module back to PyTorch, with its current parameters."""
    before = norms(module)
    for key in reading.STATE:
        module.__dict__.pop(key, None)
    module.__class__ = module.plain
    nested = [name for name, norm in before.items() if norm.form == "parametrizations"]
    for name in nested:
        removal.detach(module, name)
        parametrized(module)[name][0].__class__ = _WeightNorm
    originals.give_class(module, nested)
    for name, norm in before.items():
        if norm.form == "weight_norm":
            hooks = module._forward_pre_hooks.values()
            hook: Any = next((h for h in hooks if type(h) is Hook and h.name == name), None)
            if hook is None:
                hook = WeightNorm(name, -1 if norm.dim is None else norm.dim)
                module.register_forward_pre_hook(hook)
            hook.__class__ = WeightNorm
            with torch.inference_mode(False):
                setattr(module, name, hook.compute_weight(module))
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def _baked_parameter(module: Any, name: str) -> nn.Parameter:
    """Returns the weight of one tensor as a parameter, with stacked parametrizations applied.

    Raises:
        RuntimeError: `g` or `v` is itself computed, as by pruning.
    """
    norm = module._norms[name]
    removal.check_held(module, name, module._holder(name), (norm.key_g, norm.key_v))
    g, v = module._tensors(name)
    if not is_stacked(module, name):
        return removal.baked(v, g, norm.dim, 0.0, norm.norm)
    with torch.inference_mode(False), torch.no_grad():
        weight = module._holder(name)()
    return removal.plain_weight(weight, v.requires_grad or g.requires_grad)
