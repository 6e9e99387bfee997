"""Trains a generator of digits against a critic with a gradient penalty, fused, and the first steps
again with PyTorch's weight norm from the same start. You will see that both give the same losses,
that the length of the critic's gradient comes near one, which is what the penalty is for, and that
the critic's estimate of the distance between real and generated digits falls after the first steps.
A picture shows generated digits beside real ones.

    python examples/wgan_gp.py --plot generated_digits.png

The losses are those of Gulrajani et al., *Improved Training of Wasserstein GANs*, 2017. The penalty
is on a gradient, so its own gradient takes second derivatives of every layer of the critic. The
digits are those of scikit-learn.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import wn_kernels

NOISE, HIDDEN, PIXELS = 16, 128, 64
BATCH = 64
CRITIC_STEPS = 5  # for each step of the generator
PENALTY = 10.0
ROWS, COLUMNS = 5, 8  # of the picture


class Run(NamedTuple):
    """Holds the results of a training: for each step of the critic its loss, its estimate of the
    distance and the mean length of its gradient; the seconds of all steps; and digits that were
    generated at the end, of shape `(digits, 64)`."""

    losses: list[float]
    estimates: list[float]
    lengths: list[float]
    seconds: float
    generated: Tensor


class Networks(nn.Module):
    """The generator and the critic, with PyTorch's weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = perceptron((NOISE, HIDDEN, HIDDEN, PIXELS)).append(nn.Tanh())
        self.critic = perceptron((PIXELS, HIDDEN, HIDDEN, 1))


def perceptron(sizes: tuple[int, ...]) -> nn.Sequential:
    layers = [weight_norm(nn.Linear(k, n)) for k, n in itertools.pairwise(sizes)]
    parts = [part for layer in layers for part in (layer, nn.LeakyReLU(0.2))]
    return nn.Sequential(*parts[:-1])


def real_digits() -> Tensor:
    """Returns images of 8 by 8 pixels in [-1, 1], of shape `(1797, 64)`."""
    return torch.from_numpy(load_digits().data / 8 - 1).float()


def train(networks: Networks, steps: int, seed: int) -> Run:
    """Trains both networks by Adam, from noise and real digits that are drawn from `seed`."""
    generator, critic, real_ones = networks.generator, networks.critic, real_digits()
    draw = torch.Generator().manual_seed(seed)
    optimizers = [
        torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.9)) for net in (generator, critic)
    ]
    run = Run([], [], [], 0.0, torch.empty(0))

    def generate(number: int = BATCH) -> Tensor:
        return generator(torch.randn(number, NOISE, generator=draw))

    def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    start = time.perf_counter()
    for _ in range(steps):
        for _ in range(CRITIC_STEPS):
            real = real_ones[torch.randint(len(real_ones), (BATCH,), generator=draw)]
            with torch.no_grad():
                generated = generate()
            between = torch.lerp(generated, real, torch.rand(BATCH, 1, generator=draw))
            between.requires_grad_()
            (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            length = gradient.norm(dim=1)
            estimate = critic(real).mean() - critic(generated).mean()
            loss = PENALTY * (length - 1).square().mean() - estimate
            step(optimizers[1], loss)
            run.losses.append(loss.item())
            run.estimates.append(estimate.item())
            run.lengths.append(length.mean().item())
        step(optimizers[0], -critic(generate()).mean())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        return run._replace(seconds=seconds, generated=generate(ROWS * COLUMNS))


def plot(run: Run, path: str) -> None:
    """Draws real and generated digits, and the critic's estimate of their distance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 2.5), layout="constrained")
    sheets = {"real": real_digits()[: ROWS * COLUMNS], "generated": run.generated}
    for axis, (title, digits) in zip(axes, sheets.items(), strict=False):
        framed = nn.functional.pad(digits.view(ROWS, COLUMNS, 8, 8), (1, 1, 1, 1), value=-1)
        axis.imshow(framed.transpose(1, 2).flatten(2).flatten(0, 1).numpy(), cmap="gray_r")
        axis.set(title=title, xticks=(), yticks=())
    axes[2].plot(torch.tensor(run.estimates).unfold(0, CRITIC_STEPS, CRITIC_STEPS).mean(1))
    axes[2].set(title="the critic's estimate of their distance", xlabel="step of the generator")
    axes[2].set_ylim(0)
    figure.savefig(path, dpi=90)


def main(steps: int = 600, compared: int = 10, seed: int = 0) -> dict[str, Run]:
    """Trains fused networks, and PyTorch's for the first `compared` steps of the generator."""
    torch.manual_seed(seed)
    eager = Networks()
    fused = copy.deepcopy(eager)
    print(wn_kernels.fuse(fused))
    return {"wn_kernels": train(fused, steps, seed), "torch": train(eager, compared, seed)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="steps of the generator")
    parser.add_argument("--plot", default="generated_digits.png", help="where the picture goes")
    options = parser.parse_args()
    runs = main(options.steps)
    run, eager = runs["wn_kernels"], runs["torch"]
    print("step   distance   length of the gradient")
    for first in range(0, len(run.losses), max(1, len(run.losses) // 10)):
        some = slice(first, first + 20)
        means = [torch.tensor(values[some]).mean() for values in (run.estimates, run.lengths)]
        print(f"{first // CRITIC_STEPS:4}{means[0]:11.2f}{means[1]:25.2f}")
    apart = max(abs(a - b) / abs(b) for a, b in zip(run.losses, eager.losses, strict=False))
    steps = len(eager.losses)
    print(f"relative difference of the losses: {apart:.1e} at most in the first {steps} steps")
    print(f"{run.seconds:.1f} s for {options.steps} steps of the generator")
    plot(run, options.plot)
    print(f"drawn in {options.plot}")
