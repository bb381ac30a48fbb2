"""The accuracy benchmark: validation chooses, and the test set is read once a row, at the end."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers import ROOT, TINY, ring_kg, same_weights, settings

import imvia_graph as ig
from imvia_graph import evaluation, training

FOLDER = ROOT / "benchmarks" / "accuracy"


@pytest.fixture(scope="module")
def bench():
    """The scripts as modules, found as they find each other."""
    sys.path.insert(0, str(FOLDER))
    try:
        import complex_n3
        import features
        import protocol
        import run

        yield SimpleNamespace(complex_n3=complex_n3, features=features, protocol=protocol, run=run)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def table(bench):
    pytest.importorskip("matplotlib")
    import table

    return table


SMALL = {**TINY, "epochs": 4, "patience": None}
BASELINE = {"rank": 4, "epochs": 4, "batch_size": 16}
GIVEN = {"full": SMALL, "complex-n3": BASELINE}
METRICS = {"mrr", "hits@1", "hits@3", "hits@10"}


@pytest.fixture
def kg():
    return ring_kg(24, valid=6, test=8)


def published(kg):
    """A graph half of whose validation triples are in train, too, as DB15K's are."""
    return kg.replace(valid=torch.cat([kg.valid[:3], kg.train[:3]]))


def row(bench, kg, dataset="MKG-Y", variant="full", seed=0, **options):
    return bench.run.make_row(kg, dataset, variant, seed, GIVEN[variant], **options)


@pytest.fixture
def ranked(bench, monkeypatch):
    """What was ranked, in order, and by which weights."""
    seen = []

    def recorded(model, triples, *args, **options):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        seen.append((triples.clone(), state))
        return evaluation.rank(model, triples, *args, **options)

    monkeypatch.setattr(training, "rank", recorded)
    monkeypatch.setattr(bench.protocol, "rank", recorded)
    return seen


def holds_any(triples, of):
    return bool(set(map(tuple, triples.tolist())) & set(map(tuple, of.tolist())))


def silent_tests(kg):
    """Two test sets, with true answers and with others, that filter no validation rank.

    No validation triple asks what their triples answer.
    """
    inverse = kg.num_relations
    asked = {query for h, r, t in kg.valid.tolist() for query in ((h, r), (t, r + inverse))}
    true = kg.test.tolist()
    false = [[h, r, (t + 5) % kg.num_entities] for h, r, t in true]
    sets = [
        torch.tensor([[h, r, t] for h, r, t in test if not asked & {(h, r), (t, r + inverse)}])
        for test in (true, false)
    ]
    assert all(len(test) > 2 for test in sets)
    return sets


# -- what chooses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", GIVEN)
@pytest.mark.parametrize("dataset", ["MKG-Y", "DB15K"])
def test_the_test_set_is_ranked_once_and_last(bench, kg, ranked, dataset, variant):
    kg = published(kg) if dataset == "DB15K" else kg
    row(bench, kg, dataset, variant)
    assert len(ranked) > 4
    *before, (last, _) = [(triples, state) for triples, state in ranked]
    assert torch.equal(last, kg.test)
    assert not any(holds_any(triples, kg.test) for triples, _ in before)


@pytest.mark.parametrize("variant", GIVEN)
def test_the_model_of_the_best_validation_epoch_is_what_ranks_the_test_set(
    bench, kg, ranked, variant
):
    found = row(bench, kg, "MKG-Y", variant)
    best = max(range(len(found["curve"])), key=lambda i: found["curve"][i])
    assert found["best_epoch"] == best + 1
    assert found["valid"]["mrr"] == found["curve"][best]
    *_, (_, chosen), (_, tested) = ranked
    validated = [state for triples, state in ranked if torch.equal(triples, kg.valid)][best]
    for state in (chosen, tested):
        assert all(torch.equal(state[name], validated[name]) for name in validated)


