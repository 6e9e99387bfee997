"""A prepared pass as data: the tensors that it allocates, its launches, and its results.

The native library executes one without Python in between (backends/native/passes.h); otherwise
`Pass.full` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...call import Geometry
from ..vendor import channel_sums, convolution_grads
from .launch import Launcher, new_tensor, usual

Layout = tuple[Sequence[int], Sequence[int], torch.dtype]  # shape, strides, dtype
Indices = tuple[int | None, ...]  # of tensors; `None` for no tensor


@dataclass(frozen=True)
class Product:
    """PyTorch's product of two matrices as a step: `(A B + bias,)`, of `Aᵀ` or `Bᵀ` where it turns
    them. Without a bias it is given none. Where it is given a matrix `into`, without a bias, it
    writes the product behind the first row of that, and returns what it wrote."""

    turns_a: bool = False
    turns_b: bool = False

    operation: ClassVar[str] = "product"

    def __call__(
        self, a: Tensor, b: Tensor, bias: Tensor | None, into: Tensor | None = None
    ) -> tuple[Tensor]:
        a = a.t() if self.turns_a else a
        b = b.t() if self.turns_b else b
        if into is not None:
            return (torch.mm(a, b, out=into[1:]),)
        return (torch.mm(a, b) if bias is None else torch.addmm(bias.to(a.dtype), a, b),)


@dataclass(frozen=True)
class Sums:
    """PyTorch's sums over all dimensions but the second, which holds columns or channels."""

    operation: ClassVar[str] = "sums"

    def __call__(self, a: Tensor) -> tuple[Tensor]:
        return (channel_sums(a),)


@dataclass(frozen=True)
class InputGrad:
    """PyTorch's `(dX,)` of a convolution of `x` with `w`, from `(dy, x, w)`."""

    conv: Geometry

    operation: ClassVar[str] = "input_grad"

    def __call__(self, dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor]:
        return (convolution_grads(dy, x, w, self.conv, True, False, False)[0],)


# What the native library takes as a step (backends/native/operations.h).
Operation = Product | Sums | InputGrad


