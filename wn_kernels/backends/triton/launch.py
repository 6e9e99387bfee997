"""What every launcher shares: preparing a launch, the launch itself, index widths and layouts.

A launcher has two parts. Its `prepare_...` function works out all that the layouts of its tensors
and its options determine: configurations, grids, the kernels' constant arguments, and the layouts
of its results. It returns a function of the tensors that allocates the results, fills in their
addresses and launches: a `Pass` (passes.py) where that is all. The public functions keep what was
prepared (`remembered`).
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from ...call import Norm, reduced_dims
from .. import native
from . import compiled, configs
from .configs import Target

# --- launching -----------------------------------------------------------------------------------


class Launch(NamedTuple):
    """One kernel launch: what `recording` hands out in its place."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None

# As `torch.cuda.current_device`, without a look at whether CUDA is initialised: there is a tensor.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

# Triton compiles a kernel once for each thread that needs it at the same time.
_compiling = threading.RLock()


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches made inside the block instead of making them.

    The launchers run as they are, on tensors that need no memory behind them, so what is recorded
    is what a GPU would be given: `bench/static/codegen.py` compiles it.
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


# Where one of these differs from the usual, launches have to go through `Launcher` one by one: they
# are recorded, or something observes them.
SIGNS = [(sys.modules[__name__], "_recorded", None), *compiled.SIGNS]


class Launcher:
    """A kernel with everything but its tensors: the grid and the constant arguments, by name.

    It is called with the kernel's first arguments, in their order: tensors. They have to be on the
    `target`'s device and to have the dtypes of every other call. The first launch goes through
    `kernel[grid](...)`, which compiles it. The following ones call the compiled kernel, of which
    there is one for every set of addresses that are multiples of 16 bytes: that is all that Triton
    specialises for and that may differ between calls.
    """

    __slots__ = (
        *("kernel", "device", "grid", "is_empty", "options"),
        *("constants", "tensors", "values", "compiled", "aligned"),
    )

    def __init__(
        self,
        kernel: Any,
        target: Target,
        grid: tuple[int, ...],
        *,
        num_warps: int,
        num_stages: int,
        **constants: Any,
    ) -> None:
        self.kernel = kernel
        self.device = target.device
        self.grid = grid
        self.is_empty = not math.prod(grid)
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        self.constants = constants
        count = len(kernel.arg_names) - len(constants)
        self.tensors = kernel.arg_names[:count]
        self.values = tuple(constants[name] for name in kernel.arg_names[count:])
        # By `_unaligned`, and what launches the kernel where all addresses are aligned.
        self.compiled: dict[int, compiled.Compiled] = {}
        self.aligned: Callable[..., None] | None = None

    def __call__(self, *tensors: Any) -> None:
        if _recorded is not None:
            arguments = dict(zip(self.tensors, tensors, strict=True)) | self.constants
            _recorded.append(Launch(self.kernel, self.grid, arguments, **self.options))
        elif self.is_empty:
            pass
        else:
            with self._on_device():
                if compiled.is_watched():
                    self._launch_by_triton(tensors)
                elif not self.launches(*[t.data_ptr() for t in tensors]):
                    with _compiling:  # once, whichever thread comes first
                        self._compile(tensors)

    def launches(self, *addresses: int) -> bool:
        """Launches what is compiled for tensors at such addresses, and returns whether there is
        any. The kernel's device has to be the current one, and nobody sees the launch. The address
        0 stands for a tensor that the kernel does not write."""
        found = self.compiled.get(_unaligned(addresses))
        if found is None:
            return False
        found.launch(*addresses)
        return True

    def _on_device(self) -> AbstractContextManager[Any]:
        return nullcontext() if _is_current(self.device) else torch.cuda.device(self.device)

    def _launch_by_triton(self, tensors: tuple[Any, ...]) -> Any:
        return self.kernel[self.grid](*tensors, **self.constants, **self.options)

    def _compile(self, tensors: tuple[Any, ...]) -> None:
        """Launches by Triton, and keeps what it compiled."""
        result = self._launch_by_triton(tensors)
        unaligned = _unaligned([t.data_ptr() for t in tensors])
        if unaligned not in self.compiled and not compiled.is_watched():
            launch = compiled.launcher(result, self.grid, self.device, self.values)
            if launch is not None:
                self.compiled[unaligned] = launch
                self.aligned = launch.launch if not unaligned else self.aligned


def _unaligned(addresses: Sequence[int]) -> int:
    """The addresses that are no multiples of 16 bytes: bit i stands for address i."""
    return sum(1 << i for i, address in enumerate(addresses) if address & 15)


def _is_current(device: int) -> bool:
    return device < 0 or device == _current_device()


