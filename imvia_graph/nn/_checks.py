"""Checks shared by the layers: the width of features, and no tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from imvia_graph.errors import IMVIAError


def check_width(caller: str, name: str, feat: Tensor, rows: str | int, width: int) -> None:
    """Raise unless ``feat`` has the shape (rows, width).

    Parameters
    ----------
    caller, name : str
        Name of the layer and of its argument, for the message.
    feat : Tensor
    rows : str or int
        Number of rows, or a letter that stands for any number.
    width : int

    Raises
    ------
    IMVIAError
    """
    fits = feat.dim() == 2 and feat.shape[1] == width
    if not fits or (isinstance(rows, int) and len(feat) != rows):
        raise IMVIAError(
            f"{caller}: expected {name} ({rows}, {width}); received {tuple(feat.shape)}."
        )


def refuse_tracing(caller: str) -> None:
    """Raise under `torch.jit.trace`, which would record the ids of its example as constants.

    Raises
    ------
    IMVIAError
    """
    if torch.jit.is_tracing():
        raise IMVIAError(
            f"{caller}: the computation depends on the ids, and torch.jit.trace would record those"
            " of its example as constants. Trace the code around the layer, or use torch.compile."
        )
