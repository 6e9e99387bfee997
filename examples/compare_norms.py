"""Trains the same networks on scikit-learn's digits with several normalisations, over learning
rates of three decades, with five seeds and two batch sizes, and draws what came of it.

    python examples/compare_norms.py --docs docs    # docs/images, and the table in docs/training.md

The networks are a perceptron of four hidden layers and a convolutional network of three layers. The
optimizer is SGD with momentum. It takes 240 seconds of processor time; docs/training.md says what
was found.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import wn_kernels
from wn_kernels import WNConv2d, WNLinear

RATES = tuple(10 ** (k / 2) for k in range(-6, 1))  # 0.001 to 1
SEEDS = tuple(range(5))
NETWORKS = {"mlp": "perceptron", "cnn": "convolutional network"}
STEPS = {("mlp", 64): 100, ("mlp", 4): 300, ("cnn", 64): 80, ("cnn", 4): 200}  # and batch sizes
MARKS = (
    "<!-- compare_norms: written by examples/compare_norms.py -->",
    "<!-- compare_norms: end -->",
)


class Run(NamedTuple):
    """Holds the results of a training: the loss of every step, NaN from where it diverged, and the
    accuracy on unseen digits after the last."""

    losses: list[float]
    accuracy: float


class Case(NamedTuple):
    """Describes one training."""

    network: str
    norm: str
    batch: int
    rate: float
    seed: int


# --- the networks --------------------------------------------------------------------------------


class ChannelNorm(nn.LayerNorm):
    """Applies layer normalisation over the channels of each position of an image."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Kind(NamedTuple):
    """Describes how a normalisation is built: the layers of both kinds, and what follows each."""

    linear: Callable[..., nn.Module]
    conv: Callable[..., nn.Module]
    after_linear: Callable[[int], nn.Module] | None = None
    after_conv: Callable[[int], nn.Module] | None = None
    start: Callable[[nn.Module, Tensor], Any] | None = None  # given a sample


def from_data_with_norms_of_g(net: nn.Module, sample: Tensor) -> None:
    """Initialises a network from data, and makes `V` equal to `W`."""
    wn_kernels.init.data_dependent_(net, sample)
    wn_kernels.renormalize_(net, "g")


KINDS = {
    "none": Kind(nn.Linear, nn.Conv2d),
    "batch norm": Kind(nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d),
    "layer norm": Kind(nn.Linear, nn.Conv2d, nn.LayerNorm, ChannelNorm),
    "WN": Kind(WNLinear, WNConv2d),
    "WN, from data": Kind(WNLinear, WNConv2d, start=wn_kernels.init.data_dependent_),
    "WN, from data, V = W": Kind(WNLinear, WNConv2d, start=from_data_with_norms_of_g),
    "WN, mean-only BN": Kind(
        WNLinear, WNConv2d, wn_kernels.WNMeanOnlyBatchNorm1d, wn_kernels.WNMeanOnlyBatchNorm2d
    ),
}


def build(network: str, norm: str, seed: int, sample: Tensor) -> nn.Module:
    """Returns a network, which starts from the same weights for each normalisation."""
    torch.manual_seed(seed)
    kind = KINDS[norm]
    parts: list[nn.Module] = []

    def add(layer: Callable[..., nn.Module], after: Any, *arguments: Any, **options: Any) -> None:
        parts.append(layer(*arguments, **options, bias=after is None))
        parts.extend([] if after is None else [after(arguments[1])])
        parts.append(nn.ReLU())

    if network == "mlp":
        for inputs in (64, 64, 64, 64):
            add(kind.linear, kind.after_linear, inputs, 64)
        parts.append(kind.linear(64, 10))
    else:
        parts.append(nn.Unflatten(1, (1, 8, 8)))
        add(kind.conv, kind.after_conv, 1, 16, 3, padding=1)
        add(kind.conv, kind.after_conv, 16, 16, 3, stride=2, padding=1)
        add(kind.conv, kind.after_conv, 16, 16, 3, padding=1)
        parts += [nn.Flatten(), kind.linear(256, 10)]
    net = nn.Sequential(*parts)
    if kind.start is not None:
        kind.start(net, sample)
    return net


