"""What layers refuse before torch does: features of another width than theirs, and to be traced."""

from __future__ import annotations

import torch
from torch import Tensor

from imvia_graph.errors import IMVIAError


def check_width(whose: str, name: str, feat: Tensor, rows: str | int, width: int) -> None:
    """Refuse what is not (rows, width), or of any number of rows where these are a letter.

    Parameters
    ----------
    whose, name : str
        Who takes the features, and what they are called there, for messages.
    feat : Tensor
    rows : str or int
    width : int

    Raises
    ------
    IMVIAError
    """
    fits = feat.dim() == 2 and feat.shape[1] == width
    if not fits or (isinstance(rows, int) and len(feat) != rows):
        raise IMVIAError(
            f"{whose}: expected {name} ({rows}, {width}); received {tuple(feat.shape)}."
        )


def refuse_tracing(whose: str) -> None:
    """Refuse `torch.jit.trace`, which would keep the ids of its example for all others.

    Raises
    ------
    IMVIAError
    """
    if torch.jit.is_tracing():
        raise IMVIAError(
            f"{whose}: what is computed depends on the ids, and torch.jit.trace would keep those of"
            " its example. Trace what stands around the layer, or take torch.compile."
        )
