"""This file provides weights that are prepared before a layer's forward, which finds them by
`take`. PyTorch's own product then does the rest. They are kept inside `frozen_weights` (`kept.py`),
cached inside `torch.nn.utils.parametrize.cached()` (`reading.py`), or computed by a group.

`fuse(model, grouped=True)` gives the model a `Group` (`convert/groups.py`). It computes the weights
of all members by one call of `functional.weight_norms`, at the start of the model's forward. A
layer that runs meanwhile, on the same thread, takes its weight. In the backward, the gradients of
all members are one node.

A weight is used only where it is what the layer would compute itself. Otherwise the layer computes
its own, as if there were no group:

- outside of the model's forward;
- if `g` or `v` is another tensor than at the start, or was written to;
- in another mode than at the start: of gradients, of inference, of autocast, or of hooks that save
  tensors, as inside of a checkpoint;
- if its input has another dtype than the weight;
- where the plan has a better way for this input than a formed weight (`plan.shares`).

A group computes the weights that the forward before used. Where hooks save tensors it computes all
weights, because a checkpoint of the model compares what two forwards save.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils import parametrize

from .. import functional as WF
from .. import plan, prepare
from ..call import PLAIN_TYPES, Operands
from . import reading

# This returns the hooks of saved tensors that are in effect, or `None`.
_saving = torch._C._autograd._top_saved_tensors_default_hooks

# Decisions are kept for at most this many inputs of a layer.
MOST_SHAPES = 256


# A mode says whether gradients are recorded, whether inference mode is on, which hook saves
# tensors, and which dtype autocast gives to the input of a layer.
Mode = tuple[bool, bool, Any, torch.dtype | None]


def _mode(device: torch.device) -> Mode:
    records = torch.is_grad_enabled()
    hooks = _saving(True) if records else None
    cast = None
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device.type):
        cast = torch.get_autocast_dtype(device.type)
    return records, torch.is_inference_mode_enabled(), hooks and hooks[0], cast


class Forward:
    """A forward of a group's model that is in progress.

    Attributes:
        group: the group.
        outer: the forward around it, or `None`.
        modes: the modes at the start, by device.
        v, g: the tensors of all layers at the start, `None` for one that is not torch's own.
        weights: every `W`, or `None` if it was not computed.
        versions: the version counters of `v` and `g`.
        used: whether a layer used its weight, or would have.
    """

    __slots__ = ("g", "group", "modes", "outer", "used", "v", "versions", "weights")

    def __init__(self, group: Group, outer: Forward | None) -> None:
        self.group, self.outer = group, outer
        self.v, self.g = (_plain(parameters) for parameters in group.parameters)
        self.versions = [*map(_versions, self.v, self.g)]
        self.weights: list[Tensor | None] = [None] * len(self.v)
        self.used = [False] * len(self.v)
        self.modes: dict[torch.device, Mode] = {}
        if not parametrize._cache_enabled:
            self._compute()

    def _compute(self) -> None:
        by_device: dict[torch.device, list[int]] = {}
        for i, (v, g) in enumerate(zip(self.v, self.g, strict=True)):
            if v is not None and g is not None:
                by_device.setdefault(v.device, []).append(i)
        for device, members in by_device.items():
            mode = self.modes[device] = _mode(device)
            used = self.group.used
            wanted = members if mode[2] else [i for i in members if used[i]]
            if wanted:
                v, g = ([each[i] for i in wanted] for each in (self.v, self.g))
                cast = mode[3]
                dtypes = [t.dtype if cast is None or t.dtype is torch.float64 else cast for t in v]
                norms = [self.group.modules[i]._normalisation() for i in wanted]
                dims, eps, kinds = map(list, zip(*norms, strict=True))
                options = {"dim": dims, "eps": eps, "norm": kinds}
                weights = WF.weight_norms(v, g, dtype=dtypes, **options)
                for i, w in zip(wanted, weights, strict=True):
                    self.weights[i] = w

    def take(self, i: int, x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None) -> Tensor | None:
        """Returns the weight of a layer for an input, if it is what the layer would compute."""
        mode = _mode(x.device)
        if type(x) not in PLAIN_TYPES or mode != self.modes.get(x.device):
            return None
        records, _, _, cast = mode
        dtype = x.dtype if cast is None or x.dtype is torch.float64 else cast
        if cast is None and bias is not None and bias.dtype is not dtype:
            return None
        group = self.group
        key = x.shape, dtype, records
        shares = group.shares[i].get(key)
        if shares is None:
            shares = _decide(group.shares[i], key, group.modules[i], x, v, g, bias, dtype)
        if not shares:
            return None
        self.used[i] = True
        w = self.weights[i]
        if (
            w is None
            or w.dtype is not dtype
            or v is not self.v[i]
            or g is not self.g[i]
            or self.versions[i] != _versions(v, g)
            or (records and not w.requires_grad and (v.requires_grad or g.requires_grad))
        ):
            return None
        return w


def _plain(parameters: list[tuple[dict[str, Any], str]]) -> list[Any]:
    """Returns parameters, and `None` for one that is missing or not of torch's own kind."""
    found = [own.get(key) for own, key in parameters]
    return [t if type(t) in PLAIN_TYPES else None for t in found]


