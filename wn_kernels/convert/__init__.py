"""This package converts models; docs/convert.md describes it."""

from .frozen import frozen_weights
from .models import Layer, Report, fold, fuse, remove_weight_norm, unfuse, weight_norm
from .states import state_dict

__all__ = [
    "Layer",
    "Report",
    "fold",
    "frozen_weights",
    "fuse",
    "remove_weight_norm",
    "state_dict",
    "unfuse",
    "weight_norm",
]
