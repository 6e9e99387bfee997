"""The tuned table, and what fills and explains it."""

import json
import multiprocessing
import subprocess
import sys

import pytest
import torch
from torch import nn

import wn_kernels
from tests.comparison import Case, ConvCase, assert_same_bits
from wn_kernels import WNConv1d, WNConvTranspose1d, WNLinear, plan, prepare, tuning
from wn_kernels.backends import native
from wn_kernels.call import Call, Operands
from wn_kernels.plan import Plan, devices, table

pytestmark = pytest.mark.usefixtures("own_table")


def call_of(case):
    conv = case.geometry() if isinstance(case, ConvCase) else None
    return Call(case.x.shape, case.v.shape, case.x.dtype, case.v.dtype, case.dim, conv)


CASES = [
    Case(5, 48, 20, 0),
    Case(5, 48, 20, None, torch.float64),
    Case(40, 12, 20, 1),
    Case(5, 48, 20, 0, torch.bfloat16),
    ConvCase(2, 6, 8, (9,), (3,), 0, stride=2, padding=1),
    ConvCase(2, 6, 8, (9,), (3,), None, groups=2),
    ConvCase(2, 6, 8, (9,), (3,), 2),
    ConvCase(2, 4, 6, (7, 5), (3, 3), 1, layout="channels-last"),
    ConvCase(2, 6, 4, (5,), (4,), 0, transposed=True, stride=2, output_padding=1),
]


@pytest.mark.parametrize("case", CASES)
def test_every_choice_is_right(case):
    """What `tune` may pick computes the same, forward and backward."""
    call = call_of(case)
    every = plan.choices(call, "aten")
    assert every[0] == plan.by_cost(call, "aten") == plan.choose(call, "aten")
    assert len(set(every)) == len(every)
    for choice in every:
        with prepare.fixed(call, choice), wn_kernels.use_backend("aten"):
            case.check(lambda *inputs: tuning.run_call(call, inputs))


@pytest.mark.parametrize("case", [c for c in CASES if c.dim == 0 and c.dtype == torch.float32])
def test_every_choice_is_right_native(case):
    native.build()
    call = call_of(case)
    every = plan.choices(call, "native")
    assert every[0] == plan.by_cost(call, "native") == plan.choose(call, "native")
    for choice in every:
        with prepare.fixed(call, choice), wn_kernels.use_backend("native"):
            case.check(lambda *inputs: tuning.run_call(call, inputs))


@pytest.mark.parametrize("case", CASES)
def test_every_choice_is_right_triton(case):
    pytest.importorskip("triton")
    last = case.x.stride(1) == 1 and isinstance(case, ConvCase)
    call = call_of(case)._replace(channels_last=last)
    with wn_kernels.use_backend("triton"):
        for choice in plan.choices(call, "triton"):
            with prepare.fixed(call, choice):
                case.check(lambda *inputs: tuning.run_call(call, inputs))


def model():
    return nn.Sequential(
        WNLinear(6, 8), nn.BatchNorm1d(8), nn.Unflatten(1, (8, 1)), WNConv1d(8, 4, 1, dim=None)
    )


