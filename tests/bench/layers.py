"""Small cases, and who competes in a quick run."""

import torch

from bench import cases
from bench.cases import Case
from bench.providers import PROVIDERS

CPU = torch.device("cpu")
TINY = [Case("4, 24, 16", "Linear", (24, 16), (4, 24), mode) for mode in cases.MODES]
CONV = [
    Case("up", "ConvTranspose1d", (4, 3, 5), (2, 4, 9), mode, {"stride": 2}, dim=1)
    for mode in cases.MODES
]
QUICK = [name for name, provider in PROVIDERS.items() if provider.competes(CPU, full=False)]
