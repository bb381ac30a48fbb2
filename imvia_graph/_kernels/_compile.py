"""How the loops are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function at its first call, for threads; keep it on disk where one may write.

    What is divided by zero is infinite or NaN. As in Python, an error, it would be looked for at
    every division, and no vector register divides.
    """
    options = {"error_model": "numpy", **options}

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:
            # There is nowhere to keep what is compiled; then each process compiles anew.
            return numba.njit(nogil=True, **options)(function)

    return decorate
