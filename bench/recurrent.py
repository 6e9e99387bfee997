"""This suite has recurrent layers and cells whose weights are all weight-normed. Few steps show
what weight norm costs, because the weights are computed once for a sequence."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bench.layer import MODES
from bench.models import Model, ModelCase

SIZE, BATCH = 256, 8


def normed(kind: type[nn.Module], size: int, *arguments: int) -> nn.Module:
    """Returns the layer of so many inputs and units as PyTorch normalises it."""
    layer = kind(size, size, *arguments)
    for name in [name for name, _ in layer.named_parameters() if name.startswith("weight")]:
        parametrizations.weight_norm(layer, name)
    return layer


def first(layer: Any, x: Tensor) -> Tensor:
    """Returns the output without the states at its end."""
    return layer(x)[0]


def stepped(cell: Any, x: Tensor) -> Tensor:
    """Returns the hidden state after a step that starts from the input."""
    y = cell(x, (x, x) if isinstance(cell, nn.LSTMCell) else x)
    return y[0] if isinstance(y, tuple) else y


def layers(size: int, batch: int, steps: Iterable[int]) -> dict[str, Model]:
    """Returns layers of two storeys over so many steps, by their labels."""
    return {
        f"{kind.__name__} 2×{size}, {count} steps of {batch}": Model(
            partial(normed, kind, size, 2), (3, 2, size), (count, batch, size), first, 4, True
        )
        for kind in (nn.LSTM, nn.GRU)
        for count in steps
    }


def cells(size: int, batch: int) -> dict[str, Model]:
    """Returns cells, by their labels."""
    return {
        f"{kind.__name__} {size}, {batch} rows": Model(
            partial(normed, kind, size), (3, size), (batch, size), stepped, 2, True
        )
        for kind in (nn.LSTMCell, nn.GRUCell)
    }


LAYERS = layers(SIZE, BATCH, (4, 64)) | cells(SIZE, BATCH)
CASES = [ModelCase(label, mode, LAYERS) for label in LAYERS for mode in MODES]
