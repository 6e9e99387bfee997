"""What `dim` means: which dimension of `V` is kept, and the shapes that follow from it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def canonical_dim(dim: int | None, ndim: int) -> int | None:
    """The kept dimension as an index in `[0, ndim)`, or `None` for one norm over the whole tensor.

    As in `torch._weight_norm`, `-1` also means the whole tensor; `-2`, `-3`, ... count from the
    end.

    Raises:
        TypeError: `dim` is neither an `int` nor `None`.
        ValueError: `dim` is out of range for a tensor of `ndim` dimensions.
    """
    if dim is None or dim == -1:
        return None
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int or None, got {dim!r}")
    if not -ndim <= dim < ndim:
        raise ValueError(
            f"dim={dim} is out of range for a weight of {ndim} dimensions: expected None, -1 "
            f"(both: one norm over the whole tensor) or a value in [{-ndim}, {ndim - 1}]"
        )
    return dim % ndim


def kept_shape(shape: Sequence[int], dim: int | None) -> tuple[int, ...]:
    """The shape of `g` and of the norms: that of `V` with every dimension but `dim` set to 1; `()`
    for the whole tensor."""
    if dim is None:
        return ()
    return tuple(size if i == dim else 1 for i, size in enumerate(shape))


def reduced_dims(ndim: int, dim: int | None) -> list[int]:
    """The dimensions the norm sums over."""
    return [i for i in range(ndim) if i != dim]


def canonical_eps(eps: float) -> float:
    """`eps` as a float.

    Raises:
        TypeError: `eps` is not a number.
        ValueError: `eps` is negative, infinite or NaN.
    """
    try:
        value = float(eps)
    except (TypeError, ValueError):
        raise TypeError(f"eps must be a number, got {eps!r}") from None
    if not 0.0 <= value < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    return value
