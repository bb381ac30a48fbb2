"""What `export_embeddings` and `export_predictions` write is read back equal, by other readers."""

import csv
import errno
import json
import os
from urllib.parse import unquote

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner
from helpers import contents, ring_kg, score_all, settings
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import load_file

import imvia_graph as ig
from imvia_graph import _files, export, inference
from imvia_graph.cli import command_line
from imvia_graph.export import Query, predict_all, queries_of, read_queries
from imvia_graph.io import arrays
from imvia_graph.training import Progress

#: Labels that formats like to stumble over.
ODD = [
    "plain",
    "two words",
    '"quoted", with comma',
    "it's \\ back",
    "100 % sure",
    "100%20sure",
    "^capital",
    "São Tomé",
    "北京 no\u00a0break",
    "👩‍🔬",
    "<http://example.org/a b>",
    "http://example.org/é#x",
    "urn:imvia:entity:two%20words",
    "NaN",
    "0.5",
    "?",
]
#: Labels that a TSV file cannot carry.
UNTSV = ["tab\there", "line\nend", "carriage\rreturn", "line\u2028separator"]


def make_run(kg, **changes):
    """A model as it is initialised: no training, no folder."""
    chosen = settings(**changes)
    return ig.Run(ig.IMVIA.from_kg(kg, chosen).eval(), kg, chosen, Progress())


@pytest.fixture
def odd_run():
    """Entities and relations of odd labels, modalities whose names label columns have."""
    labels = ODD + UNTSV
    n, relations = len(labels), [*ODD[:7], "\t"]
    triples = torch.tensor([[i, i % len(relations), (i * 3 + 1) % n] for i in range(2 * n)]) % n
    views = {
        modality: ig.Views(torch.randn(n, 3), torch.arange(n))
        for modality in ("image", "name", "names", "file", "label_embedding", "label")
    }
    kg = ig.MultiViewKG(labels, relations, triples, views=views, name="odd")
    names = [f"name of {label}" for label in labels]
    return make_run(kg.replace(entity_names=names))


@pytest.fixture
def ring_run():
    return make_run(ring_kg())


def rows(run, what):
    """Labels, names, inverse and tables as they must come back."""
    if what == "entities":
        return run.kg.entities, run.kg.entity_names, None, run.entity_embeddings()
    count = run.kg.num_relations
    inverse = [False] * count + [True] * count
    return run.kg.relations * 2, run.kg.relation_names * 2, inverse, run.relation_embeddings()


def read_word2vec(path):
    """Tokens and vectors, as gensim's `KeyedVectors.load_word2vec_format(binary=False)` reads."""
    with path.open("rb") as file:
        count, width = map(int, file.readline().decode("utf-8").split())
        tokens, vectors = [], []
        for _ in range(count):
            parts = file.readline().decode("utf-8").rstrip().split(" ")
            tokens.append(parts[0])
            vectors.append([np.float32(number) for number in parts[1:]])
            assert len(vectors[-1]) == width
        assert not file.readline()
    return tokens, np.array(vectors, dtype=np.float32)


both = pytest.mark.parametrize("what", ["entities", "relations"])


# -- embeddings -----------------------------------------------------------------------------------


@both
def test_safetensors_comes_back_equal(odd_run, tmp_path, what):
    labels, names, inverse, tables = rows(odd_run, what)
    written = ig.export_embeddings(odd_run, tmp_path / "v.safetensors", what=what)
    assert [path.name for path in written] == ["v.safetensors", "v.labels.json"]
    tensors = load_file(written[0])
    assert tensors.keys() == tables.keys()
    assert all(torch.equal(tensors[head], table) for head, table in tables.items())
    about = json.loads(written[1].read_text(encoding="utf-8"))
    assert (about["labels"], about["names"]) == (labels, names)
    assert about.get("inverse") == inverse
    with safe_open(written[0], "pt") as file:
        assert file.metadata() == {
            "format": "imvia-graph/embeddings", "version": "1", "what": what,
            "labels": "v.labels.json",
        }  # fmt: skip


