"""This file converts whole models by `fuse`, `unfuse` and `fold`, and weight-normalises one module.

    import wn_kernels

    print(wn_kernels.fuse(model))     # every weight-normed layer computes with this package
    wn_kernels.fold(model)            # plain weights, for inference

`fused.py` converts one module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from .. import functional as WF
from .. import plan, prepare
from ..call import Call, Geometry, Norm, canonical_dim, canonical_norm
from ..modules import checkpoints, removal
from ..modules.weight import NormedWeights, WeightNormMixin
from ..text import Tabular
from . import fused, groups
from .states import own_tensors

Module = TypeVar("Module", bound=nn.Module)

# A report plans for an input of this many rows (linear layer) or pixels (convolution).
NOMINAL = 1024


@dataclass(frozen=True)
class Layer:
    """Holds a line of a report.

    Attributes:
        name: the module's name in the model, and the tensor's name if that is not `weight`.
        kind: the module's class.
        shape: the shape of the weight. It is empty for a lazy layer that has none yet.
        dim: the dimension whose slices are normalised, or `None` for the whole tensor.
        path: the backend and the variants (forward/backward) that `plan` picks for a nominal input
            of 1024 rows or pixels. It is the backend and `weight` if this package computes only the
            weight, and empty if the tensor was left alone.
        note: why a tensor was left alone, or not fused in full. In a grouped model it also states
            whether the layer takes the group's weight for the nominal input in a training step,
            with the times that the cost model estimates.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dim: int | None
    path: str
    note: str = ""


class Report(Tabular, tuple[Layer, ...]):
    """Holds the results of `fuse`, a line for each tensor. It prints as a table, and a notebook
    shows it as one."""

    def _rows(self) -> list[tuple[str, ...]]:
        header: tuple[str, ...] = ("layer", "class", "shape", "dim", "path", "note")
        return [header] + [
            (x.name, x.kind, "×".join(map(str, x.shape)), str(x.dim), x.path or "-", x.note)
            for x in self
        ]

    def _summary(self) -> str:
        done = sum(bool(x.path) for x in self)
        return f"{done} fused, {len(self) - done} left alone"


# --- what there is -------------------------------------------------------------------------------


def _others(module: Any) -> Iterator[tuple[str, Any, str]]:
    """Yields the tensors with another reparametrization. Each comes as its name, the original
    tensor and the name of the reparametrization."""
    for name, items in fused.parametrized(module).items():
        if not isinstance(items[0], _WeightNorm):
            original = items.original if items.is_tensor else items.original0
            yield name, original, ", ".join(type(p).__name__.strip("_") for p in items)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            yield hook.name, getattr(module, hook.name + "_orig"), type(hook).__name__


def _nominal(module: Any, v: torch.Tensor, dim: Any) -> Call:
    """Returns the call of a layer with a nominal input."""
    if v.ndim == 2:
        return Call(torch.Size((NOMINAL, v.shape[1])), v.shape, v.dtype, v.dtype, dim)
    rank = v.ndim - 2
    conv = Geometry(
        module.stride,
        (0,) * rank,
        module.dilation,
        module.transposed,
        module.output_padding,
        module.groups,
    )
    reach = [d * (t - 1) for d, t in zip(conv.dilation, v.shape[2:], strict=True)]
    size = round(NOMINAL ** (1 / rank))
    x_shape = torch.Size((1, module.in_channels, *(size + r for r in reach)))
    return Call(x_shape, v.shape, v.dtype, v.dtype, dim, conv)


def _path(module: Any, v: torch.Tensor, dim: Any) -> str:
    """Returns what `plan` picks for a nominal input."""
    backend = plan.serving(v, dim)
    if backend == "reference":
        return f"{backend}: weight"
    return f"{backend}: {plan.choose(_nominal(module, v, dim), backend)}"


def _nominal_plan(module: Any) -> tuple[Call, plan.Plan] | None:
    """Returns the call of a layer of a grouped model with a nominal input, and its plan, or `None`
    if it has none."""
    v, (dim, _, norm) = module._tensors("weight")[1], module._normalisation()
    backend = plan.serving(v, dim)
    if is_lazy(v) or backend == "reference":
        return None
    call = _nominal(module, v, dim)._replace(norm=norm)
    return call, plan.choose(call, backend)


