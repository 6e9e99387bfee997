"""PyTorch's operators that compute nothing: what goes with a driver that launches nothing.

Inside `hollow()` every operator of PyTorch returns memory that nobody has written, of the shape,
dtype and strides that it would have. The host's part of a call runs at any size as it would on a
GPU: checks, plans, autograd, launches over `bench.stand_in`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten

# An operator's own code, which makes the calls that count.
OWN = ("wn_kernels",)
# They move no data, as views do not.
FREE = (aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.view.dtype)


class _Hollow(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace in OWN:
            with self:
                return func._op_dk(torch.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if func.is_view or func in FREE or func.overloadpacket is aten.set_:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        if func._schema.is_mutable:  # its values change, which nobody reads
            return kwargs.get("out", args[0] if args else None)
        args, kwargs = tree_map_only(Tensor, _without_memory, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        return tree_map_only(Tensor, _unwritten, func(*args, **kwargs))


def _without_memory(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _unwritten(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)


@contextmanager
def hollow() -> Iterator[None]:
    """PyTorch's operators on CPU tensors compute nothing inside the block."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with _Hollow():
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
