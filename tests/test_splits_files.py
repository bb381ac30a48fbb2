"""Sources without splits are split: seeded, nothing lost, nothing leaked."""

from collections import Counter

import pytest
import torch
from helpers import write_folder
from hypothesis import given
from hypothesis import strategies as st

from imvia_graph import DataError, load_kg
from imvia_graph.splits import split_triples

triples = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 3), st.integers(0, 7)), max_size=60
).map(lambda rows: torch.tensor(rows, dtype=torch.int64).reshape(-1, 3))
shares = st.tuples(st.floats(0, 0.5), st.floats(0, 0.45)).map(lambda s: (1 - sum(s), *s))
seeds = st.integers(0, 1000)


def rows_of(part):
    return [tuple(row) for row in part.tolist()]


def ends_of(part):
    return {frozenset((head, tail)) for head, _, tail in part.tolist()}


@given(triples, shares, seeds)
def test_parts_are_the_whole_and_keep_its_order(whole, fractions, seed):
    parts = split_triples(whole, fractions, seed)
    assert sum((Counter(rows_of(part)) for part in parts), Counter()) == Counter(rows_of(whole))
    for part in parts:
        assert rows_of(part) == [row for row in rows_of(whole) if row in set(rows_of(part))]


@given(triples, shares, seeds)
def test_train_keeps_each_entity_and_relation(whole, fractions, seed):
    train, _, _ = split_triples(whole, fractions, seed)
    assert set(train[:, [0, 2]].flatten().tolist()) == set(whole[:, [0, 2]].flatten().tolist())
    assert set(train[:, 1].tolist()) == set(whole[:, 1].tolist())


@given(triples, shares, seeds)
def test_inverse_and_symmetric_pairs_never_stand_in_two_sets(whole, fractions, seed):
    train, valid, test = map(ends_of, split_triples(whole, fractions, seed))
    assert not train & valid
    assert not train & test
    assert not valid & test


@given(triples, shares, seeds)
def test_no_set_is_larger_than_its_share(whole, fractions, seed):
    _, valid, test = split_triples(whole, fractions, seed)
    assert len(valid) <= round(len(whole) * fractions[1])
    assert len(test) <= round(len(whole) * fractions[2])


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0, 0.5, 0.5), (0.5, 0.4, 0.2), (2, -1, 0)])
def test_shares_that_are_none_are_an_error(fractions):
    with pytest.raises(DataError, match="fractions"):
        split_triples(torch.tensor([[0, 0, 1]]), fractions)


def edge_list(folder):
    rows = "".join(f"e{i}\tr{r}\te{j}\n" for i in range(20) for j in range(20) for r in (0, 1))
    return write_folder(folder, {"g.tsv": rows}) / "g.tsv"


def test_one_file_is_split_80_10_10_and_says_so(tmp_path):
    kg = load_kg(edge_list(tmp_path))
    assert [len(kg.triples(split)) for split in ("train", "valid", "test")] == [640, 80, 80]
    assert kg.notes[1].startswith("The source has no splits; split into 640 train, 80 valid")
    assert len(kg.unseen_entities()) == 0


def test_the_split_is_seeded_and_its_shares_can_be_told(tmp_path):
    path = edge_list(tmp_path)
    one, same, other = (load_kg(path, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.test, same.test)
    assert not torch.equal(one.test, other.test)
    kg = load_kg(path, split=(0.9, 0, 0.1))
    assert (len(kg.valid), len(kg.test)) == (0, 80)
    assert len(load_kg(path, split=False).train) == 800


def test_files_by_split_are_not_split(tmp_path):
    files = {"train.csv": "a,r,b\nb,r,c\nc,r,a\n", "test.csv": "a,r,c\n"}
    kg = load_kg(write_folder(tmp_path / "kg", files))
    assert (len(kg.train), len(kg.valid), len(kg.test)) == (3, 0, 1)
