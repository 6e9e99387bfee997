"""This file provides weights that are prepared before a layer's forward, which finds them by
`take`. PyTorch's own product then does the rest. They are kept inside `frozen_weights` (`kept.py`),
cached inside `torch.nn.utils.parametrize.cached()` (`reading.py`), or computed by a group.

`fuse(model, grouped=True)` gives the model a `Group` (`convert/groups.py`). It computes the weights
of all members by one call of `functional.weight_norms`, at the start of the model's forward. A
layer that runs meanwhile, on the same thread, takes its weight. In the backward, the gradients of
all members are one node.

A weight is used only where it is what the layer would compute itself. Otherwise the layer computes
its own, as if there were no group:

- outside of the model's forward;
- if `g` or `v` is another tensor than at the start, or was written to;
- in another mode than at the start: of gradients, of inference, or of hooks that save tensors, as
  inside of a checkpoint;
- if its product has another dtype than the weight, as under autocast that the forward turns on;
- where the plan has a better way for this input than the group's weight (`plan.shares`).

A group computes the weights that the forward before in the same mode used. Where hooks save tensors
it computes all weights, because a checkpoint of the model compares what two forwards save. A layer
that had a better way does without the group for the next `RESTS` forwards, and a group of such
layers does nothing in them. A group that would compute few weights computes none (`plan.fewest`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils import parametrize

from .. import functional as WF
from .. import grouped, plan, prepare
from ..call import PLAIN_TYPES, Operands, takes_tf32
from ..operators import native_library
from . import reading

if TYPE_CHECKING:
    from .kept import Store

# This returns the hooks of saved tensors that are in effect, or `None`.
_saving = torch._C._autograd._top_saved_tensors_default_hooks

# Decisions are kept for at most this many inputs: of a layer, and of all layers of a group.
MOST_SHAPES = 256
MOST_SHAPES_OF_GROUP = 4096

# Forwards between two in which a group looks at layers that had a better way.
RESTS = 15

# A forward notes these bits of a layer: it wanted the group's weight, or it had a better way.
WANTED, DECLINED = 1, 2


# A mode says whether gradients are recorded, whether inference mode is on, and which hook saves
# tensors.
Mode = tuple[bool, bool, Any]


def _mode() -> Mode:
    records = torch.is_grad_enabled()
    hooks = _saving(True) if records else None
    return records, torch.is_inference_mode_enabled(), hooks and hooks[0]


# --- the weights of a forward --------------------------------------------------------------------


class Weights:
    """The weights of a forward in progress, as `Weights` of the native library, which serves a
    forward without hooks of saved tensors.

    Args:
        indices: the layers that have a weight.
        v, g, versions: the tensors that they were computed from, and the sums of their version
            counters.
        w: the weights.
        seen: a byte for every layer, of `WANTED` and `DECLINED`.
        known: the decisions about former inputs.
        decide: a function of `(key, i, x, v, g, bias, dtype)` that adds one.
    """

    def __init__(
        self,
        indices: Sequence[int],
        v: Sequence[Tensor],
        g: Sequence[Tensor],
        versions: Sequence[int],
        w: Sequence[Tensor],
        seen: bytearray,
        known: dict[Any, bool],
        decide: Callable[..., bool],
    ) -> None:
        self.layers = dict(zip(indices, zip(v, g, versions, w, strict=True), strict=True))
        self.seen, self.known, self.decide = seen, known, decide
        self.mode = _mode()

    def take(self, i: int, x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None) -> Tensor | None:
        """Returns the weight of a layer for an input, if it is what the layer would compute."""
        if type(x) not in PLAIN_TYPES or _mode() != self.mode:
            return None
        records, dtype = self.mode[0], x.dtype
        cast = _cast(x.device) if torch._C._is_any_autocast_enabled() else None
        if cast is not None and dtype is not torch.float64:
            dtype = cast
        elif bias is not None and bias.dtype is not dtype:
            return None
        key = i, x.shape, dtype, records
        shares = self.known.get(key)
        if shares is None:
            shares = self.decide(key, i, x, v, g, bias, dtype)
        self.seen[i] |= WANTED if shares else DECLINED
        if not shares or i not in self.layers:
            return None
        own_v, own_g, versions, w = self.layers[i]
        if (
            w.dtype is not dtype
            or v is not own_v
            or g is not own_g
            or versions != _versions(v, g)
            or (records and not w.requires_grad and (v.requires_grad or g.requires_grad))
            or w.device != x.device
        ):
            return None
        return w


def _versions(v: Tensor, g: Tensor) -> int:
    """Returns the sum of the version counters, which tensors of inference mode do not have."""
    try:
        return v._version + g._version
    except RuntimeError:
        return 0


def _cast(device: torch.device) -> torch.dtype | None:
    """Returns the dtype that autocast gives to the input of a layer."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


