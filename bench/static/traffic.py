"""Counts what each Triton path moves through memory, in Triton's interpreter: the same every time,
and no GPU needed.

    requested    bytes that loads and stores ask for
    distinct     bytes that they touch, each counted once in a direction: what has to cross the
                 memory bus if what one launch read is still in cache for the next
    by launch    the same, once for each launch that touches them: if nothing is
    written      bytes that stores touch, once for each launch
    minimum      what no path can avoid: the inputs and the results of the direction, once

Where a path hands a product to the vendor's library, that kernel is counted by its inputs and
outputs, and so are all of eager PyTorch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from bench.report.tables import Table, printed
from bench.static import baseline
from wn_kernels.call import NORMS, Geometry, Member, Norm, kept_shape


@dataclass
class Traffic:
    """What one direction of a layer moved."""

    launches: int = 0
    requested: int = 0
    distinct: int = 0
    by_launch: int = 0
    written: int = 0
    operations: int = 0
    minimum: int = 0
    kernels: list[str] = field(default_factory=list)


# --- counting ------------------------------------------------------------------------------------


PAGE = 20  # bits of an address within a page


class _Touched:
    """The addresses that were touched: a page's are marked in an array of its own."""

    def __init__(self) -> None:
        self.pages: dict[tuple[int, int], np.ndarray] = {}

    def add(self, first: np.ndarray, size: int) -> None:
        """`size` bytes from each address."""
        first = first.ravel().astype(np.int64)
        pages = first >> PAGE
        for page in np.unique(pages) if first.size else ():
            key = (int(page), size)
            if key not in self.pages:
                self.pages[key] = np.zeros(1 << PAGE, bool)
            self.pages[key][first[pages == page] & ((1 << PAGE) - 1)] = True

    def count(self) -> int:
        return sum(int(marks.sum()) * size for (_, size), marks in self.pages.items())


class _Kernels(TorchDispatchMode):
    """Counts ATen's kernels, each by the bytes of its inputs and outputs, and keeps all memory
    alive, so that no address means two tensors."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.alive += [args, kwargs, result]
        name = func._schema.name.removeprefix("aten::")
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and "empty" not in name and name not in ("detach", "_unsafe_view"):
            inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
            outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
            formula = flop_registry.get(func.overloadpacket)
            operations = formula(*args, **(kwargs or {}), out_val=result) if formula else 0
            self.counter.kernel(name, inputs, outputs, operations)
        return result


class _Counter:
    def __init__(self) -> None:
        self.traffic = Traffic()
        self.whole, self.launch, self.stored = _Touched(), _Touched(), _Touched()
        # Whether a kernel of Triton's runs: what ATen does then is the interpreter's own.
        self.interprets = False

    def begin(self, name: str) -> None:
        self.end()
        self.traffic.launches += 1
        self.traffic.kernels.append(name)

    def end(self) -> None:
        self.traffic.by_launch += self.launch.count()
        self.traffic.written += self.stored.count()
        self.launch, self.stored = _Touched(), _Touched()

    def touch(self, first: np.ndarray, size: int, stores: bool) -> None:
        self.traffic.requested += first.size * size
        for touched in (self.whole, self.launch, *([self.stored] if stores else [])):
            touched.add(first, size)

    def kernel(
        self, name: str, inputs: list[Tensor], outputs: list[Tensor], operations: int
    ) -> None:
        """A kernel of ATen's."""
        if self.interprets:
            return
        self.begin(name)
        for tensors, stores in ((inputs, False), (outputs, True)):
            for t in tensors:
                self.touch(_addresses(t), t.element_size(), stores)
        self.traffic.operations += operations

    def result(self) -> Traffic:
        self.end()
        self.traffic.distinct = self.whole.count()
        return self.traffic


def _addresses(t: Tensor) -> np.ndarray:
    """Of a tensor's elements."""
    offsets = np.zeros((), np.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size, dtype=np.int64) * stride
    return t.data_ptr() + offsets.ravel() * t.element_size()