def test_tune_stores_and_uses(own_table, monkeypatch):
    """The fastest by the clock, which is made up here: whatever is not the default."""
    net, x = model(), torch.randn(5, 6)
    before = [t.clone() for t in net.state_dict().values()]
    clock = []

    def interleaved(call, run, candidates, seconds):
        clock.append(call)
        run()
        default = plan.by_cost(call, next(iter(candidates.values())).backend)
        slow = (default, default.forward)
        return {name: 2.0 if name in slow else 1.0 for name in candidates}

    monkeypatch.setattr(tuning, "_interleaved", interleaved)
    found = wn_kernels.tune(net, x)
    assert all(module.training for module in net.modules())
    for t, old in zip(net.state_dict().values(), before, strict=True):
        if bool((old != 0).any()):
            assert_same_bits(t, old)
    assert [x.call.split()[0] for x in found] == ["linear", "convolution"]
    assert len(set(clock)) == 2
    stored = json.loads(own_table.read_text())
    first = plan.serving(x)
    assert [line.backend for line in found] == [first, "aten"]  # the second has dim=None
    for line, call in zip(found, dict.fromkeys(clock), strict=True):
        assert line.choice != line.default == plan.by_cost(call, line.backend)
        assert stored[table.machine(line.backend)][line.call] == line.choice.entry()
        assert plan.choose(call, line.backend) == line.choice
        assert line.call in str(found)
    assert "2 tuned, 2 not the default" in str(found)
    assert "picked by the tuned table" in wn_kernels.explain(net, (5, 6))
    code = f"""
import torch
from wn_kernels import plan
from wn_kernels.call import Call, Operands
torch.set_num_threads({torch.get_num_threads()})
sizes = torch.Size((5, 6)), torch.Size((8, 6))
print(plan.choose(Call(*sizes, torch.float32, torch.float32, 0), "{first}").forward)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found[0].choice.forward


def test_tune_by_the_clock():
    """Finite times of every candidate; the default stays unless another is faster by 3 %."""
    found = wn_kernels.tune(WNLinear(96, 300), torch.randn(4, 96), seconds=0.1)
    (line,) = found
    assert all(0 < seconds < 1 for seconds in line.seconds.values())
    assert line.choice in plan.choices(call_of(Case(4, 96, 300, 0)), line.backend)
    fastest = min(seconds for key, seconds in line.seconds.items() if isinstance(key, Plan))
    assert line.seconds[line.choice] <= 1.5 * fastest or line.choice.forward != line.default.forward


def test_tune_refuses():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        wn_kernels.tune(3, torch.ones(1))
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        wn_kernels.tune(WNLinear(2, 2), torch.ones(1, 2), seconds=0)
    with pytest.raises(ValueError, match="a backend is forced"), wn_kernels.use_backend("aten"):
        wn_kernels.tune(WNLinear(2, 2), torch.ones(1, 2))


def test_a_failed_run_leaves_the_model_as_it_was():
    net = model()
    with pytest.raises(ValueError, match="input of shape"):
        wn_kernels.tune(net, torch.ones(5, 7))
    assert all(module.training for module in net.modules())


# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("native", {"kernel_size": 4, "padding": 1}),
        ("native", {"kernel_size": 16, "dim": 2}),
        ("aten", {"kernel_size": 4, "padding": "same"}),  # which pads the input first
        ("aten", {"kernel_size": 4, "dim": 1}),
    ],
)
def test_a_call_is_planned_for_the_backend_that_serves_it(backend, options):
    ((_, planned),) = tuning.calls_of(WNConv1d(8, 6, **options), (torch.randn(2, 8, 30),))
    assert planned == (backend if native.unavailable() is None else "aten")


def test_nothing_is_left_of_a_fixed_choice():
    """An error inside the block does not leave that plan behind."""
    layer, x = WNLinear(64, 64), torch.randn(32, 64)
    ((call, backend),) = tuning.calls_of(layer, (x,))
    default, *others = plan.choices(call, backend)
    operands = Operands(x, layer.weight_v, layer.weight_g, layer.bias)
    arguments = (0, operands, (), call.dim, 0.0, "l2", backend)

    def fails():
        with prepare.fixed(call, others[0]):
            assert prepare.prepare(*arguments).plan == others[0]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert prepare.prepare(*arguments).plan == default


@pytest.mark.parametrize("contents", ["{", "[]", '{"a": 1}', '{"a": {"b": 2}}', "\x00"])
def test_unreadable(own_table, contents):
    """Ignored with a warning, and put aside by the next that is written."""
    own_table.parent.mkdir()
    own_table.write_text(contents)
    call = call_of(Case(5, 6, 7, 0))
    with pytest.warns(UserWarning, match="tuned table .* is ignored"):
        assert plan.choose(call, "aten") == plan.by_cost(call, "aten")
    with pytest.warns(UserWarning, match="is ignored"):
        table.store("aten", {"a": {"forward": "scaled"}})
    assert own_table.with_name("tuned.json.unreadable").read_text() == contents
    assert table.find("aten", "a") == {"forward": "scaled"}


def test_what_cannot_serve_is_ignored(own_table):
    call = call_of(Case(5, 6, 7, 0))
    table.store("aten", {plan.key(call): {"forward": "nonsense", "backward": "scaled"}})
    with pytest.warns(UserWarning, match=r"'nonsense'.*cannot serve .* and is ignored"):
        assert plan.choose(call, "aten") == plan.by_cost(call, "aten")


def test_of_another_machine_is_not_used(own_table, monkeypatch):
    call = call_of(Case(5, 6, 7, 0))
    other = next(c for c in plan.choices(call, "aten") if c != plan.by_cost(call, "aten"))
    table.store("aten", {plan.key(call): other.entry()})
    assert plan.choose(call, "aten") == other
    monkeypatch.setattr(table, "machine", lambda *_: "another")
    tuning._forget()
    assert plan.choose(call, "aten") == plan.by_cost(call, "aten")


def _store(start, count):
    for i in range(start, start + count):
        table.store("aten", {f"call {i}": {"forward": "scaled", "backward": str(i)}})


def test_processes_that_write_at_once(own_table):
    """Each keeps all that it found, and a reader never sees half a file."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_store, args=(100 * i, 25)) for i in range(2)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if own_table.exists():
            json.loads(own_table.read_text())
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    stored = json.loads(own_table.read_text())[table.machine("aten")]
    assert len(stored) == 50
    assert {path.name for path in own_table.parent.iterdir()} <= {
        "tuned.json",
        "tuned.json.lock",
    }


