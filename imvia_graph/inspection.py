"""`inspect_kg`: checks of a knowledge graph before metrics measured on it are trusted.

All checks work on whole columns. One sort of the triples by their unordered pair of ends groups
those that can repeat, mirror or copy each other; triples alone in their group are then dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from torch import Tensor

from imvia_graph.errors import DataError
from imvia_graph.kg import SPLITS, MultiViewKG
from imvia_graph.splits import HELD_OUT_FRACTION, drawn_by, hold_out

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

#: Pairs of triples, or feature values, processed at a time; bounds the memory.
CHUNK = 1 << 22
TRAIN, VALID, TEST = (1 << place for place in range(len(SPLITS)))


def inspect_kg(
    kg: MultiViewKG, *, threshold: float = 0.8, near: float = 0.5, minimum: int = 3
) -> dict[str, Any]:
    r"""Check a knowledge graph: sizes, degrees, views, leaks between splits, broken features.

    To check the validation set as published, load the graph with
    ``load_kg(source, validation="published")``; ``validation`` in the result says what the
    validation ``auto`` would do with it.

    For relations a and b, let S(a) be the distinct pairs (head, tail) of a over all splits, without
    loops (head = tail), which are their own reverse. The shares are

    .. math::
        \text{inverse}(a, b) = |\{(h, t) \in S(a) : (t, h) \in S(b)\}| \,/\, |S(a)|, \qquad
        \text{copy}(a, b) = |S(a) \cap S(b)| \,/\, |S(a)|.

    Parameters
    ----------
    kg : MultiViewKG
        The graph; it is not modified.
    threshold : float
        Two relations are inverses (copies) if both their shares are at least this; a relation is
        symmetric if its inverse share with itself is. Default: 0.8.
    near : float
        Two relations are near-inverses (near-copies) if one of their shares is at least this; a
        relation is near-symmetric if its inverse share with itself is. Default: 0.5.
    minimum : int
        Number of common pairs below which two relations are not listed. Default: 3.

    Returns
    -------
    dict
        Only types that JSON has: numbers, strings, lists, dicts and None.

        - ``name``, ``notes``, ``entities``, ``relations``: the graph's name, notes and sizes;
        - ``triples``: for each split and for ``all`` of them, the number of rows ``triples``, of
          ``distinct`` triples, and of ``repeated`` rows, the difference;
        - ``shared``: number of distinct triples that two splits share, ``train-valid`` and so on;
        - ``validation``: number of ``distinct`` triples, of these ``in_train``, ``in_test`` and
          ``held_out`` (in neither), what ``auto`` does with them (``published``, ``held-out`` or
          ``none``), and ``why``;
        - ``degree``: ``min``, ``median``, ``mean`` and ``max`` degree of an entity in the training
          triples (a loop counts twice), and the number of ``isolated`` entities, of degree 0;
        - ``relation_size``: the same statistics of the number of training triples per relation, and
          the number of ``unseen`` relations, without any;
        - ``unseen``: number of ``entities`` without a training triple, of these ``nowhere`` (in no
          split) and ``without_views`` (in valid or test, but without a view); number of
          ``relations`` without a training triple; for ``valid`` and ``test``, the rows with an
          unseen head or tail (``triples``), their unseen heads and tails (``ends``), and the rows
          whose relation is unseen (``relation_triples``); up to five labels of such entities
          (``first_entities``) and relations (``first_relations``);
        - ``loops``: number of rows with head = tail (``triples``), and by label of the relation
          (``relations``);
        - ``patterns``: lists ``symmetric``, ``inverse`` and ``copy``, the most leaking first, of
          ``relation`` (and ``other``), ``kind``, number of common ``pairs``, ``share`` (and
          ``other_share``) and ``test_answered``: the test rows of either relation that mirror or
          copy a training triple of the other; ``test_answered``: the test rows that the listed
          relations of each list, or of ``any``, leak; ``thresholds``: the arguments;
        - ``views``: for each modality the number of ``views``, ``width`` and ``dtype``; the number
          of entities with ``none``, ``one`` and ``many`` views, and the ``median``, ``mean`` and
          ``max`` number of views per entity; of the features the number of ``non_finite``, all
          ``zero``, ``constant`` (one nonzero value) and ``repeated`` rows (equal to an earlier
          one), ``repeated_same_entity`` of these within an entity, and ``constant_columns``;
          ``most_repeated``: the number of ``views`` and of ``entities`` that share the most
          frequent repeated row, and the first such ``entity``, or None;
        - ``warnings``: ``code`` and ``text`` of each problem, with advice.

    Raises
    ------
    DataError
        An argument is out of range.

    References
    ----------
    Leaks by inverse and copied relations: Toutanova and Chen, "Observed versus latent features for
    knowledge base and text inference", CVSC 2015; Akrami et al., "Realistic re-evaluation of
    knowledge graph completion methods", SIGMOD 2020.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> kg = ig.MultiViewKG.from_labels(
    ...     train=[(f"parent {i}", "has child", f"child {i}") for i in range(4)],
    ...     test=[(f"child {i}", "has parent", f"parent {i}") for i in range(4)],
    ... )
    >>> found = ig.inspect_kg(kg)
    >>> found["triples"]["test"]
    {'triples': 4, 'distinct': 4, 'repeated': 0}
    >>> found["patterns"]["inverse"][0]["other"], found["patterns"]["test_answered"]["inverse"]
    ('has parent', 4)
    >>> [warning["code"] for warning in found["warnings"]]
    ['unseen-relations', 'inverse-relations', 'no-validation']
    """
    if not 0 < near <= threshold <= 1 or minimum < 1:
        raise DataError(
            "inspect_kg: expected 0 < near <= threshold <= 1 and minimum >= 1, received"
            f" near={near}, threshold={threshold}, minimum={minimum}."
        )
    columns = _columns(kg)
    grouped = _group_by_ends(columns, kg.num_entities)
    triples, shared = _counts(columns, grouped)
    result: dict[str, Any] = {
        "name": kg.name,
        "notes": list(kg.notes),
        "entities": kg.num_entities,
        "relations": kg.num_relations,
        "triples": triples,
        "shared": shared,
        "validation": _validation(grouped, triples["valid"]["distinct"], shared),
        **_degrees(kg, columns),
        "loops": _loops(kg, columns),
        "patterns": _patterns(kg, columns, grouped, threshold, near, minimum),
        "views": {modality: _views(kg, modality) for modality in kg.modalities},
    }
    result["warnings"] = [{"code": code, "text": text} for code, text in _warnings(kg, result)]
    return result


# -- triples --------------------------------------------------------------------------------------


class _Columns(NamedTuple):
    """Columns (n,) of the triples of all splits; ``split`` is an index into SPLITS."""

    head: Ints
    relation: Ints
    tail: Ints
    split: NDArray[np.uint8]


class _Grouped(NamedTuple):
    """Rows that share their unordered pair of ends with another row, and their distinct triples.

    ``split``, ``relation``, ``row_is_first`` (not a repetition within its split) and
    ``row_is_loop`` have an entry per row. The other fields have an entry per distinct triple:
    ``group`` numbers the pairs of ends, ``backward`` is whether the head has the greater id,
    ``label`` is the relation, ``splits`` is a bit mask, and ``test_rows`` counts the rows in test.
    """

    split: NDArray[np.uint8]
    relation: Ints
    row_is_first: Bools
    row_is_loop: Bools
    group: Ints
    backward: Bools
    label: Ints
    loop: Bools
    splits: NDArray[np.uint8]
    test_rows: Ints


def _columns(kg: MultiViewKG) -> _Columns:
    parts = [kg.triples(split).numpy() for split in SPLITS]
    head, relation, tail = (np.concatenate([part[:, i] for part in parts]) for i in range(3))
    split = np.repeat(np.arange(len(SPLITS), dtype=np.uint8), [len(part) for part in parts])
    return _Columns(head, relation, tail, split)


def _group_by_ends(columns: _Columns, num_entities: int) -> _Grouped:
    head, relation, tail, split = columns
    ends = np.minimum(head, tail) * num_entities + np.maximum(head, tail)
    order = np.argsort(ends)
    ends = ends[order]
    equal = ends[1:] == ends[:-1]
    shared = np.zeros(len(ends), dtype=bool)
    shared[1:] |= equal
    shared[:-1] |= equal
    rows, group = order[shared], ends[shared]
    backward = head[rows] > tail[rows]

    order = np.lexsort((split[rows], relation[rows], backward, group))
    rows, group, backward = rows[order], group[order], backward[order]
    relation_, split_, loop = relation[rows], split[rows], (head == tail)[rows]
    new = _changes(group) | _changes(backward) | _changes(relation_)
    start = np.flatnonzero(new)
    if len(start):
        splits = np.bitwise_or.reduceat(np.left_shift(1, split_).astype(np.uint8), start)
        test_rows = np.add.reduceat((split_ == SPLITS.index("test")).astype(np.int64), start)
    else:
        splits, test_rows = np.empty(0, np.uint8), np.empty(0, np.int64)
    return _Grouped(
        split_,
        relation_,
        new | _changes(split_),
        loop,
        np.cumsum(_changes(group[start])) - 1,
        backward[start],
        relation_[start],
        loop[start],
        splits,
        test_rows,
    )


def _changes(values: NDArray[Any]) -> Bools:
    """Mark where a value differs from the previous one; the first is always marked."""
    changed = np.ones(len(values), dtype=bool)
    changed[1:] = values[1:] != values[:-1]
    return changed


def _counts(
    columns: _Columns, grouped: _Grouped
) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    rows = np.bincount(columns.split, minlength=len(SPLITS))
    repeated = np.bincount(grouped.split[~grouped.row_is_first], minlength=len(SPLITS))
    triples = {
        split: {
            "triples": int(rows[i]),
            "distinct": int(rows[i] - repeated[i]),
            "repeated": int(repeated[i]),
        }
        for i, split in enumerate(SPLITS)
    }
    repeated_at_all = len(grouped.split) - len(grouped.splits)
    triples["all"] = {
        "triples": len(columns.split),
        "distinct": len(columns.split) - repeated_at_all,
        "repeated": repeated_at_all,
    }
    shared = {
        "train-valid": _in_all(grouped.splits, TRAIN | VALID),
        "train-test": _in_all(grouped.splits, TRAIN | TEST),
        "valid-test": _in_all(grouped.splits, VALID | TEST),
    }
    return triples, shared


def _in_all(splits: NDArray[np.uint8], wanted: int) -> int:
    return int(((splits & wanted) == wanted).sum())


def _validation(grouped: _Grouped, distinct: int, shared: dict[str, int]) -> dict[str, Any]:
    in_train, in_test = shared["train-valid"], shared["valid-test"]
    in_both = _in_all(grouped.splits, TRAIN | VALID | TEST)
    if not distinct:
        auto, why = "none", "there is no validation set, and auto makes none"
    elif in_train or in_test:
        auto, why = "held-out", "it shares triples with train or test; auto sets it aside"
    else:
        auto, why = "published", "it shares no triple with train or test; auto uses it as it is"
    return {
        "distinct": distinct,
        "in_train": in_train,
        "in_test": in_test,
        "held_out": distinct - in_train - in_test + in_both,
        "auto": auto,
        "why": why,
    }


def _degrees(kg: MultiViewKG, columns: _Columns) -> dict[str, Any]:
    train = columns.split == SPLITS.index("train")
    head, relation, tail = columns.head[train], columns.relation[train], columns.tail[train]
    degree = np.bincount(head, minlength=kg.num_entities)
    degree += np.bincount(tail, minlength=kg.num_entities)
    size = np.bincount(relation, minlength=kg.num_relations)
    unseen, unseen_relation = degree == 0, size == 0

    nowhere = unseen.copy()
    nowhere[columns.head] = False
    nowhere[columns.tail] = False
    bare = unseen & ~nowhere
    for modality in kg.modalities:
        bare &= kg.views(modality)[1].diff().numpy() == 0
    touched: dict[str, Any] = {}
    for split in ("valid", "test"):
        mine = columns.split == SPLITS.index(split)
        head, tail = unseen[columns.head[mine]], unseen[columns.tail[mine]]
        touched[split] = {
            "triples": int((head | tail).sum()),
            "ends": int(head.sum() + tail.sum()),
            "relation_triples": int(unseen_relation[columns.relation[mine]].sum()),
        }
    return {
        "degree": {**_distribution(degree), "isolated": int(unseen.sum())},
        "relation_size": {**_distribution(size), "unseen": int(unseen_relation.sum())},
        "unseen": {
            "entities": int(unseen.sum()),
            "without_views": int(bare.sum()),
            "nowhere": int(nowhere.sum()),
            "relations": int(unseen_relation.sum()),
            **touched,
            "first_entities": [kg.entities[i] for i in np.flatnonzero(unseen)[:5]],
            "first_relations": [kg.relations[i] for i in np.flatnonzero(unseen_relation)[:5]],
        },
    }


def _distribution(values: Ints) -> dict[str, float]:
    if not len(values):
        return {"min": 0, "median": 0.0, "mean": 0.0, "max": 0}
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "max": int(values.max()),
    }


def _loops(kg: MultiViewKG, columns: _Columns) -> dict[str, Any]:
    of_relation = np.bincount(
        columns.relation[columns.head == columns.tail], minlength=kg.num_relations
    )
    order = np.argsort(-of_relation, kind="stable")
    found = order[of_relation[order] > 0]
    return {
        "triples": int(of_relation.sum()),
        "relations": {kg.relations[i]: int(of_relation[i]) for i in found},
    }


# -- relations that repeat each other -------------------------------------------------------------


def _patterns(
    kg: MultiViewKG,
    columns: _Columns,
    grouped: _Grouped,
    threshold: float,
    near: float,
    minimum: int,
) -> dict[str, Any]:
    num = kg.num_relations
    plain = ~grouped.loop
    group, backward, label = grouped.group[plain], grouped.backward[plain], grouped.label[plain]
    in_train = (grouped.splits[plain] & TRAIN) > 0
    test_rows = grouped.test_rows[plain]
    pairs = np.bincount(columns.relation[columns.head != columns.tail], minlength=num)
    pairs -= np.bincount(grouped.relation[~grouped.row_is_loop], minlength=num)
    pairs += np.bincount(label, minlength=num)  # distinct (head, tail) of each relation

    # Number of pairs of relation `a` in common with relation `b`, and of test rows of `a` that a
    # training triple of `b` leaks, by key a * num + b. Mirrored: the pair of b is reversed.
    common = {mirrored: _SumsByKey(num * num) for mirrored in (True, False)}
    for i, j in _pairs_in_groups(group, np.arange(len(group))):
        key, opposite = label[i] * num + label[j], backward[i] != backward[j]
        for mirrored, sums in common.items():
            sums.add(key[opposite == mirrored])
    leaked = {mirrored: _SumsByKey(num * num) for mirrored in (True, False)}
    test_only = np.flatnonzero(test_rows)
    for i, j in _pairs_in_groups(group, test_only):
        key, opposite = label[i] * num + label[j], backward[i] != backward[j]
        for mirrored, sums in leaked.items():
            which = in_train[j] & (opposite == mirrored)
            sums.add(key[which], test_rows[i[which]])

    found: dict[str, Any] = {"symmetric": [], "inverse": [], "copy": []}
    listed: dict[str, list[int]] = {sort: [] for sort in found}
    for mirrored in (True, False):
        key, count = common[mirrored].items()
        a, b = key // num, key % num
        share, other_share = count / pairs[a], count / pairs[b]
        keep = (a <= b) & (count >= minimum) & (np.maximum(share, other_share) >= near)
        for row in np.flatnonzero(keep):
            one, other = int(a[row]), int(b[row])
            sort = "symmetric" if one == other else "inverse" if mirrored else "copy"
            keys = {one * num + other, other * num + one}
            near_only = min(share[row], other_share[row]) < threshold
            entry: dict[str, Any] = {"relation": kg.relations[one]}
            if one != other:
                entry["other"] = kg.relations[other]
            entry["kind"] = f"near-{sort}" if near_only else sort
            entry["pairs"] = int(count[row])
            entry["share"] = float(share[row])
            if one != other:
                entry["other_share"] = float(other_share[row])
            entry["test_answered"] = sum(leaked[mirrored].get(key) for key in keys)
            found[sort].append(entry)
            listed[sort] += sorted(keys)
    for entries in found.values():
        entries.sort(key=lambda entry: (-entry["test_answered"], -entry["pairs"]))

    answered = {sort: np.zeros(len(group), dtype=bool) for sort in found}
    for i, j in _pairs_in_groups(group, test_only):
        key, opposite = label[i] * num + label[j], backward[i] != backward[j]
        for sort, hit in answered.items():
            which = in_train[j] & (opposite == (sort != "copy"))
            hit[i[which & np.isin(key, listed[sort])]] = True
    found["test_answered"] = {sort: int(test_rows[hit].sum()) for sort, hit in answered.items()}
    at_all = np.logical_or.reduce(list(answered.values()))
    found["test_answered"]["any"] = int(test_rows[at_all].sum())
    found["thresholds"] = {"threshold": threshold, "near": near, "minimum": minimum}
    return found


def _pairs_in_groups(group: Ints, rows: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Yield the pairs of each of ``rows`` with each other row of its group, in bounded chunks.

    ``group`` ascends from 0 without gaps, so that the rows of a group are contiguous.
    """
    size = np.bincount(group)
    start = np.cumsum(size) - size
    count = size[group[rows]]
    done = np.cumsum(count)
    at = 0
    while at < len(rows):
        before = done[at - 1] if at else 0
        end = max(at + 1, int(np.searchsorted(done, before + CHUNK, side="right")))
        times = count[at:end]
        i = np.repeat(rows[at:end], times)
        offset = np.arange(len(i)) - np.repeat(np.cumsum(times) - times, times)
        j = start[group[i]] + offset
        yield i[i != j], j[i != j]
        at = end


