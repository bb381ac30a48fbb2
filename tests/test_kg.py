"""MultiViewKG: what it holds, what it refuses, and that saving and loading changes nothing."""

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from helpers import assert_same_kg, contents, ring_kg, write_folder

import imvia_graph as ig
from imvia_graph import DataError, MultiViewKG, UnknownLabelError, Views, _linked

SPLITS = ("train", "valid", "test")


def small_kg(**changes):
    """Three entities, two relations, one training triple, unless told otherwise."""
    arguments = {
        "entities": ["a", "b", "c"],
        "relations": ["r", "s"],
        "train": torch.tensor([[0, 0, 1]]),
    }
    return MultiViewKG(**{**arguments, **changes})


# -- what it holds --------------------------------------------------------------------------------


def test_sizes_labels_and_triples_are_those_given():
    kg = small_kg(
        train=torch.tensor([[0, 0, 1], [0, 0, 1], [2, 1, 2]]),
        valid=torch.tensor([[1, 0, 2]]),
        test=torch.tensor([[2, 1, 0]]),
    )
    assert (kg.num_entities, kg.num_relations) == (3, 2)
    assert kg.entities == ["a", "b", "c"]
    assert kg.relations == ["r", "s"]
    assert kg.train.tolist() == [[0, 0, 1], [0, 0, 1], [2, 1, 2]]  # a repeated row is kept
    assert kg.valid.tolist() == [[1, 0, 2]]
    assert kg.test.tolist() == [[2, 1, 0]]
    assert all(kg.triples(split).dtype == torch.int64 for split in SPLITS)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8])
def test_ids_of_any_integer_dtype_become_int64(dtype):
    kg = small_kg(train=torch.tensor([[2, 1, 0]], dtype=dtype))
    assert kg.train.dtype == torch.int64
    assert kg.train.tolist() == [[2, 1, 0]]


def test_triples_may_be_numpy_arrays_or_lists():
    expected = torch.tensor([[0, 1, 2]])
    assert torch.equal(small_kg(train=expected.numpy()).train, expected)
    assert torch.equal(small_kg(train=[[0, 1, 2]]).train, expected)


def test_labels_where_ids_are_wanted_are_refused_with_what_takes_them():
    feat = torch.rand(2, 3)
    with pytest.raises(DataError, match=r"^train: expected a tensor.*list.*from_labels"):
        small_kg(train=[("a", "r", "b")])
    with pytest.raises(DataError, match=r"^views\['image'\]: expected a tensor.*from_labels"):
        small_kg(views={"image": Views(feat, ["a", "b"])})
    with pytest.raises(DataError, match=r"views: expected Views by modality.*received list"):
        small_kg(views=[Views(feat, torch.tensor([0, 1]))])
    with pytest.raises(DataError, match=r"image.*expected dense features.*torch.sparse_coo"):
        small_kg(views={"image": Views(feat.to_sparse(), torch.tensor([0, 1]))})


def test_no_validation_and_test_triples_are_empty_n_by_3():
    kg = small_kg()
    assert kg.valid.shape == kg.test.shape == (0, 3)
    assert kg.valid.dtype == torch.int64


def test_ids_of_labels_follow_first_appearance_over_train_valid_test():
    kg = MultiViewKG.from_labels(
        train=[("x", "likes", "y"), ("z", "knows", "x")],
        valid=[("z", "likes", "v")],
        test=[("t", "owns", "x")],
    )
    assert kg.entities == ["x", "y", "z", "v", "t"]
    assert kg.relations == ["likes", "knows", "owns"]
    assert kg.train.tolist() == [[0, 0, 1], [2, 1, 0]]
    assert kg.valid.tolist() == [[2, 0, 3]]
    assert kg.test.tolist() == [[4, 2, 0]]


def test_labels_that_look_like_numbers_nulls_and_floats_stay_labels():
    triples = [("1", "NA", "null"), ("1.0", "NaN", "None"), ("01", "", "x")]
    kg = MultiViewKG.from_labels(train=triples[:2])
    assert kg.entities == ["1", "null", "1.0", "None"]
    with pytest.raises(DataError, match=r"triple 0.*'01', '', 'x'"):
        MultiViewKG.from_labels(train=triples[2:])


def test_views_from_labels_go_to_the_entities_that_bear_them():
    kg = MultiViewKG.from_labels(
        train=[("x", "r", "y")],
        views={"image": (torch.tensor([[1.0], [2.0], [3.0]]), ["y", "x", "y"])},
    )
    feat, ptr = kg.views("image")
    assert ptr.tolist() == [0, 1, 3]
    assert feat.flatten().tolist() == [2.0, 1.0, 3.0]


def test_views_from_labels_may_say_where_they_are_from():
    views = Views(torch.tensor([[1.0], [2.0]]), ["y", "x"], ["of y", "of x"])
    kg = MultiViewKG.from_labels([("x", "r", "y")], views={"text": views})
    assert kg.view_sources("text") == ["of x", "of y"]
    assert kg.views("text")[0].tolist() == [[2.0], [1.0]]


