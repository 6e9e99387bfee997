"""The examples are tests: what they show holds."""

import runpy
from pathlib import Path

import pytest

digits = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "digits.py"))


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
    path = Path(__file__).parent.parent / "examples" / "character_lstm.py"
    example = runpy.run_path(str(path))
    runs = example["main"](steps=24)
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
    path = Path(__file__).parent.parent / "examples" / "convert_hifigan.py"
    result = runpy.run_path(str(path))["main"](steps=4)
    for a, b in zip(result.eager.losses, result.fused.losses, strict=True):
        assert abs(a - b) <= 1e-3 * a
    assert result.eager.losses[-1] < result.eager.losses[0]
    assert len(result.folded) == 78
    assert result.change < 1e-5
