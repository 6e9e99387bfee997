"""Triton's interpreter under a newer NumPy.

The interpreter holds a scalar as an array of one element, and up to triton 3.6 it takes the loop
bounds of a kernel by `int(array)`, which NumPy 2.4 and later refuse for any but a 0-dimensional
array. Later versions of Triton squeeze the array first, which `mend` does here for all.
"""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Has the interpreter squeeze a scalar before it becomes an index. It may be called again."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if patch.__module__ == __name__:
        return

    def patch_and_squeeze(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_and_squeeze
