"""Reading ready features: safetensors, npz, npy, HDF5 and torch files to `Views`.

Three shapes are read (`views_from_array`): (N, d), one row per entity; (N, k, d), up to k views per
entity; (V, d) with a column that names the entity of each row. `views_by_entity` takes one array
per entity. HDF5 and npy files are read in portions, of which only the views stay in memory; npz and
HDF5 files are read only as far as their arrays are used.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imvia_graph import _files
from imvia_graph._display import first_line, shorten
from imvia_graph.errors import DataError
from imvia_graph.io.views import Entities, resolve, unreadable, warn_of_numeric_labels
from imvia_graph.kg import MultiViewKG, Views

#: Names of the arrays that hold features, the entity of each row, and which entities have features.
FEATURE_NAMES = ("feat", "feats", "feature", "features", "embedding", "embeddings")
ENTITY_NAMES = ("entity", "entities", "label", "labels", "id", "ids")
PRESENT_NAMES = ("present", "mask")

#: Suffixes of HDF5 files.
_HDF5 = (".h5", ".hdf5")
#: Bytes of features that are read at a time.
_PORTION = 2**26
#: Signature and version of a global heap in an HDF5 file.
_HEAP = b"GCOL\x01"

#: Advice if raw texts or pictures may have been passed as features.
_ENCODE_ADVICE = (
    "To make features from texts or pictures, use `imvia-graph encode`"
    " (imvia_graph.encode.encode_kg)."
)

#: Entities by label or id, or a mask: the entity of each row, or which entities have features.
Owners = Sequence[str] | Sequence[int] | Tensor | np.ndarray


def with_views(
    kg: MultiViewKG,
    views: Mapping[str, Any],
    *,
    skip_unknown: bool = False,
) -> MultiViewKG:
    """Return the graph with views of some modalities added or replaced.

    Parameters
    ----------
    kg : MultiViewKG
        The graph.
    views : mapping
        From each modality to a file (`read_features`), an array, a pair of an array and the entity
        of each of its rows (`views_from_array`), a mapping from labels, display names or ids to
        arrays or a list of arrays in id order (`views_by_entity`), or `Views`. Views that the graph
        has of these modalities are replaced; its other modalities are kept.
    skip_unknown : bool
        Whether to leave out, with a warning, rows of entities that are not in the graph. Default:
        such rows are an error.

    Raises
    ------
    DataError
        See `read_features`.

    Examples
    --------
    >>> import torch
    >>> import imvia_graph as ig
    >>> kg = ig.load_kg("countries")
    >>> seen = ig.io.with_views(kg, {"image": torch.rand(kg.num_entities, 3, 8)})
    >>> seen.modalities, seen.views("image")[0].shape[0] == 3 * kg.num_entities
    (['image', 'text'], True)
    """
    new: dict[str, Views] = {}
    for modality, value in views.items():
        where = f"views[{modality!r}]"
        if isinstance(value, Views):
            new[modality] = value
        elif isinstance(value, Tensor | np.ndarray):
            new[modality] = views_from_array(value, kg, where=where)
        elif isinstance(value, tuple) and len(value) == 2:
            feat, entity = value
            new[modality] = views_from_array(
                feat, kg, entity=entity, skip_unknown=skip_unknown, where=where
            )
        elif isinstance(value, str | os.PathLike):
            new[modality] = read_features(value, kg, skip_unknown=skip_unknown)
        elif isinstance(value, Mapping | list):
            new[modality] = views_by_entity(value, kg, skip_unknown=skip_unknown, where=where)
        else:
            several = isinstance(value, tuple)
            received = f"a tuple of {len(value)}" if several else type(value).__name__
            raise DataError(
                f"{where}: expected a file, an array, Views, a mapping from entities to arrays, or"
                f" a pair of an array and the entity of each of its rows; received {received}."
            )
    kept = {
        modality: new.pop(modality) if modality in new else kg._views(modality)
        for modality in kg.modalities
    }
    return kg.replace(views={**kept, **new})


def read_features(
    path: str | os.PathLike[str],
    of: Entities,
    *,
    key: str | None = None,
    entity: str | Owners | None = None,
    present: str | Owners | None = None,
    skip_unknown: bool = False,
) -> Views:
    """Read ready features of one modality.

    Parameters
    ----------
    path : path
        ``.safetensors``, ``.npz``, ``.npy``, HDF5 (``.h5``, ``.hdf5``; needs the extra ``hdf5``) or
        ``.pth``/``.pt`` (tensors only, nothing that could run code). In a file of several arrays,
        the features are the array ``feat``, ``features`` or ``embeddings``, or the only array of
        floating-point rows; ``entity``, ``entities``, ``labels`` or ``ids`` names the entity of
        each row, and ``present`` or ``mask`` the entities that have features. A file whose arrays
        are named after entities holds an array (d,) or (k, d) for each. A table beside the file,
        with the suffix ``.csv`` and a column ``entity`` (and ``source``), names the entity of each
        row, as in a KG folder.
    of : MultiViewKG or sequence of str
        The graph, or the labels of its entities in id order.
    key : str, optional
        Name of the array that holds the features.
    entity, present : str or sequence, optional
        Name of the array in the file, or a value as for `views_from_array`.
    skip_unknown : bool
        Whether to leave out, with a warning, rows of entities that are not in the graph. Default:
        such rows are an error.

    Returns
    -------
    Views

    Raises
    ------
    DataError
        The file cannot be read, is a pickle, does not fit the entities, or holds NaN.

    Examples
    --------
    >>> import imvia_graph as ig, numpy as np, pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> np.save(folder / "visual.npy", np.array([[1.0, 2.0], [0.0, 0.0]]))  # Lyon has none
    >>> ig.io.read_features(folder / "visual.npy", ["Paris", "Lyon"]).entity.tolist()
    [0]
    >>> np.savez(folder / "visual.npz", feat=np.ones((2, 4)), entity=["Lyon", "Lyon"])
    >>> ig.io.read_features(folder / "visual.npz", ["Paris", "Lyon"]).entity.tolist()
    [1, 1]
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected a file of features. {_ENCODE_ADVICE}")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; expected features.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: expected features.")
    with _open_arrays(path) as arrays:
        named = {name for name in (key, entity, present) if isinstance(name, str)}
        if absent := sorted(named - set(arrays)):
            raise DataError(
                f"{path}: there is no array {absent[0]!r}; the arrays are {_listing(arrays)}."
            )
        if key is None and (mapping := _by_entity(arrays, of, path, skip_unknown)) is not None:
            return mapping
        entity_name = entity if isinstance(entity, str) else _named(arrays, ENTITY_NAMES)
        present_name = present if isinstance(present, str) else _named(arrays, PRESENT_NAMES)
        feat = arrays[key or _feature_name(arrays, {entity_name, present_name}, path)]
        source: pl.Series | None = None
        if entity is None and entity_name is None and path.with_suffix(".csv").is_file():
            labels, source = _files.read_view_table(path.with_suffix(".csv"))
            entity = labels.to_list()
        elif entity is None or isinstance(entity, str):
            entity = None if entity_name is None else _owners(arrays[entity_name])
        if present is None or isinstance(present, str):
            present = None if present_name is None else _owners(arrays[present_name])
        return views_from_array(
            feat,
            of,
            entity=entity,
            present=present,
            source=source,
            skip_unknown=skip_unknown,
            where=str(path),
        )


