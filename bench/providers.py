"""The layers that compete in a case: one decorator each.

@provider("name")               in every run
@provider("name", full=True)    in full runs alone
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import wn_kernels
from bench.layer import Layer
from wn_kernels import plan, prepare, tuning
from wn_kernels.call import Norm, reduced_dims

Make = Callable[[Layer, nn.Module], nn.Module]
Session = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Provider:
    """A competitor.

    Attributes:
        make: turns a case's plain layer into it.
        full: whether it competes in full runs alone.
        needs_gpu: whether it competes on a GPU alone.
        package: what has to be installed.
        session: what it runs inside of.
    """

    make: Make
    full: bool = False
    needs_gpu: bool = False
    package: str = "torch"
    session: Session = nullcontext

    def competes(self, device: torch.device, full: bool) -> bool:
        """Whether it takes part in a run there."""
        return (
            (full or not self.full)
            and (device.type == "cuda" or not self.needs_gpu)
            and importlib.util.find_spec(self.package) is not None
        )


PROVIDERS: dict[str, Provider] = {}

# How the names of ours by a path of its own begin.
VARIANT = "ours: "
# Ours with the norm l2, beside a case of another norm.
NORM_L2 = VARIANT + "l2"


def provider(name: str, **options: Any) -> Callable[[Make], Make]:
    """Registers a function that turns a case's plain layer into the competitor of that name."""

    def register(make: Make) -> Make:
        PROVIDERS[name] = Provider(make, **options)
        return make

    return register


def slice_norms(v: Tensor, dim: int | None, norm: Norm) -> Tensor:
    """Returns the norms of the slices, l1 or linf, in the shape of `g`."""
    order = {"l1": 1, "linf": math.inf}[norm]
    dims = reduced_dims(v.ndim, dim)
    return torch.linalg.vector_norm(v, order, dims, keepdim=dim is not None)


def composed(v: Tensor, g: Tensor, dim: int | None, norm: Norm) -> Tensor:
    """Returns `W` for the norm l1 or linf, by PyTorch's operations: it has no kernel for them."""
    return v * (g / slice_norms(v, dim, norm))


class Composed(nn.Module):
    """This parametrization is weight norm by the norm l1 or linf."""

    def __init__(self, dim: int | None, norm: Norm) -> None:
        super().__init__()
        self.dim, self.norm = dim, norm

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return composed(v, g, self.dim, self.norm)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return slice_norms(weight, self.dim, self.norm), weight


@provider("plain")
def _plain(case: Layer, layer: nn.Module) -> nn.Module:
    """The floor: the layer without weight norm."""
    return layer


@provider("eager")
def _eager(case: Layer, layer: nn.Module) -> nn.Module:
    """PyTorch's parametrization, the baseline; of a norm that it lacks, one like it."""
    if case.norm != "l2":
        parametrization = Composed(case.dim, case.norm)
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", parametrization)
        return layer
    return torch.nn.utils.parametrizations.weight_norm(layer, dim=case.dim)


@provider("legacy")
def _legacy(case: Layer, layer: nn.Module) -> nn.Module:
    """PyTorch's older forward hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(layer, dim=case.dim)


@provider("compiled", full=True)
def _compiled(case: Layer, layer: nn.Module) -> nn.Module:
    """The baseline under `torch.compile`."""
    torch.compiler.reset()
    eager = _eager(case, layer)
    eager.compile()
    return eager


def _gems() -> AbstractContextManager[Any]:
    import flag_gems

    return flag_gems.use_gems()


@provider("FlagGems", full=True, needs_gpu=True, package="flag_gems", session=_gems)
def _flag_gems(case: Layer, layer: nn.Module) -> nn.Module:
    """The baseline with FlagGems' kernels in the place of PyTorch's."""
    return _eager(case, layer)


@provider("ours")
def _ours(case: Layer, layer: nn.Module) -> nn.Module:
    kind = getattr(wn_kernels, f"WN{case.kind}")
    like = next(layer.parameters())
    where = {"device": like.device, "dtype": like.dtype}
    fused = kind(*case.arguments, **case.options, dim=case.dim, norm=case.norm, **where)
    fused.load_state_dict(layer.state_dict())
    return fused


def variants(case: Layer, device: torch.device) -> dict[str, Provider]:
    """Ours by every other backend there is, and by every path of the one that serves it."""
    layer = _ours(case, case.layer(device))
    x = torch.zeros(case.x_shape, dtype=case.torch_dtype, device=device)
    sessions: dict[str, Session] = {}
    served = (plan.serving(x), "triton", "native")  # each serves its own device, or none
    for backend in plan.BACKENDS:
        if backend not in served:
            sessions[backend] = partial(wn_kernels.use_backend, backend)
    with case.session(device):
        calls = tuning.calls_of(layer, (x,))
    for call, backend in calls:
        for choice in plan.choices(call, backend):
            name = f"{backend}, {choice}"
            sessions[name] = partial(prepare.fixed, call, choice)
    return {VARIANT + name: Provider(_ours, session=s) for name, s in sessions.items()}


def providers_of(case: Layer, device: torch.device, full: bool) -> dict[str, Provider]:
    """Those that compete in a case, by name."""
    found = {name: p for name, p in PROVIDERS.items() if p.competes(device, full)}
    return found | variants(case, device) if full else found
