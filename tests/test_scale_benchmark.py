"""The benchmark of scale: graphs as promised, a ladder that runs, and figures that add up."""

import json
import sys
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from click.testing import CliRunner
from helpers import ROOT
from safetensors.torch import load_file

import imvia_graph as ig

FOLDER = ROOT / "benchmarks" / "scale"


@pytest.fixture(scope="module")
def bench():
    """The scripts as modules, found as they find each other."""
    sys.path.insert(0, str(FOLDER))
    try:
        import generate
        import ladder
        import reckon

        yield SimpleNamespace(generate=generate, ladder=ladder, reckon=reckon)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def made(bench, tmp_path_factory):
    """A graph of a thousand entities: its folder, what was told of it, and the graph."""
    folder = tmp_path_factory.mktemp("made") / "kg"
    size = bench.generate.Size(1000, relations=20, types=5)
    told = bench.generate.generate(folder, size)
    return SimpleNamespace(folder=folder, size=size, told=told, kg=ig.load_kg(folder, "published"))


# -- the generator --------------------------------------------------------------------------------


def test_what_is_told_of_a_graph_is_in_it(made):
    kg = made.kg
    assert (kg.num_entities, kg.num_relations, len(kg.train)) == (1000, 20, made.told["triples"])
    feat, _ = kg.views("image")
    assert (len(feat), feat.shape[1], feat.dtype) == (made.told["views"], 256, torch.float16)
    assert feat.nbytes == made.told["bytes"]


def test_splits_are_disjoint_and_every_entity_is_in_train(made):
    kg = made.kg
    assert len(kg.valid) == len(kg.test) > 100
    everything = torch.cat([kg.train, kg.valid, kg.test])
    assert len(everything.unique(dim=0)) == len(everything)
    assert not len(kg.unseen_entities())


def test_degrees_are_of_a_power_law(bench, tmp_path):
    size = bench.generate.Size(30_000, views_each=1, width=2)
    bench.generate.generate(tmp_path, size)
    kg = ig.load_kg(tmp_path, "published")
    degree = torch.bincount(kg.train[:, [0, 2]].flatten(), minlength=30_000).double()
    assert degree.min() >= 1
    # Hill's estimator of the tail's exponent less 1, of the 500 largest.
    top = degree.sort(descending=True).values[:500]
    exponent = 1 + 1 / (top / top[-1]).log().mean()
    assert 2 < exponent < 3.2
    assert top[0] > 50 * degree.median()


def test_a_relation_joins_one_type_to_another_and_mostly_one_cluster_to_one(made):
    table = pl.read_csv(made.folder / "entities.tsv", separator="\t")
    kind, cluster = table["type"].to_torch(), table["cluster"].to_torch()
    together = 0
    for relation in range(20):
        head, _, tail = made.kg.train[made.kg.train[:, 1] == relation].T
        assert len(kind[head].unique()) == 1
        assert len(kind[tail].unique()) == 1
        for one in cluster[head].unique():
            together += int(torch.bincount(cluster[tail[cluster[head] == one]]).max())
    assert together > 0.7 * len(made.kg.train)


def test_an_entity_has_none_to_twelve_views_and_four_on_average(made):
    count = made.kg.views("image")[1].diff()
    assert count.min() == 0
    assert count.max() == 12
    assert count.double().mean() == pytest.approx(4, abs=0.3)


def test_views_of_a_cluster_are_alike(made):
    table = pl.read_csv(made.folder / "entities.tsv", separator="\t")
    group = table["type"].to_torch() * 1000 + table["cluster"].to_torch()
    feat, ptr = made.kg.views("image")
    owner = torch.arange(1000).repeat_interleave(ptr.diff())
    unit = torch.nn.functional.normalize(feat.float())
    alike = unit @ unit.T
    same = (group[owner][:, None] == group[owner]) & (owner[:, None] != owner)
    assert alike[same].mean() > 0.2
    assert alike[~same & (owner[:, None] != owner)].mean().abs() < 0.02


def test_the_same_seed_makes_the_same_files_and_another_makes_others(bench, made, tmp_path):
    for seed in (0, 1):
        bench.generate.generate(tmp_path / f"{seed}", made.size, seed)
    for name in ("train.tsv", "test.tsv", "views/image.csv", "views/image.safetensors"):
        expected = (made.folder / name).read_bytes()
        assert (tmp_path / "0" / name).read_bytes() == expected
        assert (tmp_path / "1" / name).read_bytes() != expected


