"""Filtered ranking, against loops that score every triple."""

import functools
import json
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import reference as loops
import torch
from conftest import randomised
from helpers import ROOT, ring_kg, score_all
from hypothesis import given
from hypothesis import strategies as st

import imvia_graph as ig
from imvia_graph import _tiles
from imvia_graph.answers import AnswerIndex, with_inverses
from imvia_graph.distributed import Shards
from imvia_graph.evaluation import (
    Ranking,
    draw_candidates,
    evaluate,
    filtered_ranks,
    rank,
    rank_metrics,
    rank_scorer,
)
from imvia_graph.training import Progress

NAN, INF = float("nan"), float("inf")


def known_of(triples, num_relations):
    """(entity, relation) -> set of answers, both directions, from a list of triples."""
    known = {}
    for head, relation, tail in triples:
        known.setdefault((head, relation), set()).add(tail)
        known.setdefault((tail, relation + num_relations), set()).add(head)
    return known


# -- ranks of scores ------------------------------------------------------------------------------


@given(
    st.integers(1, 6).flatmap(
        lambda size: st.lists(
            st.tuples(
                # Few values, so that ties are many.
                st.lists(
                    st.sampled_from([-INF, -1.0, 0.0, 0.5, INF, NAN]), min_size=size, max_size=size
                ),
                st.integers(0, size - 1),
                st.sets(st.integers(0, size - 1)),
            ),
            max_size=5,
        ).map(lambda queries: (size, queries))
    )
)
def test_filtered_ranks_match_the_loop(case):
    size, queries = case
    pairs = [(i, candidate) for i, (_, _, known) in enumerate(queries) for candidate in known]
    row, col = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    scores = torch.tensor([values for values, _, _ in queries]).reshape(-1, size)
    answer = torch.tensor([answer for _, answer, _ in queries], dtype=torch.int64)
    found = filtered_ranks(scores, answer, row, col)
    assert found.dtype == torch.float64
    assert found.tolist() == [loops.rank(*query) for query in queries]


@pytest.mark.parametrize(
    ("values", "answer", "known", "expected"),
    [
        ([3.0, 2.0, 1.0], 0, [], 1.0),
        ([3.0, 2.0, 1.0], 2, [], 3.0),
        ([3.0, 2.0, 1.0], 2, [0, 1], 1.0),
        ([1.0, 1.0, 1.0], 1, [], 2.0),  # between first and third
        ([1.0, 1.0, 1.0, 1.0], 1, [], 2.5),
        ([1.0, 1.0, 1.0], 1, [1], 2.0),  # the asked one is known, too
        ([1.0, 1.0, 1.0], 1, [0, 1], 1.5),
        ([1.0, NAN], 1, [], 2.0),
        ([NAN, NAN, NAN], 0, [], 3.0),
        ([NAN, 1.0, 2.0], 0, [1], 2.0),
        ([NAN, 1.0, 2.0], 2, [], 2.0),
    ],
)
def test_rank_is_the_mean_of_the_best_and_the_worst(values, answer, known, expected):
    col = torch.tensor(known, dtype=torch.int64)
    row = torch.zeros_like(col)
    found = filtered_ranks(torch.tensor([values]), torch.tensor([answer]), row, col)
    assert found.tolist() == [expected] == [loops.rank(values, answer, known)]


def test_a_model_that_scores_all_alike_ranks_in_the_middle():
    scores = torch.zeros(1, 101)
    nothing = torch.empty(0, dtype=torch.int64)
    assert filtered_ranks(scores, torch.tensor([7]), nothing, nothing).item() == 51


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("batch_size", [1, 7, 1024])
def test_any_scorer_is_ranked_as_the_loop_ranks(batch_size, split):
    kg = random_kg(views=False)
    # Different in float64 only.
    table = 1 + 1e-9 * torch.randint(3, (2 * kg.num_relations, 9, 9)).double()
    found = rank_scorer(
        lambda entity, relation: table[relation, entity], kg, split, batch_size=batch_size
    )
    everything = torch.cat([kg.train, kg.valid, kg.test, kg.known]).tolist()
    known = known_of(everything, kg.num_relations)
    queries = with_inverses(kg.triples(split), kg.num_relations).tolist()
    expected = [loops.rank(table[r, e].tolist(), t, known[e, r]) for e, r, t in queries]
    assert [*found.tail["decision"].tolist(), *found.head["decision"].tolist()] == expected
    assert found.metrics(kg.relations)["head"] == rank_metrics(found.head["decision"])


