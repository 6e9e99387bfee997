"""Compiled code and what bounds it, without a GPU."""

import json
import os
import subprocess
import sys

import pytest


def test_codegen_records(tmp_path):
    """One kernel for every target, in a process of its own: this one may be interpreting."""
    path = tmp_path / "codegen.json"
    command = [sys.executable, "-m", "bench", "codegen", "--json", str(path)]
    command += ["--only", "matmul_kernel 16x32x128 .*one_pass bf16 "]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(path.read_text())
    assert {r["target"] for r in records} == {"cuda:80", "cuda:90", "cuda:100", "hip:gfx942"}
    for record in records:
        assert record["kernel"] == "matmul_kernel"
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


def bounds_of(tiles, *names):
    """By target, `(form, bound, issue cycles, record)`. `tiles` is an expression, which may name
    the target AT and whether hardware COPIES the tiles of 4096 rows there."""
    code = f"""
import json
from dataclasses import asdict
from bench import bounds
from wn_kernels.backends.triton import configs

def shipped(function, *arguments):
    return [bounds.Tile(*function(*arguments))]

found = {{}}
for target in bounds.TARGETS:
    with configs.architecture(target.name):
        AT = configs.target(-1)
        COPIES = configs.may_copy(4096, 2, AT)
        tiles = {tiles}
    found[target.name] = [
        (form, bound.name, bound.issue, asdict(record))
        for _, _, form, record, bound in bounds.forms(tiles, {names}, [target])
    ]
print(json.dumps(found))
"""
    return in_a_process(code)


def test_a_small_batch_is_bound_by_memory():
    """Every one-pass form that ships for 16 rows, forward and backward, on every target: the norm
    in the loop hides behind the bytes of V. With 64-bit indices that is close, and holds for the
    code of the compiler that the baseline belongs to."""
    pytest.importorskip("triton")
    code = """
import json
from bench import baseline, bounds, codegen

own = baseline.read("codegen")[1] == codegen.compiler()
found = []
for target in bounds.TARGETS:
    for c in bounds.shipped(target.name):
        if c.config.endswith(" WIDE") and not own:
            continue
        linear = c.kernel in ("matmul_kernel", "grad_one_pass_kernel")
        one_pass = "FORM=one_pass" in c.config or c.kernel == "grad_one_pass_kernel"
        if linear and one_pass and c.config.startswith("16x") and c.dtype == "bf16":
            record = bounds.inspect(c, target)
            found.append((target.name, c.kernel, c.config, bounds.bound(c, record, target).name))
print(json.dumps(found))
"""
    found = in_a_process(code)
    assert {(target, kernel) for target, kernel, *_ in found} == {
        (target, kernel)
        for target in ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
        for kernel in ("matmul_kernel", "grad_one_pass_kernel")
    }
    assert [case for case in found if case[-1] != "memory"] == []


def test_warps_share_the_steps_of_a_small_batch():
    """A tile of few rows: each warp reads its share of both factors alone, so that fewer bytes
    leave shared memory, by fewer instructions, than where all warps read all of x."""
    pytest.importorskip("triton")
    code = """
import json
from bench import bounds
from wn_kernels.backends.triton import configs, launch

def records():
    bounds.matmul.cache_clear()
    tile = bounds.Tile(16, 32, 128, 4, 4)
    cuda = [t for t in bounds.TARGETS if t.backend == "cuda"]
    found = bounds.forms([tile], ("one_pass",), cuda)
    return [(record.issue_slots, record.shared_traffic) for *_, record, _ in found]

shared = records()
configs.split = lambda config, itemsize: 1
launch.forget()
print(json.dumps([shared, records()]))
"""
    shared, all_of_x = in_a_process(code)
    for (slots, traffic), (slots_before, traffic_before) in zip(shared, all_of_x, strict=True):
        assert slots < slots_before
        # The tile of x once instead of by each of four warps: 16 · 128 · 2 bytes, three times.
        assert traffic == traffic_before - 3 * 16 * 128 * 2


def test_ready_norms_cost_the_loop_nothing():
    """The scaled form's loop is a plain matmul's, to 5 %, at the tile of large batches."""
    pytest.importorskip("triton")
    tiles = "shipped(configs.matmul, 4096, 4096, 2, False, False, COPIES, AT)"
    for target, found in bounds_of(tiles, "plain", "epilogue").items():
        counts = {form: record["loop_instructions"] for form, _, _, record in found}
        copies = target in ("cuda:90", "cuda:100")
        assert ("epilogue, descriptors" in counts) == copies
        for how in (", descriptors", "") if copies else ("",):
            assert counts[f"epilogue{how}"] <= 1.05 * counts[f"plain{how}"], target


def test_hardware_copies_the_tiles_of_large_batches():
    """On Hopper and Blackwell: copies of tiles in the loop, beside tensor cores that read them from
    shared memory, for fewer instructions than by pointers."""
    pytest.importorskip("triton")
    tiles = "shipped(configs.matmul, 4096, 4096, 2, True, False, COPIES, AT)"
    found = bounds_of(tiles, "prologue_r")
    for target, loads in (("cuda:90", "descriptors"), ("cuda:100", "specialized")):
        forms = {form: (issue, record) for form, _, issue, record in found[target]}
        issue, record = forms[f"prologue_r, {loads}"]
        assert record["mix"]["tile copy"] == 2
        assert record["tensor_core_instructions"] > 0
        assert record["spill_bytes"] == 0
        assert issue < forms["prologue_r"][0]
    for target in ("cuda:80", "hip:gfx942"):
        assert [form for form, *_ in found[target]] == ["prologue_r"]
