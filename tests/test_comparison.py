"""Comparing runs: means over seeds and paired differences, against loops; tables in files."""

import json
import math
import statistics

import polars as pl
import pytest
import torch
from click.testing import CliRunner
from helpers import ring_kg, settings

import imvia_graph as ig
from imvia_graph.cli import command_line, display
from imvia_graph.evaluation import Ranking


def ranking(triples, seed):
    """Made-up ranks of the test triples."""
    drawn = torch.Generator().manual_seed(seed)
    tail, head = (torch.randint(1, 9, (len(triples),), generator=drawn).double() for _ in range(2))
    return Ranking(triples, {"decision": tail}, {"decision": head})


def loop(rankings):
    """For each triple the mean reciprocal rank of both queries over the rankings."""
    found = []
    for place in range(len(rankings[0].triples)):
        ranks = [
            side["decision"][place].item() for one in rankings for side in (one.tail, one.head)
        ]
        found.append(statistics.mean(1 / rank for rank in ranks))
    return found


def test_means_deviations_and_differences_are_those_of_a_loop():
    triples = torch.arange(60).reshape(20, 3)
    groups = {"a": [ranking(triples, seed) for seed in (0, 1, 2)], "b": ranking(triples, 3)}
    table = ig.compare(groups)
    first, second = table.to_dicts()
    mrrs = [statistics.mean(loop([one])) for one in groups["a"]]
    assert first["mrr"] == pytest.approx(statistics.mean(mrrs))
    assert first["mrr_std"] == pytest.approx(statistics.stdev(mrrs))
    hits = [(torch.cat([one.tail["decision"], one.head["decision"]]) <= 3).double().mean() for one
            in groups["a"]]  # fmt: skip
    assert first["hits@3"] == pytest.approx(statistics.mean(map(float, hits)))
    assert (first["runs"], second["runs"]) == (3, 1)
    assert first["difference"] is first["interval"] is second["mrr_std"] is None
    by_triple = [b - a for a, b in zip(loop(groups["a"]), loop([groups["b"]]), strict=True)]
    assert second["difference"] == pytest.approx(statistics.mean(by_triple))
    assert second["difference"] == pytest.approx(second["mrr"] - first["mrr"])
    half = 1.96 * statistics.stdev(by_triple) / math.sqrt(20)
    assert second["interval"] == pytest.approx(half, rel=1e-4)


def test_the_interval_holds_the_true_difference_as_often_as_it_says():
    # Two methods that are equal in the long run, over many sets of triples.
    triples = torch.arange(600).reshape(200, 3)
    inside = 0
    for seed in range(200):
        _, row = ig.compare(
            {"a": ranking(triples, 2 * seed), "b": ranking(triples, 2 * seed + 1)}
        ).to_dicts()
        inside += abs(row["difference"]) <= row["interval"]
    assert 0.9 < inside / 200 < 0.99


