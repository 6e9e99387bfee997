"""The planner decides how a call is computed.

`backend.py` chooses the backend, and `variants.py` chooses the variant. The choice of the variant
follows measurements (`table.py`) or the cost model (`costs.py`), which uses constants of devices
(`devices.py`).
"""

from . import costs, devices, table
from .backend import (
    BACKENDS,
    ENVIRONMENT_VARIABLE,
    cannot_serve,
    choose_backend,
    forced,
    is_forced,
    launches,
    serving,
    tries_native,
    triton_unavailable,
    use_backend,
)
from .variants import KEPT_WEIGHT, Plan, by_cost, choices, choose, key, shared_seconds, shares

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "KEPT_WEIGHT",
    "Plan",
    "by_cost",
    "cannot_serve",
    "choices",
    "choose",
    "choose_backend",
    "costs",
    "devices",
    "forced",
    "is_forced",
    "key",
    "launches",
    "serving",
    "shared_seconds",
    "shares",
    "table",
    "tries_native",
    "triton_unavailable",
    "use_backend",
]
