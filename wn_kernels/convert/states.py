"""This file gives the state dict of a model with every weight-normed weight in one form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .. import prepare
from ..modules import checkpoints
from ..modules.weight import NormedWeights
from . import fused


def own_tensors(module: Any) -> tuple[str, ...]:
    """Returns the weight-normed tensors of a layer of this package. It is empty for another
    module."""
    return module._normed() if isinstance(module, NormedWeights) else ()


def state_dict(
    model: nn.Module, form: Literal["weight_norm", "parametrizations", "plain"]
) -> dict[str, Any]:
    """Returns `model.state_dict()` with every weight-normed weight in one form.

    A weight stays in its form if its `g` or `v` is pruned or parametrized, or if another
    parametrization is stacked on it.

    Args:
        model: any module. It converts layers of this package, fused ones and PyTorch's own.
        form: `"weight_norm"` (`weight_g`, `weight_v`), `"parametrizations"`
            (`parametrizations.weight.original0`, `original1`) or `"plain"` (`weight`).

    Raises:
        TypeError: `model` is not a module.
        ValueError: the form is unknown, or a lazy layer has no shape yet.
    """
    prepare.check_module("model", model)
    if form != "plain" and form not in checkpoints.FORMS:
        raise ValueError(f"form is {form!r}; expected one of {[*checkpoints.FORMS, 'plain']}")
    saved = model.state_dict()
    renamed: dict[str, str] = {}
    baked = {}
    weights: dict[int, list[tuple[str, str, torch.Tensor]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        prefix = prefix and prefix + "."
        if id(module) not in weights:
            weights[id(module)] = list(_stored(module))
        for tensor, own, weight in weights[id(module)]:
            old = checkpoints.keys(own, tensor, prefix)
            if form == "plain":
                renamed |= dict.fromkeys(old, prefix + tensor)
                baked[prefix + tensor] = weight.detach()
            else:
                renamed |= dict(zip(old, checkpoints.keys(form, tensor, prefix), strict=True))
    items = [(renamed.get(key, key), value) for key, value in saved.items()]
    saved.clear()
    saved.update((key, baked.get(key, value)) for key, value in items)
    return saved


def _stored(module: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yields the name, the form and the weight of each weight-normed tensor of a module. It skips
    tensors that are pruned or have other parametrizations."""
    for tensor in own_tensors(module):
        if any(map(is_lazy, module._tensors(tensor))):
            name = type(module).__name__
            raise ValueError(f"{tensor} of {name} has no shape yet: run the model once")
        if not fused.is_replaced(module, tensor):
            yield tensor, "weight_norm", getattr(module, tensor)
    for tensor, form, computer in fused.computers(module):
        if fused.is_stacked(module, tensor) or fused.is_replaced(module, tensor):
            continue
        if form == "weight_norm":
            yield tensor, form, computer.compute_weight(module)
        else:
            yield tensor, form, getattr(module, tensor)