@contextmanager
def _interpreter(counter: _Counter) -> Iterator[None]:
    """Has Triton's interpreter tell the counter of loads, stores, products and launches."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    load, store, dot = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_dot,
    )
    call = executor.__call__

    def counted_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
        result = load(ptrs, mask, *rest)
        counter.touch(ptrs.data[mask.data.astype(bool)], result.data.itemsize, False)
        return result

    def counted_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counter.touch(ptrs.data[mask.data.astype(bool)], value.data.itemsize, True)
        return store(ptrs, value, mask, *rest)

    def counted_dot(a: Any, b: Any, *rest: Any) -> Any:
        counter.traffic.operations += 2 * a.data.size * b.data.shape[-1]
        return dot(a, b, *rest)

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        counter.begin(self.fn.__name__)
        counter.interprets = True
        try:
            return call(self, *args, **kwargs)
        finally:
            counter.interprets = False

    builder.create_masked_load = counted_load
    builder.create_masked_store = counted_store
    builder.create_dot = counted_dot
    executor.__call__ = counted_call
    try:
        yield
    finally:
        del builder.create_masked_load, builder.create_masked_store, builder.create_dot
        executor.__call__ = call


def count(run: Callable[[], Any]) -> Traffic:
    """What a call moves."""
    counter = _Counter()
    with _interpreter(counter), _Kernels(counter):
        run()
    return counter.result()


# --- what is counted -----------------------------------------------------------------------------


class Case(NamedTuple):
    """A layer and its input. Sizes are those that the interpreter walks in seconds; the ratios to
    the minimum are those of larger weights, but for edges."""

    label: str
    x_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    variants: tuple[str, ...]
    x_dtype: torch.dtype = torch.bfloat16
    v_dtype: torch.dtype = torch.bfloat16
    dim: int = 0
    conv: Geometry | None = None
    norm: Norm = "l2"


_SAME = Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
_EACH = _SAME._replace(groups=64)
_UP = Geometry((4,), (2,), (1,), True, (0,), 1)
_LINEAR = ("one_pass", "scaled", "materialize")
_MIXED = ("one_pass", "materialize")
_CONV = ("packed", "weight_grad", "materialize")

_F32 = torch.float32

CASES = [
    Case("linear 16, 512, 512", (16, 512), (512, 512), _LINEAR),
    Case("linear 16, 512, 512, autocast", (16, 512), (512, 512), _MIXED, v_dtype=_F32),
    Case("linear 1, 256, 256, float32", (1, 256), (256, 256), _LINEAR, _F32, _F32),
    Case("linear 16, 256, 256, dim=1", (16, 256), (256, 256), _LINEAR[1:], dim=1),
    Case("linear 256, 256, 256", (256, 256), (256, 256), _LINEAR[1:]),
    Case("conv 3×3, 64→64, 8²", (1, 64, 8, 8), (64, 64, 3, 3), _CONV, conv=_SAME),
    Case("up k8 s4, 64→32, 16", (1, 64, 16), (64, 32, 8), _CONV, conv=_UP),
    Case("depthwise 3×3, 64, 8²", (1, 64, 8, 8), (64, 1, 3, 3), ("one_pass", *_CONV), conv=_EACH),
    *(
        Case(f"linear 16, 128, 128, {norm}", (16, 128), (128, 128), _LINEAR, norm=norm)
        for norm in NORMS
    ),
]


class _Layer:
    """A case's tensors, and its directions on our kernels and in eager PyTorch."""

    def __init__(self, case: Case) -> None:
        self.case, self.label = case, case.label
        generator = torch.Generator().manual_seed(0)

        def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            t = torch.randn(shape, generator=generator).to(dtype)
            if len(shape) > 2 and shape == case.x_shape:  # channels last
                t = t.movedim(1, -1).contiguous().movedim(-1, 1)
            return t

        self.x = random(case.x_shape, case.x_dtype)
        self.v = random(case.v_shape, case.v_dtype)
        self.g = random(kept_shape(case.v_shape, case.dim), case.v_dtype).abs() + 0.5
        outputs = case.conv.out_channels(case.v_shape) if case.conv else case.v_shape[0]
        self.bias = random((outputs,), case.v_dtype)
        self.y, self.n = self.forward(case.variants[-1])
        self.dy = torch.randn_like(self.y)
        self.product = None
        if case.dim == 0 and "one_pass" in case.variants and not case.conv:
            *_, self.product = self.linear("one_pass", True)

    def forward(self, variant: str) -> tuple[Tensor, Tensor]:
        from wn_kernels.backends import triton as backend

        case, operands = self.case, (self.x, self.v, self.g, self.bias)
        if case.conv is None:
            y, n = self.linear(variant)
            return y, n
        options = case.conv, case.dim, 0.0, variant
        return backend.convolution(*operands, *options, norm=case.norm)[:2]

    def linear(self, variant: str, keep: bool = False) -> tuple[Tensor, ...]:
        from wn_kernels.backends import triton as backend

        case, operands = self.case, (self.x, self.v, self.g, self.bias)
        return backend.linear(*operands, case.dim, 0.0, variant, keep, norm=case.norm)

    def backward(self, variant: str) -> Any:
        from wn_kernels.backends import triton as backend

        case, operands = self.case, (self.dy, self.x, self.v, self.g, self.n)
        needs = (True, True, True, True)
        if case.conv is None:
            kept = self.product if variant == "product" else None
            options = case.dim, 0.0, variant, needs, kept
            return backend.linear_backward(*operands, *options, norm=case.norm)
        options = case.conv, case.dim, 0.0, variant, needs
        return backend.convolution_backward(*operands, *options, norm=case.norm)

    def minimum(self, direction: str) -> int:
        """Bytes of what comes in and of what goes out."""
        inputs = sum(t.nbytes for t in (self.x, self.v, self.g))
        if direction == "forward":
            return inputs + sum(t.nbytes for t in (self.bias, self.y, self.n))
        db = self.bias.numel() * self.dy.element_size()
        return 2 * inputs + self.dy.nbytes + self.n.nbytes + db

    def eager(self) -> dict[str, Traffic]:
        """PyTorch's parametrized layer, under autocast where dtypes differ. Its norm is l2."""
        case = self.case
        if case.conv is None:
            layer: Any = nn.Linear(*reversed(case.v_shape), dtype=case.v_dtype)
        else:
            kind = "ConvTranspose" if case.conv.transposed else "Conv"
            channels = case.x_shape[1], len(self.bias)
            options = (case.conv.stride, case.conv.padding)
            made = getattr(nn, f"{kind}{len(case.x_shape) - 2}d")
            more = {"groups": case.conv.groups, "dtype": case.v_dtype}
            layer = made(*channels, case.v_shape[2:], *options, **more)
        parametrizations.weight_norm(layer, dim=case.dim)
        x = self.x.detach().requires_grad_()
        mixed = case.x_dtype != case.v_dtype
        y: list[Tensor] = []

        def forward() -> None:
            with torch.autocast("cpu", case.x_dtype, enabled=mixed):
                y.append(layer(x))

        def backward() -> None:  # not into `.grad`, where what is kept alive would be copied
            torch.autograd.grad(y[0], [x, *layer.parameters()], self.dy)

        return {"forward": count(forward), "backward": count(backward)}


