"""This section times the suite's convolutions in bfloat16, with channels first and last."""

from __future__ import annotations

from dataclasses import replace

from bench.cases import CONV
from bench.gpu import layers
from bench.gpu.context import Context

CASES = [
    replace(case, dtype="bfloat16", channels_last=last) for last in (True, False) for case in CONV
]


def main(context: Context) -> None:
    layers.each(context, CASES)
