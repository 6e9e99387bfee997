"""This module records how a weight-normed network trains: ‖V‖, `g`, the effective learning rate,
the norm of the gradient and the angle of each step, by layer.

    watch = wn_kernels.monitor(model, optimizer)
    ...                                 # train
    print(watch)                        # the last step, by layer
    watch.plot("training.png")

A step is recorded by a few operations for all layers together. Nothing waits for a GPU until the
records are read.
"""

from __future__ import annotations

import io
import math
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import prepare
from .convert.normed import weights
from .text import aligned, html

QUANTITIES = {
    "norm": "‖V‖",
    "g": "g",
    "rate": "lr / ‖V‖²",
    "gradient": "‖∂L/∂V‖",
    "angle": "angle (degrees)",
}


def _png(figure: Any) -> bytes:
    """Returns the picture of a figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


class _Record(NamedTuple):
    """Holds what was measured at a step, in tensors with an entry for each layer."""

    step: int
    rates: list[Any]  # numbers, tensors of one, or None
    before: Tensor  # ‖V‖ over all slices
    after: Tensor
    moved: Tensor  # ‖V after − V before‖
    magnitudes: Tensor  # Σ |g|
    gradients: Tensor


class Monitor:
    """Holds the records of a model's training. `wn_kernels.monitor` makes one.

    Attributes:
        names: the names of the weight-normed tensors, in the order of the columns.
        step: the number of steps so far.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, every: int, keep: int
    ) -> None:
        prepare.check_module("model", model)
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}; expected a positive integer")
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep is {keep!r}; expected a positive integer")
        found = [x for x in weights(model) if not x.fault]
        if not found:
            raise ValueError("model has no weight-normed layer")
        self.names = [x.name for x in found]
        self.step = 0
        self._every = every
        self._gs, self._vs = (list(ts) for ts in zip(*(x.tensors for x in found), strict=True))
        self._slices = _host([max(1, g.numel()) for g in self._gs])
        dtypes = {t.dtype for t in (*self._gs, *self._vs)}
        self._dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self._is_spread = len({v.device for v in self._vs}) > 1
        self._before = [v.detach().clone() for v in self._vs]
        self._records: deque[_Record] = deque(maxlen=keep)
        self._logged = 0
        self._handles: list[Any] = []
        if optimizer is not None:
            self._handles = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        if self.step % self._every == 0:
            torch._foreach_copy_(self._before, self._vs)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self.step += 1
        if (self.step - 1) % self._every == 0:
            self._record(self._rates(optimizer))

    def record(self, lr: float | None = None) -> None:
        """Records a step of an optimizer that the monitor was not given. Call it after the step,
        before the gradients are set to zero.

        Args:
            lr: the learning rate. Without it, the effective learning rate is NaN.
        """
        self.step += 1
        if (self.step - 1) % self._every == 0:
            self._record([lr] * len(self.names))
        with torch.no_grad():
            torch._foreach_copy_(self._before, self._vs)

    @torch.no_grad()
    def _record(self, rates: list[Any]) -> None:
        missing = torch.full((), math.nan, device=self._vs[0].device, dtype=self._vs[0].dtype)
        gradients = [missing if v.grad is None else v.grad for v in self._vs]
        sizes = self._sizes([*self._before, *self._vs, *gradients], 2)
        torch._foreach_sub_(self._before, self._vs)  # the next step needs a new copy anyway
        sizes += self._sizes(self._before, 2) + self._sizes(self._gs, 1)
        if self._is_spread:
            sizes = [n.to(self._vs[0].device, non_blocking=True) for n in sizes]
        before, after, of_gradients, moved, magnitudes = torch.stack(sizes).chunk(5)
        rest = moved, magnitudes, of_gradients
        self._records.append(_Record(self.step, rates, before, after, *rest))

    def _sizes(self, tensors: list[Tensor], order: int) -> list[Tensor]:
        """Returns the norms of tensors."""
        return list(torch._foreach_norm(tensors, order, dtype=self._dtype))

    def _rates(self, optimizer: Optimizer) -> list[Any]:
        """Returns the learning rate of every `V` in the optimizer."""
        rates = {}
        for group in optimizer.param_groups:
            lr = group["lr"]
            for p in group["params"]:
                rates[id(p)] = lr.detach().clone() if isinstance(lr, Tensor) else lr
        return [rates.get(id(v)) for v in self._vs]

    def close(self) -> None:
        """Detaches the monitor from the optimizer. Its records stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def steps(self) -> list[int]:
        """Returns the numbers of the recorded steps. The first step is 1."""
        return [record.step for record in self._records]

    def read(self) -> dict[str, Tensor]:
        """Returns what was recorded, in float64 on the CPU, with a row for each step and a column
        for each layer.

        - `"norm"`: ‖V‖ before the step, the root mean square of `‖V_j‖` over the slices
        - `"g"`: the mean of |g|
        - `"rate"`: the effective learning rate `lr / ‖V‖²`, in which a step of SGD on `V` turns its
          direction (van Laarhoven 2017; Hoffer et al. 2018); NaN where no learning rate is known
        - `"gradient"`: the norm of `∂L/∂V`; NaN where there was none
        - `"angle"`: the angle between `V` before and after the step, as vectors of all its entries,
          in degrees (Kahan's formula from the three sides)
        """
        if not self._records:
            empty = _host([]).reshape(0, len(self.names))
            return {name: empty.clone() for name in QUANTITIES}
        before, after, moved, magnitudes, gradients = (
            torch.stack(ts).double().cpu()
            for ts in zip(*(record[2:] for record in self._records), strict=True)
        )
        rates = _host(
            [[math.nan if x is None else float(x) for x in r.rates] for r in self._records]
        )
        norms = before / self._slices.sqrt()
        return {
            "norm": norms,
            "g": magnitudes / self._slices,
            "rate": rates / norms.square(),
            "gradient": gradients,
            "angle": torch.rad2deg(_angle(before, after, moved)),
        }

    def _rows(self) -> list[tuple[str, ...]]:
        """Returns the rows of a table of the last step."""
        header = ("layer", *QUANTITIES.values())
        read = self.read()
        if not self._records:
            return [header]
        last = torch.stack([read[name][-1] for name in QUANTITIES], 1)
        rows = [
            (name or "(root)", *("-" if x.isnan() else f"{x:.3g}" for x in row))
            for name, row in zip(self.names, last, strict=True)
        ]
        return [header, *rows]

    def _title(self) -> str:
        return f"step {self.steps[-1] if self.steps else 0}"

    def __str__(self) -> str:
        return "\n".join([self._title(), *aligned(self._rows())])

    def _repr_html_(self) -> str:
        return html(self._rows(), self._title())

    def table(self) -> Any:
        """Returns the last step as a `rich.table.Table`, which the package `rich` has to be
        installed for."""
        from rich.table import Table

        header, *rows = self._rows()
        table = Table(title=self._title())
        for column in header:
            table.add_column(column, justify="left" if column == "layer" else "right")
        for row in rows:
            table.add_row(*row)
        return table

    def __rich__(self) -> Any:
        return self.table()

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws every quantity against the steps, a line for each layer, which the package
        `matplotlib` has to be installed for.

        Args:
            path: the file that the picture is written to, if any.

        Returns:
            The `matplotlib.figure.Figure`, which a notebook shows.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3 * len(QUANTITIES), 3), layout="constrained")
        axes = figure.subplots(1, len(QUANTITIES))
        for axis, (name, values) in zip(axes, self.read().items(), strict=True):
            for layer, column in zip(self.names, values.T, strict=True):
                axis.plot(self.steps, column, label=layer)
            axis.set(title=QUANTITIES[name], xlabel="step")
            if bool((values > 0).any()):
                axis.set_yscale("log")
        axes[0].legend(fontsize=7)
        if path is not None:
            figure.savefig(path)
        # A notebook finds the picture by this name, also if pyplot was never imported.
        setattr(figure, "_repr_png_", partial(_png, figure))  # noqa: B010
        return figure

    def log(self, writer: Any) -> int:
        """Writes the records that were not written before to TensorBoard.

        Args:
            writer: a `torch.utils.tensorboard.SummaryWriter`, or anything else with its
                `add_scalar(tag, value, step)`. Tags are `norm/NAME`, `g/NAME` and so on.

        Returns:
            The number of steps that were written.

        Raises:
            TypeError: `writer` has no `add_scalar`.
        """
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer has no add_scalar: {type(writer).__name__}")
        read, steps = self.read(), self.steps
        new = [i for i, step in enumerate(steps) if step > self._logged]
        for i in new:
            for name, values in read.items():
                for layer, value in zip(self.names, values[i].tolist(), strict=True):
                    if not math.isnan(value):
                        writer.add_scalar(f"{name}/{layer or '(root)'}", value, steps[i])
            self._logged = steps[i]
        return len(new)


def _host(values: list[Any]) -> Tensor:
    """Returns numbers in float64 on the CPU, whatever torch's default dtype and device are."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _angle(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Returns the angle between two sides `a` and `b` of a triangle, across from `c`, in radians
    (Kahan, *Miscalculating Area and Angles of a Needle-like Triangle*, 2014)."""
    a, b = torch.maximum(a, b), torch.minimum(a, b)
    # Rounding can make a side longer than the others together.
    mu = torch.where(b >= c, (c - (a - b)), (b - (a - c)))
    product = ((a - b) + c) * mu.clamp_min(0) / ((a + (b + c)) * ((a - c) + b))
    return 2 * torch.atan(product.clamp_min(0).sqrt())


def monitor(
    model: nn.Module, optimizer: Optimizer | None = None, *, every: int = 1, keep: int = 10_000
) -> Monitor:
    """Records ‖V‖, `g`, the effective learning rate `lr / ‖V‖²`, the norm of the gradient and the
    angle of each step, for every weight-normed tensor of a model.

    It keeps a copy of every `V`, for the angle. Each record is a few operations over all layers,
    which read and write three times as much as a step of SGD; `every` makes that rare. Nothing
    waits for a GPU until it is read.

    Args:
        model: any model that `wn_kernels.fuse` accepts. A tensor whose `g` or `v` is itself
            computed is left out.
        optimizer: the optimizer, whose steps are recorded by hooks. Without it, call
            `Monitor.record` after each step.
        every: records one of so many steps.
        keep: the number of records that are kept, the last ones.

    Returns:
        The records. They print as a table, and `rich.print` prints a coloured one.

    Raises:
        TypeError: `model` is not a module, or `optimizer` not an optimizer.
        ValueError: the model has no weight-normed tensor, a lazy layer has no shape yet, or `every`
            or `keep` is not a positive integer.
    """
    return Monitor(model, optimizer, every, keep)
