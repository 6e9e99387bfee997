"""Drop-in layers with a weight-normalised weight."""

from .linear import WNLinear

__all__ = ["WNLinear"]
