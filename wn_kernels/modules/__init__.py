"""Drop-in layers with a weight-normalised weight."""

from .conv import (
    WNConv1d,
    WNConv2d,
    WNConv3d,
    WNConvTranspose1d,
    WNConvTranspose2d,
    WNConvTranspose3d,
)
from .linear import WNLazyLinear, WNLinear

__all__ = [
    "WNConv1d",
    "WNConv2d",
    "WNConv3d",
    "WNConvTranspose1d",
    "WNConvTranspose2d",
    "WNConvTranspose3d",
    "WNLazyLinear",
    "WNLinear",
]
