"""The command line of `python -m bench`; without a command, every suite of layers.

A command imports what it needs when it runs. Whether Triton interprets or compiles has to be set
before Triton is imported, and no command waits for the imports of another.
"""

from __future__ import annotations

import argparse
import os
from argparse import Namespace

SUITES = {
    "linear": "linear layers",
    "conv": "convolutions",
    "half": "layers in half precision and under autocast",
}
MORE = {
    "norm": "the operator alone",
    "overhead": "layers so small that only the calls count",
    "second-order": "steps whose loss contains a gradient",
    "recurrent": "recurrent layers and cells",
    "models": "whole models (needs the extra of that name)",
}
DTYPES = ("float32", "bfloat16", "float16")
SECONDS = 3.0  # a case, so that all of them take five minutes on two cores
THREADS = 2


def _every_suite(_chosen: Namespace) -> int:
    """Returns the worst answer of the suites."""
    import torch

    from bench import suite as layers

    torch.set_num_threads(THREADS)
    return max(layers.main(suite, f"results/{suite}.json", SECONDS) for suite in SUITES)


def _suite(chosen: Namespace) -> int:
    import torch

    from bench import suite

    torch.set_num_threads(chosen.threads)
    return suite.main(chosen.command, chosen.json, chosen.seconds, chosen.full, chosen.dtype)


def _memory(chosen: Namespace) -> int:
    from bench import memory

    return memory.main(chosen.json, chosen.full)


def _tuned(chosen: Namespace) -> int:
    from bench import tuned

    return tuned.main(chosen.seconds)


def _picks(chosen: Namespace) -> int:
    import torch

    from bench import picks

    torch.set_num_threads(chosen.threads)
    part = chosen.part[0], chosen.part[1]
    rest = chosen.random, chosen.seed, part, chosen.before
    return picks.main(chosen.json, chosen.seconds, *rest)


def _gpu(chosen: Namespace) -> int:
    if chosen.publish:
        from bench.gpu import page

        return page.write()
    from bench.gpu import run

    return run.main(
        chosen.out,
        chosen.sections,
        chosen.seconds,
        chosen.dry_run,
        chosen.cache,
        chosen.capability,
        chosen.most,
    )


def _compare(chosen: Namespace) -> int:
    from bench.report import compare

    return compare.main(chosen.before, chosen.after)


def _report(chosen: Namespace) -> int:
    from bench.report import page

    return page.main(chosen.results, chosen.output)


def _readme(chosen: Namespace) -> int:
    from bench.report import page

    return page.readme(chosen.results, chosen.file, chosen.every_case)


def _errors(chosen: Namespace) -> int:
    from bench import errors

    return errors.main(chosen.write)


def _codegen(chosen: Namespace) -> int:
    os.environ.pop("TRITON_INTERPRET", None)
    from bench.static import codegen

    return codegen.main(chosen.json, chosen.only, chosen.write)


def _bounds(_chosen: Namespace) -> int:
    os.environ.pop("TRITON_INTERPRET", None)
    from bench.static import bounds

    return bounds.main()


def _traffic(chosen: Namespace) -> int:
    os.environ["TRITON_INTERPRET"] = "1"
    from bench.stand_in import interpreter
    from bench.static import traffic

    interpreter.mend()
    return traffic.main(chosen.write, chosen.kernels)


def _occupancy(chosen: Namespace) -> int:
    from bench.static import occupancy

    return occupancy.main(chosen.write)


def _host(chosen: Namespace) -> int:
    from bench import host

    return host.main(chosen.json, chosen.seconds, chosen.profile, chosen.write)


