"""Every read of `.weight` computes the weight again. Inside `torch.nn.utils.parametrize.cached()`
it is computed once. While `Module.apply` runs, the weights that its function reads are compared
with copies afterwards, because the function may initialise them.

Otherwise a write into a weight that was read does not change the layer. For every weight that it
returns, a layer keeps an empty tensor that shares the weight's version counter. If the counter has
changed, the next read or forward warns. A write through `.data` does not change the counter. The
warning is meant for initialisation, so only the first few reads (`WATCHES`) are checked. A later
read costs a few tenths of a microsecond more than the weight.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils import parametrize

from .. import functional as WF
from ..backends import vendor

# While `apply` runs, this holds the weights that its function has read, each with a copy of its
# original value.
_watched: dict[tuple[int, str], tuple[Tensor, Tensor]] | None = None


# The first WATCHES reads of a layer are checked for writes. STATE names the attributes for that,
# and the one that holds the weights which the layer keeps (kept.py).
WATCHES = 8
STATE = ("_reads", "_is_read", "_watches", "_store")

_EMPTY: dict[torch.device, Tensor] = {}


class Reads(dict[str, tuple[Tensor, int]]):
    """Holds the version counters of the weights that a layer has returned since its last forward,
    by name. An entry is a tensor that shares the counter, and the counter's value at the read. A
    copied layer has no entries."""

    is_warned = False

    def __reduce__(self) -> tuple:
        return Reads, ()


def read(module: Any, name: str) -> Tensor:
    """Returns `module.weight`, which the module's `_form(name)` computes."""
    if parametrize._cache_enabled or _watched is not None:
        return form(module, name)
    if is_compiling():
        return module._form(name)
    store = module._store
    if store is not None and (weight := _kept(store, module, name)) is not None:
        return weight
    weight = module._form(name)
    if module._watches:
        _keep_counter(module, name, weight)
    return weight


def form(module: Any, name: str) -> Tensor:
    """Returns `module.weight` for the layer's own use. Writes into it are not checked."""
    if _watched is not None:
        return _read_watched(module, name)
    store = None if is_compiling() else module._store
    if store is not None and (weight := _kept(store, module, name)) is not None:
        return weight
    return cached(module, name) if parametrize._cache_enabled else module._form(name)


def reader(name: str) -> property:
    """Returns a property that reads a weight."""

    def get(module: Any) -> Tensor:
        return read(module, name)

    return property(get)


