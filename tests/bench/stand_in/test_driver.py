"""The GPU that is not there: a layer's kernels are compiled and launched over it."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench import stand_in

ROOT = Path(__file__).parents[3]

LAUNCH = """
from bench import stand_in
stand_in.activate()
import torch, triton, wn_kernels
layer = wn_kernels.WNLinear(64, 32, dtype=torch.bfloat16)
x = torch.ones(16, 64, dtype=torch.bfloat16)
with wn_kernels.use_backend("triton"), torch.no_grad():
    assert layer(x).shape == (16, 32)
from wn_kernels.backends.triton.one_pass import one_pass_kernel
(compiled,) = one_pass_kernel.device_caches[0][0].values()
print(compiled.metadata.target.arch, len(compiled.asm["cubin"]) > 0)
"""


def test_a_layer_is_launched(tmp_path):
    """Through Triton's own compiler, whose cubin is for the capability of the stand-in."""
    environment = {"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["90", "True"]
    assert list(tmp_path.rglob("*.cubin"))


def test_kernels_that_were_imported_before(monkeypatch):
    """They may be the interpreter's."""
    monkeypatch.setitem(sys.modules, stand_in.KERNELS, object())
    with pytest.raises(RuntimeError, match="has to be activated before"):
        stand_in.activate()
