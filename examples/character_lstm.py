"""Trains a character-level language model on the documentation that ships with Python, twice from
the same start: with PyTorch's weight norm, and fused. Prints both losses and, on unseen text, the
bits per character.

    python examples/character_lstm.py

The network is a weight-dropped LSTM (Merity et al., *Regularizing and Optimizing LSTM Language
Models*, 2018): every weight of the LSTM is weight-normed, and in training a part of each
hidden-to-hidden weight is zero, another one for every sequence.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections import Counter
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import wn_kernels

LAYERS, HIDDEN, EMBEDDING = 2, 128, 32
BATCH, LENGTH = 16, 64
DROPPED = 0.3


class Run(NamedTuple):
    """Holds the results of a training: the loss of every step in nats per character, the bits per
    character of unseen text, and the seconds of all steps."""

    losses: list[float]
    bits: float
    seconds: float


class WeightDrop(nn.Module):
    """A parametrization that zeroes a part of a weight in training. The rest is scaled, so that the
    mean stays.

    The mask is drawn beforehand: PyTorch reads a parametrized weight several times in a forward.
    """

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight))

    def draw(self, generator: torch.Generator) -> None:
        self.mask.bernoulli_(1 - DROPPED, generator=generator).div_(1 - DROPPED)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask if self.training else weight


class Network(nn.Module):
    """Predicts every next character."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.lstm = nn.LSTM(EMBEDDING, HIDDEN, LAYERS)
        self.output = nn.Linear(HIDDEN, characters)
        for name, weight in list(self.lstm.named_parameters()):
            if name.startswith("weight"):
                parametrizations.weight_norm(self.lstm, name)
            if name.startswith("weight_hh"):
                parametrize.register_parametrization(self.lstm, name, WeightDrop(weight.detach()))

    def forward(self, characters: Tensor) -> Tensor:
        return self.output(self.lstm(self.embedding(characters))[0])

    def loss(self, text: Tensor) -> Tensor:
        """Returns the cross entropy in nats per character of a text of shape `(steps, batch)`."""
        return F.cross_entropy(self(text[:-1]).flatten(0, 1), text[1:].flatten())


def data() -> tuple[Tensor, Tensor, int]:
    """Returns the text as numbers, its end as unseen text, and how many characters differ."""
    text = "".join(topics[name] for name in sorted(topics))[:200_000]
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}
    encoded = torch.tensor([numbers[character] for character in text])
    unseen = len(text) // 20
    return encoded[:-unseen], encoded[-unseen:], len(numbers)


def entropy(text: Tensor) -> float:
    """Returns the bits per character of a guess by the frequency of each character."""
    counts = Counter(text.tolist()).values()
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts)


def train(network: Network, text: Tensor, unseen: Tensor, steps: int, seed: int) -> Run:
    """Trains by Adam, on pieces of the text that are drawn from `seed`, as the masks are."""
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(LENGTH + 1).unsqueeze(1)
    drops = [module for module in network.modules() if isinstance(module, WeightDrop)]
    losses = []
    start = time.perf_counter()
    for _ in range(steps):
        for drop in drops:
            drop.draw(generator)
        first = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=generator)
        loss = network.loss(text[first + offsets])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    network.eval()
    rows = len(unseen) // (LENGTH + 1)
    with torch.no_grad():
        nats = network.loss(unseen[: rows * (LENGTH + 1)].view(rows, -1).t())
    return Run(losses, nats.item() / math.log(2), seconds)


def main(steps: int = 300, seed: int = 0) -> dict[str, Run]:
    """Trains both networks."""
    text, unseen, characters = data()
    torch.manual_seed(seed)
    eager = Network(characters)
    fused = copy.deepcopy(eager)
    print(wn_kernels.fuse(fused))
    networks = {"torch": eager, "wn_kernels": fused}
    return {name: train(net, text, unseen, steps, seed) for name, net in networks.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    runs = main(options.steps)
    for name, run in runs.items():
        print(
            f"{name:12} loss {run.losses[0]:.3f} to {run.losses[-1]:.3f}   "
            f"{run.bits:.3f} bits per unseen character   {run.seconds:.1f} s"
        )
    print(f"{entropy(data()[0]):.3f} bits if only the characters' frequencies were known")
    apart = [abs(a - b) / b for a, b in zip(*(run.losses for run in runs.values()), strict=True)]
    print(f"relative difference of the losses: {apart[0]:.1e} at first, {max(apart):.1e} at most")