def test_a_scorer_is_ranked_against_candidates_as_a_model_is():
    kg = ring_kg()
    model = randomised(ig.IMVIA.from_kg(kg, ig.Settings(dim=4, complex_head=False)).eval())
    predictor = ig.Predictor(model, kg)

    def score(entity, relation):
        [(_, scores)] = predictor.scores(entity, relation)
        return scores["decision"]

    options = {"candidates": ["e1", 5, 7, 8, 8], "triples": [("e3", "after", "e4"), *TWO]}
    found = rank_scorer(score, kg, **options).metrics(kg.relations)
    expected = evaluate(model, kg, **options)
    assert found == {**expected, "heads": {}}
    assert found["candidates"] == "4 entities given"


#: True or not, and e7 is a candidate in the test above.
TWO = [("e5", "opposite", "e7"), ("e5", "opposite", "e9")]


def test_chosen_triples_are_filtered_by_one_another():
    kg = ring_kg()
    table = torch.arange(12.0)
    found = rank_scorer(lambda entity, relation: table.expand(len(entity), -1), kg, triples=TWO)
    # Only e8 and e10 outrank e7: e9 is the other triple's answer, e11 that of the graph.
    assert kg.answers().contains(*kg.ids_of(TWO[:1])[:, :2].T, torch.tensor([[11]])).item()
    assert found.tail["decision"].tolist() == [3.0, 2.0]


@pytest.mark.parametrize(
    ("triples", "message"),
    [
        ([], "there are none"),
        ([0, 0, 1], r"of shape \(3,\)"),
        ([("e1", "after")], "in row 0, received"),
        ("mine.tsv", "in row 0, received 'm'"),
        ([(0, 0, 12)], "row 0: expected"),
    ],
)
def test_chosen_triples_that_are_none_of_the_graph_are_an_error(triples, message):
    with pytest.raises(ig.DataError, match=message):
        rank_scorer(None, ring_kg(), triples=triples)


def test_ranks_of_queries_are_a_table_in_the_order_of_the_triples():
    kg = ring_kg()
    ranking = Ranking(
        kg.ids_of(TWO),
        {"text": torch.tensor([1.0, 2.0]), "decision": torch.tensor([3.0, 4.0])},
        {"text": torch.tensor([5.0, 6.0]), "decision": torch.tensor([7.0, 8.0])},
    )
    frame = ranking.frame(kg)
    assert frame.columns == ["head", "relation", "tail", "asked", "rank", "rank_text"]
    assert frame.rows() == [
        (*TWO[0], "tail", 3.0, 1.0),
        (*TWO[0], "head", 7.0, 5.0),
        (*TWO[1], "tail", 4.0, 2.0),
        (*TWO[1], "head", 8.0, 6.0),
    ]


def test_a_scorer_that_does_not_score_all_entities_is_refused():
    kg = random_kg(views=False)
    with pytest.raises(ig.DataError, match=r"score: expected \(4, 9\) .* received \(4,\)"):
        rank_scorer(lambda entity, relation: entity.float(), kg, batch_size=4)
    with pytest.raises(ig.DataError, match="batch_size: expected at least 1"):
        rank_scorer(lambda entity, relation: entity, kg, batch_size=0)


# -- ranks of a model -----------------------------------------------------------------------------


def random_kg(views=True):
    """Nine entities, three relations, many repeated triples; relation 2 has no test triple."""
    train = torch.stack(
        [torch.randint(9, (30,)), torch.randint(3, (30,)), torch.randint(9, (30,))], dim=1
    )
    valid = torch.stack([torch.randint(9, (6,)), torch.randint(2, (6,)), torch.randint(9, (6,))], 1)
    test = torch.stack([torch.randint(9, (9,)), torch.randint(2, (9,)), torch.randint(9, (9,))], 1)
    return ig.MultiViewKG(
        entities=[f"e{i}" for i in range(9)],
        relations=["r0", "r1", "r2"],
        train=torch.cat([train, train[:5]]),
        valid=torch.cat([valid, train[:2]]),
        test=torch.cat([test, test[:3], valid[:1]]),
        views={
            "image": ig.Views(torch.randn(12, 3), torch.randint(8, (12,))),
            "text": ig.Views(torch.randn(5, 2), torch.randint(8, (5,))),
        }
        if views
        else None,
        known=torch.stack(
            [torch.randint(9, (20,)), torch.randint(3, (20,)), torch.randint(9, (20,))], dim=1
        ),
    )


def larger_kg(views=True, entities=83):
    """More entities than a tile has; few relations, so that known answers are many."""
    triples = torch.stack(
        [torch.randint(entities, (400,)), torch.randint(2, (400,)), torch.randint(entities, (400,))]
    ).T
    features = {
        "image": ig.Views(torch.randn(120, 3), torch.randint(entities - 20, (120,))),
        "text": ig.Views(torch.randn(40, 2), torch.randint(entities, (40,))),
    }
    return ig.MultiViewKG(
        entities=[f"e{i}" for i in range(entities)],
        relations=["r0", "r1"],
        train=triples[:200],
        valid=triples[200:300],
        test=triples[300:],
        views=features if views else None,
    )