def views_from_array(
    feat: Tensor | np.ndarray,
    of: Entities,
    *,
    entity: Owners | None = None,
    present: Owners | None = None,
    source: Sequence[str] | pl.Series | None = None,
    skip_unknown: bool = False,
    where: str = "features",
) -> Views:
    """Make views of one modality from an array of features.

    Parameters
    ----------
    feat : Tensor or array
        Floating point; double precision becomes single. (N, d) in the order of the entities;
        (N, k, d) with k slots for views; or (V, d) with ``entity``. In (N, d) and (N, k, d), a row
        of zeros or of NaN only is a missing view.
    of : MultiViewKG or sequence of str
        The graph, or the labels of its N entities in id order.
    entity : sequence, optional
        (V,) labels or ids: the entity of each row of ``feat``. Every row is then a view.
    present : sequence, optional
        For (N, d) and (N, k, d): which entities have views, as a (N,) bool mask or a list of labels
        or ids. The rows of other entities are ignored. In (N, d), every row of a listed entity is a
        view; in (N, k, d), its rows of zeros or NaN are still missing views.
    source : sequence of str, optional
        Origin of each row of (V, d).
    skip_unknown : bool
        Whether to leave out, with a warning, rows of entities that are not in the graph. Default:
        such rows are an error.
    where : str
        Name of the array in messages.

    Raises
    ------
    DataError
        The shape is none of the above, the dtype is not floating point, a view holds NaN or
        infinity, an entity is unknown, or there is no view at all.

    Examples
    --------
    >>> import torch
    >>> import imvia_graph as ig
    >>> feat = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]])  # (2, 2, 2)
    >>> ig.io.views_from_array(feat, ["Lyon", "Paris"]).entity.tolist()
    [0, 1, 1]
    """
    labels = of.entities if isinstance(of, MultiViewKG) else of
    shape = tuple(feat.shape)
    if entity is not None:
        if len(shape) != 2:
            raise DataError(
                f"{where}: expected features of shape (views, width) with the entity of each view,"
                f" received {shape}."
            )
        if present is not None:
            raise DataError(
                f"{where}: received both the entity of each row and the entities that have"
                " features; pass only one of entity and present."
            )
        owners = _series(entity)
        if len(owners) != len(feat):
            raise DataError(
                f"{where}: expected one entity per row, received {len(owners)} for {len(feat)}"
                " rows."
            )
        if not len(feat):
            raise DataError(f"{where}: expected at least one row of features, received none.")
        keep, ids = resolve(owners, of, f"{where}, entities", skip_unknown)
        kept = (
            None if source is None else [source[row] for row in keep.nonzero().flatten().tolist()]
        )
        if keep.all() and isinstance(feat, Tensor | np.ndarray):
            views = _floating(feat, where)
        else:
            views = _read_views(feat, where, lambda part, start: keep[start : start + len(part)])
        _refuse_nan(views, ids, labels, where)
        return Views(views, ids, kept)
    if len(shape) not in (2, 3) or 0 in shape:
        raise DataError(
            f"{where}: expected features of shape ({len(labels)}, width) or ({len(labels)}, views,"
            f" width), received {shape}."
        )
    if len(feat) != len(labels):
        raise DataError(
            f"{where}: expected a row for each of the {len(labels)} entities in id order, received"
            f" {len(feat)} rows. If the rows belong to some entities only, name the entity of each"
            " row (entity=…, or an array 'entity' in the file)."
        )
    warn_of_numeric_labels(torch.arange(len(labels)), labels, where)
    has = None if present is None else _present(present, of, where, skip_unknown)
    masks: list[Tensor] = []  # (n,) or (n, k)

    def is_view(part: Tensor, start: int) -> Tensor:
        # With one row per entity, ``present`` decides alone: a listed entity may have a zero row.
        if has is not None and part.dim() == 2:
            mask = has[start : start + len(part)]
        else:
            mask = ~(part.isnan().all(dim=-1) | (part == 0).all(dim=-1))
            if has is not None:
                mask &= has[start : start + len(part), None]
        masks.append(mask)
        return mask

    views = _read_views(feat, where, is_view)
    owner = torch.cat(masks).nonzero()[:, 0].contiguous()
    if not len(owner):
        raise DataError(f"{where}: every row is zero or NaN, so no entity has a view.")
    _refuse_nan(views, owner, labels, where)
    return Views(views, owner)


