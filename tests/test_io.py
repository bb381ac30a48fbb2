"""load_kg: names, folders, the OpenKE layout, and what becomes of the validation set."""

import logging

import pytest
import torch
from helpers import TINY, assert_same_kg, ring_kg, ring_triples, write_folder

import imvia_graph as ig
from imvia_graph import DataError
from imvia_graph.splits import count_shared, hold_out

# -- names and folders ----------------------------------------------------------------------------


def test_a_built_in_name_a_folder_and_a_graph_all_load(tmp_path):
    assert ig.load_kg("countries").name == "countries"
    kg = ring_kg()
    folder = kg.save(tmp_path / "ring")
    assert_same_kg(kg, ig.load_kg(folder))
    assert_same_kg(kg, ig.load_kg(str(folder)))
    assert ig.load_kg(kg) is kg


def test_a_folder_below_the_home_folder_may_start_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    ring_kg().save(tmp_path / "graphs" / "ring")
    assert ig.load_kg("~/graphs/ring").name == "ring"


def test_an_unknown_name_lists_the_data_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"'nowhere' is neither.*countries, DB15K, MKG-W, MKG-Y"):
        ig.load_kg("nowhere")


def test_a_published_benchmark_that_is_not_there_says_where_it_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("IMVIA_DATA", str(tmp_path / "benchmarks"))
    with pytest.raises(DataError) as caught:
        ig.load_kg("DB15K")
    message = str(caught.value)
    assert str(tmp_path / "benchmarks" / "DB15K") in message
    assert "IMVIA_DATA" in message
    assert "neither" not in message  # DB15K is a data set


def test_a_published_benchmark_is_found_below_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("IMVIA_DATA", str(tmp_path))
    write_folder(tmp_path / "MKG-W", OPENKE)
    kg = ig.load_kg("MKG-W")
    assert kg.name == "MKG-W"
    assert kg.entities == ["New York", "Paris", "Rome"]


def test_a_folder_without_triples_says_what_it_expects_and_what_it_found(tmp_path):
    write_folder(tmp_path, {"triples.csv": "a,b,c\n", "notes.md": ""})
    with pytest.raises(DataError, match=r"expected train\.tsv .*train2id\.txt .*notes\.md, trip"):
        ig.load_kg(tmp_path)
    with pytest.raises(DataError, match=r"notes\.md"):
        ig.load_kg(tmp_path / "notes.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found nothing"):
        ig.load_kg(tmp_path / "empty")


def test_an_unknown_way_of_validation_is_refused():
    with pytest.raises(DataError, match=r"auto, published, held-out; received 'test'"):
        ig.load_kg("countries", validation="test")


# -- the OpenKE layout ----------------------------------------------------------------------------

OPENKE = {
    "entity2id.txt": "3\nNew York\t0\nRome\t2\nParis\t1\n",
    "relation2id.txt": "2\nnear\t0\ntwin city\t1\n",
    "train2id.txt": "2\n0 1 1\n2 0 0\n",
    "valid2id.txt": "1\n1 2 0\n",
    "test2id.txt": "1\n2 1 1\n",
}


def openke(tmp_path, **files):
    """Read the folder with some files changed; None leaves one out."""
    changed = {**OPENKE, **{f"{name}.txt": content for name, content in files.items()}}
    kept = {name: content for name, content in changed.items() if content is not None}
    return ig.load_kg(write_folder(tmp_path, kept), "published")


def test_openke_columns_head_tail_relation_become_head_relation_tail(tmp_path):
    kg = openke(tmp_path)
    assert kg.entities == ["New York", "Paris", "Rome"]  # in id order, not in the file's
    assert kg.relations == ["near", "twin city"]
    assert kg.train.tolist() == [[0, 1, 1], [2, 0, 0]]
    assert kg.valid.tolist() == [[1, 0, 2]]
    assert kg.test.tolist() == [[2, 1, 1]]


@pytest.mark.parametrize("change", ["tabs", "spaces", "CRLF", "blank lines", "BOM", "no end"])
def test_openke_separators_and_line_ends_do_not_matter(change, tmp_path):
    def changed(text):
        return {
            "tabs": text.replace(" 0\n", "\t0\n").replace(" 1\n", "\t1\n"),
            "spaces": text.replace("\t", "  "),
            "CRLF": text.replace("\n", "\r\n"),
            "blank lines": text.replace("\n", "\n\n"),
            "BOM": "\ufeff" + text,
            "no end": text.rstrip("\n"),
        }[change]

    expected = openke(tmp_path / "same")
    files = {name: changed(content) for name, content in OPENKE.items()}
    assert files != OPENKE
    assert_same_kg(expected, ig.load_kg(write_folder(tmp_path / "changed" / "same", files)))