def _versions(v: Any, g: Any) -> tuple[int, int]:
    """Returns the version counters, which tensors of inference mode do not have."""
    try:
        return v._version, g._version
    except (AttributeError, RuntimeError):
        return 0, 0


def _pays(
    known: dict[Any, bool],
    module: Any,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> bool:
    """Returns whether the plan has the weight of a layer prepared for this input. `known` are the
    answers for former inputs."""
    key = x.shape, dtype, torch.is_grad_enabled(), plan.forced(), prepare.epoch
    found = known.get(key)
    return _decide(known, key, module, x, v, g, bias, dtype) if found is None else found


def _decide(known: dict[Any, bool], key: Any, *arguments: Any) -> bool:
    """Returns what `_shares` returns for these arguments, and keeps it in `known`."""
    if len(known) >= MOST_SHAPES:
        known.clear()
    found = known[key] = _shares(*arguments)
    return found


def _shares(
    module: Any, x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> bool:
    """Returns whether the plan has the weight of a layer formed by a group, for this input."""
    dim, eps, norm = module._normalisation()
    backend = plan.serving(v, dim, norm)
    if backend == "reference":
        return False
    like = x if x.dtype is dtype else torch.empty_like(x, dtype=dtype, device="meta")
    rank = 0
    geometry: tuple[Any, ...] = ()
    if v.ndim > 2:
        padding = module.padding if module.padding_mode == "zeros" else 0
        more = module.transposed, module.output_padding, module.groups
        rank, geometry = v.ndim - 2, (module.stride, padding, module.dilation, *more)
    try:
        tensors = Operands(like, v, g, bias)
        found = prepare.prepare(rank, tensors, geometry, dim, eps, norm, backend)
    except (TypeError, ValueError):  # the layer raises it, if it is an error there too
        return False
    return plan.shares(found.call, found.plan, torch.is_grad_enabled())


# --- the forwards in progress --------------------------------------------------------------------


class _State(threading.local):
    """The innermost forward in progress on a thread, or `None`."""

    forward: Forward | None = None


_state = _State()


def take(module: Any, x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None) -> Tensor | None:
    """Returns the `W` that was prepared for this call of a layer, or `None`."""
    is_traced = is_compiling()
    store = None if is_traced else module._store
    if store is not None and isinstance(x, Tensor):
        dtype = WF.product_dtype(x) if torch._C._is_any_autocast_enabled() else x.dtype
        # On a CPU, a product with few columns that reads V once may be faster than PyTorch's.
        if not v.is_cpu or _pays(store.pays, module, x, v, g, bias, dtype):
            w = store.get(module, "weight", v, g, dtype)
            if w is not None:
                return w
    if parametrize._cache_enabled:
        return reading.cached_for_product(module, x, v)
    if is_traced:
        return module._traced
    forward = _state.forward
    while forward is not None:
        i = forward.group.index.get(id(module))
        if i is not None:
            return forward.take(i, x, v, g, bias)
        forward = forward.outer
    return None


def like(bias: Tensor | None, w: Tensor) -> Tensor | None:
    """Returns the bias of a layer in the dtype of a prepared weight."""
    return bias if bias is None or bias.dtype == w.dtype else bias.to(w.dtype)


class Group:
    """The layers of a model whose weights are prepared together.

    Attributes:
        model: the model. A copy of it has a group of its own, over its own layers.
        modules: the layers.
        used: whether the forward before used the weight of a layer, or would have.
        index: the index of a layer by its `id`.
        parameters: where every `v` is held, and every `g`: a dictionary and a key.
        shares: whether the plan has the weight of a layer formed by the group, by the input's
            shape, the dtype of the product, and whether gradients are recorded.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        self.model = model
        self.modules: list[Any] = [*modules]
        self.used = [True] * len(self.modules)
        self._find()

    def _find(self) -> None:
        self.index = {id(module): i for i, module in enumerate(self.modules)}
        held = [module._held() for module in self.modules]
        self.parameters = [(own, v) for own, _, v in held], [(own, g) for own, g, _ in held]
        self._epoch: Any = None
        self.shares: list[dict[Any, bool]] = [{} for _ in self.modules]

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "modules": self.modules, "used": self.used}

    def begin(self) -> None:
        """Computes the weights for a forward of the model."""
        if is_compiling():
            self._trace()
            return
        if "index" not in self.__dict__:  # a copy, whose layers are complete by now
            self._find()
        epoch = plan.forced(), prepare.epoch
        if epoch != self._epoch:
            self._epoch = epoch
            self.shares = [{} for _ in self.modules]
        _state.forward = Forward(self, _state.forward)

    def end(self) -> None:
        """Drops the weights, also after an exception."""
        if is_compiling():
            for module in self.modules:
                object.__setattr__(module, "_traced", None)
            return
        forward = _state.forward
        assert forward is not None
        _state.forward = forward.outer
        self.used = forward.used

    def _trace(self) -> None:
        """Computes the weights of a forward that is compiled."""
        found = [(module, module._operands()) for module in self.modules]
        given = [(module, *operands) for module, operands in found if operands is not None]
        if not given:
            return
        modules, v, g, _, dims, eps, norms = map(list, zip(*given, strict=True))
        weights = WF.weight_norms(v, g, dim=dims, eps=eps, norm=norms)
        for module, w in zip(modules, weights, strict=True):
            object.__setattr__(module, "_traced", w)
