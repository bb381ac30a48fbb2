"""Held-out validation sets: nothing leaks, nothing is lost."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imvia_graph.errors import DataError
from imvia_graph.splits import count_shared, drawn_by, first_occurrence, hold_out, split_triples

triples = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 3), st.integers(0, 7)), max_size=60
).map(lambda rows: torch.tensor(rows, dtype=torch.int64).reshape(-1, 3))
fractions = st.floats(0.01, 0.99)
seeds = st.integers(0, 1000)
kinds = st.sampled_from(["pair", "triple"])


def rows_of(part):
    return [tuple(row) for row in part.tolist()]


def ends_of(part):
    return {frozenset((head, tail)) for head, _, tail in part.tolist()}


@given(triples, fractions, seeds, kinds)
def test_parts_are_the_whole_in_its_order(whole, fraction, seed, by):
    train, held = map(rows_of, hold_out(whole, fraction, seed, by=by))
    assert Counter(train) + Counter(held) == Counter(rows_of(whole))
    # Copies of a triple stay together, so that membership tells where a row went.
    assert train == [row for row in rows_of(whole) if row in set(train)]
    assert held == [row for row in rows_of(whole) if row in set(held)]


@given(triples, fractions, seeds, kinds)
def test_every_entity_and_relation_stays_in_train(whole, fraction, seed, by):
    train, _ = hold_out(whole, fraction, seed, by=by)
    assert set(train[:, [0, 2]].flatten().tolist()) == set(whole[:, [0, 2]].flatten().tolist())
    assert set(train[:, 1].tolist()) == set(whole[:, 1].tolist())


@pytest.mark.parametrize("seed", range(10))
def test_relation_of_a_single_triple_stays_in_train(seed):
    rare = torch.tensor([[3, relation, 7] for relation in (2, 5)])
    train, held = hold_out(torch.cat([dense(), rare]), 0.9, seed)
    assert {2, 5} <= set(train[:, 1].tolist())
    assert len(held) > 1500


@given(triples, fractions, seeds)
def test_triples_between_two_entities_stay_together(whole, fraction, seed):
    train, held = hold_out(whole, fraction, seed)
    assert not ends_of(train) & ends_of(held)
    assert count_shared(held, train) == 0


@given(triples, fractions, seeds, kinds)
def test_no_more_is_held_out_than_asked_for(whole, fraction, seed, by):
    _, held = hold_out(whole, fraction, seed, by=by)
    assert len(held) <= round(len(whole) * fraction)


@given(triples, fractions, seeds)
def test_same_seed_gives_the_same_split(whole, fraction, seed):
    torch.manual_seed(seed + 1)
    first = hold_out(whole, fraction, seed)
    torch.manual_seed(seed + 2)  # the split has a generator of its own
    second = hold_out(whole, fraction, seed)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def dense():
    return torch.cartesian_prod(torch.arange(30), torch.arange(2), torch.arange(30))


def test_other_seed_gives_another_split():
    assert not torch.equal(hold_out(dense(), 0.1, seed=0)[1], hold_out(dense(), 0.1, seed=1)[1])


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_share_is_reached_up_to_one_group_where_there_is_enough(fraction):
    _, held = hold_out(dense(), fraction)
    wanted = round(1800 * fraction)
    assert wanted - 4 < len(held) <= wanted  # both directions and relations of a pair: 4 triples


def test_a_pair_too_large_for_the_share_leaves_room_for_others():
    """Groups that do not fit are passed over; what follows may still fit."""
    pair = torch.tensor([[0, relation, 1] for relation in range(40)])
    hub = torch.tensor([[i, r, j] for i in (0, 1) for r in range(40) for j in range(2, 12)])
    others = torch.tensor([[i, 0, j] for i in range(2, 22) for j in range(2, 22) if i < j])
    whole = torch.cat([pair, hub, others])  # 40, 20 groups of 40, and 190 of 1
    for seed in range(20):
        _, held = hold_out(whole, 0.035, seed)  # 36 wanted
        assert len(held) >= 30


@pytest.mark.parametrize("rows", [[], [[0, 0, 1]], [[2, 1, 2]], [[0, 0, 1]] * 5])
def test_nothing_is_held_out_where_nothing_can_be(rows):
    whole = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
    train, held = hold_out(whole, 0.9)
    assert torch.equal(train, whole)
    assert held.shape == (0, 3)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fraction_out_of_range_is_an_error(fraction):
    with pytest.raises(DataError, match="between 0 and 1"):
        hold_out(dense(), fraction)


@given(st.lists(st.integers(-3, 3), max_size=20))
def test_first_occurrence_is_the_first_place_of_each_value(values):
    found = first_occurrence(torch.tensor(values, dtype=torch.int64))
    assert found.tolist() == [values.index(value) for value in sorted(set(values))]


@given(triples, triples)
def test_count_shared_counts_distinct_common_triples(one, other):
    assert count_shared(one, other) == len(set(rows_of(one)) & set(rows_of(other)))


def test_what_must_be_kept_is_not_held_out():
    triples = torch.cartesian_prod(torch.arange(9), torch.arange(2), torch.arange(9))
    _, held = hold_out(triples, 0.2, seed=1)
    keep = held[::2]
    train, held = hold_out(triples, 0.2, seed=1, keep=keep)
    assert len(held) > 0
    kept = {frozenset((h, t)) for h, _, t in keep.tolist()}
    assert not any(frozenset((h, t)) in kept for h, _, t in held.tolist())
    assert len(train) + len(held) == len(triples)


# -- triple by triple -----------------------------------------------------------------------------


def shared_ends(train, held):
    ends = ends_of(train)
    return sum(frozenset((head, tail)) in ends for head, _, tail in held.tolist()) / len(held)


def in_pairs():
    """600 triples of 400 pairs: half of the pairs have one, a quarter an inverse, a quarter two."""
    ends = torch.combinations(torch.arange(40))[:400]
    ends = ends[torch.randperm(400, generator=torch.Generator().manual_seed(3))]
    first = torch.stack([ends[:, 0], ends.sum(1) % 3, ends[:, 1]], dim=1)
    inverse = torch.stack([ends[:100, 1], 3 + ends[:100, 0] % 2, ends[:100, 0]], dim=1)
    second = torch.stack([ends[100:200, 0], 5 + ends[100:200, 0] % 2, ends[100:200, 1]], dim=1)
    return torch.cat([first, inverse, second])


@pytest.mark.parametrize("seed", range(4))
def test_triple_by_triple_as_many_share_their_ends_as_in_a_random_draw(seed):
    whole = in_pairs()
    train, held = hold_out(whole, 0.1, seed, by="triple")
    assert len(held) == 60
    assert count_shared(held, train) == 0
    # 400 of the 600 triples have another between the same ends.
    assert 0.4 < shared_ends(train, held) < 0.85
    assert shared_ends(*hold_out(whole, 0.1, seed)) == 0


def test_triple_by_triple_copies_stay_together():
    whole = torch.cat([dense(), dense()[::2]])
    train, held = hold_out(whole, 0.3, by="triple")
    assert len(held) > 700
    assert count_shared(held, train) == 0


def test_triple_by_triple_what_must_be_kept_is_not_held_out():
    whole = in_pairs()
    _, held = hold_out(whole, 0.2, by="triple")
    _, again = hold_out(whole, 0.2, keep=held[::2], by="triple")
    assert count_shared(again, held[::2]) == 0
    assert count_shared(again, held[1::2]) > 40


def test_holding_out_by_what_there_is_not_is_an_error():
    with pytest.raises(DataError, match="pair or triple, received 'entity'"):
        hold_out(dense(), by="entity")


@pytest.mark.parametrize("seed", range(4))
def test_how_a_test_set_was_drawn_is_seen(seed):
    whole = in_pairs()
    train, _, test = split_triples(whole, seed=seed)
    assert drawn_by(train, test) == "pair"
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    assert drawn_by(whole[order[60:]], whole[order[:60]]) == "triple"


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ([], []),
        ([[0, 0, 1]], []),
        ([], [[0, 0, 1]]),
        ([[0, 0, 1], [1, 0, 2]], [[0, 1, 1]]),  # no training triple shares its ends
        ([[0, 0, 1], [0, 0, 1]], [[0, 1, 1]]),  # nor does a copy
        ([[0, 0, 1], [0, 1, 1]], [[1, 0, 2]]),
    ],
)
def test_a_test_set_that_tells_nothing_counts_as_drawn_pair_by_pair(train, test):
    parts = (torch.tensor(part, dtype=torch.int64).reshape(-1, 3) for part in (train, test))
    assert drawn_by(*parts) == "pair"


@given(triples, triples, st.randoms(use_true_random=False))
def test_which_relation_a_test_triple_has_does_not_matter(train, test, random):
    other = test.clone()
    if len(test):
        kept = len(test.unique(dim=0))
        other[:, 1] = torch.tensor([random.randrange(4) for _ in range(len(test))])
        if len(other.unique(dim=0)) != kept:
            return
    assert drawn_by(train, test) == drawn_by(train, other)
