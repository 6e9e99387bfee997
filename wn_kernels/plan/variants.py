"""This file chooses the variant of a backend that serves a call.

If `wn_kernels.tune` was run for such a call on this machine, the variant is the fastest that it
measured (`table.py`). Otherwise it is the cheapest by the cost model (`costs.py`).
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

from ..backends import aten_weight, vendor
from ..call import Call
from . import table
from .costs import costs, scales_late
from .devices import Device
from .stages import can_follow, keeps_product

Kept = Literal["", "product", "weight", "packed"]
_NOTHING: Kept = ""


class Plan(NamedTuple):
    """A plan states how a call is computed.

    Attributes:
        backend: `"triton"`, `"native"`, `"aten"` or `"reference"`.
        forward: the variant of the forward, without gradients.
        backward: the variant of the backward.
        keeps: what the forward of a training step saves for the backward besides its inputs and the
            norms: the `"product"` `x Vᵀ` of a linear layer, the `"weight"` `W`, the same `"packed"`
            for our products of a convolution on a GPU, or nothing.
    """

    backend: str
    forward: str
    backward: str
    keeps: Kept = ""

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


def _keepable(call: Call, backend: str, forward: str, backward: str) -> Kept:
    """Returns what may be saved for the backward besides what the plain layer saves.

    The product of a linear layer may take 1/8 of the size of the weight. The `W` of a convolution,
    packed or not, and on the Triton path of a linear layer, may take 1/8 of the size of the input.
    A small `W` is kept whatever the input's size, since computing it again is all overhead. A `W`
    in float32 for a layer in half precision is not kept on a CPU. The native library, and the
    Triton path of a linear layer, form `W` for a training step, whatever the forward does without
    gradients. The native library keeps every `W` that is normalised along taps, because forming it
    twice takes longer than eager does. The ATen path keeps `W` in half precision for the same
    reason, and that of a small linear layer, because a backward in Python takes longer.
    """
    linear = call.conv is None
    wrong = backend == "aten" and vendor.is_wrong_for(call.x_dtype, len(call.v_shape))
    keeps_weight = backend == "aten" and not wrong and aten_weight.keeps_weight(call)
    if keeps_weight and backward == "materialize":
        return "weight"
    if linear and backend != "triton":
        keeps = forward == backward == "scaled" and scales_late(call) and keeps_product(call)
        return "product" if keeps else ""
    if backward == "product":
        return "product"
    if backend == "triton" and forward == backward == "packed":
        return "packed" if _is_small(call) else ""
    forms_anyway = linear or backend == "native"
    if backward != "materialize" or (forward != "materialize" and not forms_anyway):
        return ""
    if wrong:
        return ""  # PyTorch would save `x` and `W` in float32
    if call.conv and backend != "triton" and call.conv.scale_axis(call.dim) == "taps":
        return "weight" if backend == "native" else ""  # it can scale nothing but `W`
    return "weight" if _is_small(call) else ""


def _is_small(call: Call) -> bool:
    """Returns whether `W` is small by itself, or beside the input."""
    size = call.x_dtype.itemsize
    w, input = size * math.prod(call.v_shape), size * math.prod(call.x_shape)
    return w <= max(input / 8, KEPT_WEIGHT)


def by_cost(call: Call, backend: str, device: Device | None = None) -> Plan:
    """Returns the cheapest plan by the cost model, on the call's GPU by default."""
    if not call.x_shape or backend == "reference":  # there is only one plan
        return Plan(backend, "materialize", "materialize")
    found = costs(call, backend, device)
    forward, backward = found.cheapest()
    if found.keeping_pays() and _keepable(call, backend, forward, "materialize"):
        return Plan(backend, forward, "materialize", "weight")
    keeps = found.kept is None or backward == "product"
    return Plan(
        backend, forward, backward, _keepable(call, backend, forward, backward) if keeps else ""
    )


