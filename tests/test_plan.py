"""Which backend and which variant serves a call."""

import dataclasses
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import wn_kernels.functional as WF
from bench.cases import Case as BenchCase
from tests.comparison import Case
from wn_kernels import plan, use_backend
from wn_kernels.backends import tiles, vendor
from wn_kernels.call import NORMS, Call, Geometry
from wn_kernels.plan import backend, costs, devices, table

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


MATERIALIZE = ("materialize", "materialize", "")
WIDEN = ("widen", "widen", "")


def aten(m, k, n, dim=0, x=F32, v=F32):
    return plan.choose(Call(torch.Size((m, k)), torch.Size((n, k)), x, v, dim), "aten")


def triton(m, k, n, dim=0, x=BF16, v=BF16, norm="l2"):
    call = Call(torch.Size((m, k)), torch.Size((n, k)), x, v, dim, norm=norm)
    return plan.choose(call, "triton")


def test_aten_variants():
    """Small layers materialise, for fewer operations, and keep `W`, for a backward without Python;
    large ones scale, for fewer bytes, unless the batch outweighs the weight."""
    for side in (64, 512):
        assert aten(32, side, side)[2:] == ("materialize", "weight")
    assert aten(32, 64, 64).forward == "materialize"
    assert aten(32, 64, 64, x=F64, v=F64).keeps == "weight"
    assert aten(16, 4096, 4096)[1:] == ("scaled", "scaled", "product")
    assert aten(8192, 1024, 1024)[1:] == MATERIALIZE
    assert aten(512, 1024, 4096).forward == "scaled"
    assert not aten(512, 1024, 4096).keeps
    assert not aten(16, 4096, 4096, dim=1).keeps
    # Scaling after the matmul is for float32 and float64 alone.
    for x, v in ((BF16, F32), (F32, BF16)):
        assert aten(16, 4096, 4096, x=x, v=v)[1:] == MATERIALIZE
    # Forming W twice would take longer than eager does, where torch's own kernel forms it.
    for x, v in ((F16, F16), (BF16, BF16)):
        assert aten(16, 4096, 4096, x=x, v=v)[1:] == ("materialize", "materialize", "weight")
    assert aten(64, 512, 512, x=BF16, v=F32).keeps == "weight"
    # The range of bfloat16 is that of float32: the gradient of the output may be scaled.
    assert aten(16, 4096, 4096, dim=None, x=BF16, v=BF16)[1:] == MATERIALIZE
    assert aten(16, 4096, 4096, x=F64, v=F64).forward == "scaled"


def test_native_half_precision(monkeypatch):
    """oneDNN's products where there are any, without a `W` in bfloat16, and otherwise the library's
    own in float32, or PyTorch's for more rows; few rows by the library itself, where that saves
    forming `W`."""

    def native(m, k, n, x, v):
        call = Call(torch.Size((m, k)), torch.Size((n, k)), x, v, 0)
        return *plan.by_cost(call, "native")[1:], costs.is_own(call)

    monkeypatch.setattr(vendor, "SLOW", frozenset({F16}))
    assert native(1, 1024, 1024, BF16, BF16) == ("scaled", "scaled", "", True)
    assert native(16, 4096, 4096, BF16, BF16) == ("scaled", "scaled", "", False)
    assert native(8, 4096, 4096, BF16, F32) == ("scaled", "scaled", "", True)
    assert native(64, 4096, 4096, BF16, F32) == (*MATERIALIZE, False)
    for v in (F16, F32):
        for rows in (16, 64, 1024):
            assert native(rows, 4096, 4096, F16, v) == ("scaled", "scaled", "", True)
        assert native(8192, 4096, 4096, F16, v) == (*WIDEN, False)
        assert native(64, 256, 256, F16, v) == (*WIDEN, False)
    monkeypatch.setattr(vendor, "SLOW", frozenset({F16, BF16}))
    assert native(64, 4096, 4096, BF16, BF16) == ("scaled", "scaled", "", True)
    assert native(8192, 4096, 4096, BF16, BF16) == (*WIDEN, False)
    monkeypatch.setattr(vendor, "SLOW", frozenset())
    assert native(64, 4096, 4096, F16, F16) == (*MATERIALIZE, False)
    assert native(64, 4096, 4096, BF16, BF16) == ("scaled", "scaled", "", False)