# --- training ------------------------------------------------------------------------------------


@functools.cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns images of 8 by 8 pixels and their digits: the inputs for training and for testing,
    and the labels of both."""
    x, y = load_digits(return_X_y=True)
    split = train_test_split(x / 8.0 - 1.0, y, test_size=0.25, random_state=0, stratify=y)
    x_train, x_test, y_train, y_test = (torch.from_numpy(a) for a in split)
    return x_train.float(), x_test.float(), y_train, y_test


def steps(net: nn.Module, optimizer: Any, batch: int, seed: int) -> Iterable[float]:
    """Trains without end on batches drawn from `seed`, and yields the loss of each step."""
    x, _, y, _ = data()
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(x), (batch,), generator=generator)
        loss = nn.functional.cross_entropy(net(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def train(case: Case, number: int | None = None) -> Run:
    """Trains one network. A loss that is not finite ends it, with the accuracy of a guess."""
    torch.set_num_threads(1)
    x_train, x_test, _, y_test = data()
    net = build(case.network, case.norm, case.seed, x_train[:256])
    optimizer = torch.optim.SGD(net.parameters(), lr=case.rate, momentum=0.9)
    number = number or STEPS[case.network, case.batch]
    losses: list[float] = []
    for loss in steps(net, optimizer, case.batch, case.seed):
        losses.append(loss)
        if len(losses) == number or not math.isfinite(loss):
            break
    losses += [math.nan] * (number - len(losses))
    with torch.no_grad():
        right = net.eval()(x_test).argmax(1) == y_test
    return Run(losses, right.double().mean().item() if math.isfinite(losses[-1]) else 0.1)


def train_all(cases: list[Case], workers: int) -> dict[Case, Run]:
    """Trains every network, in several processes of one thread each."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return dict(zip(cases, pool.map(train, cases, chunksize=5), strict=True))


def time_steps(repeats: int = 60) -> dict[tuple[str, str], float]:
    """Returns the processor's seconds for a step with a batch of 64, by network and normalisation.
    They are medians of steps that are taken in turn, so that a busy machine slows all of them."""
    torch.set_num_threads(1)
    keys = [(network, norm) for network in NETWORKS for norm in KINDS]
    running = {}
    for network, norm in keys:
        net = build(network, norm, 0, data()[0][:256])
        running[network, norm] = iter(
            steps(net, torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9), 64, 0)
        )
    times: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
    for _ in range(repeats):
        for key in keys:
            start = time.thread_time()
            next(running[key])
            times[key].append(time.thread_time() - start)
    return {key: statistics.median(found[3:]) for key, found in times.items()}


# --- what came of it -----------------------------------------------------------------------------


class Summary(NamedTuple):
    """Holds the results of a normalisation for a network and a batch size, over rates and seeds.

    `accuracies` has a row for each rate and a column for each seed, `losses` those of the best
    rate, one row for each seed.
    """

    accuracies: Tensor
    losses: Tensor

    @property
    def best(self) -> int:
        """Returns the index of the rate with the largest mean accuracy."""
        return int(self.accuracies.mean(1).argmax())


def summarise(runs: dict[Case, Run]) -> dict[tuple[str, int, str], Summary]:
    """Returns the results by network, batch size and normalisation."""
    summaries = {}
    for network, batch, norm in dict.fromkeys((c.network, c.batch, c.norm) for c in runs):
        found = {
            (c.rate, c.seed): run for c, run in runs.items() if c[:3] == (network, norm, batch)
        }
        rates = sorted({rate for rate, _ in found})
        seeds = sorted({seed for _, seed in found})
        accuracies = torch.tensor([[found[r, s].accuracy for s in seeds] for r in rates])
        best = rates[int(accuracies.mean(1).argmax())]
        losses = torch.tensor([found[best, s].losses for s in seeds])
        summaries[network, batch, norm] = Summary(accuracies, losses)
    return summaries