def by_filtered_ranks(model, kg, triples):
    """Ranks by whole rows of scores, one relation after the other."""
    queries = with_inverses(triples, kg.num_relations)
    names = [*model.heads, "decision"]
    ranks = {name: torch.empty(len(queries), dtype=torch.float64) for name in names}
    with torch.no_grad():
        for positions, scores in score_all(model, queries[:, 0], queries[:, 1]):
            entity, relation, answer = queries[positions].unbind(1)
            pairs = kg.answers().pairs(entity, relation)
            for name in names:
                ranks[name][positions] = filtered_ranks(scores[name], answer, *pairs)
    sides = [{name: part[side] for name, part in ranks.items()} for side in halves(len(triples))]
    return Ranking(triples, *sides)


def halves(size):
    return slice(size), slice(size, None)


def model_of(kg, **changes):
    settings = ig.Settings(dim=4, complex_rank=3, information_dim=4).replace(**changes)
    return randomised(ig.IMVIA.from_kg(kg, settings)).double()


def score_triple(model, entity, relation, candidate):
    """Scores of one triple alone, by head; the relation may be an inverse one."""
    relation = torch.tensor([relation])
    under = None if model.settings.candidates == "shared" else relation[0]
    return {
        name: value.item()
        for name, value in model.scores(
            model.queries(torch.tensor([entity]), relation),
            model.candidates(under, torch.tensor([candidate])),
            relation,
        ).items()
    }


def brute_force(model, kg, triples):
    """Ranks (tail, head) of each triple, by head of the model, one triple scored at a time."""
    everything = torch.cat([kg.train, kg.valid, kg.test, kg.known]).tolist()
    known = known_of(everything, kg.num_relations)
    sides = []
    with torch.no_grad():
        for inverse in (False, True):
            ranks = {}
            for head, relation, tail in triples.tolist():
                query, answer = (head, relation), tail
                if inverse:
                    query, answer = (tail, relation + kg.num_relations), head
                scores = [score_triple(model, *query, c) for c in range(kg.num_entities)]
                for name in scores[0]:
                    values = [score[name] for score in scores]
                    ranks.setdefault(name, []).append(loops.rank(values, answer, known[query]))
            sides.append(ranks)
    return sides


@functools.cache
def ranked_by_a_loop(candidates, complex_head):
    """A graph, a model, and the ranks of the test triples by `brute_force`."""
    kg = random_kg()
    model = model_of(kg, candidates=candidates, complex_head=complex_head).eval()
    return kg, model, brute_force(model, kg, kg.test)


def as_lists(side):
    return {name: ranks.tolist() for name, ranks in side.items()}


def little_tiles(monkeypatch, keeps=True):
    """Tiles of 16 candidates, two made at a time; tables are kept, or made for 32 queries.

    Beside those that are not kept two relations have their matrices made at a time.
    """
    monkeypatch.setattr(_tiles, "_SIDE", 16)
    monkeypatch.setattr(_tiles, "_MADE", 2)
    if not keeps:
        monkeypatch.setattr(_tiles, "_KEPT", 0)
        monkeypatch.setattr(_tiles, "_MATRICES", 2 * 4 * 4 * 8)
        monkeypatch.setattr(_tiles, "_QUERIES", 32 * 4 * 4 * 4)


@pytest.mark.parametrize("candidates", ["shared", "relation"])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("widths", ["one width", "two widths"])
def test_ranks_match_a_loop_over_all_triples(monkeypatch, candidates, batch_size, keeps, widths):
    several = widths == "two widths"
    kg, model, (tail, head) = ranked_by_a_loop(candidates, several)
    assert len(set(model.widths.values())) == 1 + several
    little_tiles(monkeypatch, keeps)
    found = rank(model, kg.test, kg.answers(), batch_size)
    assert torch.equal(found.triples, kg.test)
    assert as_lists(found.tail) == tail
    assert as_lists(found.head) == head
    heads = ["structure", "image", "text", "joint", *["complex"] * several]
    assert list(found.tail) == [*heads, "decision"]
    alone = rank(model, kg.test, kg.answers(), batch_size, heads=())
    assert as_lists(alone.tail) == {"decision": tail["decision"]}
    assert as_lists(alone.head) == {"decision": head["decision"]}


@pytest.mark.parametrize("views", [True, False])
@pytest.mark.parametrize("keeps", [True, False, None])
@pytest.mark.parametrize("complex_head", [False, True])
def test_compiled_ranks_are_those_of_the_scores(monkeypatch, views, keeps, complex_head):
    kg = larger_kg(views=views)
    model = model_of(kg, batch_norm=False, complex_head=complex_head).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.sign() * (parameter.abs() > 0.4))  # many ties
        model.entity.weight[3] = torch.nan
    expected = by_filtered_ranks(model, kg, kg.train)
    if keeps is not None:
        little_tiles(monkeypatch, keeps)
    compiled, alone = (rank(model, kg.train, kg.answers(), heads=h) for h in (None, ()))
    monkeypatch.setattr(_tiles._kernels, "load", lambda name: None)
    plain = rank(model, kg.train, kg.answers())
    assert_equal_ranks(rank(model, kg.train, kg.answers(), heads=()), alone)
    for found in (compiled, plain):
        assert as_lists(found.tail) == as_lists(expected.tail)
        assert as_lists(found.head) == as_lists(expected.head)
    assert any(value % 1 for value in compiled.tail["structure"].tolist())


