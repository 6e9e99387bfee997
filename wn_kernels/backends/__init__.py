"""The implementations behind `ops.py`; `reference.py` defines what they compute."""