def test_openke_without_validation_and_test_files_has_none(tmp_path):
    kg = openke(tmp_path, valid2id=None, test2id="0\n")
    assert kg.valid.shape == kg.test.shape == (0, 3)


def test_openke_display_names_are_read_and_may_lack(tmp_path):
    write_folder(tmp_path, {"entity_names.tsv": "name\tid\nGotham\t0\nRoma\t2\n"})
    kg = openke(tmp_path)
    assert kg.entity_names == ["Gotham", "Paris", "Roma"]
    assert kg.id_of("Gotham") == 0


OPENKE_MALFORMED = {
    "a count too high": ({"train2id": "3\n0 1 1\n"}, r"train2id\.txt, line 1: .*3 lines, but 1 fo"),
    "a count too low": ({"valid2id": "1\n0 1 1\n1 0 1\n"}, r"valid2id\.txt, line 1: .*1 .*2 follo"),
    "a count too high, of entities": (
        {"entity2id": "4\nNew York 0\nRome 2\nParis 1\n"},
        r"entity2id\.txt, line 1: .*4 lines, but 3 follow",
    ),
    "no count": (
        {"train2id": "0 1 1\n2 0 0\n"},
        r"train2id\.txt, line 1: expected the number of l",
    ),
    "an empty file": ({"test2id": ""}, r"test2id\.txt is empty"),
    "a head out of range": ({"train2id": "2\n0 1 1\n3 0 0\n"}, r"line 3: the head id 3 .*0 to 2"),
    "a tail out of range": ({"test2id": "1\n0 9 0\n"}, r"test2id\.txt, line 2: the tail id 9"),
    "a relation out of range": ({"test2id": "1\n0 1 2\n"}, r"line 2: the relation id 2 .*0 to 1"),
    "an id of many digits": ({"train2id": f"1\n{10**25} 1 0\n"}, r"train2id\.txt, line 2: "),
    "a negative id": ({"train2id": "1\n-1 1 0\n"}, r"train2id\.txt, line 2: .*'-1 1 0'"),
    "two columns": ({"train2id": "1\n0 1\n"}, r"train2id\.txt, line 2: .*three ids .*'0 1'"),
    "four columns": ({"train2id": "1\n0 1 0 1\n"}, r"train2id\.txt, line 2: .*'0 1 0 1'"),
    "two columns, then four": (
        {"train2id": "2\n0 1\n1 0 1 0\n"},
        r"train2id\.txt, line 2: .*'0 1'",
    ),
    "labels for ids": ({"train2id": "1\nRome Paris near\n"}, r"line 2: .*'Rome Paris near'"),
    "a missing id": ({"entity2id": "2\nRome 0\nParis 2\n"}, r"entity2id\.txt: .*; 1 is missing"),
    "a repeated id": (
        {"entity2id": "2\nRome 0\nParis 0\n"},
        r"entity2id\.txt, line 3: the id 0 already belongs to 'Rome'",
    ),
    "a repeated label": (
        {"entity2id": "3\nRome 0\nParis 1\nRome 2\n"},
        r"'Rome'.*more than once",
    ),
    "a label without an id": ({"relation2id": "2\nnear\nfar 1\n"}, r"relation2id\.txt, line 2: "),
    "an id without a label": ({"relation2id": "2\n0\nfar 1\n"}, r"relation2id\.txt, line 2: .*'0'"),
    "no entity2id.txt": ({"entity2id": None}, r"entity2id\.txt cannot be read: No such file"),
    "Latin-1": (
        {"entity2id": "1\nMalmö 0\n".encode("latin-1")},
        r"entity2id\.txt, line 2: expected UTF-8",
    ),
    "a NUL byte": ({"train2id": "1\n0 1\0 0\n"}, r"train2id\.txt, line 2: .*NUL"),
}


@pytest.mark.parametrize(("files", "message"), OPENKE_MALFORMED.values(), ids=OPENKE_MALFORMED)
def test_a_malformed_openke_folder_is_a_data_error_that_says_where(files, message, tmp_path):
    with pytest.raises(DataError, match=message):
        openke(tmp_path, **files)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("0\tGotham\n", r"entity_names\.tsv, line 1: .*columns id and name"),
        ("id\tname\n7\tGotham\n", r"entity_names\.tsv, line 2: .*below 3.*'7\\tGotham'"),
        ("id\tname\nx\tGotham\n", r"entity_names\.tsv, line 2: "),
    ],
)
def test_a_malformed_table_of_names_is_a_data_error_that_says_where(table, message, tmp_path):
    write_folder(tmp_path, {"entity_names.tsv": table})
    with pytest.raises(DataError, match=message):
        openke(tmp_path)


