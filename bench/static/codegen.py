"""Compiles every shipped kernel configuration for GPUs that are not there, and reads the result.

Each launch that `shipped.py` records is compiled for each target as a GPU would have it compiled. A
configuration fails that spills, that needs more shared memory than its target has, whose float16 or
bfloat16 product uses no tensor cores, or whose loads race with its products (`races.py`).
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from bench.report.tables import Table, printed
from bench.static import baseline
from bench.static.races import races
from bench.static.shipped import TYPES, Compilation, shipped


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and its limits for one multiprocessor (compute unit)."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int  # bytes a program may use
    shared_total: int  # bytes a multiprocessor has
    registers: int  # 32-bit registers a multiprocessor has
    threads: int  # resident threads


# CUDA C++ programming guide, "technical specifications per compute capability"; AMD CDNA3 white
# paper: 64 KiB of LDS, 4 SIMDs of 512 vector registers for 64 lanes, 8 waves each.
TARGETS = [
    Target("cuda:80", "cuda", 80, 32, 163 * 1024, 164 * 1024, 65536, 2048),
    Target("cuda:90", "cuda", 90, 32, 227 * 1024, 228 * 1024, 65536, 2048),
    Target("cuda:100", "cuda", 100, 32, 227 * 1024, 228 * 1024, 65536, 2048),
    Target("hip:gfx942", "hip", "gfx942", 64, 64 * 1024, 64 * 1024, 4 * 512 * 64, 2048),
]

# Tables of numbers have these dtypes.
TABLES = {torch.int8: "i8", torch.int32: "i32", torch.int64: "i64"}

# What counts as a tensor-core instruction, by the opcode's beginning.
TENSOR_CORE = re.compile(r"^(HMMA|HGMMA|UTCHMMA|UTC\w*MMA|IMMA|DMMA|QGMMA|v_mfma|v_smfmac)")


@dataclass
class Record:
    """One kernel, configuration and target."""

    kernel: str
    config: str
    target: str
    dtype: str
    registers: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    warps_per_sm: int = 0
    loop_instructions: int = 0
    tensor_core_instructions: int = 0
    load_bits: int = 0
    # Of one iteration of the main loop, all warps: instructions, and bytes by instructions that
    # load or store them.
    issue_slots: int = 0
    shared_traffic: int = 0
    global_traffic: int = 0
    mix: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


# --- compiling -----------------------------------------------------------------------------------


def compile_for(compilation: Compilation, target: Target):
    """Triton's compiled kernel, specialised as its launcher would have it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = compilation.launch
    signature, constants, attributes = {}, {}, {}

    def specialise(path: tuple[int, ...], value: object, is_constant: bool) -> object:
        """The argument's type; what is known of its value goes to its path."""
        if is_constant or value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(specialise((*path, i), v, False) for i, v in enumerate(value))
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return "*" + (TYPES | TABLES)[value.dtype]
        return "i64" if abs(value) >= 2**31 else "i32"

    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        signature[parameter.name] = specialise((i,), value, parameter.is_constexpr)
    return triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )


def inspect(compilation: Compilation, target: Target) -> Record:
    """Compiles and reads registers, spills, shared memory and the main loop."""
    record = Record(compilation.kernel, compilation.config, target.name, compilation.dtype)
    try:
        kernel = compile_for(compilation, target)
    except Exception as error:  # a compiler's failure is this configuration's result
        record.failures.append(f"does not compile: {str(error).splitlines()[-1][:200]}")
        return record
    record.shared_bytes = kernel.metadata.shared
    if target.backend == "cuda":
        instructions = _read_cubin(kernel.asm["cubin"], record)
    else:
        instructions = _read_amdgcn(kernel.asm["amdgcn"], record)
    warps = compilation.launch.num_warps
    loop = _main_loop(instructions)
    record.loop_instructions = len(loop)
    record.mix = dict(_mix(loop))
    record.tensor_core_instructions = sum(
        1 for i in (loop or instructions) if TENSOR_CORE.match(i.opcode)
    )
    record.issue_slots = len(loop) * warps
    lanes = target.warp_size * warps
    record.shared_traffic = lanes * sum(_shared_bytes(i.opcode) for i in loop)
    record.global_traffic = lanes * sum(_global_bytes(i.opcode) for i in loop)
    record.load_bits = max((_load_bits(i.opcode) for i in instructions), default=0)
    record.warps_per_sm = _resident_warps(record, kernel.metadata.num_warps, target)
    if record.spill_bytes:
        record.failures.append(f"spills {record.spill_bytes} bytes")
    if record.shared_bytes > target.shared_limit:
        record.failures.append(f"needs {record.shared_bytes} of {target.shared_limit} bytes shared")
    half = compilation.dtype.split("·")[0] in ("fp16", "bf16", "tf32")
    # With channels last, all loads of activations and of packed weights are as wide as they come.
    flat = compilation.launch.arguments.get("FLAT")
    if compilation.kernel == "conv_kernel" and not flat and record.load_bits < 128:
        record.failures.append(f"loads {record.load_bits} bits, not 128")
    if half and compilation.product and not record.tensor_core_instructions:
        record.failures.append("uses no tensor cores")
    if raced := races(kernel.asm["ttgir"]):
        record.failures.append(f"writes {', '.join(raced)} while a product reads it")
    return record


