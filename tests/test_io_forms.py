"""The same small graph through every form, in and out; and what is no graph is refused clearly."""

import gzip
import logging
import re
import sys
from collections import Counter
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from helpers import ring_kg, write_folder

import imvia_graph as ig
from imvia_graph import DataError, MultiViewKG, Views, load_kg
from imvia_graph._dgl import dgl
from imvia_graph.io import (
    to_arrays,
    to_dgl,
    to_networkx,
    to_pykeen,
    views_from_array,
    write_kg,
)
from imvia_graph.kg import SPLITS

#: Labels that forms like to break: quotes, escapes, comments, look-alikes of ids, IRIs and numbers.
LABELS = [
    "New York",
    'the "quoted" one',
    "'single'",
    "back\\slash",
    "#hash",
    "100%",
    "%20",
    "Ångström · 東京 · 👩‍🚀",
    "a,b;c|d",
    "http://example.org/a#b",
    "http://example.org/ü?q=%41",
    "<http://example.org/bracketed>",
    "urn:imvia:entity:New%20York",
    "_:blank",
    "null",
    "NaN",
    "12",
    "1.0",
    "{curly} ^caret `tick`",
    "//",
    "mailto:x@y.z",
    "http://[bad",
]
RELATIONS = ["is a", "http://example.org/p", "of", "#1 \"r\" 'é'", "head"]


def awkward_kg(labels=None, relations=None):
    """Each label in train; each relation; valid and test; views of two modalities."""
    labels = LABELS if labels is None else labels
    relations = RELATIONS if relations is None else relations
    n, r = len(labels), len(relations)
    train = [[i, i % r, (i + 1) % n] for i in range(n)] + [[0, 1, 0], [3, 2, 1], [3, 0, 1]]
    return MultiViewKG(
        labels,
        relations,
        torch.tensor(train),
        torch.tensor([[2, 0, 5], [5, 3, 2]]),
        torch.tensor([[4, 1, 7]]),
        {
            "image": Views(torch.randn(5, 3), torch.tensor([0, 0, 3, 9, 9]), list("abcde")),
            "text": Views(torch.randn(2, 2), torch.tensor([1, 20])),
        },
        name="awkward",
    )


#: For layouts whose columns are separated by spaces.
def unspaced_kg():
    labels = [label.replace(" ", "_") for label in LABELS]
    return awkward_kg(labels, [label.replace(" ", "_") for label in RELATIONS])


def labelled(kg):
    """Triples of labels with their numbers, by split."""
    return {
        split: Counter(
            (kg.entities[h], kg.relations[r], kg.entities[t]) for h, r, t in kg.triples(split)
        )
        for split in SPLITS
    }


def views_of(kg):
    """By modality and entity label: the rows of features."""
    found = {}
    for modality in kg.modalities:
        feat, ptr = kg.views(modality)
        for i, label in enumerate(kg.entities):
            if ptr[i] < ptr[i + 1]:
                found[modality, label] = feat[ptr[i] : ptr[i + 1]].tolist()
    return found


def written(kg, folder, form, **options):
    target = folder / "graph"
    write_kg(kg, target, form, **options)
    return target


def one_npy(kg, folder):
    np.save(folder / "g.npy", torch.cat([kg.triples(split) for split in SPLITS]).numpy())
    return folder / "g.npy"


def in_one_file(kg, folder, name):
    write_kg(kg, folder / name)
    return folder / name


def swapped_columns(kg, folder):
    """A wide Parquet table with its own names, columns in another order, and categories."""
    for split, triples in labelled(kg).items():
        rows = list(triples.elements())
        frame = pl.DataFrame(rows, schema=["was", "how", "whom"], orient="row")
        frame = frame.with_columns(pl.col("how").cast(pl.Categorical), n=1.5)
        frame.select("n", "whom", "how", "was").write_parquet(folder / f"{split}.parquet")
    return folder


def hetero_without_splits(kg, folder):
    return kg.per_relation()


def by_path(kg, folder):
    target = written(kg, folder, "csv")
    return {split: target / f"{split}.csv" for split in SPLITS}


