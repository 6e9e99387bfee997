"""Compiled code and what bounds it, without a GPU."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.current
def test_codegen_records(tmp_path):
    """One kernel for every target, in a process of its own: this one may be interpreting."""
    path = tmp_path / "codegen.json"
    command = [sys.executable, "-m", "bench", "codegen", "--json", str(path)]
    command += ["--only", "one_pass_kernel 64x32x128 .* bf16 "]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(path.read_text())
    assert {r["target"] for r in records} == {"cuda:80", "cuda:90", "cuda:100", "hip:gfx942"}
    for record in records:
        assert record["kernel"] == "one_pass_kernel"
        assert record["registers"] > 0
        assert record["spill_bytes"] == 0
        assert record["shared_bytes"] > 0
        assert record["loop_instructions"] > record["tensor_core_instructions"] > 0
        assert record["stack_bytes"] >= 0
        assert record["config"]


def in_a_process(code):
    """What `code` prints, from a process that compiles: this one may be interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def test_a_small_batch_is_bound_by_memory():
    """Every one-pass kernel of the l2 norm that ships for 16 rows, forward and backward, on every
    target: the norm in the loop hides behind the bytes of V. A Hopper's forward has a tile of 64.
    With 64-bit indices that is close, and holds for the code of the compiler that the baseline
    belongs to."""
    pytest.importorskip("triton")
    code = """
import json
from bench.static import baseline, bounds, codegen

KERNELS = ("one_pass_kernel", "grad_one_pass_kernel")
own = baseline.read("codegen")[1] == codegen.compiler()
found = []
for target in bounds.TARGETS:
    for c in bounds.shipped(target.name):
        if "NORM=" in c.config or (c.config.endswith(" WIDE") and not own):
            continue
        if c.kernel in KERNELS and c.config.startswith("16x") and c.dtype == "bf16":
            record = bounds.inspect(c, target)
            found.append((target.name, c.kernel, c.config, bounds.bound(c, record, target).name))
print(json.dumps(found))
"""
    found = in_a_process(code)
    assert {(target, kernel) for target, kernel, *_ in found} == {
        (target, kernel)
        for target in ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
        for kernel in ("one_pass_kernel", "grad_one_pass_kernel")
    } - {("cuda:90", "one_pass_kernel")}
    assert [case for case in found if case[-1] != "memory"] == []


def test_warps_share_the_steps_of_a_small_batch():
    """A tile of few rows: each warp reads its share of both factors alone, so that fewer bytes
    leave shared memory, by fewer instructions, than where all warps read all of x."""
    pytest.importorskip("triton")
    code = """
import json
import torch
from bench.static import codegen, shipped
from wn_kernels.backends import triton as backend
from wn_kernels.backends.triton import configs, launch

def records():
    launch.forget()
    x, v = (torch.empty(size, 4096, dtype=torch.bfloat16, device="meta") for size in (16, 4096))
    config = configs.SplitConfig(16, 32, 128, 4, 4)
    with launch.recording() as launches:
        backend.linear(x, v, v.new_empty(4096, 1), None, 0, 0.0, "one_pass", config=config)
    compilation = shipped.named(launches[0], "bf16", "")
    cuda = [target for target in codegen.TARGETS if target.backend == "cuda"]
    found = [codegen.inspect(compilation, target) for target in cuda]
    return [(record.issue_slots, record.shared_traffic) for record in found]

shared = records()
configs.split = lambda *_: 1
print(json.dumps([shared, records()]))
"""
    shared, all_of_x = in_a_process(code)
    for (slots, traffic), (slots_before, traffic_before) in zip(shared, all_of_x, strict=True):
        assert slots < slots_before
        # The tile of x once instead of by each of four warps: 16 · 128 · 2 bytes, three times.
        assert traffic == traffic_before - 3 * 16 * 128 * 2


def test_tensor_cores_read_a_hopper_s_factors():
    """Of a tile of 64 rows, by themselves, where a tile of fewer goes through registers."""
    pytest.importorskip("triton")
    code = """
import json
from bench.static import codegen, shipped

(target,) = (t for t in codegen.TARGETS if t.name == "cuda:90")
ships = [c for c in shipped.shipped(target.name) if c.kernel == "one_pass_kernel"]
half = [c for c in ships if c.dtype == "bf16"]
found = [[c.config, codegen.inspect(c, target).mix] for c in half if "WIDE" not in c.config]
tiles = [c.config for c in half]
print(json.dumps([tiles, found]))
"""
    tiles, found = in_a_process(code)
    assert {tile.split("x")[0] for tile in tiles} == {"64", "128", "256"}
    for config, mix in found:
        assert mix.get("tensor core"), config


def test_channels_that_are_no_multiples_of_16_are_loaded_widely():
    """As many at a time as divide all rows, and several steps ahead. Odd ones are loaded one by
    one."""
    pytest.importorskip("triton")
    code = """
import json
import torch
from bench.static import codegen, shipped
from wn_kernels.backends.triton import conv, launch
from wn_kernels.call import Geometry

(target,) = (t for t in codegen.TARGETS if t.name == "cuda:90")
geometry = Geometry((1,), (3,), (1,), False, (0,), 1)
found = []
for channels in (24, 100, 34, 33):
    x = torch.empty(4, 512, channels, dtype=torch.bfloat16, device="meta").movedim(-1, 1)
    v = torch.empty(channels, channels, 7, dtype=torch.bfloat16, device="meta")
    g = torch.empty(channels, 1, 1, dtype=torch.bfloat16, device="meta")
    with launch.recording() as launches:
        y, n, _ = conv.convolution(x, v, g, None, geometry, 0, 0.0, "packed")
        dy, needs = torch.empty_like(y), (True,) * 4
        conv.convolution_backward(dy, x, v, g, n, geometry, 0, 0.0, "packed", needs)
    for one in launches:
        if one.kernel.__name__ in ("conv_kernel", "conv_grad_kernel"):
            record = codegen.inspect(shipped.named(one, "bf16", ""), target)
            found.append((channels, one.kernel.__name__, record.load_bits))
print(json.dumps(found))
"""
    bits = {24: 128, 100: 64, 34: 32, 33: 16}
    found = in_a_process(code)
    assert len(found) == 12  # forward, `dX` and `dV`
    for channels, kernel, loads in found:
        assert loads == bits[channels], (channels, kernel)


def test_sums_in_registers_need_few_loads_from_shared_memory():
    """Products in float32 without TF32: nearly all of a step's instructions multiply."""
    pytest.importorskip("triton")
    code = """
import json
import torch
from bench.static import codegen, shipped
from wn_kernels.backends import triton as backend
from wn_kernels.backends.triton import launch

x, v = (torch.empty(size, 4096, device="meta") for size in (16, 4096))
with launch.recording() as launches:
    backend.linear(x, v, v.new_empty(4096, 1), None, 0, 0.0, "one_pass")
compilation = shipped.named(launches[0], "fp32", "")
cuda = [target for target in codegen.TARGETS if target.backend == "cuda"]
found = [codegen.inspect(compilation, target) for target in cuda]
print(json.dumps([(r.mix, r.spill_bytes) for r in found]))
"""
    for mix, spilled in in_a_process(code):
        # A tile of 16 by 32 by 32, of whose products a Blackwell computes two at a time.
        assert mix["fp32"] >= 16 * 32 * 32 / 128 / 2
        assert mix["fp32"] >= 8 * mix["shared memory"]
        assert not spilled
