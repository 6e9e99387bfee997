"""The linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as WF
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