@both
def test_npz_comes_back_equal_without_pickle(odd_run, tmp_path, what):
    labels, names, inverse, tables = rows(odd_run, what)
    [path] = ig.export_embeddings(odd_run, tmp_path / "v.npz", what=what)
    arrays = np.load(path, allow_pickle=False)
    assert arrays["labels"].tolist() == labels
    assert arrays["names"].tolist() == names
    if inverse:
        assert arrays["inverse"].tolist() == inverse
    for head, table in tables.items():
        key = "names_embedding" if head == "names" else head
        assert np.array_equal(arrays[key], table.numpy()), head
    assert len(arrays.files) == len(tables) + (3 if inverse else 2)


@both
def test_parquet_comes_back_equal(odd_run, tmp_path, what):
    labels, names, inverse, tables = rows(odd_run, what)
    [path] = ig.export_embeddings(odd_run, tmp_path / "v.parquet", what=what)
    frame = pl.read_parquet(path)
    assert frame["label"].to_list() == labels
    assert frame["name"].to_list() == names
    if inverse:
        assert frame["inverse"].to_list() == inverse
    # "label" is taken, and "label_embedding" is a modality itself.
    renamed = {"name": "name_embedding", "label": "label_embedding_embedding"}
    for head, values in tables.items():
        column = renamed.get(head, head)
        assert frame.schema[column] == pl.Array(pl.Float32, values.shape[1])
        assert np.array_equal(frame[column].to_numpy(), values.numpy()), head
    assert frame.width == len(tables) + (3 if inverse else 2)


def test_parquet_is_read_by_arrow(odd_run, tmp_path):
    [path] = ig.export_embeddings(odd_run, tmp_path / "v.parquet", heads=["image"])
    table = parquet.read_table(path)
    assert table["label"].to_pylist() == odd_run.kg.entities
    assert str(table.schema.field("image").type).startswith("fixed_size_list")
    assert table["image"].to_pylist() == odd_run.entity_embeddings()["image"].tolist()


@both
def test_word2vec_comes_back_equal(odd_run, tmp_path, what):
    labels, _, inverse, tables = rows(odd_run, what)
    written = ig.export_embeddings(odd_run, tmp_path / "v.txt", what=what)
    assert [path.name for path in written] == [f"v.{head}.txt" for head in tables]
    for path, table in zip(written, tables.values(), strict=True):
        tokens, vectors = read_word2vec(path)
        assert len(set(tokens)) == len(tokens)
        for token, label, turned in zip(
            tokens, labels, inverse or [False] * len(labels), strict=True
        ):
            assert token.startswith("^") == turned
            assert unquote(token.removeprefix("^")) == label
            assert not any(letter.isspace() for letter in token)
        assert np.array_equal(vectors, table.numpy())


def test_word2vec_of_one_head_is_the_file_that_was_named(odd_run, tmp_path):
    [path] = ig.export_embeddings(odd_run, tmp_path / "v.vec", heads=["joint"])
    assert path == tmp_path / "v.vec"
    assert np.array_equal(read_word2vec(path)[1], odd_run.entity_embeddings()["joint"].numpy())