# -- the validation set ---------------------------------------------------------------------------


def leaky_kg():
    """A graph of which 4 of the 6 distinct validation triples are in train."""
    kg = ring_kg(60, valid=2, test=10)
    valid = torch.cat([kg.valid, kg.train[:4], kg.train[:1]])
    return kg.replace(valid=valid, notes=["as it came"])


def triple_set(triples):
    return set(map(tuple, triples.tolist()))


def test_auto_keeps_a_validation_set_that_shares_nothing_with_train():
    kg = ring_kg()
    assert ig.load_kg(kg, "auto") is kg
    assert kg.notes == []


def test_auto_holds_out_of_train_where_the_published_set_shares_triples_with_it(caplog):
    kg = leaky_kg()
    with caplog.at_level(logging.WARNING):
        loaded = ig.load_kg(kg, "auto")
    train, valid = triple_set(loaded.train), triple_set(loaded.valid)
    assert valid
    assert not train & valid
    assert train | valid == triple_set(kg.train)
    assert len(loaded.train) + len(loaded.valid) == len(kg.train)
    assert torch.equal(loaded.test, kg.test)
    note = loaded.notes[-1]
    assert loaded.notes[0] == "as it came"
    assert "4 of the 6 distinct published validation triples are in train" in note
    assert f"{len(loaded.valid)} triples held out of train" in note
    assert note in caplog.text
    assert kg.notes == ["as it came"]  # the graph given is left alone


def test_published_takes_the_set_as_it_is_even_where_it_leaks():
    kg = leaky_kg()
    assert_same_kg(ig.load_kg(kg, "published"), kg)


def test_fit_leaves_a_validation_set_as_load_kg_was_told():
    kg = leaky_kg()
    for validation in ("published", "held-out"):
        chosen = ig.load_kg(kg, validation)
        assert (chosen.validation, kg.validation) == (validation, None)
        for again in ("auto", validation):
            run = ig.fit(chosen, **{**TINY, "epochs": 0, "validation": again})
            assert torch.equal(run.kg.train, chosen.train)
            assert torch.equal(run.kg.valid, chosen.valid)
    # Told otherwise, it does otherwise; not told before, it goes by its setting.
    taken = ig.load_kg(kg, "published")
    held = ig.fit(taken, **{**TINY, "epochs": 0, "validation": "held-out"})
    assert held.kg.validation == "held-out"
    left = ig.load_kg(kg, None)
    assert left is kg
    assert len(ig.fit(left, **{**TINY, "epochs": 0}).kg.train) < len(kg.train)


def test_held_out_carves_five_per_cent_even_where_the_published_set_is_sound():
    kg = ring_kg(200, valid=5, test=5)
    loaded = ig.load_kg(kg, "held-out")
    # Triples of one pair stay together, so that one more may not fit.
    assert round(0.05 * len(kg.train)) - 1 <= len(loaded.valid) <= round(0.05 * len(kg.train))
    assert triple_set(loaded.valid) <= triple_set(kg.train)
    assert not triple_set(loaded.valid) & triple_set(loaded.train)
    assert "held out of train" in loaded.notes[-1]


def test_holding_out_follows_how_the_test_set_was_drawn():
    forward = ring_triples(80)
    backward = torch.stack([forward[:, 2], forward[:, 1] + 2, forward[:, 0]], dim=1)
    whole = torch.cat([forward, backward])
    whole = whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))]
    labels = [f"e{i}" for i in range(80)], ["a", "b", "c", "d"]
    drawn = ig.MultiViewKG(*labels, whole[20:], whole[20:30], whole[:20])

    def torn(kg):
        ends = {frozenset((h, t)) for h, _, t in kg.train.tolist()}
        return sum(frozenset((h, t)) in ends for h, _, t in kg.valid.tolist())

    apart = ig.load_kg(drawn)
    assert "triples held out of train, triple by triple (seed 0)" in apart.notes[-1]
    assert torn(apart) > 0
    together = ig.load_kg(drawn, hold_out_by="pair")
    assert "held out of train, pair by pair" in together.notes[-1]
    assert torn(together) == 0
    untold = ig.load_kg(drawn.replace(test=drawn.test[:0]))
    assert torn(untold) == 0
    with pytest.raises(DataError, match="hold_out_by: expected one of auto, pair, triple"):
        ig.load_kg(drawn, hold_out_by="entity")


