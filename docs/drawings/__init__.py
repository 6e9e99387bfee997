"""The drawings of the documentation, made by `python -m docs.drawings`.

Each drawing is a function that returns a `Canvas`. `DRAWINGS` in `__main__.py` names the file of
each. A test compares the committed files with what the functions draw.
"""
