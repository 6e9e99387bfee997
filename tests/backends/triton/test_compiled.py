"""Launches without Triton's binder, over a driver that does nothing: Triton's own compiler and
launcher run, on CPU tensors, in a process that does not interpret. The driver says what it was
given, by Triton and by us."""

import subprocess
import sys

import pytest
import triton

from tests.processes import ROOT, printed
from wn_kernels.backends import native
from wn_kernels.backends.triton import compiled

pytestmark = pytest.mark.skipif(
    not compiled._is_supported, reason="the internals of this version of Triton are not known"
)

SETUP = """
import json, sys, threading
from bench import stand_in
stand_in.activate()
import torch, triton
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from wn_kernels.backends import triton as backend
from wn_kernels.call import Geometry
from wn_kernels.backends.triton import compiled, configs, launch, weight

bound = []  # whether Triton has bound the arguments, for each of its launcher's calls
launcher_s_call = CudaLauncher.__call__

def spy(self, *arguments):
    bound.append(arguments[7] is not None)  # it passes its hooks
    return launcher_s_call(self, *arguments)

CudaLauncher.__call__ = spy
made = []  # the addresses of each launch of ours, and whether Triton has bound it

def noted(launches):
    def notes(addresses):
        bound.clear()
        result = launches(addresses)
        made.append((addresses, any(bound)))
        return result
    return notes

def by_triton(self, tensors, real=launch.Launcher._launch_by_triton):
    return noted(lambda _: real(self, tensors))([t.data_ptr() for t in tensors])

def by_address(self, tensors, real=compiled.Compiled._launch):
    launch = noted(lambda addresses, launch=real(self, tensors): launch(*addresses))
    return lambda *addresses: launch([*addresses])

launch.Launcher._launch_by_triton = by_triton
compiled.Compiled._launch = by_address

def launched(run):
    "The launches that the driver is given, addresses by the tensor that they are of."
    made.clear()
    with stand_in.launches() as found:
        run()
    assert len(found) == len(made) > 0
    return [described(each, *how) for each, how in zip(found, made)]

def described(launch, tensors, by_triton):
    values = [int.from_bytes(p, "little") for p in launch.parameters]
    assert values[: len(tensors)] == tensors, (launch, tensors)  # in their order
    parameters = [
        f"tensor {tensors.index(value)}" if value in tensors else p.hex()
        for p, value in zip(launch.parameters, values)
    ]
    return dict(launch._asdict(), parameters=parameters, by_triton=by_triton)

def same(a, b):
    return all(a[k] == b[k] for k in a if k not in ("entry", "by_triton"))

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
        torch.ones(256, 256), torch.ones(256, 256), g[0, 0], g[0, 0], None, 0.0, norm="linf"),
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
"""

# Ways of a launch, with what a process is given to go there: through the driver alone, through the
# C function of Triton's launcher, and through that launcher.
WAYS = {
    "driver": ("", {}),
    "function": ("", {"XDG_CACHE_HOME": "/nonexistent"}),  # without the library
    "launcher": ("compiled._is_plain = lambda run: False", {"XDG_CACHE_HOME": "/nonexistent"}),
}


def run(code, way="driver"):
    """What `code` prints, in a process with the stand-in."""
    native.build()
    more, variables = WAYS[way]
    return printed(f"{SETUP}\n{more}\n{code}", **variables)


@pytest.mark.parametrize("way", WAYS)
def test_later_launches_are_the_first_one_s(way):
    """Every kernel: what the driver is given by the second call is what Triton gives it in the
    first, but for addresses. In a third call, through Triton again, all is the same."""
    found = run(
        """
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
        and all(map(same, first, second)) and all(map(same, third, second)),
        "entries": sorted({l["entry"] for l in second}),
        "parameters": min(len(l["parameters"]) for l in second),
    }
print(json.dumps(found))
""",
        way,
    )
    for name, record in found.items():
        assert all(len({*bound}) == 1 for bound in record["by_triton"]), name
        assert [bound[0] for bound in record["by_triton"]] == [True, False, True], name
        assert record["same"], name
        assert record["parameters"] >= 5, name
        entry = "cuLaunchKernel" if way == "driver" else "cuLaunchKernelEx"
        assert record["entries"] == [entry], name
    counts = {name: record["launches"] for name, record in found.items()}
    assert counts["linear, one pass"] == counts["norms"] == counts["weight"] == 1
    assert counts["dX and dV, one pass"] == counts["norms, split"] == 2
    assert counts["dX and dV, scaled"] == counts["linear, scaled"] == 2
    # Two copies with channels last, W, dX, dW, and dV.
    assert counts["convolution, backward"] == 6