def views_by_entity(
    arrays: Mapping[Any, Any] | Sequence[Any],
    of: Entities,
    *,
    skip_unknown: bool = False,
    where: str = "features",
) -> Views:
    """Make views of one modality from an array per entity.

    Parameters
    ----------
    arrays : mapping or sequence
        Floating point arrays or tensors, (d,) for one view or (k, d) for k views, by labels or
        display names or by ids, or in the order of the entities. None stands for no view.
    of : MultiViewKG or sequence of str
        The graph, or the labels of its N entities in id order.
    skip_unknown, where
        As for `views_from_array`.

    Raises
    ------
    DataError
        As for `views_from_array`; also if a sequence does not have N items, or the widths differ.

    Examples
    --------
    >>> import numpy as np
    >>> import imvia_graph as ig
    >>> by_label = {"Paris": np.ones((2, 4)), "Lyon": np.ones(4)}
    >>> ig.io.views_by_entity(by_label, ["Lyon", "Paris"]).entity.tolist()
    [1, 1, 0]
    >>> ig.io.views_by_entity([None, np.ones(4)], ["Lyon", "Paris"]).entity.tolist()
    [1]
    """
    labels = of.entities if isinstance(of, MultiViewKG) else of
    if not isinstance(arrays, Mapping):
        if len(arrays) != len(labels):
            raise DataError(
                f"{where}: expected an array, or None, for each of the {len(labels)} entities in id"
                f" order, received {len(arrays)}. Or pass a mapping from entities to arrays."
            )
        arrays = dict(enumerate(arrays))
    there = {
        int(name) if isinstance(name, np.integer) else name: value
        for name, value in arrays.items()
        if value is not None
    }
    kinds = {type(name) for name in there}
    if not there:
        raise DataError(f"{where}: no entity has a view.")
    if kinds not in ({str}, {int}):
        raise DataError(
            f"{where}: expected labels (str) or ids (int) as keys, received"
            f" {', '.join(sorted(kind.__name__ for kind in kinds))}."
        )
    keep, ids = resolve(pl.Series(list(there)), of, f"{where}, arrays", skip_unknown)
    rows: list[Tensor] = []
    kept = [item for item, known in zip(there.items(), keep.tolist(), strict=True) if known]
    for name, value in kept:
        array = value if isinstance(value, Tensor) else np.asarray(value)
        row = _floating(array, f"{where}, {name!r}")
        row = row[None] if row.dim() == 1 else row
        if row.dim() != 2 or row.shape[1] == 0 or (rows and row.shape[1] != rows[0].shape[1]):
            raise DataError(
                f"{where}, {name!r}: expected shape (width,) or (views, width), with the same width"
                f" for all entities, received {tuple(row.shape)}."
            )
        rows.append(row)
    feat = torch.cat(rows)
    if not len(feat):
        raise DataError(f"{where}: no entity has a view.")
    owner = ids.repeat_interleave(torch.tensor([len(row) for row in rows]))
    _refuse_nan(feat, owner, labels, where)
    return Views(feat, owner)


