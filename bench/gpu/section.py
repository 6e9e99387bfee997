"""This is the process of a section, or of several: `python -m bench.gpu.section NAME,... --out
DIR`."""

from __future__ import annotations

import argparse
import importlib
import math
import os
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from bench import stand_in
from bench.gpu import results
from bench.gpu.sections import named


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections. Returns 1 if something was wrong or raised."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.section", description=__doc__)
    parser.add_argument("names", help="with commas between")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, default=math.inf, help="as time.time() has it")
    parser.add_argument("--most", type=int, default=None)
    parser.add_argument("--dry-run", type=int, default=None, metavar="CAPABILITY")
    chosen = parser.parse_args(arguments)
    dry = chosen.dry_run is not None
    # Nothing that was tuned on this machine: the cost model's choices are what is looked at.
    os.environ["WN_KERNELS_TABLE"] = str(chosen.out / "no-such-table.json")
    with ExitStack() as stack:
        if dry:
            stand_in.activate(divmod(chosen.dry_run, 10))
        import torch

        from bench import suite
        from bench.gpu.context import Context
        from bench.measure import precision

        precision.set_tf32(False)
        device = torch.device("cpu" if dry else "cuda")
        if dry:
            for block in _nothing_computes():
                stack.enter_context(block)
        what = {"environment": suite.environment(device), "settings": {"dtype": "", "dry_run": dry}}
        failed = []
        for name in chosen.names.split(","):
            results.append(chosen.out, name, "environment", **what)
            context = Context(name, chosen.out, chosen.until, dry, chosen.most, device)
            importlib.import_module(named(name).module).main(context)
            failed += context.failed
    for message in failed:
        print(f"FAILED {message}", flush=True)
    return 1 if failed else 0


def _nothing_computes() -> list[AbstractContextManager[Any]]:
    """Returns the blocks in which tensors of the CPU are those of a GPU that computes nothing."""
    import wn_kernels
    from bench.stand_in.hollow import hollow

    return [wn_kernels.use_backend("triton"), hollow()]


if __name__ == "__main__":
    raise SystemExit(main())
