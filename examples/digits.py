"""Trains a small network on scikit-learn's digits, twice from the same start: with `WNLinear`, and
with PyTorch's own weight norm. Prints both losses and accuracies, and draws them.

    python examples/digits.py --plot digits.png
"""

from __future__ import annotations

import argparse
import itertools
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from wn_kernels import WNLinear

SIZES = (64, 128, 64, 10)


class Run(NamedTuple):
    """What one network's training gave: the loss of every step, and the accuracy on unseen digits
    after each."""

    losses: list[float]
    accuracies: list[float]


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of 8 by 8 pixels and their digits: training inputs, test inputs, and the labels."""
    x, y = load_digits(return_X_y=True)
    split = train_test_split(x / 16.0, y, test_size=0.25, random_state=0, stratify=y)
    x_train, x_test, y_train, y_test = (torch.from_numpy(a) for a in split)
    return x_train.float(), x_test.float(), y_train, y_test


def networks(seed: int) -> dict[str, nn.Sequential]:
    """The two networks, from the same weights."""

    def build(layers: list[nn.Module]) -> nn.Sequential:
        parts: list[nn.Module] = []
        for layer in layers:
            parts += [layer, nn.ReLU(inplace=True)]
        return nn.Sequential(*parts[:-1])

    torch.manual_seed(seed)
    plain = [nn.Linear(k, n) for k, n in itertools.pairwise(SIZES)]
    fused = [WNLinear(layer.in_features, layer.out_features) for layer in plain]
    for ours, layer in zip(fused, plain, strict=True):
        ours.load_state_dict(layer.state_dict())
    eager = [nn.utils.parametrizations.weight_norm(layer) for layer in plain]
    return {"wn_kernels": build([*fused]), "torch": build([*eager])}


def train(network: nn.Module, steps: int, batch: int, seed: int) -> Run:
    """Plain SGD with momentum, over batches drawn from `seed`."""
    x_train, x_test, y_train, y_test = data()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    run = Run([], [])
    for _ in range(steps):
        chosen = torch.randint(len(x_train), (batch,), generator=generator)
        loss = nn.functional.cross_entropy(network(x_train[chosen]), y_train[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            right = network(x_test).argmax(1) == y_test
        run.losses.append(loss.item())
        run.accuracies.append(right.double().mean().item())
    return run


def plot(runs: dict[str, Run], path: str) -> None:
    """Both losses and both accuracies in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        left.plot(run.losses, style, label=name)
        right.plot(run.accuracies, style, label=name)
    left.set(title="training loss", xlabel="step", ylabel="cross entropy (nats)", yscale="log")
    right.set(title="accuracy on unseen digits", xlabel="step", ylabel="fraction right")
    left.legend()
    right.legend()
    figure.savefig(path)


def main(steps: int = 200, batch: int = 128, seed: int = 0) -> dict[str, Run]:
    """Trains both networks."""
    return {name: train(net, steps, batch, seed) for name, net in networks(seed).items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plot", default="digits.png", help="where the picture goes")
    options = parser.parse_args()
    runs = main(options.steps)
    for name, run in runs.items():
        print(f"{name:12} loss {run.losses[-1]:.6f}   accuracy {run.accuracies[-1]:.1%}")
    apart = max(abs(a - b) / b for a, b in zip(*(run.losses for run in runs.values()), strict=True))
    print(f"largest relative difference of the losses: {apart:.1e}")
    plot(runs, options.plot)
    print(f"drawn in {options.plot}")
