"""How the loops are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function at its first call, without interpreter lock; cache it on disk if possible.

    Division by zero gives infinity or NaN. Python's exception would need a test at every division,
    which prevents vectorisation.
    """
    options = {"error_model": "numpy", **options}

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:
            # There is no writable folder for the cache: each process compiles the function itself.
            return numba.njit(nogil=True, **options)(function)

    return decorate
