"""Learns the signed distance to the outline of a character from points on the outline alone, twice
from the same start: with PyTorch's weight norm, and fused. You will see that both learn
alike, and how far the learned distance is from the exact one. A picture shows the shape and the
lines of equal distance around it.

    python examples/signed_distance.py --plot ampersand.png

The network is a perceptron with softplus, trained as in Gropp et al., *Implicit Geometric
Regularization for Learning Shapes*, 2020: the function is zero on the outline, its gradient there
is the normal, and everywhere its gradient has length one (the eikonal equation). The loss contains
gradients, so its own gradient takes second derivatives of every layer.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from typing import NamedTuple

import torch
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from torch import Tensor, nn

import wn_kernels

SIZES = (2, 64, 64, 64, 64, 1)
POINTS = 256  # of a step on the outline, and as many anywhere
SIDE = 160  # points of a row at which the distance is looked at


class Run(NamedTuple):
    """Holds the results of a training: the loss of every step, the seconds of all steps, and the
    signed distance at the points of `grid()`."""

    losses: list[float]
    seconds: float
    distances: Tensor


class Outline(NamedTuple):
    """Holds the edges of a shape within [-0.8, 0.8]²: where each begins and ends, both of shape
    `(edges, 2)`. The inside lies to the right of every edge."""

    begin: Tensor
    end: Tensor

    @property
    def normals(self) -> Tensor:
        """Returns the unit vector out of the shape at each edge, of shape `(edges, 2)`."""
        along = nn.functional.normalize(self.end - self.begin)
        return torch.stack([-along[:, 1], along[:, 0]], 1)

    def sample(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns random points of the outline and the normals there, both `(number, 2)`."""
        lengths = (self.end - self.begin).norm(dim=1)
        edge = torch.multinomial(lengths, number, replacement=True, generator=generator)
        along = torch.rand(number, 1, generator=generator)
        return torch.lerp(self.begin[edge], self.end[edge], along), self.normals[edge]

    def distance(self, x: Tensor) -> Tensor:
        """Returns the exact signed distance, negative inside, at points of shape `(points, 2)`."""
        edges, offset = self.end - self.begin, x[:, None] - self.begin
        along = (offset * edges).sum(-1) / edges.square().sum(-1)
        nearest = offset - along.clamp(0, 1)[..., None] * edges
        # A ray to the right crosses the outline an odd number of times from inside.
        above = offset[..., 1] < 0, (x[:, None] - self.end)[..., 1] < 0
        at = self.begin[:, 0] + offset[..., 1] / edges[:, 1] * edges[:, 0]
        crossed = (above[0] != above[1]) & (at > x[:, None, 0])
        return nearest.norm(dim=-1).amin(1) * (1 - 2 * (crossed.sum(1) % 2))


def outline(character: str = "&") -> Outline:
    """Returns the outline of a character of the font that ships with Matplotlib."""
    font = FontProperties(family="DejaVu Sans", weight="bold")
    path = TextPath((0, 0), character, size=100, prop=font)
    loops = [torch.from_numpy(loop).float() for loop in path.to_polygons()]
    points = torch.cat(loops)
    middle = (points.amin(0) + points.amax(0)) / 2
    scale = 0.8 / (points - middle).abs().max()
    begin = torch.cat([loop[:-1] for loop in loops])
    end = torch.cat([loop[1:] for loop in loops])
    return Outline((begin - middle) * scale, (end - middle) * scale)


def perceptron() -> nn.Sequential:
    """Returns a network with PyTorch's weight norm, smooth enough to have second derivatives."""
    parts: list[nn.Module] = []
    for k, n in itertools.pairwise(SIZES):
        parts += [nn.utils.parametrizations.weight_norm(nn.Linear(k, n)), nn.Softplus(beta=50)]
    return nn.Sequential(*parts[:-1])


def loss_of(network: nn.Module, shape: Outline, generator: torch.Generator) -> Tensor:
    """Returns the loss over random points of the outline and of [-1, 1]²."""
    on, normals = shape.sample(POINTS, generator)
    anywhere = 2 * torch.rand(POINTS, 2, generator=generator) - 1
    x = torch.cat([on, anywhere]).requires_grad_()
    distance = network(x)
    (gradient,) = torch.autograd.grad(distance.sum(), x, create_graph=True)
    zero = distance[:POINTS].abs().mean()
    normal = (gradient[:POINTS] - normals).norm(dim=1).mean()
    eikonal = (gradient.norm(dim=1) - 1).square().mean()
    return zero + 0.1 * normal + 0.1 * eikonal


def train(network: nn.Module, shape: Outline, steps: int, seed: int) -> Run:
    """Trains by Adam, at a learning rate that falls to zero."""
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    start = time.perf_counter()
    for _ in range(steps):
        loss = loss_of(network, shape, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        return Run(losses, seconds, network(grid())[:, 0])


def grid() -> Tensor:
    """Returns `SIDE²` points of [-1, 1]², row by row from below."""
    at = torch.linspace(-1, 1, SIDE)
    return torch.cartesian_prod(at, at).flip(1)


def plot(learned: Tensor, exact: Tensor, path: str) -> None:
    """Draws both distances: the shape, and a line for each tenth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 4.3), layout="constrained")
    box, levels = (-1, 1, -1, 1), [k / 10 for k in range(-2, 13)]
    for axis, values, title in zip(axes, (learned, exact), ("learned", "exact"), strict=True):
        image = values.view(SIDE, SIDE)
        drawn = axis.contourf(image, levels, extent=box, cmap="PuOr_r", vmin=-0.8, vmax=0.8)
        axis.contour(image, levels, extent=box, colors="k", linewidths=0.3, linestyles="-")
        axis.contour(image, [0], extent=box, colors="k", linewidths=2)
        axis.set(title=title, aspect="equal", xticks=(), yticks=())
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="signed distance")
    figure.savefig(path, dpi=90)


def main(steps: int = 600, seed: int = 0) -> tuple[dict[str, Run], Tensor]:
    """Trains both networks, and returns the exact distance at `grid()` beside them."""
    shape = outline()
    torch.manual_seed(seed)
    eager = perceptron()
    fused = copy.deepcopy(eager)
    print(wn_kernels.fuse(fused))
    networks = {"torch": eager, "wn_kernels": fused}
    runs = {name: train(net, shape, steps, seed) for name, net in networks.items()}
    return runs, shape.distance(grid())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--plot", default="ampersand.png", help="where the picture goes")
    options = parser.parse_args()
    runs, exact = main(options.steps)
    for name, run in runs.items():
        error = (run.distances - exact).abs().mean()
        right = ((run.distances < 0) == (exact < 0)).double().mean()
        print(
            f"{name:12} loss {run.losses[0]:.3f} to {run.losses[-1]:.3f}   off by {error:.4f} in "
            f"the mean, {right:.1%} of points on the right side   {run.seconds:.1f} s"
        )
    apart = [abs(a - b) / b for a, b in zip(*(run.losses for run in runs.values()), strict=True)]
    print(f"relative difference of the losses: {max(apart[:20]):.1e} at most in the first 20 steps")
    plot(runs["wn_kernels"].distances, exact, options.plot)
    print(f"drawn in {options.plot}")