def test_the_held_out_set_follows_the_seed():
    kg = leaky_kg()
    first, again = (ig.load_kg(kg, "auto", seed=3) for _ in range(2))
    other = ig.load_kg(kg, "auto", seed=4)
    assert torch.equal(first.valid, again.valid)
    assert torch.equal(first.train, again.train)
    assert triple_set(first.valid) != triple_set(other.valid)
    assert "seed 3" in first.notes[-1]


def test_views_survive_holding_out():
    kg = leaky_kg()
    loaded = ig.load_kg(kg, "auto")
    for modality in kg.modalities:
        assert torch.equal(loaded.views(modality)[0], kg.views(modality)[0])
        assert loaded.view_sources(modality) == kg.view_sources(modality)


def test_a_graph_of_which_nothing_can_be_held_out_says_so():
    kg = ig.MultiViewKG.from_labels([("a", "r", "b")], valid=[("a", "r", "b")])
    with pytest.raises(DataError, match=r"no training triple can be held out.*'published'"):
        ig.load_kg(kg)


def test_holding_out_tears_no_pair_apart_and_loses_no_entity_or_relation():
    forward = ring_triples(40)
    backward = torch.stack([forward[:, 2], forward[:, 1] + 2, forward[:, 0]], dim=1)
    triples = torch.cat([forward, backward, forward[:10]])
    train, valid = hold_out(triples, 0.2, seed=1)
    assert len(train) + len(valid) == len(triples)
    assert len(valid) >= 10

    def pairs(part):
        return {tuple(sorted((h, t))) for h, _, t in part.tolist()}

    assert not pairs(train) & pairs(valid)
    assert set(train[:, [0, 2]].flatten().tolist()) == set(range(40))
    assert set(train[:, 1].tolist()) == set(triples[:, 1].tolist())


@pytest.mark.parametrize("seed", range(8))
def test_pairs_with_more_triples_than_are_wanted_do_not_stop_others_from_being_held_out(seed):
    # All pairs of 14 entities: every second one with 10 triples, the others with one.
    pairs = torch.combinations(torch.arange(14)).tolist()
    rows = [(h, r, t) for i, (h, t) in enumerate(pairs) for r in range(10 if i % 2 else 1)]
    wanted = round(len(rows) * 0.01)
    assert 1 < wanted < 10
    _, valid = hold_out(torch.tensor(rows), 0.01, seed)
    assert len(valid) == wanted


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(DataError, match=f"received {fraction}"):
        hold_out(ring_triples(5), fraction)


def test_shared_triples_are_counted_once_each():
    part = torch.tensor([[0, 0, 1], [0, 0, 1], [1, 0, 0], [2, 0, 1]])
    other = torch.tensor([[2, 0, 1], [0, 0, 1], [0, 0, 1]])
    assert count_shared(part, other) == 2
    assert count_shared(part, part[:0]) == 0


def test_a_validation_set_that_is_put_aside_still_filters_and_is_never_held_out_again(tmp_path):
    kg = ring_kg(60, valid=6, test=6)
    held = ig.load_kg(kg, "held-out")
    assert torch.equal(held.known, kg.valid)
    assert "set aside" in held.notes[-1]
    everything = torch.cat([kg.train, kg.valid, kg.test])
    for head, relation, tail in everything.tolist():
        index = held.answers()
        _, col = index.pairs(torch.tensor([head]), torch.tensor([relation]))
        assert tail in col.tolist()
    again = ig.MultiViewKG.load(held.save(tmp_path / "held"))
    assert torch.equal(again.known, kg.valid)
    assert_same_kg(again, held)


def test_a_validation_set_that_shares_triples_with_test_is_not_chosen_by():
    kg = ring_kg(60, valid=6, test=6)
    kg = kg.replace(valid=kg.test)
    held = ig.load_kg(kg)
    assert count_shared(held.valid, kg.test) == 0
    assert "6 of the 6 distinct published validation triples are in test" in held.notes[-1]


def test_a_training_triple_that_is_in_test_is_never_held_out():
    kg = ring_kg(60, valid=0, test=6)
    kg = kg.replace(test=kg.train)
    with pytest.raises(DataError, match="no training triple can be held out"):
        ig.load_kg(kg, "held-out")