def test_native_convolutions_in_half_precision(monkeypatch):
    """`W` is kept where it is small, in the dtype of the product; never one in float32."""
    call = Call(torch.Size((1, 256, 256)), torch.Size((256, 256, 3)), BF16, F32, 0)
    call = call._replace(conv=Geometry((1,), (1,), (1,), False, (0,), 1))
    for slow, kept in ((frozenset(), ("materialize", "materialize", "weight")), ({BF16}, WIDEN)):
        monkeypatch.setattr(vendor, "SLOW", frozenset(slow))
        assert plan.by_cost(call, "native")[1:] == kept
    solid = Geometry((1,) * 3, (1,) * 3, (1,) * 3, False, (0,) * 3, 1)
    call = Call(torch.Size((1, 8, 9, 9, 9)), torch.Size((8, 8, 3, 3, 3)), BF16, BF16, 0, solid)
    monkeypatch.setattr(vendor, "SLOW", frozenset())
    monkeypatch.setattr(vendor, "WRONG_IN_3D", frozenset())
    assert plan.by_cost(call, "native").keeps == plan.by_cost(call, "aten").keeps == "weight"
    monkeypatch.setattr(vendor, "WRONG_IN_3D", frozenset({BF16}))
    assert plan.by_cost(call, "native")[1:] == WIDEN
    assert not plan.by_cost(call, "aten").keeps


def test_triton_variants():
    """Few rows take one pass, and keep its product for the backward; more take the vendor's product
    scaled late; the largest materialise, as soon as passes over activations cost more than writing
    W."""
    for m in (1, 16, 128):
        assert triton(m, 4096, 4096)[1:] == ("one_pass", "product", "product")
    # A product of more than an eighth of V's bytes is not kept.
    assert triton(64, 511, 4096).keeps != "product" == triton(64, 512, 4096).keeps
    assert triton(512, 4096, 4096)[1:] == ("scaled", "product", "product")
    for dim in (0, 1, None):
        assert triton(1024, 4096, 4096, dim=dim)[1:3] == ("scaled", "scaled")
        assert triton(16384, 8192, 8192, dim=dim)[1:] == MATERIALIZE
    assert triton(16, 4096, 4096, dim=1)[1:3] == ("scaled", "one_pass")
    assert triton(16, 4096, 4096, dim=None)[1:3] == ("scaled", "scaled")
    # What must not be scaled late forms W, or scales in the accumulator.
    for x, v in ((F16, F16), (BF16, F32), (F16, F32)):
        assert triton(512, 4096, 4096, x=x, v=v)[1:3] == ("materialize", "materialize")
    assert triton(16, 4096, 4096, x=BF16, v=F32)[1:] == ("one_pass", "product", "product")
    for norm in NORMS:
        assert triton(16, 4096, 4096, norm=norm)[1:] == ("one_pass", "product", "product")
        assert triton(512, 4096, 4096, norm=norm)[1:] == ("scaled", "product", "product")
    assert triton(16, 4096, 4096, x=F16, v=F32)[1:3] == ("materialize", "one_pass")
    assert triton(tiles.one_pass_rows(8) + 1, 4096, 4096, x=F64, v=F64).forward != "one_pass"


def test_a_small_weight_is_kept():
    """Then a training step launches what eager PyTorch launches. One that is not small beside the
    input is not kept, and where another path is faster nothing is."""
    small = triton(512, 1024, 1024)
    assert small[1:] == ("materialize", "materialize", "weight")
    assert small.recorded == "materialize"
    assert not triton(1024, 4096, 4096).keeps
    assert triton(16, 1024, 1024).keeps == "product"
    assert triton(2**17, 4096, 4096)[1:] == ("materialize", "materialize", "weight")
    every = plan.choices(Call(torch.Size((16, 64)), torch.Size((64, 64)), BF16, BF16, 0), "triton")
    kept = {choice.forward for choice in every if choice.keeps}
    assert kept == {"one_pass", "scaled", "materialize"}, "a training step forms W all the same"
    assert {choice.backward for choice in every if choice.keeps} == {"materialize"}


