"""Building and loading the native library, and going without."""

import os
import subprocess
import sys


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_without_the_library(tmp_path):
    code = """
import torch, wn_kernels
from wn_kernels import plan
layer = wn_kernels.WNLinear(6, 4)
layer(torch.randn(2, 6)).sum().backward()
assert layer.weight_v.grad.abs().sum() > 0
print(plan.serving(torch.empty(0)))
with wn_kernels.use_backend("native"):
    try:
        layer(torch.randn(2, 6))
    except RuntimeError as error:
        print(error)
"""
    done = run("-c", code, XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.startswith("aten\n"), done.stderr
    assert "it was not built (python -m wn_kernels build does)" in done.stdout


def test_a_broken_library_is_no_obstacle(tmp_path):
    code = "from wn_kernels.backends import native; print(native.location())"
    file = run("-c", code, XDG_CACHE_HOME=str(tmp_path)).stdout.strip()
    os.makedirs(os.path.dirname(file))
    with open(file, "w") as text:
        text.write("no library")
    done = run("-m", "wn_kernels", "info", XDG_CACHE_HOME=str(tmp_path))
    assert "the native library cannot be used: loading" in done.stdout, done.stderr
    assert "float32   aten" in done.stdout


def test_a_compiler_that_is_not_there_is_named(tmp_path):
    done = run("-m", "wn_kernels", "build", XDG_CACHE_HOME=str(tmp_path), CXX="no-such-compiler")
    assert done.returncode != 0
    assert "no-such-compiler" in done.stderr
    assert not list(tmp_path.rglob("*.so"))