@pytest.mark.parametrize("variant", GIVEN)
def test_test_triples_with_other_answers_change_nothing_that_is_learned_or_chosen(
    bench, kg, ranked, variant
):
    found, states = [], []
    for test in silent_tests(kg):
        found.append(row(bench, kg.replace(test=test), variant=variant))
        states.append(ranked[-1][1])  # of the model that ranked the test set
    for key in ("curve", "best_epoch", "valid"):
        assert found[0][key] == found[1][key], key
    assert found[0]["test"] != found[1]["test"]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_early_stopping_of_fit_does_not_see_the_test_set(kg, ranked):
    given = settings(epochs=30, patience=2)
    runs = [ig.fit(kg.replace(test=test), settings=given) for test in silent_tests(kg)]
    assert {run.progress.ended for run in runs} == {"patience"}
    assert runs[0].progress.epoch == runs[1].progress.epoch < 30
    assert runs[0].progress.best_epoch == runs[1].progress.best_epoch
    assert same_weights(runs[0].model, runs[1].model)
    assert all(torch.equal(triples, kg.valid) for triples, _ in ranked)


def test_no_graph_that_is_trained_on_holds_a_test_triple(bench, kg):
    seen = []

    def method(graph, epochs):
        seen.append(graph)
        return bench.protocol.Trained(ig.IMVIA.from_kg(graph, settings()), [0.1], 1)

    bench.protocol.run_row(published(kg), method, held_out=True)
    bench.protocol.run_row(kg, method)
    assert len(seen) == 3
    for graph in seen:
        assert not len(graph.test)
        assert not holds_any(graph.train, kg.test)
        assert not holds_any(graph.valid, kg.test)
        assert graph.graph.num_edges("fact") == len(graph.train)


# -- a validation set held out --------------------------------------------------------------------


def test_with_validation_held_out_the_whole_train_set_is_trained_on_for_the_chosen_epochs(
    bench, kg
):
    kg = published(kg)
    seen = []
    real = bench.protocol.imvia(ig.Settings.create(SMALL))

    def method(graph, epochs):
        trained = real(graph, epochs)
        seen.append((graph, epochs, trained))
        return trained

    found = bench.protocol.run_row(kg, method, held_out=True)
    (first, no_limit, chosen), (second, epochs, final) = seen
    assert no_limit is None
    assert len(first.train) + len(first.valid) == len(kg.train)
    assert len(first.valid)
    assert not holds_any(first.train, first.valid)
    assert torch.equal(second.train, kg.train)
    assert not len(second.valid)
    assert epochs == found["best_epoch"] == chosen.best_epoch
    assert final.best_epoch == epochs == len(final.curve)
    # What was put aside filters ranks, as all that is known does.
    for graph in (first, second):
        assert holds_any(graph.known, kg.test)
        assert holds_any(graph.known, kg.valid)


@pytest.mark.parametrize("variant", GIVEN)
def test_training_that_is_stopped_after_some_epochs_is_the_start_of_the_longer_one(bench, variant):
    """So that a schedule of the learning rate stays the one that was validated."""
    kg = ring_kg(valid=0)
    if variant == "full":
        cosine = ig.Settings.create(SMALL, {"schedule": "cosine", "ema_decay": 0.9})
        method = bench.protocol.imvia(cosine)
        weights = []

        class Third(training.Callback):
            def on_epoch(self, trainer, record):
                if record["epoch"] == 2:
                    trainer.average.exchange()
                    weights.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
                    trainer.average.exchange()

        ig.fit(kg, settings=cosine, callbacks=[Third()])
        stopped = method(kg, 2).model.state_dict()
        assert all(torch.equal(stopped[name], weights[0][name]) for name in stopped)
    else:
        method = bench.complex_n3.method(BASELINE, 0)
        one = bench.complex_n3.method({**BASELINE, "epochs": 2}, 0)
        assert same_weights(method(kg, 2).model, one(kg, None).model)


def test_a_row_that_takes_its_epochs_from_another_trains_once_and_says_so(bench, kg, ranked):
    kg = published(kg)
    first = row(bench, kg, "DB15K")
    ranked.clear()
    second = row(bench, kg, "DB15K", seed=1, selection=first)
    assert len(ranked) == 1
    assert (first["epochs_of"], second["epochs_of"]) == (0, 0)
    assert second["best_epoch"] == first["best_epoch"]
    assert second["test"] != first["test"]


