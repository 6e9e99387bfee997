"""What a CUDA graph cannot hold: no call reads a GPU's data, and none allocates past PyTorch."""

import ast
from pathlib import Path

import pytest
import torch

import wn_kernels
from tests.compatibility.layers import LAYERS, made

ROOT = Path(wn_kernels.__file__).parent

READS = {"item", "tolist", "cpu", "numpy", "synchronize", "is_nonzero"}

# It looks at norms on the CPU alone: its callers ask for that.
ALLOWED = {("backends/aten_weight.py", "is_in_range")}


def test_no_call_reads_a_gpus_data():
    """A read would wait for the GPU, and cannot be captured in a CUDA graph."""
    found = set()
    files = ["functional.py", "prepare.py", "autograd.py", "operators.py", "call.py"]
    folders = ("plan", "backends")
    nested = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for path in [*(ROOT / name for name in files), *nested]:
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                called = node.func if isinstance(node, ast.Call) else None
                if isinstance(called, ast.Attribute) and called.attr in READS:
                    found.add((str(path.relative_to(ROOT)), function.name))
    assert found == ALLOWED


@pytest.mark.parametrize("name", LAYERS)
def test_runs_on_tensors_without_values(name):
    """Forward and backward on the meta device, where a read raises."""
    layer, x = made(name)
    layer, x = layer.to("meta"), x.to("meta").requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.shape == x.shape
    with torch.no_grad():
        layer(x)


# It reads the memory of norms on the CPU by its address, and allocates none.
LOOKS = {("backends/aten_weight.py", "ctypes")}
ALLOCATES = {"cudaMalloc", "cuMemAlloc", "hipMalloc", "malloc", "ctypes", "cupy", "numba"}


def test_memory_is_pytorchs():
    """Kernels get tensors, and nothing else allocates."""
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name | ast.Attribute):
                name = node.id if isinstance(node, ast.Name) else node.attr
                if name in ALLOCATES:
                    found.add((str(path.relative_to(ROOT)), name))
    assert found == LOOKS