def table(summaries: dict[tuple[str, int, str], Summary], times: dict) -> str:
    """Returns the results as a table in Markdown."""
    lines = [
        "| network, batch | normalisation | best accuracy | at the rate | rates that reach 0.9 "
        "| time of a step |",
        "|---|---|---|---|---|---|",
    ]
    for (network, batch, norm), summary in summaries.items():
        best = summary.accuracies[summary.best]
        good = int((summary.accuracies.mean(1) >= 0.9).sum())
        ratio = f"{times[network, norm] / times[network, 'none']:.2f}" if batch == 64 else ""
        lines.append(
            f"| {NETWORKS[network]}, {batch} | {norm} | {best.mean():.3f} ± {best.std():.3f} "
            f"| {RATES[summary.best]:.2g} | {good} of {len(RATES)} | {ratio} |"
        )
    return "\n".join(lines)


# --- pictures ------------------------------------------------------------------------------------


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"font.size": 9, "figure.dpi": 90}
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    """Writes a small PNG, of 256 colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()))
    picture.convert("RGB").quantize(256).save(path, optimize=True)


def draw_accuracies(summaries: dict[tuple[str, int, str], Summary], path: Path) -> None:
    """Draws the accuracy against the learning rate: the mean over seeds, in a band of all."""
    figure, axes = _figure(2, 2, (9, 6.5))
    for axis, (network, batch) in zip(axes.flat, STEPS, strict=True):
        for norm in KINDS:
            found = summaries[network, batch, norm].accuracies
            (line,) = axis.plot(RATES, found.mean(1), label=norm, marker=".")
            axis.fill_between(
                RATES, found.amin(1), found.amax(1), color=line.get_color(), alpha=0.1
            )
        axis.set(xscale="log", title=f"{NETWORKS[network]}, batches of {batch}", ylim=(0, 1))
    for axis in axes[-1]:
        axis.set_xlabel("learning rate")
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy on unseen digits")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4)
    _save(figure, path)


def draw_losses(summaries: dict[tuple[str, int, str], Summary], path: Path) -> None:
    """Draws the training loss at each normalisation's best rate, averaged over ten steps: the
    geometric mean over seeds, and a band of a standard deviation."""
    figure, axes = _figure(2, 2, (9, 6.5))
    for axis, (network, batch) in zip(axes.flat, STEPS, strict=True):
        for norm in KINDS:
            summary = summaries[network, batch, norm]
            smooth = summary.losses.unfold(1, 10, 4).mean(-1).clamp_min(1e-4).log()
            at = torch.arange(smooth.shape[1]) * 4 + 5
            mean, deviation = smooth.mean(0), smooth.std(0)
            label = f"{norm}, {RATES[summary.best]:.2g}"
            (line,) = axis.plot(at, mean.exp(), label=label)
            band = (mean - deviation).exp(), (mean + deviation).exp()
            axis.fill_between(at, *band, color=line.get_color(), alpha=0.1)
        axis.set(yscale="log", title=f"{NETWORKS[network]}, batches of {batch}")
        axis.legend(fontsize=6, framealpha=0.5)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("cross entropy (nats)")
    _save(figure, path)


def draw_times(times: dict[tuple[str, str], float], path: Path) -> None:
    """Draws the time of a step over that without normalisation."""
    figure, axes = _figure(1, 2, (9, 2.4))
    for axis, network in zip(axes.flat, NETWORKS, strict=True):
        ratios = [times[network, norm] / times[network, "none"] for norm in KINDS]
        bars = axis.barh(list(KINDS), ratios, color=[f"C{i}" for i in range(len(KINDS))])
        axis.bar_label(bars, fmt="%.2f", padding=2)
        axis.invert_yaxis()
        axis.set(xlabel="time of a step over that of none", title=NETWORKS[network])
        axis.set_xlim(0, 1.15 * max(ratios))
    axes[0, 1].set_yticklabels([])
    _save(figure, path)


# --- the decay of V ------------------------------------------------------------------------------


class Decay(NamedTuple):
    """Holds the mean ‖V‖ and the loss before each step, from a training of a weight-normed
    perceptron by plain SGD."""

    norms: list[float]
    losses: list[float]


def decay_runs(rate: float = 0.1, decay: float = 0.05, number: int = 200) -> dict[str, Decay]:
    """Trains without decay, with decay of `V`, and without decay at the learning rate of `V` that
    should give the same network: `η / (c_t c_{t+1})` with `c_t = (1 − ηλ)^t`."""
    torch.set_num_threads(1)
    runs = {}
    for name in ("no decay of V", "decay of V", "a larger learning rate of V"):
        net = build("mlp", "WN", 0, data()[0]).double()
        groups = wn_kernels.param_groups(net, decay if name == "decay of V" else 0.0, decay_v=True)
        optimizer = torch.optim.SGD(groups, lr=rate)
        x, _, y, _ = data()
        generator = torch.Generator().manual_seed(0)
        run = Decay([], [])
        for step in range(number):
            if name == "a larger learning rate of V":
                optimizer.param_groups[0]["lr"] = rate / (1 - rate * decay) ** (2 * step + 1)
            chosen = torch.randint(len(x), (64,), generator=generator)
            loss = nn.functional.cross_entropy(net(x[chosen].double()), y[chosen])
            norms = wn_kernels.slice_norms(net).values()
            run.norms.append(torch.cat([n.flatten() for n in norms]).mean().item())
            run.losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        runs[name] = run
    return runs


def draw_decay(runs: dict[str, Decay], path: Path) -> None:
    """Draws ‖V‖ and the losses, in which the last two networks are one."""
    figure, axes = _figure(1, 2, (9, 3))
    for (name, run), style in zip(runs.items(), ("-", "-", ":"), strict=True):
        smooth = torch.tensor(run.losses).unfold(0, 10, 4).mean(-1)
        axes[0, 0].plot(run.norms, style, label=name, linewidth=2)
        axes[0, 1].plot(torch.arange(len(smooth)) * 4 + 5, smooth, style, label=name, linewidth=2)
    axes[0, 0].set(xlabel="step", ylabel="mean ‖V‖")
    axes[0, 1].set(xlabel="step", ylabel="cross entropy (nats)")
    axes[0, 0].legend()
    _save(figure, path)


# --- the command ---------------------------------------------------------------------------------


def write(folder: Path, summaries: dict, times: dict, decays: dict[str, Decay]) -> None:
    """Draws the pictures of docs/training.md, and puts the table in place."""
    images = folder / "images"
    draw_accuracies(summaries, images / "compare_norms_rates.png")
    draw_losses(summaries, images / "compare_norms_losses.png")
    draw_times(times, images / "compare_norms_times.png")
    draw_decay(decays, images / "decay_of_v.png")
    page = folder / "training.md"
    if page.exists():
        start, end = MARKS
        before, _, rest = page.read_text().partition(start)
        _, _, after = rest.partition(end)
        page.write_text(f"{before}{start}\n\n{table(summaries, times)}\n\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the results go")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    options = parser.parse_args()
    cases = [
        Case(network, norm, batch, rate, seed)
        for network, batch in STEPS
        for norm in KINDS
        for rate in RATES
        for seed in SEEDS
    ]
    summaries = summarise(train_all(cases, options.workers))
    times = time_steps()
    write(options.docs, summaries, times, decay_runs())
    print(table(summaries, times))


if __name__ == "__main__":
    main()
