"""This file describes how the weight-normed tensors of a fused layer are normalised, finds the `g`
and `v` of a tensor, and computes the weights of a layer that has several in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import call, grouped
from . import checkpoints


class Norm(NamedTuple):
    """Describes how one tensor of a layer is normalised.

    Attributes:
        dim: the dimension whose slices are normalised, `None` for the whole tensor.
        form: the form of the state dict.
        key_g, key_v: the names of `g` and `v` in the module that holds them.
        norm: the norm of a slice, as in `Call`.
    """

    dim: int | None
    form: str
    key_g: str
    key_v: str
    norm: call.Norm = "l2"

    @classmethod
    def of(cls, name: str, dim: int | None, form: str, norm: call.Norm = "l2") -> Norm:
        """Returns the description for the tensor `name`."""
        key_g, key_v = (key.rpartition(".")[2] for key in checkpoints.keys(form, name))
        return cls(dim, form, key_g, key_v, norm)

    def options(self) -> str:
        """Returns the options of the tensor, for `repr`."""
        return f"dim={self.dim}" if self.norm == "l2" else f"dim={self.dim}, norm={self.norm!r}"


def parts(holder: Any, key_g: str, key_v: str) -> tuple[Tensor, Tensor]:
    """Returns `(g, v)`. It avoids `nn.Module.__getattr__`, which costs 1 µs per parameter."""
    own = holder._parameters
    g, v = own.get(key_g), own.get(key_v)
    if g is None or v is None:  # for example, pruning replaces a parameter
        return getattr(holder, key_g), getattr(holder, key_v)
    return g, v


def weights(
    tensors: Sequence[tuple[Tensor, Tensor]],
    places: Sequence[Tensor] | None,
    dim: int | Sequence[int | None] | None,
    eps: float = 0.0,
    norm: call.Norm | Sequence[call.Norm] = "l2",
) -> list[Tensor]:
    """Returns the weights of several tensors of a layer, computed in one call.

    Args:
        tensors: the `(g, v)` of each.
        places: memory for each weight, as in `functional.weight_norms`. The weights have its dtype.
        dim, eps, norm: as in `functional.weight_norms`.
    """
    if not tensors:
        return []
    g, v = map(list, zip(*tensors, strict=True))
    given = dim, eps, places[0].dtype if places else None, norm
    options = tuple([grouped.for_each(each, len(v)) for each in given])
    return grouped.formed(v, g, options, places, together=True)
