"""This file initialises a model from a batch of data, layer by layer in the order in which they
run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from .. import functional as WF
from .. import prepare
from ..convert.normed import Normed, weights
from ..modules import checkpoints
from ..text import Tabular
from .moments import Moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# --- reports -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Initialised:
    """Holds a line of a report of `data_dependent_`.

    Attributes:
        name: the layer's name in the model, and the tensor's name if that is not `weight`.
        kind: the class of the layer.
        before, after: the moments of its pre-activations over all batches and all of its uses,
            before and after the initialisation, or `None` if no batch reached it.
        note: what could not be set, and why.
    """

    name: str
    kind: str
    before: Moments | None
    after: Moments | None
    note: str = ""


class Report(Tabular, tuple[Initialised, ...]):
    """Holds the results of `data_dependent_`, a line for each weight-normed tensor. It prints as a
    table with the largest mean of a channel, and the smallest and the largest variance. A notebook
    shows it as one."""

    def _rows(self) -> list[tuple[str, ...]]:
        moments = "mean", "variance", "mean after", "variance after"
        header: tuple[str, ...] = ("layer", "class", *moments, "note")
        return [header] + [
            (x.name or "(root)", x.kind, *_shown(x.before), *_shown(x.after), x.note) for x in self
        ]


def _shown(moments: Moments | None) -> tuple[str, str]:
    if moments is None:
        return "-", "-"
    least, most = moments.variance.aminmax()
    return f"{moments.mean.abs().max():.3g}", f"{least:.3g} to {most:.3g}"


# --- one layer -----------------------------------------------------------------------------------


class _Layer:
    """Initialises one layer, whose forward computes `y = s ⊙ t + b` with a factor `s` for each
    channel."""

    def __init__(self, normed: Normed) -> None:
        self.normed = normed
        self.is_set = False
        self.parts: dict[int, Moments] = {}  # by batch
        module, (g, v) = normed.module, normed.tensors
        self.transposed, self.groups = normed.is_transposed, normed.groups
        self.channels_dim = -1 if v.ndim == 2 else 1 - v.ndim
        # `g` scales the channels itself if it has an entry for each.
        if self.transposed:
            self.by_g = self.normed.dim == 1 and self.groups == 1
        else:
            self.by_g = self.normed.dim == 0
        self.scales = g.requires_grad and (self.by_g or v.requires_grad)
        self.bias = bias = module._parameters.get("bias")
        self.shifts = bias is not None and bias.requires_grad
        self.note = ""
        if not self.scales:
            self.note = "frozen: bias only" if self.shifts else "frozen"
        elif not self.shifts:
            self.note = "no bias: scale only" if bias is None else "frozen bias: scale only"
        written = [g] if self.by_g else [g, v]
        written = [*(written if self.scales else []), *([bias] if self.shifts else [])]
        self.former = [(p, p.clone()) for p in written]

    @property
    def is_open(self) -> bool:
        """Returns whether anything remains to be set."""
        return not self.is_set and (self.scales or self.shifts)

    def restore(self) -> None:
        """Gives the layer's parameters their former values."""
        for p, values in self.former:
            p.copy_(values)

    def neutralise(self) -> None:
        """Makes the layer's output `t`: `b` becomes 0 and, if it scales the channels, `g` 1."""
        if self.scales and self.by_g:
            self.normed.tensors[0].fill_(1)
        if self.shifts:
            self.bias.zero_()

    def set(self, t: Tensor, group: Any) -> Tensor:
        """Sets `g` and `b` from the moments of `t`.

        Args:
            t: the output of the neutral layer for the last batch.
            group: the processes whose moments are pooled, or `None`.

        Returns:
            What the layer computes from now on.

        Raises:
            ValueError: the moments are not finite, or are those of one value.
        """
        moments = Moments.pooled(self.parts.values(), group)
        if moments.count < 2:
            raise ValueError(
                f"{self.normed.name} gives too few values per channel ({int(moments.count)}); "
                "their variance needs at least two"
            )
        if not bool((moments.mean.isfinite() & moments.squares.isfinite()).all()):
            raise ValueError(f"the pre-activations of {self.normed.name} are not finite")
        scale = self._scale(moments, t.dtype)
        shift = -moments.mean * scale if self.shifts else torch.zeros_like(scale)
        if self.scales:
            self._write_scale(scale)
        if self.shifts:
            self.bias.copy_(shift)
        self.is_set = True
        wide = torch.promote_types(t.dtype, torch.float32)
        per_channel = (-1, *[1] * (-self.channels_dim - 1))
        scale, shift = (x.view(per_channel).to(wide) for x in (scale, shift))
        return torch.addcmul(shift, t.to(wide), scale).to(t.dtype)

    def _scale(self, moments: Moments, dtype: torch.dtype) -> Tensor:
        """Returns `s`: 1 / σ, or the former factor of a channel whose values are all equal."""
        deviation = moments.variance.sqrt()
        former = torch.ones_like(deviation)
        if not self.scales:
            return former
        if self.by_g:
            former = self.former[0][1].double().view(-1)
        constant = deviation <= 8 * torch.finfo(dtype).eps * moments.mean.abs()
        if count := int(constant.sum()):
            kept = f"scale kept of {count} constant channel{'s' if count > 1 else ''}"
            self.note = "; ".join(filter(None, [self.note, kept]))
        return torch.where(constant, former, 1 / deviation)

    def _write_scale(self, scale: Tensor) -> None:
        g, v = self.normed.tensors
        if self.by_g:
            g.copy_(scale.view(g.shape))
            return
        if self.transposed:  # V is (inputs, outputs / groups, ...)
            factor = scale.view(self.groups, -1).repeat_interleave(len(v) // self.groups, 0)
        else:
            factor = scale.unsqueeze(1)
        dim, eps, norm = self.normed.dim, self.normed.eps, self.normed.norm
        weight = WF.weight_norm(v, g, dim=dim, eps=eps, norm=norm)
        scaled = weight * factor.view(*factor.shape, *[1] * (v.ndim - 2))
        checkpoints.assign(scaled, g, v, dim, eps, norm)


# --- the passes ----------------------------------------------------------------------------------


class _Stop(BaseException):
    """Ends a forward pass at a layer that needs the other batches. No model's `except Exception`
    catches it."""


@contextmanager
def _hooked(
    layers: Iterable[_Layer],
    after: Callable[[_Layer, Tensor], Tensor | None],
    before: Callable[[_Layer], None] = lambda layer: None,
) -> Iterator[None]:
    """Hooks the layers, before all hooks that they have. If `after` returns a tensor, it replaces
    the layer's output."""
    handles = []

    def hook(layer: _Layer) -> None:
        module = layer.normed.module
        handles.append(
            module.register_forward_pre_hook(lambda *_: before(layer), prepend=True),
        )
        handles.append(
            module.register_forward_hook(lambda _, __, y: after(layer, y), prepend=True),
        )

    for layer in layers:
        hook(layer)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batches(batch: Any) -> list[tuple[tuple, dict[str, Any]]]:
    """Returns the arguments of the model, for each batch."""
    if isinstance(batch, (Tensor, tuple, Mapping)):
        batch = [batch]
    elif not isinstance(batch, Iterable):
        raise TypeError(
            "batch must be a tensor, a tuple or mapping of the model's arguments, or an iterable "
            f"of batches, got {type(batch).__name__}"
        )
    calls: list[tuple[tuple, dict[str, Any]]] = []
    for one in batch:
        if isinstance(one, Mapping):
            calls.append(((), dict(one)))
        else:
            calls.append((tuple(one) if isinstance(one, (tuple, list)) else (one,), {}))
    if not calls:
        raise ValueError("batch is empty")
    return calls


def _uncompiled() -> AbstractContextManager[Any]:
    """Returns a context in which code that `torch.compile` has compiled runs as it was written."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _forward(model: nn.Module, call: tuple[tuple, dict[str, Any]]) -> bool:
    """Runs a forward pass, which leaves buffers and PyTorch's random numbers as they were. It runs
    no compiled program, into which a compiler would trace the hooks. Returns whether it was
    stopped."""
    buffers = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.get_device() for p in model.parameters() if p.is_cuda}
    arguments, options = call
    try:
        with torch.random.fork_rng(devices), _uncompiled():
            model(*arguments, **options)
    except _Stop:
        return True
    finally:
        for owner, name, buffer, values in buffers:
            owner[name] = buffer
            buffer.copy_(values)
    return False


def _measure(model: nn.Module, layers: list[_Layer], calls: list, group: Any) -> dict[str, Moments]:
    """Returns the moments of the layers that run, by name."""
    parts: dict[str, list[Moments]] = {}

    def after(layer: _Layer, y: Tensor) -> None:
        parts.setdefault(layer.normed.name, []).append(Moments.of(y, layer.channels_dim))

    with _hooked(layers, after):
        for call in calls:
            _forward(model, call)
    return {name: Moments.pooled(found, group) for name, found in parts.items()}


def _initialise(model: nn.Module, layers: list[_Layer], calls: list, group: Any) -> None:
    """Sets the layers in the order in which they run.

    With several batches, each pass stops at the first layer that is not set, and that of the last
    batch sets it. Therefore every layer takes a pass of every batch.
    """
    last = len(calls) - 1
    index, has_set, is_stopped = 0, True, True

    def before(layer: _Layer) -> None:
        if layer.is_open:
            layer.neutralise()

    def after(layer: _Layer, y: Tensor) -> Tensor | None:
        nonlocal has_set
        if not layer.is_open:
            return None
        layer.parts[index] = Moments.of(y, layer.channels_dim)
        if index < last or (has_set and last > 0):
            raise _Stop
        has_set = True
        return layer.set(y, group)

    with _hooked(layers, after, before):
        while is_stopped and has_set:
            has_set = is_stopped = False
            for index, call in enumerate(calls):  # noqa: B007 (`after` reads it)
                is_stopped |= _forward(model, call)
    for layer in layers:
        if layer.is_open:
            layer.restore()


@torch.no_grad()
def data_dependent_(
    model: nn.Module, batch: Any, *, process_group: ProcessGroup | None = None
) -> Report:
    """Sets `g` and the bias of every weight-normed layer from data, in place, so that each channel
    of its pre-activations has mean 0 and variance 1 over the batch.

    It is the initialisation of Salimans & Kingma 2016, section 3, equations (5) and (6). With
    `t = V x / ‖V‖`, over the batch and, for convolutions, over all positions,

        g = 1 / σ[t]      b = −μ[t] / σ[t]

    Layers are set in the order in which they run, in one forward pass of the batch. Two more passes
    measure the report. If `g` has no entry for each output channel (a transposed convolution with
    `dim=0`, for example), the channels of `W` itself are scaled, and `g` and `V` are set so that
    they give it.

    - A layer that runs several times is set at its first use.
    - A frozen `g` or bias stays as it is. Without a bias, only the variance is set.
    - A channel that is constant over the batch keeps its scale.
    - A layer whose `forward` is its own, or whose `g` or `v` is itself computed, is left alone.

    The model runs in the mode that it is in. Hooks, buffers, training flags and PyTorch's random
    numbers are as before. If a pass fails, the parameters are as before as well.

    Args:
        model: any model that `wn_kernels.fuse` accepts, or one in `DistributedDataParallel`.
        batch: the input: a tensor, a tuple of the model's arguments, or a mapping of its keyword
            arguments. Any other iterable holds several batches, whose statistics are pooled. Then
            every layer takes a pass of every batch.
        process_group: the processes whose statistics are pooled, each with batches of its own. It
            is by default that of `DistributedDataParallel`, and otherwise this process alone. All
            have to run the same layers.

    Returns:
        The mean and the variance of each layer before and after. It prints as a table.

    Raises:
        TypeError: `model` is not a module, or `batch` is none of the above.
        ValueError: there is no batch, a lazy layer has no shape yet, a layer's pre-activations are
            not finite, or they have fewer than two values per channel.
        RuntimeError: weights are cached by `torch.nn.utils.parametrize.cached()`.
    """
    prepare.check_module("model", model)
    if parametrize._cache_enabled:
        raise RuntimeError("weights cannot be initialised inside torch.nn.utils.parametrize.cached")
    if isinstance(model, DistributedDataParallel):
        process_group = process_group or model.process_group
        model = model.module
    model = getattr(model, "_orig_mod", model)  # that of torch.compile
    calls = _batches(batch)
    found = list(weights(model))
    layers = {x.name: _Layer(x) for x in found if x.layer is not None and not x.fault}
    chosen = list(layers.values())
    before = _measure(model, chosen, calls, process_group)
    try:
        _initialise(model, chosen, calls, process_group)
        after = _measure(model, chosen, calls, process_group)
    except BaseException:
        for layer in chosen:
            layer.restore()
        raise
    finally:
        for x in found:
            x.refresh()
    lines = []
    for x in found:
        note = _note(x, layers.get(x.name), x.name in before)
        lines.append(Initialised(x.name, x.kind, before.get(x.name), after.get(x.name), note))
    return Report(lines)


def _note(normed: Normed, layer: _Layer | None, has_run: bool) -> str:
    if layer is None:
        return normed.fault or "its own forward"
    if not has_run:
        return "no batch reached it"
    return "the last batch did not reach it" if layer.is_open else layer.note