@given(st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"])))
def test_tokens_have_no_white_space_and_turn_back(label):
    token = export.word2vec_token(label)
    assert unquote(token) == label
    assert token.split() == [token]
    assert not token.startswith("^")


def test_extreme_numbers_survive_as_text(ring_run, tmp_path):
    with torch.no_grad():
        ring_run.model.entity.weight[0, :4] = torch.tensor([1e-45, 3.4e38, -0.0, 0.1])
    path = tmp_path / "v.txt"
    ig.export_embeddings(ring_run, path, heads=["structure"])
    assert np.array_equal(read_word2vec(path)[1], ring_run.model.entity.weight.detach().numpy())


def test_heads_are_those_asked_for_in_that_order(ring_run, tmp_path):
    [path] = ig.export_embeddings(ring_run, tmp_path / "v.npz", heads=["text", "structure", "text"])
    assert np.load(path).files == ["labels", "names", "text", "structure"]


def test_the_format_goes_before_the_suffix(ring_run, tmp_path):
    [path] = ig.export_embeddings(ring_run, tmp_path / "v.dat", "npz")
    assert np.load(path)["labels"].tolist() == ring_run.kg.entities


def test_unknown_head_format_suffix_and_kind_are_errors(ring_run, tmp_path):
    with pytest.raises(ig.UnknownLabelError, match=r"'sound'.*'structure', 'image'"):
        ig.export_embeddings(ring_run, tmp_path / "v.npz", heads=["sound"])
    with pytest.raises(ig.UnknownLabelError, match="No head is named"):
        ig.export_embeddings(ring_run, tmp_path / "v.npz", heads=[])
    with pytest.raises(ig.DataError, match="expected one of safetensors, npz"):
        ig.export_embeddings(ring_run, tmp_path / "v.npz", "pickle")
    with pytest.raises(ig.DataError, match=r"the suffix '\.xyz' stands for no format"):
        ig.export_embeddings(ring_run, tmp_path / "v.xyz")
    with pytest.raises(ig.DataError, match="expected entities or relations"):
        ig.export_embeddings(ring_run, tmp_path / "v.npz", what="triples")
    assert not contents(tmp_path)


def test_one_long_name_makes_no_large_npz(tmp_path):
    names = [f"Entity {i}" for i in range(11)] + ["x" * 50_000]
    run = make_run(ring_kg(entity_names=names))
    [path] = ig.export_embeddings(run, tmp_path / "v.npz")
    arrays = np.load(path, allow_pickle=False)
    assert arrays["names"].tolist() == names
    numbers = sum(arrays[head].nbytes for head in run.model.heads)
    assert path.stat().st_size < numbers + 50_000  # and not 4 bytes a letter and entity


def test_npz_refuses_labels_that_would_take_gigabytes(tmp_path, monkeypatch):
    kg = ring_kg(entity_names=["x" * 1000] + [f"Entity {i}" for i in range(11)])
    monkeypatch.setattr(arrays, "MOST_BYTES", 4 * 12 * 1000)
    ig.export_embeddings(make_run(kg), tmp_path / "v.npz")
    monkeypatch.setattr(arrays, "MOST_BYTES", 4 * 12 * 1000 - 1)
    with pytest.raises(ig.DataError, match=r"12 labels of up to 1,000 letters take .* Parquet"):
        ig.export_embeddings(make_run(kg), tmp_path / "w.npz")
    with pytest.raises(ig.DataError, match=r"12 labels of up to 1,000 letters"):
        ig.io.write_kg(kg.replace(entities=kg.entity_names), tmp_path / "g.npz")
    assert [*contents(tmp_path)] == ["v.npz"]


def test_npz_refuses_a_label_that_it_would_change(tmp_path):
    run = make_run(ig.MultiViewKG.from_labels([("a\0", "r", "b")]))
    with pytest.raises(ig.DataError, match="NUL"):
        ig.export_embeddings(run, tmp_path / "v.npz")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".parquet", ".txt"])
def test_nothing_is_written_over_unless_forced(ring_run, tmp_path, suffix):
    path = tmp_path / f"v{suffix}"
    written = ig.export_embeddings(ring_run, path)
    written[-1].write_text("mine")  # for safetensors the labels: one of two is enough
    for other in written[:-1]:
        other.unlink()
    with pytest.raises(ig.DataError, match="exists"):
        ig.export_embeddings(ring_run, path)
    assert contents(tmp_path) == {written[-1].name: b"mine"}
    assert ig.export_embeddings(ring_run, path, force=True) == written
    assert written[-1].read_bytes() != b"mine"
    assert len(contents(tmp_path)) == len(written)


