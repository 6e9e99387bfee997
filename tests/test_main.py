"""The command line: `python -m wn_kernels`."""

import os
import re
import subprocess
import sys

import pytest
import torch

import wn_kernels
from wn_kernels.__main__ import EXAMPLES, _parser, main
from wn_kernels.backends import native, vendor
from wn_kernels.plan.table import processor


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
        assert f"\n  {dtype:10}native" in text or "the native library cannot be used" in text
    if not torch.cuda.is_available():
        assert "no GPU: " in text
        assert "triton cannot be used: " in text


def test_info_has_what_a_report_needs(tmp_path):
    """Of the machine, the native library, the table, and the environment."""
    table = tmp_path / "table.json"
    held = {"ONEDNN_MAX_CPU_ISA": "AVX2", "TRITON_INTERPRET": "1", "WN_KERNELS_TABLE": str(table)}
    text = info(**held, SECRET_TOKEN="not to be shown")
    assert f"cpu: {processor()}" in text
    assert f"  torch uses  {torch.backends.cpu.get_cpu_capability()}, " in text
    has = next(line for line in text.splitlines() if line.startswith("  it has "))
    flags = vendor.cpu_flags()
    for flag, name in (("avx2", "AVX2"), ("avx512f", "AVX-512"), ("amx_tile", "AMX")):
        assert (name in has.removeprefix("  it has ").strip().split(", ")) == (flag in flags)
    assert f"tuned table: none ({table} does not exist)" in text
    environment = text[text.index("environment:") :]
    for name, value in held.items():
        assert f"\n  {name}={value}" in environment
    assert "SECRET_TOKEN" not in text
    table.write_text("{}")
    assert f"tuned table: {table}\n" in info(**held)


def test_info_of_the_native_library(tmp_path):
    """Its compiler and its file, or why it is not there."""
    built = native.build()
    text = info()
    assert re.search(r"\nnative library: loaded, built by (gcc|clang) \d+\.\d+", text)
    assert f"\n  its file: {built}\n" in text
    text = info(XDG_CACHE_HOME=str(tmp_path))
    assert "\nthe native library cannot be used: it was not built" in text
    assert f"\n  its file: {tmp_path}" in text


def test_info_of_a_processor_with_amx(monkeypatch, capsys):
    flags = frozenset(("avx2", "avx512f", "amx_tile", "amx_bf16"))
    monkeypatch.setattr(vendor, "cpu_flags", lambda: flags)
    monkeypatch.setattr(vendor, "WRONG_IN_3D", frozenset((torch.bfloat16,)))
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "  it has      AVX2, AVX-512, AMX, AMX bfloat16\n" in text
    assert "convolutions in 3-d are computed in float32 for bfloat16\n" in text
    monkeypatch.setattr(vendor, "cpu_flags", frozenset)
    assert main(["info"]) == 0
    assert (
        "  it has      instruction sets that this system does not report" in capsys.readouterr().out
    )


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
    for wrong, message in {
        "own_model:nothing": "names no function of a module",
        "no_such_module:make": "names no function of a module",
        "": "expected module:function, got ''",
        "own_model": "expected module:function, got 'own_model'",
        "own_model:__name__": "is no function",
        "../own_model:broken": "expected module:function",
    }.items():
        for command in ("tune", "fuse"):
            with pytest.raises(SystemExit, match=f"^{command}: .*{message}"):
                main([command, wrong])
    for seconds in ("0", "-1", "nan", "x"):
        with pytest.raises(SystemExit, match="2"):
            main(["tune", "own_model:make", "--seconds", seconds])


def factories(folder, monkeypatch):
    """A module with a model whose layers PyTorch weight-normalised."""
    (folder / "factories.py").write_text(
        "import torch\n"
        "from torch.nn.utils.parametrizations import weight_norm\n"
        "def model():\n"
        "    linear = weight_norm(torch.nn.Linear(4, 3))\n"
        "    return torch.nn.Sequential(linear, torch.nn.Linear(3, 2))\n"
        "def pair():\n    return model(), torch.ones(2, 4)\n"
        "def number():\n    return 3\n"
        "network = model()\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "factories", raising=False)


def test_fuse_reports(tmp_path, monkeypatch, capsys):
    """It gives the table of a dry run, and the factory may return a sample as well."""
    factories(tmp_path, monkeypatch)
    for name in ("model", "pair"):
        assert main(["fuse", f"factories:{name}"]) == 0
        table = capsys.readouterr().out
        assert re.search(r"^0 +Linear +3×4 +0 +\S+: \S+/\S+$", table, flags=re.MULTILINE)
        assert "1 fused, 0 left alone" in table


def test_a_factory_of_something_else(tmp_path, monkeypatch):
    factories(tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match="fuse: factories:number must return a model or a tuple"):
        main(["fuse", "factories:number"])
    for name in ("number", "model"):
        with pytest.raises(SystemExit, match=f"tune: factories:{name} must return a tuple"):
            main(["tune", f"factories:{name}"])
    with pytest.raises(SystemExit, match="fuse: factories:network is no function"):
        main(["fuse", "factories:network"])


@pytest.mark.parametrize("line", ["import a_module_that_is_not_there", "math.no_such_name"])
def test_a_module_that_fails_by_itself(line, tmp_path, monkeypatch):
    """Its own error is shown, and does not read as if the factory were missing."""
    factories(tmp_path, monkeypatch)
    with (tmp_path / "factories.py").open("a") as file:
        file.write(f"import math\n{line}\n")
    with pytest.raises((ImportError, AttributeError), match=r"a_module_that|no_such_name"):
        main(["fuse", "factories:model"])


def test_tune_of_a_model_that_is_not_fused(own_table, tmp_path, monkeypatch, capsys):
    factories(tmp_path, monkeypatch)
    assert main(["tune", "factories:pair", "--seconds", "0.01"]) == 0
    assert "nothing is stored" in capsys.readouterr().out
    assert not own_table.exists()


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_shows_an_example(command, capsys):
    """The example parses, and names its own command."""
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    example = capsys.readouterr().out.split("example:\n  ")[1].splitlines()[0]
    assert example.startswith(f"python -m wn_kernels {command}")
    _parser().parse_args(example.split()[3:])
