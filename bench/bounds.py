"""What bounds each kernel's main loop, by its compiled code and by data sheets: nothing is timed.

Cycles of a multiprocessor for one iteration of one program's loop:

    issue     instructions of all warps / schedulers
    tensor    2 · BLOCK_M · BLOCK_O · BLOCK_R / operations a cycle
    shared    bytes into and out of shared memory / bytes a cycle
    l2        bytes from and to global memory / bytes a cycle of the L2 cache
    memory    those of them that no other program reads / bytes a cycle from memory: all that a
              kernel without a product moves, V's tile of a product that holds the batch in one
              tile, nothing of other products, which find their tiles in the cache

and the largest is the bound. Each product stands beside a plain matmul of the same tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.codegen import TARGETS, Record, Target, inspect
from bench.shipped import Compilation, shipped


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
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.m}×{self.o}×{self.r}, {self.warps}, {self.stages}"


def _tile(compilation: Compilation) -> Tile:
    """The gradient of a weight sums over the batch: its rows are the outputs of the layer."""
    launch = compilation.launch
    m, o, r = (launch.arguments[f"BLOCK_{name}"] for name in "MOR")
    sides = (o, r, m) if "grad" in compilation.kernel else (m, o, r)
    return Tile(*sides, launch.num_warps, launch.num_stages)


def bound(compilation: Compilation, record: Record, target: Target) -> Bound:
    """From a compiled loop, in bfloat16."""
    rates = MULTIPROCESSORS[target.name]
    operations, moved = 0.0, float(record.global_traffic)
    own = moved
    if compilation.product:
        tile = _tile(compilation)
        operations = 2.0 * tile.m * tile.o * tile.r
        moved = 2.0 * (tile.m + tile.o) * tile.r
        one_pass = compilation.launch.arguments.get("FORM") == "one_pass"
        if compilation.kernel == "grad_one_pass_kernel":
            own = 2.0 * tile.m * tile.o  # of V's own tile, which is dW's
        elif one_pass or (compilation.kernel == "matmul_kernel" and tile.m <= 64):
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


# --- the matmul's forms ----------------------------------------------------------------------

# Small batches first, then larger ones.
TILES = [
    Tile(16, 32, 128, 4, 4),
    Tile(64, 64, 128, 4, 4),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 256, 64, 8, 3),
    Tile(256, 128, 64, 8, 3),
]
FORMS = ("plain", "epilogue", "one_pass", "prologue_r")


def ships(tile: Tile, form: str, target: Target) -> bool:
    """Whether a form takes that tile there; the bare matmul takes every tile."""
    from wn_kernels.backends.triton import configs

    small, wide, large = tile.m <= 64, tile.o == 256, max(tile.m, tile.o) == 256
    if large and target.name not in configs.COPYING:
        return False
    return {
        "plain": True,
        "epilogue": not large or wide,
        "one_pass": small,
        "prologue_r": not wide,
    }[form]


@cache
def matmul(tile: Tile, form: str, architecture: str) -> Compilation:
    """The matmul of that tile in a form, that of the prologue for `dX`, as it is launched there."""
    from wn_kernels.backends import triton as backend
    from wn_kernels.backends.triton import configs
    from wn_kernels.backends.triton.launch import recording

    x, v = (torch.empty(size, 4096, dtype=torch.bfloat16, device="meta") for size in (512, 4096))
    g, config = v.new_empty(4096, 1), configs.MatmulConfig(*tile)
    needs = (True, False, False, False)
    with configs.architecture(architecture), recording() as launches:
        backend.linear(x, v, g, None, 0, 0.0, "one_pass", config=config)
        backend.linear_backward(
            *(x, x, v, g, g.float(), 0, 0.0, "scaled", needs), matmul_config=config
        )
    launch = launches[form == "prologue_r"]
    # A form that the kernel does not know is the bare matmul.
    launch = launch._replace(arguments=launch.arguments | {"FORM": form})
    return Compilation("matmul_kernel", form, "bf16", launch, True)


def forms(
    tiles: list[Tile] = TILES, names: tuple[str, ...] = FORMS, targets: list[Target] = TARGETS
) -> Iterator[tuple[Target, Tile, str, Record, Bound]]:
    """Each form at each tile on each target; beside one that loads by descriptors, the same by
    pointers."""
    for target, tile, form in itertools.product(targets, tiles, names):
        if not ships(tile, form, target):
            continue
        compilations = [matmul(tile, form, target.name)]
        if compilations[0].launch.arguments["LOADS"] != "pointers":
            compilations.append(matmul(tile, form, "cuda:80"))  # which has nothing else
        for compilation in compilations:
            loads = compilation.launch.arguments["LOADS"]
            record = inspect(compilation, target)
            name = form if loads == "pointers" else f"{form}, {loads}"
            yield target, tile, name, record, bound(compilation, record, target)


# --- every kernel ----------------------------------------------------------------------------


def _listed(target: Target) -> list[Compilation]:
    """What ships in bfloat16, with 32-bit offsets."""
    return [c for c in shipped(target.name) if c.dtype == "bf16" and "WIDE" not in c.config]


def _bound_at(work: tuple[int, int]) -> tuple[str, str, Record, Bound, Bound | None]:
    target, compilation = TARGETS[work[0]], _listed(TARGETS[work[0]])[work[1]]
    record = inspect(compilation, target)
    plain = None
    if compilation.product:
        bare = matmul(_tile(compilation), "plain", target.name)
        plain = bound(bare, inspect(bare, target), target)
    found = bound(compilation, record, target)
    return compilation.kernel, compilation.config, record, found, plain


def kernels() -> Iterator[tuple[str, str, Record, Bound, Bound | None]]:
    """Each kernel and configuration on each target, and a plain matmul of a product's tile."""
    # By position: kernels cannot be pickled, and every process lists them in the same order.
    work = [(t, i) for t, target in enumerate(TARGETS) for i in range(len(_listed(target)))]
    with ProcessPoolExecutor() as pool:
        found = pool.map(_bound_at, work, chunksize=4)
        yield from track(found, "compiling", total=len(work), transient=True)


# --- command ---------------------------------------------------------------------------------


def _table(title: str, *names: str) -> Table:
    shown = Table(title=f"{title}, bf16 (read and calculated, not timed)")
    for name in names:
        shown.add_column(name, no_wrap=True)
    for name in Bound._fields:
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("bound", no_wrap=True)
    return shown


def _cells(found: Bound, record: Record) -> list[str]:
    cycles = [f"{c:.0f}" if c else "" for c in found]
    return [*cycles, found.name + (", spills" if record.spill_bytes else "")]


def main(every: bool) -> int:
    """Prints the table of the matmul's forms, or that of every kernel."""
    if every:
        shown = _table("cycles of an iteration", "target", "kernel", "configuration", "plain")
        for kernel, config, record, found, plain in kernels():
            name = kernel.removesuffix("_kernel")
            bare = f"{plain.issue:.0f} {max(plain):.0f}" if plain else ""
            shown.add_row(record.target, name, config, bare, *_cells(found, record))
        console = Console(width=160)
        console.print(shown)
        console.print("plain: a plain matmul of the same tile, its issue slots and its bound")
        return 0
    shown = _table("cycles of an iteration of matmul", "target", "tile, warps, stages", "form")
    before = None
    for target, tile, form, record, found in forms():
        if before not in (None, (target, tile)):
            shown.add_section()
        before = (target, tile)
        shown.add_row(target.name, str(tile), form, *_cells(found, record))
    Console(width=120).print(shown)
    return 0
