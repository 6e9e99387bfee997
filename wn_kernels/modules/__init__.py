"""This package contains drop-in layers with a weight-normalised weight, and mean-only batch
normalisation."""

from .conv import (
    WNConv1d,
    WNConv2d,
    WNConv3d,
    WNConvTranspose1d,
    WNConvTranspose2d,
    WNConvTranspose3d,
    WNLazyConv1d,
    WNLazyConv2d,
    WNLazyConv3d,
    WNLazyConvTranspose1d,
    WNLazyConvTranspose2d,
    WNLazyConvTranspose3d,
)
from .linear import WNLazyLinear, WNLinear
from .mean_only import (
    WNMeanOnlyBatchNorm1d,
    WNMeanOnlyBatchNorm2d,
    WNMeanOnlyBatchNorm3d,
    WNMeanOnlySyncBatchNorm,
)
from .recurrent import WNGRU, WNLSTM, WNRNN, WNGRUCell, WNLSTMCell, WNRNNCell

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
    "WNMeanOnlyBatchNorm1d",
    "WNMeanOnlyBatchNorm2d",
    "WNMeanOnlyBatchNorm3d",
    "WNMeanOnlySyncBatchNorm",
    "WNRNNCell",
]
