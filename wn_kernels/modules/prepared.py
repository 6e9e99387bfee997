"""Weights that are prepared before a layer's forward, which finds them by `take`. There, PyTorch's
own product does the rest. They are kept inside `frozen_weights` (`kept.py`), cached inside
`torch.nn.utils.parametrize.cached()` (`reading.py`), or computed by a group.

`fuse(model, grouped=True)` gives the model a `Group` (`convert/groups.py`). It computes the weights
of all members by one call of `functional.weight_norms`, at the start of the model's forward. A
layer that runs meanwhile, on the same thread, takes its weight. In the backward, the gradients of
all members are one node.

A weight is used only where it is what the layer would compute itself. Otherwise the layer computes
its own, as if there were no group: outside of the model's forward; if `g` or `v` is another tensor
than at the start, or was written to; if gradients are recorded now and were not then, or by other
hooks of saved tensors, as inside of a checkpoint; in another dtype than that of the input; and
where the plan has a better way for this input than a formed weight (`plan.shares`).

A group computes the weights that the forward before took, in the dtypes in which it took them.
Where hooks save tensors, it computes all weights in the usual dtypes: a checkpoint of the model
compares what two forwards save.
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

# The hooks of saved tensors that are in effect, or `None`.
_saving = torch._C._autograd._top_saved_tensors_default_hooks


# The inputs of a layer for which its decision is kept.
MOST_SHAPES = 256


class Member:
    """A layer of a group.

    Attributes:
        module: the layer.
        is_taken: whether the forward before took the weight, or would have.
        dtypes: the dtype of the weight by autocast's, or by `None` without autocast, where it is
            not the usual one.
        shares: whether the plan has the weight formed by the group, by the input's shape and dtype,
            by whether gradients are recorded, and by what else a plan depends on.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.is_taken = True
        self.dtypes: dict[torch.dtype | None, torch.dtype] = {}
        self.shares: dict[Any, bool] = {}

    def dtype(self, v: Tensor, is_usual: bool = True) -> torch.dtype:
        """Returns the dtype of the weight in the next forward, the usual one if that is asked
        for."""
        cast = autocast_dtype(v)
        found = None if is_usual else self.dtypes.get(cast)
        return found or (v.dtype if cast is None or v.dtype is torch.float64 else cast)


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """Returns the dtype that autocast gives to a layer's input on the device of `t`, or `None`."""
    kind = t.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class Entry:
    """What a forward holds of a member.

    Attributes:
        weight: `W`, or `None` if it was not computed.
        tensors: `v` and `g` at the start, and their version counters.
        is_taken: as in `Member`, of this forward.
    """

    __slots__ = ("is_taken", "member", "saving", "tensors", "versions", "weight")

    def __init__(self, member: Member) -> None:
        self.member = member
        self.weight: Tensor | None = None
        self.tensors: tuple[Tensor, Tensor] | None = None
        self.versions = (0, 0)
        self.saving: Any = None
        self.is_taken = False

    def take(self, x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None) -> Tensor | None:
        """Returns the weight for an input, if it is what the layer would compute."""
        if type(x) not in PLAIN_TYPES or _saved_by() is not self.saving:
            return None
        records = torch.is_grad_enabled()
        cast = autocast_dtype(x)
        dtype = x.dtype if cast is None or x.dtype is torch.float64 else cast
        shares = _pays(self.member.shares, self.member.module, x, v, g, bias, dtype)
        if not shares or (bias is not None and bias.dtype is not dtype and cast is None):
            return None
        self.is_taken = True
        w = self.weight
        if w is None or self.tensors is None:
            return None
        if w.dtype is not dtype:
            self.member.dtypes[cast] = dtype
            return None
        if self.tensors[0] is not v or self.tensors[1] is not g or _versions(v, g) != self.versions:
            return None
        if w.is_inference():
            return w if torch.is_inference_mode_enabled() else None
        if records and not w.requires_grad and (v.requires_grad or g.requires_grad):
            return None
        return w


def _versions(v: Tensor, g: Tensor) -> tuple[int, int]:
    """Returns the version counters, which tensors of inference mode do not have."""
    if v.is_inference() or g.is_inference():
        return 0, 0
    return v._version, g._version


