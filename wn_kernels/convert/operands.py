"""The native library finds the operands of a fused layer in its module (`modules.h`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.nn.utils.parametrize import ParametrizationList

from ..backends import native
from ..modules.norms import Norm
from ..modules.weight import Operands

# The library's function of a module and its `rule`, or `None` without the library. It returns
# `None` where Python has to look.
find: Callable[[Any, Any], Operands | None] | None = None


def connect() -> None:
    """Sets `find`. Each new class of a fused layer calls it, since the library may have been built
    meanwhile."""
    global find
    library = native.helpers()
    find = None if library is None else library.operands_of


def rule(norm: Norm, parametrization: type) -> tuple[Any, ...]:
    """Returns by what a weight's operands are found. PyTorch's newer form has `g` and `v` in a
    parametrization of this class."""
    holder = None if norm.form == "weight_norm" else parametrization
    hooks = _global_forward_pre_hooks, _global_forward_hooks
    options = norm.dim, 0.0, norm.norm
    return norm.key_g, norm.key_v, *options, holder, hooks, ParametrizationList