@pytest.mark.parametrize("way", WAYS)
def test_unaligned_addresses_have_kernels_of_their_own(way):
    """Triton compiles for addresses that are multiples of 16 bytes, or not: a view that is not has
    the kernel that Triton itself takes, and an aligned one never its."""
    *found, again, kernels = run(
        """
def moved(t, by):
    view = torch.empty(t.numel() + 16, dtype=t.dtype)[by : by + t.numel()].view(t.shape)
    assert view.data_ptr() % 16 == 4 * by % 16
    return view.copy_(t)

handles = []
real = compiled.Compiled._launch

def noting(self, tensors):
    launch = real(self, tensors)
    return lambda *addresses: (handles.append(self.fixed[0]), launch(*addresses))

compiled.Compiled._launch = noting
for args in [(x, v, bias), (moved(x, 1), v, bias), (x, moved(v, 1), bias),
             (x, v, moved(bias, 3)), (moved(x, 1), moved(v, 2), moved(bias, 3))]:
    call = lambda: backend.linear(args[0], args[1], g, args[2], 0, 0.0, "one_pass")
    (first,), (second,) = launched(call), launched(call)
    assert first["by_triton"] and not second["by_triton"] and same(first, second)
launched(CALLS["linear, one pass"])
from wn_kernels.backends.triton.one_pass import one_pass_kernel
kernels = [c.function for c in one_pass_kernel.device_caches[0][0].values()]
print(json.dumps([*handles, kernels]))
""",
        way,
    )
    assert again == found[0]
    assert len({*found}) == len(found) == 5
    assert {*found} <= {*kernels}


@pytest.mark.parametrize("way", WAYS)
def test_hooks_and_streams(way):
    """A profiler's hooks see every launch, with Triton's own metadata; without them, later launches
    are on the current stream."""
    assert run(
        """
call = CALLS["linear, scaled"]
call()
seen = []
hook = lambda metadata: seen.append(metadata.get()["name"])
hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
ways = []
for chain in hooks:
    chain.add(hook)
    ways += [l["by_triton"] for l in launched(call)]
    chain.remove(hook)
triton.knobs.runtime.launch_enter_hook = hook
call()
triton.knobs.runtime.launch_enter_hook = None
stand_in_s = type(driver.active).get_current_stream
type(driver.active).get_current_stream = lambda self, device: 7
launch.forget()
call()
streams = [(l["stream"], l["by_triton"]) for l in launched(call)]
bare = weight.remembered_weight_norm(launch.target_of(v), (v, g), 0, 0.0, "l2", v.dtype).first
bare(v, g)
launched(lambda: bare(v, g))
print(json.dumps([seen, ways, streams, [address == 0 for address in made[0][0]]]))
""",
        way,
    ) == [
        ["slice_sum_kernel", "scale_kernel"] * 3,
        [True] * 4,
        [[7, False], [7, False]],
        [False, False, True, True, False],  # no norms are written where nobody reads them
    ]


@pytest.mark.parametrize(
    "change",
    [
        "run.launch_pdl = True",
        "run.launch_cooperative_grid = True",
        "run.global_scratch_size = 1",
        "run.profile_scratch_size = 1",
        "kernel.packed_metadata = (4, 2, 0, 2, 1, 1)",
        "kernel.packed_metadata = (4, 1, 2**20, 1, 1, 1)",
        "kernel.src.signature['M'] = 'fp32'",
        "kernel.src.signature['A'] = 'tensordesc<fp32[16, 16]>'",
        "run.__class__ = type('Other', (CudaLauncher,), {})",
    ],
)
def test_what_the_driver_alone_cannot_launch(change):
    """A kernel of another kind than ours is left to Triton's launcher."""
    before, after = run(f"""
kept = []
real = compiled.launcher
compiled.launcher = lambda kernel, *rest: kept.append((kernel, rest)) or real(kernel, *rest)
CALLS["linear, one pass"]()
((kernel, rest),) = kept
run = kernel.run
found = [real(kernel, *rest).kernel is not None]
{change}
print(json.dumps([*found, real(kernel, *rest).kernel is not None]))
""")
    assert before
    assert not after


@pytest.mark.skipif(
    not triton.__version__.startswith("3.7."), reason="Triton has an own error of each version"
)
@pytest.mark.parametrize("way", WAYS)
def test_an_error_of_the_driver(way):
    """It is raised with the driver's message, and the next call is right."""
    message, count = run(
        """
call = CALLS["linear, one pass"]
call()
try:
    with stand_in.failing(700):
        call()
    message = ""
except RuntimeError as error:
    message = str(error)
print(json.dumps([message, len(launched(call))]))
""",
        way,
    )
    assert "an error of the stand-in" in message
    assert count == 1
    if way == "driver":
        assert "one_pass_kernel" in message
        assert "700" in message


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


@pytest.mark.parametrize("way", WAYS)
def test_threads(way):
    """Threads that start together compile and launch the same kernels, and agree on them. Each has
    the device's context, which a new thread has not."""
    count, kernels, contexts = run(
        """
sys.setswitchinterval(1e-6)  # so that two cores interleave as many would
barrier = threading.Barrier(8)
failed = []

def work(i):
    mine = [x.clone() for _ in range(3)]
    barrier.wait()
    try:
        for t in mine * 10:
            y, n = backend.linear(t, v, g, bias, 0, 0.0, "one_pass")
            assert y.shape == (16, 64) and n.shape == (64, 1)
    except BaseException as error:
        failed.append(error)

threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
with stand_in.launches() as found:
    for t in threads: t.start()
    for t in threads: t.join()
assert not failed, failed
tensors = len(made[0][0])  # whose addresses differ
print(json.dumps([len(found), len({(l.kernel, l.grid, l.parameters[tensors:]) for l in found}),
                  all(l.has_context for l in found)]))
""",
        way,
    )
    assert (count, kernels, contexts) == (8 * 30, 1, True)


def test_the_interpreter_is_never_bypassed():
    """Its kernels are no compiled ones: every call runs them."""
    code = """
import os; os.environ["TRITON_INTERPRET"] = "1"
import torch
from bench.stand_in import interpreter
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