@pytest.mark.parametrize("candidates", ["shared", "relation"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_predictor_scores_each_triple_once(candidates, batch_size):
    kg = random_kg()
    model = model_of(kg, candidates=candidates).eval()
    entity, relation = torch.tensor([0, 8, 3, 0, 5, 0, 1]), torch.tensor([4, 0, 4, 1, 0, 4, 3])
    seen = []
    with torch.no_grad():
        for positions, scores in ig.Predictor(model, kg).scores(entity, relation, batch_size):
            assert 1 <= len(positions) <= batch_size
            for row, i in enumerate(positions.tolist()):
                seen.append(i)
                for candidate in range(kg.num_entities):
                    query = entity[i].item(), relation[i].item()
                    expected = score_triple(model, *query, candidate)
                    found = {name: part[row, candidate].item() for name, part in scores.items()}
                    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert sorted(seen) == list(range(7))


def test_exact_tables_are_made_once_a_relation(monkeypatch):
    kg = random_kg()
    model = model_of(kg, candidates="relation").eval()
    asked, make = [], model.candidates
    monkeypatch.setattr(model, "candidates", lambda r: asked.append(r.item()) or make(r))
    entity, relation = torch.arange(8), torch.tensor([4, 0, 4, 1, 0, 4, 3, 1])
    assert len(list(ig.Predictor(model, kg).scores(entity, relation, batch_size=2))) == 5
    assert sorted(asked) == [0, 1, 3, 4]


def test_ranks_with_many_ties_match_a_loop_over_all_triples():
    kg = random_kg(views=False)
    model = model_of(kg, batch_norm=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape))  # sums are exact
        model.entity.weight[3:6] = model.entity.weight[0]
    found = rank(model, kg.test, kg.answers(), 5)
    tail, head = brute_force(model, kg, kg.test)
    assert any(r != int(r) for r in tail["decision"] + head["decision"])
    assert (as_lists(found.tail), as_lists(found.head)) == (tail, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_entities_are_tied_whatever_the_precision_of_the_model(dtype):
    kg = larger_kg(views=False, entities=100)
    model = model_of(kg, dim=64).to(dtype).eval()
    with torch.no_grad():
        for table in model.entity_tables:
            table.weight.copy_(table.weight[0].clone())
    found = rank(model, kg.test, AnswerIndex.from_triples([kg.test[:0]], kg.num_entities, 1))
    for ranks in (*found.tail.values(), *found.head.values()):
        assert ranks.eq((kg.num_entities + 1) / 2).all()


def test_only_what_the_index_knows_is_left_out():
    kg = random_kg()
    model = model_of(kg).eval()
    filtered = rank(model, kg.test, kg.answers())
    empty = AnswerIndex.from_triples([kg.test[:0]], kg.num_entities, kg.num_relations)
    raw = rank(model, kg.test, empty)
    difference = raw.tail["decision"] - filtered.tail["decision"]
    assert (difference >= 0).all()
    assert difference.sum() > 0


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def uses():
    """What puts a model into evaluation mode, by its name."""
    ids, chosen, progress = torch.tensor([0, 1]), ig.Settings(), Progress()
    return {
        "rank": lambda model, kg: rank(model, kg.test, kg.answers()),
        "answers": lambda model, kg: ig.Predictor(model, kg).answers(ids, ids),
        "embeddings": lambda model, kg: ig.Run(model, kg, chosen, progress).entity_embeddings(),
    }


@pytest.mark.parametrize("use", uses().values(), ids=uses())
def test_each_module_is_in_its_own_mode_again(use):
    kg = random_kg()
    model = model_of(kg, batch_norm=True)
    model.train()
    model.decoder[0].eval()  # frozen statistics
    before = modes(model)
    use(model, kg)
    assert modes(model) == before
    assert set(before.values()) == {True, False}
    model.eval()
    model.decoder[0].train()
    before = modes(model)
    use(model, kg)
    assert modes(model) == before


def test_a_part_in_training_mode_ranks_as_the_others():
    kg = random_kg()
    model = model_of(kg, hidden_dropout=0.5).eval()
    expected = rank(model, kg.test, kg.answers()).tail["decision"]
    model.decoder[0].train()
    assert torch.equal(rank(model, kg.test, kg.answers()).tail["decision"], expected)


def test_ranking_leaves_the_model_in_its_mode():
    kg = random_kg()
    model = model_of(kg, batch_norm=True)
    for training in (True, False):
        model.train(training)
        statistics = model.decoder[0].input_norm.running_mean.clone()
        first = rank(model, kg.test, kg.answers())
        assert model.training is training
        assert torch.equal(model.decoder[0].input_norm.running_mean, statistics)
        again = rank(model, kg.test, kg.answers())  # no dropout
        assert torch.equal(first.tail["decision"], again.tail["decision"])


def test_wanted_heads_alone_are_ranked():
    kg = random_kg()
    model = model_of(kg)
    whole = rank(model, kg.test, kg.answers())
    some = rank(model, kg.test, kg.answers(), heads=["text"])
    assert list(some.tail) == list(some.head) == ["text", "decision"]
    assert torch.equal(some.head["text"], whole.head["text"])
    assert list(some.metrics()["heads"]) == ["text"]
    assert list(rank(model, kg.test, kg.answers(), heads=[]).head) == ["decision"]


@pytest.mark.parametrize("candidates", ["shared", "relation"])
def test_progress_counts_every_query(candidates):
    kg = random_kg()
    seen = []
    rank(
        model_of(kg, candidates=candidates),
        kg.test,
        kg.answers(),
        batch_size=4,
        on_batch=lambda done, total: seen.append((done, total)),
    )
    assert all(total == 2 * len(kg.test) for _, total in seen)
    counts = [done for done, _ in seen]
    assert counts == sorted(set(counts))
    assert counts[-1] == 2 * len(kg.test)


@pytest.mark.parametrize("candidates", ["shared", "relation"])
def test_ranking_no_triples_gives_no_ranks(candidates):
    kg = random_kg()
    ranking = rank(model_of(kg, candidates=candidates), kg.test[:0], kg.answers())
    assert len(ranking.tail["decision"]) == len(ranking.head["text"]) == 0


# -- ranks over several processes -----------------------------------------------------------------


class Together(Shards):
    """Shards of threads that add up what each of them has."""

    def __init__(self, num_entities, rank, size, room):
        super().__init__(num_entities, rank, size)
        self.room = room

    def sum_(self, tensor):
        given, barrier = self.room
        given[self.rank] = tensor.clone()
        barrier.wait()
        tensor.copy_(torch.stack(given).sum(0))
        barrier.wait()
        return tensor


class Holding:
    """A model as a process has it that holds a part of the entities only."""

    def __init__(self, model, shards):
        self._model, self._shards = model, shards

    def __getattr__(self, name):
        return getattr(self._model, name)

    def candidates(self, relation, entity):
        other = ~self._shards.owned(entity)
        made = self._model.candidates(relation, entity)
        return {head: part.masked_fill(other[:, None], NAN) for head, part in made.items()}


def rank_together(size, model, *arguments, **options):
    """The ranks that each of so many threads finds."""
    room = [None] * size, threading.Barrier(size, timeout=20)

    def one(i):
        shards = Together(model.num_entities, i, size, room)
        try:
            return rank(Holding(model, shards), *arguments, shards=shards, **options)
        except BaseException:
            room[1].abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def assert_equal_ranks(found, expected):
    for side in ("tail", "head"):
        mine, other = getattr(found, side), getattr(expected, side)
        assert list(mine) == list(other)
        for name in mine:
            assert torch.equal(mine[name], other[name]), name


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("candidates", ["shared", "relation"])
@pytest.mark.parametrize("compiled", [True, False])
def test_ranks_are_equal_for_any_number_of_processes(
    monkeypatch, size, keeps, candidates, compiled
):
    little_tiles(monkeypatch, keeps)
    if not compiled:
        monkeypatch.setattr(_tiles._kernels, "load", lambda name: None)
    kg = larger_kg()
    model = model_of(kg, candidates=candidates, dim=20).eval().float()
    for heads in (None, ()):
        alone = rank(model, kg.test, kg.answers(), 48, heads)
        for found in rank_together(size, model, kg.test, kg.answers(), 48, heads):
            assert_equal_ranks(found, alone)


@pytest.mark.parametrize("size", [2, 3])
def test_ties_across_processes_are_at_their_mean_rank(monkeypatch, size):
    little_tiles(monkeypatch)
    kg = larger_kg(views=False)
    model = model_of(kg, dim=20, complex_head=False).eval().float()
    with torch.no_grad():
        # Each vector is that of three entities or so, far from each other.
        model.entity.weight.copy_(model.entity.weight[:29].repeat(3, 1)[:83])
    nothing = AnswerIndex.from_triples([kg.test[:0]], kg.num_entities, kg.num_relations)
    alone = rank(model, kg.test, nothing)
    twins = torch.tensor([3 if i % 29 < 83 - 58 else 2 for i in range(83)])
    # Two that tie with the answer are a whole place, one is half a place.
    halved = alone.tail["structure"] % 1 == 0.5
    assert torch.equal(halved, twins[kg.test[:, 2]] == 2)
    assert halved.any()
    assert not halved.all()
    for found in rank_together(size, model, kg.test, nothing):
        assert_equal_ranks(found, alone)
    with torch.no_grad():
        model.entity.weight.zero_()
    for found in rank_together(size, model, kg.test, nothing):
        assert found.head["decision"].tolist() == [42.0] * len(kg.test)


@pytest.mark.parametrize("compiled", [True, False])
def test_ties_of_a_decision_made_as_one_product_are_ties(monkeypatch, compiled):
    little_tiles(monkeypatch)
    if not compiled:
        monkeypatch.setattr(_tiles._kernels, "load", lambda name: None)
    kg = larger_kg(views=False)
    model = model_of(kg, dim=20, complex_head=True, complex_rank=9).eval().float()
    with torch.no_grad():
        for table in model.entity_tables:
            table.weight.copy_(table.weight[:29].repeat(3, 1)[:83])
    nothing = AnswerIndex.from_triples([kg.test[:0]], kg.num_entities, kg.num_relations)
    alone = rank(model, kg.test, nothing, heads=())
    twins = torch.tensor([3 if i % 29 < 83 - 58 else 2 for i in range(83)])
    assert torch.equal(alone.tail["decision"] % 1 == 0.5, twins[kg.test[:, 2]] == 2)
    for found in rank_together(3, model, kg.test, nothing, heads=()):
        assert_equal_ranks(found, alone)


@torch.no_grad()
def test_known_answers_are_listed_once_for_queries_that_ask_the_same():
    size = 30
    entity = torch.arange(1, size)
    triples = torch.stack([entity, torch.zeros_like(entity), torch.zeros_like(entity)], dim=1)
    kg = ig.MultiViewKG([f"e{i}" for i in range(size)], ["r"], triples[:20], test=triples[20:])
    model = model_of(kg).eval().float()
    of_all, of_train = kg.answers(), AnswerIndex.from_triples([kg.train], size, 1)
    # (?, r, e0): what is known is listed once, and again for each answer that is not known.
    for known, listed, of_a_query in [(of_all, 29, 29), (of_train, 20 + 9 * 21, 21)]:
        counter = _tiles.RankCounter(model, model.shards, known, ["decision"])
        head, relation, tail = triples.unbind(1)
        batch = counter.batch(tail, relation + 1, head)
        assert len(batch.left_out) == listed
        assert (batch.end - batch.cursor).tolist()[20:] == [of_a_query] * 9


def test_more_processes_than_entities_rank_as_one():
    kg = random_kg()
    model = model_of(kg).eval()
    alone = rank(model, kg.test, kg.answers())
    for found in rank_together(11, model, kg.test, kg.answers()):
        assert_equal_ranks(found, alone)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 16, 17, 100])
