"""The planner decides how a call is computed.

`backend.py` chooses the backend, and `variants.py` chooses the variant. The choice of the variant
follows measurements (`table.py`) or the cost model (`costs.py`), which uses constants of devices
(`devices.py`), scaled by the rates of a CPU (`rates.py`). `sequences.py` is the cost model of
recurrent layers.
"""

from . import costs, devices, rates, sequences, table
from .backend import (
    BACKENDS,
    ENVIRONMENT_VARIABLE,
    cannot_serve,
    choose_backend,
    forced,
    is_forced,
    prepares,
    serving,
    triton_unavailable,
    use_backend,
)
from .variants import (
    KEPT_WEIGHT,
    Plan,
    by_cost,
    choices,
    choose,
    fewest,
    is_better_formed,
    kept_out,
    key,
    shared_seconds,
    shares,
)

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
    "fewest",
    "forced",
    "is_better_formed",
    "is_forced",
    "kept_out",
    "key",
    "prepares",
    "rates",
    "sequences",
    "serving",
    "shared_seconds",
    "shares",
    "table",
    "triton_unavailable",
    "use_backend",
]
