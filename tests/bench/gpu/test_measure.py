"""What the sections do on a GPU, on tensors of the CPU: kernels are interpreted, values compared,
and graphs captured and replayed by stand-ins for PyTorch's."""

import contextlib
import dataclasses
import importlib.util
import time
import types
from functools import partial

import pytest
import torch
from torch.nn.utils import parametrizations

import wn_kernels
from bench import recurrent, second_order
from bench.cases import Case
from bench.gpu import (
    context,
    conv,
    facts,
    host,
    layers,
    linear,
    models,
    results,
    steps,
    sweep,
    weight_norm,
)
from bench.measure import timing
from bench.models import MODELS, Model
from bench.providers import NORM_L2, PROVIDERS
from bench.runner import Runner
from tests.bench.layers import CPU

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


L2 = 1 << 10  # bytes of the cache


class Block(contextlib.nullcontext):
    def wait_stream(self, other):
        """Nothing runs there."""

    def synchronize(self):
        """Nor here."""


class Graph:
    """Captures by doing what it is to hold, and replays by waiting."""

    def capture_begin(self):
        self.begin = time.perf_counter()

    def capture_end(self):
        self.seconds = time.perf_counter() - self.begin

    def replay(self):
        time.sleep(1e-4)


@pytest.fixture(autouse=True)
def _cuda(monkeypatch):
    properties = types.SimpleNamespace(
        L2_cache_size=L2,
        name="a GPU",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=1 << 36,
    )
    replaced = {
        "CUDAGraph": Graph,
        "stream": Block,
        "current_stream": Block,
        "synchronize": lambda device: None,
        "get_device_properties": lambda device: properties,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "_side_stream", Block)
    with wn_kernels.use_backend("triton"):
        yield


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Runs a section and returns its results."""
    monkeypatch.setattr(context, "ENOUGH", 0.0)  # as few rounds as there may be
    monkeypatch.setattr(context, "CALLS_SPAN", 0.0)  # of a call each
    monkeypatch.setattr(timing, "FEW_SETS", 2)
    monkeypatch.setattr(timing, "CALLS", 2)

    def run(section, main, *arguments, **options):
        given = context.Context(section, tmp_path, time.time() + 600, False, None, CPU)
        main(given, *arguments, **options)
        assert not given.failed
        return results.of(results.read(tmp_path / results.RESULTS), section)

    return run


@pytest.mark.parametrize("precision", ["own", "autocast"])
def test_linear(precision, measured):
    """Every path and every kernel; that of the model's choice under the name `ours`."""
    dtype = "bfloat16" if precision == "own" else "float32"
    cases = [
        Case("4, 32, 24", "Linear", (32, 24), (4, 32), mode, dtype=dtype, precision=precision)
        for mode in ("infer", "train")
    ]
    infer, train = measured("linear", layers.each, cases)
    forms = ["materialize", "one_pass", *(["scaled"] if precision == "own" else [])]
    for line in (infer, train):
        paths = {"plain", "eager", "ours", *(f"ours: {form}" for form in forms)}
        if line is train:
            paths |= {"ours: materialize, keeps the weight", "ours: product, keeps the product"}
        chosen = dict(zip(("infer", "train"), line["chosen"].split("/"), strict=True))
        assert {*line["seconds"], f"ours: {chosen[line['case']['mode']]}"} == paths
        assert line["predicted"].keys() == line["seconds"].keys()
        assert all(sets >= 1 for sets in line["sets"].values())
        assert {"ours/eager", "ours/plain"} <= line["ratios"].keys()
    forward, backward = (
        {one["kernel"].split()[0] for one in line["kernels"]} for line in (infer, train)
    )
    assert {"one_pass_kernel", "weight_kernel"} <= forward
    assert "weight_grad_kernel" in backward


def test_operands_rotate(measured):
    """The cache of this stand-in holds a third of what the sets hold together."""
    case = Case("4, 32, 24", "Linear", (32, 24), (4, 32), "infer")
    (line,) = measured("linear", layers.each, [case])
    for name, sets in line["sets"].items():
        size = line["operand_bytes"][name]
        assert sets * size > 3 * L2 >= (sets - 1) * size


def test_conv(measured):
    case = Case("1d", "Conv1d", (2, 4, 3), (1, 2, 6), "infer", channels_last=True)
    (line,) = measured("conv", layers.each, [case])
    assert {"plain", "eager", "ours"} < line["seconds"].keys()
    assert line["kernels"]
    assert len(conv.CASES) == 64
    assert len(linear.BF16) == 48


