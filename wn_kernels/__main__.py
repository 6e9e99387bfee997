"""The command line.

python -m wn_kernels info                    what would serve each dtype here, and why
python -m wn_kernels build                   builds the native library, which a CPU is faster with
python -m wn_kernels tune module:factory     times a model's calls and stores the fastest paths
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import wn_kernels

from . import plan
from .backends import native
from .plan import table

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def info() -> str:
    """Versions, devices, and the backend for each dtype on each of them."""
    lines = [
        f"wn_kernels  {wn_kernels.__version__}",
        f"python      {platform.python_version()}",
        f"torch       {torch.__version__}",
        f"triton      {_triton()}",
    ]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else table.processor()
        lines += ["", f"{device}: {name}"]
        for dtype in DTYPES:
            kind = str(dtype).removeprefix("torch.")
            lines.append(f"  {kind:10}{_backend(torch.empty(0, dtype=dtype, device=device))}")
    lines.append("")
    if not torch.cuda.is_available():
        why = "this torch is built without it" if not _has_gpu_build() else "no device found"
        lines.append(f"no GPU: {why}")
    if reason := plan.triton_unavailable():
        lines.append(f"triton cannot be used: {reason}")
    if reason := native.unavailable():
        lines.append(f"the native library cannot be used: {reason}")
    if plan.is_forced():
        lines.append(f"a backend is forced by {plan.ENVIRONMENT_VARIABLE}")
    return "\n".join(lines).rstrip()


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    try:
        return version("triton")
    except PackageNotFoundError:
        return "installed, without metadata"


def _has_gpu_build() -> bool:
    return torch.version.cuda is not None or torch.version.hip is not None


def _backend(x: torch.Tensor) -> str:
    try:
        return plan.serving(x)
    except RuntimeError as error:
        return f"none: {error}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wn_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="the backend for each dtype, versions, devices")
    commands.add_parser("build", help="build the native library with this machine's C++ compiler")
    tune = commands.add_parser("tune", help="time the paths of a model's calls, store the fastest")
    tune.add_argument("factory", help="module:function that returns (model, sample input)")
    tune.add_argument("--seconds", type=float, default=1.0, help="how long each call is timed")
    chosen = parser.parse_args(arguments)
    if chosen.command == "info":
        print(info())
        return 0
    if chosen.command == "build":
        print(native.build())
        return 0
    model, sample = _made(chosen.factory)
    print(wn_kernels.tune(model, sample, seconds=chosen.seconds))
    print(f"stored in {table.location()}")
    return 0


def _made(factory: str) -> Any:
    """What the function that `module:function` names returns.

    Raises:
        SystemExit: there is none.
    """
    module, _, name = factory.partition(":")
    sys.path.insert(0, "")  # of the current directory, too
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(f"tune: {factory!r} names no function of a module: {error}") from error
    return make()


if __name__ == "__main__":
    raise SystemExit(main())
