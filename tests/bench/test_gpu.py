"""A GPU at hand: the steps, and what is said of them."""

import pytest
import torch

from bench import cli, gpu


def test_gpu_without_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["gpu"]) == 1
    assert "there is no GPU here" in capsys.readouterr().out


def test_gpu_says_what_failed(monkeypatch, capsys):
    """Every step runs, whatever became of those before it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    steps = [
        gpu.Step("fails", ("-c", "raise SystemExit(3)"), 60),
        gpu.Step("hangs", ("-c", "import time; time.sleep(60)"), 0.5),
        gpu.Step("passes", ("-c", "pass"), 60),
    ]
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert gpu.main() == 1
    out = " ".join(capsys.readouterr().out.split())
    for said in ("exit code 3", "not done after 0 s", "passed"):
        assert said in out
    monkeypatch.setattr(gpu, "STEPS", steps[2:])
    assert gpu.main() == 0
    assert sum(step.limit for step in gpu.STEPS) <= 900


def test_the_steps_of_a_gpu_are_commands():
    """Each names a command that there is, and fifteen minutes hold them all."""
    assert sum(step.limit for step in gpu.STEPS) <= 900
    for step in gpu.STEPS:
        if step.arguments[1] == "bench":
            parsed = [*step.arguments[2:3], "--help"]
            with pytest.raises(SystemExit, match="0"):
                cli.main(parsed)
    net, x = gpu.layers()
    assert net(x).shape == (16, 1024)