def test_weight_norm(measured, monkeypatch):
    """Both directions, of a large weight by a few slices."""
    weights = ((16, 40), 0, "float32"), ((6, 4, 16), 2, "bfloat16")
    cases = [weight_norm.Weight(*weight, m) for weight in weights for m in weight_norm.MODES]
    monkeypatch.setattr(weight_norm, "CASES", cases)
    monkeypatch.setattr(weight_norm, "OTHER_NORMS", [])
    for large in (1 << 26, 10):
        monkeypatch.setattr(weight_norm, "LARGE", large)
        found = measured("weight_norm", weight_norm.main)
    assert len(found) == 8
    assert all(list(line["seconds"]) == ["plain", "eager", "ours"] for line in found)


def test_other_norms(measured, monkeypatch):
    """Each beside PyTorch's operations and ours of l2. All are compared with float64, and each one
    by its own norm."""
    cases = [
        weight_norm.Weight((16, 40), dim, dtype, mode, norm)
        for dim, dtype, norm in ((0, "float32", "l1"), (1, "bfloat16", "linf"))
        for mode in weight_norm.MODES
    ]
    monkeypatch.setattr(weight_norm, "CASES", [])
    monkeypatch.setattr(weight_norm, "OTHER_NORMS", cases)
    checked = []
    close = weight_norm.check_close
    monkeypatch.setattr(weight_norm, "check_close", lambda *a: (checked.append(a[0]), close(*a)))
    found = measured("weight_norm", weight_norm.main)
    assert len(found) == len(cases)
    for line in found:
        assert list(line["seconds"]) == ["plain", "eager", "ours", NORM_L2]
        assert {"ours/plain", "ours/eager", f"ours/{NORM_L2}"} == line["ratios"].keys()
    assert len(checked) == len(cases) // 2 * 3 * (1 + 2)


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_a_linear_layer_of_another_norm(norm, measured):
    """By the chosen path, beside a layer like PyTorch's and beside l2."""
    cases = [
        Case("4, 32, 24", "Linear", (32, 24), (4, 32), mode, dtype="bfloat16", norm=norm)
        for mode in ("infer", "train")
    ]
    for line in measured("linear", layers.each, cases):
        assert list(line["seconds"]) == ["plain", "eager", "ours", NORM_L2]
        assert line["kernels"]


def test_a_wrong_norm_is_found():
    """A layer of another norm than the case's is not timed."""
    case = Case("4, 32, 24", "Linear", (32, 24), (4, 32), "infer", norm="l1")
    for name in ("eager", "ours"):
        Runner(case, name, PROVIDERS[name], CPU).check()
        run = Runner(dataclasses.replace(case, norm="linf"), name, PROVIDERS[name], CPU)
        with torch.no_grad():
            run.module.load_state_dict(Runner(case, name, PROVIDERS[name], CPU).module.state_dict())
        run.case = case
        with pytest.raises(AssertionError, match=f"{name} is wrong"):
            run.check()


def test_a_wrong_weight_is_found(monkeypatch):
    case = weight_norm.Weight((16, 40), 0, "float32", "forward")
    run = weight_norm.NormRunner(case, "ours", weight_norm.Operands.of(case, CPU))
    run.check()
    monkeypatch.setattr(weight_norm.WF, "weight_norm", lambda v, g, dim, norm: 1.01 * v)
    with pytest.raises(AssertionError, match="ours is wrong"):
        run.check()


def test_both_modes_share_kernels(measured):
    """A kernel that the forward of a training step launches as well is timed once."""
    cases = [
        Case("4, 32, 24", "Linear", (32, 24), (4, 32), mode, dtype="bfloat16")
        for mode in ("infer", "train")
    ]
    infer, train = measured("linear", layers.each, cases)
    names = [{one["kernel"] for one in line["kernels"]} for line in (infer, train)]
    assert names[1]
    assert not names[0] & names[1]


def test_paths_share_operands(measured, monkeypatch):
    """Those of ours; each is checked."""
    checked = []
    check = Runner.check
    monkeypatch.setattr(Runner, "check", lambda run: (checked.append(run), check(run)))
    case = Case("4, 32, 24", "Linear", (32, 24), (4, 32), "train", dtype="bfloat16")
    (line,) = measured("linear", layers.each, [case])
    assert [run.name for run in checked] == list(line["seconds"])
    ours = [run for run in checked if run.name.startswith("ours")]
    assert len({run.x.data_ptr() for run in ours}) == 1
    assert len({run.session for run in ours}) == len(ours) >= 3


