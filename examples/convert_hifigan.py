"""Converts a HiFi-GAN vocoder, trains it a few steps on sound synthesised here beside the model as
PyTorch runs it, prints the time of a step of both and the difference of their losses, and folds it
for inference.

    python examples/convert_hifigan.py --steps 6
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

import wn_kernels

RATE = 16000  # samples a second
FRAMES = 32  # of the spectrogram, 256 samples each


class Run(NamedTuple):
    """The losses of a training's steps, and their seconds."""

    losses: list[float]
    seconds: list[float]


class Result(NamedTuple):
    """Both trainings, the layers that were folded, and what folding changed, relative."""

    eager: Run
    fused: Run
    folded: list[str]
    change: float


def sound(generator: torch.Generator) -> Tensor:
    """A chord of three decaying tones, `FRAMES * 256` samples in [-1, 1]."""
    t = torch.arange(FRAMES * 256) / RATE
    pitch = 110 * 2 ** (torch.rand((), generator=generator) * 2)
    tones = [torch.sin(2 * math.pi * pitch * ratio * t) for ratio in (1.0, 1.25, 1.5)]
    return torch.stack(tones).mean(0) * torch.exp(-3 * t)


def spectrogram(wave: Tensor, bands: int) -> Tensor:
    """The logarithm of the magnitudes of `bands` bands, `(frames, bands)`."""
    window = torch.hann_window(1024)
    magnitudes = torch.stft(wave, 1024, 256, window=window, return_complex=True).abs()
    pooled = nn.functional.adaptive_avg_pool1d(magnitudes.t()[:FRAMES], bands)
    return torch.log(pooled + 1e-5)


def train(model: nn.Module, steps: int) -> Run:
    """Adam on the distance of the spectra, from the same sounds for every model."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    bands = model.config.model_in_dim
    run = Run([], [])
    for _ in range(steps):
        wave = sound(generator)
        features = spectrogram(wave, bands)
        start = time.perf_counter()
        made = model(features)
        loss = (spectrogram(made[: len(wave)], bands) - features).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.seconds.append(time.perf_counter() - start)
        run.losses.append(loss.item())
    return run


def main(steps: int) -> Result:
    torch.manual_seed(0)
    eager = SpeechT5HifiGan(SpeechT5HifiGanConfig())
    eager.apply_weight_norm()
    fused = copy.deepcopy(eager)
    report = wn_kernels.fuse(fused)
    print(*str(report).splitlines()[:5], "...", str(report).splitlines()[-1], sep="\n")

    runs = [train(model, steps) for model in (eager, fused)]
    features = spectrogram(sound(torch.Generator().manual_seed(1)), 80)
    with torch.no_grad():
        before = fused(features)
        folded = wn_kernels.fold(fused)
        change = ((fused(features) - before).norm() / before.norm()).item()
    return Result(*runs, folded, change)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    result = main(parser.parse_args().steps)
    for name, run in (("PyTorch's weight norm", result.eager), ("fused", result.fused)):
        first, last = run.losses[0], run.losses[-1]
        print(f"{name:22} {min(run.seconds) * 1e3:6.0f} ms a step, loss {first:.4f} → {last:.4f}")
    pairs = zip(result.eager.losses, result.fused.losses, strict=True)
    print(f"largest difference of the losses: {max(abs(a - b) / a for a, b in pairs):.1e} relative")
    print(f"folded {len(result.folded)} layers; the output changed by {result.change:.1e} relative")
