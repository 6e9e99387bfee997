"""What bounds the matmul's main loop, by its compiled code and by data sheets: nothing is timed.

Cycles of a multiprocessor for one iteration of one program's loop:

    issue     instructions · warps / schedulers
    tensor    2 · BLOCK_M · BLOCK_O · BLOCK_R / operations a cycle
    shared    bytes into and out of shared memory / bytes a cycle
    memory    bytes of V's tile / bytes a cycle from memory where one row tile holds the batch, and
              V is read once; else bytes of both tiles / bytes a cycle from the L2 cache

and the largest is the bound. Each form stands beside a plain matmul of the same tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bench.codegen import TARGETS, Record, Target, inspect
from bench.shipped import Compilation


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


class Tile(NamedTuple):
    """A configuration, and whether one row tile holds the whole batch."""

    blocks: tuple[int, int, int]
    warps: int
    stages: int
    small: bool


# Small batches first, large ones last.
TILES = [
    Tile((16, 32, 128), 4, 4, True),
    Tile((16, 128, 128), 4, 4, True),
    Tile((64, 64, 128), 4, 4, True),
    Tile((128, 128, 64), 8, 3, False),
]
FORMS = ("plain", "epilogue", "one_pass", "prologue_r")


@dataclass
class Bound:
    """Cycles of one iteration, and what was read of the code."""

    record: Record
    issue: float
    tensor: float
    shared: float
    memory: float

    @property
    def name(self) -> str:
        """What holds."""
        cycles = {key: getattr(self, key) for key in ("issue", "tensor", "shared", "memory")}
        return max(cycles, key=cycles.__getitem__)


def bound(record: Record, tile: Tile, target: Target, itemsize: int = 2) -> Bound:
    """From a compiled loop."""
    rates = MULTIPROCESSORS[target.name]
    m, o, r = tile.blocks
    a, v = m * r * itemsize, o * r * itemsize
    memory = v / rates.memory if tile.small else (a + v) / rates.l2
    return Bound(
        record,
        issue=record.loop_instructions * tile.warps / rates.schedulers,
        tensor=2 * m * o * r / rates.operations,
        shared=(a + v + record.shared_read_bytes) / rates.shared,
        memory=memory,
    )


def bounds(
    tiles: list[Tile] = TILES, forms: tuple[str, ...] = FORMS, targets: list[Target] = TARGETS
) -> Iterator[tuple[Target, Tile, str, Bound]]:
    """Of each form at each tile on each target, in bfloat16."""
    from wn_kernels.backends import triton as backend
    from wn_kernels.backends.triton import configs
    from wn_kernels.backends.triton.launch import recording

    x = torch.empty(512, 4096, dtype=torch.bfloat16, device="meta")
    v = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    g = torch.empty(4096, 1, dtype=torch.bfloat16, device="meta")
    for target, tile in itertools.product(targets, tiles):
        config = configs.MatmulConfig(*tile.blocks, tile.warps, tile.stages)
        with recording() as launches:
            backend.linear(x, v, g, None, 0, 0.0, "one_pass", config=config)
        for form in forms:  # a form that the kernel does not know is the bare matmul
            launch = launches[0]._replace(arguments=launches[0].arguments | {"FORM": form})
            record = inspect(Compilation("matmul_kernel", form, "bf16", launch, True), target)
            yield target, tile, form, bound(record, tile, target)


def main() -> int:
    """Prints the table."""
    shown = Table(title="cycles of an iteration of matmul, bf16 (read and calculated, not timed)")
    for name in ("target", "tile, warps, stages", "form"):
        shown.add_column(name, no_wrap=True)
    for name in ("instructions", "issue", "tensor", "shared", "memory"):
        shown.add_column(name, justify="right")
    shown.add_column("bound")
    before = None
    for target, tile, form, b in bounds():
        if before not in (None, (target, tile)):
            shown.add_section()
        before = (target, tile)
        blocks = "×".join(map(str, tile.blocks))
        cycles = (b.issue, b.tensor, b.shared, b.memory)
        shown.add_row(
            target.name,
            f"{blocks}, {tile.warps}, {tile.stages}",
            form,
            str(b.record.loop_instructions),
            *(f"{c:.0f}" for c in cycles),
            b.name + (", spills" if b.record.spill_bytes else ""),
        )
    Console(width=110).print(shown)
    return 0