def test_a_folder_is_not_a_file_to_write(ring_run, tmp_path):
    (tmp_path / "v.npz").mkdir()
    with pytest.raises(ig.DataError, match="is a folder"):
        ig.export_embeddings(ring_run, tmp_path / "v.npz", force=True)


def test_a_write_that_fails_leaves_the_old_file(ring_run, tmp_path, monkeypatch):
    path = tmp_path / "v.npz"
    ig.export_embeddings(ring_run, path)
    before = contents(tmp_path)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(OSError, match="disk full"):
        ig.export_embeddings(ring_run, path, force=True)
    assert contents(tmp_path) == before


# -- predictions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", ["shared", "relation"])
@pytest.mark.parametrize("include_known", [False, True])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_answers_are_those_of_one_query_at_a_time(candidates, include_known, k):
    run = make_run(ring_kg(), candidates=candidates, ranking_batch_size=4)
    queries = [Query(f"e{i}", ("after", "opposite")[i % 2], None) for i in range(6)]
    queries += [Query(None, "after", f"e{i}") for i in (3, 1, 3)]
    frame = predict_all(run, queries, k=k, include_known=include_known)
    at = 0
    for head, relation, tail in queries:
        expected = run.predict(
            head=head, relation=relation, tail=tail, k=k, include_known=include_known
        )
        part = frame[at : at + len(expected)]
        at += len(expected)
        missing, given = ("tail", "head") if tail is None else ("head", "tail")
        assert part[missing].to_list() == [answer.entity for answer in expected]
        assert set(part[given]) == {head or tail}
        assert set(part["asked"]) == {missing}
        assert set(part["relation"]) == {relation}
        assert part["rank"].to_list() == list(range(1, len(expected) + 1))
        assert part["known"].to_list() == [answer.known for answer in expected]
        scores = [answer.score for answer in expected]
        assert part["score"].to_list() == pytest.approx(scores, abs=1e-5)
    assert at == len(frame)


@pytest.mark.parametrize("candidates", ["shared", "relation"])
@pytest.mark.parametrize("include_self", [None, False, True])
@pytest.mark.parametrize("k", [1, 4, 100])
def test_answers_do_not_depend_on_whether_tables_are_held(monkeypatch, candidates, include_self, k):
    run = make_run(ring_kg(), candidates=candidates)
    with torch.no_grad():
        # Ties within a portion and across portions.
        for table in (run.model.entity, *run.model.residual):
            table.weight.copy_(table.weight[:3].repeat(4, 1))
    entity = torch.arange(12).repeat_interleave(4)
    relation = torch.arange(4).repeat(12)

    def answers(include_known):
        predictor = ig.Predictor(run.model, run.kg)
        options = {"k": k, "include_known": include_known, "include_self": include_self}
        found = predictor.answers(entity, relation, batch_size=7, **options)
        columns = [*found[:4], *found.heads.values(), found.known]
        return [column.double() for column in columns], predictor

    def explained():
        found = ig.explain(run.model, run.kg, head="e1", relation="after", tail="e2")
        return {side: {n: j.rank for n, j in of.items()} for side, of in found.judgements.items()}

    whole, ranks = [answers(known)[0] for known in (False, True)], explained()
    monkeypatch.setattr(inference, "HELD", 0)
    # As real ones are, a multiple of what vector registers hold: equal rows have equal scores.
    monkeypatch.setattr(inference, "PORTION", 8)
    for known, expected in zip((False, True), whole, strict=True):
        found, predictor = answers(known)
        assert not predictor._tables
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    assert explained() == ranks


def test_equal_scores_go_by_id(ring_run):
    with torch.no_grad():
        for parameter in ring_run.model.parameters():
            parameter.zero_()
    frame = predict_all(ring_run, [Query("e5", "after", None)], k=4, include_known=True)
    assert frame["tail"].to_list() == ["e0", "e1", "e2", "e3"]


