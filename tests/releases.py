"""The releases of torch and triton that the tests run on."""

from importlib.metadata import PackageNotFoundError, version

import torch


def _release(number: str) -> tuple[int, ...]:
    return tuple(int(part) for part in number.split("+")[0].split(".")[:2])


def _is_current() -> bool:
    try:
        return _release(torch.__version__) >= (2, 10) and _release(version("triton")) >= (3, 6)
    except PackageNotFoundError:
        return True


# Whether they are newer than the oldest ones that pyproject.toml names.
IS_CURRENT = _is_current()
