"""This section times linear layers: three weights by eight batches in bfloat16; a few in float32,
in TF32 and under autocast; a few of other norms; and two beside PyTorch's under `torch.compile`."""

from __future__ import annotations

from dataclasses import replace

from bench.cases import Case
from bench.gpu import layers
from bench.gpu.context import Context
from bench.layer import MODES

ROWS = (1, 16, 64, 128, 256, 512, 1024, 8192)
WEIGHTS = ((4096, 4096), (1024, 1024), (4096, 16384))  # K, N


def _case(m: int, k: int, n: int, mode: str, dtype: str = "bfloat16") -> Case:
    return Case(f"{m}, {k}, {n}", "Linear", (k, n), (m, k), mode, dtype=dtype)


BF16 = [_case(m, k, n, mode) for k, n in WEIGHTS for m in ROWS for mode in MODES]
FLOAT32 = [
    replace(_case(m, 4096, 4096, mode, "float32"), precision=precision)
    for precision in ("own", "tf32", "autocast")
    for m in (16, 512)
    for mode in MODES
]
OTHER_NORMS = [
    replace(_case(m, 4096, 4096, mode), norm=norm)
    for norm in ("l1", "linf")
    for m in (16, 512)
    for mode in MODES
]
COMPILED = [_case(16, 4096, 4096, mode) for mode in MODES]


def main(context: Context) -> None:
    layers.each(context, BF16, FLOAT32, OTHER_NORMS, compiled=COMPILED)
