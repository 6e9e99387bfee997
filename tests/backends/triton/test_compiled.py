"""Launches without Triton's binder, over a driver that does nothing: Triton's own compiler and
launcher run, on CPU tensors, in a process that does not interpret."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from wn_kernels.backends.triton import compiled

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(
    not compiled._is_supported, reason="the internals of this version of Triton are not known"
)

SETUP = """
import json, threading
from bench import stand_in
stand_in.activate()
import torch, triton
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from wn_kernels.backends import triton as backend
from wn_kernels.call import Geometry
from wn_kernels.backends.triton import compiled, configs, launch

launches = []
launcher_s_call = CudaLauncher.__call__

def spy(self, *arguments):
    (x, y, z, stream, function, metadata), (_, enter, leave) = arguments[:6], arguments[6:9]
    # Tensors as Triton passes them, addresses as we do.
    operands = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments[9:]]
    launches.append(dict(grid=(x, y, z), stream=stream, function=function, metadata=metadata,
        operands=operands, by_triton=enter is not None))
    return launcher_s_call(self, *arguments)

CudaLauncher.__call__ = spy
is_plain, compiled._is_plain = compiled._is_plain, lambda run: False  # our launches, too, go there

def launched(run):
    launches.clear()
    run()
    return [dict(l) for l in launches]

def like(dtype=torch.float32):
    x, v = torch.randn(16, 64, dtype=dtype), torch.randn(64, 64, dtype=dtype)
    return x, v, torch.rand(64, 1, dtype=dtype) + 0.5, torch.randn(64, dtype=dtype)

x, v, g, bias = like()
norm = torch.rand(64, 1) + 0.5
dy = torch.randn(16, 64)
conv = Geometry((1,), (1,), (1,), False, (0,), 1)
images, taps = torch.randn(2, 32, 16), torch.randn(32, 32, 3)
deep = torch.randn(8, 32, 3), torch.rand(8, 1, 1) + 0.5
grouped = Geometry((1,), (1,), (1,), False, (0,), 32)
each = torch.randn(32, 1, 3), torch.rand(32, 1, 1)
scale, channels = torch.rand(32, 1, 1) + 0.5, torch.randn(32)
needs = (True, True, True, True)
CALLS = {
    "linear, one pass": lambda: backend.linear(x, v, g, bias, 0, 0.0, "one_pass"),
    "linear, scaled": lambda: backend.linear(x, v, g, None, 0, 0.0, "scaled"),
    "linear, materialized": lambda: backend.linear(x, v, g, bias, 0, 0.0, "materialize"),
    "dX and dV, one pass": lambda: backend.linear_backward(
        dy, x, v, g, norm, 0, 0.0, "one_pass", needs),
    "dX and dV, scaled": lambda: backend.linear_backward(
        dy, x, v, g, norm, 0, 0.0, "scaled", needs),
    "dX and dV, dim=1": lambda: backend.linear_backward(
        dy, x, v, g.t(), norm.t(), 1, 0.0, "one_pass", needs),
    "norms": lambda: backend.slice_norms(v, 0, 0.5),
    "norms, split": lambda: backend.slice_norms(torch.randn(256, 256), None, 0.0),
    "weight": lambda: backend.weight_norm(v, g, 0, 0.0, torch.bfloat16),
    "weight's gradient": lambda: backend.weight_norm_backward(v, v, g, norm, 0, 0.0),
    "weight's gradient, split": lambda: backend.weight_norm_backward(
        torch.ones(256, 256), torch.ones(256, 256), g[0, 0], g[0, 0], None, 0.0),
    "convolution, one pass": lambda: backend.convolution(
        images, *each, channels, grouped, 0, 0.0, "one_pass"),
    "convolution, packed": lambda: backend.convolution(
        images, taps, scale, channels, conv, 0, 0.0, "packed"),
    "convolution, grouped": lambda: backend.convolution(
        images, *each, channels, grouped, 0, 0.0, "packed"),
    "convolution, backward": lambda: backend.convolution_backward(
        images, images, taps, scale, scale, conv, 0, 0.0, "packed", needs),
    "convolution, grouped, backward": lambda: backend.convolution_backward(
        images, images, *each, each[1], grouped, 0, 0.0, "packed", needs),
}

def same_but_addresses(a, b):
    def is_address(operand):
        return isinstance(operand, int) and operand >= 2**32

    constants = [[is_address(o) or o for o in l["operands"]] for l in (a, b)]
    same = all(a[k] == b[k] for k in ("grid", "stream", "function", "metadata"))
    return same and constants[0] == constants[1]
"""


def run(code, **variables):
    """What `code` prints, in a process with the stand-in."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_later_launches_are_the_first_one_s():
    """Every kernel: what its launcher is given by the second call is what Triton gives it in the
    first, but for addresses and hooks. In a third call, through Triton again, all is the same."""
    found = run("""
found = {}
for name, call in CALLS.items():
    launch.forget()  # what another call may have prepared as well
    first, second = launched(call), launched(call)
    triton_s_run = JITFunction.run
    JITFunction.run = lambda self, *a, **k: triton_s_run(self, *a, **k)  # a launch checker's
    third = launched(call)
    JITFunction.run = triton_s_run
    found[name] = {
        "launches": len(first),
        "by_triton": [[l["by_triton"] for l in ls] for ls in (first, second, third)],
        "same": len(first) == len(second) == len(third)
        and all(map(same_but_addresses, first, second))
        and all(map(same_but_addresses, third, second)),
    }
print(json.dumps(found))
""")
    for name, record in found.items():
        first, second, third = record["by_triton"]
        assert all(first), name
        assert not any(second), name
        assert all(third), name
        assert record["same"], name
    counts = {name: record["launches"] for name, record in found.items()}
    assert counts["linear, one pass"] == counts["norms"] == counts["weight"] == 1
    assert counts["dX and dV, one pass"] == counts["norms, split"] == 2
    assert counts["dX and dV, scaled"] == counts["linear, scaled"] == 2
    # Two copies with channels last, W, dX, dW, and dV.
    assert counts["convolution, backward"] == 6


