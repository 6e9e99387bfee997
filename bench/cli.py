"""The command line of `python -m bench`."""

from __future__ import annotations

import argparse
import os


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command")

    linear = commands.add_parser("linear", help="check and time linear layers (the default)")
    linear.add_argument("--json", default="results/linear.json", help="where results go")
    linear.add_argument("--seconds", type=float, default=12.0, help="timing of each case")
    linear.add_argument("--threads", type=int, default=2, help="of torch on a CPU")

    codegen = commands.add_parser("codegen", help="compile every kernel for GPUs not present")
    codegen.add_argument("--json", default=None, help="where records go")
    codegen.add_argument("--only", default=None, help="kernels, configurations or targets with it")

    codegen.add_argument(
        "--norm-cost", action="store_true", help="instead: each form beside a plain matmul"
    )

    chosen = parser.parse_args(arguments)
    if chosen.command == "codegen":
        os.environ.pop("TRITON_INTERPRET", None)  # compiles, so must not interpret
        from bench import codegen as check

        return check.norm_cost() if chosen.norm_cost else check.main(chosen.json, chosen.only)

    import torch

    from bench import linear as suite

    chosen = linear.parse_args([]) if chosen.command is None else chosen
    torch.set_num_threads(chosen.threads)
    return suite.main(chosen.json, chosen.seconds)
