"""The command line: `python -m wn_kernels info`."""

import os
import subprocess
import sys

import pytest
import torch

import wn_kernels


def info(**environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WN_KERNELS", "TRITON"))}
    command = [sys.executable, "-m", "wn_kernels", "info"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=clean | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_info():
    text = info()
    assert f"wn_kernels  {wn_kernels.__version__}" in text
    assert f"torch       {torch.__version__}" in text
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        assert f"\n  {dtype:10}aten" in text
    if not torch.cuda.is_available():
        assert "no GPU: " in text
        assert "triton cannot be used: " in text


def test_info_of_a_forced_backend():
    text = info(WN_KERNELS_BACKEND="reference")
    assert "float32   reference" in text
    assert "forced by WN_KERNELS_BACKEND" in text
    pytest.importorskip("triton")
    assert "float32   triton" in info(WN_KERNELS_BACKEND="triton", TRITON_INTERPRET="1")
    if not torch.cuda.is_available():
        assert "float32   none: backend 'triton' was forced" in info(WN_KERNELS_BACKEND="triton")