def forms(
    module: Any, names: Sequence[str], places: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """Returns several weights for the layer's own use. `module._forms(names, places)` computes
    them, and may write them to their places. It warns as a forward does if one that was read before
    was written to."""
    if module._is_read:
        warn_of_writes(module)
    if is_shared(module):
        return [form(module, name) for name in names]
    return module._forms(names, places)


def is_shared(module: Any) -> bool:
    """Returns whether several uses of a layer share a weight, which is kept, cached or watched."""
    return (module._store is not None and not is_compiling()) or are_cached()


def are_cached() -> bool:
    """Returns whether the weights of all layers are cached or watched."""
    return bool(parametrize._cache_enabled) or _watched is not None


def _kept(store: Any, module: Any, name: str) -> Tensor | None:
    """Returns the weight that a layer keeps inside `frozen_weights` (kept.py), or `None`. Another
    thread may end the block meanwhile, so the layer may no longer have this store."""
    if module._is_claimed(name):
        return None
    g, v = module._tensors(name)
    found = store.find(module, name, v, g, v.dtype)
    return found and found.weight


def _keep_counter(module: Any, name: str, weight: Tensor) -> None:
    if module._is_read:
        warn_of_writes(module)
    if (
        type(weight) is not Tensor
        or weight.is_inference()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    ):
        return
    empty = _EMPTY.get(weight.device)
    if empty is None:
        with torch.inference_mode(False):
            empty = _EMPTY[weight.device] = torch.empty(0, device=weight.device)
    counter = weight.detach()  # this tensor shares the counter,
    counter.data = empty  # and still does after it has released the weight's memory
    state = module.__dict__
    state.setdefault("_reads", Reads())[name] = counter, counter._version
    state["_is_read"] = True
    state["_watches"] = module._watches - 1


def warn_of_writes(module: Any) -> None:
    """Warns, once per layer, if a weight that the layer returned was written to in place."""
    if is_compiling():
        return
    reads = module.__dict__["_reads"]
    written = [name for name, (counter, version) in reads.items() if counter._version != version]
    forget(module)
    if written and not reads.is_warned:
        reads.is_warned = True
        warn(module, written[0])


def warn(module: Any, name: str) -> None:
    """Warns that a weight that the layer returned was written to in place."""
    warnings.warn(
        f"{name} of {type(module).__name__} was written to in place, which does not change the "
        f"layer: {name} is computed from g and v. Assign to it (layer.{name} = values), or "
        "initialise it in model.apply(function).",
        stacklevel=_callers_level(),
    )


def _callers_level() -> int:
    """Returns the `stacklevel` with which a warning names the line of the program that called this
    package, by itself or by way of PyTorch's modules."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(_FOLDERS):
        level, frame = level + 1, frame.f_back
    return level


_FOLDERS = tuple(os.path.dirname(file) + os.sep for file in (WF.__file__, nn.__file__))


def forget(module: Any) -> None:
    """Drops the counters after an assignment or a check."""
    if module._is_read:
        module.__dict__["_is_read"] = False
        module.__dict__["_reads"].clear()


def _read_watched(module: Any, name: str) -> Tensor:
    """Returns the weight that a function of `apply` reads, which may write into it."""
    assert _watched is not None
    key = (id(module), name)
    if key not in _watched or not _is_written(*_watched[key]):
        weight = module._form(name)
        _watched[key] = weight, weight.detach().clone()
    return _watched[key][0]


def cached(module: Any, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the weight inside `parametrize.cached()`, in its own dtype or in a wider one. PyTorch
    drops it at the end of the block.

    A weight that was cached without a graph, as under `no_grad`, is computed once more for a
    forward that needs one.
    """
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("Cannot trace a model while caching parametrizations.")
    key = (id(module), name) if dtype is None else (id(module), name, dtype)
    cache: dict[Any, Tensor | None] = parametrize._cache
    found = cache.get(key)
    if found is None or (
        torch.is_grad_enabled()
        and not found.requires_grad
        and (found.is_inference() or any(t.requires_grad for t in module._tensors(name)))
    ):
        found = cache[key] = module._form(name, dtype)
    return found


def cached_for_product(module: Any, x: Tensor, v: Tensor) -> Tensor | None:
    """Returns the cached weight in the dtype of a product with `x`, or `None` if the product must
    not use one. Casts are not cached, so that the uses of a weight add to its gradient in a dtype
    that is as wide as that of `v`."""
    if not isinstance(x, Tensor):
        return None
    dtype = WF.product_dtype(x)
    if not dtype.is_floating_point or (v.is_cpu and vendor.is_wrong_for(dtype, v.ndim)):
        return None
    wide = torch.promote_types(v.dtype, dtype)
    if wide == v.dtype:
        return form(module, "weight").to(dtype)
    return cached(module, "weight", wide).to(dtype)


def apply(module: Any, function: Callable[[nn.Module], None]) -> Any:
    """Does what `nn.Module.apply` does. A write into `.weight` or `.weight.data` takes effect: `g`
    and `v` are set so that they give the written values."""
    global _watched
    for child in module.children():
        child.apply(function)
    outer, _watched = _watched, {}
    try:
        function(module)
    finally:
        seen, _watched = _watched, outer
    for name in module._normed() if seen else ():
        weight, before = seen.get((id(module), name), (None, None))
        if weight is None or before is None or not _is_written(weight, before):
            continue
        try:
            setattr(module, name, weight.detach())
        except RuntimeError as error:  # a parametrization has no inverse
            warnings.warn(
                f"the values written into {name} of {type(module).__name__} are lost: {error}",
                stacklevel=2,
            )
    return module


@torch.no_grad()
def _is_written(weight: Tensor, before: Tensor) -> bool:
    if weight.is_meta or before.is_meta:
        return False
    if weight.shape != before.shape:
        return True
    same = (weight == before) | (weight.isnan() & before.isnan())
    return not bool(same.all())
