"""Benchmarks and compiled-code checks: `python -m bench --help`."""

from bench.measure import onednn

onednn.hold()  # before anything imports torch
