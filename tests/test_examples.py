"""The examples are tests: what they show holds."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.comparison import assert_matches, assert_same_bits

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
digits = runpy.run_path(str(EXAMPLES / "digits.py"))
compare = runpy.run_path(str(EXAMPLES / "compare_norms.py"))


@pytest.fixture(autouse=True)
def _same_number_of_threads():
    """The examples set it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs():
    return digits["main"](steps=200)


def test_digits_learns_as_pytorch_does(runs):
    """The loss curves agree to 1e-4 relative at every one of 200 steps, in float32."""
    ours, theirs = runs["wn_kernels"], runs["torch"]
    assert len(ours.losses) == 200
    for a, b in zip(ours.losses, theirs.losses, strict=True):
        assert abs(a - b) <= 1e-4 * abs(b)


def test_digits_learns(runs):
    for run in runs.values():
        assert run.losses[0] > 2
        assert run.accuracies[-1] > 0.95


def test_digits_is_drawn(runs, tmp_path):
    digits["plot"](runs, str(tmp_path / "digits.png"))
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_character_lstm_learns_as_pytorch_does():
    """The masks are the same, and the losses agree to 1e-3 relative over 24 steps of Adam."""
    runs = runpy.run_path(str(EXAMPLES / "character_lstm.py"))["main"](steps=24)
    for a, b in zip(runs["wn_kernels"].losses, runs["torch"].losses, strict=True):
        assert abs(a - b) <= 1e-3 * abs(b)
    for run in runs.values():
        assert run.losses[0] > 4
        assert run.losses[-1] < 3.4
        assert run.bits < 5.2


def test_convert_hifigan():
    """The losses agree to 1e-3 relative over four steps, whose size Adam gives even to a gradient
    that is all rounding, and folding changes nothing else."""
    pytest.importorskip("transformers")
    result = runpy.run_path(str(EXAMPLES / "convert_hifigan.py"))["main"](steps=4)
    for a, b in zip(result.eager.losses, result.fused.losses, strict=True):
        assert abs(a - b) <= 1e-3 * a
    assert result.eager.losses[-1] < result.eager.losses[0]
    assert len(result.folded) == 78
    assert result.change < 1e-5


@pytest.mark.parametrize("network", compare["NETWORKS"])
def test_compare_norms_starts_from_the_same_weights(network):
    x = compare["data"]()[0][:64]
    nets = {norm: compare["build"](network, norm, 3, x) for norm in compare["KINDS"]}
    first = 0 if network == "mlp" else 1
    weight = nets["none"][first].weight.detach()
    for norm, net in nets.items():
        if "data" not in norm:
            assert_matches(net[first].weight, weight.double(), torch.float32, 64, what=norm)
            assert (net[first].bias is None) == (
                norm.endswith("batch norm") or "BN" in norm or "layer" in norm
            )
    deviation = nets["WN, from data"](x).std(0, correction=0)
    assert_matches(deviation, torch.ones(10).double(), torch.float32, 64, roundings=16)
    same = nets["WN, from data, V = W"]
    assert_matches(
        same(x), nets["WN, from data"](x).detach().double(), torch.float32, 256, roundings=64
    )
    assert_matches(same[first].weight_v, same[first].weight.detach().double(), torch.float32, 64)


def test_compare_norms_trains():
    """A rate that is right learns, one that is far too large ends with a guess, twice the same."""
    Case, train = compare["Case"], compare["train"]
    run, again = (train(Case("mlp", "WN", 64, 0.1, 0), 60) for _ in range(2))
    assert_same_bits(torch.tensor(run.losses), torch.tensor(again.losses))
    assert run.losses[-1] < 0.5 * run.losses[0]
    lost = train(Case("mlp", "none", 64, 1e6, 0), 20)
    assert lost.losses[-1] != lost.losses[-1]
    assert lost.accuracy == 0.1


def test_compare_norms_shows_that_decay_of_v_is_a_learning_rate():
    runs = compare["decay_runs"](number=30)
    none, decayed, scheduled = (torch.tensor(run.losses).double() for run in runs.values())
    assert_matches(scheduled, decayed, torch.float64, 64, roundings=1e3)
    assert (none[5:] != decayed[5:]).all()
    assert runs["decay of V"].norms[-1] < runs["no decay of V"].norms[-1]


def test_compare_norms_is_written(tmp_path):
    """Pictures and a table, from runs whose accuracies are known."""
    Case, Run, rates = compare["Case"], compare["Run"], compare["RATES"]
    runs = {
        Case(network, norm, batch, rate, seed): Run([2.0, 1.0, *[0.5] * 20], accuracy - seed / 100)
        for network, batch in compare["STEPS"]
        for norm in compare["KINDS"]
        for rate, accuracy in zip(rates, (0.5, 0.8, 0.92, 0.97, 0.95, 0.1, 0.1), strict=True)
        for seed in (0, 1)
    }
    times = dict.fromkeys([(n, k) for n in compare["NETWORKS"] for k in compare["KINDS"]], 2.0)
    (tmp_path / "training.md").write_text("\n".join(["before", *compare["MARKS"], "after"]))
    decays = {name: compare["Decay"]([1.0] * 20, [1.0] * 20) for name in "abc"}
    compare["write"](tmp_path, compare["summarise"](runs), times, decays)
    page = (tmp_path / "training.md").read_text()
    assert page.startswith("before")
    assert page.endswith("after")
    assert "| perceptron, 64 | WN | 0.965 ± 0.007 | 0.032 | 3 of 7 | 1.00 |" in page
    assert len(list((tmp_path / "images").iterdir())) == 4