class _SumsByKey:
    """Sums by key: a dense array if there are few possible keys, else sorted keys and sums."""

    def __init__(self, size: int) -> None:
        self.dense = np.zeros(size, dtype=np.int64) if size <= CHUNK else None
        self.key: Ints = np.empty(0, dtype=np.int64)
        self.count: Ints = np.empty(0, dtype=np.int64)

    def add(self, key: Ints, weight: Ints | None = None) -> None:
        """Add 1, or the weight, to the sum of each key; keys may repeat."""
        if weight is None:
            weight = np.ones(len(key), dtype=np.int64)
        if self.dense is not None:
            np.add.at(self.dense, key, weight)
            return
        keys = np.concatenate([self.key, key])
        self.key, place = np.unique(keys, return_inverse=True)
        count = np.zeros(len(self.key), dtype=np.int64)
        np.add.at(count, place, np.concatenate([self.count, weight]))
        self.count = count

    def items(self) -> tuple[Ints, Ints]:
        """Return the keys with a sum, ascending, and their sums."""
        if self.dense is None:
            return self.key, self.count
        key = np.flatnonzero(self.dense)
        return key, self.dense[key]

    def get(self, key: int) -> int:
        """Return the sum of one key."""
        if self.dense is not None:
            return int(self.dense[key])
        place = int(np.searchsorted(self.key, key))
        there = place < len(self.key) and self.key[place] == key
        return int(self.count[place]) if there else 0


