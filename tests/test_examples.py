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
