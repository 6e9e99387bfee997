"""This file lists dtypes and layers of each kind that the native library serves."""

import torch

import wn_kernels.functional as WF

WIDE = [torch.float32, torch.float64]
HALF = [torch.bfloat16, torch.float16]
# These are pairs of dtypes of x and of V. They are equal, those of a layer under autocast, or other
# mixtures.
DTYPES = [
    *[(dtype, dtype) for dtype in (*WIDE, *HALF)],
    *[(dtype, torch.float32) for dtype in HALF],
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16),
]
NARROW = [pair for pair in DTYPES if pair[0] in HALF]


def linear(case):
    return lambda *inputs: WF.wn_linear(*inputs, eps=case.eps)


def check_mask(case, layer, mask):
    """Only the gradients seen for, and each as if all were."""
    needs = [bool(mask >> i & 1) for i in range(4)]
    inputs = (case.x, case.v, case.g, case.bias)
    leaves = [t.detach().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
    layer(*leaves).backward(case.dy)
    assert [leaf.grad is not None for leaf in leaves] == needs
    every = case.grads
    case.grads = [grad if need else None for grad, need in zip(every, needs, strict=True)]
    case.check_backward([leaf.grad for leaf in leaves])
    case.grads = every


def convolution_plan(case, forward, backward):
    """Arguments of `planned` by the variants' names: "late", at the side that the scale belongs to,
    "materialize", "kept", or "unfold"."""
    names = {"late": case.geometry().scale_axis(case.dim), "kept": "materialize"}
    variants = (names.get(variant, variant) for variant in (forward, backward))
    return *variants, "weight" if backward == "kept" else ""
