"""Drop-in layers with a weight-normalised weight."""

from .linear import WNLazyLinear, WNLinear

__all__ = ["WNLazyLinear", "WNLinear"]
