"""The index of known answers, against a dict of sets."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from imvia_graph.answers import AnswerIndex, expand, pointer, with_inverses

ENTITIES, RELATIONS = 5, 3

triple = st.tuples(
    st.integers(0, ENTITIES - 1), st.integers(0, RELATIONS - 1), st.integers(0, ENTITIES - 1)
)
triples = st.lists(triple, max_size=25)  # repeated ones among them


def as_tensor(rows):
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def as_dict(rows):
    """(entity, relation) -> set of answers, both directions."""
    known = {}
    for head, relation, tail in rows:
        known.setdefault((head, relation), set()).add(tail)
        known.setdefault((tail, relation + RELATIONS), set()).add(head)
    return known


@given(parts=st.lists(triples, min_size=1, max_size=3), data=st.data())
def test_pairs_are_those_of_a_dict_of_sets(parts, data):
    index = AnswerIndex.from_triples([as_tensor(p) for p in parts], ENTITIES, RELATIONS)
    known = as_dict([row for part in parts for row in part])
    query = st.tuples(st.integers(0, ENTITIES - 1), st.integers(0, 2 * RELATIONS - 1))
    queries = data.draw(st.lists(query, max_size=12))
    entity, relation = torch.tensor(queries, dtype=torch.int64).reshape(-1, 2).unbind(1)
    row, col = index.pairs(entity, relation)
    expected = [(i, answer) for i, q in enumerate(queries) for answer in sorted(known.get(q, ()))]
    assert list(zip(row.tolist(), col.tolist(), strict=True)) == expected
    assert row.dtype == col.dtype == torch.int64


@given(triples)
def test_index_is_a_csr_of_distinct_answers(rows):
    index = AnswerIndex.from_triples([as_tensor(rows)], ENTITIES, RELATIONS)
    known = as_dict(rows)
    assert index.key.tolist() == sorted(r * ENTITIES + e for e, r in known)
    assert index.ptr.tolist() == pointer(index.ptr.diff()).tolist()
    assert index.ptr[-1] == len(index.answer) == sum(map(len, known.values()))
    for (entity, relation), first, last in zip(
        index.queries().tolist(), index.ptr[:-1].tolist(), index.ptr[1:].tolist(), strict=True
    ):
        assert index.answer[first:last].tolist() == sorted(known[entity, relation])


def test_repeated_triples_are_one_answer():
    repeated = as_tensor([[0, 1, 2]] * 3)
    index = AnswerIndex.from_triples([repeated, repeated], ENTITIES, RELATIONS)
    row, col = index.pairs(torch.tensor([0, 0]), torch.tensor([1, 1]))
    assert (row.tolist(), col.tolist()) == ([0, 1], [2, 2])


def test_empty_index_knows_nothing():
    index = AnswerIndex.from_triples([as_tensor([])], ENTITIES, RELATIONS)
    assert index.ptr.tolist() == [0]
    assert index.queries().shape == (0, 2)
    row, col = index.pairs(torch.tensor([0, 4]), torch.tensor([0, 5]))
    assert len(row) == len(col) == 0
    assert row.dtype == col.dtype == torch.int64


def test_no_queries_have_no_answers():
    index = AnswerIndex.from_triples([as_tensor([[0, 1, 2]])], ENTITIES, RELATIONS)
    nothing = torch.empty(0, dtype=torch.int64)
    assert [len(part) for part in index.pairs(nothing, nothing)] == [0, 0]


def test_queries_past_the_last_key_have_no_answers():
    index = AnswerIndex.from_triples([as_tensor([[0, 0, 0]])], ENTITIES, RELATIONS)
    row, _ = index.pairs(torch.tensor([4]), torch.tensor([5]))
    assert len(row) == 0


def test_one_direction_is_indexed_as_it_stands():
    index = AnswerIndex.from_queries(as_tensor([[3, 1, 0], [3, 1, 4], [3, 1, 0]]), ENTITIES)
    row, col = index.pairs(torch.tensor([0, 3, 3]), torch.tensor([4, 1, 4]))
    assert (row.tolist(), col.tolist()) == ([1, 1], [0, 4])


@given(triples)
def test_ids_whose_packed_form_would_not_fit_into_int64_are_indexed_all_the_same(rows):
    given = as_tensor(rows)
    few, many = (AnswerIndex.from_triples([given], n, RELATIONS) for n in (ENTITIES, 2**31))
    assert torch.equal(many.ptr, few.ptr)
    assert torch.equal(many.answer, few.answer)
    assert torch.equal(many.queries(), few.queries())


def test_index_moves_with_its_content():
    index = AnswerIndex.from_triples([as_tensor([[0, 1, 2]])], ENTITIES, RELATIONS)
    moved = index.to("cpu")
    assert moved.num_entities == ENTITIES
    assert all(torch.equal(a, b) for a, b in zip(moved[:3], index[:3], strict=True))


def test_inverses_follow_the_triples():
    both = with_inverses(as_tensor([[0, 1, 2], [3, 0, 4]]), RELATIONS)
    assert both.tolist() == [[0, 1, 2], [3, 0, 4], [2, 4, 0], [4, 3, 3]]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 4)), max_size=8))
def test_expand_lists_every_position(parts):
    start, count = torch.tensor(parts, dtype=torch.int64).reshape(-1, 2).unbind(1)
    row, position = expand(start, count)
    expected = [(i, s + k) for i, (s, c) in enumerate(parts) for k in range(c)]
    assert list(zip(row.tolist(), position.tolist(), strict=True)) == expected


def test_contains_says_of_each_candidate_whether_it_is_known():
    triples = torch.tensor([[0, 0, 1], [0, 0, 2], [3, 1, 0]])
    index = AnswerIndex.from_triples([triples], num_entities=4, num_relations=2)
    entity, relation = torch.tensor([0, 3, 2, 0]), torch.tensor([0, 1, 2, 1])
    found = index.contains(entity, relation, torch.arange(4).expand(4, 4))
    # (0, 0, ?): 1 and 2; (3, 1, ?): 0; (2, inverse of 0, ?): 0; (0, 1, ?): none.
    expected = [[0, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert found.int().tolist() == expected
    empty = AnswerIndex.from_triples([triples[:0]], num_entities=4, num_relations=2)
    assert not empty.contains(entity, relation, torch.arange(4).expand(4, 4)).any()
