"""The command line of `python -m bench`; without a command, every suite of layers."""

from __future__ import annotations

import argparse
import os

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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command")

    for suite, what in (SUITES | MORE).items():
        layers = commands.add_parser(suite, help=f"check and time {what}")
        layers.add_argument("--json", default=f"results/{suite}.json", help="where results go")
        layers.add_argument("--seconds", type=float, default=SECONDS, help="timing of each case")
        layers.add_argument("--threads", type=int, default=2, help="of torch on a CPU")
        layers.add_argument("--full", action="store_true", help="every provider, every condition")
        if suite in SUITES and suite != "half":
            layers.add_argument("--dtype", choices=DTYPES, default="float32", help="of the layers")

    memory = commands.add_parser("memory", help="what training steps of the layers hold")
    memory.add_argument("--json", default="results/memory.json", help="where results go")
    memory.add_argument("--full", action="store_true", help="every provider")

    tuned = commands.add_parser("tuned", help="the cost model's choices beside the fastest")
    tuned.add_argument("--seconds", type=float, default=SECONDS, help="timing of each case")

    picks = commands.add_parser("picks", help="how often the cost model's pick is the fastest plan")
    picks.add_argument("--json", default="results/picks.json", help="where results go")
    picks.add_argument("--seconds", type=float, default=0.2, help="timing of each plan")
    picks.add_argument("--random", type=int, default=200, help="random layers beside the suites'")
    picks.add_argument("--threads", type=int, default=2, help="of torch on a CPU")

    device = commands.add_parser("gpu", help="test and time everything on the GPU at hand")
    device.add_argument("--out", default=None, help="folder of the results")
    device.add_argument("--sections", default=None, help="some of them, with commas between")
    device.add_argument("--seconds", type=float, default=None, help="of all sections")
    device.add_argument("--most", type=int, default=None, help="cases of each kind at most")
    device.add_argument("--dry-run", action="store_true", help="without a GPU: nothing is measured")
    device.add_argument(
        "--cache", default=None, help="compiled kernels: to use, or without --out to make"
    )
    device.add_argument(
        "--publish",
        action="store_true",
        help="write the tables of docs/results/gpu-*/results.jsonl into the docs and the README",
    )
    device.add_argument("--capability", type=int, default=90, help="of the stand-in for a GPU")

    compare = commands.add_parser("compare", help="what moved between two results")
    compare.add_argument(
        "before", help="a suite's, or several runs with commas between, or a GPU's .jsonl"
    )
    compare.add_argument("after", help="the same")

    report = commands.add_parser("report", help="one HTML page of results")
    report.add_argument("results", nargs="+")
    report.add_argument("--output", default="results/report.html")

    readme = commands.add_parser("readme", help="write the README's table from results")
    readme.add_argument("results", nargs="+")
    readme.add_argument("--file", default="README.md")
    readme.add_argument("--every-case", action="store_true", help="not the means alone")

    errors = commands.add_parser("errors", help="errors against float64, ours beside PyTorch's")
    errors.add_argument("--write", action="store_true", help="replace the tables of the docs")

    codegen = commands.add_parser("codegen", help="compile every kernel for GPUs not present")
    codegen.add_argument("--json", default=None, help="where records go")
    codegen.add_argument("--only", default=None, help="kernels, configurations or targets with it")
    codegen.add_argument("--write", action="store_true", help="replace the committed baseline")

    commands.add_parser("bounds", help="what bounds each kernel's loop, by compiled code")

    traffic = commands.add_parser("traffic", help="count what Triton's kernels move, without a GPU")
    traffic.add_argument("--kernels", action="store_true", help="list each path's kernels")
    traffic.add_argument("--write", action="store_true", help="replace the committed baseline")

    filled = commands.add_parser("occupancy", help="how the planned paths fill a GPU, by the model")
    filled.add_argument("--write", action="store_true", help="replace the committed baseline")

    host = commands.add_parser("host", help="time what the processor takes, without a GPU")
    host.add_argument("--json", default="results/host.json", help="where results go")
    host.add_argument("--seconds", type=float, default=1.0, help="timing of each case")
    host.add_argument("--profile", action="store_true", help="by file of the package, as well")
    host.add_argument("--write", action="store_true", help="replace the committed baseline")

    chosen = parser.parse_args(arguments)
    if chosen.command == "tuned":
        from bench import tuned as choices

        return choices.main(chosen.seconds)
    if chosen.command == "picks":
        import torch

        from bench import picks as choices_of

        torch.set_num_threads(chosen.threads)
        return choices_of.main(chosen.json, chosen.seconds, chosen.random)
    if chosen.command == "memory":
        from bench import memory as held

        return held.main(chosen.json, chosen.full)
    if chosen.command == "gpu":
        from bench.gpu import run

        if chosen.publish:
            from bench.gpu import page

            return page.write()
        return run.main(
            chosen.out,
            chosen.sections,
            chosen.seconds,
            chosen.dry_run,
            chosen.cache,
            chosen.capability,
            chosen.most,
        )
    if chosen.command == "compare":
        from bench.report import compare as comparison

        return comparison.main(chosen.before, chosen.after)
    if chosen.command in ("report", "readme"):
        from bench.report import page as pages

        if chosen.command == "readme":
            return pages.readme(chosen.results, chosen.file, chosen.every_case)
        return pages.main(chosen.results, chosen.output)
    if chosen.command == "errors":
        from bench import errors as table

        return table.main(chosen.write)
    if chosen.command == "host":
        from bench import host as calls

        return calls.main(chosen.json, chosen.seconds, chosen.profile, chosen.write)
    if chosen.command == "traffic":
        os.environ["TRITON_INTERPRET"] = "1"
        from bench.stand_in import interpreter
        from bench.static import traffic as counts

        interpreter.mend()
        return counts.main(chosen.write, chosen.kernels)
    if chosen.command == "occupancy":
        from bench.static import occupancy

        return occupancy.main(chosen.write)
    if chosen.command in ("codegen", "bounds"):
        os.environ.pop("TRITON_INTERPRET", None)  # compiles, so must not interpret
        if chosen.command == "bounds":
            from bench.static import bounds as cycles

            return cycles.main()
        from bench.static import codegen as check

        return check.main(chosen.json, chosen.only, chosen.write)

    import torch

    from bench import suite as layers

    torch.set_num_threads(getattr(chosen, "threads", 2))
    if chosen.command is not None:
        dtype = getattr(chosen, "dtype", "float32")
        return layers.main(chosen.command, chosen.json, chosen.seconds, chosen.full, dtype)
    # Every suite; the worst of their answers.
    return max(layers.main(suite, f"results/{suite}.json", SECONDS) for suite in SUITES)
