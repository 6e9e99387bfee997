"""Concurrent threads, forked workers, determinism, and no read of a GPU's data."""

import ast
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import wn_kernels
from tests.comparison import assert_same_bits
from tests.compatibility.layers import LAYERS, assert_right, gradients, made

ROOT = Path(wn_kernels.__file__).parent


@pytest.mark.parametrize("name", LAYERS)
def test_threads(name):
    """Forwards and backwards of one layer from several threads at once."""
    layer, x = made(name)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: gradients(layer, x), range(16)))
    for y, grads in results:  # a thread may split sums as another does not
        assert_right(y, grads, layer, x)


class Embedded(Dataset):
    """A dataset that runs a layer in its worker."""

    def __init__(self, layer, x):
        self.layer, self.x = layer, x

    def __len__(self):
        return 4

    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer(self.x) + index


def test_forked_workers():
    layer, x = made("conv1d")
    right = layer(x).detach()
    loader = DataLoader(Embedded(layer, x), num_workers=2, multiprocessing_context="fork")
    for index, y in enumerate(loader):
        assert_same_bits(y[0], right + index)


@pytest.mark.parametrize("name", LAYERS)
def test_deterministic(name):
    layer, x = made(name)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(layer, x), gradients(layer, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(first[0], second[0])
    for key, grad in first[1].items():
        assert_same_bits(grad, second[1][key], key)


READS = {"item", "tolist", "cpu", "numpy", "synchronize", "is_nonzero"}

# It looks at norms on the CPU alone: its callers ask for that.
ALLOWED = {("backends/aten.py", "_is_in_range")}


def test_no_call_reads_a_gpus_data():
    """A read would wait for the GPU, and cannot be captured in a CUDA graph."""
    found = set()
    files = ["functional.py", "checks.py", "autograd.py", "ops.py", "plan.py"]
    for path in [*(ROOT / name for name in files), *(ROOT / "backends").rglob("*.py")]:
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                called = node.func if isinstance(node, ast.Call) else None
                if isinstance(called, ast.Attribute) and called.attr in READS:
                    found.add((str(path.relative_to(ROOT)), function.name))
    assert found == ALLOWED
