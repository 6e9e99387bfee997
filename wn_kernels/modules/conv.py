"""This file contains the convolutions and the transposed convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as WF
from . import prepared
from .weight import WeightNormMixin

if TYPE_CHECKING:
    from torch.types import Device

    from ..call import Norm

# A size with an entry for each spatial dimension; a single number serves all of them.
Size = TypeVar("Size")
One: TypeAlias = tuple[int]
Two: TypeAlias = tuple[int, int]
Three: TypeAlias = tuple[int, int, int]
PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]


class _Convolution(WeightNormMixin, Generic[Size]):
    """Holds the `forward` of the three convolutions. Their constructors are those of torch.nn."""

    if TYPE_CHECKING:

        def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int | Size,
            stride: int | Size = 1,
            padding: str | int | Size = 0,
            dilation: int | Size = 1,
            groups: int = 1,
            bias: bool = True,
            padding_mode: PaddingMode = "zeros",
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            dim: int | None = 0,
            eps: float = 0.0,
            norm: Norm = "l2",
            magnitude_preserving: bool = False,
        ) -> None: ...

    def forward(self: Any, input: Tensor) -> Tensor:
        operands = self._operands()
        if operands is None:
            return self.plain.forward(self, input)
        v, g, bias, dim, eps, norm = operands
        w = self._prepared_weight(input, v, g, bias)
        if w is not None:
            return self._conv_forward(input, w, prepared.like(bias, w))
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        geometry = self.stride, padding, self.dilation, False, 0, self.groups
        return WF.run(v.ndim - 2, input, v, g, bias, geometry, dim, eps, norm)


# PyTorch's transposed convolutions, by the number of spatial dimensions.
_TRANSPOSED = F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d


class _ConvolutionTranspose(WeightNormMixin, Generic[Size]):
    """Holds the `forward` of the three transposed convolutions."""

    if TYPE_CHECKING:

        def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int | Size,
            stride: int | Size = 1,
            padding: int | Size = 0,
            output_padding: int | Size = 0,
            groups: int = 1,
            bias: bool = True,
            dilation: int | Size = 1,
            padding_mode: PaddingMode = "zeros",
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            dim: int | None = 0,
            eps: float = 0.0,
            norm: Norm = "l2",
            magnitude_preserving: bool = False,
        ) -> None: ...

    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        operands = self._operands()
        if operands is None:
            return self.plain.forward(self, input, output_size)
        v, g, bias, dim, eps, norm = operands
        output_padding = self.output_padding
        if output_size is not None:
            output_padding = self._output_padding(
                input,
                output_size,
                self.stride,
                self.padding,
                self.kernel_size,
                len(self.kernel_size),
                self.dilation,
            )
        w = self._prepared_weight(input, v, g, bias)
        if w is not None:
            options = self.stride, self.padding, output_padding, self.groups, self.dilation
            return _TRANSPOSED[v.ndim - 3](input, w, prepared.like(bias, w), *options)
        geometry = self.stride, self.padding, self.dilation, True, output_padding, self.groups
        return WF.run(v.ndim - 2, input, v, g, bias, geometry, dim, eps, norm)


class _Lazy(WeightNormMixin):
    """Takes `in_channels` of the lazy convolutions from the first input."""

    def initialize_parameters(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> None:
        """Gives the parameters their shapes and values from the first input."""
        if not self.has_uninitialized_params():
            return
        channels = self._get_in_channels(input)
        if channels % self.groups:
            raise ValueError(
                f"groups={self.groups} does not divide the input's {channels} channels"
            )
        self.in_channels = channels
        first, second = self.out_channels, channels
        if self.transposed:
            first, second = second, first
        shape = (first, second // self.groups, *self.kernel_size)
        self._materialize(shape, self.out_channels)


class _LazyConvolution(_Lazy, _Convolution[Size]):
    """Has the constructor of the three lazy convolutions, which take no `in_channels`."""

    if TYPE_CHECKING:

        def __init__(
            self,
            out_channels: int,
            kernel_size: int | Size,
            stride: int | Size = 1,
            padding: int | Size = 0,
            dilation: int | Size = 1,
            groups: int = 1,
            bias: bool = True,
            padding_mode: PaddingMode = "zeros",
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            dim: int | None = 0,
            eps: float = 0.0,
            norm: Norm = "l2",
            magnitude_preserving: bool = False,
        ) -> None: ...


class _LazyConvolutionTranspose(_Lazy, _ConvolutionTranspose[Size]):
    """Has the constructor of the three lazy transposed convolutions."""

    if TYPE_CHECKING:

        def __init__(
            self,
            out_channels: int,
            kernel_size: int | Size,
            stride: int | Size = 1,
            padding: int | Size = 0,
            output_padding: int | Size = 0,
            groups: int = 1,
            bias: bool = True,
            dilation: int | Size = 1,
            padding_mode: PaddingMode = "zeros",
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            dim: int | None = 0,
            eps: float = 0.0,
            norm: Norm = "l2",
            magnitude_preserving: bool = False,
        ) -> None: ...


class WNConv1d(_Convolution[One], nn.Conv1d):  # type: ignore[override]
    """Replaces `torch.nn.Conv1d` with a weight-normalised weight.

    It takes the same arguments and is an instance of `nn.Conv1d`. It starts from the same weight
    for the same seed. `.weight` can be read and assigned.

    Args:
        dim: the dimension of the weight whose slices are normalised: 0 (each output channel), 1
            (each input channel of a group), 2 (each position of the kernel), or `None` / `-1` (one
            norm over the whole weight).
        eps: the smallest norm; see `wn_kernels.functional.weight_norm`.
        norm: the norm of a slice: `"l2"`, `"l1"` or `"linf"`. `g` starts at it.
        magnitude_preserving: whether `g` is a constant with which outputs have the variance of
            independent inputs, as in EDM2 (Karras et al. 2024). `V` starts from the normal
            distribution, and the bias from zero. `wn_kernels.renormalize_(model, "rms")` keeps
            the entries of `V` at unit magnitude.

    Attributes:
        weight_v: the direction, of shape `(out_channels, in_channels / groups, kernel_size)`.
        weight_g: the magnitude: `weight_v`'s shape with every dimension but `dim` set to 1, 0-d
            for `dim=None`.
        bias: of shape `(out_channels,)`, or `None`.

    Shape:
        The shapes are those of `torch.nn.Conv1d`. Channels-last inputs give channels-last outputs.

    Raises:
        ValueError: an option is out of range.
    """

    weight_ndim = 3
    plain = nn.Conv1d


class WNConv2d(_Convolution[Two], nn.Conv2d):  # type: ignore[override]
    """Replaces `torch.nn.Conv2d` with a weight-normalised weight; see `WNConv1d`."""

    weight_ndim = 4
    plain = nn.Conv2d


class WNConv3d(_Convolution[Three], nn.Conv3d):  # type: ignore[override]
    """Replaces `torch.nn.Conv3d` with a weight-normalised weight; see `WNConv1d`."""

    weight_ndim = 5
    plain = nn.Conv3d


class WNConvTranspose1d(_ConvolutionTranspose[One], nn.ConvTranspose1d):  # type: ignore[override]
    """Replaces `torch.nn.ConvTranspose1d` with a weight-normalised weight.

    It is a drop-in layer, as `WNConv1d` is. Its weight is
    `(in_channels, out_channels / groups, kernel_size)`. Therefore `dim=0`, PyTorch's default here
    too, normalises each *input* channel, and `dim=1` each output channel of a group.

    Args:
        dim: as in `WNConv1d`.
        eps: as in `WNConv1d`.
        norm: as in `WNConv1d`.
        magnitude_preserving: as in `WNConv1d`.
    """

    weight_ndim = 3
    plain = nn.ConvTranspose1d


class WNConvTranspose2d(_ConvolutionTranspose[Two], nn.ConvTranspose2d):  # type: ignore[override]
    """Replaces `torch.nn.ConvTranspose2d` with a weight-normalised weight; see
    `WNConvTranspose1d`."""

    weight_ndim = 4
    plain = nn.ConvTranspose2d


class WNConvTranspose3d(_ConvolutionTranspose[Three], nn.ConvTranspose3d):  # type: ignore[override]
    """Replaces `torch.nn.ConvTranspose3d` with a weight-normalised weight; see
    `WNConvTranspose1d`."""

    weight_ndim = 5
    plain = nn.ConvTranspose3d


class WNLazyConv1d(_LazyConvolution[One], nn.LazyConv1d):  # type: ignore[misc, override]
    """Replaces `torch.nn.LazyConv1d` with a weight-normalised weight. `in_channels` is taken from
    the first input, and the layer then becomes a `WNConv1d`."""

    weight_ndim = 3
    cls_to_become = WNConv1d


class WNLazyConv2d(_LazyConvolution[Two], nn.LazyConv2d):  # type: ignore[misc, override]
    """Replaces `torch.nn.LazyConv2d` with a weight-normalised weight; see `WNLazyConv1d`."""

    weight_ndim = 4
    cls_to_become = WNConv2d


class WNLazyConv3d(_LazyConvolution[Three], nn.LazyConv3d):  # type: ignore[misc, override]
    """Replaces `torch.nn.LazyConv3d` with a weight-normalised weight; see `WNLazyConv1d`."""

    weight_ndim = 5
    cls_to_become = WNConv3d


class WNLazyConvTranspose1d(_LazyConvolutionTranspose[One], nn.LazyConvTranspose1d):  # type: ignore[misc, override]
    """Replaces `torch.nn.LazyConvTranspose1d` with a weight-normalised weight; see
    `WNLazyConv1d`."""

    weight_ndim = 3
    cls_to_become = WNConvTranspose1d


class WNLazyConvTranspose2d(_LazyConvolutionTranspose[Two], nn.LazyConvTranspose2d):  # type: ignore[misc, override]
    """Replaces `torch.nn.LazyConvTranspose2d` with a weight-normalised weight; see
    `WNLazyConv1d`."""

    weight_ndim = 4
    cls_to_become = WNConvTranspose2d


class WNLazyConvTranspose3d(_LazyConvolutionTranspose[Three], nn.LazyConvTranspose3d):  # type: ignore[misc, override]
    """Replaces `torch.nn.LazyConvTranspose3d` with a weight-normalised weight; see
    `WNLazyConv1d`."""

    weight_ndim = 5
    cls_to_become = WNConvTranspose3d