# The places of the tensors of layers: a dictionary, and the keys of g and v.
Places = list[tuple[dict[str, Any], str, str]]


def _parameters(
    places: Places, indices: Sequence[int]
) -> dict[torch.device, tuple[list[int], list[Tensor], list[Tensor], list[int]]]:
    """Returns the layers whose `v` and `g` are torch's own, these tensors, and the sums of their
    version counters, by device."""
    found: dict[torch.device, Any] = {}
    for i in indices:
        own, g_key, v_key = places[i]
        v, g = own.get(v_key), own.get(g_key)
        if v is not None and type(v) in PLAIN_TYPES and g is not None and type(g) in PLAIN_TYPES:
            lists = found.setdefault(v.device, ([], [], [], []))
            for each, value in zip(lists, (i, v, g, _versions(v, g)), strict=True):
                each.append(value)
    return found


def _pays(
    known: dict[Any, bool],
    module: Any,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> bool:
    """Returns whether the plan has a layer use its kept weight for this input. `known` are the
    answers for former inputs."""
    modes = torch.is_grad_enabled(), plan.forced(), prepare.epoch
    key = x.shape, x.stride(), dtype, *modes
    found = known.get(key)
    if found is None:
        arguments = module, x, v, g, bias, dtype
        found = _decide(known, MOST_SHAPES, key, plan.is_better_formed, *arguments)
    return found


def _decide(known: dict[Any, bool], most: int, key: Any, *arguments: Any) -> bool:
    """Returns what `_shares` returns for these arguments, and keeps it in `known`, which has `most`
    entries at most."""
    if len(known) >= most:
        known.clear()
    found = known[key] = _shares(*arguments)
    return found


def _shares(
    rule: Callable[..., bool],
    module: Any,
    x: Tensor,
    v: Tensor,
    g: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> bool:
    """Returns whether a layer uses a prepared weight for this input, by a rule of the planner."""
    dim, eps, norm = module._normalisation()
    backend = plan.serving(v, dim)
    if backend == "reference":
        return False
    like = x if x.dtype is dtype else torch.empty_like(x, dtype=dtype, device="meta")
    rank = 0
    geometry: tuple[Any, ...] = ()
    if v.ndim > 2:
        padding = module.padding if module.padding_mode == "zeros" else 0
        more = module.transposed, module.output_padding, module.groups
        rank, geometry = v.ndim - 2, (module.stride, padding, module.dilation, *more)
    try:
        tensors = Operands(like, v, g, bias)
        found = prepare.prepare(rank, tensors, geometry, dim, eps, norm, backend)
    except (TypeError, ValueError):  # the layer raises it, if it is an error there too
        return False
    return rule(found.call, found.plan, torch.is_grad_enabled())


# --- the forwards in progress --------------------------------------------------------------------


class Forward:
    """A forward of a group's model that is in progress.

    Attributes:
        outer: the forward around it, or `None`.
        index: the indices of the layers that may take a weight, by their `id`.
        take: `Weights.take`.
        seen: what it has seen of every layer.
        choice: where this is noted, or `None`.
    """

    __slots__ = ("choice", "index", "outer", "seen", "take")

    def __init__(
        self,
        index: dict[int, int],
        take: Callable[..., Tensor | None],
        seen: bytearray,
        choice: Choice | None,
    ) -> None:
        self.index, self.take, self.seen, self.choice = index, take, seen, choice
        self.outer = _state.forward


class _State(threading.local):
    """The innermost forward in progress on a thread, or `None`."""

    forward: Forward | None = None


_state = _State()


def take(module: Any, x: Tensor, v: Tensor, g: Tensor, bias: Tensor | None) -> Tensor | None:
    """Returns a `W` that was prepared for this call of a layer's `forward`, in the dtype of its
    product with `x`, or `None` if the layer computes its own."""
    is_traced = is_compiling()
    store = None if is_traced else module._store
    if store is not None and (w := _kept(store, module, x, v, g, bias)) is not None:
        return w
    if parametrize._cache_enabled:
        return reading.cached_for_product(module, x, v)
    if is_traced:
        return module._traced
    forward = _state.forward
    while forward is not None:
        i = forward.index.get(id(module))
        if i is not None:
            return forward.take(i, x, v, g, bias)
        forward = forward.outer
    return None


def _kept(
    store: Store, module: Any, x: Any, v: Tensor, g: Tensor, bias: Tensor | None
) -> Tensor | None:
    """Returns the weight that a layer keeps inside `frozen_weights`, or `None` if it forms none for
    this input."""
    is_free = plan.forced() is None
    take, add = (store.take, store.add) if is_free else (None, None)
    if take is not None and (w := take(x, v, g)) is not None:
        return None if w is False else w
    if not isinstance(x, Tensor) or not prepare.are_dense(x, v, g, bias):
        return None  # the layer rejects it, as outside of the block
    dtype = WF.product_dtype(x) if torch._C._is_any_autocast_enabled() else x.dtype
    # A layer's own kernels may be faster than PyTorch's with a weight that is there.
    if not _pays(store.pays, module, x, v, g, bias, dtype):
        if add is not None:
            add(x, v, g, False, 0, ())
        return None
    found = store.find(module, "weight", v, g, dtype)
    if found is None:
        return None
    if add is not None and store.add is add:
        add(x, v, g, found.weight, found.versions, found.memory)
    return found.weight


def like(bias: Tensor | None, w: Tensor) -> Tensor | None:
    """Returns the bias of a layer in the dtype of a prepared weight."""
    return bias if bias is None or bias.dtype == w.dtype else bias.to(w.dtype)


# --- groups --------------------------------------------------------------------------------------


class Choice:
    """The layers of a group that take part in its forwards of one mode.

    Attributes:
        wanted: the indices of those whose weights the next forward computes.
        options: their `dim`, `eps` and `norm`, each a tuple.
        declined: those that had a better way.
        index: the indices of the other ones, by their `id`.
        rests: the number of forwards until a forward looks at all layers.
    """

    def __init__(self, group: Group) -> None:
        self._modules, self._places = group.modules, group.places
        self.rests = 0
        self._seen = b""  # what leads to the same choice
        self._set([*range(len(self._modules))], set())

    def _set(self, wanted: list[int], declined: set[int]) -> None:
        self.wanted, self.declined = wanted, declined
        self.index = {id(m): i for i, m in enumerate(self._modules) if i not in declined}
        self.options = _options(self._modules, wanted)

    def is_over(self) -> bool:
        """Counts a forward. Returns whether no layer takes part in it."""
        if not self.rests:
            return False
        self.rests -= 1
        return not self.index

    def learn(self, seen: bytearray, looked: bool) -> None:
        """Chooses the layers for the next forward by what a forward has seen, which may have looked
        at all layers."""
        if seen == self._seen:
            return
        wanted = [i for i, bits in enumerate(seen) if bits & WANTED]
        declined = {i for i, bits in enumerate(seen) if bits == DECLINED}
        if wanted and len(wanted) < self._fewest(wanted[0]):
            wanted, declined = [], declined.union(wanted)
        if looked:
            self.rests = RESTS if declined else 0
        else:
            declined |= self.declined
        if wanted != self.wanted or declined != self.declined:
            self._set(wanted, declined)
        self._seen = b"" if looked and declined else bytes(seen)

    def _fewest(self, i: int) -> int:
        own, _, v_key = self._places[i]
        return plan.fewest(plan.serving(own[v_key], self._modules[i]._normalisation()[0]))


def _options(modules: list[Any], indices: Sequence[int]) -> tuple[tuple[Any, ...], ...]:
    """Returns the `dim`, the `eps` and the `norm` of layers, each a tuple."""
    if not indices:
        return (), (), ()
    return tuple(zip(*[modules[i]._normalisation() for i in indices], strict=True))


# How often an option of some layer was changed.
_changes = 0


def forget_options() -> None:
    """Makes groups read the options of their layers again."""
    global _changes
    _changes += 1


class Group:
    """The layers of a model whose weights are prepared together.

    Attributes:
        model: the model. A copy of it has a group of its own, over its own layers.
        modules: the layers.
        index: the index of a layer by its `id`.
        places: where every `v` and `g` is held.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        self.model = model
        self.modules: list[Any] = [*modules]
        self._find()

    def _find(self) -> None:
        self.index = {id(module): i for i, module in enumerate(self.modules)}
        self.places: Places = [module._held() for module in self.modules]
        self._epoch: Any = None
        # Whether the plan has the group form a layer's weight, by the layer and its input.
        self._known: dict[Any, bool] = {}
        # By whether gradients are recorded, inference mode is on, and autocast is.
        self._choices: dict[tuple[bool, bool, bool], Choice] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "modules": self.modules}

    def begin(self) -> Forward | None:
        """Computes the weights for a forward of the model, and returns that forward. It is `None`
        if no layer takes a weight."""
        if is_compiling():
            self._trace()
            return None
        if parametrize._cache_enabled:
            return None
        if "index" not in self.__dict__:  # a copy, whose layers are complete by now
            self._find()
        tf32 = takes_tf32(torch.float32), takes_tf32(torch.float32, "conv")
        epoch = plan.forced(), prepare.epoch, tf32, _changes
        if epoch != self._epoch:
            self._epoch, self._known, self._choices = epoch, {}, {}
        records, infers, hooks = _mode()
        if hooks is not None:
            _state.forward = self._prepared(self.index, None)
            return _state.forward
        key = records, infers, torch._C._is_any_autocast_enabled()
        choice = self._choices.get(key)
        if choice is None:
            choice = self._choices[key] = Choice(self)
        looks = not choice.rests
        if choice.is_over():
            return None
        _state.forward = self._prepared(self.index if looks else choice.index, choice)
        return _state.forward

    def _prepared(self, index: dict[int, int], choice: Choice | None) -> Forward:
        """Computes the weights of a forward, those of all layers if there is no choice. Saved
        tensors then go through hooks, which `Weights` of the library does not serve."""
        library = native_library()
        seen = bytearray(len(self.modules))
        wanted: Sequence[int] = range(len(self.modules))
        if choice is None:
            options = _options(self.modules, wanted)
        else:
            wanted, options = choice.wanted, choice.options
        found = library and library.parameters(self.places, wanted)
        if found is not None:
            indices = wanted
            v, g, versions = found
            w = _formed(v, g, options) if v else []
        else:
            indices, v, g, versions, w = [], [], [], [], []
            rows = dict(zip(wanted, zip(*options, strict=True), strict=True))
            for part in _parameters(self.places, wanted).values():
                chosen = tuple(zip(*[rows[i] for i in part[0]], strict=True))
                every: Any = *part, _formed(part[1], part[2], chosen)
                for to, each in zip((indices, v, g, versions, w), every, strict=True):
                    to += each
        given = indices, v, g, versions, w, seen, self._known, self._decide
        taken = library.taking(*given) if library and choice else Weights(*given).take
        return Forward(index, taken, seen, choice)

    def _decide(self, key: Any, i: int, *arguments: Any) -> bool:
        module = self.modules[i]
        return _decide(self._known, MOST_SHAPES_OF_GROUP, key, plan.shares, module, *arguments)

    def end(self, forward: Forward | None) -> None:
        """Drops the weights, also after an exception."""
        if is_compiling():
            for module in self.modules:
                object.__setattr__(module, "_traced", None)
        elif forward is not None:
            _state.forward = forward.outer
            if forward.choice is not None:
                forward.choice.learn(forward.seen, forward.index is self.index)

    def _trace(self) -> None:
        """Computes the weights of a forward that is compiled."""
        found = [(module, module._operands()) for module in self.modules]
        given = [(module, *operands) for module, operands in found if operands is not None]
        if not given:
            return
        modules, v, g, _, dims, eps, norms = map(list, zip(*given, strict=True))
        weights = WF.weight_norms(v, g, dim=dims, eps=eps, norm=norms)
        for module, w in zip(modules, weights, strict=True):
            object.__setattr__(module, "_traced", w)


def _formed(v: list[Tensor], g: list[Tensor], options: tuple[tuple[Any, ...], ...]) -> list[Tensor]:
    """Returns the weights of layers on one device, each in the dtype of its product."""
    dim, eps, norm = options
    dtypes: tuple[Any, ...] = (None,) * len(v)
    if torch._C._is_any_autocast_enabled() and (cast := _cast(v[0].device)):
        dtypes = tuple([None if t.dtype is torch.float64 else cast for t in v])
    return grouped.formed(v, g, (dim, eps, dtypes, norm), together=True)
