"""This file gives all weights of a recurrent layer one piece of memory.

cuDNN takes the weights and the biases of a layer from one buffer, in an order of its own. PyTorch
copies those that do not lie so, with a warning. Here, the weights are written there when they are
computed, and one launch copies the biases.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.backends.cudnn import rnn

from ..call import PLAIN_TYPES, recorder
from . import kept


class Layout(NamedTuple):
    """Describes where tensors lie in one buffer, in elements."""

    size: int
    offsets: tuple[int, ...]


def places(
    layer: Any, directions: Mapping[str, Tensor], others: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Returns new memory in one piece for the tensors of a layer, or nothing if cuDNN does not run
    it.

    Args:
        layer: a recurrent layer.
        directions: `v` of each of its weight-normed tensors.
        others: the rest of its tensors.
    """
    like = next(iter(directions.values()))
    if not _is_for_cudnn(like):
        return {}
    every = {**others, **directions}
    given = {name: t for name in layer._flat_weights_names if (t := every[name]) is not None}
    if len(given) < len(every) or not _are_ordinary([*given.values()]):
        return {}
    cast = torch.is_autocast_enabled("cuda") and like.dtype is not torch.float64
    dtype = torch.float16 if cast else like.dtype  # cuDNN's recurrence has no other there
    shapes = tuple(t.shape for t in given.values())
    layout = _layout_of_cudnn(shapes, _options(layer), like.device, dtype)
    # cuDNN's buffer has biases also where the layer has none.
    return _memory(layout, given, dtype, zeroed=not layer.bias)


def layout(library: Any, layer: Any, like: Tensor) -> Any:
    """Returns where the native library places the tensors of a layer, a `Layout` of its `flat.h`,
    or `None` if cuDNN does not run the layer on parameters like this one."""
    if not _is_for_cudnn(like) or torch.is_autocast_enabled("cuda"):
        return None
    sizes = layer.input_size, layer.hidden_size, layer.proj_size, layer.num_layers
    kind = layer.mode, layer.bias, layer.bidirectional
    key = library, *sizes, *kind, like.device, like.dtype
    found = _layouts.get(key)
    if found is None:
        normed, options = set(layer._normed()), _options(layer)
        shapes = tuple(
            (layer._tensors(name)[1] if name in normed else getattr(layer, name)).shape
            for name in layer._flat_weights_names
        )
        size, offsets = _layout_of_cudnn(shapes, options, like.device, like.dtype)
        found = _layouts[key] = library.Layout(size, offsets, shapes, not layer.bias)
    return found


_layouts: dict[Any, Any] = {}


