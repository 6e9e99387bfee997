"""How float32 products are taken: in float32, or in TF32 where that is asked for.

cuDNN takes TF32 unless it is told not to, which is an error of 3e-4 where float32 has 1e-7: a plain
convolution would then be called wrong. The legacy setting of cuDNN is the one that every version of
PyTorch reads and writes without a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def set_tf32(allowed: bool) -> None:
    """Sets whether matmuls and convolutions of float32 tensors may run in TF32."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")


@contextmanager
def tf32() -> Iterator[None]:
    """Allows TF32 inside the block."""
    set_tf32(True)
    try:
        yield
    finally:
        set_tf32(False)


def settings() -> dict[str, Any]:
    """What a result records."""
    return {
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": "tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
    }
