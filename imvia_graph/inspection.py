"""`inspect_kg`: what to know of a knowledge graph before trusting what is measured on it.

Works on whole columns: one sort of all triples by their two ends brings together whatever can
repeat, mirror or copy each other, and the rest is looked at no further.
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

#: Couples of triples, or feature values, that are looked at together: what bounds the memory.
CHUNK = 1 << 22
TRAIN, VALID, TEST = (1 << place for place in range(len(SPLITS)))


def inspect_kg(
    kg: MultiViewKG, *, threshold: float = 0.8, near: float = 0.5, minimum: int = 3
) -> dict[str, Any]:
    r"""Look at a knowledge graph: sizes, degrees, views, leaks between splits, broken features.

    For the validation set as it was published, load the graph with
    ``load_kg(source, validation="published")``; ``validation`` in the result says what ``auto``
    makes of it.

    For relations a and b, with S(a) the distinct pairs (head, tail) of a over all splits, loops
    (head = tail, their own reverse) left out, the shares are

    .. math::
        \text{inverse}(a, b) = |\{(h, t) \in S(a) : (t, h) \in S(b)\}| \,/\, |S(a)|, \qquad
        \text{copy}(a, b) = |S(a) \cap S(b)| \,/\, |S(a)|.

    Parameters
    ----------
    kg : MultiViewKG
        Left as it is.
    threshold : float
        Two relations are inverses (copies) where the shares of both in each other are at least
        this, a relation is symmetric where its share in itself is. Default: 0.8.
    near : float
        They are near-inverses (near-copies) where the share of one is at least this, and a
        relation is near-symmetric where its own is. Default: 0.5.
    minimum : int
        Pairs that two relations must have in common to be listed at all; fewer say nothing.
        Default: 3.

    Returns
    -------
    dict
        Numbers, strings, lists and dicts only, as JSON has them:

        - ``name``, ``notes``, ``entities``, ``relations``: the graph's name, notes and sizes;
        - ``triples``: for each split and for ``all`` of them, ``triples`` (rows), ``distinct``, and
          ``repeated``, the difference;
        - ``shared``: distinct triples that two splits have in common, ``train-valid`` and so on;
        - ``validation``: ``distinct``, ``in_train``, ``in_test``, ``held_out`` (in neither of
          them), what ``auto`` does with it (``published``, ``held-out`` or ``none``), ``why``;
        - ``degree``: ``min``, ``median``, ``mean``, ``max`` of the number of training triples' ends
          that an entity is (a loop counts twice), and ``isolated``, how many are none;
        - ``relation_size``: the same of the training triples of a relation, with ``unseen``;
        - ``unseen``: what no training triple touches: ``entities``, of them ``nowhere`` (in no
          split at all) and ``without_views`` (in valid or test, with no view either),
          ``relations``; and for ``valid`` and ``test`` the ``triples`` (rows) with an unseen head
          or tail, the ``ends`` of rows that are unseen (two where both are), the
          ``relation_triples`` whose relation is unseen; ``first_entities`` and
          ``first_relations``, up to five labels;
        - ``loops``: ``triples`` (rows with head = tail) and ``relations``, how many by label;
        - ``patterns``: ``symmetric``, ``inverse`` and ``copy``, each a list, the most leaking
          first, of ``relation`` (and ``other``), ``kind``, ``pairs`` in common, ``share`` (and
          ``other_share``) and ``test_answered``: rows of test, of both relations, that a training
          triple of the other one tells; ``test_answered``: rows of test so told by any listed
          pattern of a sort, and ``any``; ``thresholds``, as given;
        - ``views``: for each modality ``views``, ``width``, ``dtype``, the entities with ``none``,
          ``one`` and ``many``, ``median``, ``mean`` and ``max`` of their number, and of the
          features ``non_finite`` rows, ``zero`` rows, ``constant`` rows (one value throughout, not
          zero), ``constant_columns``, ``repeated`` rows (equal to an earlier one),
          ``repeated_same_entity``, and ``most_repeated``: ``views`` and ``entities`` that share
          one row, with the first ``entity``;
        - ``warnings``: ``code`` and ``text`` of whatever deserves a second look, and what to do.

    Raises
    ------
    DataError
        A threshold out of range.

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
    crowd = _crowd(columns, kg.num_entities)
    triples, shared = _counts(columns, crowd)
    result: dict[str, Any] = {
        "name": kg.name,
        "notes": list(kg.notes),
        "entities": kg.num_entities,
        "relations": kg.num_relations,
        "triples": triples,
        "shared": shared,
        "validation": _validation(crowd, triples["valid"]["distinct"], shared),
        **_degrees(kg, columns),
        "loops": _loops(kg, columns),
        "patterns": _patterns(kg, columns, crowd, threshold, near, minimum),
        "views": {modality: _views(kg, modality) for modality in kg.modalities},
    }
    result["warnings"] = _warnings(kg, result)
    return result


