"""What the sections are: their order, their limits, and what each shows."""

from __future__ import annotations

from typing import NamedTuple


class Section(NamedTuple):
    """A part of the run, whose module of `bench.gpu` has its name.

    Attributes:
        name: what it is called.
        limit: the seconds after which it starts no other case.
        lines: how many lines of the table at the end it may take.
        what: what it shows.
    """

    name: str
    limit: float
    lines: int
    what: str


SECTIONS = (
    Section("facts", 20, 7, "bandwidths, and products of random numbers by dtype"),
    Section("tests", 70, 4, "the kernels' tests"),
    Section("host", 20, 5, "the processor's time of a call"),
    Section("linear", 100, 13, "linear layers, every path and each kernel alone"),
    Section("weight_norm", 20, 5, "the operator, beside PyTorch's and a copy"),
    Section("conv", 45, 8, "convolutions, every path"),
    Section("sweep", 60, 6, "configurations beside those that ship"),
    Section("models", 50, 4, "a whole network"),
)

# Seconds that a section may take to stop by itself, after its limit, before it is killed.
GRACE = 4.0
# Compiling takes as long as it takes where nothing is measured.
DRY_GRACE = 120.0

SECONDS = sum(section.limit for section in SECTIONS)
DRY_SECONDS = 200.0


def named(name: str) -> Section:
    """The section of that name.

    Raises:
        ValueError: there is none.
    """
    for section in SECTIONS:
        if section.name == name:
            return section
    names = ", ".join(section.name for section in SECTIONS)
    raise ValueError(f"there is no section {name!r}; there are {names}")
