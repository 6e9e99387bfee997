"""Finds a race that Triton may leave in a pipelined loop on a Hopper, in a kernel's TTGIR.

An asynchronous product reads its factors in shared memory until it is waited for. Triton gives a
load that feeds products alone one buffer more than others, so that a later load does not write what
is being read. It does not where the load has another use as well (triton 3.6 and 3.7). Such a load
must not be issued again while a product of its buffers is in flight.
"""

from __future__ import annotations

import re

# The first group is a value that shows a part of other memory, and the second is that memory.
VIEW = re.compile(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)")
LOAD = re.compile(r"ttg\.local_load (%\w+)")
PRODUCT = re.compile(r"(%\w+)(?::\d+)? = ttng\.warp_group_dot (%\w+), (%\w+), .*isAsync = true")
WAIT = re.compile(r"ttng\.warp_group_dot_wait .*pendings = (\d+)")
COPY = re.compile(r"ttg\.async_copy_global_to_local %\w+, (%\w+)")


def _root(value: str, memory: dict[str, str]) -> str:
    """Returns the buffer that a value shows a part of."""
    while value in memory:
        value = memory[value]
    return value


def races(ttgir: str) -> list[str]:
    """Returns the buffers that a loop writes while a product of the same or of the last step may
    still read them."""
    found: dict[str, None] = {}
    for loop in re.findall(r"scf\.for .*?scf\.yield", ttgir, re.DOTALL):
        lines = loop.splitlines()
        memory = {m[1]: m[2] for line in lines if (m := VIEW.search(line))}
        shared = {_root(m[1], memory) for line in lines if (m := LOAD.search(line))}
        flying: list[set[str]] = []
        for line in lines * 2:
            if m := PRODUCT.search(line):
                flying.append({_root(m[2], memory), _root(m[3], memory)})
            elif m := WAIT.search(line):
                del flying[: max(0, len(flying) - int(m[1]))]
            elif m := COPY.search(line):
                written = _root(m[1], memory)
                if written in shared and any(written in factors for factors in flying):
                    found[written] = None
    return [*found]