@pytest.mark.skipif(
    not triton.__version__.startswith("3.7."), reason="other versions go through Triton's launcher"
)
def test_the_c_function_is_given_what_triton_gives_it():
    """Every kernel, where `Compiled` calls the C function behind Triton's launcher by itself."""
    found = run("""
compiled._is_plain = is_plain
seen = []
launcher_s_init = CudaLauncher.__init__

def init(self, *arguments):
    launcher_s_init(self, *arguments)
    real = self.launch

    def launch(*arguments):
        *kept, operands = arguments
        # The metadata of the launch and the hooks, which ours does without.
        kept[8:11] = []
        values = [o.data_ptr() if isinstance(o, torch.Tensor) else o for o in operands]
        values = ["address" if isinstance(o, int) and o >= 2**32 else o for o in values]
        seen.append((kept, [type(o).__name__ if hasattr(o, "base") else o for o in values]))
        return real(*arguments)

    self.launch = launch

CudaLauncher.__init__ = init
found = {}
for name, call in CALLS.items():
    launch.forget()
    call()
    first, count = list(seen), len(launches)
    seen.clear()
    call()
    found[name] = [len(first), str(first) == str(seen), len(launches) - count]
    seen.clear()
print(json.dumps(found))
""")
    for name, (count, same, by_triton) in found.items():
        assert count > 0, name
        assert same, name
        assert by_triton == 0, name


def test_unaligned_addresses_have_kernels_of_their_own():
    """Triton compiles for addresses that are multiples of 16 bytes, or not: a view that is not has
    the kernel that Triton itself takes, and an aligned one never its."""
    found = run("""
def moved(t, by):
    view = torch.empty(t.numel() + 16, dtype=t.dtype)[by : by + t.numel()].view(t.shape)
    assert view.data_ptr() % 16 == 4 * by % 16
    return view.copy_(t)

found = []
for args in [(x, v, bias), (moved(x, 1), v, bias), (x, moved(v, 1), bias),
             (x, v, moved(bias, 3)), (moved(x, 1), moved(v, 2), moved(bias, 3))]:
    call = lambda: backend.linear(args[0], args[1], g, args[2], 0, 0.0, "one_pass")
    first, second = launched(call), launched(call)
    assert first[0]["by_triton"] and not second[0]["by_triton"]
    assert same_but_addresses(first[0], second[0])
    found.append(second[0]["function"])
again = launched(CALLS["linear, one pass"])[0]
print(json.dumps([id(f) if not isinstance(f, int) else f for f in [*found, again["function"]]]))
""")
    *_, again = found
    assert again == found[0]


def test_hooks_and_streams():
    """A profiler's hooks see every launch, with Triton's own metadata; without them, later launches
    are on the current stream."""
    assert run("""
call = CALLS["linear, scaled"]
call()
seen = []
hook = lambda metadata: seen.append(metadata.get()["name"])
hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
by_triton = []
for chain in hooks:
    chain.add(hook)
    by_triton += [l["by_triton"] for l in launched(call)]
    chain.remove(hook)
triton.knobs.runtime.launch_enter_hook = hook
call()
triton.knobs.runtime.launch_enter_hook = None
stand_in_s = type(driver.active).get_current_stream
type(driver.active).get_current_stream = lambda self, device: 7
launch.forget()
call()
streams = [(l["stream"], l["by_triton"]) for l in launched(call)]
print(json.dumps([seen, by_triton, streams]))
""") == [
        ["slice_sum_kernel", "scale_kernel"] * 3,
        [True] * 4,
        [[7, False], [7, False]],
    ]


def test_other_versions_of_triton():
    """Where its internals are not known, all goes through its public way."""
    assert (
        run("""
compiled._is_supported = False
call = CALLS["linear, scaled"]
print(json.dumps([[l["by_triton"] for l in launched(call)] for _ in range(3)]))
""")
        == [[True, True]] * 3
    )


def test_threads():
    """Threads that start together compile and launch the same kernels, and agree on them."""
    functions = run("""
barrier = threading.Barrier(8)

def work(i):
    mine = [x.clone() for _ in range(3)]
    barrier.wait()
    for t in mine * 20:
        y, n = backend.linear(t, v, g, bias, 0, 0.0, "one_pass")
        assert y.shape == (16, 64) and n.shape == (64, 1)

threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for t in threads: t.start()
for t in threads: t.join()
print(json.dumps([len(launches), len({str(l["function"]) for l in launches})]))
""")
    assert functions == [8 * 60, 1]


def test_the_interpreter_is_never_bypassed():
    """Its kernels are no compiled ones: every call runs them."""
    code = """
import os; os.environ["TRITON_INTERPRET"] = "1"
import torch
from bench import interpreter
interpreter.mend()
from wn_kernels.backends import triton as backend
v, g = torch.randn(5, 7), torch.rand(5, 1) + 0.5
for _ in range(3):
    w, n = backend.weight_norm(v, g, 0, 0.0, torch.float32)
    assert torch.allclose(w, g * v / v.norm(dim=1, keepdim=True))
    v.mul_(2).add_(1)
print("right")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "right\n", done.stderr