def usual(device: int) -> tuple[str, dict[str, Any]]:
    """Returns the source of an expression, and the objects that its names stand for. The expression
    is true if launches on a device are neither recorded nor observed, the device is the current
    one, and fresh memory need not be filled."""
    source = "launch._recorded is None and not is_watched() and not is_deterministic()"
    scope = {
        "launch": sys.modules[__name__],
        "is_watched": compiled.is_watched,
        "is_deterministic": torch._C._get_deterministic_algorithms,
        "current_device": _current_device,
    }
    return source if device < 0 else f"{source} and current_device() == {device}", scope


def new_tensor(device: int) -> Callable[..., Tensor]:
    """Returns a function of a shape, strides and a dtype that allocates a tensor on a device, which
    has to be the current one. It is what code compiled by `torch.compile` calls, and takes half as
    long as `torch.empty_strided`, but does not fill memory where that is asked for."""
    name = "_empty_strided_cpu" if device < 0 else "_empty_strided_cuda"
    if found := getattr(torch._C._dynamo.guards, name, None):
        return found
    where = torch.device("cpu") if device < 0 else torch.device("cuda", device)
    return lambda *layout: torch.empty_strided(*layout[:2], dtype=layout[2], device=where)


# --- preparing -----------------------------------------------------------------------------------


# Layouts and options for which a launcher keeps what it has prepared.
REMEMBERED = 4096

_memos: list[dict[Any, Any]] = []