TINY_MODEL = Model(
    build=lambda: torch.nn.Sequential(parametrizations.weight_norm(torch.nn.Linear(6, 4))),
    small=(2, 6),
    x_shape=(3, 6),
    call=lambda model, x: model(x),
    layers=1,
)


def small(one):
    """A sweep whose kernel the interpreter runs in no time."""
    if one.case.kind == "Linear":
        case = dataclasses.replace(one.case, arguments=(64, 32), x_shape=(one.case.x_shape[0], 64))
    else:
        channels = {"Conv1d": (16, 16), "ConvTranspose1d": (16, 16)}[one.case.kind]
        arguments = (*channels, *one.case.arguments[2:])
        case = dataclasses.replace(one.case, arguments=arguments, x_shape=(1, 16, 40))
    fields = {name: values[-1:] for name, values in one.fields.items()}
    return dataclasses.replace(one, case=case, fields=fields)


def test_sweep(measured, monkeypatch):
    """A changed configuration is what runs, beside the shipped one. Afterwards the shipped one is
    back."""
    from wn_kernels.backends.triton import configs

    real = sweep.sweeps()
    monkeypatch.setattr(sweep, "sweeps", lambda: [small(one) for one in real])
    ran = {}
    launches_of = sweep.Operands.launches

    def launches(operands):
        found = launches_of(operands)
        ran.setdefault(operands.sweep.label, []).append(found[0])
        return found

    monkeypatch.setattr(sweep.Operands, "launches", launches)
    before = {one.chooser: getattr(configs, one.chooser) for one in real}
    found = measured("sweep", sweep.main)
    assert [line["case"]["label"] for line in found] == [one.label for one in real]
    for line, one in zip(found, real, strict=True):
        assert next(iter(line["seconds"])) == "shipped"
        assert len(line["seconds"]) == 2, line["refused"]
        assert line["predicted"]["shipped"] > 0
        (last,) = small(one).changes()
        launch = ran[one.label][-1]
        names = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        assert {name: (launch.arguments | names)[name] for name in last} == last
    assert {one.chooser: getattr(configs, one.chooser) for one in real} == before


def test_a_sweep_says_what_does_not_run(measured, monkeypatch, tmp_path):
    """A configuration that the compiler refuses is no fault. One with wrong results is a fault.
    Neither is timed."""
    one = small(sweep.sweeps()[0])
    one = dataclasses.replace(one, fields={"num_stages": (7, 8, 9)})
    monkeypatch.setattr(sweep, "sweeps", lambda: [one])
    launches_of = sweep.Operands.launches

    def launches(operands):
        found = launches_of(operands)
        if found[0].num_stages == 7:
            raise RuntimeError("out of resource\nin lines")
        return found

    monkeypatch.setattr(sweep.Operands, "launches", launches)
    compare = sweep.Operands.compare
    compared = []

    def wrong(operands, results, right):
        compare(operands, results, right)
        compared.append(results)
        if len(compared) == 2:
            compare(operands, [1.1 * t for t in results], right)

    monkeypatch.setattr(sweep.Operands, "compare", wrong)
    with pytest.raises(AssertionError):  # the fixture finds the fault
        measured("sweep", sweep.main)
    lines = results.read(tmp_path / results.RESULTS)
    (line,) = results.of(lines, "sweep")
    assert line["refused"] == {"7": "RuntimeError: out of resource"}
    assert list(line["seconds"]) == ["shipped", "9"]
    (fault,) = results.of(lines, "sweep", "wrong")
    assert fault["message"].startswith(f"{one.label}, 8: a result has relative error 1.")


