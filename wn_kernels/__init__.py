"""Fused weight normalisation for PyTorch: see README.md and docs/architecture.md."""

from . import functional, init
from .convert import fold, frozen_weights, fuse, remove_weight_norm, state_dict, unfuse, weight_norm
from .modules import (
    WNGRU,
    WNLSTM,
    WNRNN,
    WNConv1d,
    WNConv2d,
    WNConv3d,
    WNConvTranspose1d,
    WNConvTranspose2d,
    WNConvTranspose3d,
    WNGRUCell,
    WNLazyConv1d,
    WNLazyConv2d,
    WNLazyConv3d,
    WNLazyConvTranspose1d,
    WNLazyConvTranspose2d,
    WNLazyConvTranspose3d,
    WNLazyLinear,
    WNLinear,
    WNLSTMCell,
    WNRNNCell,
)
from .plan import use_backend
from .tuning import explain, tune

__version__ = "0.1.0"

__all__ = [
    "WNGRU",
    "WNLSTM",
    "WNRNN",
    "WNConv1d",
    "WNConv2d",
    "WNConv3d",
    "WNConvTranspose1d",
    "WNConvTranspose2d",
    "WNConvTranspose3d",
    "WNGRUCell",
    "WNLSTMCell",
    "WNLazyConv1d",
    "WNLazyConv2d",
    "WNLazyConv3d",
    "WNLazyConvTranspose1d",
    "WNLazyConvTranspose2d",
    "WNLazyConvTranspose3d",
    "WNLazyLinear",
    "WNLinear",
    "WNRNNCell",
    "explain",
    "fold",
    "frozen_weights",
    "functional",
    "fuse",
    "init",
    "remove_weight_norm",
    "state_dict",
    "tune",
    "unfuse",
    "use_backend",
    "weight_norm",
]