def _read_views(feat: Any, where: str, is_view: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Read the views (V, d) of an array, possibly in a file, in portions.

    ``is_view`` takes a portion and the number of its first row; it returns a mask of the views.
    """
    portions: list[Tensor] = []
    rows = max(1, _PORTION // (feat.dtype.itemsize * math.prod(feat.shape[1:]) or 1))
    for start in range(0, len(feat), rows):
        part = _floating(feat[start : start + rows], where)
        portions.append(part[is_view(part, start)])
    # torch.cat would need twice the memory; here, each portion is freed once it is copied.
    views = portions[0].new_empty(sum(map(len, portions)), feat.shape[-1])
    portions.reverse()
    start = 0
    while portions:
        part = portions.pop()
        views[start : start + len(part)] = part
        start += len(part)
    return views


def _floating(feat: Tensor | np.ndarray, where: str) -> Tensor:
    if isinstance(feat, np.ndarray):
        if feat.dtype.kind != "f":
            raise DataError(f"{where}: expected floating-point features, received {feat.dtype}.")
        native = np.ascontiguousarray(feat, dtype=feat.dtype.newbyteorder("="))
        feat = torch.from_numpy(native if native.flags.writeable else native.copy())
    if not feat.is_floating_point():
        raise DataError(f"{where}: expected floating-point features, received {feat.dtype}.")
    feat = feat.detach().cpu()
    return feat.float() if feat.dtype == torch.float64 else feat


def _refuse_nan(feat: Tensor, owner: Tensor, labels: Sequence[str], where: str) -> None:
    finite = torch.cat([part.isfinite().all(dim=1) for part in feat.split(2**16)])
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise DataError(
            f"{where}: a view of {labels[int(owner[row])]!r} has NaN or infinite features"
            f" ({int((~finite).sum())} such views). Remove these views, or compute them again."
        )


def _present(present: Owners, of: Entities, where: str, skip_unknown: bool) -> Tensor:
    """Return a (N,) bool mask from a mask or a list of entities."""
    count = len(of.entities if isinstance(of, MultiViewKG) else of)
    values = _series(present)
    if values.dtype == pl.Boolean:
        if len(values) != count:
            raise DataError(
                f"{where}, mask: expected one value for each of the {count} entities, received"
                f" {len(values)}."
            )
        return torch.from_numpy(values.to_numpy().copy())
    _, ids = resolve(values, of, f"{where}, entities with features", skip_unknown)
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, ids, True)


def _series(values: Owners) -> pl.Series:
    if isinstance(values, Tensor):
        values = values.cpu().numpy()
    if isinstance(values, np.ndarray) and values.dtype.kind in "fc":
        raise DataError(
            f"Expected entities as labels (text) or ids (integers), received {values.dtype}."
        )
    series = pl.Series("entity", values)
    if series.dtype in (pl.String, pl.Boolean) or series.dtype.is_integer():
        return series
    return series.cast(pl.String)


# -- files ----------------------------------------------------------------------------------------


@contextmanager
def _open_arrays(path: Path) -> Iterator[Mapping[str, Any]]:
    """Open a file; yield its arrays by name, "" for a single nameless array.

    Arrays of HDF5, npz and npy files are read on access.
    """

    def whole(read: Callable[[Path], dict[str, Any]]) -> Callable[[Path], Any]:
        return lambda path: nullcontext(read(path))

    openers: dict[str, Callable[[Path], AbstractContextManager[Mapping[str, Any]]]] = {
        ".safetensors": whole(_read_safetensors),
        ".npy": _open_numpy,
        ".npz": _open_numpy,
        **dict.fromkeys(_HDF5, _open_hdf5),
        ".pth": whole(_read_torch),
        ".pt": whole(_read_torch),
    }
    suffix = path.suffix.lower()
    if suffix in (".pkl", ".pickle"):
        raise _is_a_pickle(path, "a pickle")
    if suffix not in openers:
        raise DataError(
            f"{path}: expected a file of features with one of the suffixes {', '.join(openers)};"
            f" {path.suffix!r} is none of these. {_ENCODE_ADVICE}"
        )
    with openers[suffix](path) as arrays:
        if not arrays:
            raise DataError(f"{path} holds no arrays; expected features.")
        yield arrays


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: expected a safetensors file; it cannot be read ({error}).") from (
            error
        )


@contextmanager
def _open_numpy(path: Path) -> Iterator[Mapping[str, Any]]:
    _files.check_archive(path)
    with unreadable(path, "a NumPy file without Python objects"):
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(found, np.ndarray):
            yield {"": found}
            return
        with found:
            yield found


@contextmanager
def _open_hdf5(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import h5py
    except ImportError as error:
        raise DataError(
            f"{path}: reading HDF5 needs h5py: pip install 'imvia-graph[hdf5]'."
        ) from error
    arrays: dict[str, Any] = {}

    def collect(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            _refuse_foreign(path, name, item)
            if h5py.check_string_dtype(item.dtype) is not None:
                _check_lengths(path, name, item)
                arrays[name] = np.asarray(item.asstr()[...])
            elif not item.dtype.hasobject:  # ragged lists and references cannot be features
                arrays[name] = item

    with unreadable(path, "an HDF5 file"), h5py.File(path, "r") as file:
        if file.id.get_create_plist().get_sizes() != (8, 8):
            raise OSError("its offsets and lengths are not of 8 bytes each")
        _check_heaps(path)
        file.visititems(collect)
        yield arrays


def _check_heaps(path: Path) -> None:
    """Raise an OSError if an object exceeds its global heap, in which HDF5 stores texts.

    The HDF5 library would loop forever in such a heap. The layout is in section III.E of the format
    specification.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(_HEAP)
        while start >= 0:
            end = start + int.from_bytes(content[start + 8 : start + 16], "little")
            at = start + 16
            # A heap cannot be longer than the file; the library does not read it as one.
            while at + 16 <= end <= len(content):
                size = int.from_bytes(content[at + 8 : at + 16], "little")
                free = content[at : at + 2] == b"\0\0"
                # Free space includes its header of 16 bytes; other objects are padded to 8 bytes.
                length = size if free else 16 + -(-size // 8) * 8
                if length < 16 or length > end - at:
                    raise OSError(f"an object of the heap at byte {start} does not fit into it")
                at += length
            start = content.find(_HEAP, start + 16)


def _check_lengths(path: Path, name: str, item: Any) -> None:
    """Raise a DataError if a text claims to be longer than its file, before memory is allocated."""
    if not item.dtype.hasobject or not item.size:  # fixed-length texts, or none
        return
    size = path.stat().st_size
    for entries in _text_entries(path, name, item):
        whole = entries[: len(entries) // 16 * 16]
        longest = int(np.frombuffer(whole, "<u4")[::4].max(initial=0))
        if longest > size:
            raise DataError(
                f"{path}, {name!r}: a file of {size:,} bytes cannot hold a text of {longest:,}"
                " bytes. The file may be damaged; create it again."
            )


def _text_entries(path: Path, name: str, item: Any) -> Iterator[bytes]:
    """Yield the stored entries of texts: 16 bytes each, of which the first four are the length."""
    from h5py import h5d

    layout = item.id.get_create_plist()
    kind = layout.get_layout()
    filters = [layout.get_filter(i) for i in range(layout.get_nfilters())]
    deflated, shuffled = (any(code == known for code, *_ in filters) for known in (1, 2))
    known = deflated + shuffled == len(filters) and not layout.get_external_count()
    if layout.fill_value_defined() == h5d.FILL_VALUE_USER_DEFINED or not known:
        kind = None
    if kind == h5d.CONTIGUOUS:
        if item.id.get_offset() is not None:
            with open(path, "rb") as file:
                file.seek(item.id.get_offset())
                yield file.read(item.size * 16)
    elif kind == h5d.CHUNKED:
        length = math.prod(item.chunks) * 16
        for number in range(item.id.get_num_chunks()):
            left_out, content = item.id.read_direct_chunk(
                item.id.get_chunk_info(number).chunk_offset
            )
            for step, (code, *_) in reversed(list(enumerate(filters))):
                if left_out >> step & 1:
                    continue
                if code == 1:
                    try:
                        content = zlib.decompressobj().decompress(content, length)
                    except zlib.error as error:
                        raise OSError(f"a part of {name!r} is damaged: {error}") from error
                else:
                    content = np.frombuffer(content, np.uint8).reshape(16, -1).T.tobytes()
            yield content
    else:
        raise DataError(
            f"{path}, {name!r}: this storage of texts is not supported. Write them with no other"
            " filters than gzip and shuffle, or as fixed-length strings."
        )


def _refuse_foreign(path: Path, name: str, item: Any) -> None:
    """Raise a DataError if a dataset is in another file, or claims a size far beyond its file's."""
    if item.external or item.is_virtual:
        raise DataError(
            f"{path}, {name!r}: the data is in another file, which is not read. Copy it into"
            " this file."
        )
    size = path.stat().st_size
    if item.nbytes > max(_files.SMALL, _files.RATIO * size):
        raise DataError(
            f"{path}, {name!r}: a file of {size:,} bytes that claims to hold {item.nbytes:,} is"
            " refused as a decompression bomb. If you trust it, save the array uncompressed."
        )


def _read_torch(path: Path) -> dict[str, Any]:
    _files.check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; errors are reported below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _is_a_pickle(path, "more than tensors") from error
    except Exception as error:  # on garbage, torch's reader may raise any exception
        raise DataError(
            f"{path}: expected a file written by torch.save; it cannot be read"
            f" ({shorten(first_line(error), 200)})."
        ) from error
    if isinstance(content, Tensor):
        return {"": _whole_tensor(path, content)}
    if isinstance(content, Mapping):
        arrays = {
            str(name): _whole_tensor(path, value)
            if isinstance(value, Tensor)
            else np.asarray(value)
            for name, value in content.items()
            if isinstance(value, Tensor) or _is_flat(value)
        }
        if arrays:
            return arrays
    raise DataError(
        f"{path}: expected a tensor, or a dict of tensors, found {type(content).__name__}."
    )


def _whole_tensor(path: Path, value: Tensor) -> Tensor:
    """Return the tensor if all of its elements are in the file; else raise a DataError."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise DataError(
            f"{path}: expected plain tensors, found one of shape {tuple(value.shape)} that is"
            " sparse, quantised, without data, or expanded. Save a dense copy of it."
        )
    return value.detach()


def _is_flat(value: Any) -> bool:
    """Return whether a value is a list of labels or ids."""
    return isinstance(value, list | tuple) and all(isinstance(item, str | int) for item in value)


def _is_a_pickle(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} is or holds {what}, which may run code when it is read; imvia-graph reads tensors"
        " only. If you trust the file, load it yourself and save its tensor alone with"
        " torch.save(tensor, …), or as .npy or .safetensors."
    )


def _by_entity(
    arrays: Mapping[Any, Any], of: Entities, path: Path, skip_unknown: bool
) -> Views | None:
    """Return the views of a file with one array per entity; None if its arrays are not that."""
    known = set(of.entities) | set(of.entity_names) if isinstance(of, MultiViewKG) else set(of)
    if path.suffix.lower() in _HDF5:
        arrays = _by_label(arrays, known)
    names = list(arrays)
    reserved = {*FEATURE_NAMES, *ENTITY_NAMES, *PRESENT_NAMES}
    if reserved.intersection(names):
        return None
    if not known.intersection(names):
        # Named by ids, unless one of the arrays can hold the features of all entities.
        number = len(of.entities if isinstance(of, MultiViewKG) else of)
        by_id = len(names) > 1 and all(re.fullmatch("[0-9]{1,18}", name) for name in names)
        if not by_id or any(array.shape[:1] == (number,) for array in arrays.values()):
            return None
        by_number = {int(name): array for name, array in arrays.items()}
        if len(by_number) < len(arrays):
            raise DataError(f"{path}: two arrays are named by one id, such as '1' and '01'.")
        arrays = by_number
    return views_by_entity(arrays, of, skip_unknown=skip_unknown, where=str(path))


def _by_label(arrays: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Return the arrays of an HDF5 file by the labels that they were created with.

    In HDF5 a name is a path without empty parts: ``http://a/b`` is stored as ``http:/a/b``.
    """
    labels: dict[str, str | None] = {}
    for label in known:
        stored = "/".join(part for part in label.split("/") if part not in ("", "."))
        if stored not in known:
            labels[stored] = None if stored in labels else label  # None if several have this path
    return {labels.get(name) or name: array for name, array in arrays.items()}


def _named(arrays: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in arrays), None)


def _feature_name(arrays: Mapping[str, Any], others: set[str | None], path: Path) -> str:
    if (name := _named(arrays, FEATURE_NAMES)) is not None:
        return name
    candidates = [
        name
        for name, array in arrays.items()
        if name not in others and len(array.shape) >= 2 and _is_floating(array)
    ]
    if len(candidates) == 1:
        return candidates[0]
    if len(arrays) == 1:
        return next(iter(arrays))
    raise DataError(
        f"{path}: expected one array of features, or one named 'feat', found {_listing(arrays)}."
        " Name the array (key= of imvia_graph.io.read_features), or keep one in the file."
    )


def _is_floating(array: Tensor | np.ndarray) -> bool:
    return array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"


def _listing(arrays: Mapping[str, Any]) -> str:
    shown = [f"{name!r} {tuple(array.shape)}" for name, array in list(arrays.items())[:8]]
    return ", ".join(shown) + (", …" if len(arrays) > len(shown) else "")


def _owners(array: Any) -> Tensor | np.ndarray | list[str]:
    """Return labels stored as text or bytes as str; ids and masks unchanged."""
    array = array[...]  # reads an HDF5 dataset
    if isinstance(array, np.ndarray) and array.dtype.kind in "SO":
        return [item.decode() if isinstance(item, bytes) else str(item) for item in array.tolist()]
    owners: Tensor | np.ndarray = array
    return owners
