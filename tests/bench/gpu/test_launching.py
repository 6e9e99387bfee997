"""The plugin: what nobody computed is not compared, and every other error fails a test."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

TESTS = """
import torch
from tests.comparison import assert_matches, assert_same_bits

def test_compares():
    assert_matches(torch.zeros(3), torch.ones(3), torch.float32, 1)
    assert_same_bits(torch.zeros(3), torch.ones(3))
    raise AssertionError("nor is this a value that was computed")

def test_does_not_compile():
    raise ValueError("no such tile")

def test_launches():
    from wn_kernels.backends.triton import slice_norms
    assert slice_norms(torch.ones(8, 16), 0, 0.0).shape == (8, 1)
"""


def test_only_comparisons_are_left_out(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "c")}
    command = ["-m", "pytest", "-q", "-p", "bench.gpu.launching", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "ValueError: no such tile" in done.stdout
    assert list(tmp_path.rglob("*.cubin"))
