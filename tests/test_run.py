"""fit, load, resume, evaluate, predict and embeddings: a run from its start to its uses."""

import json
import math
import re

import pytest
import torch
from helpers import (
    TINY,
    assert_same_kg,
    contents,
    differing_tensors,
    ring_kg,
    same_weights,
    settings,
    write_folder,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import imvia_graph as ig
from imvia_graph import CheckpointError, DataError, SettingsError, UnknownLabelError, checkpoint
from imvia_graph.training import Callback, Trainer

FILES = ("best.safetensors", "last.safetensors")


class StopAt(Callback):
    """Interrupts training as Ctrl-C would: in the middle of an epoch, or just after one."""

    def __init__(self, *, step=None, epoch=None):
        self.step, self.epoch = step, epoch

    def on_step(self, trainer, losses):
        if trainer.progress.step == self.step:
            raise KeyboardInterrupt

    def on_epoch(self, trainer, record):
        if record["epoch"] == self.epoch:
            raise KeyboardInterrupt


def fit(out=None, kg=None, **options):
    return ig.fit(kg or ring_kg(), out=out, **{**TINY, **options})


def metrics_of(folder):
    """The lines of metrics.jsonl without the seconds, which differ from run to run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        assert record.pop("seconds") >= 0
    return records


def assert_same_run(one, other):
    """Two run folders hold the same weights, optimizer and random states to the bit."""
    for name in FILES:
        assert differing_tensors(one / name, other / name) == [], name
    assert metrics_of(one) == metrics_of(other)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with its folder; not to be changed."""
    torch.manual_seed(99)
    return fit(tmp_path_factory.mktemp("runs") / "ring", epochs=4)


# -- fit and load ---------------------------------------------------------------------------------


def test_fit_writes_the_run_folder_that_its_layout_names(finished):
    names = set(contents(finished.folder))
    assert {name for name in names if not name.startswith("kg/")} == {
        "run.json",
        "settings.yaml",
        "metrics.jsonl",
        "previous.safetensors",
        ".lock",
        *FILES,
    }
    assert {"kg/kg.json", "kg/train.tsv", "kg/views/image.safetensors"} <= names
    about = json.loads((finished.folder / "run.json").read_text())
    assert about["kg"] == "ring"
    assert about["versions"]["torch"] == torch.__version__
    assert [record["epoch"] for record in metrics_of(finished.folder)] == [1, 2, 3, 4]


def test_fit_without_out_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fit(epochs=1)
    assert run.folder is None
    assert list(tmp_path.iterdir()) == []


def test_fit_takes_a_graph_a_folder_or_a_name(tmp_path):
    kg = ring_kg()
    from_graph = fit(kg=kg, epochs=2)
    from_folder = fit(kg=kg.save(tmp_path / "ring"), epochs=2)
    assert same_weights(from_graph.model, from_folder.model)


@pytest.mark.parametrize("regime", ["1vsall", "sampled"])
def test_the_model_of_a_run_trains_on_in_a_model_around_it(regime):
    run = ig.fit(ring_kg(), settings=settings(regime=regime), epochs=1)
    tables = run.model.entity_tables
    before = [table.weight.detach().clone() for table in tables]
    optimizer = torch.optim.SGD(run.encoder.parameters(), lr=1.0)
    optimizer.zero_grad()
    sum(feat.square().sum() for feat in run.encoder(torch.arange(4)).values()).backward()
    optimizer.step()
    for table, old in zip(tables, before, strict=True):
        moved = (table.weight.detach() - old).abs().sum(1) > 0
        assert moved[:4].any()
        assert not moved[4:].any()
        assert table.looked_up() == []
    run.encoder.requires_grad_(False)
    assert not any(feat.requires_grad for feat in run.encoder(torch.arange(4)).values())


def test_what_is_learned_does_not_depend_on_the_unit_of_the_features():
    kg = ring_kg()

    def trained(unit, **changes):
        views = {m: kg._views(m) for m in kg.modalities}
        views = {m: view._replace(feat=view.feat * unit) for m, view in views.items()}
        return ig.fit(kg.replace(views=views), settings=settings(), epochs=2, **changes)

    runs = [trained(unit) for unit in (2.0**8, 2.0**14, 2.0**-10)]
    for run in runs[1:]:
        assert same_weights(run.model, runs[0].model)
    for modality, (feat, _) in runs[0].model.views.items():
        assert 0.5 <= feat.norm(dim=1).median() <= 2, modality
    # Few of them are touched, and none where that is not wanted.
    for run in (trained(1.0), trained(2.0**7, scale_views=False)):
        assert run.model.view_scale == {"image": None, "text": None}


def test_new_entities_views_are_scaled_as_the_graphs_are():
    kg = ring_kg()
    views = {m: kg._views(m) for m in kg.modalities}
    views["text"] = views["text"]._replace(feat=views["text"].feat * 2.0**8)
    run = ig.fit(kg.replace(views=views), settings=settings(complex_head=False), epochs=1)
    feat, ptr = run.kg.views("text")
    asked = ig.Predictor(run.model, run.kg).predict_new(
        {"text": feat[ptr[3] : ptr[4]]}, relation="after", k=1
    )
    assert math.isfinite(asked[0].score)
    assert run.model.scaled("text", feat).norm(dim=1).median() < 2


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([ig.ProgressBar], "received the class ProgressBar. Call it"),
        ([print], "expected instances of imvia_graph.Callback, received"),
        (ig.ProgressBar, "received the class ProgressBar. Call it"),
        (7, "received 7"),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_is_done(callbacks, message, tmp_path):
    with pytest.raises(SettingsError, match=message):
        ig.fit(ring_kg(), settings=settings(), callbacks=callbacks, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_callback_is_enough_and_names_that_are_never_called_are_told(caplog):
    seen = []

    class Epochs(ig.Callback):
        def on_epoch(self, trainer, record):
            seen.append(record["epoch"])

        def on_epoch_end(self, trainer, record):
            seen.append("never")

    assert "Epochs.on_epoch_end: training calls no hook of that name" in caplog.text
    assert "on_close, on_end, on_epoch," in caplog.text
    ig.fit(ring_kg(), settings=settings(), epochs=2, callbacks=Epochs())
    assert seen == [1, 2]


def test_a_default_dtype_that_is_not_float32_is_refused():
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(SettingsError, match=r"default dtype is torch\.float64"):
            ig.fit(ring_kg(), settings=settings())
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_run_loads_where_autocast_is_on(tmp_path):
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).half()
    kg = ring_kg(views=False).replace(views={"text": ig.Views(features, torch.arange(12))})
    run = ig.fit(kg, settings=settings(), epochs=1, out=tmp_path / "run")
    with torch.autocast("cpu", torch.bfloat16):
        loaded = ig.load(tmp_path / "run")
    assert same_weights(loaded.model, run.model)


@pytest.mark.parametrize("candidates", [[5, 1, 2], torch.tensor([1, 2, 5])])
def test_candidates_are_given_as_a_list_or_drawn_by_any_whole_number(candidates):
    run = ig.fit(ring_kg(), settings=settings(), epochs=1)
    assert run.evaluate(candidates=candidates)["candidates"] == "3 entities given"
    drawn = [run.evaluate(candidates=count) for count in (4, torch.tensor(4))]
    assert drawn[0] == drawn[1]
    with pytest.raises(DataError, match=r"expected \(C,\) int64 ids"):
        run.evaluate(candidates=4.0)


def test_overrides_go_over_settings(tmp_path):
    run = ig.fit(ring_kg(), settings=settings(epochs=9, dim=5), epochs=1)
    assert (run.settings.epochs, run.settings.dim, run.progress.epoch) == (1, 5, 1)
    with pytest.raises(SettingsError, match="did you mean 'epochs'"):
        ig.fit(ring_kg(), epoch=1)


def test_fit_takes_the_settings_of_the_paper_by_name_and_trains_with_them():
    run = ig.fit(ring_kg(), settings="paper", epochs=1, dim=8, relation_dim=8, device="cpu")
    assert run.settings == ig.Settings.of("paper").replace(
        epochs=1, dim=8, relation_dim=8, device="cpu", precision=run.settings.precision
    )
    assert list(run.model.heads) == ["structure", "image", "text", "joint"]
    assert math.isfinite(run.history[-1]["loss"])


@pytest.mark.parametrize("modalities", [["text"], ["text", "image"], []])
def test_fit_uses_the_modalities_that_are_named(modalities, tmp_path):
    run = fit(tmp_path / "run", epochs=1, modalities=modalities)
    joint = ["joint"] if modalities else []
    assert run.model.heads == ["structure", *modalities, *joint, "complex"]
    assert ig.load(run.folder).model.heads == run.model.heads


def test_a_modality_that_the_graph_has_not_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match=r"no views of 'video'; it has 'image', 'text'"):
        fit(tmp_path / "run", modalities=["text", "video"])
    assert list(tmp_path.iterdir()) == []


