"""This file holds the constants of device classes for the cost model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Device:
    """This class holds the constants of a device class.

    Attributes:
        name: the name of the device class.
        bandwidth: bytes per second from memory.
        rates: floating-point operations per second of the vendor's matmul in 16, 32 and 64 bits.
        overhead: seconds per launched operation.
        multiprocessors: their number.
        passes: the fraction of the bandwidth that passes over a weight or activations reach.
        intake: bytes per second that a multiprocessor takes in from the L2 cache in the one-pass
            forward of a linear layer.
        wide_intake: the same if `V` is wider than 16 bits.
        grad_intake: the same in the one-pass gradient of its weight.
        ieee: the fraction of the rate that the one-pass forward reaches in float32 without TF32,
            and in float64.
        efficiency: the rate of our own matmul kernel as a fraction of the vendor's.
        inline_norm: factor on the operations of a matmul whose loop also computes the norm.
        prologue: factor on the operations of a matmul whose loop scales its tile of `V`.
        tf32_rate: operations per second of a float32 matmul in TF32.
        gather: factor on the operations of a convolution whose loop reads `V` in its own layout,
            taps innermost.
    """

    name: str
    bandwidth: float
    rates: tuple[float, float, float]
    overhead: float
    efficiency: float = 1.0
    inline_norm: float = 1.0
    prologue: float = 1.0
    tf32_rate: float = 0.0
    gather: float = 1.0
    multiprocessors: int = 132
    passes: float = 0.87
    intake: float = 5.5e10
    wide_intake: float = 2.2e10
    grad_intake: float = 7e10
    ieee: float = 0.07

    def rate(self, itemsize: int, tf32: bool = False) -> float:
        """Returns the operations per second for elements of `itemsize` bytes."""
        return self.tf32_rate if tf32 else self.rates[itemsize.bit_length() - 2]


# These constants were measured on two cores of a current server (docs/performance.md).
CPU = Device("CPU", bandwidth=2e10, rates=(1e11, 1e11, 5e10), overhead=8e-6)
# The native library starts a pass without a dispatcher, and without Python.
NATIVE = replace(CPU, overhead=1e-6)

# The constants of the H200 were measured (docs/results/gpu-h200), except for the rate of float64,
# for which that of float32 stands, and the factors of convolutions. The overhead is that of a
# launch in a graph, with the beginning and the end of its kernel. The H100 is the same chip with
# other memory. Its bandwidth is the H200's by the ratio of the data sheets; nothing was measured on
# one.
#
# Bandwidths and rates of the others come from the data sheets, for the SXM or OAM part and dense
# matrices. The rates are those of bfloat16, float32, float64 and TF32. The H200's fractions and its
# overhead are assumed for them. The factors of convolutions are derived from compiled code
# (docs/benchmarks.md). `inline_norm` and `prologue` count the issue cycles that they add to the
# loop of a large tile as time lost, relative to the bound of a plain matmul. `gather` is the bound
# of a convolution's loop divided by that of the packed variant's, per product.
_H200 = Device(
    "H200", 4.2e12, (7.84e14, 5.1e13, 5.1e13), 2e-6, 0.8, 1.2, 1.3, tf32_rate=4.11e14, gather=1.9
)
GPUS = {
    device.name: device
    for device in (
        Device(
            *("A100", 2.04e12, (3.12e14, 1.95e13, 1.95e13), 2e-6, 0.8, 1.2, 1.4, 1.56e14, 2.1),
            multiprocessors=108,
        ),
        replace(_H200, name="H100", bandwidth=_H200.bandwidth * 3.35 / 4.8),
        _H200,
        Device(
            *("B200", 8.0e12, (2.25e15, 8.0e13, 4.0e13), 2e-6, 0.8, 1.2, 1.4, 1.1e15, 2.4),
            multiprocessors=148,
        ),
        Device(
            *("MI300X", 5.3e12, (1.307e15, 1.634e14, 1.634e14), 2e-6, 0.8, 1.1, 2.5, 6.54e14, 1.3),
            multiprocessors=304,
        ),
    )
}


def gpu(device: torch.device | None = None) -> Device:
    """Returns the constants of a GPU, by default of the current one. If it is unknown, or there is
    none, the constants are those of an H100."""
    on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    name = torch.cuda.get_device_name(device) if on_gpu else ""
    return next((known for key, known in GPUS.items() if key in name), GPUS["H100"])
