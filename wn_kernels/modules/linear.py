"""The linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from .. import functional as WF
from ..backends.shapes import kept_shape
from .weight import WeightNormMixin


class WNLinear(WeightNormMixin, nn.Linear):  # type: ignore[override]
    """`torch.nn.Linear` with a weight-normalised weight: `y = x Wᵀ + b`, `W = g · V / ‖V‖`.

    Drop-in: it takes the same arguments, is an instance of `nn.Linear`, starts from the same
    weight for the same seed, and reads and assigns `.weight`.

    Args:
        in_features: K, the size of each input.
        out_features: N, the size of each output.
        bias: whether to learn an additive bias.
        device: of the parameters.
        dtype: of the parameters.
        dim: the dimension of the weight whose slices are normalised: 0 (each output), 1 (each
            input), or `None` / `-1` (one norm over the whole weight).
        eps: the smallest norm; see `wn_kernels.functional.weight_norm`.

    Attributes:
        weight_v: the direction, of shape `(N, K)`.
        weight_g: the magnitude: `(N, 1)` for `dim=0`, `(1, K)` for `dim=1`, `()` for `dim=None`.
        bias: of shape `(N,)`, or `None`.

    Shape:
        Input `(*, K)`, output `(*, N)`.

    Raises:
        ValueError: `dim` is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dim: int | None = 0,
        eps: float = 0.0,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (out_features, in_features)
        self._make_parameters(shape, out_features if bias else None, dim, eps, factory)
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        return WF.wn_linear(input, *self._parameters_now(), dim=self.dim, eps=self.eps)


class WNLazyLinear(LazyModuleMixin, WNLinear):  # type: ignore[override]
    """`torch.nn.LazyLinear` with a weight-normalised weight: `in_features` is taken from the first
    input, whereupon the layer is a `WNLinear`.

    Args:
        out_features, bias, device, dtype, dim, eps: as in `WNLinear`.
    """

    cls_to_become = WNLinear

    def __init__(
        self,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dim: int | None = 0,
        eps: float = 0.0,
    ) -> None:
        super().__init__(0, 0, bias=False, dim=dim, eps=eps)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.out_features = out_features
        self.weight_v: Any = UninitializedParameter(**factory)
        self.weight_g: Any = UninitializedParameter(**factory)
        if bias:
            self.bias = UninitializedParameter(**factory)

    def reset_parameters(self) -> None:
        if not self.has_uninitialized_params() and self.in_features != 0:
            super().reset_parameters()

    def initialize_parameters(self, input: Tensor) -> None:
        """Gives the parameters their shapes and values, once the input's size is known."""
        if self.has_uninitialized_params():
            with torch.no_grad():
                self.in_features = input.shape[-1]
                shape = (self.out_features, self.in_features)
                self.weight_v.materialize(shape)
                self.weight_g.materialize(kept_shape(shape, self.dim))
                if self.bias is not None:
                    self.bias.materialize((self.out_features,))
                self.reset_parameters()
