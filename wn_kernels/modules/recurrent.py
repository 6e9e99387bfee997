"""This file contains the recurrent layers and cells.

A forward computes all weights of the layer in one call, and then runs the `forward` of torch.nn on
a plain layer that holds them (`with_weights`). Nothing of a call is kept in the layer itself, so
that several threads may run it. A cell on a CPU takes products without a weight (`steps.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import grouped, plan
from ..call import Norm, recorder
from . import checkpoints, flat, kept, norms, reading, removal, sequences, steps
from .weight import NormedWeights

if TYPE_CHECKING:
    from torch.types import Device


def flat_weights(layer: Any) -> list[Tensor | None]:
    """Returns the tensors of `layer._flat_weights_names`. Those that are weight-normed are computed
    in one call. Where cuDNN runs the layer, all of them lie in one buffer, in its order."""
    store = None if is_compiling() else layer._store
    frozen = None
    if by := kept.library_for(layer, layer._flat_weights_names):
        library, arguments = by
        if store is None:
            found = _by_library(library, layer, arguments)
        else:
            found = store.frozen and store.frozen.take(*arguments)
            frozen = None if found else library.Frozen(*arguments)
        if found is not None:
            return found
    names, normed = layer._flat_weights_names, layer._normed()
    directions = {name: layer._tensors(name)[1] for name in normed}
    others = {name: getattr(layer, name, None) for name in names if name not in directions}
    keeps = store is not None and not recorder(next(iter(directions.values())))
    places = {} if keeps else flat.places(layer, directions, others)
    formed = others | dict(zip(normed, reading.forms(layer, normed, places), strict=True))
    tensors = [formed[name] for name in names]
    if keeps and not flat.needs_grad(tensors):
        return _kept(layer, frozen, tensors, directions, others)
    if keeps:
        places = flat.places(layer, directions, others)
    return flat.gathered(tensors, [places.get(name) for name in names])


def _by_library(library: Any, layer: Any, arguments: tuple[Any, ...]) -> Any:
    """Returns the tensors of a layer for this call alone, or `None` if Python has to compute
    them."""
    first = next(iter(layer._parameters.values()), None)
    if (first is None or first.is_cpu) and plan.forced() in (None, "native"):
        return library.named_weights(*arguments)
    if first is None or plan.prepares(first) != "triton":
        return None
    layout = flat.layout(library, layer, first)
    return layout and library.placed_weights(*arguments, layout, grouped.launches)


@functools.lru_cache(maxsize=256)
def _rules(names: tuple[str, ...], *options: Any) -> dict[str, tuple[Any, ...]]:
    """Returns `(key of g, key of v, dim, eps, norm)` for each of these weights of a layer."""
    return {name: (*checkpoints.keys("weight_norm", name), *options) for name in names}


def _kept(layer: Any, frozen: Any, tensors: list[Any], *parts: Any) -> list[Tensor | None]:
    """Returns the tensors of a layer inside `frozen_weights`, which keeps them where cuDNN takes
    them. `frozen` is what the native library has noted of the parameters, or `None`."""
    store = layer._store
    before = store and store.copies
    if before and before.are_of(tensors):
        copies = before.copies
    else:
        with torch.inference_mode(False), torch.no_grad():
            places = flat.places(layer, *parts)
            copies = flat.gathered(tensors, [places.get(n) for n in layer._flat_weights_names])
            if store:
                store.copies = flat.Copies.of(copies, tensors)
    if frozen and store and store.copies and not torch.is_autocast_enabled(tensors[0].device.type):
        frozen.keep([*copies])
        store.frozen = frozen
    return [*copies]


def with_weights(layer: Any) -> Any:
    """Returns a layer of the plain class that shares everything with `layer`, but holds the weights
    of this call."""
    plain = layer.plain.__new__(layer.plain)
    state = plain.__dict__
    state.update(layer.__dict__)
    state["_flat_weights"] = flat_weights(layer)
    state["_update_flat_weights"] = _nothing  # they are up to date
    return plain


def cell_with_weights(cell: Any) -> Any:
    """Returns a cell of the plain class that shares everything with `cell`, but holds the weights
    of this call."""
    plain = cell.plain.__new__(cell.plain)
    normed = cell._normed()
    state = plain.__dict__
    state.update(cell.__dict__)
    for name in removal.order(cell):
        if name not in normed and name not in cell._parameters:  # it has another parametrization
            state[name] = getattr(cell, name)
    state.update(zip(normed, reading.forms(cell, normed), strict=True))
    return plain


def _nothing() -> None:
    pass


class FlatWeights:
    """Holds the methods of a recurrent layer whose `forward` computes the weights. The list that
    torch.nn keeps of them stays empty."""

    def _init_flat_weights(self: Any) -> None:
        self._flat_weights = [None] * len(self._flat_weights_names)
        self._flat_weight_refs = list(self._flat_weights)

    def _update_flat_weights(self: Any) -> None:
        pass

    def flatten_parameters(self: Any) -> None:
        """Does nothing: every forward writes its weights where cuDNN takes them."""


class RecurrentMixin(NormedWeights):
    """Holds what recurrent layers and cells share. Their constructors are those of torch.nn."""

    weight_ndim = 2
    hidden_size: int
    _names: tuple[str, ...] = ()  # while torch.nn's constructor runs

    def _normalise(self) -> None:
        parameters = dict(self._parameters)
        names = [name for name in parameters if name.startswith("weight")]
        self._parameters.clear()
        for name, parameter in parameters.items():
            if parameter is None or name not in names:
                self.register_parameter(name, parameter)
                continue
            key_g, key_v = checkpoints.keys("weight_norm", name)
            with torch.no_grad():
                g = nn.Parameter(checkpoints.magnitude(parameter, *self._normalisation(name)))
            self.register_parameter(key_v, parameter)
            self.register_parameter(key_g, g)
        self._names = tuple(names)
        removal.attach(self, names)

    def reset_parameters(self) -> None:
        """Initialises the parameters as the plain layer does. From the same seed, the weights have
        the same values."""
        bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0
        for name in removal.order(self):
            if name in self._names:
                g, v = self._tensors(name)
                nn.init.uniform_(v, -bound, bound)
                with torch.no_grad():
                    g.copy_(checkpoints.magnitude(v, *self._normalisation(name)))
            elif (parameter := getattr(self, name)) is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def _normed(self) -> tuple[str, ...]:
        return self._names

    def _holders(self) -> dict[str, dict[str, Any]]:
        """Returns the parameters of what holds `g` and `v` of a weight, if it is not the layer."""
        return {}

    @property
    def _rules(self) -> dict[str, tuple[Any, ...]]:
        return _rules(self._names, self.dim, self.eps, self.norm)

    def _forms(self, names: Sequence[str], places: Mapping[str, Tensor] | None) -> list[Tensor]:
        tensors = [self._tensors(name) for name in names]
        to = [places[name] for name in names] if places else None
        return norms.weights(tensors, to, self.dim, self.eps, self.norm)

    def _normalisation(self, name: str) -> tuple[int | None, float, Norm]:
        """Returns `(dim, eps, norm)`."""
        return self.dim, self.eps, self.norm

    def __getattr__(self, name: str) -> Any:
        if name in self._names:
            return reading.read(self, name)
        return super().__getattr__(name)

    def _leave(self, name: str, plain: type[nn.Module]) -> None:
        rest = tuple(other for other in self._names if other != name)
        if rest:
            self._names = rest
            self.__class__ = self._own_class()
        else:
            super()._leave(name, plain)
            del self.__dict__["_names"]


class _Layer(FlatWeights, RecurrentMixin):
    """Holds the `forward` of the three recurrent layers."""

    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        found = sequences.output(self, input, hx, flat_weights)
        return self.plain.forward(with_weights(self), input, hx) if found is None else found

    def _bake(self, name: str, weight: Tensor | None = None) -> None:
        super()._bake(name, weight)
        self._init_flat_weights()


class _Cell(RecurrentMixin):
    """Holds the `forward` of the three cells."""

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            bias: bool = True,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            dim: int | None = 0,
            eps: float = 0.0,
            norm: Norm = "l2",
        ) -> None: ...

    def forward(self: Any, input: Tensor, hx: Any = None) -> Any:
        y = steps.step(self, input, hx)
        return self.plain.forward(cell_with_weights(self), input, hx) if y is None else y


class WNLSTM(_Layer, nn.LSTM):
    """Replaces `torch.nn.LSTM` with weight-normalised weights.

    It takes the same arguments and is an instance of `nn.LSTM`. It starts from the same weights for
    the same seed. Every `weight_ih`, `weight_hh` and `weight_hr` is normalised. A forward computes
    them once for the whole sequence. Each can be read and assigned (`.weight_ih_l0`, ...).

    Args:
        dim: the dimension of the weights whose slices are normalised: 0 (each unit of each gate), 1
            (each input), or `None` / `-1` (one norm over each whole weight).
        eps: the smallest norm; see `wn_kernels.functional.weight_norm`.
        norm: the norm of a slice: `"l2"`, `"l1"` or `"linf"`. Each `g` starts at it.

    Attributes:
        weight_ih_l0_v: the direction of `weight_ih_l0`, of the shape that it has in `torch.nn`. The
            other weights are named alike: `weight_hh_l0_v`, `weight_ih_l0_reverse_v`, ...
        weight_ih_l0_g: its magnitude: the direction's shape with every dimension but `dim` set to
            1, 0-d for `dim=None`.
        bias_ih_l0: as in `torch.nn`, and so are the other biases.

    Shape:
        The shapes are those of `torch.nn.LSTM`. It takes packed sequences and inputs without a
        batch as well.

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of range.
    """

    plain = nn.LSTM

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            proj_size: int = 0,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            dim: int | None = 0,
            eps: float = 0.0,
            norm: Norm = "l2",
        ) -> None: ...


class WNGRU(_Layer, nn.GRU):
    """Replaces `torch.nn.GRU` with weight-normalised weights; see `WNLSTM`."""

    plain = nn.GRU

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            dim: int | None = 0,
            eps: float = 0.0,
            norm: Norm = "l2",
        ) -> None: ...


class WNRNN(_Layer, nn.RNN):
    """Replaces `torch.nn.RNN` with weight-normalised weights; see `WNLSTM`."""

    plain = nn.RNN

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            nonlinearity: str = "tanh",
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            dim: int | None = 0,
            eps: float = 0.0,
            norm: Norm = "l2",
        ) -> None: ...


class WNLSTMCell(_Cell, nn.LSTMCell):
    """Replaces `torch.nn.LSTMCell` with weight-normalised weights.

    It is a drop-in cell, as `WNLSTM` is a drop-in layer. Its parameters are `weight_ih_v`,
    `weight_ih_g`, `weight_hh_v`, `weight_hh_g` and the biases. A loop over
    many steps computes the weights once inside `torch.nn.utils.parametrize.cached()`.
    """

    plain = nn.LSTMCell


class WNGRUCell(_Cell, nn.GRUCell):
    """Replaces `torch.nn.GRUCell` with weight-normalised weights; see `WNLSTMCell`."""

    plain = nn.GRUCell


class WNRNNCell(_Cell, nn.RNNCell):
    """Replaces `torch.nn.RNNCell` with weight-normalised weights; see `WNLSTMCell`."""

    plain = nn.RNNCell

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            bias: bool = True,
            nonlinearity: str = "tanh",
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            dim: int | None = 0,
            eps: float = 0.0,
            norm: Norm = "l2",
        ) -> None: ...
