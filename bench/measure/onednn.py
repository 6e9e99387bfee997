"""oneDNN held to instructions whose results are right, for tests and benchmarks.

On a processor with AMX, oneDNN's bfloat16 convolutions with three spatial dimensions are wrong, and
some calls crash (`wn_kernels/backends/vendor.py`). Layers of PyTorch, which ours are compared with,
use them. oneDNN reads its variable once, so this runs before torch is imported; processes that are
started later inherit it.
"""

import os
from pathlib import Path

VARIABLE = "ONEDNN_MAX_CPU_ISA"

# The most that has no AMX.
MOST = "AVX512_CORE_FP16"


def hold(cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Sets oneDNN's variable where the processor has AMX, unless it is set already."""
    try:
        has_amx = "amx_tile" in cpuinfo.read_text().split()
    except OSError:
        return
    if has_amx:
        os.environ.setdefault(VARIABLE, MOST)
