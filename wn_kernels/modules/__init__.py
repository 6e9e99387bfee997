"""This package contains drop-in layers with a weight-normalised weight."""

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

__all__ = [
    "WNConv1d",
    "WNConv2d",
    "WNConv3d",
    "WNConvTranspose1d",
    "WNConvTranspose2d",
    "WNConvTranspose3d",
    "WNLazyConv1d",
    "WNLazyConv2d",
    "WNLazyConv3d",
    "WNLazyConvTranspose1d",
    "WNLazyConvTranspose2d",
    "WNLazyConvTranspose3d",
    "WNLazyLinear",
    "WNLinear",
]
