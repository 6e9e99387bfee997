"""The same cases under pytest-benchmark's options: `pytest bench --benchmark-only`."""

import pytest
import torch

from bench.cases import SUITES
from bench.measure import precision
from bench.providers import PROVIDERS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
precision.set_tf32(False)


CASES = [(suite, case) for suite, cases in SUITES.items() for case in cases]


NAMES = [name for name, provider in PROVIDERS.items() if provider.competes(DEVICE, full=False)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("suite", "case"), CASES, ids=[f"{s}-{c.mode}-{c.label}" for s, c in CASES]
)
def test_layer(benchmark, suite, case, name):
    runner = case.competitors(DEVICE, full=False)[name]()
    benchmark.group = f"{suite} {case.label} {case.mode}"

    def run():
        runner()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with runner.session():
        runner.check()
        benchmark.extra_info["saved_bytes"] = runner.saved_bytes() if case.mode == "train" else 0
        benchmark(run)