#: Form -> (how to put the graph into it, further arguments of load_kg, what it keeps).
FORMS = {
    "KG folder": (lambda kg, f: written(kg, f, "kg"), {}, "splits views order"),
    "OpenKE": (lambda kg, f: written(kg, f, "openke"), {}, "splits order"),
    "MoMoK": (lambda kg, f: written(kg, f, "momok"), {}, "splits order unspaced"),
    "MyGO": (lambda kg, f: written(kg, f, "mygo"), {}, "splits order"),
    "TSV": (lambda kg, f: written(kg, f, "tsv"), {"format": "tsv"}, "splits"),
    "TSV, gzip": (lambda kg, f: written(kg, f, "tsv", compression="gzip"), {}, "splits"),
    "TSV, zstd": (lambda kg, f: written(kg, f, "tsv", compression="zstd"), {}, "splits"),
    "CSV": (lambda kg, f: written(kg, f, "csv"), {}, "splits"),
    "CSV, gzip": (lambda kg, f: written(kg, f, "csv", compression="gzip"), {}, "splits"),
    "CSV, zstd": (lambda kg, f: written(kg, f, "csv", compression="zstd"), {}, "splits"),
    "text": (lambda kg, f: written(kg, f, "text"), {}, "splits unspaced"),
    "Parquet": (lambda kg, f: written(kg, f, "parquet"), {}, "splits"),
    "Parquet by name": (swapped_columns, {"columns": ["was", "how", "whom"]}, "splits"),
    "Parquet by place": (swapped_columns, {"columns": [3, 2, 1]}, "splits"),
    "N-Triples": (lambda kg, f: written(kg, f, "ntriples"), {}, "splits"),
    "N-Triples, gzip": (lambda kg, f: written(kg, f, "ntriples", compression="gzip"), {}, "splits"),
    "Turtle": (lambda kg, f: written(kg, f, "turtle"), {}, "splits"),
    "Turtle, zstd": (lambda kg, f: written(kg, f, "turtle", compression="zstd"), {}, "splits"),
    "npz": (lambda kg, f: written(kg, f, "npz"), {}, "splits order"),
    "dict of paths": (by_path, {}, "splits"),
    "one TSV": (lambda kg, f: in_one_file(kg, f, "g.tsv"), {}, ""),
    "one CSV.gz": (lambda kg, f: in_one_file(kg, f, "g.csv.gz"), {}, ""),
    "one Parquet": (lambda kg, f: in_one_file(kg, f, "g.parquet"), {}, ""),
    "one N-Triples": (lambda kg, f: in_one_file(kg, f, "g.nt"), {}, ""),
    "one Turtle": (lambda kg, f: in_one_file(kg, f, "g.ttl"), {}, ""),
    "npy": (one_npy, "labels", "order"),
    "networkx": (lambda kg, f: to_networkx(kg), {}, "splits order"),
    "DGL, homogeneous": (lambda kg, f: to_dgl(kg, "homogeneous"), "labels", "splits order"),
    "DGL, heterogeneous": (lambda kg, f: to_dgl(kg), "labels", "splits views order"),
    "DGL, per_relation": (hetero_without_splits, "labels", "views order train"),
    "DGL, the graph itself": (lambda kg, f: kg.graph, "labels", "views order train"),
    "numpy arrays": (lambda kg, f: to_arrays(kg), "labels", "splits order"),
    "torch tensors": (lambda kg, f: {s: kg.triples(s) for s in SPLITS}, "labels", "splits order"),
    "PyKEEN": (lambda kg, f: to_pykeen(kg), {}, "splits order pykeen"),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_graph_comes_out_of_every_form(form, tmp_path):
    write, options, keeps = FORMS[form]
    if "pykeen" in keeps:
        pytest.importorskip("pykeen")
    kg = unspaced_kg() if "unspaced" in keeps else awkward_kg()
    if "per_relation" in form or form == "DGL, heterogeneous":
        # A relation called "of" and views cannot both be edge types; the library says so.
        kg = awkward_kg(relations=[label.replace("of", "OF") for label in RELATIONS])
    if options == "labels":
        options = {"entities": kg.entities, "relations": kg.relations}
    again = load_kg(write(kg, tmp_path), "published", split=False, **options)

    expected = labelled(kg)
    if "train" in keeps:
        expected = {**expected, "valid": Counter(), "test": Counter()}
    elif "splits" not in keeps:
        whole = sum(expected.values(), Counter())
        expected = {"train": whole, "valid": Counter(), "test": Counter()}
    if form in ("networkx", "one Turtle", "Turtle", "Turtle, zstd"):
        # RDF and edges with keys hold a triple once.
        expected = {split: Counter(set(triples)) for split, triples in expected.items()}
    assert labelled(again) == expected
    assert set(again.entities) == set(kg.entities)
    if "order" in keeps:
        assert again.entities == kg.entities
        assert again.relations == kg.relations
    assert views_of(again) == (views_of(kg) if "views" in keeps else {})


@pytest.mark.parametrize("form", ["tsv", "csv", "parquet", "ntriples", "turtle", "openke", "mygo"])
def test_writing_what_was_read_gives_the_same_bytes(form, tmp_path):
    first = written(awkward_kg(), tmp_path, form)
    (tmp_path / "again").mkdir()
    second = written(load_kg(first, "published", format=form), tmp_path / "again", form)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_what_a_form_does_not_carry_is_said(tmp_path):
    kg = awkward_kg()
    lost = " ".join(write_kg(kg, tmp_path / "g.csv"))
    assert "7 views of 2 modalities (image, text)" in lost
    assert "splits are not kept" in lost
    assert write_kg(kg, tmp_path / "kg") == []


@pytest.mark.parametrize("form", ["tsv", "csv", "parquet", "npz", "openke", "momok", "mygo", "kg"])
def test_triples_that_only_filter_and_unused_relations_are_carried_or_said_to_be_lost(
    form, tmp_path
):
    kg = MultiViewKG(
        ["a", "b", "c"],
        ["r", "never"],
        torch.tensor([[0, 0, 1], [1, 0, 2], [2, 0, 0]]),
        known=torch.tensor([[0, 0, 2]]),
    )
    lost = " ".join(write_kg(kg, tmp_path / "kg", form))
    again = load_kg(tmp_path / "kg", "published", format=form, split=False)
    assert len(again.known) == int("1 triples that are in no split" not in lost)
    assert len(again.relations) == 2 - ("1 relations without a triple" in lost)
    assert (lost == "") == (form == "kg")


def test_a_kg_folder_over_another_form_leaves_nothing_of_that(tmp_path):
    kg = MultiViewKG.from_labels([("a", "r", "b")], test=[("b", "r", "a")])
    write_kg(kg, tmp_path / "g", "csv")
    (tmp_path / "g" / "notes.md").write_text("mine")
    write_kg(kg, tmp_path / "g", "kg", overwrite=True)
    names = {path.name for path in (tmp_path / "g").iterdir()}
    assert names == {
        *("kg.json", "entities.tsv", "relations.tsv", "notes.md"),
        *("train.tsv", "valid.tsv", "test.tsv"),
    }
    assert labelled(load_kg(tmp_path / "g", "published")) == labelled(kg)


# -- recognising ----------------------------------------------------------------------------------

ROWS = [("a", "r", "b"), ("b", "r", "c"), ("c", "s", "a")]


def text(separator="\t", header="", rows=ROWS, end="\n"):
    lines = [header] if header else []
    return end.join([*lines, *(separator.join(row) for row in rows)]) + end


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("g.tsv", text(), {}),
        ("g.tsv", text(end="\r\n"), {}),
        ("g.tsv", text(header="head\trelation\ttail"), {}),
        ("g.tsv", text(header="Subject\tPredicate\tObject"), {}),
        ("g.tsv", text(header="source\trel\ttarget"), {}),
        ("g.tsv", text(header=":START_ID\t:TYPE\t:END_ID"), {}),
        ("g.tsv", text(header="head_entity\trelation\ttail_entity"), {}),
        ("g.tsv", text(header="Entity 1\tRelation\tEntity 2"), {}),
        ("g.tsv", text(header="x\ty\tz"), {"header": True}),
        ("g.tsv", "\n\n" + text() + "\n\n", {}),
        ("g.csv", text(","), {}),
        ("g.csv", text(",", '"h","r","t"'), {}),
        ("g.csv", text(";"), {"separator": ";"}),
        ("g.csv", "1,t,r,h\n" + "".join(f"2,{t},{r},{h}\n" for h, r, t in ROWS), {}),
        ("g.dat", text("|"), {"format": "text", "separator": "|"}),
        ("g.txt", text(), {}),
        ("g.txt", text("  ", end=" .\n"), {}),
        ("g.txt", text(" ", end="\r\n"), {}),
        ("g.tsv", "\ufeff" + text(), {}),
        ("g.txt", "\ufeff" + text(" "), {}),
        ("g.csv", "\ufeff" + text(",", '"h","r","t"'), {}),
        ("g.csv", "\ufeff" + text(",", rows=[("1", *r, "") for r in ROWS]), {"columns": [1, 2, 3]}),
        ("g.nt", "\ufeff" + "".join(f"<x:{h}> <x:{r}> <x:{t}> .\n" for h, r, t in ROWS), {}),
        ("g.nt.gz", "\ufeff" + "".join(f"<x:{h}> <x:{r}> <x:{t}> .\n" for h, r, t in ROWS), {}),
        ("g.ttl", "\ufeff" + "".join(f"<x:{h}> <x:{r}> <x:{t}> .\n" for h, r, t in ROWS), {}),
        ("g.csv", text(",", "id,source,relation,target,w", [("1", *r, "2") for r in ROWS]), {}),
        ("g.csv", text(",", rows=[("1", *r, "") for r in ROWS]), {"columns": [1, 2, 3]}),
        ("g.nt", "".join(f"<x:{h}> <x:{r}> <x:{t}> .\n" for h, r, t in ROWS), {}),
    ],
)
def test_a_file_is_recognised_or_can_be_told(name, content, options, tmp_path):
    if content.startswith("1,t,r,h"):
        options = {"columns": ["h", "r", "t"], "header": True}
    packed = gzip.compress(content.encode()) if name.endswith(".gz") else content
    write_folder(tmp_path, {name: packed})
    kg = load_kg(tmp_path / name, split=False, **options)
    strip = {label: label.removeprefix("x:") for label in kg.entities + kg.relations}
    found = [
        (strip[kg.entities[h]], strip[kg.relations[r]], strip[kg.entities[t]])
        for h, r, t in kg.train
    ]
    assert found == ROWS


@pytest.mark.parametrize(
    "name", ["val.tsv", "dev.tsv", "validation.csv", "valid.tsv.gz", "VAL.TSV"]
)
def test_splits_beside_a_train_tsv_are_read_under_any_of_their_names(name, tmp_path):
    (tmp_path / "train.tsv").write_text(text())
    (tmp_path / "test.tsv").write_text("c\tr\ta\n")
    valid = b"a\tr\tc\n" if "tsv" in name.lower() else b"a,r,c\n"
    (tmp_path / name).write_bytes(gzip.compress(valid) if name.endswith(".gz") else valid)
    kg = load_kg(tmp_path, "published")
    assert set(labelled(kg)["valid"]) == {("a", "r", "c")}
    assert set(labelled(kg)["test"]) == {("c", "r", "a")}
    assert len(kg.train) == 3


