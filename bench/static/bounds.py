"""What bounds each kernel's main loop, by its compiled code and by data sheets: nothing is timed.

Cycles of a multiprocessor for one iteration of one program's loop:

    issue     instructions of all warps / schedulers
    tensor    2 · BLOCK_M · BLOCK_O · BLOCK_R / operations a cycle
    shared    bytes into and out of shared memory / bytes a cycle
    l2        bytes from and to global memory / bytes a cycle of the L2 cache
    memory    those of them that no other program reads / bytes a cycle from memory: all that a
              kernel without a product moves, V's tile of a product that holds the batch in one
              tile, nothing of other products, which find their tiles in the cache

and the largest is the bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from bench.report.tables import printed
from bench.static.codegen import TARGETS, Record, Target, inspect
from bench.static.shipped import Compilation, shipped


class Multiprocessor(NamedTuple):
    """What a multiprocessor (compute unit) does in a cycle.

    `operations` is the data sheet's dense bfloat16 rate over multiprocessors and boost clock,
    `memory` its bandwidth over the same. `l2` is what microbenchmarks of the architecture find, an
    estimate. `shared` is a bank conflict free access of every bank.
    """

    schedulers: int
    operations: float
    shared: float  # bytes
    memory: float
    l2: float


# NVIDIA A100 (108 at 1.41 GHz: 312 TFLOP/s, 2.04 TB/s), H100 SXM (132 at 1.83 GHz: 989 TFLOP/s,
# 3.35 TB/s) and B200 (148 at 1.85 GHz: 2250 TFLOP/s, 8 TB/s) data sheets; AMD MI300X (304 at
# 2.1 GHz: 1307 TFLOP/s, 5.3 TB/s).
MULTIPROCESSORS = {
    "cuda:80": Multiprocessor(4, 2048, 128, 2.04e12 / (108 * 1.41e9), 40),
    "cuda:90": Multiprocessor(4, 4096, 128, 3.35e12 / (132 * 1.83e9), 40),
    "cuda:100": Multiprocessor(4, 8192, 128, 8.0e12 / (148 * 1.85e9), 64),
    "hip:gfx942": Multiprocessor(4, 2048, 128, 5.3e12 / (304 * 2.1e9), 64),
}


class Bound(NamedTuple):
    """Cycles of one iteration."""

    issue: float
    tensor: float
    shared: float
    l2: float
    memory: float

    @property
    def name(self) -> str:
        """What holds."""
        if not self.issue:
            return "no loop"
        return max(self._fields, key=lambda field: getattr(self, field))


class Tile(NamedTuple):
    """A product's tile, as that of a matmul: `m` rows by `o` outputs, in steps of `r`."""

    m: int
    o: int
    r: int


def _tile(compilation: Compilation) -> Tile:
    """The gradient of a weight sums over the batch: its rows are the outputs of the layer."""
    m, o, r = (compilation.launch.arguments[f"BLOCK_{name}"] for name in "MOR")
    of_weight = "grad" in compilation.kernel or "weight" in compilation.kernel
    return Tile(o, r, m) if of_weight else Tile(m, o, r)


def bound(compilation: Compilation, record: Record, target: Target) -> Bound:
    """From a compiled loop, in bfloat16."""
    rates = MULTIPROCESSORS[target.name]
    operations, moved = 0.0, float(record.global_traffic)
    own = moved
    if compilation.product:
        tile = _tile(compilation)
        operations = 2.0 * tile.m * tile.o * tile.r
        moved = 2.0 * (tile.m + tile.o) * tile.r
        if compilation.kernel == "grad_one_pass_kernel":
            own = 2.0 * tile.m * tile.o  # of V's own tile, which is dW's
        elif compilation.kernel == "grads_kernel":  # V's and dV's; both products take its factors
            own = 4.0 * tile.m * tile.o
            moved = own + 2.0 * tile.m * tile.r
            operations *= 2
        elif compilation.kernel == "one_pass_kernel":
            own = 2.0 * tile.o * tile.r
        else:
            own = 0.0
    return Bound(
        issue=record.issue_slots / rates.schedulers,
        tensor=operations / rates.operations,
        shared=record.shared_traffic / rates.shared,
        l2=moved / rates.l2,
        memory=own / rates.memory,
    )


# --- every kernel ----------------------------------------------------------------------------


def _listed(target: Target) -> list[Compilation]:
    """What ships in bfloat16, with 32-bit offsets."""
    return [c for c in shipped(target.name) if c.dtype == "bf16" and "WIDE" not in c.config]


def _bound_at(work: tuple[int, int]) -> tuple[str, str, Record, Bound]:
    target, compilation = TARGETS[work[0]], _listed(TARGETS[work[0]])[work[1]]
    record = inspect(compilation, target)
    return compilation.kernel, compilation.config, record, bound(compilation, record, target)


def kernels() -> Iterator[tuple[str, str, Record, Bound]]:
    """Each kernel and configuration on each target."""
    # By position: kernels cannot be pickled, and every process lists them in the same order.
    work = [(t, i) for t, target in enumerate(TARGETS) for i in range(len(_listed(target)))]
    with ProcessPoolExecutor() as pool:
        found = pool.map(_bound_at, work, chunksize=4)
        yield from track(found, "compiling", total=len(work), transient=True)


# --- command ---------------------------------------------------------------------------------


def main() -> int:
    """Prints the table of every kernel."""
    lines = [["target", "kernel", "configuration", *Bound._fields, "bound"]]
    for kernel, config, record, found in kernels():
        cycles = [f"{c:.0f}" if c else "" for c in found]
        last = found.name + (", spills" if record.spill_bytes else "")
        lines.append([record.target, kernel.removesuffix("_kernel"), config, *cycles, last])
    title = "cycles of an iteration, bf16 (read and calculated, not timed)"
    Console(width=160).print(printed(title, lines, numbers=slice(3, -1)))
    return 0