# -- views ----------------------------------------------------------------------------------------


def _views(kg: MultiViewKG, modality: str) -> dict[str, Any]:
    feat, ptr = kg.views(modality)
    count = ptr.diff().numpy()
    distribution = _distribution(count)
    owner = np.repeat(np.arange(kg.num_entities), count)
    return {
        "views": len(feat),
        "width": feat.shape[1],
        "dtype": str(feat.dtype).removeprefix("torch."),
        "none": int((count == 0).sum()),
        "one": int((count == 1).sum()),
        "many": int((count > 1).sum()),
        **{key: distribution[key] for key in ("median", "mean", "max")},
        **_features(feat, owner, kg.entities),
    }


def _features(feat: Tensor, owner: Ints, entities: list[str]) -> dict[str, Any]:
    """Return the flaws of (V, d) features of the entities ``owner`` (V,), found chunk by chunk."""
    num, width = feat.shape
    step = max(1, CHUNK // max(1, width))
    weight = np.random.default_rng(0).integers(1 << 62, size=width).astype(np.uint64) * 2 + 1
    digest = np.empty(num, dtype=np.uint64)
    non_finite = zero = constant = 0
    varies = np.zeros(width, dtype=bool)
    for at in range(0, num, step):
        values = _as_floats(feat[at : at + step])
        non_finite += int((~np.isfinite(values).all(axis=1)).sum())
        zeros = (values == 0).all(axis=1)
        zero += int(zeros.sum())
        constant += int(((values == values[:, :1]).all(axis=1) & ~zeros).sum()) if width > 1 else 0
        if not at:
            first = values[0]
        varies |= (values != first).any(axis=0)
        digest[at : at + step] = _digest(values, weight)

    rows, leader = _repeated_rows(feat, digest, step)
    same_entity = 0
    most: dict[str, Any] | None = None
    if len(rows):
        both = np.unique(np.stack([leader, owner[rows]], axis=1), axis=0)
        same_entity = len(rows) - len(both)
        leaders, size = np.unique(leader, return_counts=True)
        top = leaders[size.argmax()]
        most = {
            "views": int(size.max()),
            "entities": int((both[:, 0] == top).sum()),
            "entity": entities[owner[top]],
        }
    return {
        "non_finite": non_finite,
        "zero": zero,
        "constant": constant,
        "constant_columns": int((~varies).sum()) if num > 1 else 0,
        "repeated": len(rows) - len(np.unique(leader)),
        "repeated_same_entity": same_entity,
        "most_repeated": most,
    }


def _as_floats(feat: Tensor) -> NDArray[Any]:
    """Return features as float32, or float64 if they are; -0 becomes 0, which it equals."""
    wide = feat if feat.element_size() >= 4 else feat.float()
    values: NDArray[Any] = wide.detach().cpu().contiguous().numpy() + 0.0
    return values


def _digest(values: NDArray[Any], weight: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return (n,) 64-bit digests of the bits of (n, d) values; equal rows have equal digests."""
    bits = _bits(values).astype(np.uint64)
    bits *= weight
    bits ^= bits >> np.uint64(32)
    bits *= np.uint64(0x9E3779B97F4A7C15)
    bits ^= bits >> np.uint64(29)
    total: NDArray[np.uint64] = bits.sum(axis=1, dtype=np.uint64)
    return total


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    return values.view(np.uint32 if values.dtype == np.float32 else np.uint64)


def _repeated_rows(feat: Tensor, digest: NDArray[np.uint64], step: int) -> tuple[Ints, Ints]:
    """Return the rows that equal another, and the first row equal to each; compares the values."""
    order = np.argsort(digest, kind="stable")
    new = _changes(digest[order])
    leader = order[np.flatnonzero(new)[np.cumsum(new) - 1]] if len(order) else order
    alone = new & np.append(new[1:], True) if len(new) else new
    rows, leader = order[~alone], leader[~alone]
    equal = np.ones(len(rows), dtype=bool)
    for at in range(0, len(rows), step):
        part = slice(at, at + step)
        mine, theirs = _as_floats(feat[rows[part]]), _as_floats(feat[leader[part]])
        equal[part] = (_bits(mine) == _bits(theirs)).all(axis=1)
    return rows[equal], leader[equal]


# -- warnings -------------------------------------------------------------------------------------


def _warnings(kg: MultiViewKG, found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield codes and texts, the most serious first; the texts call relations by their names."""
    names = dict(zip(kg.relations, kg.relation_names, strict=True))
    triples, shared, validation = found["triples"], found["shared"], found["validation"]
    test = triples["test"]["triples"]

    alike = _common_labels(kg)
    if len(alike) > 1 and 2 * len(alike) >= kg.num_relations:
        yield (
            "relations-are-entities",
            f"{len(alike):,} of {kg.num_relations:,} relations have the label of an entity,"
            f" first {alike[0]!r}. If the columns of the source are not in the order head,"
            " relation, tail, give their order (--columns 1,0,2, or their names).",
        )
    if validation["in_train"]:
        yield (
            "validation-in-train",
            f"{validation['in_train']:,} of the {validation['distinct']:,} distinct validation"
            f" triples are in train and {validation['in_test']:,} in test;"
            f" {validation['held_out']:,} are in neither. This set cannot choose an epoch."
            f" {_advice(kg, '--validation held-out; the default, auto, does so here')}",
        )
    elif validation["in_test"]:
        yield (
            "validation-in-test",
            f"{validation['in_test']:,} of the {validation['distinct']:,} distinct validation"
            " triples are in test: choosing by validation is choosing by test."
            f" {_advice(kg, '--validation held-out')}",
        )
    if shared["train-test"]:
        yield (
            "test-in-train",
            f"{shared['train-test']:,} of the {triples['test']['distinct']:,} distinct test"
            " triples are in train: test metrics are too good. Remove them from train (or from"
            " test, and report that).",
        )
    repeated = {split: triples[split]["repeated"] for split in SPLITS if triples[split]["repeated"]}
    if repeated:
        listed = ", ".join(f"{count:,} in {split}" for split, count in repeated.items())
        yield (
            "repeated-triples",
            f"Rows that repeat an earlier row of their split: {listed}. They count more than"
            " once in training or in the metrics; remove them unless that is intended.",
        )
    yield from _unseen_warnings(found, names)
    yield from _pattern_warnings(found["patterns"], test, names)
    if found["loops"]["triples"]:
        worst = names[next(iter(found["loops"]["relations"]))]
        yield (
            "loops",
            f"{_number(found['loops']['triples'], 'triple')} with the same head and tail, most"
            f" of them of {worst!r}. Check that they are meaningful.",
        )
    for modality, views in found["views"].items():
        for code, text in _view_warnings(views, found["entities"]):
            yield code, f"{modality}: {text}"
    if not triples["valid"]["triples"]:
        yield (
            "no-validation",
            "There is no validation set, so training keeps its last epoch, not the best."
            f" {_advice(kg, '--validation held-out')}",
        )
    if not test:
        yield "no-test", "There is no test set, so nothing measures how good the predictions are."


def _common_labels(kg: MultiViewKG) -> list[str]:
    """Return the labels of both a relation and an entity, numbers excluded, which may be ids."""
    entities, relations = (column.alias("label").to_frame() for column in kg.label_columns)
    words = relations.filter(~pl.col("label").str.contains(r"^\d+$"))
    return words.join(entities, on="label", how="semi")["label"].to_list()


def _advice(kg: MultiViewKG, option: str) -> str:
    """Return what to validate with: held-out triples, if any can be held out."""
    by = drawn_by(kg.train, kg.test)
    if len(hold_out(kg.train, HELD_OUT_FRACTION, keep=kg.test, by=by)[1]):
        return f"Use held-out validation ({option})."
    return (
        "Give a validation set of other triples: no training triple can be held out, because there"
        " are too few, or each is the only one of an entity or a relation."
    )


def _unseen_warnings(found: dict[str, Any], names: dict[str, str]) -> Iterator[tuple[str, str]]:
    unseen, test = found["unseen"], found["triples"]["test"]["triples"]
    if unseen["valid"]["triples"] or unseen["test"]["triples"]:
        views = f"{'Only views describe' if found['views'] else 'Nothing describes'} these entities"
        if found["views"] and unseen["without_views"]:
            views += f", and {unseen['without_views']:,} of them have none"
        yield (
            "unseen-entities",
            f"{unseen['test']['triples']:,} of {test:,} test triples"
            f" ({_number(unseen['test']['ends'], 'end')}) and {unseen['valid']['triples']:,} of"
            f" {found['triples']['valid']['triples']:,} validation triples have an entity"
            f" without training triples. {views}. Report these triples separately, or give the"
            " entities views or training triples.",
        )
    if unseen["nowhere"]:
        yield (
            "unused-entities",
            f"{_number(unseen['nowhere'], 'entity', 'entities')} in no triple of any split. All"
            " compete as candidates; remove those that predictions should not name.",
        )
    if unseen["relations"]:
        first = ", ".join(repr(names[label]) for label in unseen["first_relations"])
        first += ", …" if unseen["relations"] > len(unseen["first_relations"]) else ""
        yield (
            "unseen-relations",
            f"{_number(unseen['relations'], 'relation')} without a training triple ({first}):"
            f" {_number(unseen['test']['relation_triples'], 'test triple')} and"
            f" {_number(unseen['valid']['relation_triples'], 'validation triple')} of them."
            " Nothing can be learned about these; remove them or move triples to train.",
        )


def _pattern_warnings(
    patterns: dict[str, Any], test: int, names: dict[str, str]
) -> Iterator[tuple[str, str]]:
    kinds = {
        "inverse": (
            "inverse-relations",
            "the same two entities reversed, under an inverse or near-inverse relation",
            "Keep one relation of each such pair, or keep their triples in one split",
        ),
        "copy": (
            "copied-relations",
            "the same two entities under a relation that is a copy or near-copy",
            "Keep one relation of each such pair, or keep their triples in one split",
        ),
        "symmetric": (
            "symmetric-relations",
            "the same triple reversed, under a symmetric relation",
            "Keep both directions in one split",
        ),
    }
    for sort, (code, what, advice) in kinds.items():
        answered = patterns["test_answered"][sort]
        if answered:
            worst = patterns[sort][0]
            both = [repr(names[worst[key]]) for key in ("relation", "other") if key in worst]
            yield (
                code,
                f"Train leaks {answered:,} of {test:,} test triples ({answered / test:.1%}): it"
                f" has {what} (most: {' and '.join(both)}, {worst['test_answered']:,}). A rule"
                f" answers these. {advice}.",
            )


def _view_warnings(views: dict[str, Any], entities: int) -> Iterator[tuple[str, str]]:
    if views["none"] == entities:
        yield "no-views", "no entity has a view. Leave the modality out."
    if views["non_finite"]:
        yield (
            "non-finite-features",
            f"{_number(views['non_finite'], 'view')} with NaN or infinity. Leave them out, or"
            " encode again.",
        )
    if views["zero"]:
        yield (
            "zero-features",
            f"{_number(views['zero'], 'view')} of zeros only, perhaps missing data. If so, leave"
            " them out; an entity without a view gets a learned vector.",
        )
    if views["constant"]:
        yield (
            "constant-features",
            f"{_number(views['constant'], 'view')} of one repeated value. Check where they come"
            " from.",
        )
    if views["constant_columns"]:
        yield (
            "constant-columns",
            f"{views['constant_columns']:,} of {views['width']:,} columns are equal in all views"
            " and carry no information; drop them, or check the encoder.",
        )
    if views["repeated"]:
        most = views["most_repeated"]
        yield (
            "repeated-features",
            f"{views['repeated']:,} of {views['views']:,} views equal an earlier one"
            f" ({views['repeated_same_entity']:,} of the same entity). The most frequent occurs"
            f" {most['views']:,} times, in {_number(most['entities'], 'entity', 'entities')},"
            f" first {most['entity']!r}. If it is a placeholder, leave it out.",
        )


def _number(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


__all__ = ["inspect_kg"]
