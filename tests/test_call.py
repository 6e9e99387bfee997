"""Which products PyTorch is set to take in TF32."""

import json
import subprocess
import sys

import pytest
import torch

from wn_kernels.call import Geometry

NEW = hasattr(torch.backends, "fp32_precision")

# What is set, and whether products of matrices and convolutions then take TF32 on a GPU.
SETTINGS = {
    "pass": (False, True),  # PyTorch's defaults
    "torch.set_float32_matmul_precision('high')": (True, True),
    "torch.set_float32_matmul_precision('medium')": (True, True),
    "torch.backends.cuda.matmul.allow_tf32 = True": (True, True),
    "torch.backends.cudnn.allow_tf32 = False": (False, False),
    "torch.backends.cudnn.allow_tf32 = False; matmul.allow_tf32 = True": (True, False),
}
NEW_SETTINGS = {
    "torch.backends.fp32_precision = 'tf32'": (True, True),
    "torch.backends.fp32_precision = 'ieee'": (False, False),
    "matmul.fp32_precision = 'tf32'": (True, True),
    "matmul.fp32_precision = 'tf32'; conv.fp32_precision = 'ieee'": (True, False),
    "torch.backends.cudnn.fp32_precision = 'ieee'": (False, False),
    "torch.backends.fp32_precision = 'ieee'; conv.fp32_precision = 'tf32'": (False, True),
    "torch.backends.fp32_precision = 'tf32'; matmul.fp32_precision = 'ieee'": (False, True),
    # An old setting beside a new one.
    "matmul.fp32_precision = 'tf32'; torch.backends.cudnn.allow_tf32 = False": (True, False),
    "matmul.allow_tf32 = True; conv.fp32_precision = 'ieee'": (True, False),
    "matmul.fp32_precision = 'tf32'; torch.set_float32_matmul_precision('highest')": (False, True),
}

# A setting cannot be taken back in every mix: each is made in a process of its own.
CODE = """
import json, os, sys, warnings
import torch

from wn_kernels.call import Geometry
from wn_kernels.call import takes_tf32

warnings.simplefilter("error")
matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv if NEW else None
for setting in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if os.fork() == 0:
        exec(setting)
        found = [takes_tf32(torch.float32, op) for op in ("matmul", "conv")]
        others = [takes_tf32(t, "conv") for t in (torch.float64, torch.bfloat16)]
        print(json.dumps([setting, found, others]))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.mark.current
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.filterwarnings("ignore")
def test_tf32_by_old_and_new_settings():
    """Without an error or a warning, whatever is set, and in whichever way."""
    settings = SETTINGS | (NEW_SETTINGS if NEW else {})
    command = [sys.executable, "-c", f"NEW = {NEW}\n{CODE}", json.dumps(list(settings))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        setting, float32, others = json.loads(line)
        found[setting] = tuple(float32)
        assert others == [False, False]
    assert found == settings, done.stderr


def test_tf32_before_the_new_settings(monkeypatch):
    """Where torch has no reader of the new settings, the old ones are read."""
    from wn_kernels import call

    monkeypatch.setattr(call, "_fp32_precision", None)
    for cudnn in (True, False):
        with torch.backends.cudnn.flags(allow_tf32=cudnn):
            assert call.takes_tf32(torch.float32, "conv") == cudnn
    assert not call.takes_tf32(torch.float32)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert call.takes_tf32(torch.float32)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_geometry_is_packed_and_unpacked(rank, transposed):
    numbers = iter(range(1, 100))
    stride, padding, dilation, extra = (tuple(next(numbers) for _ in range(rank)) for _ in range(4))
    conv = Geometry(stride, padding, dilation, transposed, extra, 7)
    packed = conv.packed()
    assert all(type(n) is int for n in packed)
    assert Geometry.unpacked(packed) == conv