# -- triples --------------------------------------------------------------------------------------


class _Columns(NamedTuple):
    """All triples of all splits, column by column: (n,) each; ``split`` is a place in SPLITS."""

    head: Ints
    relation: Ints
    tail: Ints
    split: NDArray[np.uint8]


class _Crowd(NamedTuple):
    """Rows whose two ends, in whatever order, are those of another row; and what they amount to.

    ``split`` and ``relation`` are of the rows; ``row_is_first`` marks those that are not repeated
    within their split. All else is a row a *distinct triple*: ``group`` is the same for triples
    between the same two entities, ``backward`` is whether the head is the greater id, ``splits``
    are bits, ``test_rows`` counts its rows in test.
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


def _crowd(columns: _Columns, num_entities: int) -> _Crowd:
    head, relation, tail, split = columns
    ends = np.minimum(head, tail) * num_entities + np.maximum(head, tail)
    order = np.argsort(ends)
    ends = ends[order]
    equal = ends[1:] == ends[:-1]
    crowded = np.zeros(len(ends), dtype=bool)
    crowded[1:] |= equal
    crowded[:-1] |= equal
    rows, group = order[crowded], ends[crowded]
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
    return _Crowd(
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
    """Where a value differs from the one before; the first always does."""
    changed = np.ones(len(values), dtype=bool)
    changed[1:] = values[1:] != values[:-1]
    return changed


def _counts(columns: _Columns, crowd: _Crowd) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    rows = np.bincount(columns.split, minlength=len(SPLITS))
    repeated = np.bincount(crowd.split[~crowd.row_is_first], minlength=len(SPLITS))
    triples = {
        split: {
            "triples": int(rows[i]),
            "distinct": int(rows[i] - repeated[i]),
            "repeated": int(repeated[i]),
        }
        for i, split in enumerate(SPLITS)
    }
    repeated_at_all = len(crowd.split) - len(crowd.splits)
    triples["all"] = {
        "triples": len(columns.split),
        "distinct": len(columns.split) - repeated_at_all,
        "repeated": repeated_at_all,
    }
    shared = {
        "train-valid": _in_all(crowd.splits, TRAIN | VALID),
        "train-test": _in_all(crowd.splits, TRAIN | TEST),
        "valid-test": _in_all(crowd.splits, VALID | TEST),
    }
    return triples, shared


def _in_all(splits: NDArray[np.uint8], wanted: int) -> int:
    return int(((splits & wanted) == wanted).sum())


def _validation(crowd: _Crowd, distinct: int, shared: dict[str, int]) -> dict[str, Any]:
    in_train, in_test = shared["train-valid"], shared["valid-test"]
    in_both = _in_all(crowd.splits, TRAIN | VALID | TEST)
    if not distinct:
        auto, why = "none", "there is no validation set, and auto makes none"
    elif in_train or in_test:
        auto, why = "held-out", "it shares triples with train or test; auto puts it aside"
    else:
        auto, why = "published", "it shares no triple with train or test; auto takes it as it is"
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


# -- relations that tell of each other ------------------------------------------------------------


def _patterns(
    kg: MultiViewKG, columns: _Columns, crowd: _Crowd, threshold: float, near: float, minimum: int
) -> dict[str, Any]:
    num = kg.num_relations
    plain = ~crowd.loop
    group, backward, label = crowd.group[plain], crowd.backward[plain], crowd.label[plain]
    in_train = (crowd.splits[plain] & TRAIN) > 0
    test_rows = crowd.test_rows[plain]
    pairs = np.bincount(columns.relation[columns.head != columns.tail], minlength=num)
    pairs -= np.bincount(crowd.relation[~crowd.row_is_loop], minlength=num)
    pairs += np.bincount(label, minlength=num)  # distinct (head, tail) of each relation

    # How many pairs, and how many test rows, relation `a` has in common with relation `b`; the key
    # is a * num + b. Mirrored: the pair of b is reversed.
    common = {mirrored: _Counter(num * num) for mirrored in (True, False)}
    for i, j in _couples(group, np.arange(len(group))):
        key, opposite = label[i] * num + label[j], backward[i] != backward[j]
        for mirrored, counter in common.items():
            counter.add(key[opposite == mirrored])
    told = {mirrored: _Counter(num * num) for mirrored in (True, False)}
    test_only = np.flatnonzero(test_rows)
    for i, j in _couples(group, test_only):
        key, opposite = label[i] * num + label[j], backward[i] != backward[j]
        for mirrored, counter in told.items():
            which = in_train[j] & (opposite == mirrored)
            counter.add(key[which], test_rows[i[which]])

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
            entry["test_answered"] = sum(told[mirrored].get(key) for key in keys)
            found[sort].append(entry)
            listed[sort] += sorted(keys)
    for entries in found.values():
        entries.sort(key=lambda entry: (-entry["test_answered"], -entry["pairs"]))

    answered = {sort: np.zeros(len(group), dtype=bool) for sort in found}
    for i, j in _couples(group, test_only):
        key, opposite = label[i] * num + label[j], backward[i] != backward[j]
        for sort, hit in answered.items():
            which = in_train[j] & (opposite == (sort != "copy"))
            hit[i[which & np.isin(key, listed[sort])]] = True
    found["test_answered"] = {sort: int(test_rows[hit].sum()) for sort, hit in answered.items()}
    at_all = np.logical_or.reduce(list(answered.values()))
    found["test_answered"]["any"] = int(test_rows[at_all].sum())
    found["thresholds"] = {"threshold": threshold, "near": near, "minimum": minimum}
    return found


def _couples(group: Ints, rows: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Each of some rows with each other row of its group, in bounded portions.

    ``group`` ascends from 0 without gaps, so that a group's rows stand together.
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


class _Counter:
    """Sums by key: one array where the keys are few, sorted portions where they are many."""

    def __init__(self, size: int) -> None:
        self.dense = np.zeros(size, dtype=np.int64) if size <= CHUNK else None
        self.key: Ints = np.empty(0, dtype=np.int64)
        self.count: Ints = np.empty(0, dtype=np.int64)

    def add(self, key: Ints, weight: Ints | None = None) -> None:
        """Count each key once, or by its weight."""
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
        """Keys with a count, ascending, and their counts."""
        if self.dense is None:
            return self.key, self.count
        key = np.flatnonzero(self.dense)
        return key, self.dense[key]

    def get(self, key: int) -> int:
        """The count of one key."""
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
    """What is wrong with (V, d) features of the entities ``owner`` (V,), portion by portion."""
    num, width = feat.shape
    step = max(1, CHUNK // max(1, width))
    weight = np.random.default_rng(0).integers(1 << 62, size=width).astype(np.uint64) * 2 + 1
    digest = np.empty(num, dtype=np.uint64)
    non_finite = zero = constant = 0
    varies = np.zeros(width, dtype=bool)
    for at in range(0, num, step):
        values = _plain(feat[at : at + step])
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


def _plain(feat: Tensor) -> NDArray[Any]:
    """Features as float32, or float64 where they are; -0 becomes 0, which it equals."""
    wide = feat if feat.element_size() >= 4 else feat.float()
    values: NDArray[Any] = wide.detach().cpu().contiguous().numpy() + 0.0
    return values


def _digest(values: NDArray[Any], weight: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(n,) 64-bit digests of the bits of (n, d) values: equal rows have equal ones."""
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
    """Rows that equal another one, and the first row that each equals; digests are verified."""
    order = np.argsort(digest, kind="stable")
    new = _changes(digest[order])
    leader = order[np.flatnonzero(new)[np.cumsum(new) - 1]] if len(order) else order
    alone = new & np.append(new[1:], True) if len(new) else new
    rows, leader = order[~alone], leader[~alone]
    equal = np.ones(len(rows), dtype=bool)
    for at in range(0, len(rows), step):
        part = slice(at, at + step)
        mine, theirs = _plain(feat[rows[part]]), _plain(feat[leader[part]])
        equal[part] = (_bits(mine) == _bits(theirs)).all(axis=1)
    return rows[equal], leader[equal]