def _is_small(model: nn.Module) -> bool:
    """Returns whether too few layers of a grouped model share a launch, for nominal inputs."""
    found = filter(None, map(_nominal_plan, groups.groupable(model)))
    sharing = [picked for call, picked in found if plan.shares(call, picked, True)]
    return bool(sharing) and len(sharing) < plan.fewest(sharing[0].backend)


def _in_group(module: Any, is_small: bool) -> str:
    """Returns the note of a layer of a grouped model, for a nominal input in a training step."""
    found = _nominal_plan(module)
    if found is None:
        return "its own weight"
    call, picked = found
    seconds = plan.shared_seconds(call, picked, True)
    if seconds is None:
        return "its own weight: PyTorch has no product for it"
    own, shared = (f"{each * 1e6:.0f}" for each in seconds)
    if plan.shares(call, picked, True):
        if is_small:
            return f"its own weight: fewer than {plan.fewest(picked.backend)} would be grouped"
        return f"grouped: {shared} µs, {own} by itself"
    if reason := plan.kept_out(call, picked, True):
        return f"its own weight: {reason}"
    return f"its own weight: {own} µs, {shared} grouped"


# --- whole models --------------------------------------------------------------------------------


def fuse(model: nn.Module, dry_run: bool = False, grouped: bool = False) -> Report:
    """Makes every layer that PyTorch weight-normalised, with either of its APIs, compute with this
    package, in place.

    With `grouped`, the model also computes the weights of its layers together: all of them by one
    launch at the start of its forward, and all of their gradients by one launch in the backward.
    Layers of this package take part as well. A layer that is better off with its own launches for
    the input at hand keeps them.

    Parameters stay the same objects under the same names, so optimizers and checkpoints still work.
    Hooks, buffers, `requires_grad` and `isinstance` are preserved. docs/convert.md has the whole
    list.

    Args:
        model: any module. It may be weight-normed itself.
        dry_run: whether to report only, without changes.
        grouped: whether the model computes the weights of its layers together. A call without
            `grouped` ends that.

    Returns:
        A report, which prints as a table.

    Raises:
        TypeError: `model` is not a module.
    """
    prepare.check_module("model", model)
    if grouped:
        groups.check(model)
    lines = []
    for prefix, module in model.named_modules():
        lines += _fuse(prefix, module, dry_run)
        for tensor in own_tensors(module):
            v = module._tensors(tensor)[1]
            lines.append(_line(prefix, module, tensor, v, module.dim, "", "of this package"))
        for tensor, original, what in _others(module):
            lines.append(_line(prefix, module, tensor, original, None, "", what))
    if grouped:
        is_small = _is_small(model)
        lines = [_noted(model, line, is_small) for line in lines]
    report = Report(lines)
    if not dry_run:
        if grouped:
            groups.group(model)
        else:
            groups.ungroup(model)
        if any(line.path for line in report) and not _load_hooks(model):
            model.register_load_state_dict_pre_hook(_load_all_or_nothing)
    return report


def _noted(model: nn.Module, line: Layer, is_small: bool) -> Layer:
    """Returns the line of a report with what a group makes of the layer."""
    try:
        module = model.get_submodule(line.name)
    except AttributeError:  # a tensor that is not named `weight`
        return line
    if not groups.is_groupable(module):
        return line
    note = _in_group(module, is_small)
    return replace(line, note="; ".join(filter(None, (line.note, note))))


