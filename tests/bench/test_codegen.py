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


def bounds_of(tiles, *names):
    """By target, `(form, bound, issue cycles, record)`; compiled in a process of its own: this one
    may be interpreting. `tiles` is an expression."""
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
        tiles = {tiles}
    found[target.name] = [
        (form, bound.name, bound.issue, asdict(record))
        for _, _, form, record, bound in bounds.forms(tiles, {names}, [target])
    ]
print(json.dumps(found))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def test_a_small_batch_is_bound_by_memory():
    """On every target, in one pass: the norm in the loop hides behind the bytes of V."""
    pytest.importorskip("triton")
    found = bounds_of("shipped(configs.one_pass, 16, 8192, 2)", "one_pass")
    assert len(found) == 4
    for target, ((_, name, _, record),) in found.items():
        assert name == "memory", target
        assert record["spill_bytes"] == 0
        assert record["loop_instructions"] > 0


def test_ready_norms_cost_the_loop_nothing():
    """The scaled form's loop is a plain matmul's, to 5 %, at the tile of large batches."""
    pytest.importorskip("triton")
    tiles = "shipped(configs.matmul, 4096, 4096, 2, False, False, configs.may_copy(4096, 2))"
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
    tiles = "shipped(configs.matmul, 4096, 4096, 2, True, False, configs.may_copy(4096, 2))"
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