# -- warnings -------------------------------------------------------------------------------------


def _warnings(kg: MultiViewKG, found: dict[str, Any]) -> list[dict[str, str]]:
    """What deserves a second look, the gravest first, with what to do; relations by their names."""
    names = dict(zip(kg.relations, kg.relation_names, strict=True))
    warnings: list[tuple[str, str]] = []
    triples, shared, validation = found["triples"], found["shared"], found["validation"]
    test = triples["test"]["triples"]

    alike = _labels_of_both(kg)
    if len(alike) > 1 and 2 * len(alike) >= kg.num_relations:
        warnings.append(
            (
                "relations-are-entities",
                f"{len(alike):,} of {kg.num_relations:,} relations are called as entities are,"
                f" first {alike[0]!r}. If head, relation and tail do not stand in this order in the"
                " source's columns, say where they do (--columns 1,0,2, or their names).",
            )
        )
    if validation["in_train"]:
        warnings.append(
            (
                "validation-in-train",
                f"{validation['in_train']:,} of the {validation['distinct']:,} distinct validation"
                f" triples are in train and {validation['in_test']:,} in test;"
                f" {validation['held_out']:,} are truly held out. It cannot choose an epoch."
                f" {_validate(kg, '--validation held-out; the default, auto, does so here')}",
            )
        )
    elif validation["in_test"]:
        warnings.append(
            (
                "validation-in-test",
                f"{validation['in_test']:,} of the {validation['distinct']:,} distinct validation"
                " triples are in test: choosing by validation is choosing by test."
                f" {_validate(kg, '--validation held-out')}",
            )
        )
    if shared["train-test"]:
        warnings.append(
            (
                "test-in-train",
                f"{shared['train-test']:,} of the {triples['test']['distinct']:,} distinct test"
                " triples are in train: test metrics are too good. Take them out of train (or of"
                " test, and say so).",
            )
        )
    repeated = {split: triples[split]["repeated"] for split in SPLITS if triples[split]["repeated"]}
    if repeated:
        listed = ", ".join(f"{count:,} in {split}" for split, count in repeated.items())
        warnings.append(
            (
                "repeated-triples",
                f"Rows that repeat an earlier row of their split: {listed}. They count twice in"
                " training or in the metrics; remove them unless that is meant.",
            )
        )
    warnings += _unseen_warnings(found, names)
    warnings += _pattern_warnings(found["patterns"], test, names)
    if found["loops"]["triples"]:
        worst = names[next(iter(found["loops"]["relations"]))]
        warnings.append(
            (
                "loops",
                f"{_number(found['loops']['triples'], 'triple')} with head and tail the same, most"
                f" under {worst!r}. Check that they mean something.",
            )
        )
    for modality, views in found["views"].items():
        warnings += _view_warnings(modality, views, found["entities"])
    if not triples["valid"]["triples"]:
        warnings.append(
            (
                "no-validation",
                "There is no validation set, so training keeps its last epoch, not the best."
                f" {_validate(kg, '--validation held-out')}",
            )
        )
    if not test:
        warnings.append(
            ("no-test", "There is no test set: nothing says how good the predictions will be.")
        )
    return [{"code": code, "text": text} for code, text in warnings]