def test_a_split_that_a_kg_folder_would_not_read_is_an_error(tmp_path):
    kg = MultiViewKG.from_labels([("a", "r", "b")], test=[("b", "r", "a")])
    folder = kg.save(tmp_path)
    (folder / "kg.json").unlink()
    (folder / "valid.tsv").rename(folder / "val.tsv")
    with pytest.raises(DataError, match=r"val\.tsv: a KG folder's valid triples are in valid\.tsv"):
        load_kg(tmp_path, "published")


@pytest.mark.parametrize("name", ["train.tsv", "train.csv", "train2id.txt"])
def test_a_folder_that_holds_train_alone_is_split_where_shares_are_given(name, tmp_path):
    rows = [(f"e{i}", "r", f"e{j}") for i in range(10) for j in range(i)]
    kg = MultiViewKG.from_labels(rows)
    form = {"train.tsv": "kg", "train.csv": "csv", "train2id.txt": "openke"}[name]
    write_kg(kg, tmp_path / "g", form)
    whole = load_kg(tmp_path / "g", "published")
    assert (len(whole.train), len(whole.valid), len(whole.test)) == (45, 0, 0)
    parts = load_kg(tmp_path / "g", "published", split=(0.6, 0.2, 0.2))
    assert (len(parts.train), len(parts.valid), len(parts.test)) == (27, 9, 9)
    assert "split into 27 train, 9 valid, 9 test (seed 0)" in parts.notes[-1]
    assert sum(part.total() for part in labelled(parts).values()) == 45


@pytest.mark.parametrize("kind", ["folder", "graph"])
def test_a_source_with_splits_of_its_own_is_not_split_again(kind, tmp_path):
    kg = ring_kg()
    source = kg.save(tmp_path / "kg") if kind == "folder" else kg
    with pytest.raises(DataError, match=r"split: the source has splits of its own \(train, valid"):
        ig.load_kg(source, None, split=(0.5, 0.25, 0.25))
    assert len(ig.load_kg(source, None, split=False).test) == len(kg.test)


def test_a_graph_is_split_as_told_and_takes_no_option_of_files():
    rows = [(f"e{i}", "r", f"e{j}") for i in range(10) for j in range(i)]
    kg = MultiViewKG.from_labels(rows)
    assert load_kg(kg, None) is kg
    parts = load_kg(kg, "published", split=(0.6, 0.2, 0.2))
    assert (len(parts.train), len(parts.valid), len(parts.test)) == (27, 9, 9)
    assert load_kg(parts, "published") is parts
    with pytest.raises(DataError, match="columns: a MultiViewKG has no such option"):
        load_kg(kg, columns=[0, 2, 1])


@pytest.mark.parametrize("owners", ["ids", "rows"])
def test_ids_that_are_labels_of_other_entities_are_warned_of(owners, caplog):
    kg = MultiViewKG.from_labels([("2", "r", "0"), ("0", "r", "1")])
    feat = torch.rand(3, 4)
    given = {"entity": torch.arange(3)} if owners == "ids" else {}
    with caplog.at_level("WARNING"):
        views_from_array(feat, kg, **given)
    assert "0 is read as an id, that of the entity with the label '2'" in caplog.text
    caplog.clear()
    in_order = MultiViewKG.from_labels([("0", "r", "1"), ("1", "r", "2")])
    others = MultiViewKG.from_labels([("7", "r", "8"), ("8", "r", "9")])
    for graph in (in_order, others):
        views_from_array(feat, graph, **given)
    views_from_array(feat, kg, entity=["0", "1", "2"])
    assert caplog.text == ""


def test_it_says_what_it_took_the_source_for(tmp_path, caplog):
    write_folder(tmp_path, {"g.csv": text(",")})
    with caplog.at_level(logging.INFO, logger="imvia_graph"):
        kg = load_kg(tmp_path / "g.csv", split=False)
    assert kg.notes == ["Read as one file of label triples, CSV."]
    assert "one file of label triples, CSV" in caplog.text


def test_ids_of_an_array_are_the_ids_of_the_graph():
    kg = load_kg(np.array([[4, 1, 0], [2, 0, 4]]), split=False)
    assert kg.train.tolist() == [[4, 1, 0], [2, 0, 4]]
    assert kg.entities == ["0", "1", "2", "3", "4"]


def test_arrays_and_lists_may_hold_labels():
    for rows in (np.array(ROWS), ROWS, pl.DataFrame(ROWS, schema=["h", "r", "t"], orient="row")):
        kg = load_kg(rows, split=False)
        assert kg.entities == ["a", "b", "c"]
        assert kg.relations == ["r", "s"]


def test_pandas_frames_are_read_as_polars_frames_are():
    pandas = pytest.importorskip("pandas")
    rows = [("a", 1, "b"), ("b", 2, "c")]
    frame = pandas.DataFrame(rows, columns=["head", "relation", "tail"])
    kg = load_kg(frame, split=False)
    assert labelled(kg) == labelled(
        load_kg(pl.DataFrame(rows, schema=list(frame.columns), orient="row"), split=False)
    )
    assert kg.relations == ["1", "2"]
    other = frame.rename(columns={"head": "who", "tail": "whom", "relation": "how"})
    assert labelled(load_kg({"train": other}, columns=["who", "how", "whom"])) == labelled(kg)
    frame.loc[1, "tail"] = None
    with pytest.raises(DataError):
        load_kg(frame)


def test_networkx_graphs_say_the_relation_by_key_or_attribute():
    keyed = nx.MultiDiGraph()
    keyed.add_edge("a", "b", key="r")
    assert load_kg(keyed, split=False).relations == ["r"]
    plain = nx.DiGraph()
    plain.add_edge(1, 2, kind="likes", weight=3)
    kg = load_kg(plain, split=False, relation_attribute="kind")
    assert (kg.entities, kg.relations) == (["1", "2"], ["likes"])
    with pytest.raises(DataError, match=r"have no relation.*relation_attribute"):
        load_kg(plain)
    with pytest.raises(DataError, match=r"undirected Graph.*to_directed"):
        load_kg(nx.Graph([("a", "b")]))


@pytest.mark.parametrize("none", [None, False, "none", " None "])
def test_no_split_may_be_said_in_several_ways(none):
    frame = pl.DataFrame(ROWS * 20, ["h", "r", "t"], orient="row")
    assert len(load_kg(frame, split=none).train) == len(frame)


def test_shares_may_be_given_as_the_command_line_takes_them():
    rows = [(f"e{i}", "r", f"e{j}") for i in range(9) for j in range(9)]
    frame = pl.DataFrame(rows, ["h", "r", "t"], orient="row")
    expected = load_kg(frame, split=[0.7, 0.2, 0.1])
    for split in ("0.7,0.2,0.1", " 0.7, 0.2, 0.1", np.array([0.7, 0.2, 0.1])):
        assert labelled(load_kg(frame, split=split)) == labelled(expected)


@pytest.mark.parametrize("split", [0.8, [80, 10, 10], "80/10/10", "all", [0.5, 0.5], [1, 1, 1], {}])
def test_what_is_no_split_is_told_by_its_name(split):
    frame = pl.DataFrame(ROWS, ["h", "r", "t"], orient="row")
    with pytest.raises(DataError, match=r"^split: expected three numbers .* 'none' or False"):
        load_kg(frame, split=split)


def edges(*splits, relation="r"):
    """A graph with an edge a split; None leaves the attribute out."""
    graph = nx.MultiDiGraph()
    for i, split in enumerate(splits):
        told = {} if split is None else {"split": split}
        graph.add_edge(f"a{i}", f"a{i + 1}", relation=relation, **told)
    return graph