def remembered(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Memoises `prepare(target, *tensors, *options)`, called as `find(target, tensors, *options)`.

    `prepare` is given the tensors' layouts, as tensors without memory: shape, strides and dtype are
    all that it can depend on. Options are hashable. The target is that of the tensors
    (`target_of`), which have to be on one device.
    """
    memo: dict[Any, Any] = {}
    _memos.append(memo)

    def find(target: Target, tensors: tuple[Tensor | None, ...], *options: Any) -> Any:
        layouts = [None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors]
        key = (target, options, *layouts)
        found = memo.get(key)
        if found is None:
            if len(memo) >= REMEMBERED:
                memo.clear()
            given = (None if layout is None else laid_out(*layout) for layout in layouts)
            found = memo[key] = prepare(target, *given, *options)
        return found

    return find


def target_of(t: Tensor) -> Target:
    """The target of launches on a tensor."""
    return configs.target(t.get_device())


def forget() -> None:
    """Prepares everything anew: for a change to what `prepare` functions do not take."""
    for memo in _memos:
        memo.clear()
    native.forget()


def laid_out(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def unallocated(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def allocator(layout: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that allocates a tensor of that layout on the device of its argument."""
    shape, stride, dtype = layout.shape, layout.stride(), layout.dtype

    def allocate(beside: Tensor) -> Tensor:
        return beside.new_empty_strided(shape, stride, dtype=dtype)

    return allocate


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether an element of these tensors lies beyond what a 32-bit offset reaches.

    It is the strides that count: a small view of a large storage can reach as far.
    """
    for t in tensors:
        if t is not None and t.numel():
            reach = sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True))
            if reach >= 2**31:
                return True
    return False


def unit(*sizes: int) -> int:
    """The largest power of two, 16 at most, of which all of these are multiples."""
    return math.gcd(16, *sizes)


class Slices(NamedTuple):
    """Tensors of one shape seen as `n` slices over at most three nested reduced loops.

    `loops` are their sizes, outermost first, and `strides[i]` the strides of tensor `i` along the
    slices and along each loop.
    """

    n: int
    loops: tuple[int, int, int]
    strides: list[tuple[int, int, int, int]]


def as_slices(tensors: Sequence[Tensor], dim: int | None) -> Slices | None:
    """The common `Slices` of the tensors, or `None` where their layouts differ too much for one.

    A norm does not care in which order its elements come, so the reduced dimensions are sorted by
    stride and merged wherever every tensor allows it.
    """
    first = tensors[0]
    dims = [d for d in reduced_dims(first.ndim, dim) if first.shape[d] != 1]
    dims.sort(key=lambda d: (first.stride(d), -d), reverse=True)
    groups: list[tuple[int, tuple[int, ...]]] = []  # (size, stride in each tensor)
    for d in dims:
        size, strides = first.shape[d], tuple(t.stride(d) for t in tensors)
        if groups and all(
            outer == size * inner for outer, inner in zip(groups[-1][1], strides, strict=True)
        ):
            size *= groups.pop()[0]
        groups.append((size, strides))
    if len(groups) > 3:
        return None
    none = (0,) * len(tensors)
    (outer, a), (middle, b), (inner, c) = [(1, none)] * (3 - len(groups)) + groups
    if min(a) < min(b) and outer > 1:  # a tensor's narrowest strides belong in one tile
        (outer, a), (middle, b) = (middle, b), (outer, a)
    n = 1 if dim is None else first.shape[dim]
    along = none if dim is None else tuple(t.stride(dim) for t in tensors)
    return Slices(n, (outer, middle, inner), list(zip(along, a, b, c, strict=True)))


# Programs a launch should have for every multiprocessor before slices are left unsplit.
PROGRAMS_PER_SM = 2


def _abreast(t: Tensor, strides: tuple[int, ...], loops: tuple[int, ...]) -> int:
    """How many slices lie side by side in a run of 128 bytes: one where a slice has as long a run
    of its own, or where its neighbour is elsewhere."""
    run = 1
    for stride, size in sorted(zip(strides[1:], loops, strict=True)):
        if size > 1:
            if stride != run:
                break
            run *= size
    return max(1, 128 // (run * t.element_size())) if strides[0] == run else 1


class Walk:
    """How programs share the slices: the grid, and what the kernels of slices take of it. A split
    of a slice leaves so many partial `sums`.

    Attributes:
        form: how the sum of a slice comes about (`weight.py`): `"held"`, `"walked"` or `"partial"`.
        splits: the programs that share a slice.
    """

    def __init__(
        self,
        slices: Slices,
        tensors: list[Tensor],
        target: Target,
        config: configs.SliceConfig | None,
        splits: int | None,
        sums: int = 1,
    ) -> None:
        self.slices = slices
        n, loops = slices.n, slices.loops
        abreast = max(
            _abreast(t, strides, loops) for t, strides in zip(tensors, slices.strides, strict=True)
        )
        itemsize = max(t.element_size() for t in tensors)
        self.is_wide_float = itemsize == 8
        programs = PROGRAMS_PER_SM * target.multiprocessors
        self.config = config or configs.slices(n, loops, abreast, itemsize, programs, target)
        blocks_n = cdiv(n, self.config.BLOCK_N)
        outer, middle, inner = loops
        tiles = outer * cdiv(middle, self.config.BLOCK_P) * cdiv(inner, self.config.BLOCK_R)
        if splits is None:
            splits = configs.splits(self.config, blocks_n, tiles, programs, target, sums)
        steps = cdiv(tiles, splits)
        self.splits = max(1, cdiv(tiles, max(1, steps)))
        self.form = "partial" if self.splits > 1 else "held" if steps == 1 else "walked"
        self.grid = (blocks_n, self.splits)
        block_r = max(self.config.BLOCK_P, self.config.BLOCK_R)
        self.arguments = {
            "N": n,
            "loops": loops,
            "steps": steps,
            "NESTED": sum(size > 1 for size in loops[:2]),
            "WIDE": is_wide(*tensors) or math.prod(loops) + block_r >= 2**31,
            "ACC": acc_type(tensors[-1]),
            **self.config._asdict(),
        }

    def finishing(self) -> dict[str, Any]:
        """The arguments of a kernel that turns the sums into results. A split walk leaves a partial
        sum for every split."""
        most = 256 if self.is_wide_float else 2048  # that the registers hold beside a tile
        block_s = min(next_power_of_2(self.splits), max(1, most // self.config.BLOCK_N))
        return {
            **self.arguments,
            "FORM": self.form,
            "SPLITS": self.splits,
            "BLOCK_S": block_s,
            "block_n": None,  # a program finds its block by its ids
        }

    def strides(self, **names: int) -> dict[str, Any]:
        """Stride arguments: `strides(v=0)` is `stride_v`, those of tensor 0."""
        return {f"stride_{name}": self.slices.strides[i] for name, i in names.items()}


def acc_type(v: Tensor) -> tl.dtype:
    """The accumulator that goes with `scale_dtype`."""
    return tl.float64 if v.dtype == torch.float64 else tl.float32


def sizes(x: Tensor, v: Tensor, dv: Tensor | None = None) -> dict[str, int]:
    """The sizes and the strides of a linear layer's `x`, `V` and `dV`, as its kernels name them.
    `UNIT` is that of their rows (`common.multiple`)."""
    found = {"M": len(x), "O": len(v), "R": v.shape[1]}
    found |= {"stride_xm": x.stride(0), "stride_xr": x.stride(1)}
    found |= {"stride_vo": v.stride(0), "stride_vr": v.stride(1)}
    if dv is not None:
        found |= {"stride_do": dv.stride(0), "stride_dr": dv.stride(1)}
    rows = (t.stride(0) for t in (x, v, dv) if t is not None)
    return found | {"UNIT": unit(v.shape[1], *rows)}


def kept_product(x: Tensor, v: Tensor, norm: Norm) -> Tensor:
    """The layout of what a linear layer keeps for its backward: `x Vᵀ`, behind a row that has the
    ties of each slice for linf."""
    return unallocated((len(x) + (norm == "linf"), len(v)), x.dtype)


def product_types(x: Tensor, tf32: bool) -> dict[str, Any]:
    """The accumulator and the precision of a product of `x`'s dtype."""
    return {"ACC": acc_type(x), "PRECISION": "tf32" if tf32 else "ieee"}