def test_ranks_do_not_depend_on_the_batch_size(monkeypatch, batch_size):
    little_tiles(monkeypatch)
    kg = larger_kg(views=False)
    model = model_of(kg, dim=20, complex_head=False).eval().float()
    # Queries are made alike, whatever the batch.
    table = model.entity.weight.detach()
    monkeypatch.setattr(
        model, "queries_alike", lambda entity, relation: {"structure": table[entity]}
    )
    with torch.no_grad():
        model.entity.weight.copy_(model.entity.weight[:29].repeat(3, 1)[:83])
    whole = rank(model, kg.test, kg.answers(), 1000)
    assert_equal_ranks(rank(model, kg.test, kg.answers(), batch_size), whole)


PROCESSES = """
import json, sys, torch
import imvia_graph as ig
from helpers import in_groups
from imvia_graph import _tiles, distributed
from imvia_graph.evaluation import rank

kg = ig.load_kg(sys.argv[1])

def work():
    if distributed.is_launched():
        distributed.join(torch.device("cpu"))
    shards = distributed.Shards.of_world(kg.num_entities)
    found = []
    for candidates in ("shared", "relation"):
        torch.manual_seed(0)
        settings = ig.Settings(dim=24, relation_dim=8, candidates=candidates, batch_norm=True)
        model = ig.IMVIA.from_kg(kg, settings, shards)
        for kept in (2**30, 0):
            _tiles._KEPT, _tiles._QUERIES = kept, 2**14
            ranking = rank(model, kg.test, kg.answers(), 60)
            found += [{name: part.tolist() for name, part in side.items()} for side in ranking[1:3]]
    with open(f"{sys.argv[2]}-{shards.size}-{shards.rank}.json", "w") as file:
        json.dump(found, file)

in_groups((1, 2, 3), work)
"""


