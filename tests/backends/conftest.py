"""Triton publishes wheels for Linux alone: elsewhere its tests are not collected."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["triton"]
