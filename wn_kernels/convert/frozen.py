"""This file keeps the weights of a whole model for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from .. import prepare
from ..call import PLAIN_TYPES
from ..modules import kept
from ..modules.weight import NormedWeights
from . import fused


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[list[str]]:
    """Keeps every weight-normed weight of a model after its first use, for inference.

        with torch.no_grad(), wn_kernels.frozen_weights(model):
            for chunk in stream:
                play(model(chunk))

    It covers the layers of this package and fused ones. Inside the block, a call that needs no
    gradient with respect to `g` and `v` computes as the plain layer does, with a weight that was
    computed once. A changed parameter is noticed, and the weight is then computed again. A call
    that needs gradients computes as outside the block. docs/convert.md has the details.

    The block holds for all threads. Blocks may be nested, and a weight is dropped at the end of the
    last block that its layer is in.

    Args:
        model: any module. It may be weight-normed itself.

    Yields:
        The names of the layers that keep their weights.

    Raises:
        TypeError: `model` is not a module.
    """
    prepare.check_module("model", model)
    stores = []
    names = []
    try:
        for name, module in _layers(model):
            stores.append((module, kept.open_store(module)))
            names.append(name)
        yield names
    finally:
        for module, store in stores:
            kept.close_store(module, store)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the names and the modules of the layers whose changes can be noticed. `fully_shard`
    writes new values into a parameter without a change of its version counter."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    sharded = getattr(fsdp, "FSDPModule", ())
    modules = dict(model.named_modules())
    left = {
        m for module in modules.values() if isinstance(module, sharded) for m in module.modules()
    }
    for name, module in modules.items():
        if (
            (isinstance(module, NormedWeights) or fused.is_fused(module))
            and module not in left
            and all(type(p) in PLAIN_TYPES or is_lazy(p) for p in module.parameters())
        ):
            yield name, module
