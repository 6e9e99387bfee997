"""This module has what a training loop needs beside a step of its optimizer: parameter groups, and
magnitudes and norms that are held constant. docs/training.md has examples."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from . import functional as WF
from . import plan, prepare
from .backends import aten, reference
from .call import Member, Norm, Slices, kept_shape, recorder, scale_dtype
from .convert.normed import weights

# --- parameter groups ----------------------------------------------------------------------------


def param_groups(
    model: nn.Module, weight_decay: float = 0.01, *, decay_v: bool = False, decay_g: bool = False
) -> list[dict[str, Any]]:
    """Returns the trainable parameters of a model as groups for an optimizer. Plain weights decay.
    Directions, magnitudes, biases and other vectors do not.

    The decay of `V` has no effect on the function that the network computes, because `W` does not
    depend on ‖V‖. It makes ‖V‖ smaller, and so the effective learning rate `lr / ‖V‖²` larger (van
    Laarhoven 2017; Hoffer et al. 2018).

    Each group has a `"name"`, which optimizers keep. A `g` of shape `(N, 1)` is a vector, although
    it has two dimensions. Therefore, for optimizers that treat matrices apart, such as
    `torch.optim.Muon`, select by name:

    - `"weights"`: plain tensors of two dimensions and more
    - `"directions"`: every `V`
    - `"magnitudes"`: every `g`
    - `"vectors"`: all others, such as biases

    Args:
        model: any model. It may have weight norm in every form that `wn_kernels.fuse` accepts.
        weight_decay: the decay of `"weights"`.
        decay_v: whether `"directions"` decay as well.
        decay_g: whether `"magnitudes"` decay as well.

    Returns:
        The groups that have parameters, in this order, as mappings with `"params"`, `"name"` and
        `"weight_decay"`. A parameter that is shared occurs once.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `weight_decay` is negative, or a lazy layer has no shape yet.
    """
    prepare.check_module("model", model)
    if not isinstance(weight_decay, (int, float)) or not weight_decay >= 0:
        raise ValueError(
            f"weight_decay is {weight_decay!r}; expected a number that is not negative"
        )
    magnitudes: set[int] = set()
    directions: set[int] = set()
    for normed in weights(model):
        of_g, of_v = normed.parameters
        magnitudes.update(map(id, of_g))
        directions.update(map(id, of_v))
    groups: dict[str, list[nn.Parameter]] = {
        name: [] for name in ("weights", "directions", "magnitudes", "vectors")
    }
    for p in model.parameters():
        if not p.requires_grad:
            continue
        if id(p) in magnitudes:
            name = "magnitudes"
        elif id(p) in directions:
            name = "directions"
        else:
            name = "weights" if p.ndim > 1 else "vectors"
        groups[name].append(p)
    decays = {"weights": True, "directions": decay_v, "magnitudes": decay_g, "vectors": False}
    return [
        {"params": params, "name": name, "weight_decay": weight_decay if decays[name] else 0.0}
        for name, params in groups.items()
        if params
    ]


# --- constant magnitudes and norms ---------------------------------------------------------------


# Norms and factors below are taken as this large, so that a slice whose squares float32 cannot hold
# is scaled towards the range where it can, and not to zero.
LEAST = 1e-30


@torch.no_grad()
def fix_magnitudes_(model: nn.Module, value: float | None = None) -> dict[str, float]:
    """Sets every `g` of a model to a constant, in place, and freezes it: bounded weight norm.

    By default the constant of each layer is that of Hoffer et al. 2018, section 5: with `N` entries
    of `g`,

        ρ = ‖g‖₂ / √N      W = ρ · V / ‖V‖

    so that ‖W‖ stays what it is. At initialisation `‖g‖₂` is ‖V‖. For another norm than l2, the
    ratio of `‖V_j‖₂` to `‖V_j‖` weighs each slice in both sums of squares.

    Args:
        model: any model that `wn_kernels.fuse` accepts. A tensor whose `g` or `v` is itself
            computed is left alone.
        value: a constant for all layers instead.

    Returns:
        The constant by the name of each layer.

    Raises:
        TypeError: `model` is not a module, or `value` not a number.
        ValueError: `value` is not finite, or a lazy layer has no shape yet.
    """
    prepare.check_module("model", model)
    if value is not None and not isinstance(value, (int, float)):
        raise TypeError(f"value must be a number or None, got {type(value).__name__}")
    if value is not None and not math.isfinite(value):
        raise ValueError(f"value is {value!r}; expected a finite number")
    constants = {}
    for normed in list(weights(model)):
        if normed.fault:
            continue
        g, v = normed.tensors
        rho = _constant(g, v, normed) if value is None else float(value)
        constants[normed.name] = rho
        g.fill_(rho)
        g.requires_grad_(False)
        normed.refresh()
    return constants


def _constant(g: Tensor, v: Tensor, slices: Slices) -> float:
    """Returns the `g` with which ‖W‖ stays what it is."""
    if slices.norm == "l2":
        return g.double().norm().item() / math.sqrt(max(1, g.numel()))
    exact, rest = v.double(), (slices.dim, LEAST)
    ratio = reference.norms(exact, *rest) / reference.norms(exact, *rest, slices.norm)
    return ((g.double() * ratio).norm() / ratio.norm()).item()


@torch.no_grad()
def slice_norms(model: nn.Module) -> dict[str, Tensor]:
    """Returns the norms `‖V_j‖₂` of every weight-normed tensor of a model, by its name, each with
    the shape of `g` and in `V`'s dtype. They are l2, whatever the norm of a layer is.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a lazy layer has no shape yet.
    """
    prepare.check_module("model", model)
    return {x.name: WF.slice_norm(x.tensors[1], dim=x.dim) for x in weights(model)}


@torch.no_grad()
def renormalize_(
    model: nn.Module, norm: float | Literal["rms", "g"] | Mapping[str, Tensor | float] = 1.0
) -> None:
    """Sets the norm of every slice of every `V`, in place: forced weight norm, as Karras et al.
    2024 (EDM2) have it after each step, equation (66).

        V_j ← norm · V_j / ‖V_j‖₂

    It does not change `W`, which depends on the direction alone, except where `‖V_j‖` is or becomes
    smaller than the `eps` of a layer. It keeps ‖V‖, which each step of an optimizer makes larger,
    and with it the effective learning rate `lr / ‖V‖²`. A slice of norm zero stays zero. Nothing
    waits for a GPU. There, one launch serves all layers, unless `norm` is `"g"`, and a slice whose
    squares overflow becomes zero, as its weight in a forward is.

    To call it after each step of an optimizer:

        optimizer.register_step_post_hook(lambda *_: wn_kernels.renormalize_(model))

    Args:
        model: any model that `wn_kernels.fuse` accepts. A `V` that is frozen, and a tensor whose
            `g` or `v` is itself computed, are left alone.
        norm: the norm of every slice. `"rms"` is √(number of its entries), which gives entries of
            unit magnitude, as in EDM2. `"g"` is |g|, which makes `V` equal to `W` but for signs, so
            that a step of SGD turns `W` as far as it would without weight norm; a slice with a `g`
            of zero stays as it is. Only for `"g"` is the norm that of the layer, which may not be
            l2. A mapping, such as an earlier result of `slice_norms`, holds the norms of each
            tensor by name, or one number for all of its slices. Values on a GPU are not looked at.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `norm` is not positive and finite, lacks a tensor, or has one of another shape,
            or a lazy layer has no shape yet.
    """
    prepare.check_module("model", model)
    if not (_is_positive(norm) or isinstance(norm, Mapping) or norm in ("rms", "g")):
        raise ValueError(f'norm is {norm!r}; expected a positive number, "rms", "g" or a mapping')
    by_device: dict[torch.device, dict[int, _Direction]] = {}
    for normed in weights(model):
        g, v = normed.tensors
        if v.requires_grad and v.numel() and not normed.fault:
            target = _target(norm, normed.name, v, normed.dim)
            found = by_device.setdefault(v.device, {})
            found[id(v)] = _Direction(v, g, normed.dim, normed.norm, target)
    for found in by_device.values():
        directions = [*found.values()]
        launches = plan.choose_backend(directions[0].v) == "triton"
        if launches and norm != "g" and not any(recorder(d.v) for d in directions):
            _renormalize_in_one_launch(directions)
        else:
            _renormalize(directions)


class _Direction(NamedTuple):
    """Describes a `V`. The l2 norms that its slices get are a number or a tensor of `g`'s shape. If
    it is `None`, their norms of this kind become |g|."""

    v: Tensor
    g: Tensor
    dim: int | None
    norm: Norm
    target: float | Tensor | None


def _renormalize_in_one_launch(directions: list[_Direction]) -> None:
    """Sets the norms by the kernel of a group of weights. A program has read its slices of `V` when
    it writes them, so that the weight may take the memory of `V`."""
    v, _, dims, _, targets = map(list, zip(*directions, strict=True))
    counts = [(kept_shape(t.shape, d), scale_dtype(t)) for t, d in zip(v, dims, strict=True)]
    sizes = [
        _filled(target, shape, dtype, t.device)
        if isinstance(target, float)
        else target.to(t.device, dtype).contiguous()
        for t, target, (shape, dtype) in zip(v, targets, counts, strict=True)
    ]
    for t, w in zip(v, WF.weight_norms(v, sizes, dim=dims, eps=LEAST, places=v), strict=True):
        if w is not t:  # its slices are long enough for a launch of its own
            t.copy_(w)
    increment_version(v)


@functools.lru_cache(maxsize=1024)
def _filled(value: float, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor that nobody writes to."""
    with torch.inference_mode(False):
        return torch.full(shape, value, dtype=dtype, device=device)


