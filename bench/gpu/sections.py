"""The sections are listed in the order of their importance, each with its limit and with what it
shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Section(NamedTuple):
    """A part of the run.

    Attributes:
        name: what it is called.
        limit: the seconds that it may take, besides those that the sections before it have left.
        lines: how many lines of the table at the end it may take.
        what: what it shows.
        of: the module of `bench.gpu` that measures it, where that is not called the same.
        native: whether the native library may be used.
    """

    name: str
    limit: float
    lines: int
    what: str
    of: str = ""
    native: bool = True

    @property
    def module(self) -> str:
        """Returns the name of its module."""
        return f"bench.gpu.{self.of or self.name}"


SECTIONS = (
    Section("facts", 9, 6, "bandwidths, and products of random numbers by dtype"),
    Section("tests", 80, 4, "the kernels' tests"),
    Section("host", 30, 5, "the processor's time of a call"),
    Section("host_python", 24, 4, "the same without the native library", "host", native=False),
    Section("models", 34, 5, "a whole network"),
    Section("linear", 60, 8, "linear layers, every path and each kernel alone"),
    Section("weight_norm", 26, 6, "the operator, beside PyTorch's and a copy"),
    Section("steps", 40, 8, "recurrent layers, second derivatives and a DINO head, by the clock"),
    Section("conv", 44, 5, "convolutions, every path"),
    Section("random", 44, 5, "random layers of all dtypes, every path", "random_layers"),
    Section("sweep", 20, 3, "configurations beside those that ship"),
)

# Seconds after its limit at which a section that has not stopped by itself is killed.
GRACE = 8.0
# Compiling takes as long as it takes where nothing is measured.
DRY_GRACE = 120.0

DRY_SECONDS = 200.0


def total(sections: Sequence[Section]) -> float:
    """Returns the seconds that sections may take together."""
    return sum(section.limit for section in sections)


def named(name: str) -> Section:
    """Returns the section of that name.

    Raises:
        ValueError: there is none.
    """
    for section in SECTIONS:
        if section.name == name:
            return section
    names = ", ".join(section.name for section in SECTIONS)
    raise ValueError(f"there is no section {name!r}; there are {names}")
