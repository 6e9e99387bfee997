"""Imports run downward, and importing the package does not import triton."""

import subprocess
import sys
from pathlib import Path

import pytest

import wn_kernels
from docs.drawings.imports import imports_of

ROOT = Path(wn_kernels.__file__).parent

# From the top down; a module may import from layers below its own.
LAYERS = [
    "__main__",
    "init",
    "monitoring",
    "training",
    "parallel",
    "convert",
    "tuning",
    "calibration",
    "modules",
    "functional",
    "composed",
    "launched",
    "grouped",
    "autograd",
    "operators",
    "prepare",
    "plan",
    "backends",
    "call",
    "text",
    "cache",
]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downward(path):
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    if own == "__init__":
        return
    for target in imports_of(path):
        if not target.startswith("wn_kernels."):
            continue
        layer = target.split(".")[1]
        assert LAYERS.index(layer) >= LAYERS.index(own), f"{path.name} imports {target}"
        if own == layer and own not in ("convert", "init", "modules", "plan", "backends"):
            raise AssertionError(f"{path.name} imports itself")


@pytest.mark.parametrize("name", ["reference.py", "aten.py", "aten_weight.py"])
def test_no_triton_beside_the_kernels(name):
    assert not [target for target in imports_of(ROOT / "backends" / name) if "triton" in target]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_does_not_import_triton():
    code = "import sys, wn_kernels, wn_kernels.operators; print('triton' in sys.modules)"
    before = "import sys, torch; print('triton' in sys.modules)"
    assert run(code) == run(before)


def test_everything_works_without_triton():
    """A process in which triton cannot be imported trains a layer on the ATen path."""
    code = """
import sys
sys.modules["triton"] = None  # an import raises ImportError
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch, wn_kernels
layer = wn_kernels.WNLinear(8, 4)
layer(torch.randn(3, 8)).sum().backward()
assert layer.weight_v.grad.abs().sum() > 0
try:
    with wn_kernels.use_backend("triton"):
        layer(torch.randn(3, 8))
except RuntimeError as error:
    print(error)
"""
    assert "the package triton is not installed" in run(code)