def test_the_best_are_those_of_a_full_sort():
    scores = torch.randint(0, 5, (40, 13)).float()
    excluded = torch.rand(40, 13) < 0.5
    excluded[0] = True
    for k in (1, 4, 13, 50):
        row, column, rank = inference.best(scores, excluded, k)
        found = [list(zip(column[row == i].tolist(), rank[row == i].tolist(), strict=True))
                 for i in range(40)]  # fmt: skip
        for i in range(40):
            order = sorted(range(13), key=lambda j: (-scores[i, j].item(), j))
            kept = [j for j in order if not excluded[i, j]][:k]
            assert found[i] == [(j, place) for place, j in enumerate(kept, 1)]


def test_scores_that_are_no_numbers_are_an_error(ring_run):
    with torch.no_grad():
        ring_run.model.entity.weight.fill_(torch.nan)
    with pytest.raises(ig.IMVIAError, match="train it again"):
        predict_all(ring_run, [Query("e1", "after", None)])


@pytest.mark.parametrize(
    ("query", "error"),
    [
        (Query("e1", "after", "e2"), "Query 0: expected a head or a tail"),
        (Query(None, "after", None), "Query 0: expected a head or a tail"),
        (Query("e1", "before", None), "Unknown relation 'before'"),
        (Query("e99", "after", None), "Unknown entity 'e99'"),
    ],
)
def test_bad_queries_are_errors(ring_run, query, error):
    with pytest.raises(ig.IMVIAError, match=error):
        predict_all(ring_run, [query])


def test_no_query_and_no_answer_are_errors(ring_run):
    with pytest.raises(ig.DataError, match="no queries"):
        predict_all(ring_run, [])
    with pytest.raises(ig.DataError, match="at least 1"):
        predict_all(ring_run, [Query("e1", "after", None)], k=0)


def test_how_many_queries_are_answered_is_told(ring_run):
    told = []
    queries = queries_of(ring_run.kg, entities="all")
    predict_all(ring_run, queries, k=1, on_batch=lambda *numbers: told.append(numbers))
    assert told[-1] == (len(queries), len(queries))
    assert told == sorted(told)


def test_queries_of_a_relation_are_of_the_entities_seen_there():
    kg = ig.MultiViewKG.from_labels(
        [("a", "r", "b"), ("c", "s", "a")], test=[("b", "r", "b")], relation_names=["the r", "s"]
    )
    assert queries_of(kg, ["the r"]) == [("a", "r", None), ("b", "r", None)]
    assert queries_of(kg, ["r"], ask="head") == [(None, "r", "b")]
    assert len(queries_of(kg, ["r", "the r"], entities="all")) == 3
    assert len(queries_of(kg)) == 3
    for wrong in ({"ask": "both"}, {"entities": "some"}):
        with pytest.raises(ig.DataError, match="received"):
            queries_of(kg, **wrong)


def test_queries_are_read_from_a_file(tmp_path):
    kg = ig.MultiViewKG.from_labels([("two words", "r", '"q"'), ("?", "r", "é")])
    path = tmp_path / "queries.tsv"
    path.write_text('two words\tr\t?\n\n?\tr\t"q"\r\né\tr\t\n', encoding="utf-8")
    assert read_queries(path, kg) == [
        ("two words", "r", None), (None, "r", '"q"'), ("é", "r", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "holds no queries"),
        ("a\tr\t?\na r ?\n", "line 2: expected head, relation and tail"),
        ("a\tr\tb\n", "line 1: expected head"),
        ("?\tr\t?\n", "line 1: expected head"),
        ("a\t\t?\n", "line 1: expected head"),
        ("\na\tr\t?\nz\tr\t?\n", "line 3: Unknown entity 'z'"),
    ],
)
def test_a_bad_file_of_queries_is_an_error_with_its_line(tmp_path, text, error):
    path = tmp_path / "queries.tsv"
    path.write_text(text)
    with pytest.raises(ig.DataError, match=error):
        read_queries(path, ig.MultiViewKG.from_labels([("a", "r", "b")]))