@pytest.mark.slow
def test_processes_of_gloo_find_the_ranks_of_one(tmp_path):
    kg = larger_kg(entities=1103)
    kg.save(tmp_path / "kg")
    script = tmp_path / "ranks.py"
    script.write_text(PROCESSES)
    out = tmp_path / "found"
    command = [sys.executable, script, tmp_path / "kg", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    subprocess.run(command, check=True, env=environment, timeout=300)
    found = [
        json.loads(Path(f"{out}-{size}-{rank}.json").read_text())
        for size in (1, 2, 3)
        for rank in range(size)
    ]
    assert found == [found[0]] * 6
    assert len(set(found[0][0]["decision"])) > 20


def test_out_of_memory_in_one_of_several_processes_says_which(monkeypatch):
    kg = random_kg()
    model = model_of(kg)

    def never(*arguments):
        raise MemoryError

    monkeypatch.setattr(_tiles.RankCounter, "batch", never)
    shards = Shards(kg.num_entities, 1, 3)
    with pytest.raises(ig.OutOfMemoryError, match="in process 1 of 3"):
        rank(model, kg.test, kg.answers(), shards=shards)


# -- chosen candidates ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("keeps", [True, False])
def test_chosen_candidates_alone_compete(monkeypatch, size, keeps):
    little_tiles(monkeypatch, keeps)
    kg = larger_kg()
    model = model_of(kg).eval()
    chosen = torch.randperm(83)[:40]
    ids = set(chosen.tolist())
    expected = [[], []]
    known = known_of(torch.cat([kg.train, kg.valid, kg.test]).tolist(), kg.num_relations)
    queries = with_inverses(kg.test, kg.num_relations)
    with torch.no_grad():
        scores = {}
        for positions, part in score_all(model, queries[:, 0], queries[:, 1]):
            scores.update(zip(positions.tolist(), part["decision"].tolist(), strict=True))
    for i, (entity, relation, answer) in enumerate(queries.tolist()):
        left = sorted((ids - known[entity, relation]) | {answer})
        values = [scores[i][candidate] for candidate in left]
        expected[i // len(kg.test)].append(loops.rank(values, left.index(answer)))
    given = (model, kg.test, kg.answers(), 48)
    for found in rank_together(size, *given, candidates=chosen.repeat(2)):
        assert found.tail["decision"].tolist() == expected[0]
        assert found.head["decision"].tolist() == expected[1]


def test_all_entities_chosen_are_all_entities():
    kg = larger_kg()
    model = model_of(kg).eval().float()
    everything = rank(model, kg.test, kg.answers())
    assert_equal_ranks(rank(model, kg.test, kg.answers(), candidates=torch.arange(83)), everything)


def test_candidates_may_be_named():
    kg = larger_kg()
    model = model_of(kg)
    by_name = evaluate(model, kg, candidates=[kg.entities[3], kg.entities[0]])
    assert by_name == evaluate(model, kg, candidates=torch.tensor([0, 3]))
    assert by_name == evaluate(model, kg, candidates=[3, 0, 3])
    assert by_name["candidates"] == "2 entities given"
    with pytest.raises(ig.UnknownLabelError, match="nowhere"):
        evaluate(model, kg, candidates=["nowhere"])


def test_drawn_candidates_of_an_evaluation_are_those_of_its_seed():
    kg = larger_kg()
    model = model_of(kg)
    found = [evaluate(model, kg, candidates=9, seed=seed) for seed in (4, 5)]
    for metrics, seed in zip(found, (4, 5), strict=True):
        assert metrics.pop("candidates") == f"9 entities drawn with seed {seed}"
        given = evaluate(model, kg, candidates=draw_candidates(kg.num_entities, 9, seed))
        assert given.pop("candidates") == "9 entities given"
        assert metrics == given
    assert found[0]["both"] != found[1]["both"]


def test_a_head_that_is_not_there_is_an_error():
    kg = larger_kg()
    with pytest.raises(ig.UnknownLabelError, match="no head 'nope'; it has structure"):
        rank(model_of(kg), kg.test, kg.answers(), heads=["nope"])


@pytest.mark.parametrize(
    ("triples", "message"),
    [
        (torch.tensor([[0, 0, 1], [0, 0, 12]]), r"row 1: expected .* the ids \(0, 0, 12\)"),
        (torch.tensor([[0, 2, 1]]), "12 entities and 2 relations"),
        (torch.tensor([[-1, 0, 1]]), "row 0"),
        (torch.tensor([0, 0, 1]), r"shape \(3,\)"),
        (torch.tensor([[0.0, 0.0, 1.7]]), "received torch.float32"),
        ([("e0", "after", "e1")], "expected .n, 3. integer ids"),
    ],
)
def test_triples_that_are_no_ids_of_the_model_are_an_error(triples, message):
    kg = ring_kg()
    model = ig.IMVIA.from_kg(kg, ig.Settings(dim=4, complex_head=False))
    with pytest.raises(ig.DataError, match=message):
        rank(model, triples, kg.answers())


def test_triples_may_be_of_another_integer_dtype():
    kg = larger_kg()
    model = model_of(kg)
    narrow = rank(model, kg.test.int(), kg.answers())
    assert_equal_ranks(narrow, rank(model, kg.test, kg.answers()))


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (torch.tensor([0, 83]), "from 0 to 82, received 83"),
        (torch.tensor([-1, 3]), "received -1"),
        (torch.tensor([0.0]), r"received torch.float32 of shape \(1,\)"),
        (torch.empty(0, dtype=torch.int64), "at least one entity"),
    ],
)
def test_candidates_that_are_no_entities_are_an_error(candidates, message):
    kg = larger_kg()
    with pytest.raises(ig.DataError, match=message):
        rank(model_of(kg), kg.test, kg.answers(), candidates=candidates)