def test_host(measured, monkeypatch):
    """Layers, the operator, and a network over a small input, a call at a time."""
    monkeypatch.setattr(host.overhead, "CASES", host.overhead.CASES[:2])
    monkeypatch.setattr(host, "MODEL", "tiny")
    monkeypatch.setitem(MODELS, "tiny", TINY_MODEL)
    infer, train, *others = measured("host", host.main)
    for line in (infer, train):
        assert list(line["seconds"]) == list(host.NAMES)
    assert train["predicted"]["ours"] > infer["predicted"]["ours"] > 0
    assert [(line["case"]["label"], line["case"]["mode"]) for line in others] == [
        ("weight_norm 64×64, dim=0", "infer"),
        ("weight_norm 64×64, dim=0", "train"),
        ("tiny", "infer"),
        ("tiny", "train"),
    ]
    names = ["plain", "eager", "ours"]
    assert [list(line["seconds"]) for line in others] == [
        *(names, names),
        *([*names, "grouped", "frozen"], [*names, "grouped"]),
    ]


def test_a_network_is_called_once_before_the_gpu_is_waited_for(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TINY_MODEL)
    run = host.Network(host.ModelCase("tiny", "infer"), "ours", CPU)
    assert run.x.shape == torch.Size(TINY_MODEL.small)
    assert timing.QUEUE // run.launches == 1


def test_steps(measured, monkeypatch):
    """A recurrent layer, a second derivative and a head, by the clock and by the processor."""
    assert len({case.label for case in (*steps.LAYERS, *steps.CELLS)}) == 6
    assert [(head.dtype, head.mode) for head in steps.HEADS] == [
        (dtype, mode) for dtype in ("float32", "bfloat16") for mode in ("infer", "train")
    ]
    monkeypatch.setattr(recurrent, "SIZE", 6)
    build = partial(recurrent.normed, torch.nn.LSTM, recurrent.SIZE)
    layer = Model(build, (3, 2, 6), (3, 2, 6), recurrent.first, 2, True)
    monkeypatch.setattr(steps, "LAYERS", [models.ModelCase("tiny", "train", {"tiny": layer})])
    monkeypatch.setattr(steps, "CELLS", [])
    penalty = second_order.STEPS["gradient penalty, critic"][1]
    monkeypatch.setitem(second_order.STEPS, "tiny", (TINY_MODEL.build, penalty))
    monkeypatch.setitem(second_order.INPUTS, "tiny", TINY_MODEL.x_shape)
    monkeypatch.setattr(second_order, "CASES", [second_order.StepCase("tiny")])
    head = dataclasses.replace(steps.HEADS[-1], arguments=(8, 16), x_shape=(4, 8))
    monkeypatch.setattr(steps, "HEADS", [head])
    found = measured("steps", steps.main)
    assert len(found) == 3
    for line in found:
        assert {"plain", "eager", "ours"} <= line["seconds"].keys()
        assert line["conditions"]["processor"].keys() == line["seconds"].keys()


def test_models(measured, monkeypatch):
    """By the clock, and in a graph, in two precisions of what was checked once."""
    monkeypatch.setattr(models, "CASES", [models.ModelCase("tiny", "infer")])
    monkeypatch.setitem(MODELS, "tiny", TINY_MODEL)
    checked = []
    check = models.ModelRunner.check
    monkeypatch.setattr(models.ModelRunner, "check", lambda run: (checked.append(run), check(run)))
    found = measured("models", models.main)
    assert [line["case"]["precision"] for line in found] == ["own", "tf32"]
    assert len(checked) == 5
    for line in found:
        assert list(line["seconds"]) == ["plain", "eager", "ours", "grouped", "frozen"]
        assert list(line["conditions"]["CUDA graph"]) == ["plain", "eager", "ours", "grouped"]
        assert min(line["predicted"][name] for name in ("ours", "plain")) > 0


def test_facts(measured, monkeypatch):
    """Each dtype's product, in TF32 where it is asked for alone, and a launch, also in a graph."""
    asked = []

    def rate(device, dtype):
        asked.append((dtype, torch.get_float32_matmul_precision()))
        return 1e12

    monkeypatch.setattr(timing, "product_rate", rate)
    found = {line["fact"]: line for line in measured("facts", facts.main)}
    for name in ("bfloat16", "float16", "TF32", "float32"):
        line = found[f"{name} product, operations/s"]
        assert line["value"] == 1e12
        assert line["predicted"] > 1e13
    names = [torch.bfloat16, torch.float16, torch.float32, torch.float32]
    settings = ["highest", "highest", "high", "highest"]
    assert asked == list(zip(names, settings, strict=True))
    assert found["device"]["value"]["multiprocessors"] == 132
    assert found["launch in a graph, seconds"]["value"] >= 1e-4 / 200
    assert found["clocks before"]["value"] == {} or "clocks.sm" in found["clocks before"]["value"]
