"""This section times random layers, each in one of the dtypes and layouts, to find what loses where
no case of the suites looks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from bench.cases import Case
from bench.gpu import layers
from bench.gpu.context import Context
from bench.layer import MODES
from bench.picks import random_cases

SEED = 2
# Layers whose numbers of channels are multiples of a grain, by the grain.
COUNTS = {16: 54, 1: 18}
# Times the channels and rows that random layers of a CPU have, and the operations of a layer.
TIMES = 4
MOST_OPERATIONS = 3e10

# The dtype and the precision. PyTorch's default for float32 is TF32 in convolutions alone.
DTYPES = (
    ("bfloat16", "own"),
    ("float16", "own"),
    ("float32", "own"),
    ("float32", "tf32"),
    ("float32", "autocast"),
)


def cases() -> Iterator[Case]:
    """Yields the layers, each in both modes."""
    draw = random.Random(SEED)
    drawn = (random_cases(n, SEED, TIMES, MOST_OPERATIONS, grain) for grain, n in COUNTS.items())
    for case in chain.from_iterable(drawn):
        dtype, precision = draw.choice(DTYPES)
        last = case.kind != "Linear" and draw.random() < 0.4
        for mode in MODES:
            yield replace(case, mode=mode, dtype=dtype, precision=precision, channels_last=last)


def main(context: Context) -> None:
    layers.each(context, list(cases()))