@pytest.mark.parametrize("name", ["valid", "val", "dev", "validation"])
def test_networkx_edges_say_their_split_as_files_do(name):
    kg = load_kg(edges("train", "train", name, "test"))
    assert [len(kg.triples(split)) for split in SPLITS] == [2, 1, 1]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (("train", "prod", "test"), r"'split' of 'a1' -> 'a2' is 'prod', but another .* 'train'"),
        (("train", None), r"'split' of 'a1' -> 'a2' is missing"),
        ((7, "train"), r"'split' of 'a0' -> 'a1' is 7, but another edge has 'train'"),
    ],
)
def test_a_networkx_graph_that_is_split_in_part_is_a_data_error(splits, message):
    with pytest.raises(DataError, match=message):
        load_kg(edges(*splits))


def test_a_networkx_attribute_that_tells_no_splits_is_none_of_ours():
    assert len(load_kg(edges("left", None, "right"), split=False).train) == 3


@pytest.mark.parametrize("relation", [None, float("nan")])
def test_a_networkx_edge_without_relation_is_a_data_error(relation):
    with pytest.raises(DataError, match=r"the edge 'a0' -> 'a1' has no relation"):
        load_kg(edges(None, relation=relation))


def test_heterogeneous_dgl_graphs_call_entities_by_type_and_id():
    graph = dgl.heterograph(
        {
            ("user", "rates", "film"): (torch.tensor([0, 1]), torch.tensor([0, 0])),
            ("film", "like", "film"): (torch.tensor([0]), torch.tensor([1])),
            ("user", "like", "user"): (torch.tensor([0]), torch.tensor([1])),
        }
    )
    kg = load_kg(graph, split=False)
    assert set(kg.entities) == {"user/0", "user/1", "film/0", "film/1"}
    assert set(kg.relations) == {"rates", "film/like/film", "user/like/user"}
    named = load_kg(graph, split=False, entities={"user": ["Ann", "Bob"], "film": ["X", "Y"]})
    assert ("Bob", "rates", "X") in labelled(named)["train"]


def test_the_one_edge_type_of_a_dgl_graph_is_a_relation_if_it_has_a_name():
    kg = MultiViewKG.from_labels([("a", "r", "b")], test=[("b", "r", "a")])
    again = load_kg(to_dgl(kg), "published", entities=kg.entities)
    assert labelled(again) == labelled(kg)


def test_dgl_masks_may_lack_validation_and_leave_edges_out():
    graph = dgl.graph((torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 0])))
    graph.edata["rel"] = torch.zeros(4, dtype=torch.int64)
    graph.edata["train_mask"] = torch.tensor([True, True, False, False])
    graph.edata["test_mask"] = torch.tensor([False, False, True, False])
    kg = load_kg(graph, "published")
    assert (len(kg.train), len(kg.valid), kg.test.tolist()) == (2, 0, [[2, 0, 3]])
    assert "1 edges are in no mask of train, test and are left out." in kg.notes
    del graph.edata["train_mask"]
    assert len(load_kg(graph, split=False).train) == 4


@pytest.mark.parametrize("reverse", [True, False])
def test_reverse_edges_of_dgls_own_data_sets_are_left_out(reverse):
    from dgl.data.knowledge_graph import build_knowledge_graph

    parts = {"train": [[0, 0, 1], [3, 0, 2], [1, 1, 2]], "valid": [[2, 0, 3]], "test": [[0, 1, 3]]}
    arrays = [torch.tensor(part).numpy() for part in parts.values()]
    graph, found = build_knowledge_graph(4, 2, *arrays, reverse=reverse)
    names = ("train_edge_mask", "valid_edge_mask", "test_edge_mask")
    names = ("etype", "ntype", *names, "train_mask", "val_mask", "test_mask")
    for name, value in zip(names, found, strict=True):
        if name != "ntype":
            graph.edata[name] = torch.as_tensor(value)
    kg = load_kg(graph, "published")
    assert kg.relations == ["0", "1"]
    assert {split: kg.triples(split).tolist() for split in parts} == parts
    assert ("5 edges" in " ".join(kg.notes)) == reverse


def test_homogeneous_dgl_graph_without_relations_is_an_error():
    with pytest.raises(DataError, match=r"have no relation.*relation_attribute"):
        load_kg(dgl.graph((torch.tensor([0]), torch.tensor([1]))))


def test_the_releases_own_files_are_read_as_they_are(tmp_path):
    """A few lines of each, as they stand in the repositories."""
    momok = {
        "entity2id.txt": "<http://d/A> 0\n<http://d/B_(x)> 1\n",
        "relation2id.txt": "<http://d/r> 0\n",
        "train.txt": "<http://d/A> <http://d/r> <http://d/B_(x)> .\n",
        "valid.txt": "<http://d/B_(x)> <http://d/r> <http://d/A> .\n",
    }
    kg = load_kg(write_folder(tmp_path / "momok", momok), "published")
    assert (kg.train.tolist(), kg.valid.tolist()) == ([[0, 0, 1]], [[1, 0, 0]])
    assert "MoMoK" in kg.notes[0]
    marked = {name: "\ufeff" + content for name, content in momok.items()}
    again = load_kg(write_folder(tmp_path / "marked", marked), "published")
    assert (again.entities, again.relations) == (kg.entities, kg.relations)
    assert (again.train.tolist(), again.valid.tolist()) == ([[0, 0, 1]], [[1, 0, 0]])
    release = {  # DB15K: labels that are their own ids
        "entities.txt": "0\n1\n2\n",
        "relations.txt": "0\n1\n",
        "train.txt": "2\t1\t0\n0\t0\t1\n",
    }
    kg = load_kg(write_folder(tmp_path / "db15k", release), "published")
    assert kg.train.tolist() == [[2, 1, 0], [0, 0, 1]]
    mkg_w = {  # MKG-W: entity2id.txt in place of entities.txt
        "entity2id.txt": "http://w/Q1 0\nhttp://w/Q2 1\n",
        "relations.txt": "0\n",
        "train.txt": "1\t0\t0\n",
    }
    kg = load_kg(write_folder(tmp_path / "mkg-w", mkg_w), "published")
    assert labelled(kg)["train"] == Counter([("http://w/Q2", "0", "http://w/Q1")])
    mkg_y = {"entities.txt": "A\nB\n", "train.txt": "1\t2\t0\n"}  # no relations.txt
    kg = load_kg(write_folder(tmp_path / "mkg-y", mkg_y), "published")
    assert kg.train.tolist() == [[1, 2, 0]]
    assert kg.relations == ["0", "1", "2"]


def test_literals_are_left_out_or_become_numbers_or_texts(tmp_path):
    turtle = """
    @prefix e: <http://e/> . @prefix xsd: <http://www.w3.org/2001/XMLSchema#> .
    e:a e:knows e:b ; e:age 30 ; e:about "Hello"@en, "Hallo"@de .
    e:b e:knows e:c ; e:age 50 ; e:height "1.5"^^xsd:decimal .
    e:z e:age 7 .
    """
    path = write_folder(tmp_path, {"g.ttl": turtle}) / "g.ttl"
    kg = load_kg(path, split=False)
    assert kg.modalities == []
    assert "6 literals, of 3 entities, are left out" in " ".join(kg.notes)
    kg = load_kg(path, split=False, literals="numbers")
    feat, ptr = kg.views("number")
    assert kg.entities == ["http://e/a", "http://e/b", "http://e/c"]
    assert ptr.tolist() == [0, 1, 2, 2]
    assert feat.tolist() == [[-1, 1, 0, 0], [1, 1, 0, 1]]  # age, height: number, known
    assert "http://e/age, http://e/height" in " ".join(kg.notes)
    texts = ig.io.read_literals(path, kg)
    assert (texts.entity.tolist(), texts.source) == ([0, 0], ["Hello", "Hallo"])
    assert ig.io.read_literals(path, kg, language="en").source == ["Hello"]


