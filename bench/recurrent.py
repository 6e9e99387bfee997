"""This suite has recurrent layers and cells whose weights are all weight-normed. Few steps show
what weight norm costs, because the weights are computed once for a sequence."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bench.layer import MODES
from bench.models import Model, ModelCase

SIZE, BATCH = 256, 8


def normed(kind: type[nn.Module], *arguments: int) -> nn.Module:
    """Returns the layer as PyTorch normalises it."""
    layer = kind(SIZE, SIZE, *arguments)
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


LAYERS = {
    f"{kind.__name__} 2×{SIZE}, {steps} steps of {BATCH}": Model(
        partial(normed, kind, 2), (3, 2, SIZE), (steps, BATCH, SIZE), first, 4, True
    )
    for kind in (nn.LSTM, nn.GRU)
    for steps in (4, 64)
} | {
    f"{kind.__name__} {SIZE}, {BATCH} rows": Model(
        partial(normed, kind), (3, SIZE), (BATCH, SIZE), stepped, 2, True
    )
    for kind in (nn.LSTMCell, nn.GRUCell)
}
CASES = [ModelCase(label, mode, LAYERS) for label in LAYERS for mode in MODES]
