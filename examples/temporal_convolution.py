"""Trains a temporal convolutional network to predict the voltage of a nerve cell's membrane 4 ms
ahead, twice from the same start: with PyTorch's weight norm, and fused. You will see that both
learn alike, and how far they and two simpler predictions are off on the last fifth of the
recording, which none of them was fitted to. A picture shows a second of it.

    python examples/temporal_convolution.py --plot nerve_cell.png

The network is that of Bai, Kolter and Koltun, *An Empirical Evaluation of Generic Convolutional and
Recurrent Networks for Sequence Modeling*, 2018: residual blocks of two weight-normed convolutions,
which see the past alone and reach further back in each block. The recording ships with Matplotlib,
whose first logo it was.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import cbook
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import wn_kernels

INTERVAL = 0.5  # milliseconds between two samples
AHEAD = 8  # samples from the last that is seen to the one that is predicted
FITTED = 8000  # of the 10000 samples
HIDDEN, KERNEL, DILATIONS = 16, 3, (1, 2, 4, 8, 16)
REACH = 1 + 2 * (KERNEL - 1) * sum(DILATIONS)  # samples that a prediction depends on
BATCH, LENGTH = 8, 512


class Run(NamedTuple):
    """Holds the results of a training: the mean square error of every step in mV², the seconds of
    all steps, and the prediction of every sample from `AHEAD` on, in mV."""

    losses: list[float]
    seconds: float
    predicted: Tensor


class Causal(nn.Module):
    """A weight-normed convolution whose output depends on the past and the present alone."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.past = (KERNEL - 1) * dilation
        self.conv = weight_norm(nn.Conv1d(inputs, outputs, KERNEL, dilation=dilation))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x, (self.past, 0)))


class Block(nn.Module):
    """Two convolutions, and a way around them."""

    def __init__(self, inputs: int, dilation: int) -> None:
        super().__init__()
        first, second = Causal(inputs, HIDDEN, dilation), Causal(HIDDEN, HIDDEN, dilation)
        self.path = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.around = nn.Identity() if inputs == HIDDEN else nn.Conv1d(inputs, HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.path(x) + self.around(x))


class Network(nn.Module):
    """Predicts, at every sample of a series, the one that comes `AHEAD` samples later."""

    def __init__(self, series: Tensor) -> None:
        super().__init__()
        self.mean, self.deviation = series.mean(), series.std()
        widths = (1, *[HIDDEN] * (len(DILATIONS) - 1))
        self.change = nn.Sequential(*map(Block, widths, DILATIONS), nn.Conv1d(HIDDEN, 1, 1))

    def forward(self, series: Tensor) -> Tensor:
        """Takes and returns a series of shape `(..., samples)`, in mV."""
        x = (series - self.mean) / self.deviation
        return series + self.deviation * self.change(x.unsqueeze(-2)).squeeze(-2)


def recording() -> Tensor:
    """Returns the voltage in mV while the cell fires."""
    samples = np.fromfile(cbook.get_sample_data("membrane.dat", asfileobj=False), np.float32)
    return 100 * torch.from_numpy(samples[1000:11000])


def train(network: Network, series: Tensor, steps: int, seed: int) -> Run:
    """Trains by Adam, on pieces of the recording that are drawn from `seed`."""
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(LENGTH + AHEAD)
    losses = []
    start = time.perf_counter()
    for _ in range(steps):
        first = torch.randint(FITTED - len(offsets), (BATCH, 1), generator=generator)
        piece = series[first + offsets]
        error = network(piece[:, :-AHEAD]) - piece[:, AHEAD:]
        loss = error[:, REACH:].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        return Run(losses, seconds, network(series[:-AHEAD]))


def linear(series: Tensor) -> Tensor:
    """Returns what the best linear function of `REACH` samples and 1 predicts, by least squares."""
    windows = nn.functional.pad(series, (REACH - 1, 0)).unfold(0, REACH, 1)[:-AHEAD].double()
    features = nn.functional.pad(windows, (0, 1), value=1.0)
    fitted = slice(FITTED - AHEAD)
    weight = torch.linalg.lstsq(features[fitted], series[AHEAD:, None].double()[fitted]).solution
    return (features @ weight)[:, 0].float()


def unseen_error(predicted: Tensor, series: Tensor) -> float:
    """Returns the root mean square error in mV over the samples that nothing was fitted to."""
    return (predicted - series[AHEAD:])[FITTED - AHEAD :].square().mean().sqrt().item()


def plot(run: Run, series: Tensor, path: str) -> None:
    """Draws a second of what was not seen, and the predictions that were made of it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
    shown = torch.arange(FITTED, FITTED + 2000)
    seconds = (shown * INTERVAL / 1e3).numpy()
    axis.plot(seconds, series[shown], color="0.6", linewidth=3, label="measured")
    axis.plot(seconds, run.predicted[shown - AHEAD], linewidth=1, label="predicted 4 ms before")
    axis.set(xlabel="time (s)", ylabel="voltage (mV)", xlim=(seconds[0], seconds[-1]))
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=90)


def main(steps: int = 600, seed: int = 0) -> tuple[dict[str, Run], Tensor]:
    """Trains both networks, and returns the recording beside them."""
    series = recording()
    torch.manual_seed(seed)
    eager = Network(series[:FITTED])
    fused = copy.deepcopy(eager)
    print(wn_kernels.fuse(fused))
    networks = {"torch": eager, "wn_kernels": fused}
    return {name: train(net, series, steps, seed) for name, net in networks.items()}, series


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--plot", default="nerve_cell.png", help="where the picture goes")
    options = parser.parse_args()
    runs, series = main(options.steps)
    for name, run in runs.items():
        off = unseen_error(run.predicted, series)
        print(f"{name:12} is off by {off:5.2f} mV on what it did not see, {run.seconds:.1f} s")
    print(f"{'linear':12} is off by {unseen_error(linear(series), series):5.2f} mV")
    print(f"{'no change':12} is off by {unseen_error(series[:-AHEAD], series):5.2f} mV")
    apart = [abs(a - b) / b for a, b in zip(*(run.losses for run in runs.values()), strict=True)]
    print(f"relative difference of the losses: {max(apart[:20]):.1e} at most in the first 20 steps")
    plot(runs["wn_kernels"], series, options.plot)
    print(f"drawn in {options.plot}")
