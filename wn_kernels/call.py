"""One description of a call, for every part of the engine.

`Call` holds what decides how a layer is computed: shapes, dtypes, layout and options. Beside it are
the words that it is described in: what `dim` and `eps` mean, the shapes that follow from them, the
geometry of a convolution, the dtypes of norms and products, and who records a call's operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting

# --- dim and eps -------------------------------------------------------------------------------


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


# --- a convolution -----------------------------------------------------------------------------


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

    def packed(self) -> list[int]:
        """All of it in one list of numbers, for an operator's schema."""
        lists = (self.stride, self.padding, self.dilation, self.output_padding)
        return [int(self.transposed), self.groups, *(n for numbers in lists for n in numbers)]

    @classmethod
    def unpacked(cls, numbers: Sequence[int]) -> Geometry:
        """The reverse of `packed`."""
        transposed, groups, *rest = numbers
        rank = len(rest) // 4
        stride, padding, dilation, extra = (
            tuple(rest[i * rank : (i + 1) * rank]) for i in range(4)
        )
        return cls(stride, padding, dilation, bool(transposed), extra, groups)

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


# --- dtypes --------------------------------------------------------------------------------------


def scale_dtype(v: Tensor) -> torch.dtype:
    """The dtype that norms and scales are kept in: float64 for float64, else float32."""
    return torch.float64 if v.dtype == torch.float64 else torch.float32


# Norms that may be squared, and divided by one another's squares, by the dtype they are kept in.
NORM_RANGE = {torch.float32: (1e-10, 1e10), torch.float64: (1e-80, 1e80)}


def narrows_range(x_dtype: torch.dtype, v_dtype: torch.dtype) -> bool:
    """Whether unscaled elements of `V` may leave the range of the product's dtype: a float16
    product of a wider `V`. Such a `V` has to be scaled before it is cast."""
    return x_dtype == torch.float16 and v_dtype != torch.float16


# The reader of the settings `fp32_precision` of torch 2.9 and later. A setting inherits from the
# more general one, and reads what the old settings have set. The old readers raise an error where
# a new setting is in use.
_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


def takes_tf32(dtype: torch.dtype, op: str = "matmul") -> bool:
    """Whether PyTorch is set to take products of this dtype in TF32 on a GPU: those of cuBLAS for
    the op `"matmul"`, those of cuDNN for `"conv"`."""
    if dtype != torch.float32:
        return False
    if _fp32_precision is not None:
        return _fp32_precision("cuda", op) == "tf32"
    if op == "conv":
        return torch.backends.cudnn.allow_tf32
    return torch.get_float32_matmul_precision() != "highest"


# --- the call ------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """The tensors of a call: `x`, which the weight alone has not, `V`, `g` of the kept shape, and
    the bias."""

    x: Tensor | None
    v: Tensor
    g: Tensor
    bias: Tensor | None


# Of `x`, `V`, `g` and the bias, in this order.
Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool, bool]


class Call(NamedTuple):
    """What a call is planned and computed by.

    Attributes:
        x_shape: `(*, K)` for a linear layer, `(B, C, *sizes)` for a convolution, `()` for the
            weight alone.
        v_shape: the shape of `V`.
        x_dtype: the dtype of the product; of `W`, for the weight alone.
        v_dtype: the dtype of `V`.
        dim: the kept dimension, as `canonical_dim` returns it.
        conv: the geometry of a convolution.
        channels_last: whether `x` or `V` of a convolution lies channels-last.
        tf32: whether the product is taken in TF32.
        eps: the smallest norm.
        device: the GPU that the tensors are on, for the Triton path; `None` is the current one.
    """

    x_shape: torch.Size
    v_shape: torch.Size
    x_dtype: torch.dtype
    v_dtype: torch.dtype
    dim: int | None
    conv: Geometry | None = None
    channels_last: bool = False
    tf32: bool = False
    eps: float = 0.0
    device: torch.device | None = None

    def of_weight(self) -> Call:
        """The call that forms the `W` of this one alone."""
        return self._replace(x_shape=torch.Size(()), conv=None)


# Tensor classes whose operators are torch's own.
PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


def recorder(v: Tensor) -> Literal["", "compiler", "mode", "composite"]:
    """Who records the operations of a call with the weight `v`:

    ""           nobody: the tensors can be read, and kernels launched on them
    "compiler"   `torch.compile`
    "mode"       a dispatch mode, such as that of fake tensors or a counter of operations
    "composite"  a `torch.func` transform, forward-mode AD, an export, a trace, or a tensor class
                 with operators of its own, such as `DTensor`: each needs differentiable operations
    """
    # No public query exists for the first, the second, the fourth and the last; all are stable
    # across the supported releases.
    if (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or is_exporting()
        or torch._C._get_tracing_state() is not None
    ):
        return "composite"
    if is_compiling():
        return "compiler"
    if type(v) not in PLAIN_TYPES:
        return "composite"
    return "mode" if torch._C._len_torch_dispatch_stack() else ""
