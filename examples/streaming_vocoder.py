"""Feeds a HiFi-GAN vocoder chunk by chunk, as a speech synthesis that answers at once does. You
will see what the first chunk and each later one take, in a row for each way to run the same model:

    eager     PyTorch's weight norm, which computes all 78 weights for every chunk
    fused     `wn_kernels.fuse(model)`, which computes them faster, or not at all
    frozen    the fused model inside `wn_kernels.frozen_weights(model)`: weights are computed for
              the first chunk alone, and again where a parameter has changed
    folded    `wn_kernels.fold(model)`: plain weights, and no way back to `g` and `v`

All of them make the same sound, that of the whole spectrogram. The frozen model takes what the
folded one takes, and can still be trained: after a step of an optimizer between two chunks, the
next chunk comes from the new weights.

    python examples/streaming_vocoder.py --chunks 16

It needs the extra `models`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

import wn_kernels

HOP = 256  # samples of a frame of the spectrogram
FRAMES = 8  # frames of a chunk, 128 ms of sound at 16 kHz
CONTEXT = 24  # frames on each side, beyond which the model sees nothing that is heard


class Row(NamedTuple):
    """Holds the results of one way to run the model: its milliseconds for the first chunk and, as
    the median, for each later one, the ratio of that to the folded model's, and how far its sound
    is from that of the whole spectrogram."""

    name: str
    first: float
    later: float
    ratio: float
    error: float


class Result(NamedTuple):
    """Holds the rows, and whether the frozen model followed a step of an optimizer."""

    rows: list[Row]
    followed: bool


def vocoder() -> nn.Module:
    """Returns HiFi-GAN of the smaller size V2, with PyTorch's weight norm and random weights."""
    torch.manual_seed(0)
    model = SpeechT5HifiGan(SpeechT5HifiGanConfig(upsample_initial_channel=128))
    model.apply_weight_norm()
    return model.eval()


def windows(features: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Yields the frames that each chunk is made from, with their neighbours, and the samples of the
    result that are the chunk's."""
    for start in range(0, len(features), FRAMES):
        begin = max(0, start - CONTEXT)
        window = features[begin : start + FRAMES + CONTEXT]
        offset = (start - begin) * HOP
        yield window, slice(offset, offset + FRAMES * HOP)


def spectrogram(chunks: int) -> Tensor:
    """Returns the logarithm of a spectrogram of 80 bands, in which a tone glides upward."""
    frames, bands = torch.arange(chunks * FRAMES)[:, None], torch.arange(80)
    return -5 + 4 * torch.exp(-((bands - frames / 2 % 80) ** 2) / 18)


def stream(models: dict[str, nn.Module], features: Tensor) -> dict[str, tuple[Tensor, list[float]]]:
    """Returns the sound of each model and the seconds of each chunk. The models take turns, so that
    what else the machine does meets all of them."""
    sounds: dict[str, list[Tensor]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for window, own in windows(features):
        for name, model in models.items():
            begin = time.perf_counter()
            sound = model(window)[own]
            seconds[name].append(time.perf_counter() - begin)
            sounds[name].append(sound)
    return {name: (torch.cat(sounds[name]), seconds[name]) for name in models}


def follows(model: nn.Module, window: Tensor) -> bool:
    """Returns whether the next chunk comes from the new weights after a step between two chunks."""
    with torch.no_grad():
        before = model(window)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torch.enable_grad():
        model(window).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        after, expected = model(window), copy.deepcopy(model)(window)
    is_new = (after - before).abs().max() > 0
    return bool(is_new and (after - expected).norm() <= 1e-5 * expected.norm())


def main(chunks: int) -> Result:
    eager = vocoder()
    models = {name: copy.deepcopy(eager) for name in ("eager", "fused", "frozen", "folded")}
    wn_kernels.fuse(models["fused"])
    wn_kernels.fuse(models["frozen"])
    wn_kernels.fold(models["folded"])
    features = spectrogram(chunks)
    for model in models.values():  # does what is done once, but keeps no weight
        with torch.no_grad():
            model(features[:FRAMES])

    with wn_kernels.frozen_weights(models["frozen"]):
        with torch.no_grad():
            whole = models["folded"](features)
            streamed = stream(models, features)
        followed = follows(models["frozen"], features[:FRAMES])

    later = {name: statistics.median(seconds[1:]) for name, (_, seconds) in streamed.items()}
    rows = []
    for name, (sound, seconds) in streamed.items():
        pairs = zip(seconds[1:], streamed["folded"][1][1:], strict=True)
        ratio = statistics.median(own / folded for own, folded in pairs)
        error = ((sound - whole).norm() / whole.norm()).item()
        rows.append(Row(name, seconds[0] * 1e3, later[name] * 1e3, ratio, error))
    return Result(rows, followed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=16)
    result = main(parser.parse_args().chunks)
    print(f"{'':8}{'first chunk':>13}{'later chunks':>14}{'over folded':>13}{'off the whole':>15}")
    for row in result.rows:
        times = f"{row.first:10.1f} ms{row.later:11.1f} ms"
        print(f"{row.name:8}{times}{row.ratio:13.2f}{row.error:15.0e}")
    print("after an optimizer's step, the frozen model's next chunk is", end=" ")
    print("the new one" if result.followed else "the old one")
