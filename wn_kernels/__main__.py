"""The commands of this package run as `python -m wn_kernels` or, once installed, as `wn-kernels`.

info                    prints versions, devices and backends for a bug report
build                   builds the native library, which makes layers on a CPU faster, and measures
                        the rates of the processor
tune module:factory     times the calls of a model and stores the fastest plans
fuse module:factory     reports which layers of a model `fuse` would convert
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import wn_kernels

from . import calibration, plan
from .backends import native, vendor
from .plan import rates, table

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# These instruction sets decide which kernels run. The keys are Linux's spelling, and the values are
# the usual one.
INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bfloat16",
    "avx512_fp16": "AVX-512 float16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX bfloat16",
    "amx_fp16": "AMX float16",
    "asimd": "NEON",
    "sve": "SVE",
}

# Variables with these names or prefixes change what runs, or how fast.
VARIABLES = (
    *vendor.ONEDNN_VARIABLES,
    *("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "OPENBLAS_CORETYPE"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "XDG_CACHE_HOME", "CXX", "CUDA_VISIBLE_DEVICES"),
)
PREFIXES = ("WN_KERNELS_", "TRITON_")


def info() -> str:
    """Returns the contents of a bug report. They are the versions, the processor, the backend of
    each dtype on each device, the native library, the tuned table and the environment."""
    lines = [
        f"wn_kernels  {wn_kernels.__version__}",
        f"python      {platform.python_version()}, {platform.platform()}",
        f"torch       {torch.__version__}, {_gpu_build()}",
        f"triton      {_triton()}",
        "",
        f"cpu: {table.processor()}",
        f"  it has      {_instructions()}",
        f"  torch uses  {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads",
    ]
    if wrong := sorted(str(dtype).removeprefix("torch.") for dtype in vendor.WRONG_IN_3D):
        lines.append(f"  convolutions in 3-d are computed in float32 for {', '.join(wrong)}")
    lines += _backends(torch.device("cpu"))
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        lines += ["", f"cuda:{i}: {torch.cuda.get_device_name(i)}"]
        lines += _backends(torch.device("cuda", i))
    lines += ["", *_native_library(), f"rates of the cpu: {_rates()}", f"tuned table: {_tuned()}"]
    if not torch.cuda.is_available():
        why = "no device found" if _has_gpu_build() else "this torch is built without it"
        lines.append(f"no GPU: {why}")
    if reason := plan.triton_unavailable():
        lines.append(f"triton cannot be used: {reason}")
    if plan.is_forced():
        lines.append(f"a backend is forced by {plan.ENVIRONMENT_VARIABLE}")
    lines += ["", "environment:"]
    lines += [
        f"  {name}={value}"
        for name, value in sorted(os.environ.items())
        if name in VARIABLES or name.startswith(PREFIXES)
    ] or ["  none of the variables that matter"]
    return "\n".join(lines)


def _instructions() -> str:
    flags = vendor.cpu_flags()
    if not flags:
        return "instruction sets that this system does not report"
    return ", ".join(name for flag, name in INSTRUCTIONS.items() if flag in flags) or "none known"


def _backends(device: torch.device) -> list[str]:
    return [
        f"  {str(dtype).removeprefix('torch.'):10}"
        + _backend(torch.empty(0, dtype=dtype, device=device))
        for dtype in DTYPES
    ]


def _native_library() -> list[str]:
    """Returns whether the library can be used or why not, its path, and the compiler that built
    it."""
    if reason := native.unavailable():
        lines = [f"the native library cannot be used: {reason}"]
    else:
        lines = [f"native library: loaded, built by {native.compiler()}"]
    return [*lines, f"  its file: {native.location()}"]


def _rates() -> str:
    measured = rates.find()
    if measured is not None:
        return f"{measured}\n  their file: {rates.location()}"
    if rates.location() is None:
        return f"none, by {rates.VARIABLE}"
    return "none measured (python -m wn_kernels build does); the constants serve as they are"


def _tuned() -> str:
    path = table.location()
    return str(path) if os.path.exists(path) else f"none ({path} does not exist)"


def _gpu_build() -> str:
    if torch.version.cuda is not None:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for HIP {torch.version.hip}" if torch.version.hip else "built for the CPU alone"


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


# The help of each command ends with its example.
EXAMPLES = {
    "info": "python -m wn_kernels info",
    "build": "python -m wn_kernels build",
    "tune": "python -m wn_kernels tune my_project.models:vocoder_and_frames --seconds 2",
    "fuse": "python -m wn_kernels fuse my_project.models:vocoder",
}


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m wn_kernels",
        description=__doc__,
        epilog="`python -m wn_kernels COMMAND --help` shows an example of a command.",
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=wn_kernels.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, what: str) -> argparse.ArgumentParser:
        example = f"example:\n  {EXAMPLES[name]}"
        description = f"{what[0].upper()}{what[1:]}."
        return commands.add_parser(
            name, help=what, description=description, epilog=example, formatter_class=raw
        )

    add("info", "print versions, devices and the backend of each dtype")
    add("build", "build the native library with this machine's C++ compiler, and measure it")
    tune = add("tune", "time the plans of a model's calls and store the fastest")
    tune.add_argument("factory", help="module:function, which returns (model, sample input)")
    tune.add_argument(
        "--seconds", type=_positive, default=1.0, help="how long each call is timed, in seconds"
    )
    fuse = add("fuse", "report which layers of a model `fuse` would convert; nothing is changed")
    fuse.add_argument("factory", help="module:function, which returns the model or (model, sample)")
    return parser


def _positive(text: str) -> float:
    """Returns a positive number that was written on the command line."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    chosen = _parser().parse_args(arguments)
    if chosen.command == "info":
        print(info())
    elif chosen.command == "build":
        if not native.location().exists():
            print("the compiler takes about a minute", file=sys.stderr)
        print(native.build())
        if measured := calibration.ensure():
            print(f"rates of the cpu: {measured}", file=sys.stderr)
    elif chosen.command == "fuse":
        made = _made(chosen)
        model = made[0] if isinstance(made, tuple) and made else made
        _check(chosen, model, "a model or a tuple that begins with one")
        print(wn_kernels.fuse(model, dry_run=True))
    else:
        made = _made(chosen)
        pair = isinstance(made, tuple) and len(made) == 2
        _check(chosen, made[0] if pair else None, "a tuple of a model and its sample input")
        tuned = wn_kernels.tune(*made, seconds=chosen.seconds)
        print(tuned)
        if tuned:
            print(f"stored in {table.location()}")
        else:
            print("nothing is stored: the model makes no call that is planned here. Is it fused?")
    return 0


def _made(chosen: argparse.Namespace) -> Any:
    """Calls the function that `module:function` names, and returns its result.

    Raises:
        SystemExit: there is no such function.
    """
    module, _, name = chosen.factory.partition(":")
    if not (module and name) or module.startswith("."):
        raise SystemExit(f"{chosen.command}: expected module:function, got {chosen.factory!r}")
    sys.path.insert(0, "")  # this allows modules of the current directory
    names_none = f"{chosen.command}: {chosen.factory!r} names no function of a module: "
    try:
        holder = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # one that the module itself imports
            raise
        raise SystemExit(f"{names_none}{error}") from error
    if not hasattr(holder, name):
        raise SystemExit(f"{names_none}module {module!r} has no attribute {name!r}")
    make = getattr(holder, name)
    if isinstance(make, torch.nn.Module) or not callable(make):
        raise SystemExit(f"{chosen.command}: {chosen.factory} is no function")
    return make()


def _check(chosen: argparse.Namespace, model: Any, expected: str) -> None:
    """Raises SystemExit if a factory did not return what its command needs."""
    if not isinstance(model, torch.nn.Module):
        raise SystemExit(f"{chosen.command}: {chosen.factory} must return {expected}")


if __name__ == "__main__":
    raise SystemExit(main())