def _labels_of_both(kg: MultiViewKG) -> list[str]:
    """Labels that are a relation's and an entity's; not numbers, which are ids of each kind."""
    entities, relations = (column.alias("label").to_frame() for column in kg.label_columns)
    words = relations.filter(~pl.col("label").str.contains(r"^\d+$"))
    return words.join(entities, on="label", how="semi")["label"].to_list()


def _validate(kg: MultiViewKG, option: str) -> str:
    """What to validate with: held-out triples, where any can be held out."""
    by = drawn_by(kg.train, kg.test)
    if len(hold_out(kg.train, HELD_OUT_FRACTION, keep=kg.test, by=by)[1]):
        return f"Use held-out validation ({option})."
    return (
        "Give a validation set of other triples: no training triple can be held out: there are too"
        " few, or each is the only one of an entity or a relation."
    )


def _unseen_warnings(found: dict[str, Any], names: dict[str, str]) -> list[tuple[str, str]]:
    unseen, test = found["unseen"], found["triples"]["test"]["triples"]
    warnings = []
    if unseen["valid"]["triples"] or unseen["test"]["triples"]:
        views = "only their views tell of them" if found["views"] else "nothing tells of them"
        if found["views"] and unseen["without_views"]:
            views += f", and {unseen['without_views']:,} of these entities have none"
        warnings.append(
            (
                "unseen-entities",
                f"{unseen['test']['triples']:,} of {test:,} test triples"
                f" ({_number(unseen['test']['ends'], 'end')}) and {unseen['valid']['triples']:,} of"
                f" {found['triples']['valid']['triples']:,} validation triples have an end that no"
                f" training triple touches: {views}."
                " Report them apart, or give these entities views or training triples.",
            )
        )
    if unseen["nowhere"]:
        warnings.append(
            (
                "unused-entities",
                f"{_number(unseen['nowhere'], 'entity', 'entities')} in no triple of any split. All"
                " compete as candidates; leave out those that predictions should not name.",
            )
        )
    if unseen["relations"]:
        first = ", ".join(repr(names[label]) for label in unseen["first_relations"])
        first += ", …" if unseen["relations"] > len(unseen["first_relations"]) else ""
        warnings.append(
            (
                "unseen-relations",
                f"{_number(unseen['relations'], 'relation')} without a training triple ({first}):"
                f" {_number(unseen['test']['relation_triples'], 'test triple')} and"
                f" {_number(unseen['valid']['relation_triples'], 'validation triple')} under them."
                " Nothing can be learned of these; leave them out or move triples to train.",
            )
        )
    return warnings