def _renormalize(directions: list[_Direction]) -> None:
    """Sets the norms by a reduction for each `V`, and a few operations for all of them."""
    norms = [
        aten.norms(d.v, Member(d.dim, LEAST, d.v.dtype, d.norm if d.target is None else "l2"))
        for d in directions
    ]
    factors = torch._foreach_reciprocal(norms)
    torch._foreach_clamp_min_(factors, LEAST)
    targets: list[Any] = []
    for d, n in zip(directions, norms, strict=True):
        if d.target is None:
            size = d.g.view(n.shape).abs().to(n)
            targets.append(torch.where(size == 0, n, size))
        else:
            targets.append(d.target.to(n) if isinstance(d.target, Tensor) else d.target)
    torch._foreach_mul_(factors, targets)
    torch._foreach_mul_([d.v for d in directions], factors)


def _target(norm: Any, name: str, v: Tensor, dim: int | None) -> float | Tensor | None:
    """Returns the norms that the slices of `v` get."""
    shape = kept_shape(v.shape, dim)
    if norm == "g":
        return None
    if norm == "rms":
        return math.sqrt(v.numel() / math.prod(shape))
    if not isinstance(norm, Mapping):
        return float(norm)
    if name not in norm:
        raise ValueError(f"norm has no entry for {name!r}")
    target = norm[name]
    if not isinstance(target, Tensor):
        if not _is_positive(target):
            raise ValueError(f"the norm of {name!r} is {target!r}; expected a positive number")
        return _filled(float(target), shape, scale_dtype(v), v.device)
    if target.shape != shape:
        raise ValueError(
            f"the norms of {name!r} have shape {tuple(target.shape)}, expected {tuple(shape)}"
        )
    if target.is_cpu:
        if not bool(((target >= 0) & target.isfinite()).all()):
            raise ValueError(f"a norm of {name!r} is not positive and finite")
        zero = target == 0
        if bool(zero.any()) and bool(WF.slice_norm(v, dim=dim)[zero].any()):
            raise ValueError(f"a norm of {name!r} is zero, but its slice is not")
    return target


def _is_positive(number: Any) -> bool:
    """Returns whether this is a positive and finite number."""
    return isinstance(number, (int, float)) and 0 < number < math.inf