# -- bad input ------------------------------------------------------------------------------------

GZIPPED = gzip.compress(text(rows=ROWS * 5000).encode(), mtime=0)
BAD_FILES = {
    "no text": ("g.tsv", b"\x89PNG\r\n\x1a\n\x00\xff", {}, r"g\.tsv, line 1.*UTF-8"),
    "a NUL": ("g.tsv", b"a\tr\tb\nc\tr\0\td\n", {}, r"g\.tsv, line 2.*NUL"),
    "too few": ("g.tsv", "a\tr\tb\n\na\tr\n", {}, r"g\.tsv, line 3.*three.*found 2 columns"),
    "too many": ("g.tsv", "a\tr\tb\na\tr\tb\tc\n", {}, r"g\.tsv, line 2.*three.*found 4 columns"),
    "empty label": ("g.tsv", "a\tr\tb\na\t\tb\n", {}, r"g\.tsv, line 2.*empty one"),
    "three empty labels": ("g.tsv", "a\tr\tb\n\t\t\n", {}, r"g\.tsv, line 2.*empty one"),
    "too few in CSV": ("g.csv", 'a,r,b\n"a,r",b\n', {}, r"g\.csv, line 2.*found 2 columns"),
    "too many in CSV": ("g.csv", "a,r,b\na,b,r,b\n", {}, r"g\.csv, line 2.*found 4 columns"),
    "a wide row too short": (
        "g.csv",
        "id,h,r,t,w\n1,a,r,b,\n2,a,r,b\n",
        {},
        r"g\.csv, line 3: expected 5 columns.*found 4",
    ),
    "too few in text": ("g.txt", "a r b .\na r .\n", {}, r"g\.txt, line 2.*found 2 columns"),
    "too many in text": ("g.txt", "a r b\na r b c\n", {}, r"g\.txt, line 2.*found 4 columns"),
    "wide without columns": ("g.csv", "1,2,3,4\n", {}, r"line 1.*found 4 columns.*columns="),
    "no such column": ("g.csv", "a,r,b\n", {"columns": [0, 1, 5]}, r"no column 5.*0 to 2"),
    "a column twice": ("g.csv", "a,r,b\n", {"columns": [0, 1, 1]}, "three different.*g.csv"),
    "no such name": (
        "g.csv",
        "a,r,b\n",
        {"columns": ["h", "r", "t"]},
        r"line 1.*column 'h' in the header",
    ),
    "empty": ("g.tsv", "", {}, r"g\.tsv is empty"),
    "blank": ("g.tsv", "\n\n", {}, r"g\.tsv is empty"),
    "empty gzip": ("g.tsv.gz", gzip.compress(b""), {}, r"g\.tsv\.gz is empty"),
    "a gzip that ends early": ("g.tsv.gz", GZIPPED[: len(GZIPPED) // 2], {}, r"truncated"),
    "a gzip without its end": ("g.tsv.gz", GZIPPED[:-4], {}, r"truncated"),
    "an N-Triples gzip that ends early": ("g.nt.gz", GZIPPED[:-4], {}, r"g\.nt\.gz"),
    "no Parquet": ("g.parquet", b"PAR1 but not really", {}, r"g\.parquet: expected a Parquet"),
    "no npz": ("g.npz", b"PK but not really", {}, r"g\.npz: expected an npz"),
    "no N-Triples": (
        "g.nt",
        "<a:b> <c:d> <e:f> .\n<a:b> <c:d> .\n",
        {},
        r"g\.nt, line 2: expected RDF",
    ),
    "only literals": ("g.nt", '<a:b> <c:d> "e" .\n', {}, r"only literals"),
    "unknown ending": ("g.xyz", "a\tr\tb\n", {}, r"is not clear.*format="),
    "an option of another form": ("g.tsv", "a\tr\tb\n", {"literals": "numbers"}, r"no such option"),
    "no such format": ("g.tsv", "a\tr\tb\n", {"format": "xls"}, r"format: expected one of"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_a_data_error_that_says_where_and_what_to_do(case, tmp_path):
    name, content, options, message = BAD_FILES[case]
    write_folder(tmp_path, {name: content})
    with pytest.raises(DataError, match=message):
        load_kg(tmp_path / name, **options)


BAD_FOLDERS = {
    "OpenKE count that lies": (
        {"entity2id.txt": "3\na 0\nb 1\n", "relation2id.txt": "1\nr 0\n", "train2id.txt": "0\n"},
        r"entity2id\.txt, line 1.*announces 3 lines, but 2",
    ),
    "OpenKE triple count that lies": (
        {
            "entity2id.txt": "2\na 0\nb 1\n",
            "relation2id.txt": "1\nr 0\n",
            "train2id.txt": "2\n0 1 0\n",
        },
        r"train2id\.txt, line 1.*announces 2 lines, but 1",
    ),
    "OpenKE id out of range": (
        {
            "entity2id.txt": "2\na 0\nb 1\n",
            "relation2id.txt": "1\nr 0\n",
            "train2id.txt": "1\n0 2 0\n",
        },
        r"train2id\.txt, line 2.*tail id 2 is out of range",
    ),
    "OpenKE duplicated label": (
        {
            "entity2id.txt": "2\na 0\na 1\n",
            "relation2id.txt": "1\nr 0\n",
            "train2id.txt": "1\n0 1 0\n",
        },
        r"'a' occurs more than once",
    ),
    "MoMoK unknown label": (
        {"entity2id.txt": "a 0\nb 1\n", "relation2id.txt": "r 0\n", "train.txt": "a r c .\n"},
        r"train\.txt, column tail.*first 'c' in row 1",
    ),
    "MoMoK missing id": (
        {"entity2id.txt": "a 0\nb 2\n", "relation2id.txt": "r 0\n", "train.txt": "a r b .\n"},
        r"entity2id\.txt.*1 is missing",
    ),
    "MyGO id out of range": (
        {"entities.txt": "a\nb\n", "relations.txt": "r\n", "train.txt": "0\t0\t2\n"},
        r"train\.txt, triple 1: the tail id 2 is out of range",
    ),
    "MyGO blank label": (
        {"entities.txt": "a\n\nb\n", "relations.txt": "r\n", "train.txt": "0\t0\t1\n"},
        r"entities\.txt, line 2.*blank",
    ),
    "two train files": (
        {"train.csv": "a,r,b\n", "train.txt": "a r b\n"},
        r"train\.csv, train\.txt",
    ),
    "nothing": ({"readme.md": "hi"}, r"expected train\.tsv.*found readme\.md"),
    "duplicated entity": (
        {"train.tsv": "a\tr\tb\n", "entities.tsv": "entity\na\nb\na\n"},
        r"'a' occurs more than once",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_a_data_error_that_says_where(case, tmp_path):
    files, message = BAD_FOLDERS[case]
    with pytest.raises(DataError, match=message):
        load_kg(write_folder(tmp_path / "kg", files))


@pytest.mark.parametrize(
    "name", ["train.tsv", "entities.tsv", "kg.json", "views/image.safetensors", "views/image.csv"]
)
def test_a_link_that_leaves_the_folder_is_refused(name, tmp_path):
    kg = MultiViewKG.from_labels(ROWS, views={"image": (torch.ones(1, 2), ["a"])})
    folder = kg.save(tmp_path / "kg")
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match=rf"{name} leaves the folder.*outside"):
        load_kg(folder)


def test_a_folder_that_is_a_link_itself_is_read(tmp_path):
    MultiViewKG.from_labels(ROWS).save(tmp_path / "kg")
    (tmp_path / "link").symlink_to(tmp_path / "kg")
    assert load_kg(tmp_path / "link").entities == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 2), dtype=int), r"train: expected triples of shape \(n, 3\)"),
        (np.zeros((3, 3)), r"train: expected ids \(integers\) or labels"),
        (torch.tensor([[0, -1, 2]]), r"Expected ids of 0 or more"),
        ({"test": np.zeros((1, 3), dtype=int)}, r"with the key train .* received 'test'"),
        ({"train": [[0, 0, 1]], "prod": []}, r"the key 'prod'"),
        ({"train": [[0, 0, 1]], "test": [["a", "r", "b"]]}, r"some splits hold ids"),
        (42, r"received int"),
        (np.array([[10**15, 0, 7]]), r"Ids of entities go up to 1,000,000,000,000,000, but only 2"),
        ([[0, 10**15, 1]], r"Ids of relations go up to .* numbers are labels, pass them as text"),
        (nx.MultiDiGraph(), r"no edges"),
        ("/nowhere/at/all", r"neither a file, a folder nor a data set"),
    ],
)
def test_what_is_no_graph_is_a_data_error(source, message):
    with pytest.raises(DataError, match=message):
        load_kg(source)