# -- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", GIVEN)
def test_a_row_says_what_it_is_and_the_same_seed_gives_it_again(bench, kg, variant):
    one, same, other = (row(bench, kg, variant=variant, seed=seed) for seed in (0, 0, 1))
    assert one.keys() >= {
        *("dataset", "variant", "seed", "settings", "curve", "best_epoch"),
        *("seconds", "device", "torch", "threads"),
    }
    assert one["valid"].keys() == one["test"].keys() == METRICS
    assert len(one["curve"]) == one["settings"]["epochs"] == 4
    for key in ("curve", "valid", "test", "settings"):
        assert one[key] == same[key]
        if key != "settings":
            assert one[key] != other[key]
    json.dumps(one, allow_nan=False)


def test_the_baseline_refuses_a_setting_that_it_has_not(bench):
    with pytest.raises(ig.SettingsError, match="lambda"):
        bench.complex_n3.method({"lambda": 1}, 0)


def test_every_settings_file_holds_settings(bench):
    names = [name for name in bench.run.variants() if name != bench.run.BASELINE]
    assert len(names) > 10
    for dataset in bench.features.ALL:
        for variant in names:
            ig.Settings.create(bench.run.settings_of(dataset, variant))
        bench.complex_n3.method(bench.run.settings_of(dataset, bench.run.BASELINE), 0)


def test_a_variant_changes_the_settings_of_its_data_set_and_keeps_the_others(
    bench, monkeypatch, tmp_path
):
    (tmp_path / "variants").mkdir()
    (tmp_path / "mkg-y.yaml").write_text("dim: 64\njoint: true\n")
    (tmp_path / "variants" / "without-joint.yaml").write_text("joint: false\n")
    monkeypatch.setattr(bench.run, "SETTINGS", tmp_path)
    assert bench.run.settings_of("MKG-Y", "full") == {"dim": 64, "joint": True}
    assert bench.run.settings_of("MKG-Y", "without-joint") == {"dim": 64, "joint": False}
    assert bench.run.settings_of("MKG-Y", "defaults") == {}
    assert bench.run.settings_of("MKG-Y", "defaults-without-joint") == {"joint": False}


