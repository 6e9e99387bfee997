"""Fused weight normalisation for PyTorch: see README.md and docs/architecture.md."""

from . import functional
from .modules import WNLazyLinear, WNLinear
from .plan import use_backend

__version__ = "0.1.0"

__all__ = ["WNLazyLinear", "WNLinear", "functional", "use_backend"]
