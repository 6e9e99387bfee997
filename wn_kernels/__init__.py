"""Fused weight normalisation for PyTorch: see README.md and docs/architecture.md."""

from . import functional
from .modules import (
    WNConv1d,
    WNConv2d,
    WNConv3d,
    WNConvTranspose1d,
    WNConvTranspose2d,
    WNConvTranspose3d,
    WNLazyLinear,
    WNLinear,
)
from .plan import use_backend

__version__ = "0.1.0"

__all__ = [
    "WNConv1d",
    "WNConv2d",
    "WNConv3d",
    "WNConvTranspose1d",
    "WNConvTranspose2d",
    "WNConvTranspose3d",
    "WNLazyLinear",
    "WNLinear",
    "functional",
    "use_backend",
]
