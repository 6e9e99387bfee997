"""The examples are tests: what they show holds."""

import runpy
from pathlib import Path

import pytest
import torch

from tests.comparison import assert_matches, assert_same_bits

EXAMPLES = Path(__file__).parent.parent / "examples"
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
    path = Path(__file__).parent.parent / "examples" / "streaming_vocoder.py"
    result = runpy.run_path(str(path))["main"](chunks=8)
    assert [row.name for row in result.rows] == ["eager", "fused", "frozen", "folded"]
    for row in result.rows:
        assert row.error < 1e-5
        assert min(row.first, row.later, row.ratio) > 0
    assert result.followed
