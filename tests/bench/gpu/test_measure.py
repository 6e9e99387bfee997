"""What the sections do on a GPU, on tensors of the CPU: kernels are interpreted, values compared,
and graphs captured and replayed by stand-ins for PyTorch's."""

import contextlib
import importlib.util
import time
import types

import pytest
import torch

import wn_kernels
from bench import timing
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
    sweep,
    weight_norm,
)
from bench.models import MODELS
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
    monkeypatch.setattr(timing, "FEW_SETS", 2)

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
            paths.add("ours: materialize, keeps the weight")
        chosen = dict(zip(("infer", "train"), line["chosen"].split("/"), strict=True))
        assert {*line["seconds"], f"ours: {chosen[line['case']['mode']]}"} == paths
        assert line["predicted"].keys() == line["seconds"].keys()
        assert all(sets >= 1 for sets in line["sets"].values())
        kernels = {one["kernel"].split()[0] for one in line["kernels"]}
        assert {"one_pass_kernel", "weight_kernel"} <= kernels
        assert {"ours/eager", "ours/plain"} <= line["ratios"].keys()
    assert any(one["kernel"].startswith("grad_one_pass_kernel") for one in train["kernels"])


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
    cases = [weight_norm.Norm((16, 40), 0, "float32", mode) for mode in weight_norm.MODES] + [
        weight_norm.Norm((6, 4, 16), 2, "bfloat16", mode) for mode in weight_norm.MODES
    ]
    monkeypatch.setattr(weight_norm, "CASES", cases)
    for large in (1 << 26, 10):
        monkeypatch.setattr(weight_norm, "LARGE", large)
        found = measured("weight_norm", weight_norm.main)
    assert len(found) == 8
    assert all(list(line["seconds"]) == ["plain", "eager", "ours"] for line in found)


def test_a_wrong_weight_is_found(monkeypatch):
    case = weight_norm.Norm((16, 40), 0, "float32", "forward")
    run = weight_norm.NormRunner(case, "ours", weight_norm.Operands.of(case, CPU))
    run.check()
    monkeypatch.setattr(weight_norm.WF, "weight_norm", lambda v, g, dim: 1.01 * v)
    with pytest.raises(AssertionError, match="ours is wrong"):
        run.check()


def test_sweep(measured, monkeypatch):
    """Some sixty configurations, of which the shipped one is another."""
    real = sweep.sweeps()
    assert 40 <= sum(len(one.configs) for one in real) <= 75
    small = [
        sweep.Sweep(one.label, min(one.m, 16), 64, 32, one.configs[:2], one.call, one.reads_dw)
        for one in real
    ]
    monkeypatch.setattr(sweep, "sweeps", lambda: small)
    found = measured("sweep", sweep.main)
    assert [line["case"]["label"] for line in found] == [one.label for one in real]
    for line in found:
        assert len(line["seconds"]) == 3
        assert next(iter(line["seconds"])) == "shipped"
        assert line["predicted"]["shipped"] > 0


def test_host(measured, monkeypatch):
    monkeypatch.setattr(host.overhead, "CASES", host.overhead.CASES[:2])
    infer, train = measured("host", host.main)
    for line in (infer, train):
        assert list(line["seconds"]) == list(host.NAMES)
    assert train["predicted"]["ours"] > infer["predicted"]["ours"] > 0


def test_models(measured, monkeypatch):
    """By the clock, and in a graph."""
    cases = [models.Case("critic", "infer", "own")]
    monkeypatch.setattr(models, "CASES", cases)
    small = MODELS["critic"]._replace(x_shape=(1, 1, 28, 28))
    monkeypatch.setitem(MODELS, "critic", small)
    (line,) = measured("models", models.main)
    assert list(line["seconds"]) == list(models.NAMES)
    assert list(line["conditions"]["CUDA graph"]) == list(models.NAMES)
    assert line["predicted"]["ours"] > line["predicted"]["plain"] > 0


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
