"""The published benchmarks, where they are at hand: sizes, and what becomes of validation."""

import os
from pathlib import Path

import pytest
import torch

import imvia_graph as ig
from imvia_graph.splits import count_shared

SIZES = {
    # entities, relations, train, valid, test
    "DB15K": (12_842, 279, 79_222, 9_904, 9_902),
    "MKG-W": (15_000, 169, 34_196, 4_276, 4_274),
    "MKG-Y": (15_000, 28, 21_310, 2_665, 2_663),
}


@pytest.fixture(autouse=True)
def _at_hand(request):
    folder = os.environ.get("IMVIA_DATA")
    if not folder:
        pytest.skip("IMVIA_DATA is not set: it names the folder of published benchmarks")
    name = request.node.callspec.params["name"] if hasattr(request.node, "callspec") else "DB15K"
    if not (Path(folder) / name).is_dir():
        pytest.skip(f"{Path(folder) / name} is not there")


@pytest.mark.parametrize("name", SIZES)
def test_a_benchmark_has_the_published_number_of_everything(name):
    kg = ig.load_kg(name, validation="published")
    found = (kg.num_entities, kg.num_relations, len(kg.train), len(kg.valid), len(kg.test))
    assert found == SIZES[name]
    assert kg.name == name
    assert kg.notes == []


@pytest.mark.parametrize("name", SIZES)
def test_every_id_of_a_benchmark_is_used_and_has_a_name(name):
    kg = ig.load_kg(name, validation="published")
    triples = torch.cat([kg.train, kg.valid, kg.test])
    assert len(triples[:, 1].unique()) == kg.num_relations
    assert len(triples[:, [0, 2]].unique()) > 0.95 * kg.num_entities
    assert len(kg.entity_names) == kg.num_entities
    assert all(kg.entity_names)


@pytest.mark.parametrize("name", ["MKG-W", "MKG-Y"])
def test_auto_keeps_a_published_validation_set_that_is_sound(name):
    kg, published = (ig.load_kg(name, validation) for validation in ("auto", "published"))
    assert count_shared(published.valid, published.train) == 0
    for split in ("train", "valid", "test"):
        assert torch.equal(kg.triples(split), published.triples(split))
    assert kg.notes == []


def test_auto_holds_the_validation_set_of_db15k_out_of_train():
    kg, published = (ig.load_kg("DB15K", validation) for validation in ("auto", "published"))
    assert count_shared(published.valid, published.train) == 6_584
    assert len(published.valid.unique(dim=0)) == 7_481
    (note,) = kg.notes
    assert "6584 of the 7481" in note.replace(",", "")
    assert "triple by triple" in note  # as the test set was drawn
    assert count_shared(kg.valid, kg.train) == 0
    assert len(kg.train) + len(kg.valid) == len(published.train)
    assert 0.045 < len(kg.valid) / len(published.train) <= 0.05
    assert torch.equal(kg.test, published.test)
    # No entity and no relation is lost from train.
    for columns in ([0, 2], [1]):
        before, after = (g.train[:, columns].unique() for g in (published, kg))
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", SIZES)
def test_a_benchmark_survives_saving_as_a_kg_folder(name, tmp_path):
    kg = ig.load_kg(name, validation="published")
    again = ig.MultiViewKG.load(kg.save(tmp_path / name))
    assert again.entities == kg.entities
    assert again.relations == kg.relations
    assert again.entity_names == kg.entity_names
    for split in ("train", "valid", "test"):
        assert torch.equal(again.triples(split), kg.triples(split))