@pytest.fixture
def tsv_run():
    """Odd labels, but for those that TSV cannot carry."""
    n = len(ODD)
    triples = torch.tensor([[i, i % 3, (i + 1) % n] for i in range(n)])
    return make_run(ig.MultiViewKG(ODD, ['"r" 1', "r2 é", "urn:x:3"], triples, name="odd"))


def test_tsv_of_predictions_comes_back_equal(tsv_run, tmp_path):
    queries = queries_of(tsv_run.kg)
    path = ig.export_predictions(tsv_run, tmp_path / "p.tsv", queries, k=3, include_known=True)
    frame = predict_all(tsv_run, queries, k=3, include_known=True)
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    assert header == frame.columns
    for line, row in zip(lines, frame.iter_rows(), strict=True):
        assert tuple(line[:4]) == row[:4]
        assert int(line[4]) == row[4]
        assert np.float32(line[5]) == np.float32(row[5])
        assert line[6] == str(row[6]).lower()


def test_ntriples_of_predictions_come_back_equal_through_an_rdf_library(tsv_run, tmp_path):
    pyoxigraph = pytest.importorskip("pyoxigraph")
    queries = queries_of(tsv_run.kg)
    path = ig.export_predictions(tsv_run, tmp_path / "p.nt", queries, k=3)
    frame = predict_all(tsv_run, queries, k=3)

    def label(iri, base):
        return unquote(iri.removeprefix(base)) if iri.startswith(base) else iri

    bases = ("urn:imvia:entity:", "urn:imvia:relation:", "urn:imvia:entity:")
    triples = [
        tuple(map(label, (term.value for term in (t.subject, t.predicate, t.object)), bases))
        for t in pyoxigraph.parse(path=str(path), format=pyoxigraph.RdfFormat.N_TRIPLES)
    ]
    assert triples == frame.select("head", "relation", "tail").rows()
    assert "<http://example.org/é#x>" in path.read_text(encoding="utf-8")


def test_ntriples_of_predictions_come_back_equal_through_load_kg(tsv_run, tmp_path):
    pytest.importorskip("pyoxigraph")
    queries = queries_of(tsv_run.kg)
    path = ig.export_predictions(tsv_run, tmp_path / "p.nt", queries, k=3)
    kg = ig.load_kg(path, split=False)
    labels = {(kg.entities[h], kg.relations[r], kg.entities[t]) for h, r, t in kg.train.tolist()}
    assert labels == set(predict_all(tsv_run, queries, k=3)["head", "relation", "tail"].rows())


def test_labels_that_tsv_cannot_carry_are_an_error(odd_run, tmp_path):
    pytest.importorskip("pyoxigraph")
    queries = [Query(UNTSV[0], "plain", None)]
    with pytest.raises(ig.DataError, match="tab"):
        ig.export_predictions(odd_run, tmp_path / "p.tsv", queries)
    assert not contents(tmp_path)
    assert ig.export_predictions(odd_run, tmp_path / "p.nt", queries).is_file()


def test_predictions_are_not_written_over_unless_forced(ring_run, tmp_path):
    path, queries = tmp_path / "p.tsv", [Query("e1", "after", None)]
    path.write_text("mine")
    with pytest.raises(ig.DataError, match="--force"):
        ig.export_predictions(ring_run, path, queries)
    assert path.read_text() == "mine"
    ig.export_predictions(ring_run, path, queries, force=True)
    assert path.read_text() != "mine"


def test_predicting_leaves_the_model_in_its_mode(ring_run):
    ring_run.model.train()
    predict_all(ring_run, [Query("e1", "after", None)])
    assert ring_run.model.training


