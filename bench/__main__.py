"""`python -m bench`: the friendly front of the benchmarks."""

from bench.cli import main

raise SystemExit(main())
