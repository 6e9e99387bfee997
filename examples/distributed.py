"""Trains a network on scikit-learn's digits in several processes, by `DistributedDataParallel` and
by FSDP2's `fully_shard`, and in one process beside them. You will see that the losses and the
weights agree, and how many numbers of the parameters each process holds: all of them under the
first, its share under the second.

    torchrun --standalone --nproc-per-node 2 examples/distributed.py

It needs no GPU: the processes talk by gloo.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from wn_kernels import WNConv2d, WNLinear

BATCH = 64  # over all processes


class Row(NamedTuple):
    """Holds the results of one way to train: the loss of the first and of the last step, how far
    the losses and the weights are from those of one process, relative, and the numbers of the
    parameters that each process holds."""

    engine: str
    first: float
    last: float
    losses: float
    weights: float
    held: list[int]


def network() -> nn.Sequential:
    """Returns a convolutional network, with the same weights in every process."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        WNConv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        WNConv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        WNLinear(512, 64),
        nn.ReLU(),
        WNLinear(64, 10),
    )


def shard(net: nn.Module) -> nn.Module:
    """Has every process keep a share of each parameter, which is gathered where a layer runs."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in [layer for layer in net if list(layer.parameters())]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def train(net: nn.Module, steps: int, rank: int, processes: int) -> list[float]:
    """Trains on the share `rank` of every batch, and returns the losses of that share."""
    digits = load_digits()
    x, y = torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target)
    generator = torch.Generator().manual_seed(0)  # the same batches in every process
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        own = torch.randint(len(x), (BATCH,), generator=generator).chunk(processes)[rank]
        loss = nn.functional.cross_entropy(net(x[own]), y[own])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def full(parameter: Tensor) -> Tensor:
    """Returns a parameter with the shares of all processes."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def held(parameter: Tensor) -> int:
    """Returns how many numbers of a parameter this process holds."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def main(steps: int) -> list[Row]:
    """Trains in all ways, in every process of the group, and returns a row for each."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    alone = network()
    expected = torch.tensor(train(alone, steps, 0, 1))
    rows = []
    for engine, wrap in (("DDP", DistributedDataParallel), ("FSDP2", shard)):
        net = wrap(network())
        losses = torch.tensor(train(net, steps, rank, processes))
        dist.all_reduce(losses)  # the mean over the batch, since all shares are of one size
        losses /= processes
        counts: list[int] = [0] * processes
        dist.all_gather_object(counts, sum(held(p) for p in net.parameters()))
        pairs = zip(net.parameters(), alone.parameters(), strict=True)
        apart = max(relative(full(p), q.detach()) for p, q in pairs)
        first, last = losses[0].item(), losses[-1].item()
        rows.append(Row(engine, first, last, relative(losses, expected), apart, counts))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = main(options.steps)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, {options.steps} steps, beside one process")
        print("        loss             losses apart   weights apart   numbers held")
        for row in rows:
            loss = f"{row.first:.3f} to {row.last:.3f}"
            apart = f"{row.losses:15.1e}{row.weights:16.1e}"
            print(f"{row.engine:6}  {loss}{apart}   {', '.join(map(str, row.held))}")
    # gloo's threads outlive a group that FSDP2 has used. One that still holds a tensor when Python
    # ends would abort the process, so that Python ends at once.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