def test_answers_score_as_the_model_scores(ring_run):
    frame = predict_all(
        ring_run, [Query("e1", "after", None)], k=100, include_known=True, include_self=True
    )
    [(_, scores)] = score_all(ring_run.model, torch.tensor([1]), torch.tensor([0]))
    order = [int(label[1:]) for label in frame["tail"]]
    expected = scores["decision"][0].detach().tolist()
    assert frame["score"].to_list() == pytest.approx([expected[i] for i in order], abs=1e-6)


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    ig.fit(ring_kg(), out=folder, settings=settings(epochs=1))
    return folder


def command(folder, *arguments):
    arguments = ["export", str(folder), *map(str, arguments)]
    return CliRunner().invoke(command_line, arguments)


def test_the_command_writes_embeddings(folder, tmp_path):
    result = command(
        folder, "--out", tmp_path / "v.npz", "--modality", "text", "--what", "relations"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'v.npz'}\n"
    expected = ig.load(folder, "cpu").relation_embeddings()["text"]
    assert np.array_equal(np.load(tmp_path / "v.npz")["text"], expected.numpy())


def test_the_command_writes_predictions_of_a_relation_and_of_queries(folder, tmp_path):
    one, two = tmp_path / "one.tsv", tmp_path / "two.nt"
    result = command(
        folder, "--predictions", "--relation", "after", "--ask", "head", "--top", 2, "--out", one
    )
    assert result.exit_code == 0, result.output
    run = ig.load(folder, "cpu")
    expected = predict_all(run, queries_of(run.kg, ["after"], ask="head"), k=2)
    frame = pl.read_csv(one, separator="\t", quote_char=None)
    assert frame.select("head", "tail", "rank").equals(
        expected.select("head", "tail", "rank"), null_equal=True
    )
    (tmp_path / "q.tsv").write_text("e1\tafter\t?\n")
    result = command(folder, "--queries", tmp_path / "q.tsv", "--top", 1, "--known", "--out", two)
    assert result.exit_code == 0, result.output
    assert len(two.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--predictions"],
        ["--relation", "after"],
        ["--predictions", "--relation", "after", "--queries", "q.tsv"],
        ["--predictions", "--relation", "after", "--modality", "text"],
        ["--queries", "q.tsv", "--ask", "head"],
        ["--top", "3"],
    ],
)
def test_options_that_do_not_go_together_are_refused(folder, tmp_path, arguments):
    result = command(folder, "--out", tmp_path / "x.tsv", *arguments)
    assert result.exit_code == 2
    assert "Usage" in result.output
    assert not contents(tmp_path)


def test_the_command_says_in_one_line_that_a_file_exists(folder, tmp_path):
    (tmp_path / "v.npz").write_text("mine")
    result = command(folder, "--out", tmp_path / "v.npz")
    assert isinstance(result.exception, ig.DataError)
    assert command(folder, "--out", tmp_path / "v.npz", "--force").exit_code == 0


# -- what is written over -------------------------------------------------------------------------


@pytest.fixture
def not_a_file(tmp_path, request):
    """A pipe or a link to one, under a name that tells no format."""
    path = tmp_path / "there"
    os.mkfifo(path)
    if request.param == "link to a pipe":
        path = path.rename(tmp_path / "pipe").with_name("there")
        path.symlink_to("pipe")
    return path


