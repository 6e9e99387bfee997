"""This file holds the weights that layers keep inside `frozen_weights`.

A kept weight has no gradient, and serves a forward that needs none with respect to `g` and `v`. It
is used as long as nothing has changed: `g` and `v` are the same objects, their version counters are
the same, their values are the same memory and are read in the same way, and nobody has written into
the weight. Tensors that share the memory of `g` and `v` are kept as well, so that no other tensor
gets their addresses. A write through `.data` in place leaves no trace, and cannot be noticed. A
step of PyTorch's fused optimizers leaves none either, so every optimizer's step counts as a write
while a block is open.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..backends import vendor
from ..call import PLAIN_TYPES, recorder
from ..operators import native_library
from . import reading


class Kept(NamedTuple):
    """One weight of a layer, and what it was computed from.

    Attributes:
        weight: the weight.
        v, g: the parameters.
        versions: the sum of the three tensors' version counters, which never decrease.
        written: the version counter of the weight.
        memory: tensors that share the parameters' memory of then, and lie as they did.
    """

    weight: Tensor
    v: Tensor
    g: Tensor
    versions: int
    written: int
    memory: tuple[Tensor, Tensor]


class Store:
    """Holds the weights that a layer keeps inside `frozen_weights`. A copy of the layer has none.

    Attributes:
        blocks: the number of blocks that the layer is in. At zero, nothing is kept any more.
        kept: the weights by name, and those of a name by dtype, on a GPU by dtype and stream.
        pays: whether PyTorch's product with a kept weight is the fastest for an input
            (`prepared.py`).
        copies: the tensors of a recurrent layer in one buffer (`flat.py`).
        frozen: the same, as the native library finds them (`flat.h`).
        take, add: the native library's functions that look former inputs up, and add one
            (`kept.h`), or `None` without it.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self.pays: dict[Any, bool] = {}
        self.clear()

    def clear(self) -> None:
        """Drops the weights."""
        self.kept: dict[str, dict[Any, Kept]] = {}
        self.copies: Any = None
        self.frozen: Any = None
        self._forget_inputs()

    def _forget_inputs(self) -> None:
        library = native_library()
        self.take: Callable[..., Any] | None = None
        self.add: Callable[..., None] | None = None
        if library is not None:
            self.take, self.add = library.keeping()

    def __reduce__(self) -> tuple:
        return type(None), ()

    def find(self, module: Any, name: str, v: Tensor, g: Tensor, dtype: torch.dtype) -> Kept | None:
        """Returns the kept weight in a dtype, computed if need be, or `None` if the call must not
        use one."""
        if torch.is_grad_enabled() and (v.requires_grad or g.requires_grad):
            return None
        if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack():
            return None
        key: Any = dtype
        if v.is_cuda:
            if torch.cuda.is_current_stream_capturing():  # the graph may outlive the weight
                return None
            key = dtype, torch._C._cuda_getCurrentRawStream(v.get_device())
        weights = self.kept.get(name)
        if weights is None:
            weights = self.kept.setdefault(name, {})
        found = weights.get(key)
        if found is not None:
            weight, kept_v, kept_g, versions, written, memory = found
            if (
                kept_v is v
                and kept_g is g
                and v._version + g._version + weight._version == versions
                and lies_as(v, memory[0])
                and lies_as(g, memory[1])
            ):
                return found
            if weight._version != written:
                reading.warn(module, name)
            weights.pop(key, None)
            self._forget_inputs()  # other tensors may get the addresses from now on
        if not self.blocks or module._is_claimed(name) or not _can_keep(v, g, dtype):
            return None
        # A change that another thread makes meanwhile is noticed by the next call.
        versions = v._version + g._version
        with torch.inference_mode(False), torch.no_grad():
            memory = v.detach(), g.detach()
            weight = module._form(name, torch.promote_types(v.dtype, dtype)).to(dtype)
        written = weight._version
        found = weights[key] = Kept(weight, v, g, versions + written, written, memory)
        return found


def lies_as(t: Tensor, other: Tensor) -> bool:
    """Returns whether the values of two tensors are the same memory, read in the same way."""
    return (
        t.data_ptr() == other.data_ptr() and t.shape == other.shape and t.stride() == other.stride()
    )


def _can_keep(v: Tensor, g: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether changes of `v` and `g` can be noticed, and the plain layer may compute with a
    weight of this dtype."""
    return (
        not recorder(v)
        and type(g) in PLAIN_TYPES
        and not v.is_inference()  # inference tensors have no version counter
        and not g.is_inference()
        and dtype.is_floating_point
        and not (v.is_cpu and (dtype in vendor.SLOW or vendor.is_wrong_for(dtype, v.ndim)))
    )


def library_for(layer: Any, names: list[str]) -> tuple[Any, tuple[Any, ...]] | None:
    """Returns the native library, and by what it finds the tensors of a layer with these names, or
    `None` if Python has to look."""
    if is_compiling() or layer._is_read or reading.are_cached():
        return None
    library = native_library()
    holders = None if library is None else layer._holders()
    if holders is None:
        return None
    return library, (names, layer._parameters, layer._rules, holders)


def forms(layer: Any, names: Sequence[str]) -> list[Tensor]:
    """Returns what `reading.forms` does. The native library looks whether the kept weights of a
    layer are still those of an earlier call."""
    store = None if is_compiling() else layer._store
    by = None if store is None else library_for(layer, [*names])
    if store is None or by is None:
        return reading.forms(layer, names)
    library, arguments = by
    found = store.frozen and store.frozen.take(*arguments)
    if found is None:
        frozen = library.Frozen(*arguments)
        found = reading.forms(layer, names)
        if store.blocks and not any(w.requires_grad for w in found):
            frozen.keep(found)
            store.frozen = frozen
    return found


# --- for frozen_weights --------------------------------------------------------------------------

_lock = threading.Lock()
_open = 0  # the number of blocks that layers are in
_hook: Any = None  # this handle removes `_count_step`, while there is a block


def open_store(module: Any) -> Store:
    """Makes a layer keep its weights until `close_store`, and returns where."""
    global _open, _hook
    with _lock:
        store = module._store
        if store is None:
            store = module.__dict__["_store"] = Store()
        store.blocks += 1
        if not _open:
            _hook = register_optimizer_step_post_hook(_count_step)
        _open += 1
        return store


def _count_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Counts a step as a write into every parameter of the optimizer."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    increment_version([p for p in parameters if not p.is_inference()])


def close_store(module: Any, store: Store) -> None:
    """Undoes one `open_store`. The last one drops the weights."""
    global _open
    with _lock:
        _open -= 1
        if not _open:
            _hook.remove()
        store.blocks -= 1
        if store.blocks:
            return
        if module.__dict__.get("_store") is store:
            del module.__dict__["_store"]
        store.clear()