def _load_all_or_nothing(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """This hook prevents partial loads. If a shape in a checkpoint does not fit, PyTorch reports it
    and the model does not change."""
    current: dict[str, torch.Tensor | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        start = prefix + name + "." if name else prefix
        if isinstance(module, NormedWeights) or fused.is_fused(module):
            module._bring_into_form(state_dict, start)
        current |= {start + key: t for key, t in module._parameters.items()}
        current |= {start + key: t for key, t in module._buffers.items()}
    checkpoints.all_or_nothing(state_dict, current)


def _load_hooks(model: nn.Module) -> list[int]:
    """Returns the keys of the hook `_load_all_or_nothing` in a model."""
    hooks = model._load_state_dict_pre_hooks.items()
    return [key for key, hook in hooks if getattr(hook, "hook", hook) is _load_all_or_nothing]


def _drop_load_hook(model: nn.Module) -> None:
    for key in _load_hooks(model):
        del model._load_state_dict_pre_hooks[key]


def _line(
    prefix: str, module: nn.Module, tensor: str, weight: Any, dim: Any, path: str, note: str
) -> Layer:
    name = prefix if tensor == "weight" else f"{prefix}.{tensor}"
    if is_lazy(weight):
        shape, note = (), f"{note}; no shape yet"
    else:
        shape = tuple(weight.shape)
    return Layer(name or "(root)", fused.kind(module), shape, dim, path, note)


def _fuse(prefix: str, module: nn.Module, dry_run: bool) -> list[Layer]:
    """Fuses the tensors of one module that PyTorch weight-normalised, and returns a line for
    each."""
    base = parametrize.type_before_parametrizations(module)
    found = list(fused.computers(module))
    fusable = [item for item in found if fused.is_known(module, item[2])]
    layer = fused.known_layer(base, *(tensor for tensor, _, _ in found))
    lines = []
    for item in found:
        tensor, form, computer = item
        if form == "weight_norm":
            v = getattr(module, tensor + "_v")
        else:
            v = fused.parametrized(module)[tensor].original1
        dim = canonical_dim(computer.dim, v.ndim)
        path, note = "", ""
        if isinstance(computer, (fused.Hook, fused.Parametrization)):
            note = "fused already"
        elif item not in fusable:
            note = f"unknown: {type(computer).__name__}"
        elif fused.is_stacked(module, tensor):
            path, note = f"{plan.serving(v, dim)}: weight", "a second parametrization of the tensor"
        elif layer is None:
            path, note = f"{plan.serving(v, dim)}: weight", "its own forward"
        elif issubclass(layer, nn.RNNCellBase) and v.is_cpu:
            path = f"{plan.serving(v, dim)}: linear"
            note = "a product with each weight of the cell"
        elif not issubclass(layer, WeightNormMixin):
            path, note = f"{plan.serving(v, dim)}: weight", "one call for all of the layer"
        else:
            path = _path(module, v, dim)
        lines.append(_line(prefix, module, tensor, v, dim, path, note))
    if fusable and not dry_run:
        fused.fuse(module, fusable)
    return lines


def unfuse(model: nn.Module) -> list[str]:
    """Gives every layer that `fuse` or `weight_norm` converted back to PyTorch's weight norm, in
    place, with its current parameters.

    Returns:
        The names of the layers.

    Raises:
        TypeError: `model` is not a module.
        ValueError: PyTorch's weight norm does not have the norm of a layer. No layer is changed.
    """
    prepare.check_module("model", model)
    for name, module in model.named_modules():
        for tensor, norm in fused.norms(module).items():
            if norm.norm != "l2":
                raise ValueError(
                    f"{name or '(root)'} cannot be unfused: its {tensor} has norm={norm.norm!r}, "
                    "and PyTorch's weight norm has l2 alone; wn_kernels.fold gives a plain weight"
                )
    names: list[str] = []
    for name, module in model.named_modules():
        if fused.is_fused(module) and not fused.is_wrapped(module):
            fused.unfuse(module)
            names.append(name)
        _drop_load_hook(module)
        groups.ungroup(module)
    return names


def fold(model: nn.Module) -> list[str]:
    """Replaces every weight-normed weight by a plain one, in place, for inference. It covers
    PyTorch's two forms, fused or not, and the layers of this package.

    A tensor that is also pruned or has another parametrization is left alone. So is a layer from
    whose class another tool derived a class (`fully_shard`). A weight is trainable if its `g` or
    `v` was. The function may be called under `torch.no_grad()` and `torch.inference_mode()`.

    Returns:
        The names of the folded layers. A second call returns none.

    Raises:
        TypeError: `model` is not a module.
    """
    prepare.check_module("model", model)
    names: list[str] = []
    for name, module in list(model.named_modules()):
        if _fold(module, lambda m, tensor: not fused.is_stacked(m, tensor)):
            names.append(name)
        _drop_load_hook(module)
        groups.ungroup(module)
    return names


def _fold(module: Any, wanted: Callable[[nn.Module, str], bool]) -> bool:
    """Bakes the wanted tensors of one module, and returns whether there were any."""
    if fused.is_wrapped(module):
        return False
    if type(module) in fused.LAYERS.values():
        tensors = [
            t for t in module._normed() if not fused.is_replaced(module, t) and wanted(module, t)
        ]
        for tensor in tensors:
            module._bake(tensor)
        return bool(tensors)
    found = [
        item
        for item in fused.computers(module)
        if wanted(module, item[0]) and not fused.is_replaced(module, item[0])
    ]
    known = [item for item in found if fused.is_known(module, item[2])]
    if known:
        fused.fuse(module, known)
    for tensor, form, _ in found:
        if tensor in fused.norms(module):
            module._bake(tensor)
        elif form == "weight_norm":
            torch.nn.utils.remove_weight_norm(module, tensor)
        else:
            parametrize.remove_parametrizations(module, tensor)
    return bool(found)


# --- one module ----------------------------------------------------------------------------------


def weight_norm(
    module: Module, name: str = "weight", dim: int | None = 0, *, norm: Norm = "l2"
) -> Module:
    """Weight-normalises a parameter of a module, in place. The signature and the state dict
    (`weight_g`, `weight_v`) are those of `torch.nn.utils.weight_norm`, but for `norm`. This package
    computes the weight.

    Args:
        module: the module. A linear layer or a convolution runs fused. For any other, this package
            computes the weight alone.
        name: the name of the parameter.
        dim: the dimension whose slices are normalised, or `None` or -1 for one norm over the whole
            tensor.
        norm: the norm of a slice: `"l2"`, `"l1"` or `"linf"`; see `WNLinear`.

    Returns:
        The module.

    Raises:
        AttributeError: the module has no such parameter.
        RuntimeError: the parameter is weight-normed already.
        TypeError: `module` is not a module or is a layer of this package, whose weights alone are
            normalised, or the parameter's dtype or layout is not supported.
        ValueError: the parameter has no shape yet, `dim` is out of range, or `norm` is unknown.
    """
    prepare.check_module("module", module)
    if _is_weight_normed(module, name):
        raise RuntimeError(f"{name} of {type(module).__name__} is weight-normed already")
    weight = module._parameters.get(name)
    if weight is None:
        raise AttributeError(f"{type(module).__name__} has no parameter {name!r}")
    if isinstance(module, NormedWeights):
        raise TypeError(
            f"{name} of {type(module).__name__} cannot be weight-normed: a layer of this package "
            "normalises the weights that it was made with, and nothing else"
        )
    if is_lazy(weight):
        raise ValueError(f"{name} of {type(module).__name__} has no shape yet: run the module once")
    if not prepare.are_dense(weight, weight, weight, None):
        prepare.reject(**{name: weight})
    dim, norm = canonical_dim(dim, weight.ndim), canonical_norm(norm)
    v = removal.plain_weight(weight, weight.requires_grad)
    with torch.inference_mode(False):
        n = WF.slice_norm(v.detach(), dim=dim, norm=norm)
        g = nn.Parameter(n, requires_grad=v.requires_grad)
    hook = fused.Hook(name, -1 if dim is None else dim)
    hook.norm = norm
    del module._parameters[name]
    for key, parameter in zip(checkpoints.keys("weight_norm", name), (g, v), strict=True):
        module.register_parameter(key, parameter)
    module.register_forward_pre_hook(hook)
    fused.fuse(module, [(name, "weight_norm", hook)])
    return module


def remove_weight_norm(module: Module, name: str = "weight") -> Module:
    """Bakes a weight-normed tensor of a module into a plain parameter, in place. The signature is
    that of `torch.nn.utils.remove_weight_norm`. It serves both of PyTorch's forms, and ours.

    Returns:
        The module.

    Raises:
        TypeError: `module` is not a module.
        ValueError: the tensor is not weight-normed.
    """
    prepare.check_module("module", module)
    if not _is_weight_normed(module, name):
        raise ValueError(f"{name} of {type(module).__name__} is not weight-normed")
    owner: Any = module
    if isinstance(module, NormedWeights) or name in fused.norms(module):
        owner._bake(name)
    else:
        _fold(module, lambda _, tensor: tensor == name)
    return module


def _is_weight_normed(module: nn.Module, name: str) -> bool:
    if name in own_tensors(module):
        return True
    return any(tensor == name for tensor, _, _ in fused.computers(module))
