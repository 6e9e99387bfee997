"""This file holds the mean and the variance of values, by channel, pooled over batches and
processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Holds the moments of a layer's pre-activations, for each output channel, in float64.

    Attributes:
        count: the number of values of a channel, of shape `()`.
        mean: their mean, of shape `(channels,)`.
        squares: the sum of their squared deviations from the mean, of shape `(channels,)`.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    @property
    def variance(self) -> Tensor:
        """Returns the variance, of shape `(channels,)`. It divides by the count."""
        return self.squares / self.count

    @classmethod
    def of(cls, y: Tensor, channels: int) -> Moments:
        """Returns the moments of `y`, whose dimension `channels` counts from the end."""
        values = y.detach().movedim(channels, 0).flatten(1).double()
        variance, mean = torch.var_mean(values, 1, correction=0)
        count = torch.tensor(float(values.shape[1]), dtype=torch.float64, device=y.device)
        return cls(count, mean, variance * count)

    @classmethod
    def pooled(cls, parts: Iterable[Moments], group: Any = None) -> Moments:
        """Returns the moments of several sets of values together (Chan, Golub & LeVeque 1979). With
        a process group, they are those of all its processes."""
        counts, means, squares = (
            torch.stack(ts)
            for ts in zip(*((p.count, p.mean, p.squares) for p in parts), strict=True)
        )
        share = (counts / counts.sum()).unsqueeze(1)
        mean = (share * means).sum(0)
        between = counts.unsqueeze(1) * (means - mean).square()
        moments = cls(counts.sum(), mean, (squares + between).sum(0))
        return moments if group is None else cls.pooled(moments._gathered(group))

    def _gathered(self, group: Any) -> Iterator[Moments]:
        """Yields the moments of every process of a group."""
        packed = torch.cat([self.count.view(1), self.mean, self.squares])
        gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, packed, group=group)
        for t in gathered:
            yield Moments(t[0], *t[1:].split(len(self.mean)))