# The shapes of a group's weights. All are normalised along `dim=0`, with `W` in bfloat16.
GROUP = [(16, 32, 7), *[(16, 16, 3)] * 3, (16, 8, 8), (1, 16, 7)]


class _Group:
    """Holds the weights of many layers, and computes both directions of them."""

    label = f"{len(GROUP)} weights"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.v = [torch.randn(shape, generator=generator) for shape in GROUP]
        self.g = [t.flatten(1).norm(dim=1).view(kept_shape(t.shape, 0)) for t in self.v]
        self.members = tuple(Member(0, 0.0, torch.bfloat16) for _ in GROUP)
        self.w, self.n = self.forward("grouped")
        self.dw = [torch.randn_like(t) for t in self.w]

    def forward(self, variant: str) -> Any:
        from wn_kernels.backends.triton import group, weight_norm

        if variant == "grouped":
            return group.weight_norms(self.v, self.g, self.members)
        every = zip(self.v, self.g, strict=True)
        return [weight_norm(v, g, 0, 0.0, torch.bfloat16) for v, g in every]

    def backward(self, variant: str) -> Any:
        from wn_kernels.backends.triton import group, weight_norm_backward

        lists = self.dw, self.v, self.g, self.n
        if variant == "grouped":
            return group.weight_norms_backward(*lists, self.members)
        return [weight_norm_backward(*tensors, 0, 0.0) for tensors in zip(*lists, strict=True)]

    def minimum(self, direction: str) -> int:
        lists = [self.v, self.g, self.n, *([self.w] if direction == "forward" else [])]
        if direction == "backward":
            lists += [self.dw, self.v, self.g]
        return sum(t.nbytes for each in lists for t in each)


