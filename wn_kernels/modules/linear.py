"""This file contains the linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as WF
from . import prepared
from .weight import WeightNormMixin

if TYPE_CHECKING:
    from torch.types import Device

    from ..call import Norm


class WNLinear(WeightNormMixin, nn.Linear):  # type: ignore[override]
    """Replaces `torch.nn.Linear` with a weight-normalised weight. It computes `y = x Wᵀ + b` with
    `W = g · V / ‖V‖`.

    It takes the same arguments and is an instance of `nn.Linear`. It starts from the same weight
    for the same seed. `.weight` can be read and assigned.

    Args:
        dim: the dimension of the weight whose slices are normalised: 0 (each output), 1 (each
            input), or `None` / `-1` (one norm over the whole weight).
        eps: the smallest norm; see `wn_kernels.functional.weight_norm`.
        norm: the norm of a slice: `"l2"`, `"l1"` or `"linf"`. `g` starts at it.
        magnitude_preserving: whether `g` is a constant with which outputs have the variance of
            independent inputs, as in EDM2 (Karras et al. 2024). `V` starts from the normal
            distribution, and the bias from zero. `wn_kernels.renormalize_(model, "rms")` keeps
            the entries of `V` at unit magnitude.

    Attributes:
        weight_v: the direction, of shape `(N, K)`.
        weight_g: the magnitude: `(N, 1)` for `dim=0`, `(1, K)` for `dim=1`, `()` for `dim=None`.
        bias: of shape `(N,)`, or `None`.

    Shape:
        Input `(*, K)` with K = `in_features`, output `(*, N)` with N = `out_features`.

    Raises:
        ValueError: `dim` is out of range, or `norm` is unknown.
    """

    weight_ndim = 2
    plain = nn.Linear

    if TYPE_CHECKING:

        def __init__(
            self,
            in_features: int,
            out_features: int,
            bias: bool = True,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            dim: int | None = 0,
            eps: float = 0.0,
            norm: Norm = "l2",
            magnitude_preserving: bool = False,
        ) -> None: ...

    def forward(self, input: Tensor) -> Tensor:
        operands = self._operands()
        if operands is None:
            return self.plain.forward(self, input)
        v, g, bias, dim, eps, norm = operands
        w = self._prepared_weight(input, v, g, bias)
        if w is not None:
            return F.linear(input, w, prepared.like(bias, w))
        return WF.wn_linear(input, v, g, bias, dim=dim, eps=eps, norm=norm)


class WNLazyLinear(WeightNormMixin, nn.LazyLinear):  # type: ignore[misc, override]
    """Replaces `torch.nn.LazyLinear` with a weight-normalised weight. `in_features` is taken from
    the first input, and the layer then becomes a `WNLinear`.

    Args:
        dim: as in `WNLinear`.
        eps: as in `WNLinear`.
        norm: as in `WNLinear`.
        magnitude_preserving: as in `WNLinear`.
    """

    weight_ndim = 2
    cls_to_become = WNLinear

    if TYPE_CHECKING:

        def __init__(
            self,
            out_features: int,
            bias: bool = True,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            dim: int | None = 0,
            eps: float = 0.0,
            norm: Norm = "l2",
            magnitude_preserving: bool = False,
        ) -> None: ...

    def initialize_parameters(self, input: Tensor) -> None:
        """Gives the parameters their shapes and values from the first input."""
        if self.has_uninitialized_params():
            self.in_features = input.shape[-1]
            self._materialize((self.out_features, self.in_features), self.out_features)