def _pattern_warnings(
    patterns: dict[str, Any], test: int, names: dict[str, str]
) -> list[tuple[str, str]]:
    warnings = []
    said = {
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
    for sort, (code, what, advice) in said.items():
        answered = patterns["test_answered"][sort]
        if answered:
            worst = patterns[sort][0]
            both = [repr(names[worst[key]]) for key in ("relation", "other") if key in worst]
            warnings.append(
                (
                    code,
                    f"{answered:,} of {test:,} test triples ({answered / test:.1%}) are told by"
                    f" train: it has {what} (most: {' and '.join(both)},"
                    f" {worst['test_answered']:,}). A rule answers these. {advice}.",
                )
            )
    return warnings


def _view_warnings(modality: str, views: dict[str, Any], entities: int) -> list[tuple[str, str]]:
    warnings = []

    def warn(code: str, text: str) -> None:
        warnings.append((code, f"{modality}: {text}"))

    if views["none"] == entities:
        warn("no-views", "no entity has a view. Leave the modality out.")
    if views["non_finite"]:
        warn(
            "non-finite-features",
            f"{_number(views['non_finite'], 'view')} with NaN or infinity. Leave them out, or"
            " encode again.",
        )
    if views["zero"]:
        warn(
            "zero-features",
            f"{_number(views['zero'], 'view')} of zeros only: missing data in disguise? Leave them"
            " out; an entity without a view gets a learned vector.",
        )
    if views["constant"]:
        warn(
            "constant-features",
            f"{_number(views['constant'], 'view')} of one value throughout. Look at where they come"
            " from.",
        )
    if views["constant_columns"]:
        warn(
            "constant-columns",
            f"{views['constant_columns']:,} of {views['width']:,} columns are the same in every"
            " view and tell nothing; drop them, or look at the encoder.",
        )
    if views["repeated"]:
        most = views["most_repeated"]
        warn(
            "repeated-features",
            f"{views['repeated']:,} of {views['views']:,} views equal an earlier one"
            f" ({views['repeated_same_entity']:,} of the same entity). The most frequent stands"
            f" {most['views']:,} times, for {_number(most['entities'], 'entity', 'entities')},"
            f" first {most['entity']!r}. If it is a placeholder, leave it out.",
        )
    return warnings


def _number(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


__all__ = ["inspect_kg"]
