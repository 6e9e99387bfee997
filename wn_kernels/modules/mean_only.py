"""This file contains mean-only batch normalisation, which Salimans & Kingma 2016, section 4,
combine with weight normalisation: weight norm gives pre-activations a steady variance, and the
subtraction of their mean over the batch a mean of zero.

    t = W x      y = t − μ[t] + b

In training `μ[t]` is the mean of a channel over the batch and all positions, and gradients pass
through it: `dt = dy − μ[dy]`. In evaluation it is the running mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import Function

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.types import Device


class _AllReduced(Function):
    """Sums a tensor over the processes of a group. So does its backward, with the gradients."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = t.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduced.apply(grad.contiguous(), ctx.group), None


class _MeanOnlyBatchNorm(nn.Module):
    """Holds what the classes below share; `WNMeanOnlyBatchNorm1d` describes it."""

    ranks: tuple[int, ...]  # of the input; each class sets it
    bias: nn.Parameter | None
    running_mean: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        bias = torch.empty(num_features, device=device, dtype=dtype) if affine else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        mean = count = None
        if track_running_stats:
            mean = torch.zeros(num_features, device=device, dtype=dtype)
            count = torch.zeros((), dtype=torch.long, device=device)
        self.register_buffer("running_mean", mean)
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Sets the running mean and the number of batches to zero."""
        for buffer in (self.running_mean, self.num_batches_tracked):
            if buffer is not None:
                buffer.zero_()

    def reset_parameters(self) -> None:
        """Sets the running mean and the bias to zero."""
        self.reset_running_stats()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _check(self, input: Tensor) -> None:
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
        if not input.is_floating_point():
            raise TypeError(f"input has dtype {input.dtype}; expected one of floating point")
        if input.ndim not in self.ranks:
            expected = " or ".join(f"{rank}-d" for rank in self.ranks)
            raise ValueError(f"input has shape {tuple(input.shape)}; expected {expected} input")
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"input has shape {tuple(input.shape)}; its dimension 1 must be {self.num_features}"
            )

    def _mean(self, input: Tensor, dims: list[int]) -> Tensor:
        """Returns the mean of each channel over the batch, in float32 or wider."""
        if input.numel() == input.shape[1]:
            raise ValueError(
                f"input has shape {tuple(input.shape)}: its mean over the batch needs at least two "
                "values per channel in training"
            )
        return input.mean(dims, dtype=torch.promote_types(input.dtype, torch.float32))

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        dims = [d for d in range(input.ndim) if d != 1]
        if self.training or self.running_mean is None:
            mean = self._mean(input, dims)
            if self.training and self.running_mean is not None:
                self._track(mean.detach())
        else:
            mean = self.running_mean
        shift = -mean if self.bias is None else self.bias - mean
        return input + shift.to(input.dtype).view(-1, *[1] * (input.ndim - 2))

    @torch.no_grad()
    def _track(self, mean: Tensor) -> None:
        assert self.running_mean is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        if self.momentum is None:  # the average of all batches
            weight = 1 / self.num_batches_tracked.to(self.running_mean.dtype)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        else:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )


class WNMeanOnlyBatchNorm1d(_MeanOnlyBatchNorm):
    """Subtracts the mean of each channel over the batch, and adds a bias: `y = t − μ[t] + b`
    (Salimans & Kingma 2016, section 4). It follows a weight-normed layer without a bias.

    In training, the running mean becomes `(1 − momentum) · running_mean + momentum · μ[t]`. In
    evaluation it replaces `μ[t]`. The mean is computed in float32 or wider.

    Args:
        num_features: the number of channels, C.
        momentum: the weight of a batch in the running mean, or `None` for the average of all.
        affine: whether there is a bias, which starts at zero.
        track_running_stats: whether there is a running mean. Without it, evaluation uses that of
            the batch.
        device: as in `torch.nn.BatchNorm1d`.
        dtype: as in `torch.nn.BatchNorm1d`.

    Attributes:
        bias: of shape `(C,)`, or `None`.
        running_mean: of shape `(C,)`, or `None`.
        num_batches_tracked: the number of batches in it, or `None`.

    Shape:
        Input `(B, C)` or `(B, C, L)`, output the same.

    Raises:
        TypeError: the input is not a tensor of a floating-point dtype.
        ValueError: the input has another shape, or, in training, one value per channel.
    """

    ranks = (2, 3)


class WNMeanOnlyBatchNorm2d(_MeanOnlyBatchNorm):
    """Does what `WNMeanOnlyBatchNorm1d` does for inputs of shape `(B, C, H, W)`."""

    ranks = (4,)


class WNMeanOnlyBatchNorm3d(_MeanOnlyBatchNorm):
    """Does what `WNMeanOnlyBatchNorm1d` does for inputs of shape `(B, C, D, H, W)`."""

    ranks = (5,)


class WNMeanOnlySyncBatchNorm(_MeanOnlyBatchNorm):
    """Does what `WNMeanOnlyBatchNorm1d` does with the mean over the batches of all processes, as
    `torch.nn.SyncBatchNorm` does for batch normalisation.

    Each forward in training all-reduces the sums of the channels and the number of their values,
    and each backward the sums of the gradients. Without a process group it uses its own batch.

    Args:
        num_features: as in `WNMeanOnlyBatchNorm1d`, and so are the next five.
        momentum: the same.
        affine: the same.
        track_running_stats: the same.
        device: the same.
        dtype: the same.
        process_group: the processes, by default all.

    Shape:
        Input `(B, C, *)`, output the same. `B` may differ among the processes, and be 0.
    """

    ranks = (2, 3, 4, 5)

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_features, momentum, affine, track_running_stats, device, dtype)
        self.process_group = process_group

    def _mean(self, input: Tensor, dims: list[int]) -> Tensor:
        if not dist.is_available() or not dist.is_initialized():
            return super()._mean(input, dims)
        group = self.process_group or dist.group.WORLD
        if dist.get_world_size(group) == 1:
            return super()._mean(input, dims)
        total = input.sum(dims, dtype=torch.promote_types(input.dtype, torch.float32))
        count = total.new_full((1,), input.numel() / input.shape[1])
        *sums, counts = _AllReduced.apply(torch.cat([total, count]), group).split([len(total), 1])
        return sums[0] / counts.detach()

    @classmethod
    def convert_sync_batchnorm(
        cls, module: nn.Module, process_group: ProcessGroup | None = None
    ) -> nn.Module:
        """Replaces every mean-only batch normalisation of a model by this class. The signature is
        that of `torch.nn.SyncBatchNorm.convert_sync_batchnorm`.

        Args:
            module: the model. Parameters and buffers stay the same objects.
            process_group: the processes, by default all.

        Returns:
            The model, or the layer that replaces it.
        """
        if isinstance(module, _MeanOnlyBatchNorm) and not isinstance(module, cls):
            old = module
            module = cls(
                old.num_features,
                old.momentum,
                old.affine,
                old.track_running_stats,
                process_group=process_group,
                device="meta",
            )
            module.bias = old.bias
            module.running_mean = old.running_mean
            module.num_batches_tracked = old.num_batches_tracked
            module.training = old.training
        for name, child in list(module.named_children()):
            module.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return module
