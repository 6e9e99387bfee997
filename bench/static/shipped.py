"""What ships: every kernel under every pinned configuration, form and dtype.

The launchers run as they are, on tensors without memory, with their launches recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wn_kernels.backends.tiles import one_pass_rows
from wn_kernels.call import (
    NORMS,
    Geometry,
    Member,
    Norm,
    fits_unscaled,
    kept_shape,
    narrows_range,
)

if TYPE_CHECKING:
    from wn_kernels.backends.triton.launch import Launch

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}

# The flags that tell a kernel's variants apart.
FLAGS = (
    *("FORM", "PHASED", "FLAT", "BIAS", "FUSED", "AS_NORM", "GRAD", "SUM", "WIDE"),
    *("KEEP", "PARTS", "DOTS", "NEEDS_X", "NORM", "COUNTS"),
)

# Dtypes whose kernels without a product are those of another one, but for a conversion.
AS_OTHERS = ("tf32", "fp16", "fp16·fp32")

# The kernels that multiply matrices.
PRODUCTS = (
    "one_pass_kernel",
    "grad_one_pass_kernel",
    "grads_kernel",
    "weight_product_kernel",
    "conv_kernel",
    "conv_grad_kernel",
)


@dataclass
class Compilation:
    """A recorded launch, named."""

    kernel: str
    config: str
    dtype: str
    launch: Launch
    product: bool  # whether it multiplies matrices

    @property
    def title(self) -> str:
        """Its kernel and its configuration."""
        return f"{self.kernel} {self.config}"


# Convolutions that between them take every form and tile: (rank, inputs, outputs, taps, stride,
# transposed, groups, size). Fewer channels than a block are walked together with the taps; with few
# pixels, programs share the taps.
CONVOLUTIONS = [
    (2, 256, 256, 3, 1, False, 1, 32),
    (2, 256, 256, 4, 2, True, 1, 32),
    (2, 3, 64, 5, 1, False, 1, 32),
    (2, 768, 768, 3, 1, False, 768, 32),
    (1, 256, 512, 7, 1, False, 1, 4),
    (1, 512, 256, 16, 8, True, 1, 4),
    (1, 64, 64, 3, 1, False, 1, 128),
]


@cache
def shipped(architecture: str) -> list[Compilation]:
    """Every kernel under every pinned configuration, form and dtype, for a target by its name."""
    from wn_kernels.backends.triton import configs
    from wn_kernels.backends.triton.launch import recording

    found: dict[tuple, Compilation] = {}
    runs = (_linear_launches, _convolution_launches, _group_launches)
    # A kernel differs by its norm in a few instructions, which one dtype is enough to compile.
    every = [(types, "l2") for types in _dtypes()]
    every += [(types, norm) for types in _dtypes() if types[0] == "bf16" for norm in NORMS[1:]]
    for (dtype, x_dtype, v_dtype), norm in every:
        for run in runs:
            with (
                configs.architecture(architecture),
                _float32_products(dtype == "tf32"),
                recording() as launches,
            ):
                marks = [(len(launches), note) for note in run(dtype, x_dtype, v_dtype, norm)]
            start = 0
            for end, note in marks:
                for launch in launches[start:end]:
                    compilation = named(launch, dtype, note)
                    if dtype in AS_OTHERS and not compilation.product:
                        continue
                    key = (compilation.kernel, compilation.config, dtype)
                    found.setdefault(key, compilation)
                start = end
    return list(found.values())


def _dtypes() -> Iterator[tuple[str, torch.dtype, torch.dtype]]:
    """Name, and dtypes of the product and of V."""
    yield from ((name, t, t) for t, name in TYPES.items())
    yield "bf16·fp32", torch.bfloat16, torch.float32
    yield "fp16·fp32", torch.float16, torch.float32
    yield "tf32", torch.float32, torch.float32


@contextmanager
def _float32_products(tf32: bool) -> Iterator[None]:
    """Sets PyTorch to take float32 products, of matrices and of convolutions, in TF32 or not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _scales(v: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    """`g` and the norms that go with `V`."""
    g = torch.empty(kept_shape(v.shape, dim), dtype=v.dtype, device="meta")
    return g, g.to(torch.float64 if v.dtype == torch.float64 else torch.float32)


def _linear_launches(
    dtype: str, x_dtype: torch.dtype, v_dtype: torch.dtype, norm: Norm
) -> Iterator[str]:
    """Launches every form; after each `dim`, what tells it apart."""
    from wn_kernels.backends import triton as backend

    needs = (True, True, True, True)
    few = [(m, 4096, o) for m in (16, 32, 64, 128, 256) for o in (4096, 8192, 65536)]
    small = [(64, 1024, 1024), (64, 1024, 4096), (64, 4096, 1024)]
    # The first launch of a name is compiled: one of several steps, which are a loop.
    sizes = [(1, 4096, 4096), *few, *small, (4096, 4096, 4096)]
    if norm != "l2":
        sizes = [(16, 4096, 4096), (512, 4096, 4096)]
    elif dtype == "bf16":  # 64-bit offsets
        sizes += [(16, 65536, 65536), (128, 65536, 65536), (65536, 65536, 65536)]
    for dim, (m, k, o) in itertools.product((0, 1, None), sizes):
        x, dy = (torch.empty(m, size, dtype=x_dtype, device="meta") for size in (k, o))
        v = torch.empty(o, k, dtype=v_dtype, device="meta")
        bias = v.new_empty(o)
        g, n = _scales(v, dim)
        size = max(x.element_size(), v.element_size())
        if fits_unscaled(x_dtype, v_dtype):
            backend.linear(x, v, g, bias, dim, 0.0, "scaled", norm=norm)
            backend.linear_backward(dy, x, v, g, n, dim, 0.0, "scaled", needs, norm=norm)
        ieee = x_dtype == torch.float32 and dtype != "tf32"
        one_pass = dim == 0 and m <= one_pass_rows(size, ieee=ieee)
        if one_pass and not narrows_range(x_dtype, v_dtype):
            backend.linear(x, v, g, bias, dim, 0.0, "one_pass", norm=norm)
        few = dim == 0 and m <= one_pass_rows(size)
        many = dim == 0 and not few and x_dtype.itemsize == v_dtype.itemsize == 2
        if (few or many) and x_dtype != torch.float16:
            variant = "one_pass" if few else "scaled"
            _, _, kept = backend.linear(x, v, g, bias, dim, 0.0, variant, True, norm=norm)
            backend.linear_backward(dy, x, v, g, n, dim, 0.0, "product", needs, kept, norm=norm)
        if m <= one_pass_rows(size, grad=True) and dim is not None:
            backend.linear_backward(dy, x, v, g, n, dim, 0.0, "one_pass", needs, norm=norm)
        w, _ = backend.weight_norm(v, g, dim, 0.0, x_dtype, norm=norm)
        backend.weight_norm_backward(w, v, g, n, dim, 0.0, norm=norm)
        yield "dim=1" if dim == 1 else ""


def _convolution_launches(
    dtype: str, x_dtype: torch.dtype, v_dtype: torch.dtype, norm: Norm
) -> Iterator[str]:
    """The same for convolutions, with channels last."""
    from wn_kernels.backends import triton as backend

    convolutions = list(CONVOLUTIONS)
    if norm != "l2":  # the one that takes norms in the loop of its product
        convolutions = [case for case in CONVOLUTIONS if case[6] > 1]
    elif dtype == "bf16":  # the other ranks
        convolutions += [(rank, *CONVOLUTIONS[0][1:]) for rank in (1, 3)]
    for rank, inputs, outputs, taps, stride, transposed, groups, size in convolutions:
        first, second = (inputs, outputs) if transposed else (outputs, inputs)
        v = torch.empty(first, second // groups, *(taps,) * rank, dtype=v_dtype, device="meta")
        each = (1,) * rank
        conv = Geometry((stride,) * rank, each, each, transposed, (0,) * rank, groups)
        x_sizes = (size,) * rank
        y_sizes = conv.output_sizes(x_sizes, v.shape[2:])
        x, dy = (
            torch.empty(8, *sizes, channels, dtype=x_dtype, device="meta").movedim(-1, 1)
            for sizes, channels in ((x_sizes, inputs), (y_sizes, outputs))
        )
        bias = v.new_empty(outputs)
        g, n = _scales(v, 0)
        # One layer is enough to have the kernels that activations with channels first need.
        layouts = [(x, dy)] if size == 32 else [(x, dy), (x.contiguous(), dy.contiguous())]
        for x, dy in layouts:
            backend.convolution(x, v, g, bias, conv, 0, 0.0, "packed", norm=norm)
            needs = (True, True, True, True)
            options = conv, 0, 0.0, "packed", needs
            backend.convolution_backward(dy, x, v, g, n, *options, norm=norm)
            if conv.has_small_groups(v.shape) and not narrows_range(x_dtype, v_dtype):
                backend.convolution(x, v, g, bias, conv, 0, 0.0, "one_pass", norm=norm)
        yield f"{rank}d"


# Between them, weights of these shapes, each with its `dim`, take every tile of a group.
GROUP = [
    ((512, 80, 7), 0),
    ((256, 128, 16), 0),
    ((128, 32, 3), 0),
    ((32, 1, 7), 0),
    ((64, 512, 11), 0),
    ((64, 48, 128), 2),
    ((64, 64, 4), 1),
]


def _group_launches(
    dtype: str, x_dtype: torch.dtype, v_dtype: torch.dtype, norm: Norm
) -> Iterator[str]:
    """Launches the two kernels of a group."""
    from wn_kernels.backends.triton import group

    v = [torch.empty(shape, dtype=v_dtype, device="meta") for shape, _ in GROUP]
    scales = [_scales(t, dim) for t, (_, dim) in zip(v, GROUP, strict=True)]
    g, n = ([pair[i] for pair in scales] for i in (0, 1))
    members = tuple(Member(dim, 0.0, x_dtype, norm) for _, dim in GROUP)
    w, _ = group.weight_norms(v, g, members)
    group.weight_norms_backward(w, v, g, n, members)
    yield ""


def named(launch: Launch, dtype: str, note: str) -> Compilation:
    """The recorded launch, under a name that tells it from the others."""
    from wn_kernels.backends.triton.group import Kind

    name = launch.kernel.__name__
    flags = [
        flag if value is True else f"{flag}={value}"
        for flag, value in launch.arguments.items()
        if flag in FLAGS and (value is True or (isinstance(value, str) and value not in ("", "l2")))
    ]
    blocks = [
        str(launch.arguments[block])
        for block in (
            *("BLOCK_M", "BLOCK_O", "BLOCK_N", "BLOCK_P", "BLOCK_R", "BLOCK_S", "BLOCK_C"),
        )
        if block in launch.arguments
    ]
    if kinds := launch.arguments.get("KINDS"):
        blocks = [f"{len(kinds)} kinds"]
        norms = {kind[Kind._fields.index("NORM")].value for kind in kinds} - {"l2"}
        flags += [f"NORM={norm}" for norm in sorted(norms)]
    words = ["x".join(blocks), f"w{launch.num_warps}", f"s{launch.num_stages}", *flags]
    if "d" not in note or "taps" in launch.arguments:  # a rank says nothing of a weight's kernels
        words.append(note)
    product = name in PRODUCTS
    return Compilation(name, " ".join(words).strip(), dtype, launch, product)