def test_a_failed_write_leaves_what_was_there(own_table):
    table.store("aten", {"a": {"forward": "scaled"}})
    with pytest.raises(TypeError):
        table.store("aten", {"b": {"forward": object()}})
    assert json.loads(own_table.read_text())[table.machine("aten")] == {"a": {"forward": "scaled"}}


def test_every_option_is_in_the_key():
    call = call_of(CASES[4])
    others = [
        call._replace(x_shape=torch.Size((3, 6, 9))),
        call._replace(v_shape=torch.Size((9, 6, 3))),
        call._replace(x_dtype=torch.bfloat16),
        call._replace(v_dtype=torch.bfloat16),
        call._replace(dim=None),
        call._replace(conv=None),
        call._replace(channels_last=True),
        call._replace(tf32=True),
        *(
            call._replace(conv=call.conv._replace(**{field: "another"}))
            for field in call.conv._fields
        ),
    ]
    assert len({plan.key(c) for c in [call, *others]}) == 1 + len(others)


# --- explain -------------------------------------------------------------------------------------


def test_explain():
    net = nn.Sequential(WNLinear(64, 32), nn.Unflatten(1, (32, 1)), WNConvTranspose1d(32, 8, 4, 2))
    text = wn_kernels.explain(net, (3, 64))
    linear, convolution = text.split("\n\n")
    backend = plan.serving(torch.empty(0))
    assert linear.startswith("linear 3×64·32×64 float32·float32 dim=0\n")
    assert linear.splitlines()[1].startswith(f"{backend}, constants of CPU, picked by")
    assert convolution.startswith("convolution 3×32×1·32×8×4")
    for part in (linear, convolution):
        assert part.count("<- picked") == 2
        assert "bytes" in part
        assert "launches" in part
    assert repr(text) == str(text)


@pytest.mark.parametrize("device", devices.GPUS)
def test_explain_for_a_gpu_that_is_not_there(device):
    layer = WNLinear(4096, 4096, dtype=torch.bfloat16)
    text = wn_kernels.explain(layer, (16, 4096), device=device)
    assert f"triton, constants of {device}" in text
    picked = [line.split()[:2] for line in text.splitlines() if "<- picked" in line]
    assert picked == [["forward", "one_pass"], ["backward", "product"]]
    assert "covers" in text
    assert "A training step keeps the product" in text


def test_explain_refuses():
    with pytest.raises(ValueError, match=r"device is 'V100'; expected one of \['A100'"):
        wn_kernels.explain(WNLinear(2, 3), (1, 2), device="V100")
    for shape in (8, None, torch.ones(2, 3)):
        with pytest.raises(TypeError, match="input_shape must be a sequence of sizes"):
            wn_kernels.explain(wn_kernels.WNLinear(3, 2), shape)
    with pytest.raises(ValueError, match=r"input_shape has a negative size: \(-4, 3\)"):
        wn_kernels.explain(wn_kernels.WNLinear(3, 2), (-4, 3))
    with pytest.raises(ValueError, match="ReLU makes no planned call of this package"):
        wn_kernels.explain(nn.ReLU(), (1, 2))
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got str"):
        wn_kernels.explain("x", (1, 2))