@pytest.mark.parametrize("whose", [[1, 0], torch.tensor([1, 0]), ["y", "x"]])
@pytest.mark.parametrize("form", [tuple, list, lambda pair: Views(*pair)])
def test_views_from_labels_are_told_apart_by_labels_or_ids(whose, form):
    given = form([torch.tensor([[1.0], [2.0]]), whose])
    kg = MultiViewKG.from_labels([("x", "r", "y")], views={"text": given})
    assert kg.views("text")[0].tolist() == [[2.0], [1.0]]


@pytest.mark.parametrize("given", [torch.rand(2, 3), [1], (torch.rand(2, 3),)])
def test_views_from_labels_that_are_no_pair_say_what_was_expected(given):
    with pytest.raises(DataError, match=r"views\['text'\]: expected Views, or a pair"):
        MultiViewKG.from_labels([("x", "r", "y")], views={"text": given})


@pytest.mark.parametrize("label", [3, ["a", "b"], None])
def test_what_is_no_label_is_said_to_be_none(label):
    with pytest.raises(UnknownLabelError, match=r"label of one entity, a string; received"):
        small_kg().id_of(label)


def test_unsorted_views_come_out_sorted_by_entity_with_their_sources():
    entity = torch.tensor([2, 0, 2, 1, 0])
    feat = torch.arange(5.0)[:, None]
    kg = small_kg(views={"image": Views(feat, entity, ["p0", "p1", "p2", "p3", "p4"])})
    sorted_feat, ptr = kg.views("image")
    # Stable: views of one entity keep their order.
    assert sorted_feat.flatten().tolist() == [1.0, 4.0, 3.0, 0.0, 2.0]
    assert ptr.tolist() == [0, 2, 3, 5]
    assert kg.view_sources("image") == ["p1", "p4", "p3", "p0", "p2"]


def test_entities_may_have_from_zero_to_hundreds_of_views():
    entity = torch.tensor([1] * 300 + [2])
    kg = small_kg(views={"image": Views(torch.randn(301, 2), entity)})
    assert kg.views("image")[1].tolist() == [0, 0, 300, 301]


def test_a_modality_without_any_view_is_allowed():
    kg = small_kg(views={"audio": Views(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))})
    feat, ptr = kg.views("audio")
    assert feat.shape == (0, 4)
    assert ptr.tolist() == [0, 0, 0, 0]
    assert kg.graph.num_nodes("audio") == 0


@pytest.mark.parametrize(
    "modality", ["audio", "3d model", "ünïcode", "of", "fact", "a.b", "keys", "forward", "0", "_"]
)
def test_any_name_that_a_file_can_have_is_a_modality(modality, tmp_path):
    kg = small_kg(views={modality: Views(torch.ones(2, 3), torch.tensor([2, 0]))})
    assert kg.modalities == [modality]
    assert kg.graph.in_degrees(etype=(modality, "of", "entity")).tolist() == [1, 0, 1]
    again = MultiViewKG.load(kg.save(tmp_path / "kg"))
    assert_same_kg(kg.replace(name=again.name), again)


def test_modalities_keep_the_order_in_which_they_were_given(tmp_path):
    one = Views(torch.ones(1, 2), torch.tensor([0]))
    kg = small_kg(views={"text": one, "audio": one, "image": one})
    assert kg.modalities == ["text", "audio", "image"]
    assert MultiViewKG.load(kg.save(tmp_path)).modalities == ["text", "audio", "image"]


def test_unseen_entities_are_those_that_no_training_triple_touches():
    kg = small_kg(test=torch.tensor([[2, 0, 0]]))
    assert kg.unseen_entities().tolist() == [2]


# -- the DGL graph --------------------------------------------------------------------------------


def test_graph_has_a_node_type_a_modality_and_two_kinds_of_edges():
    kg = ring_kg()
    assert sorted(kg.graph.ntypes) == ["entity", "image", "text"]
    assert sorted(kg.graph.canonical_etypes) == [
        ("entity", "fact", "entity"),
        ("image", "of", "entity"),
        ("text", "of", "entity"),
    ]
    assert kg.graph.num_nodes("entity") == kg.num_entities


def test_fact_edges_are_the_training_triples_with_their_relation():
    kg = ring_kg()
    head, tail = kg.graph.edges(etype="fact")
    relation = kg.graph.edges["fact"].data["rel"]
    assert relation.dtype == torch.int64
    assert torch.equal(torch.stack([head, relation, tail], dim=1), kg.train)


def test_validation_and_test_triples_never_become_edges():
    kg = ring_kg()
    head, tail = kg.graph.edges(etype="fact")
    edges = {*zip(head.tolist(), tail.tolist(), strict=True)}
    held_out = torch.cat([kg.valid, kg.test])
    assert len(held_out) == 6
    # A pair of the ring is never joined by both relations, so a pair says which triple it is of.
    assert not edges & {(h, t) for h, _, t in held_out.tolist()}
    assert kg.graph.num_edges("fact") == len(kg.train)


