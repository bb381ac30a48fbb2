"""Views of the entities that are asked for, out of features that stay where they are.

Features may be mapped from a file, on a host whose GPU could not hold them: what goes to the device
of the model is what a batch asks for, each view once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imvia_graph import _gpu
from imvia_graph.answers import expand, pointer
from imvia_graph.errors import IMVIAError

#: What ids and pointers may be in.
_IDS = (torch.int64, torch.int32)


def apart(feat: Tensor, entity: Tensor) -> bool:
    """Whether features are on another device than the queries, so that they have to be picked."""
    return feat.device != entity.device


def check_ids(whose: str, name: str, ids: Tensor, number: int) -> None:
    """Refuse what is not (B,) ids from 0 to ``number`` - 1.

    Parameters
    ----------
    whose, name : str
        Who takes the ids, and what they are called there, for messages.
    ids : Tensor
    number : int

    Raises
    ------
    IMVIAError
        Another shape or dtype, and on a CPU, ids that are not there.
    """
    if not isinstance(ids, Tensor):
        came = f"the type {type(ids).__name__}"
    elif ids.dim() != 1 or ids.dtype not in _IDS:
        came = f"{tuple(ids.shape)} in {ids.dtype}"
    elif (outside := _gpu.beyond(ids, number)) is not None:
        came = str(outside)
    else:
        return
    raise IMVIAError(
        f"{whose}: expected {name} (B,) in int64, from 0 to {number - 1}; received {came}."
    )


def check_range(feat: Tensor, ptr: Tensor, entity: Tensor) -> None:
    """Refuse entities that are not there, and views of theirs that are not.

    Compiled loops would read, and write, what is not theirs. A device that would have to be waited
    for is not asked.

    Parameters
    ----------
    feat : Tensor
        (V, d).
    ptr : Tensor
        (N + 1,) int64 pointer into them.
    entity : Tensor
        (B,) int64.

    Raises
    ------
    IMVIAError
        Entities beyond 0 … N - 1, or a pointer beyond 0 … V or that falls; on any device a pointer
        or entities in another dtype than int64 and int32.
    """
    for name, part in (("ptr", ptr), ("entity", entity)):
        if part.dtype not in _IDS:  # of bytes, torch would make a mask
            raise IMVIAError(
                f"Expected {name} in int64, with which views are looked up; received {part.dtype}."
            )
    if (outside := _gpu.beyond(entity, len(ptr) - 1)) is not None:
        raise IMVIAError(
            f"Expected entities from 0 to {len(ptr) - 2}, of which ptr (N + 1,) tells the views;"
            f" received {outside}."
        )
    if _gpu.may_not_ask(entity):
        return
    start, stop = ptr[entity], ptr[entity + 1]
    if (stop < start).any() or int(start.min()) < 0 or int(stop.max()) > len(feat):
        raise IMVIAError(
            f"Expected a pointer that ascends from 0 to the number of views, {len(feat)}; received"
            f" one whose entries for these entities go from {int(start.min())} to"
            f" {int(stop.max())}{', and fall' * bool((stop < start).any())}. Is it that of other"
            " views?"
        )


def pick_views(feat: Tensor, ptr: Tensor, entity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The views of some entities, on the entities' device.

    Parameters
    ----------
    feat : Tensor
        (V, d), on any device; the rows of other entities are not read.
    ptr : Tensor
        (N + 1,) int64 pointer into them, on the device of ``entity``.
    entity : Tensor
        (B,) int64, with or without repetitions.

    Returns
    -------
    feat : Tensor
        (T, d): the views of the D distinct entities, in the order of their ids.
    ptr : Tensor
        (D + 1,) int64 pointer into them.
    entity : Tensor
        (B,) int64: which of the D each query asks for.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.ops.picking import pick_views
    >>> feat = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> ptr = torch.tensor([0, 2, 2, 3, 4])
    >>> picked, of, place = pick_views(feat, ptr, torch.tensor([3, 0, 3]))
    >>> picked.tolist(), of.tolist(), place.tolist()
    ([[0.0], [1.0], [3.0]], [0, 2, 3], [1, 0, 1])
    """
    distinct, place = entity.unique(return_inverse=True)
    start = ptr[distinct]
    count = ptr[distinct + 1] - start
    row = expand(start.to(feat.device), count.to(feat.device))[1]
    if feat.device.type == "cpu" and entity.device.type == "cuda" and not feat.requires_grad:
        # Page-locked, so that the copy need not be waited for.
        picked = torch.empty(len(row), feat.shape[1], dtype=feat.dtype, pin_memory=True)
        torch.index_select(feat, 0, row, out=picked)
    else:
        picked = feat.index_select(0, row)
    return picked.to(entity.device, non_blocking=True), pointer(count), place
