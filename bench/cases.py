"""This file lists the layers that each suite times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bench.layer import MODES, Layer
from bench.providers import providers_of
from bench.runner import Runner


@dataclass(frozen=True)
class Case(Layer):
    """A layer, and who competes in it."""

    def competitors(self, device: torch.device, full: bool) -> dict[str, Callable[[], Runner]]:
        """What sets each provider up for this case, by its name."""
        found = providers_of(self, device, full)
        return {name: partial(Runner, self, name, p, device) for name, p in found.items()}


def _linear(m: int, k: int, n: int) -> list[Case]:
    return [
        Case(f"{m}, {k}, {n}", "Linear", (k, n), (m, k), mode, is_large=min(k, n) >= 1024)
        for mode in MODES
    ]


def _conv(
    label: str, kind: str, arguments: tuple, x_shape: tuple, dim: int = 0, **options: Any
) -> list[Case]:
    return [Case(label, kind, arguments, x_shape, mode, options, dim) for mode in MODES]


LINEAR = [
    *_linear(32, 64, 64),
    *_linear(1, 1024, 1024),
    *_linear(8, 1024, 1024),
    *_linear(64, 1024, 1024),
    *_linear(1, 4096, 4096),
    *_linear(16, 4096, 4096),
    *_linear(128, 4096, 4096),
    *_linear(512, 1024, 4096),
    # The last layer of a DINO head, whose magnitudes are not trained.
    *(replace(case, frozen_g=True) for case in _linear(128, 256, 65536)),
]

# Vocoders and codecs, speech encoders, discriminators, temporal networks, super-resolution.
CONV = [
    *_conv("1d 80→512 k7, 32", "Conv1d", (80, 512, 7), (1, 80, 32), padding=3),
    *_conv("up 512→256 k16 s8, 32", "ConvTranspose1d", (512, 256, 16, 8), (1, 512, 32), padding=4),
    *_conv(
        "up 1024→512 k16 s8, 16", "ConvTranspose1d", (1024, 512, 16, 8), (1, 1024, 16), padding=4
    ),
    *_conv("up 256→128 k8 s4, 256", "ConvTranspose1d", (256, 128, 8, 4), (1, 256, 256), padding=2),
    *_conv("up 128→64 k4 s2, 512", "ConvTranspose1d", (128, 64, 4, 2), (1, 128, 512), padding=1),
    *_conv("1d 256→256 k3, 256", "Conv1d", (256, 256, 3), (1, 256, 256), padding=1),
    *_conv(
        "1d 128→128 k11 d5, 512", "Conv1d", (128, 128, 11), (1, 128, 512), padding=25, dilation=5
    ),
    *_conv("1d 64→64 k3 d27, 1024", "Conv1d", (64, 64, 3), (1, 64, 1024), padding=27, dilation=27),
    *_conv(
        "1d 32→1 k7 reflect, 2048",
        "Conv1d",
        (32, 1, 7),
        (1, 32, 2048),
        padding=3,
        padding_mode="reflect",
    ),
    *_conv("depthwise 768 k7, 128", "Conv1d", (768, 768, 7), (1, 768, 128), padding=3, groups=768),
    *_conv(
        "positions 768 k128 g16, 49",
        "Conv1d",
        (768, 768, 128),
        (1, 768, 49),
        dim=2,
        padding=64,
        groups=16,
    ),
    *_conv(
        "2d 32→128 (5,1) s(3,1)",
        "Conv2d",
        (32, 128, (5, 1), (3, 1)),
        (2, 32, 256, 3),
        padding=(2, 0),
    ),
    *_conv(
        "2d 32→32 (3,9) s(1,2)",
        "Conv2d",
        (32, 32, (3, 9), (1, 2)),
        (1, 32, 32, 129),
        padding=(1, 4),
    ),
    *_conv("1d 64→64 k3 d8, 4×416", "Conv1d", (64, 64, 3), (4, 64, 416), dilation=8),
    *_conv("2d 32→128 3×3, 4×48²", "Conv2d", (32, 128, 3), (4, 32, 48, 48), padding=1),
    *_conv("2d 3→48 5×5, 4×48²", "Conv2d", (3, 48, 5), (4, 3, 48, 48), padding=2),
]


def _narrow(dtype: str, cases: list[Case]) -> list[Case]:
    """Returns the cases in half precision, or in float32 under autocast."""
    options = {"precision": dtype} if dtype == "autocast" else {"dtype": dtype}
    return [replace(case, label=f"{dtype} {case.label}", **options) for case in cases]


_CONV_HALF = [
    *_conv("1d 256→256 k3, 256", "Conv1d", (256, 256, 3), (1, 256, 256), padding=1),
    *_conv("up 512→256 k16 s8, 32", "ConvTranspose1d", (512, 256, 16, 8), (1, 512, 32), padding=4),
]
HALF = [
    *_narrow("bfloat16", _linear(8, 1024, 1024)),
    *_narrow("bfloat16", _linear(512, 1024, 1024)),
    *_narrow("bfloat16", _linear(16, 4096, 4096)),
    *_narrow("bfloat16", _CONV_HALF),
    *_narrow("float16", _linear(8, 1024, 1024)),
    *_narrow("float16", _linear(16, 3072, 3072)[:1]),  # eager's training step takes a second
    *_narrow("autocast", _linear(100, 512, 2048)),
    *_narrow("autocast", _linear(16, 4096, 4096)),
    *_narrow("autocast", _CONV_HALF),
]

SUITES = {"linear": LINEAR, "conv": CONV, "half": HALF}
