"""This file holds the constants of device classes for the cost model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from . import rates


@dataclass(frozen=True)
class Convolution:
    """This class holds the constants of convolutions on a device class, in seconds.

    Attributes:
        step: a step of the loop of our products (`backends/tiles.py`).
        ieee_step: the same without tensor cores, where programs hide each other's latency.
        direct: our kernels for groups of few channels.
        direct_tap: the same for each tap of a number of the output.
        flat: the factor on a step whose channels have taps of their own, for each dimension.
        ieee: the fraction of the rate that our products reach without tensor cores.
        grad_ieee: the same for the gradient of a weight.
        repack: a copy with channels last, however small.
        added: a step of the sum of parts, which takes up to 64 of them.
        vendor: a call of the vendor's convolution, with the layouts that it converts.
        vendor_native: the same for images with channels last, whose layouts stay.
        vendor_native_grad: the same for a gradient.
        vendor_direct: the same for groups of few channels.
        vendor_number: for each number of its result where groups have few channels.
        vendor_ieee: the fraction of the rate that it reaches without tensor cores.
        vendor_step: for each of the products that an element of its result sums.
        vendor_native_step: the same for images with channels last.
        vendor_grouped: the fraction of the rate of 16 bits that other groups reach.
    """

    step: float = 4e-7
    ieee_step: float = 2e-7
    direct: float = 3e-6
    direct_tap: float = 7e-13
    flat: float = 2.6
    ieee: float = 0.3
    grad_ieee: float = 0.5
    repack: float = 6e-7
    added: float = 1.2e-6
    vendor: float = 1e-5
    vendor_native: float = 6e-6
    vendor_native_grad: float = 9e-6
    vendor_direct: float = 1.2e-6
    vendor_number: float = 1.1e-11
    vendor_ieee: float = 0.6
    vendor_step: float = 4e-9
    vendor_native_step: float = 1.2e-9
    vendor_grouped: float = 1e-2


@dataclass(frozen=True)
class Device:
    """This class holds the constants of a device class.

    Attributes:
        name: the name of the device class.
        bandwidth: bytes per second from memory.
        rates: floating-point operations per second of the vendor's matmul in 16, 32 and 64 bits.
        overhead: seconds per launched operation.
        multiprocessors: their number.
        architecture: as in `configs.Target`.
        shared: bytes of a multiprocessor's shared memory.
        latency: seconds that a load from memory takes.
        passes: the fraction of the bandwidth that passes over a weight or activations reach.
        intake: bytes per second that a multiprocessor takes in from the L2 cache in the one-pass
            forward of a linear layer.
        wide_intake: the same if `V` is wider than 16 bits.
        grad_intake: the same in the one-pass gradient of its weight.
        load: seconds that a multiprocessor takes for a load of each thread of a program.
        single_load: the same of single numbers of 32 bits.
        ieee_product: seconds that it takes for a product of two numbers in the one-pass forward
            without tensor cores.
        lanes_product: the same where every r of a step has sums of its own.
        lanes_sum: the sum of these at the end, for each row of a tile.
        lanes_intake: as `intake`, there.
        cache: the bandwidth of a CPU's cache, as a multiple of that of memory.
        few: on a CPU, the efficiency of the vendor's products of few columns beside that of others,
            as a multiple of what it is on the processor of the constants.
        own: the same of the native library's products.
        conv: the same of the vendor's convolutions.
        tf32_rate: operations per second of a float32 matmul in TF32.
        convolution: the constants of convolutions.
    """

    name: str
    bandwidth: float
    rates: tuple[float, float, float]
    overhead: float
    tf32_rate: float = 0.0
    multiprocessors: int = 132
    architecture: str = "cuda:90"
    shared: int = 228 * 1024
    latency: float = 7e-7
    passes: float = 0.87
    intake: float = 5.5e10
    wide_intake: float = 2.2e10
    grad_intake: float = 7e10
    load: float = 2.5e-8
    single_load: float = 2.5e-7
    ieee_product: float = 7.5e-11
    lanes_product: float = 1e-11
    lanes_sum: float = 1.4e-7
    lanes_intake: float = 4e10
    cache: float = 4.0
    few: float = 1.0
    own: float = 1.0
    conv: float = 1.0
    convolution: Convolution = Convolution()

    def rate(self, itemsize: int, tf32: bool = False) -> float:
        """Returns the operations per second for elements of `itemsize` bytes."""
        return self.tf32_rate if tf32 else self.rates[itemsize.bit_length() - 2]


# These constants were measured on two cores of a current server (docs/notes/measurements.md).
CPU = Device("CPU", bandwidth=2e10, rates=(1e11, 1e11, 5e10), overhead=8e-6)
# The native library starts a pass without a dispatcher, and without Python.
NATIVE = replace(CPU, overhead=1e-6)

# What was measured on another processor counts within these factors. Beyond them, the measurement
# was disturbed, or its processor differs in more than its rates.
_MOST_RATE, _MOST_EFFICIENCY = 64.0, 3.0


def scaled(device: Device, found: rates.Rates | None, dtype: torch.dtype = torch.float32) -> Device:
    """Returns the constants of a CPU for a processor of these rates. The rate of 16 bits is that of
    bfloat16, unless `dtype` is float16."""
    if found is None:
        return device

    def limited(ratio: float, most: float) -> float:
        return min(max(ratio, 1 / most), most)

    narrow, single, double = device.rates
    ratios = (limited(a / b, _MOST_RATE) for a, b in zip(found, rates.REFERENCE, strict=True))
    memory, cache, product, few, packed, conv, bfloat16, float16, call = ratios
    half = float16 if dtype == torch.float16 else bfloat16
    return replace(
        device,
        name=f"{device.name} as measured",
        bandwidth=memory * device.bandwidth,
        rates=(half * narrow, product * single, product * double),
        overhead=call * device.overhead,
        cache=max(1.0, cache / memory * device.cache),
        few=limited(few / product, _MOST_EFFICIENCY),
        own=limited(packed / product, _MOST_EFFICIENCY),
        conv=limited(conv / product, _MOST_EFFICIENCY),
    )


def cpu(dtype: torch.dtype = torch.float32) -> Device:
    """Returns the constants of the ATen path on this processor, for products in this dtype."""
    return scaled(CPU, rates.find(), dtype)


def native(dtype: torch.dtype = torch.float32) -> Device:
    """Returns the constants of the native library on this processor, likewise."""
    return scaled(NATIVE, rates.find(), dtype)


# The constants of the H200 were measured (docs/results/gpu-h200), except for the rate of float64,
# for which that of float32 stands. The overhead is that of a launch in a graph, with the beginning
# and the end of its kernel. The H100 is the same chip with other memory, whose bandwidth was
# measured (docs/results/gpu-h100); its rates lie within 2 % of the H200's.
#
# Bandwidths and rates of the others come from the data sheets, for the SXM or OAM part and dense
# matrices. The rates are those of bfloat16, float32, float64 and TF32. All other constants of
# theirs are the H200's, which is an assumption. So is the memory's latency on all of them.
_H200 = Device("H200", 4.2e12, (7.84e14, 5.1e13, 5.1e13), 2e-6, 4.11e14)
GPUS = {
    device.name: device
    for device in (
        Device(
            *("A100", 2.04e12, (3.12e14, 1.95e13, 1.95e13), 2e-6, 1.56e14, 108),
            *("cuda:80", 164 * 1024),
        ),
        replace(_H200, name="H100", bandwidth=2.97e12),
        _H200,
        Device("B200", 8.0e12, (2.25e15, 8.0e13, 4.0e13), 2e-6, 1.1e15, 148, "cuda:100"),
        Device(
            *("MI300X", 5.3e12, (1.307e15, 1.634e14, 1.634e14), 2e-6, 6.54e14, 304),
            *("hip:gfx942", 64 * 1024),
        ),
    )
}


def gpu(device: torch.device | None = None) -> Device:
    """Returns the constants of a GPU, by default of the current one. If it is unknown, or there is
    none, the constants are those of an H100."""
    on_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    name = torch.cuda.get_device_name(device) if on_gpu else ""
    return next((known for key, known in GPUS.items() if key in name), GPUS["H100"])
