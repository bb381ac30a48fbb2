"""Selecting the views of the queried entities from features on another device.

Features may be mapped from a file, on a host whose GPU could not hold them: only the views that a
batch needs are copied to the device of the model, each once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imvia_graph import _gpu
from imvia_graph.answers import expand, pointer
from imvia_graph.errors import IMVIAError

#: Dtypes that ids and pointers may have.
_IDS = (torch.int64, torch.int32)


def apart(feat: Tensor, entity: Tensor) -> bool:
    """Return whether features and queries are on different devices, so that views are picked."""
    return feat.device != entity.device


def check_ids(caller: str, name: str, ids: Tensor, number: int) -> None:
    """Raise unless ``ids`` are (B,) ids from 0 to ``number`` - 1.

    Parameters
    ----------
    caller, name : str
        Name of the caller and of its argument, for the message.
    ids : Tensor
    number : int

    Raises
    ------
    IMVIAError
        If the shape or dtype is wrong or, on a CPU, if an id is out of range.
    """
    if not isinstance(ids, Tensor):
        came = f"the type {type(ids).__name__}"
    elif ids.dim() != 1 or ids.dtype not in _IDS:
        came = f"{tuple(ids.shape)} in {ids.dtype}"
    elif (outside := _gpu.id_out_of_range(ids, number)) is not None:
        came = str(outside)
    else:
        return
    raise IMVIAError(
        f"{caller}: expected {name} (B,) in int64, from 0 to {number - 1}; received {came}."
    )


def check_range(feat: Tensor, ptr: Tensor, entity: Tensor) -> None:
    """Raise if entities are out of range, or the pointer leads outside the views.

    Compiled loops would read and write out of bounds. On a GPU nothing is checked, since the check
    would wait for the device.

    Parameters
    ----------
    feat : Tensor
        (V, d) views.
    ptr : Tensor
        (N + 1,) int64 CSR pointer into ``feat``.
    entity : Tensor
        (B,) int64 entities.

    Raises
    ------
    IMVIAError
        If an entity is outside 0 … N - 1, or the pointer is outside 0 … V or decreases; on any
        device, if the pointer or the entities are neither int64 nor int32.
    """
    for name, part in (("ptr", ptr), ("entity", entity)):
        if part.dtype not in _IDS:  # torch would take uint8 for a mask
            raise IMVIAError(
                f"Expected {name} in int64, since it indexes views; received {part.dtype}."
            )
    if (outside := _gpu.id_out_of_range(entity, len(ptr) - 1)) is not None:
        raise IMVIAError(
            f"Expected entities from 0 to {len(ptr) - 2}, the range of ptr (N + 1,); received"
            f" {outside}."
        )
    if _gpu.cannot_check(entity):
        return
    start, stop = ptr[entity], ptr[entity + 1]
    if (stop < start).any() or int(start.min()) < 0 or int(stop.max()) > len(feat):
        raise IMVIAError(
            f"Expected a pointer that ascends from 0 to the number of views, {len(feat)}; received"
            f" one whose entries for these entities go from {int(start.min())} to"
            f" {int(stop.max())}{', and decrease' * bool((stop < start).any())}. Does it belong to"
            " other views?"
        )


def pick_views(feat: Tensor, ptr: Tensor, entity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Select the views of some entities and copy them to the device of ``entity``.

    Parameters
    ----------
    feat : Tensor
        (V, d), on any device; the rows of other entities are not read.
    ptr : Tensor
        (N + 1,) int64 CSR pointer into ``feat``, on the device of ``entity``.
    entity : Tensor
        (B,) int64 entities, which may repeat.

    Returns
    -------
    feat : Tensor
        (T, d) views of the D distinct entities, in the order of their ids.
    ptr : Tensor
        (D + 1,) int64 CSR pointer into these views.
    entity : Tensor
        (B,) int64 position of each query's entity among the D distinct ones.

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
        # Page-locked, so that the copy is asynchronous.
        picked = torch.empty(len(row), feat.shape[1], dtype=feat.dtype, pin_memory=True)
        torch.index_select(feat, 0, row, out=picked)
    else:
        picked = feat.index_select(0, row)
    return picked.to(entity.device, non_blocking=True), pointer(count), place
