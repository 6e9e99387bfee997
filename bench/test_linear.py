"""The same cases under pytest-benchmark's options: `pytest bench --benchmark-only`."""

import pytest
import torch

from bench.cases import LINEAR, PROVIDERS, Runner

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("case", LINEAR, ids=lambda case: f"{case.mode}-{case.label}")
def test_linear(benchmark, case, name):
    runner = Runner(case, name, DEVICE)
    runner.check()
    benchmark.group = f"linear {case.label} {case.mode}"
    benchmark.extra_info["saved_bytes"] = runner.saved_bytes() if case.mode == "train" else 0

    def run():
        runner()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