def gathered(
    tensors: Sequence[Tensor | None], places: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Returns the tensors of a layer. On a GPU, one launch copies those that are not at their
    places."""
    found = list(tensors)
    both = enumerate(zip(tensors, places, strict=True))
    away = {
        i: (place, t)
        for i, (t, place) in both
        if t is not None and place is not None and t.is_cuda and t.data_ptr() != place.data_ptr()
    }
    if away:
        to, given = zip(*away.values(), strict=True)
        if needs_grad(given):
            to = Placed.apply(to, *given)
        else:
            torch._foreach_copy_([*to], given)
        for i, copy in zip(away, to, strict=True):
            found[i] = copy
    return found


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Returns whether the use of tensors is recorded for a backward."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Copies(NamedTuple):
    """The tensors of a layer at their places, which it keeps inside `frozen_weights`. They serve as
    long as what they were copied from is the same, as a kept weight does (kept.py).

    Attributes:
        copies: the tensors, in the order of the layer.
        tensors: what they were copied from.
        versions: the sum of the version counters of those.
        memory: tensors that lie as those did.
        is_cast: whether autocast chose the dtype of the copies.
    """

    copies: list[Tensor | None]
    tensors: list[Tensor]
    versions: int
    memory: list[Tensor]
    is_cast: bool

    @classmethod
    def of(cls, copies: list[Tensor | None], tensors: Sequence[Tensor | None]) -> Copies | None:
        """Returns an entry, or `None` if changes of the tensors cannot be noticed."""
        given = [t for t in tensors if t is not None]
        if any(t.is_inference() for t in given):
            return None
        memory = [t.detach() for t in given]
        return cls(copies, given, _versions(given), memory, torch.is_autocast_enabled("cuda"))

    def are_of(self, tensors: Sequence[Tensor | None]) -> bool:
        """Returns whether these are the copies of such tensors."""
        given = [t for t in tensors if t is not None]
        return (
            len(given) == len(self.tensors)
            and all(a is b for a, b in zip(given, self.tensors, strict=True))
            and _versions(given) == self.versions
            and all(map(kept.lies_as, given, self.memory))
            and torch.is_autocast_enabled("cuda") == self.is_cast
        )


def _versions(tensors: Sequence[Tensor]) -> int:
    return sum([t._version for t in tensors])


def _memory(
    layout: Layout, tensors: Mapping[str, Tensor], dtype: torch.dtype, zeroed: bool = False
) -> dict[str, Tensor]:
    """Returns memory for each tensor. The pieces are no views of each other."""
    like = next(iter(tensors.values()))
    new = like.new_zeros if zeroed else like.new_empty
    storage: Any = new(layout.size, dtype=dtype).untyped_storage()
    offsets = zip(tensors.items(), layout.offsets, strict=True)
    return {
        name: like.new_empty(0, dtype=dtype).set_(storage, offset, t.shape, t.stride())
        for (name, t), offset in offsets
    }


def _are_ordinary(tensors: Sequence[Tensor]) -> bool:
    """Returns whether these tensors may share their memory: they are contiguous, of one dtype and
    device, and nothing records the call."""
    first = tensors[0]
    return not recorder(first) and all(
        type(t) in PLAIN_TYPES
        and t.dtype is first.dtype
        and t.device == first.device
        and t.is_contiguous()
        for t in tensors
    )


def _is_for_cudnn(like: Tensor) -> bool:
    """Returns whether cuDNN runs a layer with weights like this one."""
    return like.is_cuda and _accepts(like.device, like.dtype, torch.backends.cudnn.enabled)


@functools.lru_cache(maxsize=64)
def _accepts(device: torch.device, dtype: torch.dtype, is_enabled: bool) -> bool:
    return (
        is_enabled
        and torch.version.cuda is not None
        and torch.backends.cudnn.is_acceptable(torch.empty(0, device=device, dtype=dtype))
        and torch._use_cudnn_rnn_flatten_weight()
    )


def _options(layer: Any) -> tuple[Any, ...]:
    """Returns the arguments of `torch._cudnn_rnn_flatten_weight` behind the tensors, as torch.nn
    has them."""
    return (
        (4 if layer.bias else 2) + (layer.proj_size > 0),
        layer.input_size,
        rnn.get_cudnn_mode(layer.mode),
        layer.hidden_size,
        layer.proj_size,
        layer.num_layers,
        layer.batch_first,
        bool(layer.bidirectional),
    )


@functools.lru_cache(maxsize=256)
def _layout_of_cudnn(
    shapes: tuple[torch.Size, ...],
    options: tuple[Any, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Layout:
    """Returns the layout that cuDNN has for the tensors of a layer. It is read off tensors that
    PyTorch's function moved into a buffer."""
    tensors = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
    with torch.no_grad():
        buffer = torch._cudnn_rnn_flatten_weight(tensors, *options)
    return Layout(buffer.numel(), tuple(int(t.storage_offset()) for t in tensors))


class Placed(torch.autograd.Function):
    """Copies tensors to their places. The gradients are those of the places."""

    @staticmethod
    def forward(ctx: Any, places: tuple[Tensor, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        torch._foreach_copy_([*places], tensors)
        return tuple(places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = zip(grads, ctx.dtypes, strict=True)
        return None, *(g if g is None else g.to(dtype) for g, dtype in cast)
