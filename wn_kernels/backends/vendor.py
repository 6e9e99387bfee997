"""Every path that leaves a convolution to PyTorch calls it through this file, which has the plain
layers' gradients as well.

On a processor with AMX, oneDNN's convolutions of bfloat16 tensors with three spatial dimensions
read out of bounds. Their results are wrong by up to 1e15, and some calls crash. There, these
products are computed in float32 and rounded once, forward and backward. That is slower, but
correct. The definition in `reference.py` does the same, because a definition must not depend on the
processor. float16 is treated alike if the processor has AMX instructions for it, because the same
kernels serve it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..call import Geometry, rows_of

_plain_backward = torch.ops.aten.convolution_backward.default

# These variables limit the instruction sets that oneDNN uses; the older spelling comes second. The
# values below exclude AMX.
ONEDNN_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_WITHOUT_AMX = frozenset(
    (
        *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX10_1_512"),
        *("AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_FP16"),
    )
)


def cpu_flags() -> frozenset[str]:
    """Returns the instruction sets that the operating system reports for this processor, in its
    spelling. The set is empty if the system has no such list."""
    try:
        with open("/proc/cpuinfo") as lines:  # one core is enough; reading all of them is slow
            first = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    except OSError:
        return frozenset()
    return frozenset(first.split(":", 1)[1].split())


def _wrong_in_3d() -> frozenset[torch.dtype]:
    """Returns the dtypes whose convolutions with three spatial dimensions are wrong in PyTorch on
    this machine."""
    held = next((os.environ[name] for name in ONEDNN_VARIABLES if name in os.environ), "")
    if held.upper() in _WITHOUT_AMX:
        return frozenset()
    flags = cpu_flags()
    kinds = {"amx_bf16": torch.bfloat16, "amx_fp16": torch.float16}
    return frozenset(dtype for flag, dtype in kinds.items() if flag in flags)


# This is computed once, because oneDNN also reads its variable once.
WRONG_IN_3D = _wrong_in_3d()


def _slow() -> frozenset[torch.dtype]:
    """Returns the dtypes in half precision whose products oneDNN does not compute on this
    machine."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    supports = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return frozenset(dtype for dtype, is_supported in supports.items() if not is_supported())


# PyTorch computes products of these dtypes with loops of its own. They take longer than the same
# products in float32, a backward up to a hundred times as long.
SLOW = _slow()


def uses_onednn(
    x_shape: Sequence[int], v_shape: Sequence[int], dtype: torch.dtype, conv: Geometry
) -> bool:
    """Returns whether PyTorch leaves a convolution on a CPU to oneDNN, instead of its own loops
    (`use_mkldnn` in its aten/src/ATen/native/Convolution.cpp)."""
    if not torch.backends.mkldnn.is_available() or dtype in SLOW or dtype.itemsize == 8:
        return False
    if dtype.itemsize == 2:
        return True
    taps, batch = (1, *v_shape[2:])[-2:], x_shape[0]
    plain = max(*conv.stride, *conv.dilation, *v_shape[2:]) == 1
    large = conv.groups > 1 or min(taps) > 3 or batch > 1 or math.prod(x_shape) > 20480
    return large and (not plain or batch >= 16 or torch.get_num_threads() > 1)


def adds_bias(
    x_shape: Sequence[int], v_shape: Sequence[int], dtype: torch.dtype, conv: Geometry
) -> bool:
    """Returns whether a convolution on a CPU takes longer with a bias than without it and a pass
    that adds the bias. PyTorch's own loops for dilated taps write the bias of each channel by
    operations of their own. oneDNN has no kernel of its own for the dilated taps of single
    channels."""
    if conv.transposed or max(conv.dilation) == 1:
        return False
    if not uses_onednn(x_shape, v_shape, dtype, conv):
        return True
    return v_shape[1] == 1 < conv.groups and max(v_shape[2:]) > 1


def is_wrong(x: Tensor) -> bool:
    """Whether PyTorch's own convolution of `x` is wrong on this processor."""
    return x.is_cpu and is_wrong_for(x.dtype, x.ndim)


def is_wrong_for(dtype: torch.dtype, ndim: int) -> bool:
    """Whether PyTorch's own convolution of tensors on a CPU with `ndim` dimensions is wrong."""
    return ndim == 5 and dtype in WRONG_IN_3D


def convolution_then_bias(x: Tensor, w: Tensor, bias: Tensor, conv: Geometry) -> Tensor:
    """Computes what `convolution` does, and adds the bias in a pass of its own."""
    return torch.convolution(x, w, None, *conv) + bias.view(-1, *[1] * (x.ndim - 2))


def convolution(x: Tensor, w: Tensor, bias: Tensor | None, conv: Geometry) -> Tensor:
    """Computes `torch.convolution` of `x`, `(B, C, *sizes)`, with `w`. All tensors have one dtype.
    The result is differentiable."""
    if not is_wrong(x):
        if (
            bias is None
            or max(conv.dilation) == 1
            or not x.is_cpu
            or is_compiling()
            or not adds_bias(x.shape, w.shape, x.dtype, conv)
        ):
            return torch.convolution(x, w, bias, *conv)
        return convolution_then_bias(x, w, bias, conv)
    with torch.autocast("cpu", enabled=False):
        wide = None if bias is None else bias.float()
        return torch.convolution(x.float(), w.float(), wide, *conv).to(x.dtype)


def convolution_grads(
    dy: Tensor, x: Tensor, w: Tensor, conv: Geometry, *needs: bool
) -> tuple[Any, Any, Any]:
    """Returns `(dX, dW, db)` of `convolution`, with `None` for those that `needs` excludes. The
    results are differentiable.

    `db` is a sum of its own. oneDNN adds up all of `dY` in one accumulator, ATen sums a float16
    `dY` in float16, and for `db` alone it would compute `dW` as well.
    """
    needs_x, needs_weight, needs_bias = needs
    db = channel_sums(dy) if needs_bias else None
    if not (needs_x or needs_weight):
        return None, None, db
    mask = (needs_x, needs_weight, False)
    if not is_wrong(x):
        return *_plain_backward(dy, x, w, None, *conv, mask)[:2], db
    with torch.autocast("cpu", enabled=False):
        grads = _plain_backward(dy.float(), x.float(), w.float(), None, *conv, mask)
    dx, dw = (None if grad is None else grad.to(x.dtype) for grad in grads[:2])
    return dx, dw, db


def channel_sums(t: Tensor) -> Tensor:
    """Returns the sums over all dimensions but the second, which holds channels or columns."""
    return t.sum([i for i in range(t.ndim) if i != 1])


def linear_grads(dy: Tensor, x: Tensor, w: Tensor, *needs: bool) -> tuple[Any, Any, Any]:
    """Returns the same of the plain linear layer, whose `x` is `(*, K)`."""
    needs_x, needs_weight, needs_bias = needs
    rows = rows_of(dy)
    return (
        rows.mm(w).view(x.shape) if needs_x else None,
        rows.t().mm(rows_of(x)) if needs_weight else None,
        rows.sum(0) if needs_bias else None,
    )
