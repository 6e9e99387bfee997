"""Reads of `.weight`: computed anew, once inside `torch.nn.utils.parametrize.cached()`, and watched
while `Module.apply` runs a function that may initialise it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# The weights that the function of a running `apply` has read, each with a copy of what it was.
_watched: dict[tuple[int, str], tuple[Tensor, Tensor]] | None = None


def read(module: Any, name: str) -> Tensor:
    """`module.weight`; the module's `_form(name)` computes it."""
    if parametrize._cache_enabled or _watched is not None:
        return _read_specially(module, name)
    return module._form(name)


def _read_specially(module: Any, name: str) -> Tensor:
    key = (id(module), name)
    if _watched is not None:
        if key not in _watched or not _is_written(*_watched[key]):
            weight = module._form(name)
            _watched[key] = weight, weight.detach().clone()
        return _watched[key][0]
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("Cannot trace a model while caching parametrizations.")
    cache = parametrize._cache
    cached = cache.get(key)
    if cached is None:
        cached = cache[key] = module._form(name)
    return cached


def apply(module: Any, function: Callable[[nn.Module], None]) -> Any:
    """`nn.Module.apply`, under which a write into `.weight` or `.weight.data` has effect: `g` and
    `v` are set to give what was written."""
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
        except RuntimeError as error:  # a parametrization that has no inverse
            warnings.warn(
                f"what was written into {name} of {type(module).__name__} is lost: {error}",
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
