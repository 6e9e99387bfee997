"""What `dim` means: which dimension of `V` is kept, and the shapes that follow from it. What a
convolution is: its geometry, and where its scale acts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


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


class Geometry(NamedTuple):
    """The geometry of a convolution: what `torch.convolution` takes after `bias`, in its order.

    The weight is `(out, in / groups, *taps)`, of a transposed convolution
    `(in, out / groups, *taps)`. Every tuple has one number for each spatial dimension.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def out_channels(self, v_shape: Sequence[int]) -> int:
        return v_shape[1] * self.groups if self.transposed else v_shape[0]

    def output_sizes(self, x_sizes: Sequence[int], taps: Sequence[int]) -> list[int]:
        """The spatial sizes of the output; `torch.nn.Conv3d` and `ConvTranspose3d` document the
        formula."""
        reach = [d * (t - 1) for d, t in zip(self.dilation, taps, strict=True)]
        axes = zip(x_sizes, reach, self.stride, self.padding, self.output_padding, strict=True)
        if self.transposed:
            return [(x - 1) * s - 2 * p + r + extra + 1 for x, r, s, p, extra in axes]
        return [(x + 2 * p - r - 1) // s + 1 for x, r, s, p, _ in axes]

    def scale_axis(self, dim: int | None) -> str:
        """What the scale along `dim` of the weight multiplies: whole channels of the "output" or
        of the "input", "taps" of the kernel, or everything, "whole"."""
        if dim is None:
            return "whole"
        if dim > 1:
            return "taps"
        return "output" if (dim == 1) == self.transposed else "input"

    def owns_slices(self, dim: int | None) -> bool:
        """Whether all of a slice goes into each pixel of one output channel.

        That of a transposed convolution with a stride sees some of the taps only.
        """
        if self.transposed:
            return dim == 1 and self.groups == 1 and set(self.stride) == {1}
        return dim == 0

    def per_channel(self, s: Tensor, dim: int | None, ndim: int) -> Tensor:
        """The scale of kept shape, to multiply the input or the output of `ndim` dimensions.

        Along the weight's second dimension every group has the same ones.
        """
        if dim is None:
            return s
        s = s.view(-1)
        return (s.repeat(self.groups) if dim == 1 else s).view(-1, *[1] * (ndim - 2))
