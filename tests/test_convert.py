"""``imvia-graph convert``: any form into any other, from the command line."""

import pytest
from click.testing import CliRunner
from helpers import contents, ring_kg, settings, write_folder

import imvia_graph as ig
from imvia_graph import MultiViewKG, load_kg
from imvia_graph._forms import FORMATS
from imvia_graph.cli import command_line
from imvia_graph.errors import DataError


def run(*arguments):
    return CliRunner().invoke(command_line, ["convert", *map(str, arguments)])


def triples(kg):
    return sorted((kg.entities[h], kg.relations[r], kg.entities[t]) for h, r, t in kg.train)


@pytest.mark.parametrize("form", FORMATS)
def test_every_form_is_written_and_read_again(form, tmp_path):
    kg = ring_kg()
    source = kg.save(tmp_path / "kg")
    result = run(source, tmp_path / "out", "--to", form)
    assert result.exit_code == 0, result.output
    again = load_kg(tmp_path / "out", "published")
    assert triples(again) == triples(kg)
    assert len(again.valid) == len(again.test) == 3
    assert again.modalities == (kg.modalities if form == "kg" else [])


def test_it_says_what_it_read_what_it_wrote_and_what_it_left_out(tmp_path):
    kg = ring_kg()
    source = kg.save(tmp_path / "kg")
    result = run(source, tmp_path / "g.nt")
    assert result.exit_code == 0, result.output
    assert "12 entities, 2 relations, 18 train" in result.output
    views = sum(kg.graph.num_nodes(modality) for modality in kg.modalities)
    assert f"{views} views of 2 modalities (image, text) are left out" in result.output
    assert "splits are not kept" in result.output
    assert f"Wrote {tmp_path / 'g.nt'}.\n" in result.stdout  # without the views left out


def test_a_file_without_splits_is_split_unless_told(tmp_path):
    rows = "".join(f"{i},{r},{j}\n" for i in range(12) for j in range(12) for r in "ab")
    write_folder(tmp_path, {"g.csv": rows})
    result = run(tmp_path / "g.csv", tmp_path / "split", "--to", "kg", "--seed", "3")
    assert "The source has no splits; split into" in result.output
    kg = MultiViewKG.load(tmp_path / "split")
    assert len(kg.valid) > 20
    assert len(kg.test) > 20
    run(tmp_path / "g.csv", tmp_path / "whole", "--to", "kg", "--split", "none")
    assert len(MultiViewKG.load(tmp_path / "whole").train) == 288


def test_columns_can_be_told(tmp_path):
    write_folder(tmp_path, {"g.tsv": "who\twhom\thow\na\tb\tr\n"})
    out = tmp_path / "out"
    result = run(tmp_path / "g.tsv", out, "--columns", "who,how,whom", "--split", "none")
    assert result.exit_code == 0, result.output
    assert triples(load_kg(out)) == [("a", "r", "b")]


def test_a_target_that_is_there_is_left_alone_unless_told(tmp_path):
    source = ring_kg().save(tmp_path / "kg")
    (tmp_path / "g.csv").write_text("mine")
    result = run(source, tmp_path / "g.csv")
    assert isinstance(result.exception, DataError)
    assert "--overwrite" in str(result.exception)
    assert (tmp_path / "g.csv").read_text() == "mine"
    assert run(source, tmp_path / "g.csv", "--overwrite").exit_code == 0


def test_the_graph_of_a_run_is_not_replaced(tmp_path):
    source = ring_kg().save(tmp_path / "kg")
    trained = ig.fit(ring_kg(views=False), settings=settings(epochs=1), out=tmp_path / "run")
    before = contents(trained.folder)
    (tmp_path / "linked").symlink_to(trained.folder / "kg")
    for target in (trained.folder / "kg", tmp_path / "linked"):
        result = run(source, target, "--overwrite")
        assert "is the graph that the run in" in str(result.exception)
    assert contents(trained.folder) == before


def test_files_that_are_removed_are_named(tmp_path):
    source = ring_kg(views=False).save(tmp_path / "kg")
    write_folder(tmp_path / "out", {"train.csv": "a,b,c\n", "Dev.nt.gz": "", "readme.md": "mine"})
    result = run(source, tmp_path / "out", "--to", "tsv", "--overwrite")
    assert result.exit_code == 0, result.output
    assert f"that was there before: {tmp_path}/out/Dev.nt.gz, {tmp_path}/out/train.csv." in (
        result.stderr
    )
    assert sorted(contents(tmp_path / "out")) == [
        *("readme.md", "test.tsv", "train.tsv", "valid.tsv")
    ]
    assert "Removed" not in run(source, tmp_path / "out", "--to", "tsv", "--overwrite").output


@pytest.mark.parametrize("to", ["kg", "tsv", "openke", "npz"])
def test_files_beside_the_source_that_were_not_read_stay(to, tmp_path):
    rows = "".join(f"a{i},r,b{i}\n" for i in range(9))
    folder = write_folder(tmp_path / "g", {"train.csv": rows, "valid.csv": rows, "test.csv": rows})
    before = contents(folder)
    result = run(folder / "train.csv", folder, "--to", to, "--overwrite")
    assert isinstance(result.exception, DataError)
    assert "'test.csv', 'valid.csv' would be removed, but only" in str(result.exception)
    assert contents(folder) == before
    # Where all of them are read, they may go; and a graph may be written anew beside its source.
    assert run(folder, folder, "--to", to, "--overwrite").exit_code == 0
    write_folder(tmp_path / "other", {"facts.csv": rows})
    for _ in range(2):
        result = run(tmp_path / "other/facts.csv", tmp_path / "other", "--to", to, "--overwrite")
        assert result.exit_code == 0, result.output
        assert "Removed" not in result.output


def test_arrays_that_are_no_splits_are_not_removed(tmp_path):
    source = ring_kg(views=False).save(tmp_path / "kg")
    write_folder(tmp_path / "out", {"test.npy": "features", "train.csv": "a,b,c\n"})
    before = contents(tmp_path / "out")
    result = run(source, tmp_path / "out", "--overwrite")
    assert "'test.npy' would keep the graph from being read" in str(result.exception)
    assert contents(tmp_path / "out") == before


def test_shares_that_are_no_numbers_are_a_usage_error(tmp_path):
    source = ring_kg().save(tmp_path / "kg")
    result = run(source, tmp_path / "out", "--split", "most")
    assert result.exit_code == 2
    assert "--split" in result.output