def _resident_warps(record: Record, warps: int, target: Target) -> int:
    """Warps that registers, shared memory and threads let a multiprocessor hold."""
    threads = warps * target.warp_size
    limits = [target.threads // threads]
    if record.registers:
        limits.append(target.registers // (record.registers * threads))
    if record.shared_bytes:
        limits.append(target.shared_total // record.shared_bytes)
    return max(0, min(limits)) * warps


# --- reading machine code ------------------------------------------------------------------------


@dataclass
class Instruction:
    address: int
    opcode: str
    jump: int | None  # the address it may jump back to


@cache
def _tool(name: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{name} is not part of this triton installation ({path})")
    return str(path)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [_tool(tool), *arguments], capture_output=True, text=True, check=True
    ).stdout


def _read_cubin(cubin: bytes, record: Record) -> list[Instruction]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = _run("cuobjdump", "--dump-resource-usage", "--dump-sass", file.name)
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", dump))
    record.registers = int(numbers["REG"])
    record.stack_bytes = int(numbers["STACK"])
    instructions = []
    for line in dump.splitlines():
        m = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line)
        if m:
            # What its predicate never lets run takes a slot, and moves nothing.
            address, opcode = int(m[1], 16), "NOP" if m[2] and m[2].strip() == "@!PT" else m[3]
            to = re.search(r"0x([0-9a-f]+)", m[4]) if opcode.startswith("BRA") else None
            instructions.append(Instruction(address, opcode, int(to[1], 16) if to else None))
    # A stack without local stores holds no spill. Each STL writes up to 16 bytes a thread.
    width = {"64": 8, "128": 16}
    record.spill_bytes = sum(
        next((width[part] for part in i.opcode.split(".") if part in width), 4)
        for i in instructions
        if i.opcode.startswith("STL")
    )
    return instructions


def _read_amdgcn(text: str, record: Record) -> list[Instruction]:
    def number(name: str) -> int:
        m = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(m[1]) if m else 0

    record.registers = number("vgpr_count") + number("agpr_count")
    record.stack_bytes = number("private_segment_fixed_size")
    record.spill_bytes = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    instructions, labels, pending = [], {}, []
    for line in text.splitlines():
        if m := re.match(r"(\.LBB\w+):", line):
            labels[m[1]] = len(instructions)
        elif m := re.match(r"\t([a-z]\w+)\s*(.*)", line):
            opcode = m[1]
            if opcode.startswith("s_cbranch") or opcode == "s_branch":
                pending.append((len(instructions), m[2].split()[0]))
            instructions.append(Instruction(len(instructions), opcode, None))
    for at, label in pending:
        instructions[at].jump = labels.get(label)
    return instructions


def _loops(instructions: list[Instruction]) -> list[tuple[int, int]]:
    """The first and the last address of each loop. A jump back across the program's end is none: it
    leads from a wait, which lies behind the end, to what waited."""
    ends = [i.address for i in instructions if i.opcode == "EXIT"]
    jumps = [(i.jump, i.address) for i in instructions if i.jump is not None]
    return sorted(
        {(to, at) for to, at in jumps if to < at and not any(to < end < at for end in ends)}
    )


def _body(instructions: list[Instruction], loop: tuple[int, int]) -> list[Instruction]:
    return [i for i in instructions if loop[0] <= i.address <= loop[1]]


def _main_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The shortest of the loops with the most tensor-core instructions; where there are none, the
    longest loop that contains no other."""
    spans = _loops(instructions)
    loops = []
    for start, end in spans:
        body = _body(instructions, (start, end))
        tensor = sum(bool(TENSOR_CORE.match(i.opcode)) for i in body)
        nested = any(s != (start, end) and start <= s[0] and s[1] <= end for s in spans)
        loops.append((tensor, not nested, -len(body) if tensor else len(body), body))
    return max(loops, key=lambda loop: loop[:3], default=(0, False, 0, []))[3]


def _load_bits(opcode: str) -> int:
    """The width of a global load, or of a copy from global to shared memory, per thread."""
    if re.match(r"(LDG|LDGSTS)\b", opcode):
        parts = opcode.split(".")
        return next((int(p) for p in ("128", "64") if p in parts), 16 if "U16" in parts else 32)
    if m := re.match(r"(?:global|buffer)_load_(?:dword|b|u|s|short|ubyte)?(\w*)", opcode):
        if "dword" in opcode:
            return 32 * int((re.search(r"dwordx(\d)", opcode) or [0, 1])[1])
        return 16 if "short" in opcode or "u16" in opcode else int(m[1]) if m[1].isdigit() else 32
    return 0


def _width(opcode: str) -> int:
    """The bytes a lane moves by an opcode of NVIDIA's that names its width in bits."""
    return next((int(p) // 8 for p in ("128", "64") if p in opcode.split(".")), 4)


def _shared_bytes(opcode: str) -> int:
    """The bytes a lane moves into or out of shared memory. What a tensor core reads of it by itself
    has no instruction of its own."""
    if re.match(r"(LDSM|STSM)\b", opcode):  # matrices of 8×8 16-bit elements: 4 bytes a lane each
        return 4 * next((int(part) for part in opcode.split(".") if part in ("2", "4")), 1)
    if re.match(r"(LDS|STS|LDGSTS)\b", opcode):
        return _width(opcode)
    if m := re.match(r"ds_(?:read|write)(2?)(?:st64)?_b(\d+)", opcode):
        return int(m[2]) // 8 * (2 if m[1] else 1)
    return 0


def _global_bytes(opcode: str) -> int:
    """The bytes a lane moves from or to global memory."""
    if re.match(r"STG\b", opcode):
        return _width(opcode)
    return _load_bits(opcode.replace("_store_", "_load_")) // 8


def _mix(loop: list[Instruction]) -> Counter[str]:
    """The loop's instructions by kind."""
    kinds = {
        "tensor core": TENSOR_CORE,
        "global load": re.compile(r"^(LDG|LDGSTS|global_load|buffer_load)"),
        "shared memory": re.compile(r"^(LDS|STS|LDSM|STSM|ds_)"),
        "shuffle": re.compile(r"^(SHFL|ds_bpermute|v_permlane|ds_swizzle)"),
        "conversion": re.compile(r"^(F2F|F2FP|HADD2\.F32|I2F|F2I|PRMT|v_cvt|v_perm)"),
        "fp32": re.compile(r"^(FADD|FMUL|FFMA|v_(pk_)?(add|mul|fma|fmac)_f32)"),
        "fp64": re.compile(r"^(DADD|DMUL|DFMA|v_(add|mul|fma)_f64)"),
        "barrier": re.compile(r"^(BAR|WARPSYNC|DEPBAR|LDGDEPBAR|SYNCS|s_barrier|s_waitcnt)"),
    }
    mix: Counter[str] = Counter()
    for i in loop:
        kind = next((kind for kind, pattern in kinds.items() if pattern.match(i.opcode)), "other")
        mix[kind] += 1
    return mix


# --- command -------------------------------------------------------------------------------------


def records(console: Console, only: str | None = None) -> Iterator[Record]:
    """Compiles on every core."""
    # By position: kernels cannot be pickled, and every process lists them in the same order.
    work = [
        (t, i)
        for t, target in enumerate(TARGETS)
        for i, c in enumerate(shipped(target.name))
        if only is None or re.search(only, f"{c.kernel} {c.config} {c.dtype} {target.name}")
    ]
    with (
        Progress(console=console, transient=True) as progress,
        ProcessPoolExecutor() as pool,
    ):
        task = progress.add_task("compiling", total=len(work))
        for record in pool.map(_inspect, work, chunksize=4):
            yield record
            progress.advance(task)


def _inspect(work: tuple[int, int]) -> Record:
    target = TARGETS[work[0]]
    return inspect(shipped(target.name)[work[1]], target)


def table(found: list[Record]) -> Table:
    names = ["kernel", "configuration", "dtype", "target"]
    names += ["regs", "stack", "spill", "shared", "warps/SM", "loop", "tensor", "load bits"]
    lines = [[*names, "main loop"]]
    for r in found:
        mix = ", ".join(f"{count} {kind}" for kind, count in sorted(r.mix.items()))
        numbers = (r.registers, r.stack_bytes, r.spill_bytes, r.shared_bytes, r.warps_per_sm)
        numbers += (r.loop_instructions, r.tensor_core_instructions, r.load_bits)
        words = r.kernel.removesuffix("_kernel"), r.config, r.dtype, r.target
        lines.append([*words, *map(str, numbers), mix])
    styles = ["red" if r.failures else "" for r in found]
    return printed("compiled code (read, not timed)", lines, styles, slice(4, -1))


def compiler() -> str:
    """Whose code the figures are read from."""
    return f"triton {version('triton')}"


def figures(found: list[Record]) -> baseline.Figures:
    """What is held by the baseline."""
    return {
        f"{r.kernel} {r.config} {r.dtype} {r.target}": {
            "loop_instructions": r.loop_instructions,
            "registers": r.registers,
            "shared_bytes": r.shared_bytes,
        }
        for r in found
    }


def main(path: str | None, only: str | None, write: bool) -> int:
    """Prints the table, writes the records to `path`; 1 where a configuration fails, or is worse
    than the same compiler's baseline, which `write` replaces."""
    console = Console()
    found = list(records(console, only))
    wide = Console(width=240) if not console.is_terminal else console
    wide.print(table(found))
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps([asdict(r) for r in found], indent=1) + "\n")
        console.print(f"{len(found)} records written to {path}")
    failed = [r for r in found if r.failures]
    for r in failed:
        reasons = "; ".join(r.failures)
        console.print(f"[red]FAILED[/] {r.kernel} {r.config} {r.dtype} {r.target}: {reasons}")
    console.print(f"{len(found) - len(failed)} of {len(found)} configurations pass")
    worse = baseline.settle(console, "codegen", figures(found), write, only is None, compiler())
    return 1 if failed or worse or not found else 0