def test_rows_fit_the_tiles_that_hold_all():
    configs = pytest.importorskip("wn_kernels.backends.triton.configs")
    for itemsize in (2, 4, 8):
        for m in range(1, tiles.one_pass_rows(itemsize, grad=True) + 1):
            assert m <= configs.grad_one_pass(m, 4096, itemsize, configs.target(-1)).BLOCK_M
        for m in range(1, tiles.walked_rows(itemsize) + 1):
            assert m <= configs.grads(m, 4096, 4096, itemsize, False, configs.target(-1)).BLOCK_M


def test_no_share_of_one_pass_is_empty():
    configs = pytest.importorskip("wn_kernels.backends.triton.configs")
    target, found = configs.target(-1), set()
    for m, o, r in itertools.product((1, 64, 128, 256), (70, 1024, 4096, 16384), (40, 1024, 5000)):
        config = configs.one_pass(m, o, r, 2, False, target)
        steps = tiles.blocks(r, config.BLOCK_R)
        assert tiles.blocks(steps, config.splits) * (config.splits - 1) < steps
        programs = tiles.blocks(m, config.BLOCK_M) * tiles.blocks(o, config.BLOCK_O)
        assert config.splits == 1 or config.splits * programs <= 2 * target.multiprocessors
        found.add(config.splits)
    assert {1, 2, 4} <= found


def test_the_model_counts_on_the_kernels_blocks():
    configs = pytest.importorskip("wn_kernels.backends.triton.configs")
    blocks = set()
    for m, o, size in ((1, 4096, 2), (16, 16384, 2), (64, 4096, 2), (64, 16384, 2), (32, 64, 4)):
        found = configs.grad_one_pass(m, o, size, configs.target(-1))
        assert tiles.grad_slices(m, o, size) == found.BLOCK_O
        blocks.add(found.BLOCK_O)
    assert blocks == {16, 64}
    for size, o, r in itertools.product((2, 4, 8), (70, 1024, 16384), (40, 4096)):
        found = configs.grads(16, o, r, size, False, configs.target(-1))
        steps = tiles.blocks(o, found.BLOCK_O)
        assert tiles.blocks(steps, found.splits) * (found.splits - 1) < steps, "a split is empty"


def test_forcing(monkeypatch):
    x = torch.randn(2, 3)
    assert plan.choose_backend(x) == "aten"
    with use_backend("reference"):
        assert plan.choose_backend(x) == "reference"
        with use_backend("auto"):
            assert plan.choose_backend(x) == "aten"
        assert plan.choose_backend(x) == "reference"
    assert plan.choose_backend(x) == "aten"
    message = r"use_backend names the backend 'cuda'; expected one of"
    with pytest.raises(ValueError, match=message), use_backend("cuda"):
        pass


def test_a_forced_backend_does_not_fall_back(monkeypatch):
    monkeypatch.setattr(backend, "triton_unavailable", lambda: "there is no GPU")
    case = Case(2, 3, 4, 0)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"forced.*there is no GPU"):
        WF.wn_linear(case.x, case.v, case.g)


def test_a_forced_backend_refuses_transforms():
    pytest.importorskip("triton")
    case = Case(2, 3, 4, 0)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"forced.*torch\.func"):
        torch.func.grad(lambda x: WF.wn_linear(x, case.v, case.g).sum())(case.x)


def test_a_compiled_backward_needs_a_node_in_python():
    """The native library's nodes launch Triton's kernels, unless a compiler traces the backward."""
    pytest.importorskip("triton")
    import torch._dynamo

    v = torch.randn(4, 3)
    assert plan.prepares(v) == "native"
    with use_backend("triton"):
        assert plan.prepares(v) == "triton"
        with torch._dynamo.config.patch(compiled_autograd=True):
            assert plan.prepares(v) == ""
            with torch.no_grad():
                assert plan.prepares(v) == "triton"
        assert plan.prepares(v) == "triton"


@pytest.mark.parametrize("dim", [0, 1, None])
def test_backward_runs_where_the_forward_did(dim, monkeypatch):
    """Also when `backward` is called outside the block, and on another thread."""
    launch = pytest.importorskip("wn_kernels.backends.triton.launch")
    case = Case(5, 12, 7, dim)
    leaves = [t.requires_grad_() for t in (case.x, case.v, case.g, case.bias)]
    with use_backend("triton"):
        y = WF.wn_linear(*leaves, dim=dim)
    calls = []
    real = launch.Launcher.__call__

    def record(self, *tensors):
        calls.append(threading.get_ident())
        return real(self, *tensors)

    monkeypatch.setattr(launch.Launcher, "__call__", record)
    worker = threading.Thread(target=lambda: y.backward(case.dy))
    worker.start()
    worker.join()
    assert set(calls) == {worker.ident}
    case.check_forward(y)
    case.check_backward([t.grad for t in leaves])