def test_a_label_that_cannot_be_saved_leaves_no_half_made_run_folder(tmp_path):
    kg = ring_kg(entity_names=["a\tb"] * 12)
    with pytest.raises(DataError, match="tab"):
        fit(tmp_path / "run", kg=kg)
    # The same folder is still good for a run.
    fit(tmp_path / "run", epochs=1)


def test_validation_auto_holds_out_of_train_where_the_published_set_leaks(tmp_path):
    kg = ring_kg(60, valid=0)
    kg = kg.replace(valid=kg.train[:5])
    run = fit(tmp_path / "run", kg=kg, epochs=1)
    triples = [set(map(tuple, part.tolist())) for part in (run.kg.train, run.kg.valid)]
    assert not triples[0] & triples[1]
    assert "are in train" in run.kg.notes[-1]
    assert_same_kg(run.kg, ig.load(run.folder).kg)
    published = fit(kg=kg, epochs=1, validation="published")
    assert torch.equal(published.kg.valid, kg.valid)


def test_held_out_validation_is_held_out_once(tmp_path):
    kg = ring_kg(60, valid=4)
    run = fit(tmp_path / "run", kg=kg, epochs=1, validation="held-out")
    assert len(run.kg.train) + len(run.kg.valid) == len(kg.train)
    assert torch.equal(run.kg.valid, ig.load_kg(kg, "held-out", TINY.get("seed", 0)).valid)


def test_load_gives_the_same_model_graph_settings_and_metrics(finished):
    run = ig.load(finished.folder)
    assert same_weights(run.model, finished.model)
    assert run.settings == finished.settings
    assert run.progress.best_epoch == finished.progress.best_epoch
    assert run.progress.best_mrr == finished.progress.best_mrr
    assert_same_kg(run.kg, finished.kg)
    assert run.model.training is False
    for split in ("train", "valid", "test"):
        assert run.evaluate(split) == finished.evaluate(split)


def worse_every_epoch(monkeypatch):
    """Have each validation be worse than the one before."""
    from imvia_graph import training

    made = iter(range(1, 100))
    monkeypatch.setattr(training, "rank_metrics", lambda ranks: {"mrr": 1 / next(made)})


def test_load_says_how_far_training_came_and_has_the_model_of_the_best_epoch(tmp_path, monkeypatch):
    worse_every_epoch(monkeypatch)
    run = fit(tmp_path / "run", epochs=4, patience=None)
    loaded = ig.load(run.folder)
    assert (loaded.progress.best_epoch, loaded.progress.epoch) == (1, 4)
    assert loaded.progress.ended == "epochs"
    assert loaded.progress == run.progress
    assert same_weights(loaded.model, run.model)
    again = ig.load(loaded.save(tmp_path / "again"))
    assert again.progress == loaded.progress


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_load_without_a_last_checkpoint_that_can_be_read_says_what_the_best_one_knows(
    damage, finished, tmp_path
):
    folder = write_folder(tmp_path / "run", contents(finished.folder))
    for name in ("last.safetensors", "previous.safetensors"):
        damage(folder / name)
    progress = ig.load(folder).progress
    assert progress.epoch == progress.best_epoch == finished.progress.best_epoch


