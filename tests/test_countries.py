"""The built-in graph: large and varied enough, small on disk, and split without leaks."""

from collections import Counter

import pytest
import torch
from helpers import ROOT

import imvia_graph as ig
from imvia_graph.datasets import find

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def kg():
    return ig.load_kg("countries")


def labelled(kg, split):
    return [
        (kg.entities[h], kg.relations[r], kg.entities[t]) for h, r, t in kg.triples(split).tolist()
    ]


def test_it_comes_with_the_package():
    folder = find("countries")
    assert folder.is_dir()
    assert (folder / "kg.json").is_file()


def test_its_files_are_at_most_4_mb():
    files = [path for path in find("countries").rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 4e6


def test_it_has_relations_triples_and_modalities_enough(kg):
    assert kg.num_relations >= 8
    assert sum(len(kg.triples(split)) for split in SPLITS) >= 2400
    assert len(kg.modalities) >= 2
    assert {"image", "text"} <= set(kg.modalities)
    assert len(kg.valid) >= 100
    assert len(kg.test) >= 100


def test_validation_auto_leaves_it_as_it_is(kg):
    published = ig.load_kg("countries", validation="published")
    assert torch.equal(kg.train, published.train)
    assert torch.equal(kg.valid, published.valid)


def test_features_are_finite_and_of_unit_length(kg):
    for modality in kg.modalities:
        feat, _ = kg.views(modality)
        assert feat.isfinite().all(), modality
        norm = feat.float().norm(dim=1)
        # Stored in half precision.
        assert (norm - 1).abs().max() < 2e-3, modality


def test_entities_have_from_zero_to_many_views_with_their_sources(kg):
    for modality in kg.modalities:
        counts = kg.views(modality)[1].diff()
        assert counts.max() >= 2, modality
        assert all(kg.view_sources(modality)), modality
        assert len(kg.view_sources(modality)) == int(counts.sum())
    views = sum(kg.views(modality)[1].diff() for modality in kg.modalities)
    assert views.min() == 0 or kg.views("image")[1].diff().min() == 0


def test_no_two_views_of_an_entity_are_the_same(kg):
    for modality in kg.modalities:
        feat, ptr = kg.views(modality)
        owner = torch.repeat_interleave(torch.arange(kg.num_entities), ptr.diff())
        rows = torch.cat([owner[:, None].double(), feat.double()], dim=1)
        repeated = len(rows) - len(rows.unique(dim=0))
        assert repeated <= 0.01 * len(rows), modality


def test_every_triple_stands_once_in_one_split(kg):
    counts = Counter(triple for split in SPLITS for triple in labelled(kg, split))
    assert [triple for triple, count in counts.items() if count > 1] == []


def test_every_entity_and_every_relation_is_in_train(kg):
    assert kg.unseen_entities().tolist() == []
    assert set(kg.train[:, 1].tolist()) == set(range(kg.num_relations))


def test_both_directions_of_a_border_are_in_one_split(kg):
    where = {triple: split for split in SPLITS for triple in labelled(kg, split)}
    borders = {triple: split for triple, split in where.items() if triple[1] == "borders"}
    assert len(borders) > 300
    for (head, relation, tail), split in borders.items():
        assert borders.get((tail, relation, head)) == split, (head, tail)


def test_no_held_out_triple_has_its_ends_joined_in_train(kg):
    joined = {frozenset((h, t)) for h, _, t in labelled(kg, "train")}
    for split in ("valid", "test"):
        leaks = [triple for triple in labelled(kg, split) if frozenset(triple[::2]) in joined]
        assert leaks == [], split


def test_its_relations_are_of_several_kinds(kg):
    triples = torch.cat([kg.triples(split) for split in SPLITS])
    to_one, to_many, symmetric = set(), set(), set()
    for i, label in enumerate(kg.relations):
        pairs = set(map(tuple, triples[triples[:, 1] == i][:, [0, 2]].tolist()))
        tails = Counter(head for head, _ in pairs)
        mean = len(pairs) / len(tails)
        (to_many if mean > 1.5 else to_one).add(label)
        if all((tail, head) in pairs for head, tail in pairs):
            symmetric.add(label)
    assert symmetric == {"borders"}
    assert len(to_many) >= 2
    assert len(to_one) >= 4


def test_its_entities_are_of_several_kinds(kg):
    facts = {triple for split in SPLITS for triple in labelled(kg, split)}
    kinds = {
        relation: {tail for _, r, tail in facts if r == relation}
        for relation in ("has_capital", "currency", "official_language", "time_zone")
    }
    for one, its in kinds.items():
        assert len(its) >= 20, one
        for other, theirs in kinds.items():
            assert one == other or not its & theirs, (one, other)


def test_france_borders_germany_and_not_japan(kg):
    facts = {triple for split in SPLITS for triple in labelled(kg, split)}
    assert ("France", "borders", "Germany") in facts
    assert ("Germany", "borders", "France") in facts
    assert ("France", "has_capital", "Paris") in facts
    assert ("France", "borders", "Japan") not in facts
    assert kg.view_sources("image")[kg.views("image")[1][kg.id_of("France")]]


def test_its_readme_tells_where_the_data_come_from():
    text = (ROOT / "datasets" / "countries" / "README.md").read_text(encoding="utf-8")
    for word in ("GeoNames", "CC BY 4.0", "Unicode", "MiniLM", "EfficientNet", "build.py"):
        assert word in text, word