def _saved_by() -> Any:
    """Returns the function that saves tensors for the backward, if it is not PyTorch's own."""
    hooks = _saving(True) if torch.is_grad_enabled() else None
    return hooks and hooks[0]


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
    if found is None:
        if len(known) >= MOST_SHAPES:
            known.clear()
        found = known[key] = _shares(module, x, v, g, bias, dtype)
    return found


def _shares(
    module: Any, x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> bool:
    """Returns whether the plan has the weight of a layer formed by a group, for this input."""
    backend = plan.serving(v, module_dim(module))
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
        found = prepare.prepare(rank, tensors, geometry, module_dim(module), 0.0, backend)
    except (TypeError, ValueError):  # the layer raises it, if it is an error there too
        return False
    return plan.shares(found.call, found.plan, torch.is_grad_enabled())


def module_dim(module: Any) -> int | None:
    """Returns the dimension whose slices a layer normalises."""
    return module._operands()[3]


# --- the weights of a forward --------------------------------------------------------------------


class _State(threading.local):
    """The forwards in progress on a thread."""

    entries: dict[int, Entry] = {}  # noqa: RUF012 (replaced, never written to)


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
    entry = _state.entries.get(id(module))
    return None if entry is None else entry.take(x, v, g, bias)


def like(bias: Tensor | None, w: Tensor) -> Tensor | None:
    """Returns the bias of a layer in the dtype of a prepared weight."""
    return bias if bias is None or bias.dtype == w.dtype else bias.to(w.dtype)


class Group:
    """The layers of a model whose weights are prepared together.

    Attributes:
        model: the model. A copy of it has a group of its own, over its own layers.
        members: the layers.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        self.model = model
        self.members = [Member(module) for module in modules]

    def begin(self) -> None:
        """Computes the weights for a forward of the model."""
        if is_compiling():
            self._trace()
            return
        saving = _saved_by()
        entries = {}
        by_device: dict[torch.device, list[Any]] = {}
        for member in self.members:
            entry = entries[id(member.module)] = Entry(member)
            entry.saving = saving
            is_wanted = (member.is_taken or saving) and not parametrize._cache_enabled
            operands = member.module._operands() if is_wanted else None
            if operands is None:
                continue
            v, g, _, dim, eps = operands
            if type(v) in PLAIN_TYPES and type(g) in PLAIN_TYPES:
                entry.tensors, entry.versions = (v, g), _versions(v, g)
                given = entry, v, g, dim, eps, member.dtype(v, saving is not None)
                by_device.setdefault(v.device, []).append(given)
        for every in by_device.values():
            taken, v, g, dims, eps, dtypes = map(list, zip(*every, strict=True))
            weights = WF.weight_norms(v, g, dim=dims, eps=eps, dtype=dtypes)
            for entry, weight in zip(taken, weights, strict=True):
                entry.weight = weight
        outer = _state.entries
        _state.entries = _Entries(outer, {**outer, **entries})

    def end(self) -> None:
        """Drops the weights, also after an exception."""
        if is_compiling():
            for member in self.members:
                object.__setattr__(member.module, "_traced", None)
            return
        entries = _state.entries
        assert isinstance(entries, _Entries)
        _state.entries = entries.outer
        for member in self.members:
            member.is_taken = entries[id(member.module)].is_taken

    def _trace(self) -> None:
        """Computes the weights of a forward that is compiled."""
        members = [] if parametrize._cache_enabled else self.members
        found = [(m.module, m.module._operands()) for m in members]
        given = [(module, *operands) for module, operands in found if operands is not None]
        if not given:
            return
        modules, v, g, _, dims, eps = map(list, zip(*given, strict=True))
        for module, w in zip(modules, WF.weight_norms(v, g, dim=dims, eps=eps), strict=True):
            object.__setattr__(module, "_traced", w)


class _Entries(dict[int, Entry]):
    """The entries of a forward, with those of the forwards around it."""

    def __init__(self, outer: dict[int, Entry], entries: dict[int, Entry]) -> None:
        super().__init__(entries)
        self.outer = outer