@pytest.mark.parametrize(
    ("value", "expected"),
    [("reference", "reference"), ("", "aten"), ("auto", "aten"), ("nonsense", "ValueError")],
)
def test_environment(value, expected, monkeypatch):
    monkeypatch.setenv(plan.ENVIRONMENT_VARIABLE, value)
    code = """
import torch
try:
    from wn_kernels import plan
    print(plan.choose_backend(torch.empty(0)))
except ValueError as error:
    print("ValueError", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(expected)


# --- convolutions --------------------------------------------------------------------------------


def conv1d(batch, inputs, outputs, length, taps, dim=0, *, up=0, x=F32, v=F32, backend="aten"):
    """The plan of a 1-d convolution, or with `up`, of a transposed one with that stride."""
    conv = Geometry((up or 1,), (taps // 2,), (1,), bool(up), (0,), 1)
    v_shape = (inputs, outputs, taps) if up else (outputs, inputs, taps)
    shapes = torch.Size((batch, inputs, length)), torch.Size(v_shape)
    last = backend == "triton, channels last"
    return plan.choose(Call(*shapes, x, v, dim, conv, last), backend.partition(",")[0])


def test_aten_convolutions():
    """Long signals materialise; wide layers over few pixels scale the side the scale belongs to."""
    assert conv1d(1, 64, 64, 4096, 3)[1:] == ("materialize", "materialize", "weight")
    assert conv1d(1, 256, 256, 64, 3).keeps  # too small to matter
    assert not conv1d(1, 512, 512, 256, 3).keeps
    assert conv1d(16, 512, 512, 4096, 3).keeps  # small beside the input
    assert conv1d(1, 1024, 512, 16, 16, up=8)[1:3] == ("input", "input")
    assert conv1d(1, 1024, 512, 16, 16, dim=1, up=8).forward == "output"
    assert conv1d(1, 1024, 1024, 16, 16).forward == "output"
    assert conv1d(1, 1024, 1024, 16, 16, dim=1)[1:3] == ("input", "input")
    assert conv1d(1, 1024, 256, 16, 16, dim=None).forward == "output"  # the smaller side
    # A scale along taps belongs to neither side; half precision scales before the product.
    assert conv1d(1, 1024, 1024, 16, 16, dim=2)[1:] == MATERIALIZE
    assert conv1d(1, 1024, 1024, 16, 16, x=BF16).forward == "materialize"


def test_triton_convolutions():
    half = {"x": BF16, "v": BF16}
    last = {**half, "backend": "triton, channels last"}
    first = {**half, "backend": "triton, channels first"}
    # Few pixels: a loop of few steps. Many: the vendor's rate.
    assert conv1d(1, 256, 256, 32, 3, **last)[1:3] == ("packed", "packed")
    assert conv1d(1, 256, 256, 32, 3, **first)[1:3] == ("packed", "packed")
    assert conv1d(16, 256, 256, 65536, 3, **last).forward == "materialize"
    assert conv1d(16, 256, 256, 65536, 3, **first)[1:3] == ("materialize", "materialize")
    # Without tensor cores our products are slow.
    assert conv1d(1, 256, 256, 512, 11, backend="triton").forward == "materialize"


# --- every GPU whose constants there are ---------------------------------------------------------


def linear_on(device, m, size=4096, dim=0, dtype=BF16):
    """Forward and backward variant of an m × size × size layer."""
    call = Call(torch.Size((m, size)), torch.Size((size, size)), dtype, dtype, dim)
    return costs.costs(call, "triton", device).cheapest()


@pytest.mark.parametrize("device", devices.GPUS.values(), ids=devices.GPUS)
def test_gpus(device):
    """The choices that follow from the kernels alone hold on every device."""
    for m in (1, 16):
        assert linear_on(device, m) == ("one_pass", "product")
        assert linear_on(device, m, dim=1)[0] == "scaled"
    assert linear_on(device, 16384, 8192) == ("materialize", "materialize")
    # Where all is overhead, the fewest launches win.
    for m, size, backward in ((1, 16, "product"), (32, 64, "one_pass"), (64, 128, "one_pass")):
        assert linear_on(device, m, size) == ("one_pass", backward)
    assert linear_on(device, 200, 64) == ("one_pass", "scaled")
    # Fewer bytes in a faster dtype, never slower.
    call = Call(torch.Size((512, 4096)), torch.Size((4096, 4096)), F32, F32, 0)
    wide = costs.costs(call, "triton", device)
    tf32 = costs.costs(call._replace(tf32=True), "triton", device)
    for name, stages in wide.forward.items():
        assert tf32.seconds(stages) <= wide.seconds(stages), name


def test_native_convolutions():
    """Large weights over few pixels unfold, and so do tiny layers, for one call of PyTorch's fewer;
    long signals do not, and what would take far more memory than the layer is no candidate."""
    for few in (
        conv1d(1, 512, 256, 32, 16, up=8, backend="native"),
        conv1d(1, 1024, 512, 16, 16, up=8, backend="native"),
        conv1d(1, 768, 768, 49, 31, dim=2, backend="native"),
        conv1d(1, 16, 16, 16, 3, backend="native"),
        conv1d(1, 644, 78, 19, 3, backend="native"),  # other plans take 1.24 of it
        conv1d(1, 504, 55, 25, 4, up=2, backend="native"),
    ):
        assert few[1:] == ("unfold", "unfold", "")
    for many in (
        conv1d(1, 64, 64, 4096, 3, backend="native"),
        conv1d(1, 256, 128, 640, 8, up=4, backend="native"),
        conv1d(1, 32, 32, 1024, 3, backend="native"),
        conv1d(16, 512, 512, 4096, 3, backend="native"),
    ):
        assert "unfold" not in many[1:3]
    conv = Geometry((1,), (5,), (1,), False, (0,), 1)
    call = Call(torch.Size((1, 128, 4096)), torch.Size((128, 128, 11)), F32, F32, 0, conv)
    assert "unfold" not in costs.costs(call, "native").forward
    # A depthwise layer would leave most of a tile empty.
    grouped = conv._replace(groups=768)
    call = Call(torch.Size((1, 768, 128)), torch.Size((768, 1, 11)), F32, F32, 0, grouped)
    assert "unfold" not in plan.choose(call, "native")[1:3]


@pytest.mark.parametrize("device", devices.GPUS.values(), ids=devices.GPUS)
def test_convolutions_on_gpus(device):
    """Ours for a few pixels, the vendor's for many, and one launch for depthwise layers whose
    channels lie last."""

    def forward(pixels, groups=1, channels_last=True):
        conv = Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), groups)
        shapes = (1, 256, pixels, pixels), (256, 256 // groups, 3, 3)
        call = Call(*map(torch.Size, shapes), BF16, BF16, 0, conv, channels_last)
        return costs.costs(call, "triton", device).cheapest()[0]

    assert forward(4) == "packed"
    assert forward(512) == "materialize"
    assert forward(16, 256) == "one_pass"
    assert forward(16, 256, channels_last=False) == "materialize"


def measured_convolutions():
    """What the first run on an H200 took for a convolution, by case: the call, and the seconds."""
    path = Path(__file__).parents[1] / "docs" / "results" / "gpu-h200" / "first.jsonl"
    for line in map(json.loads, path.read_text("utf-8").splitlines()):
        if line["kind"] != "result" or line["section"] != "conv" or "seconds" not in line:
            continue
        about = line["case"]
        if about["mode"] != "infer" or about["options"].get("padding_mode"):
            continue
        names = {field.name for field in dataclasses.fields(BenchCase)}
        case = BenchCase(**{key: value for key, value in about.items() if key in names})
        layer = case.layer(torch.device("meta"))
        conv = Geometry(
            *(tuple(getattr(layer, name)) for name in ("stride", "padding", "dilation")),
            "Transpose" in case.kind,
            tuple(layer.output_padding),
            layer.groups,
        )
        shapes = torch.Size(case.x_shape), layer.weight.shape
        call = Call(*shapes, BF16, BF16, case.dim, conv, case.channels_last)
        yield case, call, {name: s["median"] for name, s in line["seconds"].items()}


def test_the_vendors_convolutions_on_an_h200():
    """The model's estimate of cuDNN's call lies near what was measured, and below it for groups of
    many taps, which are far slower than anything else."""
    count = 0
    for case, call, seconds in measured_convolutions():
        found = costs.costs(call, "triton", devices.GPUS["H200"])
        estimate = found.seconds(found.forward["materialize"][1:])
        if call.conv.groups == 16:
            assert estimate < seconds["plain"], case.label
        else:
            assert 0.55 < estimate / seconds["plain"] < 1.25, (case.label, estimate)
        count += 1
    assert count >= 20


@pytest.mark.parametrize("device", devices.GPUS.values(), ids=devices.GPUS)
def test_gpus_of_data_sheets(device):
    """Bandwidths and rates lie between the slowest and the fastest of the generations, and a
    matmul of enough rows is bound by operations, one of few by bytes."""
    assert 1.5e12 < device.bandwidth < 1e13
    assert device.rates[0] > device.tf32_rate > device.rates[1] >= device.rates[2]
    balance = device.rates[0] / device.bandwidth  # operations a byte
    assert 100 < balance < 500


def test_the_gpu_at_hand(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, expected in {
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA B200": "B200",
        "AMD Instinct MI300X": "MI300X",
        "NVIDIA GeForce RTX 4090": "H100",
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device, name=name: name)
        assert devices.gpu().name == expected


def test_the_gpu_of_the_call(monkeypatch):
    """Two GPUs in one machine have costs and a place in the tuned table each, whichever is the
    current one when the first call comes."""
    names = {None: "NVIDIA H100", 0: "NVIDIA H100", 1: "NVIDIA A100"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda device=None: names[device and device.index]
    )
    shape = torch.Size((4096, 4096))
    call = Call(shape, shape, torch.bfloat16, torch.bfloat16, 0)
    for device, expected in ((None, "H100"), ("cuda:1", "A100"), ("cuda:0", "H100")):
        device = device and torch.device(device)
        assert devices.gpu(device).name == expected
        assert costs.costs(call._replace(device=device), "triton").device.name == expected
        assert f"; NVIDIA {expected};" in table.machine("triton", device)
    assert "interpreter" in table.machine("triton", torch.device("cpu"))


def test_what_takes_the_weight_of_a_group_on_a_gpu(monkeypatch):
    """With the native library, only layers whose own plans form a weight do. Without it, a launch
    of Python's costs more than a formed weight may."""
    geometry = Geometry((1,), (1,), (1,), False, (0,), 1)
    small, wide = (
        Call(torch.Size((1, n, size)), torch.Size((n, n, 3)), F32, F32, 0, geometry)
        for n, size in ((16, 64), (256, 3200))
    )
    row = Call(torch.Size((1, 4096)), torch.Size((4096, 4096)), F32, F32, 0)
    large = row._replace(x_shape=torch.Size((8192, 4096)))
    forwards = {small: "packed", wide: "materialize", row: "one_pass", large: "materialize"}
    picked = {call: plan.choose(call, "triton") for call in forwards}
    assert {call: each.forward for call, each in picked.items()} == forwards
    assert picked[large].backward == "materialize" != picked[wide].backward

    def taking(records):
        return {call for call, each in picked.items() if plan.shares(call, each, records)}

    assert taking(records=False) == {wide, large}
    assert taking(records=True) == {large}


@pytest.mark.parametrize("path", ["native", "aten"])
def test_no_layer_takes_the_weight_of_a_group_on_a_cpu(path):
    """A layer of its own finds its `W` in a cache. A weight that is there, as inside of
    `frozen_weights`, is used at any size."""
    geometry = Geometry((1,), (1,), (1,), False, (0,), 1)
    for n in (32, 128):
        call = Call(torch.Size((1, n, 4096)), torch.Size((n, n, 3)), F32, F32, 0, geometry)
        picked = plan.choose(call, path)
        assert picked.recorded == picked.backward == "materialize"
        assert not plan.shares(call, picked, True)
        assert not plan.shares(call, picked, False)
        assert plan.kept_out(call, picked, True) == "a group gains nothing on a CPU"
        assert plan.is_better_formed(call, picked, False)
