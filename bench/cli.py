"""The command line of `python -m bench`; without a command, every suite of layers."""

from __future__ import annotations

import argparse
import os

SUITES = {"linear": "linear layers", "conv": "convolutions"}
MODELS = {"models": "whole models (needs the extra of that name)"}
SECONDS = 4.0  # a case, so that all of them take five minutes on two cores


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command")

    for suite, what in (SUITES | MODELS).items():
        layers = commands.add_parser(suite, help=f"check and time {what}")
        layers.add_argument("--json", default=f"results/{suite}.json", help="where results go")
        layers.add_argument("--seconds", type=float, default=SECONDS, help="timing of each case")
        layers.add_argument("--threads", type=int, default=2, help="of torch on a CPU")

    codegen = commands.add_parser("codegen", help="compile every kernel for GPUs not present")
    codegen.add_argument("--json", default=None, help="where records go")
    codegen.add_argument("--only", default=None, help="kernels, configurations or targets with it")

    codegen.add_argument(
        "--norm-cost", action="store_true", help="instead: each form beside a plain matmul"
    )

    traffic = commands.add_parser("traffic", help="count what Triton's kernels move, without a GPU")
    traffic.add_argument("--kernels", action="store_true", help="list each path's kernels")
    traffic.add_argument("--write", action="store_true", help="replace the committed baseline")

    chosen = parser.parse_args(arguments)
    if chosen.command == "traffic":
        os.environ["TRITON_INTERPRET"] = "1"
        from bench import traffic as counts

        return counts.main(chosen.write, chosen.kernels)
    if chosen.command == "codegen":
        os.environ.pop("TRITON_INTERPRET", None)  # compiles, so must not interpret
        from bench import codegen as check

        return check.norm_cost() if chosen.norm_cost else check.main(chosen.json, chosen.only)

    import torch

    from bench import suite as layers

    torch.set_num_threads(getattr(chosen, "threads", 2))
    if chosen.command is not None:
        return layers.main(chosen.command, chosen.json, chosen.seconds)
    # Every suite; the worst of their answers.
    return max(layers.main(suite, f"results/{suite}.json", SECONDS) for suite in SUITES)