def _parser() -> argparse.ArgumentParser:
    """Returns the parser, whose result has the chosen command's function as `run`."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.set_defaults(run=_every_suite)
    commands = parser.add_subparsers(dest="command")

    for suite, what in (SUITES | MORE).items():
        layers = commands.add_parser(suite, help=f"check and time {what}")
        layers.set_defaults(run=_suite, dtype="float32")
        layers.add_argument("--json", default=f"results/{suite}.json", help="where results go")
        layers.add_argument("--seconds", type=float, default=SECONDS, help="timing of each case")
        layers.add_argument("--threads", type=int, default=THREADS, help="of torch on a CPU")
        layers.add_argument("--full", action="store_true", help="every provider, every condition")
        if suite in SUITES and suite != "half":
            layers.add_argument("--dtype", choices=DTYPES, default="float32", help="of the layers")

    memory = commands.add_parser("memory", help="what training steps of the layers hold")
    memory.set_defaults(run=_memory)
    memory.add_argument("--json", default="results/memory.json", help="where results go")
    memory.add_argument("--full", action="store_true", help="every provider")

    tuned = commands.add_parser("tuned", help="the cost model's choices beside the fastest")
    tuned.set_defaults(run=_tuned)
    tuned.add_argument("--seconds", type=float, default=SECONDS, help="timing of each case")

    picks = commands.add_parser("picks", help="how often the cost model's pick is the fastest plan")
    picks.set_defaults(run=_picks)
    picks.add_argument("--json", default="results/picks.json", help="where results go")
    picks.add_argument("--seconds", type=float, default=0.05, help="timing of each plan and stage")
    picks.add_argument("--random", type=int, default=200, help="random layers beside the suites'")
    picks.add_argument("--seed", type=int, default=0, help="of the random layers")
    picks.add_argument(
        "--part", type=int, nargs=2, default=(1, 1), help="i and n: the i-th of n parts"
    )
    picks.add_argument("--before", help="an earlier recording, to compare with")
    picks.add_argument("--threads", type=int, default=THREADS, help="of torch on a CPU")

    gpu = commands.add_parser("gpu", help="test and time everything on the GPU at hand")
    gpu.set_defaults(run=_gpu)
    gpu.add_argument("--out", default=None, help="folder of the results")
    gpu.add_argument("--sections", default=None, help="some of them, with commas between")
    gpu.add_argument("--seconds", type=float, default=None, help="of all sections")
    gpu.add_argument("--most", type=int, default=None, help="cases of each kind at most")
    gpu.add_argument("--dry-run", action="store_true", help="without a GPU: nothing is measured")
    gpu.add_argument(
        "--cache", default=None, help="compiled kernels: to use, or without --out to make"
    )
    gpu.add_argument(
        "--publish",
        action="store_true",
        help="write the tables of docs/results/gpu-*/results.jsonl into the docs and the README",
    )
    gpu.add_argument("--capability", type=int, default=90, help="of the stand-in for a GPU")

    compare = commands.add_parser("compare", help="what moved between two results")
    compare.set_defaults(run=_compare)
    compare.add_argument(
        "before", help="a suite's, or several runs with commas between, or a GPU's .jsonl"
    )
    compare.add_argument("after", help="the same")

    report = commands.add_parser("report", help="one HTML page of results")
    report.set_defaults(run=_report)
    report.add_argument("results", nargs="+")
    report.add_argument("--output", default="results/report.html")

    readme = commands.add_parser("readme", help="write the README's table from results")
    readme.set_defaults(run=_readme)
    readme.add_argument("results", nargs="+")
    readme.add_argument("--file", default="README.md")
    readme.add_argument("--every-case", action="store_true", help="not the means alone")

    errors = commands.add_parser("errors", help="errors against float64, ours beside PyTorch's")
    errors.set_defaults(run=_errors)
    errors.add_argument("--write", action="store_true", help="replace the tables of the docs")

    codegen = commands.add_parser("codegen", help="compile every kernel for GPUs not present")
    codegen.set_defaults(run=_codegen)
    codegen.add_argument("--json", default=None, help="where records go")
    codegen.add_argument("--only", default=None, help="kernels, configurations or targets with it")
    codegen.add_argument("--write", action="store_true", help="replace the committed baseline")

    bounds = commands.add_parser("bounds", help="what bounds each kernel's loop, by compiled code")
    bounds.set_defaults(run=_bounds)

    traffic = commands.add_parser("traffic", help="count what Triton's kernels move, without a GPU")
    traffic.set_defaults(run=_traffic)
    traffic.add_argument("--kernels", action="store_true", help="list each path's kernels")
    traffic.add_argument("--write", action="store_true", help="replace the committed baseline")

    filled = commands.add_parser("occupancy", help="how the planned paths fill a GPU, by the model")
    filled.set_defaults(run=_occupancy)
    filled.add_argument("--write", action="store_true", help="replace the committed baseline")

    host = commands.add_parser("host", help="time what the processor takes, without a GPU")
    host.set_defaults(run=_host)
    host.add_argument("--json", default="results/host.json", help="where results go")
    host.add_argument("--seconds", type=float, default=1.0, help="timing of each case")
    host.add_argument("--profile", action="store_true", help="by file of the package, as well")
    host.add_argument("--write", action="store_true", help="replace the committed baseline")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the chosen command. Returns its exit status."""
    chosen = _parser().parse_args(arguments)
    return chosen.run(chosen)