def test_in_degrees_of_views_are_the_csr_pointer():
    kg = ring_kg()
    for modality in kg.modalities:
        feat, ptr = kg.views(modality)
        degrees = kg.graph.in_degrees(etype=(modality, "of", "entity"))
        assert torch.equal(ptr.diff(), degrees)
        assert ptr[-1] == len(feat) == kg.graph.num_nodes(modality)
        _, owner = kg.graph.edges(etype=(modality, "of", "entity"))
        assert torch.equal(owner, owner.sort().values)
        assert torch.equal(kg.graph.nodes[modality].data["feat"], feat)


def test_a_graph_without_views_has_facts_only():
    kg = small_kg()
    assert kg.modalities == []
    assert kg.graph.canonical_etypes == [("entity", "fact", "entity")]


def test_per_relation_splits_facts_by_relation_and_keeps_views():
    kg = ring_kg()
    graph = kg.per_relation()
    for i, label in enumerate(kg.relations):
        edges = torch.stack(graph.edges(etype=("entity", label, "entity")), dim=1)
        of_relation = kg.train[kg.train[:, 1] == i]
        assert len(of_relation) > 0
        assert torch.equal(edges, of_relation[:, [0, 2]])
    for modality in kg.modalities:
        assert torch.equal(graph.nodes[modality].data["feat"], kg.views(modality)[0])
        assert torch.equal(
            graph.in_degrees(etype=(modality, "of", "entity")), kg.views(modality)[1].diff()
        )


def test_per_relation_keeps_relations_without_training_triples():
    graph = small_kg().per_relation()
    assert graph.num_edges(("entity", "r", "entity")) == 1
    assert graph.num_edges(("entity", "s", "entity")) == 0


def test_per_relation_refuses_a_relation_called_of_beside_views():
    views = {"image": Views(torch.ones(1, 2), torch.tensor([0]))}
    with pytest.raises(DataError, match=r"'of'.*Rename the relation"):
        small_kg(relations=["r", "of"], views=views).per_relation()
    assert small_kg(relations=["r", "of"]).per_relation().num_edges("of") == 0


# -- names ----------------------------------------------------------------------------------------


def test_id_of_finds_labels_then_display_names():
    kg = small_kg(entity_names=["Berlin", "a", "Paris"], relation_names=["lies in", ""])
    assert kg.id_of("b") == 1
    assert kg.id_of("Paris") == 2
    assert kg.id_of("a") == 0  # the label a, not the entity that is called so
    assert kg.id_of("lies in", "relation") == 0
    assert kg.relation_names == ["lies in", "s"]  # an empty name is the label


def test_id_of_refuses_a_name_that_several_entities_bear_and_lists_their_labels():
    kg = small_kg(entity_names=["Paris", "Berlin", "Paris"])
    with pytest.raises(UnknownLabelError, match=r"2 entities are called 'Paris'.*'a', 'c'"):
        kg.id_of("Paris")
    assert kg.id_of("Berlin") == 1


def test_id_of_an_unknown_label_names_the_nearest():
    kg = small_kg(entities=["France", "Germany", "Poland"])
    with pytest.raises(UnknownLabelError, match=r"Unknown entity 'Frnce'.*: 'France'"):
        kg.id_of("Frnce")
    with pytest.raises(UnknownLabelError, match="Unknown relation 'France'"):
        kg.id_of("France", "relation")
    assert issubclass(UnknownLabelError, KeyError)


@pytest.mark.parametrize("name", ["FRANCE", "Francé", "francE"])
def test_what_is_nearest_does_not_depend_on_case_and_accents(name):
    kg = small_kg(entities=["Central African CFA Franc", "Fiji", "France"])
    with pytest.raises(UnknownLabelError, match="The nearest known: 'France'"):
        kg.id_of(name)


def test_where_nothing_is_near_nothing_is_named():
    with pytest.raises(UnknownLabelError, match=r"Unknown entity 'Xyzzy' in .*\. None is like it"):
        small_kg(entities=["France", "Germany", "Poland"]).id_of("Xyzzy")


def test_a_list_of_labels_is_told_what_answers_many():
    with pytest.raises(UnknownLabelError, match="predict_all"):
        small_kg().id_of(["a", "b"])


@pytest.mark.parametrize("name", ["entity", "structure", "joint", "complex", "decision"])
def test_a_modality_cannot_have_the_name_of_a_head(name):
    views = ig.Views(torch.ones(1, 2), torch.tensor([0]))
    with pytest.raises(ig.DataError, match=f"cannot be called '{name}'"):
        small_kg(views={name: views})


def test_id_of_a_kind_that_is_neither_entity_nor_relation_says_so():
    with pytest.raises(ig.IMVIAError, match=r"'entities'.*entity.*relation"):
        small_kg().id_of("a", "entities")


def test_unknown_modality_and_split_are_named_with_the_known_ones():
    kg = ring_kg()
    for ask in (kg.views, kg.view_sources):
        with pytest.raises(UnknownLabelError, match=r"no modality 'video'.*'image', 'text'"):
            ask("video")
    with pytest.raises(UnknownLabelError, match=r"'dev'.*train, valid or test"):
        kg.triples("dev")