def test_drawn_candidates_are_distinct_and_the_seeds_own():
    drawn = draw_candidates(1000, 300, seed=5)
    assert len(drawn.unique()) == 300
    assert 0 <= drawn.min() <= drawn.max() < 1000
    assert torch.equal(drawn, draw_candidates(1000, 300, seed=5))
    assert not torch.equal(drawn, draw_candidates(1000, 300, seed=6))
    assert draw_candidates(300, 300) is None
    some = torch.cat([draw_candidates(3, 2, seed) for seed in range(20)])
    assert some.unique().tolist() == [0, 1, 2]
    with pytest.raises(ig.DataError, match="at least 1"):
        draw_candidates(300, 0)


# -- metrics --------------------------------------------------------------------------------------


def loop_metrics(ranks):
    metrics = {"mrr": sum(1 / r for r in ranks) / len(ranks), "mr": sum(ranks) / len(ranks)}
    for k in (1, 3, 10, 100):
        metrics[f"hits@{k}"] = sum(r <= k for r in ranks) / len(ranks)
    return metrics


@given(st.lists(st.integers(2, 250).map(lambda twice: twice / 2), min_size=1, max_size=30))
def test_metrics_match_the_loop(ranks):
    assert rank_metrics(torch.tensor(ranks)) == pytest.approx(loop_metrics(ranks))


