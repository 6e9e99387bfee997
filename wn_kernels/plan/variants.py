"""This file chooses the variant of a backend that serves a call.

If `wn_kernels.tune` was run for such a call on this machine, the variant is the fastest that it
measured (`table.py`). Otherwise it is the cheapest by the cost model (`costs.py`).
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

from ..backends import vendor
from ..call import Call
from . import table
from .costs import costs, keeps_product, scales_late


class Plan(NamedTuple):
    """A plan states how a call is computed.

    Attributes:
        backend: `"triton"`, `"native"`, `"aten"` or `"reference"`.
        forward: the variant of the forward, without gradients.
        backward: the variant of the backward.
        keeps: what the forward of a training step saves for the backward besides its inputs and the
            norms: the `"product"` `x Vᵀ` of a linear layer on a CPU, the `"weight"` `W`, the same
            `"packed"` for our products of a convolution on a GPU, or nothing.
    """

    backend: str
    forward: str
    backward: str
    keeps: Literal["", "product", "weight", "packed"] = ""

    @property
    def kept(self) -> str:
        """What is kept, in words."""
        return "packed weight" if self.keeps == "packed" else self.keeps

    @property
    def recorded(self) -> str:
        """The variant of the forward in a training step. It forms `W` if `W` is kept."""
        return "materialize" if self.keeps == "weight" else self.forward

    def of_weight(self) -> Plan:
        """Returns the plan of the call that forms `W` alone."""
        return Plan(self.backend, "materialize", "materialize")

    def entry(self) -> dict[str, str]:
        """Returns the plan's entry in the tuned table."""
        return {"forward": self.forward, "backward": self.backward, "keeps": self.keeps}

    def __str__(self) -> str:
        kept = f", keeps the {self.kept}" if self.keeps else ""
        return f"{self.forward}/{self.backward}{kept}"


# A `W` of at most this many bytes may be kept for the backward whatever the input's size.
KEPT_WEIGHT = 2**21


def _may_keep(call: Call, backend: str, forward: str, backward: str) -> bool:
    """Returns whether more may be saved for the backward than the plain layer saves.

    The product of a linear layer on a CPU may take 1/8 of the size of the weight. The `W` of a
    convolution, packed or not, and on the Triton path of a linear layer, may take 1/8 of the size
    of the input. A small `W` is kept whatever the input's size, since computing it again is all
    overhead. A `W` in float32 for a layer in half precision is not kept on a CPU. The native
    library, and the Triton path of a linear layer, form `W` for a training step, whatever the
    forward does without gradients. The native library keeps every `W` that is normalised along
    taps, because forming it twice takes longer than eager does.
    """
    linear = call.conv is None
    if linear and backend != "triton":
        return forward == backward == "scaled" and scales_late(call) and keeps_product(call)
    forms_anyway = linear or backend == "native"
    if _packs(call, backend, forward, backward):
        return _is_small(call)
    if backward != "materialize" or (forward != "materialize" and not forms_anyway):
        return False
    if backend == "aten" and vendor.is_wrong_for(call.x_dtype, len(call.v_shape)):
        return False  # PyTorch would save `x` and `W` in float32
    if call.conv and backend != "triton" and call.conv.scale_axis(call.dim) == "taps":
        return backend == "native"  # it can scale nothing but `W`
    return _is_small(call)


def _packs(call: Call, backend: str, forward: str, backward: str) -> bool:
    """Returns whether both directions take a packed `W`."""
    return backend == "triton" and call.conv is not None and forward == backward == "packed"


def _is_small(call: Call) -> bool:
    """Returns whether `W` is small by itself, or beside the input."""
    size = call.x_dtype.itemsize
    w, input = size * math.prod(call.v_shape), size * math.prod(call.x_shape)
    return w <= max(input / 8, KEPT_WEIGHT)


def _plan(call: Call, backend: str, forward: str, backward: str, keeps: bool) -> Plan:
    kept = "product" if call.conv is None and backend != "triton" else "weight"
    if _packs(call, backend, forward, backward):
        kept = "packed"
    return Plan(backend, forward, backward, kept if keeps else "")  # type: ignore[arg-type]


