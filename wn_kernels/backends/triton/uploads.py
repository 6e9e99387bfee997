"""Numbers that a kernel reads on the device: a table, and the addresses of its tensors.

Both are written by a copy from pinned memory, for which nothing waits, and which a CUDA graph
captures. The addresses are uploaded once for as long as they stay the same.

A captured copy reads its pinned memory whenever the graph is replayed, so that memory is never used
again. Pinned memory cannot be allocated during a capture. It is provided by launches outside of
one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from . import configs

# A table that was launched outside of a capture has memory for so many captured launches after it.
RESERVE = 64

# What a CUDA graph reads when it is replayed. It is in use for as long as the graph, whose end
# cannot be seen from here.
_captured: list[Tensor] = []

# The current stream of a device, as a number.
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (lambda _: 0)


class Uploaded(NamedTuple):
    """What a launch reads.

    Attributes:
        base: what the offsets are counted from, as bytes.
        offsets: of the tensors, in bytes.
        table: the table.
        are_aligned: whether all addresses are multiples of 16.
    """

    base: Tensor
    offsets: Tensor
    table: Tensor
    are_aligned: bool


class _OnStream(NamedTuple):
    """What was uploaded on a stream: the table, and the offsets by the addresses as bytes, with
    whether these are aligned."""

    table: Tensor
    known: dict[bytes, tuple[Tensor, bool]]


class Uploads:
    """The uploads of one kernel's launches.

    Args:
        numbers: the table, on the host.
        count: the number of addresses of a launch.
    """

    def __init__(self, numbers: Tensor, count: int) -> None:
        self.numbers, self.count = numbers, count
        self._streams: dict[int, _OnStream] = {}
        self._reserve: list[Tensor] = []
        self._pinned: Tensor | None = None  # the table, for captures

    def find(
        self, lists: Sequence[list[Tensor]], members: list[int], base: Tensor | None
    ) -> Uploaded:
        """Returns what a launch on the tensors at `members` of these lists reads, and uploads what
        of it is new. Addresses are counted from `base`, which is the table by default."""
        beside = lists[0][0]
        device = beside.get_device()
        stream = _stream(device) if device >= 0 else 0
        captures = device >= 0 and torch.cuda.is_current_stream_capturing()
        if device >= 0 and not captures and len(self._reserve) < RESERVE:
            self._provide()
        uploaded = self._streams.get(stream)
        if uploaded is None:
            # A capture uploads the table itself, and keeps it.
            pinned = self._pinned if captures else None
            uploaded = _OnStream(_on_device(self.numbers, beside, captures, pinned), {})
            if not captures:
                uploaded = self._streams.setdefault(stream, uploaded)
        table, kept = uploaded
        at = table if base is None else base
        addresses = _addresses_of(lists, members)
        known = None if captures or base is not None else kept.get(addresses)
        if known is None:
            numbers, first = array("q", addresses), at.data_ptr()
            aligned = not any(number % 16 for number in numbers)
            offsets = array("q", [number - first for number in numbers])
            pinned = self._reserve.pop() if captures and self._reserve else None
            new = torch.frombuffer(offsets, dtype=torch.int64)
            known = _on_device(new, beside, captures, pinned), aligned
            if captures:
                _captured.extend((table, known[0]))
            elif base is None:
                if len(kept) >= configs.GROUPED_KNOWN:
                    kept.clear()
                kept[addresses] = known
        return Uploaded(at.view(torch.int8), known[0], table, known[1])

    def _provide(self) -> None:
        """Fills up the pinned memory for captures."""
        missing = RESERVE - len(self._reserve)
        self._reserve += torch.empty((missing, self.count), dtype=torch.int64).pin_memory()
        if self._pinned is None:
            self._pinned = self.numbers.pin_memory()


def _addresses_of(lists: Sequence[list[Tensor]], members: list[int]) -> bytes:
    """The addresses of the tensors of these weights, one of each list, as numbers of 64 bits. The
    address of `None` is zero."""
    library = native.helpers()
    if library is not None:
        return library.addresses(lists, members)
    tensors = [each[i] for i in members for each in lists]
    return array("q", [0 if t is None else t.data_ptr() for t in tensors]).tobytes()


def _on_device(
    numbers: Tensor, beside: Tensor, captures: bool, reserve: Tensor | None = None
) -> Tensor:
    """Numbers on the device of another tensor, without a wait for it, by way of pinned memory: the
    reserve, if there is one."""
    if beside.get_device() < 0:
        return numbers
    pinned = numbers.pin_memory() if reserve is None else reserve.copy_(numbers)
    if captures:
        _captured.append(pinned)
    return pinned.to(beside.device, non_blocking=True)
