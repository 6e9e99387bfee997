"""Benchmarks and compiled-code checks: `python -m bench --help`."""
