"""PyTorch's own convolution, as every path calls it that leaves a product to PyTorch.

On a processor with AMX, oneDNN's convolutions of bfloat16 tensors with three spatial dimensions
read memory that is not theirs: their results are wrong by up to 1e15, and some calls crash. There,
these products are computed in float32 and rounded once, in every direction. That is slower, and
right. It holds for the definition in `reference.py`, too, because a definition must not depend on
the processor. float16 is treated alike where the processor has AMX instructions for it: the same
kernels serve it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..call import Geometry

_plain_backward = torch.ops.aten.convolution_backward.default

# What oneDNN may be held to that has no AMX, by its variable, whose older spelling comes second.
ONEDNN_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_WITHOUT_AMX = frozenset(
    (
        *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX10_1_512"),
        *("AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_FP16"),
    )
)


def cpu_flags() -> frozenset[str]:
    """The instruction sets that the operating system reports of this processor, as it spells them;
    none where it has no such list."""
    try:
        with open("/proc/cpuinfo") as lines:  # of one core: a list of all takes its time
            first = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    except OSError:
        return frozenset()
    return frozenset(first.split(":", 1)[1].split())


def _wrong_in_3d() -> frozenset[torch.dtype]:
    """The dtypes whose convolutions with three spatial dimensions PyTorch gets wrong here."""
    held = next((os.environ[name] for name in ONEDNN_VARIABLES if name in os.environ), "")
    if held.upper() in _WITHOUT_AMX:
        return frozenset()
    flags = cpu_flags()
    kinds = {"amx_bf16": torch.bfloat16, "amx_fp16": torch.float16}
    return frozenset(dtype for flag, dtype in kinds.items() if flag in flags)


# Found once: oneDNN, too, reads its variable once.
WRONG_IN_3D = _wrong_in_3d()


def is_wrong(x: Tensor) -> bool:
    """Whether PyTorch's own convolution of `x` is wrong on this processor."""
    return x.ndim == 5 and x.dtype in WRONG_IN_3D and x.is_cpu


def convolution(x: Tensor, w: Tensor, bias: Tensor | None, conv: Geometry) -> Tensor:
    """`torch.convolution` of `x`, `(B, C, *sizes)`, with `w`, all of one dtype. Differentiable."""
    if not is_wrong(x):
        return torch.convolution(x, w, bias, *conv)
    with torch.autocast("cpu", enabled=False):
        wide = None if bias is None else bias.float()
        return torch.convolution(x.float(), w.float(), wide, *conv).to(x.dtype)


def convolution_backward(
    dy: Tensor, x: Tensor, w: Tensor, conv: Geometry, needs: tuple[bool, bool, bool]
) -> tuple[Any, Any, Any]:
    """`(dX, dW, db)` of `convolution`, `None` where `needs` says so."""
    sizes = [dy.shape[1]]
    if not is_wrong(x):
        return _plain_backward(dy, x, w, sizes, *conv, needs)
    with torch.autocast("cpu", enabled=False):
        grads = _plain_backward(dy.float(), x.float(), w.float(), sizes, *conv, needs)
    dx, dw, db = (None if grad is None else grad.to(x.dtype) for grad in grads)
    return dx, dw, db