def test_a_tie_for_the_first_place_is_no_hit_at_one():
    assert rank_metrics(torch.tensor([1.5]))["hits@1"] == 0


def test_metrics_are_by_side_by_head_and_by_relation():
    triples = torch.tensor([[0, 2, 1], [1, 0, 2], [2, 2, 0]])
    tail = {"structure": [1.0, 2.0, 3.0], "text": [4.0, 4.0, 4.0], "decision": [1.0, 5.0, 2.5]}
    head = {"structure": [2.0, 2.0, 9.0], "text": [1.0, 1.0, 1.0], "decision": [7.0, 1.0, 120.0]}
    ranking = Ranking(
        triples,
        *({name: torch.tensor(v).double() for name, v in side.items()} for side in (tail, head)),
    )
    metrics = ranking.metrics(["r0", "r1", "r2"])
    assert metrics["tail"] == pytest.approx(loop_metrics(tail["decision"]))
    assert metrics["head"] == pytest.approx(loop_metrics(head["decision"]))
    assert metrics["both"] == pytest.approx(loop_metrics(tail["decision"] + head["decision"]))
    assert set(metrics["heads"]) == {"structure", "text"}
    for name, found in metrics["heads"].items():
        assert found == pytest.approx(loop_metrics(tail[name] + head[name]))
    # r1 has no triple here, and is not listed.
    assert set(metrics["relations"]) == {"r0", "r2"}
    assert metrics["relations"]["r0"] == pytest.approx({**loop_metrics([5.0, 1.0]), "triples": 1})
    both = [1.0, 2.5, 7.0, 120.0]
    assert metrics["relations"]["r2"] == pytest.approx({**loop_metrics(both), "triples": 2})
    assert "relations" not in ranking.metrics()


@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluate_filters_with_all_splits(split):
    kg = random_kg()
    model = model_of(kg).eval()
    metrics = evaluate(model, kg, split, batch_size=3)
    triples = kg.triples(split)
    tail, head = brute_force(model, kg, triples)
    assert metrics["both"] == pytest.approx(loop_metrics(tail["decision"] + head["decision"]))
    present = {kg.relations[i] for i in triples[:, 1].tolist()}
    assert set(metrics["relations"]) == present
    assert sum(part["triples"] for part in metrics["relations"].values()) == len(triples)
    assert not any(math.isnan(value) for value in metrics["both"].values())


def test_evaluating_an_empty_split_is_an_error():
    kg = random_kg().replace(test=None)
    with pytest.raises(ig.IMVIAError, match="'test' has no triples"):
        evaluate(model_of(kg), kg, "test")