@pytest.mark.parametrize(
    ("form", "label"),
    [
        ("tsv", "a\tb"),
        ("text", "a b"),
        ("momok", "a b"),
        ("openke", " a"),
        ("mygo", "a "),
        ("kg", "a\nb"),
    ],
)
def test_a_label_that_a_form_cannot_carry_stops_writing(form, label, tmp_path):
    kg = MultiViewKG.from_labels([(label, "r", "b")])
    with pytest.raises(DataError, match=r"1 labels"):
        write_kg(kg, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unless_told(tmp_path):
    kg = MultiViewKG.from_labels(ROWS)
    path = tmp_path / "g.tsv"
    write_kg(kg, path)
    with pytest.raises(DataError, match=r"already exists"):
        write_kg(kg, path)
    write_kg(kg, path, overwrite=True)


@pytest.mark.parametrize("old", ["kg", "openke", "momok", "mygo", "csv", "tsv", "turtle", "npz"])
@pytest.mark.parametrize("new", ["kg", "openke", "momok", "mygo", "tsv", "parquet", "text", "npz"])
def test_the_graph_that_was_in_a_folder_is_gone_when_overwritten(old, new, tmp_path):
    before = MultiViewKG.from_labels([("x", "y", "z")], [("x", "y", "x")], [("z", "y", "x")])
    before = before.replace(entity_names=["X", "Z"])
    write_kg(before, tmp_path, old, compression="gzip" if old in ("csv", "turtle") else None)
    (tmp_path / "readme.md").write_text("mine")
    kg = MultiViewKG.from_labels(ROWS)
    write_kg(kg, tmp_path, new, overwrite=True)
    again = load_kg(tmp_path, "published", split=False)
    assert labelled(again) == labelled(kg)
    assert again.entity_names == kg.entity_names
    assert (tmp_path / "readme.md").read_text() == "mine"


def test_overwriting_costs_neither_a_graph_nor_views_that_cannot_be_replaced(tmp_path):
    old = MultiViewKG.from_labels(ROWS, views={"image": (torch.ones(1, 2), ["a"])})
    old.save(tmp_path / "kg")
    with pytest.raises(DataError, match=r"KG folder with views, which the format tsv"):
        write_kg(old, tmp_path / "kg", "tsv", overwrite=True)
    write_kg(old, tmp_path / "tsv", "tsv")
    with pytest.raises(DataError, match="1 labels"):
        write_kg(
            MultiViewKG.from_labels([("a b", "r", "c")]), tmp_path / "tsv", "momok", overwrite=True
        )
    for folder in ("kg", "tsv"):
        assert labelled(load_kg(tmp_path / folder)) == labelled(old)


@pytest.fixture(params=[None, 2, 5_000], ids=["one table", "many parts", "large parts"])
def numbering(request, monkeypatch):
    """The module that numbers labels, as it does for small graphs and for large ones."""
    from imvia_graph import _labels

    if request.param is not None:
        monkeypatch.setattr(_labels, "_LARGE", request.param)
        monkeypatch.setattr(_labels, "_SAMPLE", 1)
        monkeypatch.setattr(_labels, "_PART", request.param)
        monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    return _labels


@pytest.mark.parametrize(
    "hashes", [[7], [0, 1]], ids=["one hash", "the hash that marks free slots"]
)
def test_labels_of_one_hash_are_told_apart(hashes, numbering, monkeypatch):
    """The numbering is exact even if the hash is as bad as can be."""

    def bad_hash(labels):
        return pl.Series([hashes[ord(x[0]) % len(hashes)] for x in labels], dtype=pl.UInt64)

    monkeypatch.setattr(pl.Series, "hash", bad_hash)
    frame = pl.DataFrame({"head": ["b", "a"], "relation": ["r", "r"], "tail": ["a", "c"]})
    entities, relations, triples = numbering.index_triples([frame])
    assert (entities.to_list(), relations.to_list()) == (["b", "a", "c"], ["r"])
    assert triples[0].tolist() == [[0, 0, 1], [1, 0, 2]]
    assert numbering.encode_labels(["c", "b"], entities, "here").tolist() == [2, 0]
    assert numbering.are_distinct(entities)
    assert not numbering.are_distinct(pl.Series(["a", "c", "a"]))


@pytest.mark.parametrize("labels", [1, 5, 300, 20_000])
@pytest.mark.parametrize("common", [0.0, 0.9])
def test_labels_are_numbered_as_a_loop_would(labels, common, numbering):
    random = np.random.default_rng(0)
    ids = random.integers(0, labels, (9_000, 3))
    ids[random.random(ids.shape) < common] = labels // 2
    rows = [[f"label {id}" for id in row] for row in ids.tolist()]
    frame = pl.DataFrame(rows, schema=["head", "relation", "tail"], orient="row")
    entities: dict[str, int] = {}
    relations: dict[str, int] = {}
    expected = [
        [
            entities.setdefault(head, len(entities)),
            relations.setdefault(relation, len(relations)),
            entities.setdefault(tail, len(entities)),
        ]
        for head, relation, tail in rows
    ]
    found, kinds, parts = numbering.index_triples([frame[:4_000], frame[4_000:]])
    assert found.to_list() == list(entities)
    assert kinds.to_list() == list(relations)
    assert torch.cat(parts).tolist() == expected
    assert [len(part) for part in parts] == [4_000, 5_000]


def test_loops_are_compiled_where_nothing_can_be_cached(monkeypatch):
    import numba

    from imvia_graph._kernels import _compile, labels

    compile_plainly = numba.njit

    def refuse(cache=False, **options):
        if cache:
            raise RuntimeError("no locator available")
        return compile_plainly(**options)

    monkeypatch.setattr(numba, "njit", refuse)
    counts = np.zeros(2, np.int64)
    cells = np.array([[0], [2**63], [2**63 + 5]], np.uint64)
    _compile.compiled()(labels.count.py_func)(0, 3, cells, np.uint64(63), counts)
    assert counts.tolist() == [1, 2]


def test_paths_are_not_patterns(tmp_path):
    path = tmp_path / "a[1]*.tsv"
    path.write_text(text())
    assert load_kg(Path(path), split=False).num_entities == 3
    kg = MultiViewKG.from_labels(
        ROWS, views={"im[a]ge*": Views(torch.ones(1, 2), torch.tensor([0]), ["a?.png"])}
    )
    again = load_kg(kg.save(tmp_path / "a[1]*?"))
    assert (again.modalities, again.view_sources("im[a]ge*")) == (["im[a]ge*"], ["a?.png"])


@pytest.mark.parametrize(("name", "separator"), [("g.csv", ","), ("g.tsv", "\t")])
def test_an_empty_last_cell_does_not_make_reading_slow(name, separator, monkeypatch, tmp_path):
    monkeypatch.setattr("imvia_graph._tables._slow", None)
    rows = [("1", *ROWS[0], ""), ("2", *ROWS[1], "w"), ("3", *ROWS[2], "")]
    if separator == ",":
        rows[1] = ("2", *ROWS[1], '"a, ""b"""')
    header = separator.join(["id", "head", "relation", "tail", "note"])
    write_folder(tmp_path, {name: text(separator, header, rows, "\r\n") + "\r\n"})
    kg = load_kg(tmp_path / name, split=False)
    assert list(labelled(kg)["train"]) == ROWS


@pytest.mark.parametrize(
    ("marred", "line", "why"),
    [
        ({700: 'e700,r1,"e400'}, 701, "never closed, up to line 2001, the last one: "),
        ({700: '"e700,r1,e400'}, 701, "never closed, up to line 2001, the last one: "),
        ({700: 'e700,r1,"e4', 1500: 'e1500,r1,"e5'}, 701, "closes a label in line 1501: "),
        ({700: 'e700,r1,"5" pipe"'}, 701, "closes a label: "),
    ],
)
@pytest.mark.parametrize("pack", [str.encode, lambda text: gzip.compress(text.encode())])
def test_a_stray_quote_in_csv_is_told_with_its_line(marred, line, why, pack, tmp_path):
    rows = {i: f"e{i},r1,e{i * 7 % 2000}" for i in range(1, 2001)} | marred
    content = "\n".join(["head,relation,tail", *rows.values()]) + "\n"
    write_folder(tmp_path, {"g.csv": pack(content)})
    told = rf"g\.csv, line {line}: .*{why}{re.escape(repr(marred[700]))}\. Correct"
    with pytest.raises(DataError, match=told):
        load_kg(tmp_path / "g.csv", split=False)


def test_a_label_of_csv_may_hold_line_breaks_of_which_there_is_word(tmp_path, caplog):
    (tmp_path / "g.csv").write_text(
        'note,"head\nof it",relation,tail\nx,a,r,"b\nc"\n\n,"b\nc",r,"5"" x\n\ny"\nx,7" z,r,a\n'
    )
    kg = load_kg(tmp_path / "g.csv", split=False, header=True, columns=[1, 2, 3])
    assert kg.entities == ["a", "b\nc", '5" x\n\ny', '7" z']
    told = "line 3: a quoted cell contains line breaks, so that 2 lines are one row; such rows: 2"
    assert f"{told}, the longest of 4 lines from line 6 on" in caplog.text


@pytest.mark.parametrize("form", ["tsv", "csv", "text", "parquet", "kg"])
def test_a_first_triple_that_looks_like_a_header_is_not_lost(form, tmp_path):
    kg = MultiViewKG.from_labels([("h", "r", "t"), ("t", "r", "h")])
    again = load_kg(written(kg, tmp_path, form), split=False)
    assert labelled(again) == labelled(kg)


@pytest.mark.parametrize("first", ["x\ty\tz", "e1\tr\te2"])
@pytest.mark.parametrize("header", [None, False])
def test_a_first_line_whose_labels_stand_nowhere_else_is_worth_a_word(
    first, header, tmp_path, caplog
):
    rows = [first, *(f"e{i}\tr\te{i + 1}" for i in range(12))]
    (tmp_path / "g.tsv").write_text("\n".join(rows))
    kg = load_kg(tmp_path / "g.tsv", split=False, header=header)
    assert len(kg.train) == 13
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == (first[0] == "x" and header is None)
    assert all("g.tsv, line 1: read as a triple" in message for message in warned)


@pytest.mark.parametrize(
    "header", ["source,target,weight", "subject,verb,object", "Tail,since,Head"]
)
def test_a_header_that_names_two_of_the_three_is_asked_about(header, tmp_path):
    path = tmp_path / "g.csv"
    path.write_text(f"{header}\na,b,x\nb,c,x\n")
    with pytest.raises(DataError, match=r"line 1: .* seem to name .*--columns.*--no-header"):
        load_kg(path, split=False)
    columns = header.split(",")
    order = [columns[0], columns[2], columns[1]]
    kg = load_kg(path, split=False, columns=order)
    assert (kg.entities, kg.relations) == (["a", "b", "c"], ["x"])
    assert len(load_kg(path, split=False, header=False).train) == 3


def test_a_frame_goes_by_the_order_of_its_columns_only_where_their_names_agree():
    rows = [("a", "knows", "b")]
    assert load_kg(pl.DataFrame(rows, ["subject", "verb", "object"], orient="row"), split=False)
    both = pl.DataFrame([("1", "2", *rows[0])], ["source", "target", "h", "r", "t"], orient="row")
    assert load_kg(both, split=False).entities == ["a", "b"]
    wrong = pl.DataFrame(rows, ["source", "target", "weight"], orient="row")
    with pytest.raises(DataError, match="'source' and 'target' seem to name"):
        load_kg(wrong, split=False)


def test_the_columns_of_a_frame_are_three_and_its_rows_are_counted_from_one():
    frame = pl.DataFrame([("a", "r", "b"), ("a", None, "c")], ["h", "r", "t"], orient="row")
    with pytest.raises(DataError, match=r"^columns: expected three different columns"):
        load_kg(frame, split=False, columns=["h", "t", "t"])
    with pytest.raises(DataError, match=r"^train, row 2 \(counted from 1\): expected three labels"):
        load_kg(frame, split=False)
    with pytest.raises(DataError, match=r"first 'c' in row 2 \(counted from 1\)"):
        load_kg(frame.fill_null("r"), split=False, entities=["a", "b"])


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_missing_integer_of_a_frame_is_told_by_its_row(missing):
    frame = pd.DataFrame({"h": [1, 2, missing, 4], "r": ["a"] * 4, "t": [2, 3, 4, 5]})
    for source in (frame, pl.DataFrame(frame.to_dict("list"), strict=False)):
        with pytest.raises(DataError, match=r"^train, row 3 \(counted from 1\): .*'h' is missing"):
            load_kg(source, split=False)
    with pytest.raises(DataError, match="found Float64"):
        load_kg(frame.fillna(2.5), split=False)


@pytest.mark.parametrize(
    ("name", "content", "options", "told"),
    [
        ("g.csv", "sep=;\nh;r;t\n", {}, "';'"),
        ("g.csv", "sep=;\nh;r;t\n", {"separator": ";"}, "';'"),
        ("g.csv", '\ufeff"sep=,"\r\na,r,b\r\n', {}, "','"),
        ("g.csv", "sep=,\na,r,b\n", {}, "','"),
        ("g.tsv", "sep=\t\na\tr\tb\n", {}, "tab"),
        ("g.txt", "sep=|\na|r|b\n", {}, "'|'"),
    ],
)
def test_the_mark_of_a_separator_is_no_row(name, content, options, told, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(
        DataError, match=rf"line 1: .*Remove the line.*--separator {re.escape(told)}"
    ):
        load_kg(tmp_path / name, split=False, **options)
    with pytest.raises(DataError, match=r"line 1: .*Remove the line.*--text-separator "):
        ig.io.read_texts(tmp_path / name, ["a", "b"], **options)


def test_bars_between_words_are_named_where_a_line_has_not_three_words(tmp_path):
    (tmp_path / "g.txt").write_text("New York|in|the USA\nParis|in|France\n")
    with pytest.raises(DataError, match=r"line 2: .*if bars separate .*--separator '\|'\)"):
        load_kg(tmp_path / "g.txt", split=False)
    assert len(load_kg(tmp_path / "g.txt", split=False, separator="|").train) == 2


def test_a_first_triple_that_may_be_a_header_is_written_so_that_it_is_read_again(tmp_path):
    kg = MultiViewKG.from_labels([("source", "is", "target"), ("target", "is", "source")])
    for form in ("tsv", "csv", "text"):
        again = load_kg(written(kg, tmp_path / form, form), split=False)
        assert labelled(again) == labelled(kg)


@pytest.mark.parametrize(
    ("line", "told"),
    [("a;r;b", "';'"), ("a\tr\tb", "tab"), ("a|r|b", "'|'")],
)
def test_another_separator_than_the_names_is_told(line, told, tmp_path):
    path = tmp_path / "g.csv"
    path.write_text(f"{line}\n{line}\n")
    with pytest.raises(
        DataError, match=rf"separated by commas, found .*--separator {re.escape(told)}"
    ):
        load_kg(path)


def test_quotes_and_spaces_that_are_part_of_labels_are_told(tmp_path, caplog):
    (tmp_path / "g.tsv").write_text('"a"\t"r"\t"b ""c"""\n"b"\t"r"\t"a"\n')
    assert load_kg(tmp_path / "g.tsv", split=False).entities[0] == '"a"'
    assert "g.tsv: labels or texts in double quotes: 6" in caplog.text
    kg = load_kg(tmp_path / "g.tsv", split=False, format="csv", separator="\t")
    assert kg.entities == ["a", 'b "c"', "b"]
    caplog.clear()
    (tmp_path / "s.csv").write_text("a, r, b\nb, r, a\n")
    assert load_kg(tmp_path / "s.csv", split=False).entities == ["a", " b", "b", " a"]
    assert "2 entities differ from others only by spaces around the label" in caplog.text


@pytest.mark.parametrize("row", ['"a" r "b"', 'a "r" "b c"'])
def test_quotes_as_in_csv_are_none_of_the_labels_where_spaces_separate_columns(row, tmp_path):
    (tmp_path / "g.txt").write_text(f"{row}\nb r a\n")
    kg = load_kg(tmp_path / "g.txt", split=False, format="csv", separator=" ")
    assert not any('"' in label for label in [*kg.entities, *kg.relations])


def test_a_cell_of_csv_may_be_as_long_as_one_of_tsv(tmp_path):
    long = "x" * 200_000
    (tmp_path / "g.csv").write_text(f'a,r,"{long},"\nb,"r",a\n\n"{long},",r,a\n')
    assert load_kg(tmp_path / "g.csv", split=False).entities == ["a", f"{long},", "b"]


@pytest.mark.parametrize("with_header", ["train", "valid", "test"])
def test_any_file_of_a_folder_may_have_a_header(with_header, tmp_path):
    rows = {"train": "a\tr\tb\nb\tr\tc\n", "valid": "a\tr\tc\n", "test": "c\tr\ta\n"}
    rows[with_header] = "head\trelation\ttail\n" + rows[with_header]
    files = {f"{split}.tsv": content for split, content in rows.items()}
    kg = load_kg(write_folder(tmp_path / "kg", files), "published")
    assert kg.relations == ["r"]
    assert [len(kg.triples(split)) for split in SPLITS] == [2, 1, 1]


def test_a_folder_of_tsv_files_may_have_headers(tmp_path):
    files = {
        "train.tsv": "subject\tpredicate\tobject\na\tr\tb\n",
        "dev.tsv.gz": gzip.compress(b"subject\tpredicate\tobject\nb\tr\ta\n"),
    }
    kg = load_kg(write_folder(tmp_path / "kg", files), "published")
    assert (kg.entities, kg.train.tolist(), kg.valid.tolist()) == (
        ["a", "b"],
        [[0, 0, 1]],
        [[1, 0, 0]],
    )


def test_without_pykeen_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pykeen.triples", None)
    with pytest.raises(ig.IMVIAError, match=r"imvia-graph\[bench\]"):
        to_pykeen(MultiViewKG.from_labels(ROWS))


def test_without_pyoxigraph_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyoxigraph", None)
    write_folder(tmp_path, {"g.nt": "<a:b> <c:d> <e:f> .\n"})
    with pytest.raises(ig.IMVIAError, match=r"imvia-graph\[rdf\]"):
        load_kg(tmp_path / "g.nt")


def test_pykeen_factories_may_come_alone_and_by_split():
    pytest.importorskip("pykeen")
    from pykeen.triples import CoreTriplesFactory

    kg = awkward_kg()
    factories = to_pykeen(kg)
    assert labelled(load_kg(factories["train"], split=False))["train"] == labelled(kg)["train"]
    core = CoreTriplesFactory.create(torch.tensor([[0, 0, 1], [1, 0, 2]]))
    assert load_kg(core, split=False).entities == ["0", "1", "2"]
    other = to_pykeen(MultiViewKG.from_labels(ROWS))["train"]
    with pytest.raises(DataError, match=r"test: the factory has other entity ids than"):
        load_kg({"train": factories["train"], "test": other})


def test_blank_nodes_escapes_and_comments_of_n_triples_are_read(tmp_path):
    lines = [
        "# a comment",
        "<http://e/a> <http://e/p> _:b1 .",
        "_:b1 <http://e/p> <http://e/caf\\u00e9> . # another",
        "",
        "<http://e/a> <http://e/p> <http://e/c> .",
    ]
    write_folder(tmp_path, {"g.nt": "\n".join(lines)})
    kg = load_kg(tmp_path / "g.nt", split=False)
    assert set(kg.entities) == {"http://e/a", "_:b0", "http://e/café", "http://e/c"}
    assert len(kg.train) == 3


@pytest.mark.parametrize("ending", ["ttl", "nt"])
def test_blank_nodes_are_numbered_by_file(ending, tmp_path):
    if ending == "nt":
        train = '_:x <e:p> _:y .\n<e:a> <e:p> _:x .\n_:y <e:says> "hi" .\n'
        test = "<e:a> <e:p> _:x .\n"
    else:
        train = '<e:a> <e:q> <e:a> . [] <e:p> [ <e:says> "hi" ] .'
        test = "<e:a> <e:p> [] ."
    write_folder(tmp_path, {f"train.{ending}": train, f"test.{ending}": test})
    kg, again = load_kg(tmp_path, "published"), load_kg(tmp_path, "published")
    assert kg.entities == again.entities
    assert sorted(kg.entities) == ["_:b0", "_:b1", "_:test-b0", "e:a"]
    assert kg.test.tolist() == again.test.tolist()
    texts = ig.io.read_literals(tmp_path / f"train.{ending}", kg)
    assert texts.source == ["hi"]
    assert kg.entities[texts.entity[0]].startswith("_:b")
    write_folder(tmp_path, {f"test.{ending}": '_:x <e:says> "bye" .'})
    texts = ig.io.read_literals(tmp_path / f"test.{ending}", kg, split="test")
    assert [kg.entities[i] for i in texts.entity] == ["_:test-b0"]


def test_numbers_of_rdf_are_the_same_at_every_load(tmp_path):
    lines = [
        f'<e:{i % 50}> <e:p{i % 7}> "{i / 3}"^^<http://www.w3.org/2001/XMLSchema#double> .'
        for i in range(900)
    ]
    lines += [f"<e:{i}> <e:q> <e:{(i + 1) % 50}> ." for i in range(50)]
    write_folder(tmp_path, {"g.nt": "\n".join(lines)})
    first, *others = (load_kg(tmp_path / "g.nt", split=False, literals="numbers") for _ in range(4))
    assert all(torch.equal(kg.views("number")[0], first.views("number")[0]) for kg in others)