def by_cost(call: Call, backend: str) -> Plan:
    """Returns the cheapest plan by the cost model."""
    if not call.x_shape or backend == "reference":  # there is only one plan
        return Plan(backend, "materialize", "materialize")
    found = costs(call, backend)
    forward, backward = found.cheapest()
    if found.kept is None:
        keeps = _may_keep(call, backend, forward, backward)
        return _plan(call, backend, forward, backward, keeps)
    keeps = found.keeping_pays() and _may_keep(call, backend, forward, "materialize")
    return _plan(call, backend, forward, "materialize" if keeps else backward, keeps)


def choices(call: Call, backend: str) -> list[Plan]:
    """Returns every plan of a backend for the call of a layer. The cost model's comes first."""
    found = costs(call, backend)
    every = {
        _plan(call, backend, forward, backward, keeps): None
        for forward in found.forward
        for backward in found.backward
        for keeps in (True, False)
        if not keeps or _may_keep(call, backend, forward, backward)
    }
    first = by_cost(call, backend)
    return sorted(every, key=lambda plan: plan != first)


def choose(call: Call, backend: str) -> Plan:
    """Returns the plan of a backend for a call."""
    tuned = None if not call.x_shape else table.find(backend, key(call), call.device)
    if tuned is None:
        return by_cost(call, backend)
    for plan in choices(call, backend):
        if plan.entry() == tuned:
            return plan
    warnings.warn(
        f"{table.location()}: the entry {tuned} cannot serve {key(call)} and is ignored",
        stacklevel=2,
    )
    return by_cost(call, backend)


# Seconds of the processor that a layer with launches of its own takes more than PyTorch's with a
# formed `W`, in a forward and in a training step: those of a HiFi-GAN of 78 layers on an H200
# (docs/gpu.md), (4.24 - 3.21) ms / 78 and (13.58 - 10.98) ms / 78.
LAUNCHED = 13e-6, 33e-6


def shared_seconds(call: Call, plan: Plan, records: bool) -> tuple[float, float] | None:
    """Returns the estimated seconds of a layer with its own plan, and with a `W` that is formed
    together with those of other layers, in a training step (`records`) or in a forward alone. The
    result is `None` if PyTorch's product with a formed `W` cannot serve the call.

    With a formed `W`, that product is left, which is the variant `materialize` without its first
    launch. A layer of its own costs the processor more, on a GPU.
    """
    if not plan.forward or not call.x_shape:
        return None
    launches = plan.backend == "triton"
    if call.conv and not launches and vendor.is_wrong_for(call.x_dtype, len(call.v_shape)):
        return None
    found = costs(call, plan.backend)
    forward, backward = (way.get("materialize") for way in (found.forward, found.backward))
    if forward is None or backward is None:
        return None
    own = found.seconds(found.forward[plan.recorded if records else plan.forward])
    with_weight = found.seconds(forward[1:])
    if records:
        own += found.seconds(found.backward[plan.backward])
        with_weight += found.seconds(found.kept or backward[1:])
    return own + (LAUNCHED[records] if launches else 0.0), with_weight


def shares(call: Call, plan: Plan, records: bool) -> bool:
    """Returns whether a layer of a group takes the `W` that the group forms."""
    seconds = shared_seconds(call, plan, records)
    return seconds is not None and seconds[1] <= seconds[0]


def key(call: Call) -> str:
    """Returns the name of a layer's call in the tuned table."""
    shapes = "·".join("×".join(map(str, shape)) for shape in (call.x_shape, call.v_shape))
    dtypes = "·".join(str(dtype).removeprefix("torch.") for dtype in (call.x_dtype, call.v_dtype))
    words = ["linear" if call.conv is None else "convolution", shapes, dtypes, f"dim={call.dim}"]
    if call.conv is not None:
        words += [f"{name}={value}" for name, value in call.conv._asdict().items()]
    words += [name for name in ("channels_last", "tf32") if getattr(call, name)]
    return " ".join(words)