@pytest.fixture
def command(bench, monkeypatch, tmp_path):
    """run.py on the ring as MKG-Y, with rows in a folder of the test."""
    text = yaml.safe_dump({key: SMALL[key] for key in ("dim", "batch_size", "epochs")})
    (tmp_path / "settings" / "variants").mkdir(parents=True)
    for name in ("mkg-y", "mkg-w", "db15k"):
        (tmp_path / "settings" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(bench.run, "SETTINGS", tmp_path / "settings")
    for name in ("MKG-Y", "DB15K"):
        ring_kg(24, valid=6, test=8).save(tmp_path / "data" / name)

    def invoke(*arguments, status=0):
        places = ["--data", tmp_path / "data", "--results", tmp_path / "rows"]
        threads = torch.get_num_threads()
        result = CliRunner().invoke(bench.run.main, [*map(str, [*arguments, *places])])
        torch.set_num_threads(threads)
        assert result.exit_code == status, result.output
        return result.output

    return invoke


def test_the_command_writes_a_row_and_does_not_run_it_again(command, tmp_path):
    command("row", "MKG-Y", "full", "--seed", "3")
    path = tmp_path / "rows" / "MKG-Y-full-3.json"
    found = json.loads(path.read_text())
    assert (found["dataset"], found["variant"], found["seed"]) == ("MKG-Y", "full", 3)
    assert found["settings"]["dim"] == SMALL["dim"]
    path.write_text("{}")
    assert "exists already" in command("row", "MKG-Y", "full", "--seed", "3")
    assert path.read_text() == "{}"
    command("row", "MKG-Y", "full", "--seed", "3", "--force")
    assert json.loads(path.read_text())["test"] == found["test"]


def test_the_command_says_what_is_missing(command):
    assert "features.py MKG-W" in command("row", "MKG-W", "full", status=1)
    assert "Unknown variant 'nothing'" in command("row", "MKG-Y", "nothing", status=1)
    assert "held out" in command("row", "MKG-Y", "full", "--epochs-of", 0, status=2)
    assert "run that row first" in command("row", "DB15K", "full", "--epochs-of", 0, status=2)


# -- the baseline -------------------------------------------------------------------------------


def test_the_baseline_s_loss_is_softmax_and_n3_of_each_triple_in_both_directions(bench):
    kg = ring_kg(views=False)
    kg = kg.replace(train=torch.cat([kg.train, torch.tensor([[0, 0, 5], [0, 0, 7]])]))
    torch.manual_seed(0)
    model = bench.complex_n3.ComplEx(kg.num_entities, kg.num_relations, 4)
    for table in (model.entity, model.relation):
        torch.nn.init.normal_(table.weight)
    (batch,) = training.Batches(kg, settings(batch_size=1000), model.device)
    assert len(batch.entity) < 2 * len(kg.train)  # some rows stand for several triples
    found = bench.complex_n3.loss(model, batch, weight=0.3)
    entity = torch.view_as_complex(model.entity.weight.reshape(-1, 2, 4).mT.contiguous())
    relation = torch.view_as_complex(model.relation.weight.reshape(-1, 2, 4).mT.contiguous())
    expected = []
    for h, r, t in both_directions(kg):
        scores = (entity[h] * relation[r] * entity.conj()).real.sum(1)
        cubes = sum(factor.abs().pow(3).sum() for factor in (entity[h], relation[r], entity[t]))
        expected.append(scores.logsumexp(0) - scores[t] + 0.3 * cubes)
    torch.testing.assert_close(found, torch.stack(expected).mean())


def both_directions(kg):
    for h, r, t in kg.train.tolist():
        yield h, r, t
        yield t, r + kg.num_relations, h


# -- its search ------------------------------------------------------------------------


def test_the_search_of_the_baseline_goes_on_and_never_ranks_a_test_triple(
    bench, kg, ranked, tmp_path
):
    pytest.importorskip("optuna")
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    first = bench.complex_n3.search(kg, 2, storage, epochs=2, rank=4)
    before = [trial.params for trial in first.trials]
    assert len(before) == 2
    assert before[0] == {key: bench.complex_n3.DEFAULTS[key] for key in before[0]}
    again = bench.complex_n3.search(kg, 3, storage, epochs=2, rank=4)
    *kept, new = [trial.params for trial in again.trials]
    assert kept == before
    assert new not in before
    assert ranked
    assert all(torch.equal(triples, kg.valid) for triples, _ in ranked)


# -- features -------------------------------------------------------------------------------------


def test_features_are_made_of_names_alone(bench, monkeypatch, tmp_path):
    """Another graph of the same entities gets the same views."""

    class Letters(ig.encode.Encoder):
        name, modality, width, identity = "letters", "text", 3, "letters-1"

        def prepare(self, source):
            return source

        def encode(self, batch):
            return torch.tensor([[float(len(t)), float(t.count("e")), 1.0] for t in batch])

    kg = ring_kg(views=False, entity_names=[f"Été {i} (season)" for i in range(12)])
    others = kg.replace(train=kg.train[::2], valid=kg.train[:2], test=kg.train[4:9])
    made = []
    for place, graph in enumerate((kg, others)):
        monkeypatch.setattr(bench.features.ig, "load_kg", lambda *a, graph=graph, **k: graph)
        made.append(bench.features.make("MKG-Y", tmp_path / str(place), Letters()))
    for mine, theirs in zip(made[0].views("text"), made[1].views("text"), strict=True):
        assert torch.equal(mine, theirs)
    assert made[0].view_sources("text")[:3] == ["Été 0 (season)", "Été 0", "season"]
    assert ig.load_kg(tmp_path / "0").num_entities == 12


# -- tables ---------------------------------------------------------------------------------------


def made_up(dataset, variant, seed, mrr, epochs_of=None):
    """A row of a made-up result, for the tables' arithmetic."""
    figures = dict.fromkeys(METRICS, mrr)
    return {
        "dataset": dataset,
        "variant": variant,
        "seed": seed,
        "epochs_of": seed if epochs_of is None else epochs_of,
        "valid": {**figures, "mrr": mrr / 2},
        "test": figures,
        "seconds": 90.0,
    }


def test_the_table_has_mean_and_spread_over_seeds_beside_what_is_published(table):
    rows = [made_up("MKG-Y", "full", seed, mrr) for seed, mrr in enumerate((0.38, 0.39, 0.40))]
    text = table.results_tables(rows)
    assert "| 19.50 ± 0.50 | 39.00 ± 1.00 |" in text
    assert "| 3 | 1.5 |" in text
    assert "as published" in text
    assert "| 37.97 | 35.15 |  | 43.47 |" in text
    assert "MKG-W" not in text


def test_the_summary_has_the_test_mrr_of_each_data_set_beside_what_is_published(table):
    rows = [made_up("MKG-Y", "defaults", 0, 0.382), made_up("DB15K", "complex-n3", 0, 0.393)]
    lines = table.summary_table(rows).splitlines()
    assert lines[0] == "|  | " + " | ".join(table.DATASETS) + " |"
    cells = {
        name: dict(zip(table.DATASETS, found, strict=True))
        for name, *found in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])
    }
    assert cells["IMVIA, structure and names, default settings"]["MKG-Y"] == "38.20"
    assert cells["ComplEx-N3, structure alone, tuned"]["DB15K"] == "39.30"
    assert cells["IMVIA, as published: with pictures and texts"]["MKG-W"] == "35.62"
    assert len(cells) == 3  # what was not measured has no row
    assert table.summary_table([]) == ""