# The name of a case, a direction, a variant, and what it moved.
Record = tuple[str, str, str, Traffic]


def _counted(of: _Layer | _Group, direction: str, names: tuple[str, ...]) -> Iterator[Record]:
    """Yields the records of our own variants of a direction."""
    for name in names:
        traffic = count(functools.partial(getattr(of, direction), name))
        traffic.minimum = of.minimum(direction)
        yield of.label, direction, name, traffic


def group_records() -> Iterator[Record]:
    """Yields the records of a group's weights, computed in one launch and each by itself."""
    group = _Group()
    for direction in ("forward", "backward"):
        yield from _counted(group, direction, ("grouped", "each by itself"))


def records(cases: list[Case] | None = None) -> Iterator[Record]:
    """Yields the records of layers, with eager PyTorch as a variant."""
    for case in cases or CASES:
        layer = _Layer(case)
        for direction, eager in layer.eager().items():
            yield from _counted(layer, direction, _of(case, direction))
            eager.minimum = layer.minimum(direction)
            yield case.label, direction, "eager", eager


def _of(case: Case, direction: str) -> tuple[str, ...]:
    """Returns the variants of a direction, which has some that the other has not."""
    if case.conv is None:
        takes_product = direction == "backward" and "one_pass" in case.variants
        return (*["product"] * takes_product, *case.variants)
    other = "one_pass" if direction == "backward" else "weight_grad"
    return tuple(name for name in case.variants if name != other)


# --- command -------------------------------------------------------------------------------------


def table(found: list[Record]) -> Table:
    names = ["minimum", "launches", "distinct", "by launch", "requested", "written", "operations"]
    lines = [["layer", "direction", "variant", *names]]
    for label, direction, variant, t in found:
        moved = (t.distinct, t.by_launch, t.requested, t.written)
        ratios = (f"{each / t.minimum:.2f}" for each in moved)
        counts = f"{t.minimum / 1024:.0f} KiB", str(t.launches)
        lines.append([label, direction, variant, *counts, *ratios, f"{t.operations:.3g}"])
    styles = ["dim" if variant == "eager" else "" for _, _, variant, _ in found]
    title = "traffic (counted, not timed): bytes over the minimum"
    return printed(title, lines, styles, slice(3, None))


def figures(found: list[Record]) -> baseline.Figures:
    """What is held by the baseline: our own paths."""
    names = ("launches", "distinct", "by_launch", "requested", "operations")
    return {
        f"{label}, {direction}, {variant}": {name: asdict(t)[name] for name in names}
        for label, direction, variant, t in found
        if variant != "eager"
    }


def main(write: bool, kernels: bool) -> int:
    """Prints the table; 1 where a figure is worse than the baseline."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    found = [*records(), *group_records()]
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table(found))
    if kernels:
        for label, direction, variant, t in found:
            console.print(f"{label}, {direction}, {variant}: {', '.join(t.kernels)}")
    return 1 if baseline.settle(console, "traffic", figures(found), write) else 0