@pytest.mark.parametrize("not_a_file", ["pipe", "link to a pipe"], indirect=True)
def test_what_is_no_file_is_never_written_over(ring_run, not_a_file):
    before = not_a_file.lstat(), not_a_file.stat()
    for format in ("safetensors", "npz", "parquet", "word2vec"):
        heads = ["structure"]
        with pytest.raises(ig.DataError, match="is a device, a pipe or a socket"):
            ig.export_embeddings(ring_run, not_a_file, format, heads=heads, force=True)
    for format in ("tsv", "ntriples"):
        query = [Query("e1", "after", None)]
        with pytest.raises(ig.DataError, match="is a device, a pipe or a socket"):
            ig.export_predictions(ring_run, not_a_file, query, format, force=True)
    for format in ("kg", "tsv", "npz", "ntriples"):
        with pytest.raises(ig.DataError, match="is a device, a pipe or a socket"):
            ig.io.write_kg(ring_run.kg, not_a_file, format, overwrite=True)
    with pytest.raises(ig.DataError, match="is a device, a pipe or a socket"):
        _files.write_text(not_a_file.resolve(), "in a folder of our own")
    assert (not_a_file.lstat(), not_a_file.stat()) == before


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".parquet", ".txt", ".tsv", ".nt"])
def test_what_a_link_leads_to_is_written_and_the_link_stays(ring_run, tmp_path, suffix):
    target, link = tmp_path / "elsewhere" / "target", tmp_path / f"link{suffix}"
    link.symlink_to(target)

    def write(force):
        if suffix in (".tsv", ".nt"):
            query = [Query("e1", "after", None)]
            ig.export_predictions(ring_run, link, query, force=force)
        else:
            ig.export_embeddings(ring_run, link, heads=["structure"], force=force)

    with pytest.raises(ig.DataError, match="exists"):  # though it leads to nothing
        write(force=False)
    for _ in range(2):
        write(force=True)
        assert link.is_symlink()
        assert target.stat().st_size > 0
        target.write_bytes(b"")


@pytest.mark.parametrize("name", ["g.tsv", "g.parquet", "g.nt", "g.ttl", "g.npz", "graph.npz"])
def test_a_graph_is_written_to_what_a_link_leads_to(tmp_path, name):
    link = tmp_path / name
    link.symlink_to(tmp_path / f"target-{name}")
    kg = ring_kg(views=False)
    with pytest.raises(ig.DataError, match="already exists"):
        ig.io.write_kg(kg, link)
    ig.io.write_kg(kg, link, overwrite=True)
    assert link.is_symlink()
    assert ig.load_kg(tmp_path / f"target-{name}", split=False).num_entities == kg.num_entities


def own_files(folder):
    """Every file of a run, and some that it may have."""
    there = contents(folder)
    return [*there, "last.safetensors", "previous.safetensors", "test.json", "kg/new.tsv"]


def test_no_file_of_a_run_is_written_over(ring_run, folder, tmp_path):
    before = contents(folder)
    (tmp_path / "link").symlink_to(folder)
    assert {"best.safetensors", "run.json", "kg/views/image.safetensors"} <= before.keys()
    for name in own_files(folder):
        query = [Query("e1", "after", None)]
        with pytest.raises(ig.DataError, match="belongs to the run in"):
            ig.export_predictions(ring_run, tmp_path / "link" / name, query, "tsv", force=True)
    with pytest.raises(ig.DataError, match="belongs to the run in"):
        ig.export_embeddings(ring_run, folder / "best.safetensors", force=True)
    assert contents(folder) == before
    other = folder / "embeddings.parquet"
    ig.export_embeddings(ring_run, other)
    other.unlink()


def test_errors_name_the_file_that_was_asked_for(tmp_path, monkeypatch):
    path = tmp_path / ("漢" * 80 + ".txt")  # 244 bytes: what is beside it must not be longer
    _files.write_text(path, "whole")
    assert path.read_text() == "whole"
    for name in ("a" * 300, "漢" * 90):
        with pytest.raises(OSError, match="too long") as caught:
            _files.write_text(tmp_path / name, "whole")
        assert caught.value.filename == str(tmp_path / name)

    def refuse(dir, prefix):
        raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/{prefix}abc")

    monkeypatch.setattr(_files.tempfile, "mkstemp", refuse)
    with pytest.raises(PermissionError) as caught:
        _files.write_text(path, "new")
    assert caught.value.filename == str(path)
    assert contents(tmp_path) == {path.name: b"whole"}
