"""`python -m bench gpu --out DIR` learns everything there is to learn from a GPU in seven minutes.

run.py          the command: each section in a process group of its own, with a limit of its own
section.py      one section's process
sections.py     what the sections are
context.py      what a section is given: its device, its clock, its time, and where results go
results.py      one line of JSON for every case, and the files they lie in
predict.py      what the cost model expects of a figure
summary.py      the table at the end
page.py         the tables of docs/gpu.md and of the README
compare.py      two runs, case by case
cache.py        Triton's cache, filled without a GPU for a machine that has one
launching.py    a pytest plugin: tests that launch over the stand-in and compare nothing

The sections are facts.py, tests.py, host.py, linear.py and conv.py (both by layers.py),
weight_norm.py, steps.py, sweep.py and models.py.
"""
