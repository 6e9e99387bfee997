"""This file initialises a model without data, by the sizes of its layers."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping

import torch
from torch import nn

from .. import functional as WF
from .. import prepare
from ..convert.normed import weights


@torch.no_grad()
def norm_preserving_(
    model: nn.Module, gains: Mapping[str, float] | None = None, *, orthogonal: bool = True
) -> dict[str, float]:
    """Sets every weight-normed layer without data, in place, so that it preserves the norm of its
    input in expectation.

    It is the initialisation of Arpit, Campos & Bengio 2019 for networks of ReLUs: orthogonal rows
    of `V`, a bias of zero, and

        g = √(γ · fan_in / fan_out)

    with γ = 2 for a layer that a ReLU follows, 1 for one that none follows (the shortcut of a
    residual block, the last layer), and 1 / B for the last layer of each residual branch in a stage
    of B blocks. The formula is that of `dim=0`. There, it makes `‖W‖² = γ · in_channels`, and this
    is what makes the norm of the output that of the input. For any `dim`,

        g = √(γ · in_channels / n)      with n the number of entries of g

    For another norm of the slices than l2, this is ‖W_j‖₂ of each, and `g` is it times
    ‖V_j‖ / ‖V_j‖₂.

    What is frozen stays as it is. A layer whose `forward` is its own, or whose `g` or `v` is itself
    computed, is left alone.

    Args:
        model: any model that `wn_kernels.fuse` accepts.
        gains: γ by the layer's name in the model, or by a pattern of `fnmatch` such as
            `"*.conv2"`. A later entry takes precedence. Layers that none matches have γ = 2.
        orthogonal: whether to draw `V` anew by `torch.nn.init.orthogonal_`, from PyTorch's random
            numbers. Otherwise `V` stays as it is, which is as good in expectation if its entries
            are independent with mean zero.

    Returns:
        The value of `g`, that of l2, by the name of each layer that was set.

    Raises:
        TypeError: `model` is not a module, `gains` not a mapping, or a key of it not a string.
        ValueError: a gain is not positive, or a name matches no layer.
    """
    prepare.check_module("model", model)
    found = [x for x in weights(model) if x.layer is not None and not x.fault]
    chosen = {x.name: 2.0 for x in found}
    if gains is not None and not isinstance(gains, Mapping):
        raise TypeError(f"gains must be a mapping or None, got {type(gains).__name__}")
    for pattern, gain in (gains or {}).items():
        if not isinstance(pattern, str):
            raise TypeError(f"a key of gains must be a name or a pattern, got {pattern!r}")
        if not isinstance(gain, (int, float)) or not 0 < gain < math.inf:
            raise ValueError(f"the gain of {pattern!r} is {gain!r}; expected a positive number")
        matching = fnmatch.filter(chosen, pattern)
        if not matching:
            raise ValueError(f"{pattern!r} matches no weight-normed layer")
        chosen |= dict.fromkeys(matching, float(gain))
    values = {}
    for x in found:
        g, v = x.tensors
        if orthogonal and v.requires_grad:
            wide = torch.promote_types(v.dtype, torch.float32)
            v.copy_(nn.init.orthogonal_(torch.empty(v.shape, dtype=wide, device=v.device)))
        bias = x.module._parameters.get("bias")
        if bias is not None and bias.requires_grad:
            bias.zero_()
        if g.requires_grad:
            inputs = v.shape[0] if x.is_transposed else v.shape[1] * x.groups
            values[x.name] = math.sqrt(chosen[x.name] * inputs / g.numel())
            g.fill_(values[x.name])
            if x.norm != "l2":
                own, l2 = (WF.slice_norm(v, dim=x.dim, norm=norm) for norm in (x.norm, "l2"))
                g.mul_(torch.where(l2 == 0, 1.0, own / l2))
        x.refresh()
    return values