def test_a_best_model_found_after_the_last_checkpoint_says_its_own_epoch(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", kg=ring_kg(), checkpoint_every=9, callbacks=[StopAt(epoch=1)])
    assert ig.load(tmp_path / "run").progress.epoch == 1


def test_a_run_folder_may_be_moved(finished, tmp_path):
    write_folder(tmp_path / "moved", contents(finished.folder))
    assert ig.load(str(tmp_path / "moved")).evaluate() == finished.evaluate()


def test_a_run_of_awkward_labels_loads(tmp_path):
    labels = [f'"{i}" #ü ' for i in range(12)]
    kg = ring_kg(entity_names=None).replace(entities=labels, entity_names=labels, name="")
    run = fit(tmp_path / "run", kg=kg, epochs=1)
    assert ig.load(run.folder).evaluate() == run.evaluate()


def test_without_validation_triples_the_best_model_is_the_last(tmp_path):
    run = fit(tmp_path / "run", kg=ring_kg(valid=0), epochs=3)
    assert run.progress.best_epoch == 3
    loaded = ig.load(run.folder)
    assert same_weights(loaded.model, run.model)
    assert loaded.progress.best_epoch == 3
    with pytest.raises(DataError, match=r"'valid' has no triples"):
        run.evaluate("valid")


def test_no_epochs_make_a_run_that_loads(tmp_path):
    run = fit(tmp_path / "run", epochs=0)
    assert same_weights(ig.load(run.folder).model, run.model)
    assert run.progress.epoch == 0


# -- what is evaluated ----------------------------------------------------------------------------


def test_evaluate_gives_fractions_of_both_sides_each_head_and_each_relation(finished):
    metrics = finished.evaluate()
    assert set(metrics) == {"candidates", "both", "head", "tail", "heads", "relations"}
    assert metrics["candidates"] == f"all {finished.kg.num_entities} entities"
    assert list(metrics["heads"]) == ["structure", "image", "text", "joint", "complex"]
    keys = ["mrr", "mr", "hits@1", "hits@3", "hits@10", "hits@100"]
    for part in (
        metrics["both"],
        metrics["head"],
        metrics["tail"],
        *metrics["heads"].values(),
    ):
        assert list(part) == keys
        assert 1 <= part["mr"] <= finished.kg.num_entities
        hits = [part[key] for key in keys[2:]]
        assert hits == sorted(hits)
        assert 0 <= hits[0] <= part["mrr"] <= hits[-1] == 1  # 12 entities: the first 100 are all
    for key in keys:
        mean = (metrics["head"][key] + metrics["tail"][key]) / 2
        assert metrics["both"][key] == pytest.approx(mean)
    counted = {label: part["triples"] for label, part in metrics["relations"].items()}
    expected = finished.kg.test[:, 1].bincount(minlength=2).tolist()
    assert counted == {
        label: n for label, n in zip(finished.kg.relations, expected, strict=True) if n
    }


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_metrics_do_not_depend_on_the_batch_size(batch_size, finished):
    expected, found = finished.evaluate("train"), finished.evaluate("train", batch_size=batch_size)
    assert found["both"] == pytest.approx(expected["both"])
    assert found["heads"]["joint"] == pytest.approx(expected["heads"]["joint"])


def test_an_unknown_split_is_named(finished):
    with pytest.raises(UnknownLabelError, match="'dev'"):
        finished.evaluate("dev")


# -- predictions ----------------------------------------------------------------------------------


def known_answers(kg, entity, relation):
    triples = torch.cat([kg.train, kg.valid, kg.test]).tolist()
    return {t for h, r, t in triples if (h, r) == (entity, relation)}


@pytest.mark.parametrize("candidates", ["shared", "relation"])
def test_predict_gives_all_unknown_tails_best_first(candidates):
    run = fit(epochs=1, candidates=candidates)
    kg = run.kg
    answers = run.predict(head="e3", relation="opposite", k=100)
    known = {kg.entities[i] for i in known_answers(kg, 3, 1)}
    assert known
    assert {answer.entity for answer in answers} == set(kg.entities) - known - {"e3"}
    scores = [answer.score for answer in answers]
    assert scores == sorted(scores, reverse=True)
    assert not any(answer.known for answer in answers)


def test_what_heads_were_called_before_is_still_answered():
    one = ig.Prediction("e3", "e3", 0.5, {"text": 0.5}, False)
    with pytest.warns(DeprecationWarning, match="Prediction.modalities is deprecated; use heads"):
        assert one.modalities == one.heads


@pytest.mark.parametrize("candidates", ["shared", "relation"])
def test_no_queries_have_no_answers(candidates):
    run = fit(epochs=0, candidates=candidates)
    none = torch.empty(0, dtype=torch.int64)
    found = ig.Predictor(run.model, run.kg).answers(none, none)
    one = ig.Predictor(run.model, run.kg).answers(torch.tensor([3]), torch.tensor([1]))
    assert list(found.heads) == run.model.heads
    columns = zip(
        (*found[:4], found.known, *found.heads.values()),
        (*one[:4], one.known, *one.heads.values()),
        strict=True,
    )
    assert all(len(empty) == 0 and empty.dtype == full.dtype for empty, full in columns)


@pytest.mark.parametrize(
    ("entity", "relation", "message"),
    [
        ([0, 12, 13], [0, 0, 0], "the entity id 12 is out of range; expected 0 to 11"),
        ([0, -1], [0, 0], r"row 2 \(counted from 1\): the entity id -1 is out of range"),
        ([0, 1], [0, 4], r"row 2 .*: the relation id 4 is out of range; expected 0 to 3"),
        ([0, 1], [0], r"received shapes \[2\] and \[1\]"),
    ],
)
def test_queries_that_the_graph_cannot_have_are_refused_with_their_row(
    entity, relation, message, finished
):
    kg = finished.kg
    assert (kg.num_entities, kg.num_relations) == (12, 2)
    with pytest.raises(DataError, match=message):
        ig.Predictor(finished.model, kg).answers(torch.tensor(entity), torch.tensor(relation))


def test_known_facts_are_left_out_unless_asked_for_and_then_marked(finished):
    kg = finished.kg
    for head in range(kg.num_entities):
        known = {kg.entities[i] for i in known_answers(kg, head, 0)}
        assert known
        label = kg.entities[head]
        query = {"head": label, "relation": "after", "k": 100, "include_self": True}
        without = finished.predict(**query)
        everything = finished.predict(**query, include_known=True)
        assert len(everything) == kg.num_entities
        assert {answer.entity for answer in everything if answer.known} == known
        assert [answer for answer in everything if not answer.known] == without


@pytest.mark.parametrize("side", ["head", "tail"])
def test_the_given_entity_is_no_answer_unless_asked_for_or_the_relation_has_loops(side):
    kg = ring_kg()
    loops = torch.tensor([[2, 0, 2]])  # "after" relates e2 to itself, "opposite" nothing
    run = fit(kg=kg.replace(train=torch.cat([kg.train, loops])), epochs=1)

    def answers(label, relation, **options):
        found = run.predict(**{side: label}, relation=relation, k=100, **options)
        return [answer.entity for answer in found]

    assert "e3" not in answers("e3", "opposite")
    assert "e3" in answers("e3", "opposite", include_self=True)
    assert "e3" in answers("e3", "after")
    assert "e3" not in answers("e3", "after", include_self=False)
    # A fact of the graph is left out as a fact, and shown as one where these are asked for.
    assert "e2" not in answers("e2", "after")
    assert "e2" in answers("e2", "after", include_known=True, include_self=False)


def test_predicted_heads_are_those_of_the_inverse_query(finished):
    kg = finished.kg
    answers = finished.predict(tail="e5", relation="after", k=100, include_known=True)
    known = {answer.entity for answer in answers if answer.known}
    triples = torch.cat([kg.train, kg.valid, kg.test]).tolist()
    assert known == {kg.entities[h] for h, r, t in triples if (r, t) == (0, 5)} == {"e4"}
    model = finished.model
    entity, inverse = torch.tensor([5]), torch.tensor([0 + kg.num_relations])
    with torch.no_grad():
        scores = model.scores(model.queries(entity, inverse), model.candidates(), inverse)
    for answer in answers:
        column = kg.id_of(answer.entity)
        assert answer.score == pytest.approx(scores["decision"][0, column].item(), abs=1e-5)
        assert answer.heads["text"] == pytest.approx(scores["text"][0, column].item(), abs=1e-5)


@pytest.mark.parametrize("direction", ["head", "tail"])
def test_scores_by_head_sum_up_to_the_score_under_the_decision_weights(direction, finished):
    model, kg = finished.model, finished.kg
    relation = 1 if direction == "head" else 1 + kg.num_relations
    with torch.no_grad():
        learned = model.decision.weights(model.relation[0].weight[[relation]])[0].tolist()
    assert len({round(weight, 4) for weight in learned}) > 1  # they have learned something
    weights = [*(weight / 2 for weight in learned), 0.5]
    query = {direction: "e2", "relation": "opposite"}
    for answer in finished.predict(**query, k=100, include_known=True):
        parts = [answer.heads[head] for head in model.heads]
        total = sum(w * s for w, s in zip(weights, parts, strict=True))
        assert answer.score == pytest.approx(total, abs=1e-5)


def test_a_mean_decision_is_the_mean_of_the_heads_and_a_single_head_is_its_own():
    run = fit(epochs=1, decision="mean", complex_head=False)
    for answer in run.predict(head="e2", relation="after", k=3):
        assert answer.score == pytest.approx(sum(answer.heads.values()) / 4, abs=1e-5)
    alone = fit(epochs=1, modalities=[], complex_head=False)
    for answer in alone.predict(head="e2", relation="after", k=3):
        assert answer.heads == {"structure": answer.score}


def test_predict_takes_display_names_and_gives_labels_and_names():
    kg = ring_kg(entity_names=[f"Entity {i}" for i in range(12)], relation_names=["next", "faces"])
    run = fit(kg=kg, epochs=1)
    by_name = run.predict(head="Entity 3", relation="faces", k=4)
    assert by_name == run.predict(head="e3", relation="opposite", k=4)
    assert len(by_name) == 4
    assert all(answer.name == f"Entity {answer.entity[1:]}" for answer in by_name)


def test_predict_does_not_change_the_run_and_gives_the_same_again(finished):
    before = finished.evaluate()
    first = finished.predict(head="e1", relation="after")
    assert finished.predict(head="e1", relation="after") == first
    assert finished.evaluate() == before


@pytest.mark.parametrize(
    ("query", "kind", "message"),
    [
        ({"relation": "after"}, DataError, "either head or tail"),
        ({"relation": "after", "head": "e1", "tail": "e2"}, DataError, "either head or tail"),
        ({"relation": "after", "head": "e1", "k": 0}, DataError, "k of at least 1, received 0"),
        ({"relation": "aftr", "head": "e1"}, UnknownLabelError, "relation 'aftr'.*'after'"),
        ({"relation": "after", "head": "ee11"}, UnknownLabelError, "entity 'ee11'.*'e11'"),
    ],
)
def test_a_query_that_cannot_be_asked_says_why(query, kind, message, finished):
    with pytest.raises(kind, match=message):
        finished.predict(**query)


def test_an_entity_seen_only_in_test_is_predicted_about():
    kg = ring_kg()
    labels = [*kg.entities, "stranger"]
    run = fit(kg=kg.replace(entities=labels, entity_names=labels), epochs=1)
    answers = run.predict(head="stranger", relation="after", k=99)
    assert len(answers) == 12
    assert all(math.isfinite(answer.score) for answer in answers)


# -- embeddings -----------------------------------------------------------------------------------


def test_embeddings_have_a_row_an_entity_and_a_relation_in_either_direction():
    run = fit(epochs=1, dim=8, relation_dim=5)
    heads = ["structure", "image", "text", "joint", "complex"]
    entities, relations = run.entity_embeddings(), run.relation_embeddings()
    assert list(entities) == list(relations) == heads
    for head in heads:
        own = head == "complex"  # three complex numbers each
        assert entities[head].shape == (12, 6 if own else 8)
        assert relations[head].shape == (4, 6 if own else 5 + 8)
        assert not entities[head].requires_grad
        assert not relations[head].requires_grad
    assert torch.equal(entities["structure"], run.model.entity.weight)
    model = run.model
    assert torch.equal(relations["text"][:, :5], model.relation[2].weight)
    assert torch.equal(relations["text"][:, 5:], model.relation_residual[2].weight)
    without = fit(epochs=1, dim=8, relation_dim=5, relation_residual=False)
    assert without.relation_embeddings()["joint"].shape == (4, 5)


def test_changing_embeddings_does_not_change_the_model():
    run = fit(epochs=1)
    before = run.evaluate()
    for table in (*run.entity_embeddings().values(), *run.relation_embeddings().values()):
        table.zero_()
    assert run.evaluate() == before


# -- resume ---------------------------------------------------------------------------------------

STEPS = 3  # of an epoch: 36 queries by 16
RESUMED = {
    "in the first epoch": ({"step": 1}, {}),
    "in the middle of an epoch": ({"step": 2 * STEPS + 1}, {}),
    "at the last step of an epoch": ({"step": 2 * STEPS}, {}),
    "just after the first epoch": ({"epoch": 1}, {}),
    "just after an epoch": ({"epoch": 3}, {}),
    "after the last epoch": ({"epoch": 5}, {}),
    "with a checkpoint every third epoch": ({"step": 5 * STEPS - 1}, {"checkpoint_every": 3}),
    "without validation": ({"step": 2 * STEPS + 1}, {"kg": ring_kg(valid=0)}),
    "without views": ({"step": 2 * STEPS + 1}, {"kg": ring_kg(views=False)}),
    "sampled, binary": ({"step": 3 * STEPS - 1}, {"regime": "sampled", "loss": "binary"}),
    "kvsall, by relation": ({"step": 7}, {"regime": "kvsall", "candidates": "relation"}),
    "adagrad": ({"step": 2 * STEPS + 1}, {"optimizer": "adagrad"}),
    "bfloat16": ({"step": 2 * STEPS + 1}, {"precision": "bfloat16"}),
    "float16": ({"step": 2 * STEPS + 1}, {"precision": "float16"}),
    "average": ({"step": 2 * STEPS + 1}, {"ema_decay": 0.9}),
    "average without validation": ({"epoch": 3}, {"ema_decay": 0.9, "kg": ring_kg(valid=0)}),
    "falling rate": ({"step": 2 * STEPS + 1}, {"schedule": "cosine"}),
}


class AskToStop(Callback):
    """Asks training to stop after a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, trainer, losses):
        if trainer.progress.step == self.step:
            trainer.stop()


@pytest.mark.parametrize("averaged", [{}, {"ema_decay": 0.9}], ids=["plain", "average"])
@pytest.mark.parametrize(
    ("step", "graph"),
    [(2 * STEPS + 1, {}), (1, {}), (2 * STEPS + 1, {"valid": 0})],
    ids=["after a best epoch", "before any", "without validation"],
)
def test_a_run_that_was_stopped_has_the_model_that_load_gives(step, graph, averaged, tmp_path):
    run = fit(tmp_path / "run", ring_kg(**graph), callbacks=[AskToStop(step)], epochs=5, **averaged)
    assert (run.progress.ended, run.progress.step) == ("", step)
    assert same_weights(run.model, ig.load(tmp_path / "run").model)
    alone = fit(kg=ring_kg(**graph), callbacks=[AskToStop(step)], epochs=5, **averaged)
    assert same_weights(run.model, alone.model)
    resumed = ig.fit(
        out=tmp_path / "run", resume=True, callbacks=[AskToStop(run.progress.step + 1)]
    )
    assert resumed.progress.step == step + 1
    assert same_weights(resumed.model, ig.load(tmp_path / "run").model)


class StopAfterEpoch(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch(self, trainer, record):
        if record["epoch"] == self.epoch:
            trainer.stop()


@pytest.mark.parametrize("epoch", [2, 4])
def test_a_run_stopped_after_an_epoch_has_taken_no_further_step(epoch, tmp_path):
    whole = fit(tmp_path / "whole", epochs=4, patience=None)
    out = tmp_path / "run"
    run = fit(out, epochs=4, patience=None, callbacks=StopAfterEpoch(epoch))
    assert (run.progress.epoch, run.progress.step) == (epoch, epoch * STEPS)
    assert run.progress.ended == ("epochs" if epoch == 4 else "")
    ig.fit(out=out, resume=True, callbacks=None)
    assert_same_run(whole.folder, out)


def test_a_trainer_asked_to_stop_before_it_begins_takes_no_step_and_goes_on_when_called_again():
    kg, chosen = ring_kg(), settings(epochs=2)
    models = []
    for asked in (False, True):
        torch.manual_seed(0)
        trainer = Trainer(ig.IMVIA.from_kg(kg, chosen), kg, chosen)
        if asked:
            trainer.stop()
            assert trainer.fit().step == 0
        assert trainer.fit().ended == "epochs"
        models.append(trainer.model)
    assert same_weights(*models)


@pytest.mark.parametrize(("stop", "options"), RESUMED.values(), ids=RESUMED)
def test_a_run_stopped_and_resumed_is_to_the_bit_the_run_that_never_stopped(
    stop, options, tmp_path
):
    options = {"epochs": 5, "patience": None, **options}
    whole = fit(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "stopped", callbacks=[StopAt(**stop)], **options)
    torch.rand(17)  # another process has other random states
    resumed = ig.fit(out=tmp_path / "stopped", resume=True)
    assert_same_run(whole.folder, resumed.folder)
    assert same_weights(whole.model, resumed.model)
    assert resumed.progress.best_epoch == whole.progress.best_epoch
    assert resumed.progress.best_mrr == whole.progress.best_mrr
    assert resumed.progress.step == whole.progress.step
    assert resumed.evaluate() == whole.evaluate()
    assert same_weights(ig.load(resumed.folder).model, whole.model)


def test_a_run_stopped_twice_is_the_run_that_never_stopped(tmp_path):
    whole = fit(tmp_path / "whole", epochs=5)
    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        fit(out, epochs=5, callbacks=[StopAt(step=STEPS + 1)])
    with pytest.raises(KeyboardInterrupt):
        ig.fit(out=out, resume=True, callbacks=[StopAt(step=3 * STEPS + 2)])
    ig.fit(out=out, resume=True)
    assert_same_run(whole.folder, out)


def test_a_metrics_line_cut_short_by_the_stop_is_dropped(tmp_path):
    whole = fit(tmp_path / "whole", epochs=4)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "stopped", epochs=4, callbacks=[StopAt(epoch=2)])
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "lo')
    ig.fit(out=tmp_path / "stopped", resume=True)
    assert_same_run(whole.folder, tmp_path / "stopped")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run = fit(tmp_path / "run")
    before = contents(run.folder)
    again = ig.fit(out=run.folder, resume=True)
    assert contents(run.folder) == before
    assert same_weights(again.model, run.model)
    assert again.progress == run.progress


def test_a_finished_run_goes_on_with_more_epochs_as_if_it_had_had_them_from_the_start(tmp_path):
    whole = fit(tmp_path / "whole", epochs=6, patience=None)
    fit(tmp_path / "short", epochs=3, patience=None)
    resumed = ig.fit(out=tmp_path / "short", resume=True, epochs=6)
    assert resumed.progress.epoch == 6
    assert_same_run(whole.folder, resumed.folder)
    assert ig.load(resumed.folder).settings.epochs == 6


def test_a_run_that_ran_out_of_patience_goes_on_with_more(tmp_path):
    still = {"learning_rate": 1e-30, "table_optimizer": "same", "batch_norm": False, "epochs": 9}
    run = fit(tmp_path / "run", patience=2, **still)
    assert (run.progress.ended, run.progress.epoch) == ("patience", 3)
    again = ig.fit(out=run.folder, resume=True)
    assert (again.progress.ended, again.progress.epoch) == ("patience", 3)
    resumed = ig.fit(out=run.folder, resume=True, patience=4)
    assert (resumed.progress.ended, resumed.progress.epoch) == ("patience", 5)
    whole = fit(tmp_path / "whole", patience=4, **still)
    assert_same_run(whole.folder, resumed.folder)


class StopAtABestOddEpoch(Callback):
    """Stops where the best model on disk is an epoch ahead of the checkpoint of every second."""

    stopped = 0

    def on_epoch(self, trainer, record):
        if record["epoch"] % 2 and 1 < record["epoch"] == trainer.progress.best_epoch:
            self.stopped = record["epoch"]
            raise KeyboardInterrupt


def test_the_model_on_disk_is_the_one_returned_where_a_resumed_run_asks_for_fewer_epochs(tmp_path):
    kg = ring_kg(8, valid=0)
    kg = kg.replace(valid=kg.train)  # what is trained is what is validated: it gets better
    options = {"epochs": 30, "checkpoint_every": 2, "validation": "published", "dim": 16}
    options |= {"table_optimizer": "same", "learning_rate": 5e-3, "label_smoothing": 0.1}
    stop = StopAtABestOddEpoch()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", kg=kg, callbacks=[stop], **options)
    resumed = ig.fit(out=tmp_path / "run", resume=True, epochs=stop.stopped - 1)
    assert resumed.progress.epoch == stop.stopped - 1
    assert same_weights(ig.load(tmp_path / "run").model, resumed.model)


def test_fewer_epochs_than_a_run_has_are_said_to_be_fewer_and_not_written(tmp_path, caplog):
    run = fit(tmp_path / "run", epochs=3, patience=None)
    before = contents(run.folder)
    resumed = ig.fit(out=run.folder, resume=True, epochs=1)
    assert "is trained for 3 epochs already, more than epochs=1" in caplog.text
    assert contents(run.folder) == before
    assert resumed.settings.epochs == ig.load(run.folder).settings.epochs == 3
    assert same_weights(resumed.model, run.model)


def test_a_stopped_run_that_is_asked_for_fewer_epochs_ends_with_those_it_has(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", epochs=6, callbacks=[StopAt(epoch=3)])
    trained = len(metrics_of(tmp_path / "run"))
    resumed = ig.fit(out=tmp_path / "run", resume=True, epochs=1)
    loaded = ig.load(tmp_path / "run")
    assert resumed.progress.epoch == resumed.settings.epochs == loaded.settings.epochs == trained
    assert resumed.progress.ended == "epochs"
    assert same_weights(resumed.model, loaded.model)


@pytest.mark.parametrize(
    "change",
    [{"dim": 9}, {"seed": 1}, {"learning_rate": 0.5}, {"regime": "kvsall"}, {"modalities": []}],
)
def test_a_resumed_run_refuses_other_settings_and_stays_as_it_is(change, tmp_path):
    run = fit(tmp_path / "run", epochs=1)
    before = contents(run.folder)
    (key,) = change
    with pytest.raises(SettingsError, match=f"Setting {key}: the run in .* keeps its settings"):
        ig.fit(out=run.folder, resume=True, epochs=2, **change)
    assert contents(run.folder) == before


def test_a_resumed_run_takes_the_same_settings_again(tmp_path):
    run = fit(tmp_path / "run", epochs=1)
    resumed = ig.fit(out=run.folder, resume=True, **{**TINY, "epochs": 2})
    assert resumed.progress.epoch == 2


def test_resume_takes_a_settings_file_that_leaves_open_what_the_run_has_chosen(tmp_path):
    # As `imvia-graph settings` prints it: every setting, with null where training chooses.
    settings = ig.Settings(**{**ig.Settings().model_dump(), **TINY, "epochs": None, "dim": 4})
    run = ig.fit(ring_kg(), out=tmp_path / "run", settings=settings)
    chosen = run.settings
    assert None not in (chosen.epochs, chosen.lambda_regularization)
    again = ig.fit(out=tmp_path / "run", resume=True, settings=settings)
    assert again.settings == chosen
    assert again.progress.epoch == run.progress.epoch


def test_resume_needs_a_run_folder(tmp_path):
    with pytest.raises(CheckpointError, match="pass the run folder as out"):
        ig.fit(resume=True)
    with pytest.raises(CheckpointError, match="does not exist"):
        ig.fit(out=tmp_path / "none", resume=True)
    with pytest.raises(CheckpointError, match=r"holds no run \(no run\.json\)"):
        ig.fit(out=tmp_path, resume=True)


# -- folders that are not what they should be -----------------------------------------------------


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    write_folder(tmp_path / "thesis", {"chapter.tex": "years of work"})
    with pytest.raises(CheckpointError, match=r"thesis exists and is not empty\. Choose another"):
        fit(tmp_path / "thesis")
    assert contents(tmp_path / "thesis") == {"chapter.tex": b"years of work"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file is a file"):
        fit(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_an_older_run_is_refused_left_alone_and_resuming_it_is_proposed(tmp_path):
    run = fit(tmp_path / "run", epochs=1)
    before = contents(run.folder)
    with pytest.raises(CheckpointError, match=r"not empty; --resume \(resume=True\) resumes"):
        fit(run.folder, epochs=1)
    assert contents(run.folder) == before


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "empty").mkdir()
    assert fit(tmp_path / "empty", epochs=1).folder == tmp_path / "empty"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    return write_folder(tmp_path / "copy", contents(finished.folder))


def damage(path, keep):
    """Cut a file short, to a part or by so many bytes; "flip": alter a bit of its last tensor."""
    data = path.read_bytes()
    if keep == "flip":
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    else:
        path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])


DAMAGES = [0, 5, 100, 0.5, -1, "flip"]
SAID = r"(cannot be read .*truncated|is damaged: .* checksum)"


@pytest.mark.parametrize("keep", DAMAGES)
def test_a_damaged_model_is_named_and_taken_from_the_checkpoint(keep, copied, finished, caplog):
    damage(copied / "best.safetensors", keep)
    with caplog.at_level("WARNING"):
        run = ig.load(copied)
    assert re.search(rf"best\.safetensors {SAID}.*last\.safetensors is used instead", caplog.text)
    assert same_weights(run.model, finished.model)
    assert run.progress.best_epoch == finished.progress.best_epoch


@pytest.mark.parametrize("keep", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_gone_on_with(
    keep, copied, tmp_path, caplog
):
    damage(copied / "last.safetensors", keep)
    with caplog.at_level("WARNING"):
        resumed = ig.fit(out=copied, resume=True, epochs=6)
    assert re.search(rf"last\.safetensors {SAID}.*the checkpoint before it", caplog.text)
    whole = fit(tmp_path / "whole", epochs=6)
    assert_same_run(whole.folder, resumed.folder)


def test_the_next_checkpoint_does_not_push_out_the_good_one_for_the_damaged_one(copied):
    damage(copied / "last.safetensors", "flip")
    ig.fit(out=copied, resume=True, epochs=5)
    damage(copied / "last.safetensors", "flip")
    assert ig.fit(out=copied, resume=True, epochs=5).progress.epoch == 5


@pytest.mark.parametrize("keep", DAMAGES)
def test_where_no_checkpoint_is_whole_that_is_an_error_that_names_one(keep, copied):
    for name in (*FILES, "previous.safetensors"):
        damage(copied / name, keep)
    with pytest.raises(CheckpointError, match=rf"previous\.safetensors {SAID}"):
        ig.fit(out=copied, resume=True, epochs=9)
    with pytest.raises(CheckpointError, match=rf"best\.safetensors {SAID}"):
        ig.load(copied)


def test_a_metadata_that_was_altered_is_damage(copied):
    path = copied / "last.safetensors"
    data = path.read_bytes()
    assert data.count(b'\\"epoch\\": 4,') == 1
    path.write_bytes(data.replace(b'\\"epoch\\": 4,', b'\\"epoch\\": 9,'))
    with pytest.raises(CheckpointError, match=r"last\.safetensors is damaged"):
        checkpoint._read(path)


def test_a_checkpoint_of_another_model_is_a_checkpoint_error(copied, tmp_path):
    other = fit(tmp_path / "other", epochs=1, dim=4)
    for name in FILES:
        (copied / name).write_bytes((other.folder / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"best\.safetensors: .*does not fit"):
        ig.load(copied)
    with pytest.raises(CheckpointError, match=r"last\.safetensors: .*does not fit"):
        ig.fit(out=copied, resume=True, epochs=9)


def test_a_model_file_for_a_checkpoint_is_a_checkpoint_error(copied):
    (copied / "last.safetensors").write_bytes((copied / "best.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"last\.safetensors"):
        ig.fit(out=copied, resume=True, epochs=9)


def test_a_safetensors_file_that_is_no_checkpoint_is_a_checkpoint_error(copied):
    features = copied / "kg" / "views" / "image.safetensors"
    (copied / "best.safetensors").write_bytes(features.read_bytes())
    with pytest.raises(CheckpointError, match=r"best\.safetensors"):
        ig.load(copied)


def test_a_run_without_a_checkpoint_says_so(copied):
    for name in (*FILES, "previous.safetensors"):
        (copied / name).unlink()
    with pytest.raises(CheckpointError, match=r"best\.safetensors does not exist"):
        ig.load(copied)


@pytest.mark.parametrize("use", ["load", "resume"])
def test_a_run_of_a_newer_version_is_refused(use, copied):
    about = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**about, "version": about["version"] + 1}))
    with pytest.raises(CheckpointError, match=r"version 6 is newer .*Update imvia-graph"):
        ig.load(copied) if use == "load" else ig.fit(out=copied, resume=True)


@pytest.mark.parametrize("version", [0, -1, True, "1", None, 1.5])
def test_a_version_that_is_none_is_refused(version, copied):
    about = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**about, "version": version}))
    with pytest.raises(CheckpointError, match=r"run\.json: expected a format version"):
        ig.load(copied)


def as_version_1(folder):
    """A run folder as the first format version had it."""
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**about, "version": 1}))
    for name in ("previous.safetensors", ".lock"):
        (folder / name).unlink()
    for name in FILES:
        with safe_open(folder / name, framework="pt") as file:
            metadata = file.metadata()
        del metadata["sha256"]
        progress = json.loads(metadata["progress"])
        for key in ("batch", "elapsed", "skipped"):
            del progress[key]
        metadata["progress"] = json.dumps(progress)
        save_file(load_file(folder / name), folder / name, metadata)
    settings = (folder / "settings.yaml").read_text().splitlines()
    new = ("non_finite:", "disk_full:", "relation_residual:", "table_", "complex_", "scale_views:")
    kept = [line for line in settings if not line.startswith(new)]
    (folder / "settings.yaml").write_text("\n".join(kept))
    return folder


def test_a_run_of_the_first_version_loads_and_goes_on(tmp_path):
    then = {
        "relation_residual": False,
        "table_optimizer": "same",
        "complex_head": False,
        "scale_views": False,
    }
    finished = fit(tmp_path / "old", epochs=4, **then)
    old = as_version_1(finished.folder)
    assert same_weights(ig.load(old).model, finished.model)
    resumed = ig.fit(out=old, resume=True, epochs=6)
    assert_same_run(fit(tmp_path / "whole", epochs=6, **then).folder, resumed.folder)
    assert json.loads((old / "run.json").read_text())["version"] == 5
    assert same_weights(ig.load(old).model, resumed.model)  # and is read as it now says it is


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": "other"}', ""])
def test_a_run_json_that_describes_no_run_is_an_error_that_names_it(content, copied):
    (copied / "run.json").write_text(content)
    with pytest.raises(ig.IMVIAError, match=r"run\.json"):
        ig.load(copied)


def test_a_folder_without_a_run_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no run \(no run\.json\)"):
        ig.load(tmp_path)
    (tmp_path / "facts.tsv").write_text("")
    with pytest.raises(CheckpointError, match=r"facts\.tsv is a file; expected a folder that"):
        ig.load(tmp_path / "facts.tsv")
    with pytest.raises(CheckpointError, match=r"none does not exist"):
        ig.load(tmp_path / "none")


def test_a_resumed_run_refuses_a_settings_object_that_differs(tmp_path):
    run = ig.fit(ring_kg(), out=tmp_path / "run", settings=settings(epochs=1))
    with pytest.raises(SettingsError, match="Setting dim"):
        ig.fit(out=run.folder, resume=True, settings=settings(dim=9))
    assert ig.fit(out=run.folder, resume=True, settings=settings(epochs=2)).progress.epoch == 2


# -- saving afterwards ----------------------------------------------------------------------------


def test_a_run_that_was_saved_afterwards_loads_as_it_is(tmp_path):
    run = ig.fit(ring_kg(), settings=settings())
    assert [record["epoch"] for record in run.history] == [1, 2, 3]
    assert {"loss", "completion", "seconds", "valid"} <= run.history[0].keys()
    assert run.save(tmp_path / "run") == run.folder == tmp_path / "run"
    again = ig.load(tmp_path / "run", device="cpu")
    assert same_weights(again.model, run.model)
    assert_same_kg(again.kg, run.kg)
    assert (again.settings, again.progress) == (run.settings, run.progress)
    assert again.history == run.history
    assert again.evaluate() == run.evaluate()
    before = contents(tmp_path / "run")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        run.save(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"saved after training.*fit\(\.\.\., out=\.\.\.\)"):
        ig.fit(out=tmp_path / "run", resume=True, epochs=9)
    assert contents(tmp_path / "run") == before


def test_a_run_that_could_not_be_saved_can_be_saved_there_again(tmp_path, monkeypatch):
    run = ig.fit(ring_kg(), settings=settings(epochs=1))

    def full(*_):
        raise ig.StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_model", full)
        with pytest.raises(ig.StorageError):
            run.save(tmp_path / "run")
    assert run.folder is None
    with pytest.raises(CheckpointError, match=r"no run\.json"):
        ig.load(tmp_path / "run")
    run.save(tmp_path / "run")
    assert ig.load(tmp_path / "run", device="cpu").evaluate() == run.evaluate()
    with pytest.raises(CheckpointError, match="not empty") as refused:
        run.save(tmp_path / "run")
    assert "resume" not in str(refused.value)


def test_a_run_with_a_folder_can_be_saved_elsewhere_and_has_the_history_of_all_its_parts(tmp_path):
    ig.fit(ring_kg(), out=tmp_path / "run", settings=settings(epochs=1))
    run = ig.fit(out=tmp_path / "run", resume=True, epochs=3)
    assert [record["epoch"] for record in run.history] == [1, 2, 3]
    run.save(tmp_path / "copy")
    assert run.folder == tmp_path / "run"
    assert ig.load(tmp_path / "copy", device="cpu").history == run.history
