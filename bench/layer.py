"""This file describes a layer of `torch.nn` and how it is called, which is what a case times."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from bench.measure import precision
from wn_kernels.call import Call, Geometry, Norm

MODES = ("infer", "train")


@dataclass(frozen=True)
class Layer:
    """One layer: its class in `torch.nn`, what that takes, the shape of its input, and how it is
    called."""

    label: str
    kind: str
    arguments: tuple[Any, ...]
    x_shape: tuple[int, ...]
    mode: str  # "train": forward and backward of every gradient; "infer": forward, no_grad
    options: dict[str, Any] = field(default_factory=dict)
    dim: int = 0
    is_large: bool = True  # whether its ratio to the plain layer counts in the suite's mean
    dtype: str = "float32"
    precision: str = "own"  # "autocast": the call's in bfloat16; "tf32": float32 products in TF32
    channels_last: bool = False  # of the input, and of the weights of two dimensions
    frozen_g: bool = False  # whether the magnitudes are not trained
    norm: Norm = "l2"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def layer(self, device: torch.device) -> nn.Module:
        """Returns the plain layer."""
        kind = getattr(nn, self.kind)
        layer = kind(*self.arguments, **self.options, device=device, dtype=self.torch_dtype)
        last = self.channels_last and layer.weight.ndim == 4
        return layer.to(memory_format=torch.channels_last) if last else layer

    def call(self) -> Call:
        """Returns our description of its call."""
        layer: Any = self.layer(torch.device("meta"))
        x_shape, v_shape, dtype = torch.Size(self.x_shape), layer.weight.shape, self.torch_dtype
        x_dtype = torch.bfloat16 if self.precision == "autocast" else dtype
        conv = None
        if layer.weight.ndim > 2:
            padding = layer.padding
            if layer.padding_mode != "zeros":  # the input is padded before
                sizes = zip(x_shape[2:], padding, strict=True)
                x_shape = torch.Size((*x_shape[:2], *(size + 2 * p for size, p in sizes)))
                padding = (0,) * len(padding)
            rest = layer.dilation, layer.transposed, layer.output_padding, layer.groups
            conv = Geometry(layer.stride, padding, *rest)
        options = self.channels_last, self.precision == "tf32"
        call = Call(x_shape, v_shape, x_dtype, dtype, self.dim, conv, *options)
        return call._replace(norm=self.norm)

    def session(self, device: torch.device) -> AbstractContextManager[Any]:
        """Returns the context that its calls run in: that of autocast or of TF32, if it has one."""
        if self.precision == "autocast":
            return torch.autocast(device.type, torch.bfloat16)
        return precision.tf32() if self.precision == "tf32" else nullcontext()

    @property
    def eps(self) -> float:
        """Returns the unit of rounding of its products."""
        rounded = {"autocast": torch.finfo(torch.bfloat16).eps, "tf32": 2.0**-10}
        return rounded.get(self.precision, torch.finfo(self.torch_dtype).eps)

    def work(self) -> tuple[float, float]:
        """Returns the operations and the bytes of a call. Every operand is read once, and every
        result is written once."""
        layer = self.layer(torch.device("meta"))
        x = torch.empty(self.x_shape, dtype=self.torch_dtype, device="meta")
        y, w = layer(x), layer.weight
        # A product for every element of the output, or of the input where that is spread out.
        pixels = x if "Transpose" in self.kind else y
        operations = 2.0 * pixels.numel() * w[0].numel()
        moved = float(sum(t.numel() * t.element_size() for t in (x, w, y)))
        return (operations, moved) if self.mode == "infer" else (3 * operations, 3 * moved)

    def record(self) -> dict[str, Any]:
        operations, moved = self.work()
        return asdict(self) | {"operations": operations, "bytes": moved, "parameters": self.size()}

    def size(self) -> int:
        """Returns the number of parameters of the plain layer."""
        return sum(p.numel() for p in self.layer(torch.device("meta")).parameters())