def test_streaming_vocoder():
    """Chunk by chunk, every way to run the model makes the sound of the whole spectrogram, and the
    frozen model follows an optimizer."""
    pytest.importorskip("transformers")
    result = runpy.run_path(str(EXAMPLES / "streaming_vocoder.py"))["main"](chunks=8)
    assert [row.name for row in result.rows] == ["eager", "fused", "frozen", "folded"]
    for row in result.rows:
        assert row.error < 1e-5
        assert min(row.first, row.later, row.ratio) > 0
    assert result.followed


def assert_start_alike(runs):
    """The losses agree to 1e-4 relative in the first 20 steps. Rounding grows from step to step."""
    ours, theirs = runs["wn_kernels"].losses[:20], runs["torch"].losses[:20]
    assert len(ours) == len(theirs) == 20
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a - b) <= 1e-4 * abs(b)


def test_temporal_convolution(tmp_path):
    """After 50 steps it already predicts better than the best linear function of the same past."""
    example = runpy.run_path(str(EXAMPLES / "temporal_convolution.py"))
    runs, series = example["main"](steps=50)
    assert_start_alike(runs)
    error = example["unseen_error"]
    linear, still = error(example["linear"](series), series), error(series[:-8], series)
    for run in runs.values():
        assert 1 < error(run.predicted, series) < linear < still
    example["plot"](runs["wn_kernels"], series, str(tmp_path / "nerve_cell.png"))
    assert (tmp_path / "nerve_cell.png").stat().st_size > 10_000


def test_temporal_convolution_does_not_see_ahead():
    """A prediction depends on the `REACH` samples up to its own time, and on no other."""
    example = runpy.run_path(str(EXAMPLES / "temporal_convolution.py"))
    series = example["recording"]()[:400].clone().requires_grad_()
    example["Network"](series.detach())(series)[300].backward()
    seen = series.grad.nonzero()
    assert 300 - example["REACH"] < seen.min() < 200
    assert seen.max() == 300


def test_signed_distance(tmp_path):
    example = runpy.run_path(str(EXAMPLES / "signed_distance.py"))
    runs, exact = example["main"](steps=200)
    assert_start_alike(runs)
    for run in runs.values():
        assert run.losses[-1] < run.losses[0] / 4
        assert (run.distances - exact).abs().mean() < 0.04 < exact.abs().mean() / 3
        assert ((run.distances < 0) == (exact < 0)).double().mean() > 0.95
    example["plot"](runs["wn_kernels"].distances, exact, str(tmp_path / "ampersand.png"))
    assert (tmp_path / "ampersand.png").stat().st_size > 10_000


def test_signed_distance_of_the_outline():
    """A small step along the normal is that far outside, and back that far inside."""
    shape = runpy.run_path(str(EXAMPLES / "signed_distance.py"))["outline"]()
    middle = (shape.begin + shape.end) / 2
    long = (shape.end - shape.begin).norm(dim=1) > 0.02
    for step in (0.005, -0.005):
        found = shape.distance(middle + step * shape.normals)[long]
        assert_matches(
            found, torch.full_like(found, step).double(), torch.float32, 64, roundings=64
        )


def test_wgan_gp(tmp_path):
    example = runpy.run_path(str(EXAMPLES / "wgan_gp.py"))
    runs = example["main"](steps=30, compared=4)
    run = runs["wn_kernels"]
    assert_start_alike(runs)
    lengths = torch.tensor(run.lengths)
    assert lengths[0] < 0.5
    assert (lengths[-20:] - 1).abs().max() < 0.2
    assert max(run.estimates) > 1.3 * run.estimates[-1]
    example["plot"](run, str(tmp_path / "generated_digits.png"))
    assert (tmp_path / "generated_digits.png").stat().st_size > 10_000


def test_distributed():
    """Two processes and one train alike, and FSDP2 gives each half of the numbers."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(EXAMPLES / "distributed.py"), "--steps", "10"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^(\w+) +([\d.]+) to ([\d.]+) +(\S+) +(\S+) +(\d+), (\d+)$", done.stdout, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["DDP", "FSDP2"]
    for _, first, last, losses, weights, *held in rows:
        assert 2.2 < float(first) < 2.4
        assert float(last) < float(first)
        assert 0 <= float(losses) < 1e-6
        assert 0 < float(weights) < 1e-5
        assert held[0] == held[1]
    assert int(rows[0][-1]) == 2 * int(rows[1][-1]) == 38404


def test_every_example_is_on_the_page():
    page = (ROOT / "docs" / "examples.md").read_text("utf-8")
    for example in EXAMPLES.glob("*.py"):
        assert f"## `{example.name}`" in page
        assert f"examples/{example.name}" in page