def test_replace_changes_what_is_named_and_keeps_the_rest():
    kg = ring_kg(notes=["a note"], entity_names=[f"Entity {i}" for i in range(12)])
    other = kg.replace(valid=kg.valid[:1], name="other")
    assert (other.name, len(other.valid)) == ("other", 1)
    assert_same_kg(kg, other.replace(valid=kg.valid, name="ring"))
    without = kg.replace(views={})
    assert without.modalities == []
    assert kg.modalities == ["image", "text"]


# -- what it refuses ------------------------------------------------------------------------------

ONE = torch.ones(1, 2)
ZERO = torch.tensor([0])
REFUSED = {
    "repeated entity": ({"entities": ["a", "b", "a"]}, r"entities.*'a'.*more than once"),
    "repeated relation": ({"relations": ["r", "r"]}, r"relations.*'r'.*more than once"),
    "empty entity": ({"entities": ["a", "", "c"]}, r"entities, number 1.*''"),
    "label that is no text": ({"entities": ["a", 2, "c"]}, r"entities, number 1.*2"),
    "head out of range": (
        {"train": torch.tensor([[0, 0, 1], [3, 0, 1]])},
        r"train, row 1: the head id 3 .*0 to 2",
    ),
    "relation out of range": (
        {"valid": torch.tensor([[0, 2, 1]])},
        r"valid, row 0: the relation id 2 .*0 to 1",
    ),
    "negative tail": ({"test": torch.tensor([[0, 0, -1]])}, r"test, row 0: the tail id -1"),
    "triples of two": ({"train": torch.tensor([[0, 1]])}, r"train: .*\(n, 3\).*\(1, 2\)"),
    "triples of floats": ({"train": torch.ones(1, 3)}, r"train: .*integer.*float32"),
    "no training triple": ({"train": torch.empty(0, 3, dtype=torch.int64)}, "no training triples"),
    "too few names": ({"entity_names": ["A"]}, r"entity_names: expected 3.*received 1"),
    "flat features": (
        {"views": {"image": Views(torch.ones(2), torch.tensor([0, 1]))}},
        r"views\['image'\].*\(views, width\).*\(2,\)",
    ),
    "features of no width": ({"views": {"image": Views(torch.ones(1, 0), ZERO)}}, r"\(1, 0\)"),
    "integer features": (
        {"views": {"image": Views(ONE.long(), ZERO)}},
        r"views\['image'\].*floating-point.*int64",
    ),
    "entities of views that are floats": (
        {"views": {"image": Views(ONE, ZERO.float())}},
        r"views\['image'\].*integer.*float32",
    ),
    "entities of views that are a mask": (
        {"views": {"image": Views(ONE, torch.tensor([True]))}},
        r"views\['image'\].*integer.*bool",
    ),
    "more features than entities": (
        {"views": {"image": Views(torch.ones(3, 2), torch.tensor([0, 1]))}},
        r"views\['image'\].*3 rows.*\(2,\)",
    ),
    "view of an entity that is not there": (
        {"views": {"image": Views(torch.ones(2, 2), torch.tensor([0, 3]))}},
        r"views\['image'\], row 1: the entity id 3 .*0 to 2",
    ),
    "NaN": (
        {"views": {"image": Views(torch.tensor([[1.0], [torch.nan]]), torch.tensor([0, 2]))}},
        r"views\['image'\], row 1: a view of 'c' has NaN",
    ),
    "infinity": (
        {"views": {"text": Views(torch.tensor([[torch.inf]]), torch.tensor([1]))}},
        r"views\['text'\], row 0: a view of 'b' has .*infinite",
    ),
    "too many sources": (
        {"views": {"image": Views(ONE, ZERO, ["x", "y"])}},
        r"views\['image'\]: expected one source per view, received 2 for 1",
    ),
    **{
        f"modality {name!r}": ({"views": {name: Views(ONE, ZERO)}}, f"called {name!r}")
        for name in ("entity", "structure", "joint", "decision")
    },
    **{
        f"modality {name!r}": ({"views": {name: Views(ONE, ZERO)}}, "cannot be the name of a file")
        for name in ("", "a/b", "a\\b", "..", ".hidden", "a\nb", 3)
    },
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_a_graph_is_a_data_error_that_says_where(changes, message):
    with pytest.raises(DataError, match=message):
        small_kg(**changes)


def test_a_pair_in_place_of_views_works_or_is_a_data_error():
    # MultiViewKG.from_labels takes such pairs, so people will try.
    try:
        kg = small_kg(views={"image": (ONE, ZERO)})
    except DataError as error:
        assert "image" in str(error)  # noqa: PT017
    else:
        assert kg.views("image")[1].tolist() == [0, 1, 1, 1]


def test_labels_of_views_that_are_no_entity_are_counted_and_the_first_is_named():
    with pytest.raises(DataError, match=r"views\['t'\]: 3 rows name 2 labels.*first 'p' in row 2"):
        MultiViewKG.from_labels(
            [("a", "r", "b")], views={"t": (torch.ones(4, 1), ["a", "p", "q", "p"])}
        )


def test_a_triple_of_labels_with_two_columns_is_named():
    with pytest.raises(DataError, match=r"valid, triple 1.*\('b', 'r'\)"):
        MultiViewKG.from_labels([("a", "r", "b")], valid=[("a", "r", "b"), ("b", "r")])


# -- save and load --------------------------------------------------------------------------------

AWKWARD = [
    "two words",
    " leading",
    "trailing ",
    '"quoted"',
    'one " quote',
    "it's",
    "#comment",
    "Zürich 東京 🏔",
    "a,b;c",
    "back\\slash",
    "null",
    "NA",
    "1",
    "1.0",
    "-",
    "line\u2028separator",
    "next\x85line",
    " ",
    "  ",
    "%s {} $HOME",
]
SOURCES = [
    "a,b.png",
    'the "best" one',
    "two\nlines",
    "two\r\nlines\r",
    "",
    " spaces ",
    "ünï",
    '"',
    "null",
    "tab\there",
]


def awkward_kg():
    size = len(AWKWARD)
    entity = torch.arange(size)
    triples = torch.stack([entity, (entity * 7) % size, (entity + 3) % size], dim=1)
    views = {
        "image": Views(
            torch.randn(30, 4, generator=torch.Generator().manual_seed(1)),
            torch.arange(30) % 3,
            [SOURCES[i % len(SOURCES)] for i in range(30)],
        ),
        "text": Views(torch.randn(2, 3, dtype=torch.float64), torch.tensor([size - 1, 0])),
        "half": Views(torch.randn(2, 3).half(), torch.tensor([1, 0])),
        "none": Views(torch.empty(0, 2), torch.empty(0, dtype=torch.int64)),
    }
    return MultiViewKG(
        AWKWARD,
        [f"r {label}" for label in AWKWARD],
        triples,
        triples[:2],
        triples[2:3],
        views,
        name='the "awkward" ünï graph',
        entity_names=[label[::-1] for label in AWKWARD],
        notes=["first\nnote", "second"],
    )


def test_saving_and_loading_changes_nothing(tmp_path):
    kg = awkward_kg()
    assert_same_kg(kg, MultiViewKG.load(kg.save(tmp_path / "new" / "folder")))


def test_the_bom_character_in_a_label_survives_or_is_refused_before_anything_is_written(tmp_path):
    kg = small_kg(entities=["\ufeffa", "b", "c"])
    try:
        folder = kg.save(tmp_path / "kg")
    except DataError:
        assert not (tmp_path / "kg").exists()
    else:
        assert_same_kg(kg.replace(name="kg"), MultiViewKG.load(folder))


def test_loading_what_was_loaded_and_saved_gives_the_same_bytes(tmp_path):
    first = awkward_kg().save(tmp_path / "one")
    second = MultiViewKG.load(first).save(tmp_path / "two")
    assert contents(first) == contents(second)


def test_the_kg_folder_holds_the_files_that_its_layout_names(tmp_path):
    folder = ring_kg().save(tmp_path)
    assert set(contents(folder)) == {
        "kg.json",
        "entities.tsv",
        "relations.tsv",
        "train.tsv",
        "valid.tsv",
        "test.tsv",
        "views/image.safetensors",
        "views/image.csv",
        "views/text.safetensors",
        "views/text.csv",
    }
    about = json.loads((folder / "kg.json").read_text())
    assert (about["format"], about["version"]) == ("imvia-graph/kg", 1)
    table = pl.read_csv(folder / "views" / "text.csv")
    assert table.columns == ["entity", "source"]
    assert table["entity"][:3].to_list() == ["e1", "e1", "e2"]
    assert (folder / "train.tsv").read_text().splitlines()[0].split("\t")[1] in (
        "after",
        "opposite",
    )


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def test_where_there_is_no_room_for_features_the_graph_that_was_there_stays(tmp_path, monkeypatch):
    old = ring_kg()
    folder = old.save(tmp_path / "kg")
    before = contents(folder)
    image = old._views("image")
    new = old.replace(views={"image": image._replace(feat=image.feat + 1)}, train=old.train[:-1])
    put = _linked.put

    def then_full(*arguments):
        put(*arguments)
        full_disk()

    with monkeypatch.context() as patch:
        patch.setattr("imvia_graph._linked.put", then_full)
        with pytest.raises(OSError, match="No space left"):
            new.save(folder)
    assert contents(folder) == before
    new.save(folder)
    assert_same_kg(MultiViewKG.load(folder), new.replace(name=old.name))
    assert not list((folder / "views").glob("text*"))


def test_a_folder_that_was_not_written_to_its_end_does_not_pass_for_a_graph(tmp_path, monkeypatch):
    old = ring_kg().replace(notes=["Read somewhere."])
    folder = old.save(tmp_path / "kg")
    new = old.replace(views={"image": old._views("image")}, train=old.train[:-1])
    with monkeypatch.context() as patch:
        patch.setattr("imvia_graph._tables.write_table", full_disk)
        with pytest.raises(OSError, match="No space left"):
            new.save(folder)
    with pytest.raises(DataError, match=r"kg\.json: the graph was not written to its end"):
        MultiViewKG.load(folder)
    about = json.loads((folder / "kg.json").read_text())
    assert (about["name"], about["notes"]) == (old.name, old.notes)
    assert (folder / "views" / "text.safetensors").exists()  # what the new one lacks goes last
    new.save(folder)
    assert_same_kg(MultiViewKG.load(folder), new.replace(name=old.name))
    assert not (folder / "views" / "text.safetensors").exists()


@pytest.mark.parametrize("label", ["tab\there", "line\nend", "carriage\rreturn"])
@pytest.mark.parametrize("field", ["entities", "relations", "entity_names"])
def test_a_label_that_a_tsv_file_cannot_carry_stops_saving_before_anything_is_written(
    label, field, tmp_path
):
    labels = [label, "b", "c"][: 2 if field == "relations" else 3]
    with pytest.raises(DataError, match=r"tab or a line end"):
        small_kg(**{field: labels}).save(tmp_path / "kg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("label", ["nul\0byte", "surrogate\ud800"], ids=["NUL", "surrogate"])
def test_a_label_that_could_not_be_read_again_stops_saving_before_anything_is_written(
    label, tmp_path
):
    with pytest.raises(DataError):
        small_kg(entities=[label, "b", "c"]).save(tmp_path / "kg")
    assert list(tmp_path.iterdir()) == []


def test_saving_over_an_older_graph_leaves_none_of_its_views_behind(tmp_path):
    ring_kg().save(tmp_path)
    kg = ring_kg(views=False)
    assert_same_kg(kg, MultiViewKG.load(kg.save(tmp_path)))


def test_saved_files_are_as_readable_as_any_other_file(tmp_path):
    folder = ring_kg().save(tmp_path / "kg")
    (tmp_path / "plain").write_text("")
    expected = (tmp_path / "plain").stat().st_mode
    modes = {path.name: path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(modes, expected)


# -- folders that people write --------------------------------------------------------------------

TRAIN = "a\tr\tb\nb\tr\tc\n"


@pytest.mark.parametrize(
    "train",
    [
        TRAIN,
        TRAIN.rstrip("\n"),
        TRAIN.replace("\n", "\r\n"),
        "\n\na\tr\tb\n\n\nb\tr\tc\n\n",
        "\r\na\tr\tb\r\n\r\nb\tr\tc\r\n\r\n",
        "\ufeff" + TRAIN,
        "\ufeff" + TRAIN.replace("\n", "\r\n"),
    ],
    ids=["plain", "no last line end", "CRLF", "blank lines", "blank CRLF", "BOM", "BOM and CRLF"],
)
def test_line_ends_blank_lines_and_a_bom_do_not_matter(train, tmp_path):
    kg = MultiViewKG.load(write_folder(tmp_path, {"train.tsv": train}))
    assert kg.entities == ["a", "b", "c"]
    assert kg.relations == ["r"]
    assert kg.train.tolist() == [[0, 0, 1], [1, 0, 2]]


def test_labels_are_taken_as_they_stand(tmp_path):
    train = ' "a\tr #1\t#b \n#b \tr #1\tnull\n'
    kg = MultiViewKG.load(write_folder(tmp_path, {"train.tsv": train}))
    assert kg.entities == [' "a', "#b ", "null"]
    assert kg.relations == ["r #1"]


@pytest.mark.parametrize("empty", ["", "\n", "\r\n\n"])
def test_an_empty_validation_or_test_file_is_fine(empty, tmp_path):
    files = {"train.tsv": TRAIN, "valid.tsv": empty, "test.tsv": empty}
    kg = MultiViewKG.load(write_folder(tmp_path, files))
    assert kg.valid.shape == kg.test.shape == (0, 3)


def test_the_folder_gives_a_graph_without_kg_json_its_name(tmp_path):
    folder = write_folder(tmp_path / "my graph", {"train.tsv": TRAIN})
    assert MultiViewKG.load(folder).name == "my graph"


def test_columns_of_the_label_tables_may_stand_in_any_order_with_others(tmp_path):
    table = "name\tcolour\tentity\nThe A\tred\ta\nThe B\tblue\tb\n\tgreen\tc\n"
    kg = MultiViewKG.load(write_folder(tmp_path, {"train.tsv": TRAIN, "entities.tsv": table}))
    assert kg.entities == ["a", "b", "c"]
    assert kg.entity_names == ["The A", "The B", "c"]


def test_a_view_table_may_lack_sources_and_have_crlf_and_bom(tmp_path):
    files = {
        "train.tsv": TRAIN,
        "views/image.safetensors": {"feat": torch.tensor([[1.0], [2.0]])},
        "views/image.csv": "\ufeffentity\r\nb\r\na\r\n",
    }
    kg = MultiViewKG.load(write_folder(tmp_path, files))
    assert kg.views("image")[0].flatten().tolist() == [2.0, 1.0]
    assert kg.view_sources("image") == ["", ""]


FEAT = {"feat": torch.ones(2, 3)}
TABLE = "entity,source\na,x\nb,y\n"
ENTITIES = "entity\na\nb\nc\n"
MALFORMED = {
    "two columns": ({"train.tsv": TRAIN + "a\tr\n"}, r"train\.tsv, line 3: .*2 columns: 'a\\tr'"),
    "two columns in the first line": ({"train.tsv": "a\tr\n" + TRAIN}, r"train\.tsv, line 1: "),
    "two columns everywhere": ({"train.tsv": "a\tr\nb\tr\n"}, r"train\.tsv, line 1: .*2 columns"),
    "four columns": ({"train.tsv": TRAIN + "a\tr\tb\tc\n"}, r"train\.tsv, line 3: .*4 columns"),
    "four columns everywhere": ({"train.tsv": "a\tr\tb\tc\n" * 3}, r"train\.tsv, line 1: "),
    "a tab too many": ({"train.tsv": TRAIN + "a\tr\tb\t\n"}, r"train\.tsv, line 3: .*4 columns"),
    "spaces for tabs": ({"train.tsv": "a r b\n"}, r"train\.tsv, line 1: .*1 column: 'a r b'"),
    "a line of spaces": ({"train.tsv": TRAIN + "   \n"}, r"train\.tsv, line 3: .*1 column"),
    "an empty label": ({"train.tsv": TRAIN + "\na\t\tb\n"}, r"train\.tsv, line 4: .*empty"),
    "three empty labels": ({"train.tsv": TRAIN + "\t\t\n"}, r"train\.tsv, line 3: .*empty"),
    "a NUL byte": ({"train.tsv": TRAIN + "a\tr\tb\0\n"}, r"train\.tsv, line 3: .*NUL"),
    "Latin-1": (
        {"train.tsv": TRAIN.encode() + "Malmö\tr\tb\n".encode("latin-1")},
        r"train\.tsv, line 3: expected UTF-8.*0xf6 at column 5",
    ),
    "UTF-16": ({"train.tsv": TRAIN.encode("utf-16")}, r"train\.tsv, line 1: expected UTF-8"),
    "a malformed valid.tsv": (
        {"train.tsv": TRAIN, "valid.tsv": TRAIN + "a\n"},
        r"valid\.tsv, line 3: ",
    ),
    "no train.tsv": ({"valid.tsv": TRAIN}, r"train\.tsv"),
    "a label that entities.tsv lacks": (
        {"train.tsv": TRAIN, "test.tsv": "a\tr\tz\n", "entities.tsv": ENTITIES},
        r"test\.tsv, column tail: .*'z' in row 1",
    ),
    "a relation that relations.tsv lacks": (
        {"train.tsv": TRAIN, "relations.tsv": "relation\nother\n"},
        r"train\.tsv, column relation: 2 rows .*'r'",
    ),
    "an entity twice in entities.tsv": (
        {"train.tsv": TRAIN, "entities.tsv": ENTITIES + "a\n"},
        r"'a'.*more than once",
    ),
    "an entity that no triple has, twice in entities.tsv": (
        {"train.tsv": TRAIN, "entities.tsv": ENTITIES + "d\nd\n"},
        r"'d'.*more than once",
    ),
    "an empty entity in entities.tsv": (
        {"train.tsv": TRAIN, "entities.tsv": "entity\tname\na\tA\n\tB\nb\tB\nc\tC\n"},
        r"entities.*empty",
    ),
    "entities.tsv without a header": (
        {"train.tsv": TRAIN, "entities.tsv": "a\nb\nc\n"},
        r"entities\.tsv, line 1: .*'entity', found 'a'",
    ),
    "entities.tsv with a short line": (
        {"train.tsv": TRAIN, "entities.tsv": "entity\tname\na\tA\nb\nc\tC\n"},
        r"entities\.tsv, line 3: .*2 columns.*found 1: 'b'",
    ),
    "an empty entities.tsv": ({"train.tsv": TRAIN, "entities.tsv": ""}, r"entities\.tsv is empty"),
    "a newer format": (
        {"train.tsv": TRAIN, "kg.json": '{"format": "imvia-graph/kg", "version": 2}'},
        r"kg\.json: format version 2 is newer .*Update imvia-graph",
    ),
    "another format": (
        {"train.tsv": TRAIN, "kg.json": '{"format": "something else"}'},
        r"kg\.json: expected the description of a KG folder",
    ),
    "kg.json that is no JSON": (
        {"train.tsv": TRAIN, "kg.json": "{"},
        r"kg\.json: expected JSON",
    ),
    "kg.json that is a list": ({"train.tsv": TRAIN, "kg.json": "[]"}, r"kg\.json"),
    "kg.json with null for a list": (
        {"train.tsv": TRAIN, "kg.json": '{"modalities": null}'},
        r"kg\.json: .*modalities",
    ),
    "a view table that is missing": (
        {"train.tsv": TRAIN, "views/image.safetensors": FEAT},
        r"views/image\.csv: missing",
    ),
    "a view table of other length": (
        {
            "train.tsv": TRAIN,
            "views/image.safetensors": {"feat": torch.ones(3, 2)},
            "views/image.csv": TABLE,
        },
        r"image\.safetensors holds 3 rows .*image\.csv names 2 views",
    ),
    "views of unknown entities": (
        {
            "train.tsv": TRAIN,
            "views/image.safetensors": {"feat": torch.ones(3, 2)},
            "views/image.csv": "entity,source\na,x\nz,y\nw,y\n",
        },
        r"image\.csv: 2 rows name 2 labels .*first 'z' in row 2",
    ),
    "a view table without a header": (
        {"train.tsv": TRAIN, "views/image.safetensors": FEAT, "views/image.csv": "a,x\nb,y\n"},
        r"image\.csv, line 1: expected a header with the column 'entity'",
    ),
    "a view table with a field too many": (
        {"train.tsv": TRAIN, "views/image.safetensors": FEAT, "views/image.csv": TABLE + "c,x,y\n"},
        r"image\.csv: ",
    ),
    "a view table in Latin-1": (
        {
            "train.tsv": TRAIN,
            "views/image.safetensors": FEAT,
            "views/image.csv": "entity,source\na,é\nb,y\n".encode("latin-1"),
        },
        r"image\.csv: expected a CSV table in UTF-8",
    ),
    "an empty view table": (
        {"train.tsv": TRAIN, "views/image.safetensors": FEAT, "views/image.csv": ""},
        r"image\.csv: expected a CSV table",
    ),
    "features that are garbage": (
        {"train.tsv": TRAIN, "views/image.safetensors": b"garbage" * 9, "views/image.csv": TABLE},
        r"image\.safetensors: expected a safetensors file",
    ),
    "an empty features file": (
        {"train.tsv": TRAIN, "views/image.safetensors": b"", "views/image.csv": TABLE},
        r"image\.safetensors: expected a safetensors file",
    ),
    "features under another name": (
        {
            "train.tsv": TRAIN,
            "views/image.safetensors": {"x": torch.ones(2, 2)},
            "views/image.csv": TABLE,
        },
        r"image\.safetensors: expected a tensor named 'feat', found \['x'\]",
    ),
    "NaN features": (
        {
            "train.tsv": TRAIN,
            "views/image.safetensors": {"feat": torch.tensor([[1.0], [torch.nan]])},
            "views/image.csv": TABLE,
        },
        r"views\['image'\], row 1: a view of 'b' has NaN",
    ),
    "integer features": (
        {
            "train.tsv": TRAIN,
            "views/image.safetensors": {"feat": torch.ones(2, 3, dtype=torch.int64)},
            "views/image.csv": TABLE,
        },
        r"views\['image'\].*floating-point",
    ),
    "flat features": (
        {
            "train.tsv": TRAIN,
            "views/image.safetensors": {"feat": torch.ones(2)},
            "views/image.csv": TABLE,
        },
        r"views\['image'\].*\(views, width\)",
    ),
}


@pytest.mark.parametrize(("files", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_folder_is_a_data_error_that_says_where(files, message, tmp_path):
    with pytest.raises(DataError, match=message):
        ig.load_kg(write_folder(tmp_path, files), "published")


@pytest.mark.parametrize("train", ["", "\n\n", "\ufeff"])
def test_an_empty_train_file_is_a_data_error(train, tmp_path):
    folder = write_folder(tmp_path / "mygraph", {"train.tsv": train})
    with pytest.raises(DataError, match=r"mygraph.*no training triples"):
        MultiViewKG.load(folder)


def test_a_cut_short_features_file_is_a_data_error(tmp_path):
    folder = ring_kg().save(tmp_path)
    path = folder / "views" / "image.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"image\.safetensors.*cannot be read"):
        MultiViewKG.load(folder)


def test_a_large_file_names_the_right_line(tmp_path):
    lines = [f"e{i}\tr\te{i + 1}" for i in range(30_000)]
    lines[23_456] = "e1\tr"
    folder = write_folder(tmp_path, {"train.tsv": "\n".join(lines)})
    with pytest.raises(DataError, match=r"line 23457: .*2 columns"):
        MultiViewKG.load(folder)


def test_labels_survive_a_file_that_is_read_in_several_chunks(tmp_path):
    lines = [f'"e{i}\tr {i % 7}\t#e{(i * 31) % 20_000} ' for i in range(20_000)]
    kg = MultiViewKG.load(write_folder(tmp_path, {"train.tsv": "\r\n".join(lines)}))
    found = [
        f"{kg.entities[h]}\t{kg.relations[r]}\t{kg.entities[t]}" for h, r, t in kg.train.tolist()
    ]
    assert found == lines


def test_str_and_repr_tell_name_and_sizes():
    kg = ring_kg()
    assert kg.title == "the graph 'ring'"
    assert str(kg) == repr(kg)
    expected = "12 entities, 2 relations, 18 train, 3 valid, 3 test, 12 image views, 22 text views"
    assert repr(kg) == f"<MultiViewKG 'ring': {expected}>"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' list of mappings")
def test_views_of_a_folder_stay_on_disk_and_are_mapped(tmp_path):
    views = {"image": ig.Views(torch.rand(70_000, 8), torch.arange(70_000) % 12)}
    ring_kg().replace(views=views).save(tmp_path / "kg")
    kg = ig.MultiViewKG.load(tmp_path / "kg")
    feat, _ = kg.views("image")
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = [line.split()[0] for line in lines if line.endswith("image.safetensors")]
    ranges = [[int(end, 16) for end in place.split("-")] for place in places]
    assert any(start <= feat.data_ptr() < end for start, end in ranges)