def test_one_triple_has_a_difference_and_no_interval():
    triples = torch.tensor([[0, 0, 1]])
    row = ig.compare([ranking(triples, 0), ranking(triples, 1)]).to_dicts()[1]
    assert row["difference"] is not None
    assert row["interval"] is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders: two seeds of one method, and another method."""
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in (
        ("all-0", {"seed": 0}),
        ("all-1", {"seed": 1}),
        ("narrow", {"dim": 4, "modalities": ["image"], "patience": None}),
    ):
        ig.fit(ring_kg(), settings=settings(epochs=1, **changes), out=folder / name)
    return folder


def test_runs_that_differ_in_the_seed_alone_make_a_row(runs):
    folders = [runs / "narrow", runs / "all-0", ig.load(runs / "all-1", "cpu")]
    table = ig.compare(folders, device="cpu")
    assert table["name"].to_list() == ["narrow", "all"]
    assert table["runs"].to_list() == [1, 2]
    assert table["settings"][0] == ""
    assert table["settings"][1].split() == ["modalities=null", "dim=8", "patience=10"]
    mrrs = [ig.load(runs / f"all-{i}", "cpu").evaluate()["both"]["mrr"] for i in (0, 1)]
    assert table["mrr"][1] == pytest.approx(statistics.mean(mrrs))


def test_a_ranking_by_another_model_is_compared_with_runs(runs):
    run = ig.load(runs / "all-0", "cpu")
    other = ig.evaluation.rank_scorer(
        lambda entity, relation: torch.zeros(len(entity), run.kg.num_entities), run.kg
    )
    table = ig.compare({"ours": run, "constant": other})
    assert table["difference"][1] == pytest.approx(table["mrr"][1] - table["mrr"][0])
    assert table["settings"].to_list() == ["", ""]


def test_what_cannot_be_compared_is_an_error(runs, tmp_path):
    with pytest.raises(ig.DataError, match="expected runs, received none"):
        ig.compare([])
    with pytest.raises(ig.DataError, match="expected runs, received none"):
        ig.compare({})
    with pytest.raises(ig.DataError, match="'a' has none"):
        ig.compare({"b": runs / "narrow", "a": []})
    other = ring_kg(14)
    run = ig.fit(other, settings=settings(epochs=1), out=tmp_path / "other")
    with pytest.raises(ig.DataError, match=r"other ranks other triples than .*all-0"):
        ig.compare([runs / "all-0", run])
    # Ids alone do not make triples the same.
    renamed = ring_kg().replace(entities=[f"x{i}" for i in range(12)])
    same_ids = ig.fit(renamed, settings=settings(epochs=1), out=tmp_path / "renamed")
    with pytest.raises(ig.DataError, match="renamed ranks other triples"):
        ig.compare([runs / "all-0", same_ids])
    # Told before anything is ranked.
    told = []
    for wrong, message in (("none", "does not exist"), ("narrow", "narrow is named twice")):
        with pytest.raises(ig.IMVIAError, match=message):
            ig.compare(
                [runs / "narrow", runs / wrong], on_batch=lambda *arguments: told.append(arguments)
            )
    assert not told
    # Rows may share a run.
    assert ig.compare({"a": runs / "narrow", "b": [runs / "narrow"]})["difference"][1] == 0


# -- the command ----------------------------------------------------------------------------------


def compare(*arguments):
    return CliRunner().invoke(command_line, ["compare", "--device", "cpu", *map(str, arguments)])


def test_tables_in_every_format_say_the_same(runs, tmp_path, monkeypatch):
    named = [f"a_b|c={runs / 'all-0'}", f"a_b|c={runs / 'all-1'}", f"small -1={runs / 'narrow'}"]
    expected = ig.compare(
        {"a_b|c": [runs / "all-0", runs / "all-1"], "small -1": runs / "narrow"}, device="cpu"
    )
    for suffix in ("csv", "tsv", "parquet"):
        done = compare(*named, "--out", tmp_path / f"t.{suffix}")
        assert done.exit_code == 0, done.output
        read = {"parquet": pl.read_parquet}.get(suffix, pl.read_csv)
        options = {"separator": "\t"} if suffix == "tsv" else {}
        found = read(tmp_path / f"t.{suffix}", **options)
        assert found.columns == expected.columns
        assert found["mrr"].to_list() == pytest.approx(expected["mrr"].to_list())
    mean, deviation = (100 * expected[name][0] for name in ("mrr", "mrr_std"))
    difference, interval = (100 * expected[name][1] for name in ("difference", "interval"))
    for suffix, cells in (
        ("md", (r"a_b\|c", f"{mean:.2f} ± {deviation:.2f}", f"{difference:+.2f} ± {interval:.2f}")),
        (
            "tex",
            (
                r"a\_b|c",
                "small -1 ",
                rf"{mean:.2f} $\pm$ {deviation:.2f}",
                rf"{difference:+.2f} $\pm$ {interval:.2f}".replace("-", "$-$"),
                r"\toprule",
                r"$\Delta$MRR (95 \%)",
            ),
        ),
    ):
        out = tmp_path / f"t.{suffix}"
        assert compare(*named, "--out", out).exit_code == 0
        text = out.read_text("utf-8")
        for part in cells:
            assert part in text
    # The console may have been made, and its width read, in another test.
    monkeypatch.setattr(display.results, "_width", 120)
    printed = compare(*named).output
    assert f"{mean:.2f} ± {deviation:.2f}" in printed
    assert "small -1: modalities=[image] dim=4 patience=null\n" in printed
    rows = json.loads(compare(*named, "--json").output)
    assert [row["name"] for row in rows] == ["a_b|c", "small -1"]


def test_a_table_is_neither_overwritten_nor_of_another_kind(runs, tmp_path):
    out = tmp_path / "t.tex"
    out.write_text("mine")
    done = compare(runs / "narrow", "--out", out)
    assert done.exit_code != 0
    assert out.read_text() == "mine"
    assert compare(runs / "narrow", "--out", out, "--force").exit_code == 0
    assert "toprule" in out.read_text()
    done = compare(runs / "narrow", "--out", tmp_path / "t.xlsx")
    assert "expected a suffix of .md, .tex, .tsv, .csv, .parquet" in str(done.exception)


def test_all_runs_have_names_or_none(runs):
    done = compare(f"a={runs / 'all-0'}", runs / "narrow")
    assert done.exit_code == 2
    assert "narrow has none" in done.output
    for wrong in (f"={runs / 'all-0'}", "a="):
        done = compare(wrong)
        assert done.exit_code == 2
        assert "expected NAME=RUN, a name and a folder" in done.output


def test_a_folder_with_an_equals_sign_is_a_folder(runs, tmp_path):
    (tmp_path / "dim=4").symlink_to(runs / "narrow")
    done = compare(tmp_path / "dim=4")
    assert done.exit_code == 0, done.output