def test_portions_make_no_difference_to_what_the_library_reads(bench, made, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.generate, "ROWS", 100)
    bench.generate.generate(tmp_path, made.size._replace(dtype="float32", modalities=("a", "b")))
    kg = ig.load_kg(tmp_path, "published")
    assert kg.modalities == ["a", "b"]
    for modality in kg.modalities:
        feat, _ = kg.views(modality)
        assert torch.equal(feat, load_file(tmp_path / "views" / f"{modality}.safetensors")["feat"])
        assert 0.9 < feat.std() < 2


@pytest.mark.parametrize(("modalities", "epochs"), [(["image"], 4), ([], 12)], ids=str)
def test_a_short_fit_ranks_well_above_chance(made, modalities, epochs):
    run = ig.fit(made.kg, modalities=modalities, epochs=epochs, dim=32, batch_size=256,
                 validation="published", device="cpu", precision="float32")  # fmt: skip
    # By chance: the mean of 1 / rank over 1,000 entities is 0.0075.
    assert run.evaluate("test")["both"]["mrr"] > 0.1


# -- the ladder -----------------------------------------------------------------------------------


def test_sizes_are_read_as_people_write_them(bench):
    assert [bench.ladder.size_of(text) for text in ("10k", "1m", " 5M", "1.5k", "700")] == [
        10_000, 1_000_000, 5_000_000, 1_500, 700]  # fmt: skip


def test_a_ladder_measures_draws_and_leaves_no_graph_behind(bench, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    options = ["--sizes", "1k,2k", "--seconds", "1", "--threads", "1", "--set", "dim=8"]
    out, picture = tmp_path / "scale.json", tmp_path / "scale.svg"
    found = CliRunner().invoke(
        bench.ladder.main,
        [*options, "--folder", str(made), "--out", str(out), "--picture", str(picture)],
        catch_exceptions=False,
    )
    assert found.exit_code == 0, found.output
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert [row["entities"] for row in rows] == [1000, 2000]
    for row in rows:
        assert row["triples_a_second"] > 0
        assert 0 < row["anonymous_peak"] < row["resident_peak"]
        assert row["rank_seconds"] > 0
        assert row["settings"]["dim"] == 8
    assert picture.read_text("utf-8").startswith("<?xml")
    assert not list(made.iterdir())


# -- the reckoning --------------------------------------------------------------------------------


def test_tables_are_split_over_processes_and_the_index_is_not(bench):
    graph, model = bench.reckon.GRAPHS[0], bench.reckon.Model()
    one, eight = (bench.reckon.held(graph, model, count, "rowwise") for count in (1, 8))
    assert one["tables"] == 8 * eight["tables"] == 2 * 4_594_485 * 256 * 4
    assert one["host"] == eight["host"]


def test_operations_of_a_step_are_those_that_torch_counts(bench):
    from torch.utils.flop_counter import FlopCounterMode

    model = bench.reckon.Model(dim=16, relation_dim=8, heads=2, batch=32, negatives=64)
    query, table = torch.randn(32, 16, requires_grad=True), torch.randn(96, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (query @ table.T).sum().backward()
    graph = bench.reckon.Graph("", 1000, 0, 1000, 0, 0)
    # Without relations and views: scores of each head, and the decoders' products with a query.
    expected = 2 * counter.get_total_flops() + 6 * 2 * 32 * 16 * 16
    assert bench.reckon.step(graph, model, 1)["operations"] == expected


def test_the_table_is_printed_with_and_without_measured_rates(bench, tmp_path):
    result = tmp_path / "scale.json"
    found = CliRunner().invoke(bench.reckon.main, ["--result", str(result)])
    assert "There are no CPU measurements yet" in found.output
    row = {"entities": 1000, "triples_a_second": 1000.0}
    result.write_text(json.dumps({"rows": [row]}), "utf-8")
    found = CliRunner().invoke(bench.reckon.main, ["--result", str(result)])
    assert "| Wikidata5M | 9.4 GB | 5.7 h |" in found.output
