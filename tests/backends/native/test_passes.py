"""Passes that run without Python, over a driver that does nothing."""

import pytest

pytest.importorskip("triton")

from tests.processes import printed
from wn_kernels.backends import native


@pytest.fixture(autouse=True)
def _built():
    native.build()


SETUP = """
import gc, json, sys, threading
from bench import stand_in
stand_in.activate()
import torch, triton, wn_kernels
from triton.runtime.jit import JITFunction
from wn_kernels import functional as WF, operators
from wn_kernels.backends.triton import launch

v, g = torch.randn(64, 64, requires_grad=True), torch.rand(64, 1, requires_grad=True)
x, bias = torch.randn(16, 64, requires_grad=True), torch.randn(64, requires_grad=True)
dw, dy = torch.randn(64, 64), torch.randn(16, 64)

def step():
    WF.weight_norm(v, g).backward(dw)
    WF.wn_linear(x, v, g, bias).backward(dy)

def launchers():
    return [o for o in gc.get_objects() if isinstance(o, launch.Launcher)]

called = []
real = launch.Launcher.__call__

def counts(self, *tensors):
    called.append(self.kernel.__name__)
    return real(self, *tensors)

launch.Launcher.__call__ = counts
forced = wn_kernels.use_backend("triton")
forced.__enter__()
"""


def compiled(code):
    """Returns what `code` prints in a process that compiles kernels. Its driver does nothing."""
    return printed(SETUP + code)


def test_launches_without_python():
    """Python's launcher compiles, and is not called again; hooks and a launch checker see every
    launch, in both directions."""
    first, second, hooked, replaced, again = compiled("""
found = []
def record():
    called.clear()
    step()
    found.append(list(called))

record(), record()
seen = []
hook = lambda metadata: seen.append(metadata.get()["name"])
triton.knobs.runtime.launch_enter_hook.add(hook)
step()
found.append(list(seen))
triton.knobs.runtime.launch_enter_hook.remove(hook)
triton_s_run = JITFunction.run
JITFunction.run = lambda self, *a, **k: triton_s_run(self, *a, **k)  # a launch checker's
record()
JITFunction.run = triton_s_run
record()
print(json.dumps(found))
""")
    assert len(first) == 5
    assert second == again == []
    assert first == hooked == replaced


def test_addresses_have_kernels_of_their_own():
    """A view that is no multiple of 16 bytes has another kernel, compiled once."""
    assert compiled("""
moved = torch.empty(64 * 64 + 1)[1:].view(64, 64)
found = []
for t in (v, moved, v, moved):
    called.clear()
    with torch.no_grad():
        WF.weight_norm(t, g)
    found.append(len(called))
(launcher,) = launchers()
print(json.dumps([found, sorted(launcher.compiled)]))
""") == [[1, 1, 0, 0], [0, 1]]


def test_threads():
    """Threads that start together, forward and backward: nothing is lost, nothing fails."""
    assert (
        compiled("""
failed = []
barrier = threading.Barrier(8)

def work():
    mine = [t.detach().clone().requires_grad_() for t in (x, v, g, bias)]
    barrier.wait()
    try:
        for i in range(60):
            if i % 20 == 19:
                launch.forget()  # while others launch
            y = WF.wn_linear(*mine)
            grads = torch.autograd.grad(y, mine, dy)
            assert [t.shape for t in grads] == [t.shape for t in mine]
    except BaseException as error:
        failed.append(repr(error))

threads = [threading.Thread(target=work) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
print(json.dumps(failed))
""")
        == []
    )


def test_references():
    """A thousand calls leave every count of references as it was."""
    assert compiled("""
step()
kernels = [c for l in launchers() for c in l.compiled.values()]
assert kernels
def counts_now():
    # The arguments that no other object shares.
    shared = [o for c in kernels for o in (*c.fixed, *c.constants, c.function, c.current_stream)]
    return [sys.getrefcount(o) for o in shared if not isinstance(o, (int, type(None)))]

for _ in range(10): step()
before, objects, blocks = counts_now(), len(gc.get_objects()), sys.getallocatedblocks()
for _ in range(1000): step()
gc.collect()
after = counts_now()
print(json.dumps([before == after, len(gc.get_objects()) - objects < 50,
                  sys.getallocatedblocks() - blocks < 500]))
""") == [True, True, True]


def test_streams_contexts_and_errors_of_the_driver():
    """Every launch is the driver's own, on the current stream, in a thread with a context; the
    driver's error is raised with its message, in both directions."""
    entries, streams, contexts, messages = compiled("""
from triton.runtime import driver
step()
type(driver.active).get_current_stream = lambda self, device: 7
launch.forget(), step()
found = []
with stand_in.launches() as launches:
    for work in (threading.Thread(target=step) for _ in range(2)):
        work.start(), work.join()
messages = []
w = WF.weight_norm(v, g)
with stand_in.failing(700):
    for call in (lambda: WF.weight_norm(v, g), lambda: w.backward(dw)):
        try:
            call()
        except RuntimeError as error:
            messages.append(str(error))
step()
print(json.dumps([sorted({l.entry for l in launches}), [l.stream for l in launches],
                  [l.has_context for l in launches], messages]))
""")
    assert entries == ["cuLaunchKernel"]
    assert streams == [7] * 10
    assert contexts == [True] * 10
    forward, backward = messages
    assert "the launch of weight_kernel failed: an error of the stand-in" in forward
    assert "the launch of weight_grad_kernel failed: an error of the stand-in" in backward


def test_passes_give_the_driver_what_triton_does():
    """The launches of both directions, by Triton and by a pass: the same but for addresses."""
    first, second, names = compiled("""
def made():
    with stand_in.launches() as found:
        step()
    return [(l.kernel, l.grid, l.block, l.shared, l.attributes, l.stream,
             [p.hex() if len(p) < 8 or int.from_bytes(p, "little") == 0 else "address"
              for p in l.parameters]) for l in found]

print(json.dumps([made(), made(), sorted({c.kernel.name for l in launchers()
                                          for c in l.compiled.values()})]))
""")
    assert first == second
    assert len(first) == 5
    assert names == sorted({each[0] for each in first})


def test_norms_that_nobody_reads():
    """Without gradients, a compiled kernel gets the address zero for the norms, by the library and
    without it. It is the kernel of a training step."""
    found, kernels = compiled("""
from wn_kernels import prepare
from wn_kernels.backends import native

def has_norms(grad):
    with stand_in.launches() as launches, torch.set_grad_enabled(grad):
        WF.weight_norm(v, g)
    (only,) = launches
    return any(only.parameters[3])

found = []
for _ in range(2):
    found.append([has_norms(grad) for grad in (True, False, True, False)])
    native.library = lambda *callbacks: None
    prepare.forget()
print(json.dumps([found, sum(len(l.compiled) for l in launchers())]))
""")
    assert found == [[True, False, True, False]] * 2
    assert kernels == 1