def test_a_row_says_where_its_settings_are_the_defaults(table, monkeypatch):
    monkeypatch.setattr(table, "settings_of", lambda name, _: {"MKG-W": {}}.get(name, {"dim": 8}))
    assert table.name_of("MKG-W", "full") == "IMVIA, structure and names, default settings"
    assert table.name_of("MKG-Y", "full") == "IMVIA, structure and names, its own settings"
    assert table.name_of("MKG-W", "structure-alone") == "structure alone"


def test_validation_is_counted_once_where_rows_share_it(table):
    rows = [made_up("DB15K", "full", 0, 0.4), made_up("DB15K", "full", 1, 0.6, epochs_of=0)]
    assert table.cells(rows)[:2] == ["20.00", "50.00 ± 14.14"]


def test_the_ablation_is_the_difference_seed_by_seed(table):
    rows = [
        *(made_up("MKG-Y", "full", seed, mrr) for seed, mrr in enumerate((0.30, 0.40))),
        *(made_up("MKG-Y", "without-joint", seed, mrr) for seed, mrr in enumerate((0.29, 0.38))),
        made_up("MKG-Y", "without-joint", 7, 0.9),
        made_up("MKG-W", "full", 0, 0.3),
    ]
    assert table.differences(rows, "MKG-Y", "without-joint") == pytest.approx([-0.01, -0.02])
    assert table.ablation_table(rows).splitlines() == [
        "|  | variant | MKG-Y |",
        "| --- | --- | --- |",
        "| all parts: test MRR | `full` | 35.00 ± 7.07 |",
        "| **Without a part of the paper** |  |  |",
        "| no joint head | `without-joint` | -1.50 ± 0.71 |",
    ]


def test_the_ablation_names_every_variant_that_there_is(table):
    named = {variant for group in table.ABLATION.values() for variant in group}
    assert named == set(table.variants()) - {table.FULL, table.DEFAULTS, table.BASELINE}


def test_rows_are_gathered_tables_go_between_the_markers_and_the_picture_is_drawn(table, tmp_path):
    rows = [
        made_up("MKG-Y", variant, seed, 0.3 + seed / 100)
        for variant in ("without-joint", "full")
        for seed in (1, 0)
    ]
    for i, one in enumerate(rows):
        (tmp_path / f"{i}.json").write_text(json.dumps(one))
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- accuracy:ablation -->\nold\n<!-- /accuracy:ablation -->\nb\n"
        "<!-- accuracy:countries -->\n<!-- /accuracy:countries -->\n"
    )
    out, picture = tmp_path / "all" / "accuracy.json", tmp_path / "ablation.svg"
    out.parent.mkdir()
    places = ["--results", tmp_path, "--out", out, "--picture", picture, "--page", page]
    for _ in range(2):  # the second time changes nothing
        result = CliRunner().invoke(table.main, list(map(str, places)))
        assert result.exit_code == 0, result.output
    found = [(one["variant"], one["seed"]) for one in json.loads(out.read_text())]
    assert found == [("full", 0), ("full", 1), ("without-joint", 0), ("without-joint", 1)]
    text = page.read_text()
    assert text.startswith("a\n<!-- accuracy:ablation -->\n|  | variant | MKG-Y |\n")
    assert "old" not in text
    assert "(ablation.svg)\n<!-- /accuracy:ablation -->\nb\n" in text
    assert "Not measured.\n<!-- /accuracy:countries -->" in text
    assert "<svg" in picture.read_text()
