"""Fused weight normalisation for PyTorch: see README.md and docs/architecture.md."""

from . import functional, init
from .convert import fold, fuse, remove_weight_norm, state_dict, unfuse, weight_norm
from .modules import (
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
    WNLazyLinear,
    WNLinear,
    WNMeanOnlyBatchNorm1d,
    WNMeanOnlyBatchNorm2d,
    WNMeanOnlyBatchNorm3d,
    WNMeanOnlySyncBatchNorm,
)
from .monitoring import monitor
from .plan import use_backend
from .training import fix_magnitudes_, param_groups, renormalize_, slice_norms
from .tuning import explain, tune

__version__ = "0.1.0"

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
    "WNMeanOnlyBatchNorm1d",
    "WNMeanOnlyBatchNorm2d",
    "WNMeanOnlyBatchNorm3d",
    "WNMeanOnlySyncBatchNorm",
    "explain",
    "fix_magnitudes_",
    "fold",
    "functional",
    "fuse",
    "init",
    "monitor",
    "param_groups",
    "remove_weight_norm",
    "renormalize_",
    "slice_norms",
    "state_dict",
    "tune",
    "unfuse",
    "use_backend",
    "weight_norm",
]
