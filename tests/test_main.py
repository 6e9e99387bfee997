"""The command line: `python -m wn_kernels`."""

import os
import subprocess
import sys

import pytest
import torch

import wn_kernels
from wn_kernels.__main__ import main


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
    for dtype in ("float16", "bfloat16"):
        assert f"\n  {dtype:10}aten" in text
    for dtype in ("float32", "float64"):
        assert f"\n  {dtype:10}native" in text or "the native library cannot be used" in text
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


def test_tune(own_table, tmp_path, monkeypatch, capsys):
    """Of a factory in the current directory."""
    (tmp_path / "own_model.py").write_text(
        "import torch, wn_kernels\n"
        "def make():\n    return wn_kernels.WNLinear(4, 3), torch.ones(2, 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "own_model:make", "--seconds", "0.01"]) == 0
    assert "linear 2×4·3×4" in capsys.readouterr().out
    assert "linear 2×4·3×4" in own_table.read_text()
    (tmp_path / "own_model.py").write_text("def broken():\n    raise ValueError('its own')\n")
    monkeypatch.delitem(sys.modules, "own_model")
    with pytest.raises(ValueError, match="its own"):
        main(["tune", "own_model:broken"])
    for wrong in ("own_model:nothing", "no_such_module:make", "", "own_model"):
        with pytest.raises(SystemExit, match="names no function of a module"):
            main(["tune", wrong])
