"""The rates of a processor: measured, stored, and what they change."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

import wn_kernels
from tests.comparison import is_close
from tests.test_plan import conv1d
from wn_kernels import WNLinear, calibration, plan, prepare
from wn_kernels.__main__ import info
from wn_kernels.backends import native, vendor
from wn_kernels.call import Call
from wn_kernels.plan import costs, devices, rates
from wn_kernels.plan.rates import REFERENCE


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """The path of a file of rates of this test's, forgotten afterwards."""
    path = tmp_path / "cache" / "rates.json"
    monkeypatch.setenv(rates.VARIABLE, str(path))
    forget()
    mask = os.umask(0o022)
    yield path
    os.umask(mask)
    monkeypatch.undo()
    forget()


def forget():
    rates.find.cache_clear()
    prepare.forget()


def test_measured_once_and_stored(file, monkeypatch):
    native.build()
    monkeypatch.setattr(calibration, "SECONDS", 0.01)
    threads = torch.get_num_threads()
    with torch.device("meta"):  # it is the processor that is measured, not the default device
        found = calibration.ensure()
    assert torch.get_num_threads() == threads
    assert found is not None
    # No processor is so far from the one of the constants.
    for ours, theirs in zip(found, REFERENCE, strict=True):
        assert 1 / 50 < ours / theirs < 50
    assert json.loads(file.read_text())[rates.machine()]["rates"] == found._asdict()
    monkeypatch.setattr(calibration, "measure", lambda: pytest.fail("measured again"))
    forget()
    assert calibration.ensure() == found
    shown = wn_kernels.explain(WNLinear(64, 32), (3, 64))
    assert "constants of CPU as measured" in shown
    assert f"Rates of this CPU: {found}." in shown
    assert f"rates of the cpu: {found}\n  their file: {file}\n" in info()


def test_without_a_library_nothing_is_measured(file, monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda: "it was not built")
    assert calibration.ensure() is None
    assert not file.exists()
    assert "none measured" in info()


def test_an_empty_variable_switches_them_off(monkeypatch):
    monkeypatch.setenv(rates.VARIABLE, "")
    native.build()
    assert calibration.ensure() is None
    assert rates.find() is None
    assert f"rates of the cpu: none, by {rates.VARIABLE}" in info()


def test_tune_measures_first(file, own_table, monkeypatch):
    native.build()
    monkeypatch.setattr(calibration, "measure", lambda: REFERENCE)
    wn_kernels.tune(WNLinear(4, 3), torch.ones(2, 4), seconds=0.01)
    assert file.exists()
    assert rates.find() == REFERENCE


def test_the_processor_of_the_constants(file):
    """There, rates change nothing but the name."""
    assert devices.cpu() == devices.CPU
    assert devices.native() == devices.NATIVE
    rates.store(REFERENCE)
    for constants, device in ((devices.CPU, devices.cpu()), (devices.NATIVE, devices.native())):
        assert device.name == "CPU as measured"
        for field, expected in vars(constants).items():
            found = getattr(device, field)
            if field == "rates":
                assert all(map(is_close, found, expected))
            elif isinstance(expected, float):
                assert is_close(found, expected), field
            elif field != "name":
                assert found == expected, field


SLOW_OWN = REFERENCE._replace(packed=REFERENCE.packed / 2.5)
SLOW_FEW = REFERENCE._replace(few=REFERENCE.few / 2.5)
# A Zen 5, as measured: oneDNN has twice the rate of MKL there.
ZEN5 = REFERENCE._replace(product=1.07e11, few=9.1e10, packed=2.28e11, convolution=2.09e11)
QUICK_CALLS = REFERENCE._replace(call=REFERENCE.call / 8)


def test_what_they_decide(file):
    """A pick follows the product that is the faster on a processor, and what a call takes there."""
    few, tiny = (1, 128, 128, 16, 3), (1, 8, 8, 16, 3)
    assert conv1d(*few, backend="native").forward == "unfold"
    assert conv1d(*tiny, backend="native").forward == "unfold"
    rates.store(SLOW_OWN)
    assert conv1d(*few, backend="native").forward != "unfold"
    rates.store(SLOW_FEW)
    assert conv1d(*few, backend="native").forward == "unfold"
    slow = devices.native()
    of_vocoder = (1, 256, 256, 256, 11)  # where unfolding took twice as long
    rates.store(ZEN5._replace(convolution=REFERENCE.convolution * 1.07 / 0.96))
    assert conv1d(*of_vocoder, backend="native").forward == "unfold"
    rates.store(ZEN5)
    assert conv1d(*of_vocoder, backend="native").forward != "unfold"
    rates.store(QUICK_CALLS)
    quick = devices.native()
    assert is_close(quick.overhead, devices.NATIVE.overhead / 8)
    assert is_close(slow.few, 1 / 2.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_what_the_rates_of_half_precision_decide(file, monkeypatch, dtype, is_mixed):
    """The library's own products serve as many rows as it is faster for than oneDNN."""
    monkeypatch.setattr(vendor, "SLOW", frozenset())

    def picked(rate):
        rates.store(REFERENCE._replace(**{str(dtype).removeprefix("torch."): rate}))
        prepare.forget()
        of_v = torch.float32 if is_mixed else dtype
        call = Call(torch.Size((64, 1024)), torch.Size((1024, 1024)), dtype, of_v, 0)
        return plan.by_cost(call, "native").forward == "scaled" and costs.is_own(call)

    assert picked(REFERENCE.product)
    assert not picked(20 * REFERENCE.product)  # that of AMX


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"memory": 1.0},
        REFERENCE._replace(packed=math.nan)._asdict(),
        REFERENCE._replace(call=0.0)._asdict(),
        REFERENCE._replace(few="fast")._asdict(),
        {**REFERENCE._asdict(), "more": 1.0},
    ],
)
def test_an_entry_that_is_wrong_is_ignored(file, entry):
    file.parent.mkdir()
    file.write_text(json.dumps({rates.machine(): {"rates": entry}}))
    assert rates.find() is None
    assert devices.cpu() is devices.CPU


def test_a_broken_file_is_ignored_and_replaced(file):
    file.parent.mkdir()
    file.write_text("{")
    with pytest.warns(UserWarning, match="the file of rates .* is ignored"):
        assert rates.find() is None
    with pytest.warns(UserWarning, match="the file of rates .* is ignored"):
        rates.store(REFERENCE)
    assert rates.find() == REFERENCE
    assert file.with_name("rates.json.unreadable").read_text() == "{"


def test_other_machines_have_their_own(file, monkeypatch):
    rates.store(REFERENCE)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2_OTHER")
    rates.find.cache_clear()
    assert rates.find() is None


def test_build_measures(file):
    """The command, whose output is the library's path alone."""
    native.build()
    run = subprocess.run(
        [sys.executable, "-m", "wn_kernels", "build"], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"{native.location()}\n"
    assert f"rates of the cpu: {rates.find()}" in run.stderr


def test_measured_far_off_counts_within_limits(file):
    rates.store(REFERENCE._replace(few=REFERENCE.few * 1e6, packed=1.0, memory=1.0))
    device = devices.native()
    assert is_close(device.few, 3.0)
    assert is_close(device.own, 1 / 3.0)
    assert is_close(device.bandwidth, devices.NATIVE.bandwidth / 64)