class Pass:
    """The steps of a function of some tensors, written down once and executed by every call.

        run = Pass("v", "g")                                # its arguments
        run.new(w=layout)                                   # a tensor of that layout
        run.call(norms, "v", gives=("n",))                  # another pass, or any function
        run.call(launcher, "v", "g", "n", "w")              # a launch
        return run.returning("w", "n")

    A call allocates every tensor first, on the device of the first argument, then takes the steps
    in their order. It returns a tuple. An argument may be `None` where no step takes it.

    A step is a launch, an operation of PyTorch's, or any other function.

    Attributes:
        arguments: how many arguments there are. They are the tensors 0, 1, ...
        layouts: the layouts of the tensors that follow; `None` for the result of a function.
        steps: a function, the tensors that it takes, and those that it returns.
        results: the tensors that are returned.
        spare: those results that a caller can do without. A kernel writes them unless their address
            is zero, and no step reads them.
    """

    def __init__(self, *arguments: str) -> None:
        self.arguments = len(arguments)
        self._names: dict[str | None, int | None] = {name: i for i, name in enumerate(arguments)}
        self._names[None] = None
        self.layouts: list[Layout | None] = []
        self.steps: list[tuple[Callable[..., Any], Indices, Indices]] = []
        self.results: Indices = ()
        self.spare: frozenset[int | None] = frozenset()

    def new(self, **layouts: Tensor) -> None:
        """Adds tensors of these layouts, by name."""
        for name, t in layouts.items():
            self._names[name] = self._add((t.shape, t.stride(), t.dtype))

    def call(
        self, function: Callable[..., Any], *given: str | None, gives: tuple[str, ...] = ()
    ) -> None:
        """Adds a step. A function other than a launcher returns a tuple, whose elements get the
        names `gives`; the steps of another pass are taken over. `None` stands for no tensor."""
        tensors = tuple(self._names[name] for name in given)
        if isinstance(function, Pass):
            found = self._take_over(function, tensors)
        else:
            found = tuple(self._add(None) for _ in gives)
            self.steps.append((function, tensors, found))
        self._names.update(zip(gives, found, strict=True))

    def _add(self, layout: Layout | None) -> int:
        self.layouts.append(layout)
        return self.arguments + len(self.layouts) - 1

    def _take_over(self, other: Pass, given: Indices) -> Indices:
        assert len(given) == other.arguments
        here = (*given, *(self._add(layout) for layout in other.layouts))
        for function, *lists in other.steps:
            taken, found = (_chosen(here, indices) for indices in lists)
            self.steps.append((function, taken, found))
        return _chosen(here, other.results)

    def returning(self, *names: str | None, spare: tuple[str, ...] = ()) -> Pass:
        """The pass itself, whose results are the tensors of these names, `None` for no tensor."""
        self.results = tuple(self._names[name] for name in names)
        self.spare = frozenset(self._names[name] for name in spare)
        return self

    def __call__(self, *tensors: Any) -> tuple[Any, ...]:
        return self.full(*tensors)

    def execute(self, *tensors: Any) -> tuple[Any, ...]:
        """Executes the pass as it is written down, which is right in every case."""
        held, new = [*tensors], tensors[0].new_empty_strided
        for layout in self.layouts:
            held.append(None if layout is None else new(layout[0], layout[1], dtype=layout[2]))
        for function, given, found in self.steps:
            results = function(*_chosen(held, given))
            for i, t in zip(found, results or (), strict=True):
                held[i] = t  # type: ignore[index]
        return _chosen(held, self.results)

    @cached_property
    def full(self) -> Callable[..., tuple[Any, ...]]:
        """The pass as a function that takes less time in the usual case."""
        returned = "".join(f"{_name(i)}, " for i in self.results)
        return self._function(f"({returned})", "", frozenset())

    @cached_property
    def first(self) -> Callable[..., Any]:
        """The pass as such a function, which returns the first result alone. The spare results are
        not computed."""
        return self._function(_name(self.results[0]), "[0]", self.spare)

    def _function(
        self, returned: str, chosen: str, left_out: frozenset[int | None]
    ) -> Callable[..., Any]:
        """Returns a function that returns the expression `returned`, which is what `chosen` is of
        all results, and does without the tensors `left_out`. Its source has a line or two for each
        tensor and step: a loop over them takes as long as all that they do."""
        scope: dict[str, Any] = {"execute": self.execute}
        arguments = ", ".join(_name(i) for i in range(self.arguments))
        executed = f"return execute({arguments}){chosen}"
        lines = [f"def function({arguments}):"]
        launcher = next((f for f, _, _ in self.steps if isinstance(f, Launcher)), None)
        if launcher is not None:
            condition, names = usual(launcher.device)
            scope |= names | {"new": new_tensor(launcher.device)}
            lines.append(f"if {condition}:")
            lines += [f"    {line}" for line in self._body(scope, executed, left_out)]
            lines.append(f"    return {returned}")
        exec("\n    ".join([*lines, executed]), scope)
        return scope["function"]

    def _body(
        self, scope: dict[str, Any], executed: str, left_out: frozenset[int | None]
    ) -> Iterator[str]:
        """Yields the lines for the tensors and the steps. They take constants from `scope`."""
        allocated = set()
        for i, layout in enumerate(self.layouts, self.arguments):
            if layout is not None and i not in left_out:
                shape, strides, scope[f"dtype{i}"] = layout
                yield f"t{i} = new({(*shape,)}, {(*strides,)}, dtype{i})"
                allocated.add(i)
        for k, (step, given, found) in enumerate(self.steps):
            scope[f"step{k}"] = step
            if isinstance(step, Launcher):
                there = [i for i in dict.fromkeys(given) if i not in left_out]
                yield from (f"a{i} = t{i}.data_ptr()" for i in there)
                addresses = ", ".join("0" if i in left_out else f"a{i}" for i in given)
                # Memory that was allocated here is aligned.
                bits = " | ".join(f"a{i}" for i in there if i not in allocated)
                yield f"launches = step{k}.aligned"
                yield f"if launches is not None and not ({bits or 0}) & 15:"
                yield f"    launches({addresses})"
                # A kernel is compiled by a launch with all of its tensors.
                again = f"step{k}({', '.join(_name(i) for i in given)})"
                yield f"elif not step{k}.launches({addresses}):"
                yield f"    {executed if left_out else again}"
            else:
                results = "".join(f"t{i}, " for i in found)
                taken = ", ".join(_name(i) for i in given)
                yield f"{results}{'= ' * bool(found)}step{k}({taken})"

    def needs_no_python(self) -> bool:
        """Whether the native library can take every step: launches, and operations of PyTorch's."""
        return all(isinstance(function, Launcher | Operation) for function, _, _ in self.steps)


def _name(i: int | None) -> str:
    """The name of a tensor in the source of a function."""
    return "None" if i is None else f"t{i}"


def _chosen(values: Sequence[Any], indices: Indices) -> tuple[Any, ...]:
    """The values at these indices, `None` for no index."""
    return tuple([None if i is None else values[i] for i in indices])