def choices(call: Call, backend: str) -> list[Plan]:
    """Returns every plan of a backend for the call of a layer. The cost model's comes first."""
    found = costs(call, backend)
    every = [
        Plan(backend, forward, backward, kept)
        for forward in found.forward
        for backward in found.backward
        if can_follow(forward, backward)
        for kept in dict.fromkeys((_keepable(call, backend, forward, backward), _NOTHING))
        if kept or backward != "product"
    ]
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


def _forms_weight(plan: Plan, records: bool) -> bool:
    """Returns whether a pass of a layer's own plan forms `W`."""
    if not records:
        return plan.forward == "materialize"
    return plan.recorded == plan.backward == "materialize"


def shared_seconds(call: Call, plan: Plan, records: bool) -> tuple[float, float] | None:
    """Returns the estimated seconds of a layer with its own plan, and with a `W` that is formed
    together with those of other layers, in a training step (`records`) or in a forward alone. The
    result is `None` if PyTorch's product with a formed `W` cannot serve the call.

    With a formed `W`, that product is left, which is the variant `materialize` without its first
    launch.
    """
    if not plan.forward or not call.x_shape:
        return None
    on_cpu = plan.backend != "triton"
    if call.conv and on_cpu and vendor.is_wrong_for(call.x_dtype, len(call.v_shape)):
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
    return own, with_weight


def is_better_formed(call: Call, plan: Plan, records: bool) -> bool:
    """Returns whether a layer is estimated to be as fast with a `W` that is there as with its own
    plan."""
    seconds = shared_seconds(call, plan, records)
    return seconds is not None and seconds[1] <= seconds[0]


# The fewest layers for which a group pays on a GPU. It is an estimate: a group takes the processor
# about 17 µs whatever its size, and a launch, and each layer of its own takes 1 µs and a launch of
# some 2 µs more than in a group.
FEWEST = 8


def fewest(backend: str) -> int:
    """Returns the number of layers that a group of a backend has at least."""
    return FEWEST if backend == "triton" else 1


def kept_out(call: Call, plan: Plan, records: bool) -> str:
    """Returns why a layer stays out of a group whatever the estimates say, or `""`.

    A prepared launch on a GPU costs the processor too little for a group to save much. A HiFi-GAN
    of 78 layers, all of them in one, took 1.08 of the time of the layers by themselves on an H200,
    and 1.26 where Python launches. So a layer takes the `W` of a group only if its own plan forms
    one as well.

    On a CPU, a layer of its own finds the `W` that it has just formed in a cache, turns `dW` into
    `dV` before it leaves one, and sums the gradient of its bias faster than PyTorch's layer. As a
    group, chains of 24 convolutions whose weights had up to 12 KiB took 1.00 to 1.08 of the time of
    the layers by themselves in training, on two threads of an AMD EPYC (Zen 5) and on one, an
    EnCodec took 1.014, and chains took 1.04 to 1.23 without the native library.
    """
    if plan.backend != "triton":
        return "a group gains nothing on a CPU"
    return "" if _forms_weight(plan, records) else "its plan forms none"


def shares(call: Call, plan: Plan, records: bool) -> bool:
    """Returns whether a layer of a group takes the `W` that the group forms."""
    return not kept_out(call, plan, records) and is_better_formed(call, plan, records)


def key(call: Call) -> str:
    """Returns the name of a layer's call in the tuned table."""
    shapes = "·".join("×".join(map(str, shape)) for shape in (call.x_shape, call.v_shape))
    dtypes = "·".join(str(dtype).removeprefix("torch.") for dtype in (call.x_dtype, call.v_dtype))
    words = ["linear" if call.conv is None else "convolution", shapes, dtypes, f"dim={call.dim}"]
    if call.conv is not None:
        words += [f"{name}={value}" for name, value in call.conv._asdict().items()]
    words += [name for name in ("channels_last", "tf32") if getattr(call, name)]
    if call.norm != "l2":
        words.append(call.norm)
    return " ".join(words)
