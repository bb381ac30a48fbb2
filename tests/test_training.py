"""Training: every way to train learns, epochs cover the queries, the best epoch is kept."""

import copy
import math
from collections import Counter, defaultdict

import pytest
import torch
from helpers import paper_settings as settings
from helpers import ring_kg, ring_triples, same_weights
from hypothesis import given
from hypothesis import strategies as st

import imvia_graph as ig
from imvia_graph import IMVIAError, SettingsError, training
from imvia_graph.answers import with_inverses
from imvia_graph.batches import Batch, Batches, pack
from imvia_graph.distributed import Shards
from imvia_graph.evaluation import draw_candidates, evaluate, rank, rank_metrics
from imvia_graph.losses import Positives, completion, n3, sampled_completion
from imvia_graph.model import DECISION, IMVIA
from imvia_graph.nn import GatedViewConv
from imvia_graph.training import Callback, Trainer, resolve_device, training_dtype

CPU = torch.device("cpu")


def trained(kg, callbacks=(), seed=0, **changes):
    """A trainer that has finished."""
    chosen = settings(seed=seed, **changes)
    torch.manual_seed(seed)
    trainer = Trainer(IMVIA.from_kg(kg, chosen), kg, chosen, callbacks)
    trainer.fit()
    return trainer


class Records(Callback):
    """Keeps what is told of each epoch, and the model's state after it."""

    def __init__(self):
        self.records, self.states, self.steps = [], [], 0

    def on_step(self, trainer, losses):
        self.steps += 1

    def on_epoch(self, trainer, record):
        self.records.append(copy.deepcopy(record))
        state = trainer.model.state_dict()
        self.states.append({name: value.clone() for name, value in state.items()})

    def losses(self, name="loss"):
        return [record[name] for record in self.records]


def without_dropout(**changes):
    return {"input_dropout": 0.0, "relation_dropout": 0.0, "hidden_dropout": 0.0, **changes}


# -- every way to train ---------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", ["shared", "relation"])
@pytest.mark.parametrize("loss", ["softmax", "binary"])
@pytest.mark.parametrize("regime", ["1vsall", "kvsall", "sampled"])
def test_every_regime_loss_and_kind_of_candidates_learns(regime, loss, candidates):
    records = Records()
    kg = ring_kg(valid=0, test=2)
    changes = {"regime": regime, "loss": loss, "candidates": candidates}
    trainer = trained(kg, [records], epochs=6, **without_dropout(), **changes)
    completion = records.losses("completion")
    assert len(completion) == 6
    assert all(math.isfinite(value) for value in records.losses() + completion)
    assert min(completion[-2:]) < 0.95 * completion[0]
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


@pytest.mark.parametrize("decision", ["trained", "detached", "mean"])
def test_every_decision_learns(decision):
    records = Records()
    changes = without_dropout(decision=decision)
    trainer = trained(ring_kg(valid=0), [records], epochs=6, **changes)
    completion = records.losses("completion")
    assert min(completion[-2:]) < 0.95 * completion[0]
    weight = trainer.model.decision.linear.weight
    assert bool(weight.any()) == (decision != "mean")  # it starts from zero


def gradients(kg, **changes):
    """Gradients of the first batch's loss, without dropout, at a decision that is not uniform."""
    chosen = settings(**without_dropout(**changes))
    torch.manual_seed(0)
    trainer = Trainer(IMVIA.from_kg(kg, chosen), kg, chosen)
    torch.nn.init.normal_(trainer.model.decision.linear.weight)
    losses, _ = trainer.losses(next(iter(trainer.batches)))
    losses["loss"].backward()
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_a_detached_decision_learns_and_leaves_the_heads_alone():
    kg = ring_kg()
    mean, detached, both = (gradients(kg, decision=k) for k in ("mean", "detached", "trained"))
    assert detached["decision.linear.weight"].any()
    assert "decision.linear.weight" not in mean
    assert {"entity.weight", "decoder.3.core", "relation.0.weight"} <= set(mean)
    assert [name for name in mean if not torch.allclose(mean[name], detached[name])] == []
    assert not torch.allclose(mean["entity.weight"], both["entity.weight"])


@pytest.mark.parametrize("regime", ["1vsall", "kvsall", "sampled"])
def test_relations_of_a_batch_share_the_entities_half_of_the_gate(monkeypatch, regime):
    kg, chosen = ring_kg(), {"candidates": "relation", "regime": regime, "batch_size": 1000}
    made = []

    def watched(layer, feat, apply=torch.nn.Linear.forward):
        if layer.out_features in (6, 5) and layer.bias is not None:  # as wide as a view
            made.append(layer)
        return apply(layer, feat)

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    shared = gradients(kg, **chosen)
    assert len(made) == 2 * 2  # of two modalities: of the queries, and of the candidates
    made.clear()
    gate = GatedViewConv.gate
    monkeypatch.setattr(GatedViewConv, "gate", lambda *given: gate(*given[:4]))
    alone = gradients(kg, **chosen)
    assert len(made) == 2 * (1 + 4)  # the candidates' under each of four relations
    assert shared.keys() == alone.keys()
    for name, grad in shared.items():
        torch.testing.assert_close(grad, alone[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adagrad"])
def test_every_optimizer_learns(optimizer):
    records = Records()
    trained(ring_kg(valid=0), [records], epochs=6, optimizer=optimizer, **without_dropout())
    losses = records.losses("completion")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("alignment", ["contrastive", "printed"])
def test_alignment_and_information_take_part_where_their_weights_are_not_zero(alignment):
    records, none = Records(), Records()
    kg = ring_kg(valid=0)
    weights = {"lambda_alignment": 0.1, "lambda_information": 0.5}
    trained(kg, [records], epochs=1, alignment=alignment, **weights)
    record = records.records[0]
    assert record["alignment"] > 0
    assert record["information"] != 0
    expected = record["completion"] + 0.1 * record["alignment"] + 0.5 * record["information"]
    expected += 0.1 * record["regularization"]  # what it is for so few entities
    assert record["loss"] == pytest.approx(expected, rel=1e-5)
    trained(kg, [none], epochs=1, lambda_alignment=0, lambda_information=0)
    assert none.records[0]["alignment"] == none.records[0]["information"] == 0


@pytest.mark.parametrize("candidates", ["shared", "relation"])
@pytest.mark.parametrize("regime", ["1vsall", "kvsall", "sampled"])
def test_regularization_is_dura_of_the_queries_and_their_true_answers(regime, candidates):
    kg = ring_kg(valid=0)
    chosen = settings(regime=regime, candidates=candidates, **without_dropout())
    model = IMVIA.from_kg(kg, chosen).eval()
    trainer = Trainer(model, kg, chosen)
    batch = next(iter(trainer.batches))
    losses, _ = trainer.losses(batch)
    embedded = model.embed(batch.entity, batch.relation).heads
    queries = model.queries(batch.entity, batch.relation)
    expected = 0.0
    weight = batch.positives.weight
    weight = torch.ones(len(batch.entity)) if weight is None else weight
    share = (weight / weight.sum()).tolist()
    answers = batch.positives.col
    if batch.candidate is not None:
        answers = batch.candidate[batch.positives.row, answers]
    if batch.sampled is not None:
        answers = batch.sampled.entity[answers]
    for head in model.heads:
        for vectors in (embedded[head], queries[head]):
            for one, vector in zip(share, vectors.tolist(), strict=True):
                expected += one * sum(x * x for x in vector)
        # The mean over a relation's answers, weighted by its queries.
        for relation in set(batch.relation.tolist()) if candidates == "relation" else {None}:
            asked = batch.relation == relation if relation is not None else batch.entity >= 0
            mine = answers[asked[batch.positives.row]]
            under = None if relation is None else torch.tensor(relation)
            rows = model.candidates(under)[head][mine]
            squares = sum(x * x for x in rows.flatten().tolist())
            expected += squares / len(mine) * sum(torch.tensor(share)[asked].tolist())
    assert losses["regularization"].item() == pytest.approx(expected, rel=1e-5)
    total = losses["completion"] + 1e-4 * losses["information"]
    total = total.item() + 0.1 * expected
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("candidates", ["shared", "relation"])
@pytest.mark.parametrize("regime", ["1vsall", "kvsall", "sampled"])
def test_the_head_of_complex_has_n3_in_place_of_dura(regime, candidates):
    kg = ring_kg(valid=0)
    changes = {"regime": regime, "candidates": candidates, "complex_head": True, "lambda_n3": 0.3}
    model = IMVIA.from_kg(kg, settings(**changes, **without_dropout()))
    for table in (model.complex_entity, model.complex_relation):
        torch.nn.init.normal_(table.weight)
    trainer = Trainer(model, kg, model.settings)
    batch = next(iter(trainer.batches))
    losses, _ = trainer.losses(batch)
    relation = batch.relation
    answers = batch.positives.col
    if batch.sampled is not None:
        answers = batch.sampled.entity[answers]
    weight = batch.positives.weight
    weight = torch.ones(len(batch.entity)) if weight is None else weight
    expected = 0.0
    for one in relation.unique() if candidates == "relation" else [None]:
        asked = relation == one if one is not None else relation >= 0
        of_head = model.complex_entity.weight[batch.entity[asked]]
        of_relation = model.complex_relation.weight[relation[asked]]
        of_answer = model.complex_entity.weight[answers[asked[batch.positives.row]]]
        expected += n3(of_head, of_relation, of_answer, weight[asked]) * weight[asked].sum()
    expected = (expected / weight.sum()).item()
    assert losses["n3"].item() == pytest.approx(expected, rel=1e-5)
    rest = losses["completion"] + 1e-4 * losses["information"] + 0.1 * losses["regularization"]
    assert losses["loss"].item() == pytest.approx(rest.item() + 0.3 * expected, rel=1e-5)
    losses["n3"].backward()
    grad = model.entity.weight.grad
    assert grad is None or not grad.any()


@pytest.mark.parametrize(("many", "there"), [(13, True), (12, False)])
def test_many_entities_have_no_head_of_complex_that_was_not_asked_for(
    monkeypatch, tmp_path, many, there
):
    monkeypatch.setattr("imvia_graph.model.MANY", many)
    kg = ring_kg(12)
    open_ = settings(complex_head=None, complex_rank=3)
    run = ig.fit(kg, settings=open_, out=tmp_path / "run")
    assert ("complex" in run.model.heads) == run.settings.complex_head == there
    # What was chosen stays, however many entities count as many, and also where it is left open.
    monkeypatch.setattr("imvia_graph.model.MANY", 25 - many)
    assert ig.load(tmp_path / "run").model.heads == run.model.heads
    again = ig.fit(out=tmp_path / "run", resume=True, epochs=4, complex_head=None)
    assert again.model.heads == run.model.heads
    for asked in (False, True):
        heads = IMVIA.from_kg(kg, settings(complex_head=asked)).heads
        assert ("complex" in heads) == asked


def test_the_head_of_complex_learns_and_has_a_name_of_its_own(tmp_path):
    kg = ring_kg(valid=0)
    run = ig.fit(kg, settings=settings(complex_head=True, epochs=40, **without_dropout()))
    found = run.evaluate("train")["heads"]
    assert list(found) == ["structure", "image", "text", "joint", "complex"]
    assert found["complex"]["mrr"] > 0.5
    assert run.relation_embeddings()["complex"].shape == (4, 2 * run.settings.complex_rank)
    again = ig.load(run.save(tmp_path / "run"))
    assert again.evaluate("train") == run.evaluate("train")
    views = {"complex": (torch.randn(3, 2), torch.tensor([0, 1, 2, *[3] * 10]))}
    with pytest.raises(SettingsError, match="complex_head"):
        IMVIA(12, 2, views, settings(complex_head=True))
    named = IMVIA(12, 2, views, settings(complex_head=None))
    assert named.heads[:2] == ["structure", "complex"]


def test_without_regularization_there_is_none():
    records = Records()
    trained(ring_kg(), [records], epochs=1, lambda_regularization=0)
    assert "regularization" not in records.records[0]


@pytest.mark.parametrize("candidates", ["shared", "relation"])
@pytest.mark.parametrize(
    "changes",
    [
        {"regime": "1vsall"},
        {"regime": "kvsall", "loss": "binary"},
        {"regime": "sampled"},
        {"regime": "sampled", "negative_sampling": "query", "joint": False},
    ],
)
def test_relations_are_predicted_from_entities_that_do_not_know_them(changes, candidates):
    kg = ring_kg(valid=0)
    chosen = settings(candidates=candidates, lambda_relation=0.5, **changes, **without_dropout())
    torch.manual_seed(0)
    model = IMVIA.from_kg(kg, chosen).eval()
    trainer = Trainer(model, kg, chosen)
    batch = next(iter(trainer.batches))
    losses, _ = trainer.losses(batch)
    row, answers, _, _ = batch.positives
    if batch.candidate is not None:
        answers = batch.candidate[row, answers]
    if batch.sampled is not None:
        answers = batch.sampled.entity[answers]
    expected = 0.0
    half = chosen.dim // 2
    for head, blocks in zip(model.heads, model.relation_residual, strict=True):
        table = model.embed(None).heads[head].double()
        numbers = torch.complex(table[:, :half], table[:, half:])
        weight = blocks.weight.double()
        weight = torch.complex(weight[:, :half], weight[:, half:])
        for i, answer in zip(row.tolist(), answers.tolist(), strict=True):
            asked, relation = batch.entity[i], batch.relation[i]
            scores = (numbers[asked] * weight * numbers[answer].conj()).sum(1).real
            expected += (scores.exp().sum().log() - scores[relation]).item() / len(row)
    assert losses["relation"].item() == pytest.approx(expected, rel=1e-5)
    without = {name: value for name, value in losses.items() if name not in ("loss", "relation")}
    total = without["completion"] + 0.1 * without["regularization"]
    total = total + 1e-4 * without["information"] + 0.5 * losses["relation"]
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-5)


def test_relations_are_predicted_by_their_blocks_alone():
    with pytest.raises(SettingsError, match=r"lambda_relation.*relation_residual: true"):
        IMVIA.from_kg(ring_kg(), settings(lambda_relation=1.0, relation_residual=False))
    records = Records()
    trained(ring_kg(), [records], epochs=1)
    assert "relation" not in records.records[0]


def test_each_callback_is_closed_where_one_fails_to():
    closed = []

    class Closes(Callback):
        def __init__(self, name, fails=False):
            self.name, self.fails = name, fails

        def on_close(self, trainer):
            closed.append(self.name)
            if self.fails:
                raise ValueError(self.name)

    callbacks = [Closes("one"), Closes("two", fails=True), Closes("three")]
    with pytest.raises(ValueError, match="two"):
        trained(ring_kg(), callbacks, epochs=1)
    assert closed == ["one", "two", "three"]


@pytest.mark.parametrize("decision", ["trained", "mean"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"regime": "sampled"}, {"regime": "sampled", "negative_sampling": "query"}],
    ids=lambda changes: "-".join(changes.values()),
)
def test_a_decision_is_a_term_of_the_loss_where_it_has_weights_to_learn(changes, decision):
    kg = ring_kg()
    chosen = settings(decision=decision, **changes)
    torch.manual_seed(0)
    model = IMVIA.from_kg(kg, chosen).eval()
    torch.nn.init.normal_(model.decision.linear.weight)
    trainer = Trainer(model, kg, chosen)
    batch = next(iter(trainer.batches))
    losses, _ = trainer.losses(batch)
    if batch.sampled is not None:
        tables = model.candidates(entity=batch.sampled.entity)
    else:
        tables = model.candidates()
    if batch.candidate is not None:
        tables = {head: table[batch.candidate] for head, table in tables.items()}
    scores = model.scores(model.queries(batch.entity, batch.relation), tables, batch.relation)
    if decision == "mean":
        del scores[DECISION]
    if batch.sampled is not None:
        expected = sampled_completion(scores, batch.positives, batch.sampled)
    else:
        expected = completion(scores, batch.positives)
    assert losses["completion"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("regime", ["1vsall", "sampled"])
def test_the_model_learns_from_the_loss_alone_and_the_estimators_from_theirs(regime):
    kg = ring_kg()
    chosen = settings(regime=regime, lambda_information=0.5, **without_dropout())
    found = []
    for whole in (True, False):
        torch.manual_seed(0)
        model = IMVIA.from_kg(kg, chosen)
        trainer = Trainer(model, kg, chosen)
        batch = next(iter(trainer.batches))
        if whole:
            trainer.gradients_of(batch)
        else:
            losses, estimation = trainer.losses(batch)
            estimation.backward(inputs=trainer.estimators, retain_graph=True)
            losses["loss"].backward(inputs=trainer.replicated)
        of_estimators = [p for p in trainer.estimators if p.grad is not None]
        assert len(of_estimators) == len(trainer.estimators)
        found.append([p.grad for p in [*trainer.replicated, *of_estimators]])
    for mine, expected in zip(*found, strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:
            torch.testing.assert_close(mine, expected)


# -- the schedule and the average -----------------------------------------------------------------


class Rates(Callback):
    """The learning rate of each step."""

    def __init__(self):
        self.rates = []

    def on_step(self, trainer, losses):
        self.rates.append(trainer.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda done: 1.0),
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
    ],
)
def test_the_learning_rate_follows_the_schedule(schedule, factor):
    rates = Rates()
    trained(ring_kg(), [rates], epochs=4, patience=None, schedule=schedule, learning_rate=0.02)
    steps = len(rates.rates)
    expected = [0.02 * factor(step / steps) for step in range(steps)]
    assert rates.rates == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("regime", ["1vsall", "sampled"])
def test_tables_and_their_rows_follow_the_schedule_at_a_rate_of_their_own(regime):
    kg = ring_kg()
    chosen = settings(
        regime=regime,
        schedule="linear",
        table_optimizer="adam",
        table_learning_rate=0.5,
        information_learning_rate=0.125,
        lambda_information=1.0,
        weight_decay=0.25,
    )
    trainer = Trainer(IMVIA.from_kg(kg, chosen), kg, chosen)
    steps = len(trainer.batches) * chosen.epochs
    trainer._set_learning_rate(1)
    of_tables = [o for o in (trainer.table_optimizer, trainer.row_optimizer) if o is not None]
    assert len(of_tables) == 1 + (regime == "sampled")
    for optimizer in of_tables:
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(0.5 * (1 - 1 / steps))
    for optimizer in (trainer.optimizer, *of_tables):
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25]
    # L1 is no bound if its estimators do not follow the embeddings.
    [group] = trainer.estimator_optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.125, 0.0)


@pytest.mark.parametrize("share", [0.5, 2.0])
@pytest.mark.parametrize("regime", ["1vsall", "sampled"])
def test_gradients_longer_than_the_bound_are_cut_to_it_and_shorter_ones_left(
    regime, share, monkeypatch
):
    def update(optimizer, weight, row, grad, group):
        of_rows.append(grad)

    monkeypatch.setattr(training.RowOptimizer, "_update", update)
    kg, found = ring_kg(), []
    for factor in (None, share):
        clip = None if factor is None else factor * found[0].norm().item()
        chosen = settings(regime=regime, gradient_clip=clip)
        torch.manual_seed(0)
        trainer = Trainer(IMVIA.from_kg(kg, chosen), kg, chosen)
        trainer.model.train()
        of_rows = []
        trainer.train_step(next(iter(trainer.batches)))
        assert len(of_rows) == len(trainer.tables)
        grads = [p.grad for p in trainer.parameters if p.grad is not None] + of_rows
        found.append(torch.cat([grad.flatten() for grad in grads]))
    torch.testing.assert_close(found[1], min(share, 1.0) * found[0], rtol=1e-4, atol=1e-8)


class States(Callback):
    """The weights after each step."""

    def __init__(self):
        self.states = []

    def on_step(self, trainer, losses):
        state = trainer.model.state_dict()
        self.states.append({name: value.clone() for name, value in state.items()})


@pytest.mark.parametrize("valid", [3, 0])
def test_the_average_is_that_of_the_equation_and_is_what_is_kept(valid):
    kg, decay = ring_kg(valid=valid), 0.8
    chosen = settings(ema_decay=decay, epochs=3, patience=None)
    torch.manual_seed(0)
    model = IMVIA.from_kg(kg, chosen)
    average = {name: value.double() for name, value in model.state_dict().items()}
    states, records = States(), Records()
    trainer = Trainer(model, kg, chosen, [states, records])
    trainer.fit()
    averages = []
    for step, state in enumerate(states.states):
        now = min(decay, (1 + step) / (10 + step))
        average = {name: now * average[name] + (1 - now) * state[name] for name in average}
        averages.append(average)
    epochs = trainer.progress.best_epoch
    expected = averages[epochs * len(trainer.batches) - 1]
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-6)
    if valid:
        assert rank_valid(model, kg) == trainer.progress.best_mrr


def test_a_training_that_ended_keeps_the_average_when_it_is_asked_again_and_goes_on_without():
    kg = ring_kg(valid=0)
    fixed = {"patience": None, "schedule": "constant", "ema_decay": 0.8}
    trainer = trained(kg, epochs=2, **fixed)
    kept = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.fit()
    assert all(torch.equal(value, kept[name]) for name, value in trainer.model.state_dict().items())
    whole = trained(kg, epochs=4, **fixed)
    again = trained(kg, epochs=2, **fixed)
    again.settings = again.settings.replace(epochs=4)
    again.fit()
    assert same_weights(again.model, whole.model)


def test_an_average_that_is_in_the_model_is_what_is_validated():
    kg = ring_kg(valid=3)
    chosen = settings(ema_decay=0.8, epochs=2, patience=None)
    without = kg.replace(valid=kg.valid[:0])
    torch.manual_seed(0)
    trainer = Trainer(IMVIA.from_kg(without, chosen), without, chosen)
    trainer.fit()
    kept = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.kg = kg
    assert trainer.validate()["mrr"] == rank_valid(trainer.model, kg)
    assert all(torch.equal(value, kept[name]) for name, value in trainer.best_state.items())


def rank_valid(model, kg):
    ranking = rank(model, kg.valid, kg.answers(), heads=())
    return rank_metrics(torch.cat([ranking.head[DECISION], ranking.tail[DECISION]]))["mrr"]


def test_the_average_changes_nothing_in_what_is_trained():
    one, other = States(), States()
    trained(ring_kg(), [one], epochs=2)
    trained(ring_kg(), [other], epochs=2, ema_decay=0.9)
    for mine, theirs in zip(one.states, other.states, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize(("structure", "gate"), [(True, "none"), (False, "entity")])
def test_every_shape_of_the_model_trains(residual, joint, batch_norm, structure, gate):
    shape = {"residual": residual, "joint": joint, "batch_norm": batch_norm}
    trainer = trained(ring_kg(), epochs=1, structure=structure, gate=gate, relation_dim=5, **shape)
    heads = ["structure"] * structure + ["image", "text"] + ["joint"] * joint
    assert trainer.model.heads == heads
    assert math.isfinite(trainer.progress.best_mrr)


def test_a_graph_is_learned_by_heart():
    kg = ring_kg(8, valid=0, test=0)
    trainer = trained(
        kg, epochs=40, dim=16, label_smoothing=0.0, learning_rate=2e-2, **without_dropout()
    )
    assert evaluate(trainer.model, kg, "train")["both"]["mrr"] > 0.95


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision_trains_and_keeps_weights_in_float32(precision):
    records = Records()
    trainer = trained(ring_kg(), [records], epochs=4, precision=precision, **without_dropout())
    assert records.losses("completion")[-1] < records.losses("completion")[0]
    weights = trainer.model.parameters()
    assert {parameter.dtype for parameter in weights} == {torch.float32}
    assert trainer.progress.best_mrr > 0


@pytest.mark.parametrize("clip", [None, 1.0])
def test_rows_in_float16_get_the_gradients_that_they_get_in_float32(clip, monkeypatch):
    found = {}
    step_by = training.RowOptimizer.step_by

    def watched(optimizer, scale=None):
        factor = 1.0 if scale is None else scale
        of_step = [factor * table.gradients()[1] for table in optimizer.tables]
        found.setdefault(precision, of_step)
        step_by(optimizer, scale)

    monkeypatch.setattr(training.RowOptimizer, "step_by", watched)
    kg = ring_kg()
    for precision in ("float32", "float16"):
        chosen = settings(regime="sampled", precision=precision, gradient_clip=clip)
        torch.manual_seed(0)
        trainer = Trainer(IMVIA.from_kg(kg, chosen), kg, chosen)
        trainer.model.train()
        trainer.train_step(next(iter(trainer.batches)))
    for expected, half in zip(found["float32"], found["float16"], strict=True):
        torch.testing.assert_close(
            half, expected, rtol=0.05, atol=2e-3 * expected.abs().max().item()
        )


def test_rows_stay_as_they_are_where_float16_overflows():
    kg = ring_kg()
    chosen = settings(regime="sampled", precision="float16")
    model = IMVIA.from_kg(kg, chosen)
    trainer = Trainer(model, kg, chosen)
    model.train()
    before = [table.weight.detach().clone() for table in model.entity_tables]
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    trainer.train_step(next(iter(trainer.batches)))
    assert trainer.scaler.get_scale() < 1e38
    for table, weight in zip(model.entity_tables, before, strict=True):
        assert torch.equal(table.weight, weight)
    trainer.scaler = torch.amp.GradScaler("cpu")
    trainer.train_step(next(iter(trainer.batches)))
    assert not torch.equal(model.entity.weight, before[0])


@pytest.mark.parametrize(("regime", "overflow"), [("1vsall", torch.inf), ("sampled", torch.nan)])
def test_what_overflows_float16_in_one_optimizer_is_clipped_into_no_other(regime, overflow):
    kg = ring_kg()
    chosen = settings(regime=regime, precision="float16", gradient_clip=1.0, weight_decay=0.1)
    model = IMVIA.from_kg(kg, chosen)
    trainer = Trainer(model, kg, chosen)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    trainer.gradients_of(next(iter(trainer.batches)))
    model.joint.attention.grad[0, 0] = overflow
    trainer.update()
    theirs = {id(parameter) for parameter in trainer.estimators}
    for name, weight in model.named_parameters():
        assert id(weight) in theirs or torch.equal(weight, before[name]), name
    assert trainer.scaler.get_scale() < 2.0**8


@pytest.mark.parametrize(
    ("regime", "precision"),
    [("1vsall", "float32"), ("kvsall", "float32"), ("sampled", "float32"), ("sampled", "float16")],
)
def test_what_requires_no_gradient_stays_as_it_is_and_the_rest_learns(regime, precision):
    kg = ring_kg(valid=0)
    changes = {"complex_head": True, "batch_size": 99, **without_dropout()}
    chosen = settings(regime=regime, precision=precision, **changes)
    model = IMVIA.from_kg(kg, chosen)
    parts = {"entity", "encoder", "relation", "decoder", "decision", "information"}
    parts |= {"complex_entity", "complex_relation"}
    for free in ({"entity"}, {"information"}, parts - {"entity", "information", "encoder"}):
        model.requires_grad_(False)
        for part in free:
            getattr(model, part).requires_grad_(True)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = Trainer(model, kg, chosen)
        trainer.model.train()
        trainer.scaler = torch.amp.GradScaler("cpu", 2.0**8, enabled=precision == "float16")
        trainer.train_step(next(iter(trainer.batches)))
        moved = {name for name, p in model.named_parameters() if p.ne(before[name]).any()}
        assert {name.split(".")[0] for name in moved} == free


def test_a_model_in_float64_has_the_losses_of_one_in_float32():
    kg, found = ring_kg(), []
    chosen = settings(batch_size=99, lambda_alignment=0.1, lambda_relation=0.1, **without_dropout())
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = IMVIA.from_kg(kg, chosen).to(dtype)
        trainer = Trainer(model, kg, chosen)
        torch.manual_seed(1)
        losses = trainer.train_step(next(iter(trainer.batches)))
        found.append({name: value.item() for name, value in losses.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert all(found[1].values())


def test_nothing_that_could_learn_is_an_error():
    kg = ring_kg()
    model = IMVIA.from_kg(kg, settings()).requires_grad_(False)
    with pytest.raises(IMVIAError, match=r"no parameter that requires gradients.*requires_grad_"):
        Trainer(model, kg, settings()).fit()


@pytest.mark.parametrize("there", [True, False])
def test_a_run_goes_on_in_the_precision_that_it_began_in(there, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("imvia_graph._machine.cpu_has_bfloat16", lambda: there)
    began = "bfloat16" if there else "float32"
    options = settings(precision="auto", epochs=1, device="cpu")
    run = ig.fit(ring_kg(), settings=options, out=tmp_path / "run")
    assert run.settings.precision == began
    monkeypatch.setattr("imvia_graph._machine.cpu_has_bfloat16", lambda: not there)
    assert ig.load(tmp_path / "run").settings.precision == began
    with caplog.at_level("WARNING"):
        again = ig.fit(out=tmp_path / "run", resume=True, epochs=2, precision="auto")
    assert again.settings.precision == began
    assert ("does not support in hardware" in caplog.text) == there
    with pytest.raises(SettingsError, match="Setting precision: the run in"):
        ig.fit(out=tmp_path / "run", resume=True, precision="float16")
    # A folder of before, which leaves it to each machine, says it once it is gone on with.
    path = tmp_path / "run" / "settings.yaml"
    path.write_text(path.read_text().replace(f"precision: {began}", "precision: auto"))
    ig.fit(out=tmp_path / "run", resume=True, epochs=3)
    assert ig.load(tmp_path / "run").settings.precision != "auto"


def test_several_processes_take_the_precision_that_all_have(monkeypatch):
    monkeypatch.setattr("imvia_graph._machine.cpu_has_bfloat16", lambda: True)
    kg, chosen = ring_kg(), settings(precision="auto")
    assert Trainer(IMVIA.from_kg(kg, chosen), kg, chosen).precision == torch.bfloat16
    monkeypatch.setattr(Shards, "max_", lambda shards, lacks: torch.ones_like(lacks))
    assert Trainer(IMVIA.from_kg(kg, chosen), kg, chosen).precision == torch.float32


def test_a_named_precision_is_taken_and_auto_is_one_that_the_device_has():
    assert training_dtype(settings(precision="bfloat16"), CPU) == torch.bfloat16
    assert training_dtype(settings(precision="float32"), CPU) == torch.float32
    assert training_dtype(settings(precision="auto"), CPU) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_a_settings_error(device):
    with pytest.raises(ig.SettingsError, match=f"device: '{device}'"):
        resolve_device(device)


def test_a_loss_that_is_not_finite_stops_training_with_advice():
    kg = ring_kg()
    chosen = settings()
    model = IMVIA.from_kg(kg, chosen)
    with torch.no_grad():
        model.entity.weight[3] = torch.nan
    with pytest.raises(
        ig.IMVIAError, match=r"Epoch 1, batch 1 of 3 .*: loss is nan, .*learning_rate"
    ):
        Trainer(model, kg, chosen).fit()


# -- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", ["shared", "relation"])
@pytest.mark.parametrize("loss", ["softmax", "binary"])
@pytest.mark.parametrize("regime", ["1vsall", "sampled"])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_an_epoch_covers_each_training_triple_once_in_both_directions(
    regime, loss, candidates, batch_size
):
    kg = star_kg()
    kg = kg.replace(train=torch.cat([kg.train, kg.train[:2]]))  # repeated triples count once
    chosen = settings(regime=regime, loss=loss, candidates=candidates, batch_size=batch_size)
    batches = Batches(kg, chosen, CPU)
    expected = set(map(tuple, with_inverses(kg.train, kg.num_relations).tolist()))
    for _ in range(2):
        seen = []
        sizes = []
        for batch in batches:
            row, answer = batch.positives.row, batch.positives.col
            if batch.candidate is not None:
                assert batch.candidate.shape == (len(batch.entity), 1 + chosen.negatives)
                assert batch.candidate.max() < kg.num_entities
                answer = batch.candidate[row, answer]
            if batch.sampled is not None:
                answer = batch.sampled.entity[answer]
            counts = torch.bincount(row, minlength=len(batch.entity))
            if regime == "1vsall" and loss == "softmax":
                assert counts.tolist() == batch.positives.weight.tolist()
            else:
                assert batch.positives.weight is None
                assert counts.tolist() == [1] * len(batch.entity)
            asked = batch.entity[row].tolist(), batch.relation[row].tolist()
            seen += zip(*asked, answer.tolist(), strict=True)
            sizes.append(len(batch.entity))
        assert len(seen) == len(expected)
        assert set(seen) == expected
        assert len(sizes) == len(batches)
        assert max(sizes) <= batch_size
        assert sum(sizes) == batches.num_rows
        if candidates == "shared":  # the rows are shared out evenly
            assert max(sizes) - min(sizes) <= 1
        else:
            limit = max(1, batch_size * batches.num_rows // batches.size)
            assert max(sizes) <= limit
            assert len(sizes) == 1 or min(sizes) >= limit // 2


@pytest.mark.parametrize("loss", ["softmax", "binary"])
@pytest.mark.parametrize(
    "changes",
    [
        {"regime": "1vsall"},
        {"regime": "kvsall"},
        {"regime": "sampled"},
        {"regime": "sampled", "negative_sampling": "query"},
    ],
    ids=lambda changes: "-".join(changes.values()),
)
def test_candidates_of_each_relation_are_shared_ones_where_no_gate_sees_relations(changes, loss):
    kg = star_kg()  # relations differ in how many answers a query has
    chosen = {"loss": loss, "gate": "entity", "lambda_regularization": 0.1, "complex_head": True}
    found, batch = [], None
    for candidates in ("shared", "relation"):
        given = settings(
            batch_size=64, candidates=candidates, **chosen, **changes, **without_dropout()
        )
        torch.manual_seed(0)
        model = IMVIA.from_kg(kg, given)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        trainer = Trainer(model, kg, given)
        batch = next(iter(trainer.batches)) if batch is None else batch
        torch.manual_seed(1)
        losses, _ = trainer.losses(batch)
        losses["loss"].backward()
        found.append({**losses, "gradient": model.entity.weight.grad.norm()})
    assert len(batch.relation.unique()) > 1
    # How many entities the drawn ones stand for is told a relation, not a batch.
    estimated = loss == "binary" and list(changes.values()) == ["sampled"]
    for name, value in found[0].items():
        expected = pytest.approx(value.item(), rel=1e-2 if estimated else 1e-4, abs=1e-6)
        assert found[1][name].item() == expected, name


def star_kg():
    """A ring whose entity 0 is the head of 70 further triples of one relation."""
    kg = ring_kg(80)
    far = torch.tensor([[0, 1, tail] for tail in range(3, 73)])
    return kg.replace(train=torch.cat([kg.train, far[(far[:, 2] != 40)]]))


def test_queries_that_differ_in_the_answer_alone_are_a_row_of_few_answers():
    kg = star_kg()
    batches = Batches(kg, settings(regime="1vsall", batch_size=1000), CPU)
    (batch,) = batches
    of_the_star = (batch.entity == 0) & (batch.relation == 1)
    assert sorted(batch.positives.weight[of_the_star].tolist())[1:] == [32, 32]
    triples = 2 * len(kg.train)
    assert batch.positives.weight.sum() == triples
    assert len(batch.entity) < triples - 60
    # As many steps as without: batch_size counts queries of one answer.
    assert len(Batches(kg, settings(regime="1vsall", batch_size=10), CPU)) == -(-triples // 10)


@pytest.mark.parametrize("candidates", ["shared", "relation"])
def test_rows_of_several_answers_are_the_loss_of_as_many_queries(candidates):
    kg = star_kg()
    others = {"lambda_information": 0, "lambda_alignment": 0, **without_dropout()}
    chosen = settings(candidates=candidates, batch_size=1000, **others)
    model = IMVIA.from_kg(kg, chosen).double().eval()
    trainer = Trainer(model, kg, chosen)
    batch = next(iter(trainer.batches))
    row, col = batch.positives.row, batch.positives.col
    apart = Batch(batch.entity[row], batch.relation[row], Positives(torch.arange(len(row)), col))
    found = []
    for one in (batch, apart):
        model.zero_grad()
        losses, _ = trainer.losses(one)
        total = losses["completion"] + losses["regularization"]
        total.backward()
        gradient = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((total.detach(), *gradient))
    for merged, single in zip(*found, strict=True):
        torch.testing.assert_close(merged, single, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("candidates", ["shared", "relation"])
def test_a_kvsall_epoch_covers_each_query_once_with_all_its_training_answers(candidates):
    kg = ring_kg(test=4)
    extra = torch.tensor([[0, 0, 5], [0, 0, 7], [0, 0, 7]])
    kg = kg.replace(train=torch.cat([kg.train, extra]))
    batches = Batches(kg, settings(regime="kvsall", candidates=candidates, batch_size=5), CPU)
    expected = {}
    for entity, relation, answer in with_inverses(kg.train, kg.num_relations).tolist():
        expected.setdefault((entity, relation), set()).add(answer)
    seen = {}
    for batch in batches:
        for i, query in enumerate(zip(batch.entity.tolist(), batch.relation.tolist(), strict=True)):
            answers = batch.positives.col[batch.positives.row == i].tolist()
            assert query not in seen
            assert len(answers) == len(set(answers))
            seen[query] = set(answers)
    assert seen == expected
    assert {5, 7} <= seen[0, 0]


def test_with_relation_candidates_a_batch_holds_few_relations():
    kg = ring_kg(40, valid=0, test=0)
    batches = Batches(kg, settings(candidates="relation", batch_size=20), CPU)
    relations = [len(batch.relation.unique()) for batch in batches]
    assert len(relations) == 8
    assert max(relations) <= 2
    shared = Batches(kg, settings(candidates="shared", batch_size=20), CPU)
    assert min(len(batch.relation.unique()) for batch in shared) > 2


@given(
    counts=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    limit=st.integers(1, 60),
)
def test_packed_batches_hold_each_query_once_and_are_cut_between_relations(counts, limit):
    batches = pack(counts, limit)
    positions = [n for batch in batches for start, stop in batch for n in range(start, stop)]
    assert sorted(positions) == list(range(sum(counts)))
    sizes = [sum(stop - start for start, stop in batch) for batch in batches]
    assert max(sizes) <= limit
    assert len(sizes) == 1 or min(sizes) >= limit // 2
    # A relation is in as many batches as it needs; the last small batch may cut one more.
    relation = [i for i, count in enumerate(counts) for _ in range(count)]
    pairs = sum(len({relation[start] for start, _ in batch}) for batch in batches)
    assert pairs <= sum(-(-count // limit) for count in counts) + 1


def test_epochs_are_shuffled_anew_and_the_same_for_the_same_seed():
    kg = ring_kg()

    def orders(seed):
        batches = Batches(kg, settings(seed=seed), CPU)
        return [torch.cat([batch.entity for batch in batches]).tolist() for _ in range(2)]

    first, second = orders(0)
    assert first != second
    assert orders(0) == [first, second]
    assert orders(1)[0] != first


def test_a_callback_hears_of_each_step_and_epoch():
    records = Records()
    kg = ring_kg()
    trainer = trained(kg, [records], epochs=2, batch_size=10)
    steps = math.ceil(2 * len(kg.train) / 10)
    assert records.steps == trainer.progress.step == 2 * steps
    assert [record["epoch"] for record in records.records] == [1, 2]
    parts = {"information", "alignment", "completion", "regularization"}
    keys = {"epoch", "loss", *parts, "seconds", "valid"}
    assert set(records.records[0]) == keys


# -- small graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", ["shared", "relation"])
@pytest.mark.parametrize("regime", ["1vsall", "kvsall", "sampled"])
@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_batches_of_one_query_work(regime, candidates, loss):
    records = Records()
    changes = {"regime": regime, "candidates": candidates, "loss": loss}
    trainer = trained(ring_kg(6), [records], epochs=1, batch_size=1, **changes)
    assert records.steps == trainer.batches.size
    assert math.isfinite(records.losses()[0])
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


@pytest.mark.parametrize("candidates", ["shared", "relation"])
@pytest.mark.parametrize("regime", ["1vsall", "kvsall", "sampled"])
def test_a_graph_of_one_triple_trains(regime, candidates):
    kg = ig.MultiViewKG.from_labels([("a", "r", "b")], views={"text": (torch.ones(1, 3), ["b"])})
    records = Records()
    trainer = trained(kg, [records], regime=regime, candidates=candidates)
    assert all(math.isfinite(value) for value in records.losses())
    assert evaluate(trainer.model, kg, "train")["both"]["mrr"] >= 0.5


def test_a_graph_of_one_entity_trains():
    kg = ig.MultiViewKG(["a"], ["r"], torch.tensor([[0, 0, 0]]))
    trainer = trained(kg)
    assert evaluate(trainer.model, kg, "train")["both"]["mrr"] == 1


@pytest.mark.parametrize("regime", ["1vsall", "kvsall", "sampled"])
def test_a_graph_without_views_trains_on_structure_alone(regime):
    records = Records()
    kg = ring_kg(views=False)
    trainer = trained(kg, [records], regime=regime, epochs=6, **without_dropout())
    assert trainer.model.heads == ["structure"]
    assert records.losses()[-1] < 0.95 * records.losses()[0]
    assert [record["alignment"] for record in records.records] == [0] * 6


def test_a_modality_without_a_single_view_trains():
    nothing = ig.Views(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    records = Records()
    trainer = trained(ring_kg(views=False).replace(views={"image": nothing}), [records])
    assert trainer.model.heads == ["structure", "image", "joint"]
    assert all(math.isfinite(value) for value in records.losses())


def test_an_entity_seen_only_in_test_is_ranked_with_finite_scores():
    kg = ring_kg()
    labels = [*kg.entities, "stranger"]
    unseen = len(kg.entities)
    test = torch.cat([kg.test, torch.tensor([[unseen, 0, 1], [2, 1, unseen]])])
    kg = kg.replace(entities=labels, entity_names=labels, test=test)
    assert kg.unseen_entities().tolist() == [unseen]
    trainer = trained(kg)
    ranking = rank(trainer.model, kg.test, kg.answers())
    for side in (ranking.head, ranking.tail):
        for head, ranks in side.items():
            assert ranks.isfinite().all(), head
            assert (ranks >= 1).all(), head
            assert (ranks <= kg.num_entities).all(), head


# -- which epoch is kept --------------------------------------------------------------------------


def test_the_weights_returned_are_those_of_the_best_epoch_and_give_its_validation_mrr():
    records = Records()
    kg = ring_kg(20, valid=8)
    trainer = trained(
        kg, [records], epochs=12, learning_rate=0.5, patience=None, table_optimizer="same"
    )
    progress = trainer.progress
    mrr = [record["valid"]["mrr"] for record in records.records]
    assert progress.best_mrr == max(mrr)
    assert progress.best_epoch == mrr.index(max(mrr)) + 1  # the first of equal ones
    assert progress.best_epoch < 12  # or this would show nothing
    ranking = rank(trainer.model, kg.valid, kg.answers())
    found = rank_metrics(torch.cat([ranking.head[DECISION], ranking.tail[DECISION]]))
    assert found == records.records[progress.best_epoch - 1]["valid"]
    assert evaluate(trainer.model, kg, "valid")["both"]["mrr"] == progress.best_mrr
    best = records.states[progress.best_epoch - 1]
    assert all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items())


class BestStates(Callback):
    """Copies the best state after each epoch, and sees whether it takes memory of its own."""

    def __init__(self):
        self.states, self.own = [], []

    def on_epoch(self, trainer, record):
        best, now = trainer.best_state, trainer.model.state_dict()
        self.states.append({name: value.clone() for name, value in best.items()})
        self.own.append(any(best[name].data_ptr() != now[name].data_ptr() for name in best))


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_the_best_state_is_copied_when_it_is_about_to_change_and_no_earlier(average, monkeypatch):
    found = iter([0.1, 0.3, 0.2, 0.3, 0.25])
    monkeypatch.setattr(ig.training, "rank_metrics", lambda ranks: {"mrr": next(found)})
    records, seen = Records(), BestStates()
    trainer = trained(ring_kg(20, valid=8), [records, seen], epochs=5, ema_decay=average)
    assert trainer.progress.best_epoch == 2
    # With an average, what was validated is not what is trained.
    own = [False, False, True, True, True]
    assert seen.own == ([True] * 5 if average else own)
    for epoch, best in enumerate([0, 1, 1, 1, 1]):
        for name, value in seen.states[epoch].items():
            assert torch.equal(value, seen.states[best][name]), (epoch, name)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, seen.states[1][name])
    assert any(not torch.equal(v, seen.states[0][name]) for name, v in seen.states[1].items())
    pointers = {name: value.data_ptr() for name, value in trainer.model.state_dict().items()}
    assert {name: value.data_ptr() for name, value in trainer.best_state.items()} == pointers


def test_training_ends_when_validation_has_not_improved_for_patience_times():
    records = Records()
    # Nothing can improve: the learning rate is too small to change a rank.
    kg = ring_kg()
    changes = {
        "epochs": 50,
        "patience": 3,
        "learning_rate": 1e-30,
        "table_optimizer": "same",
        "batch_norm": False,
    }
    trainer = trained(kg, [records], **changes)
    assert trainer.progress.ended == "patience"
    assert trainer.progress.best_epoch == 1
    assert trainer.progress.epoch == len(records.records) == 4


@pytest.mark.parametrize(("many", "weight"), [(13, 0.1), (12, 0.01)])
def test_many_entities_are_regularised_less(monkeypatch, many, weight):
    monkeypatch.setattr(training, "MANY", many)
    kg = ring_kg(12)
    for changes, expected in [({}, weight), ({"lambda_regularization": 0.25}, 0.25)]:
        chosen = settings(**changes)
        trainer = Trainer(ig.IMVIA.from_kg(kg, chosen), kg, chosen)
        assert trainer.settings.lambda_regularization == expected


@pytest.mark.parametrize(("telling", "mrr", "told"), [(12, 0.4, 1), (12, 0.6, 0), (13, 0.4, 0)])
def test_an_epoch_that_taught_nothing_is_told_of_once(monkeypatch, caplog, telling, mrr, told):
    # By chance the MRR of 12 entities is 0.259.
    monkeypatch.setattr(training, "_WARN_FROM", telling)
    monkeypatch.setattr(training, "rank_metrics", lambda ranks: {"mrr": mrr})
    trained(ring_kg(12), epochs=3)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == told
    assert all("by chance it would be 0.26" in line for line in lines)
    assert all("lambda_regularization (it is 0.1)" in line for line in lines)


def test_patience_counts_validations_not_epochs():
    changes = {
        "epochs": 50,
        "patience": 2,
        "learning_rate": 1e-30,
        "table_optimizer": "same",
        "batch_norm": False,
    }
    trainer = trained(ring_kg(), validate_every=3, **changes)
    assert trainer.progress.best_epoch == 3
    assert trainer.progress.epoch == 9


def test_without_patience_all_epochs_are_trained():
    trainer = trained(
        ring_kg(), epochs=8, patience=None, learning_rate=1e-30, table_optimizer="same"
    )
    assert (trainer.progress.ended, trainer.progress.epoch) == ("epochs", 8)


def test_validation_comes_every_so_many_epochs_and_at_the_last():
    records = Records()
    trained(ring_kg(), [records], epochs=5, validate_every=2)
    assert [r["epoch"] for r in records.records if "valid" in r] == [2, 4, 5]


def test_without_validation_triples_the_last_epoch_is_kept():
    records = Records()
    trainer = trained(ring_kg(valid=0), [records], epochs=4, patience=1)
    assert trainer.progress.epoch == trainer.progress.best_epoch == 4
    assert trainer.progress.best_mrr is None
    assert not any("valid" in record for record in records.records)
    last = records.states[-1]
    assert all(torch.equal(value, last[name]) for name, value in trainer.model.state_dict().items())


def test_no_epochs_leave_the_model_as_it_was():
    kg = ring_kg()
    torch.manual_seed(0)
    fresh = IMVIA.from_kg(kg, settings())
    assert same_weights(trained(kg, epochs=0).model, fresh)


# -- what training sees ---------------------------------------------------------------------------


@pytest.mark.parametrize("regime", ["1vsall", "kvsall", "sampled"])
def test_test_and_validation_triples_are_never_trained_on(regime):
    kg = ring_kg(valid=3, test=3)
    other = kg.replace(
        valid=torch.tensor([[0, 1, 1], [5, 0, 2]]), test=torch.tensor([[4, 1, 4], [9, 0, 1]])
    )
    records = [Records(), Records()]
    for one, callback in zip((kg, other), records, strict=True):
        trained(one, [callback], regime=regime, patience=None)
    for mine, theirs in zip(records[0].states, records[1].states, strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_other_test_triples_that_answer_no_validation_query_change_nothing_at_all():
    kg = ring_kg(20, valid=4, test=4)
    asked = {(e, r) for e, r, _ in with_inverses(kg.valid, 2).tolist()}
    known = set(map(tuple, torch.cat([kg.train, kg.valid, kg.test]).tolist()))
    other = [
        (h, r, t)
        for h in range(20)
        for r in range(2)
        for t in range(20)
        if (h, r) not in asked and (t, r + 2) not in asked and (h, r, t) not in known
    ]
    assert len(other) > 10
    # The test triples as they are answer none of them either.
    free = [tuple(row) for row in kg.test.tolist()]
    assert not {q for h, r, t in free for q in ((h, r), (t, r + 2))} & asked
    one = trained(kg, epochs=5)
    two = trained(kg.replace(test=torch.tensor(other[:7])), epochs=5)
    assert same_weights(one.model, two.model)
    assert one.progress.best_mrr == two.progress.best_mrr


def test_training_triples_do_matter():
    kg = ring_kg()
    assert not same_weights(trained(kg).model, trained(kg.replace(train=kg.train[1:])).model)


def test_views_and_the_graph_are_left_as_they_were():
    kg = ring_kg()
    before = {modality: kg.views(modality)[0].clone() for modality in kg.modalities}
    train = kg.train.clone()
    trained(kg)
    assert all(torch.equal(kg.views(modality)[0], feat) for modality, feat in before.items())
    assert torch.equal(kg.train, train)


# -- seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", ["1vsall", "kvsall", "sampled"])
def test_the_same_seed_gives_the_same_weights_to_the_bit_and_another_seed_others(regime):
    kg = ring_kg()
    first = trained(kg, seed=5, regime=regime)
    torch.rand(100)  # what was drawn elsewhere does not matter
    again = trained(kg, seed=5, regime=regime)
    other = trained(kg, seed=6, regime=regime)
    assert same_weights(first.model, again.model)
    assert not same_weights(first.model, other.model)


def test_validation_ranks_against_as_many_candidates_as_are_set_drawn_by_the_seed():
    kg = ring_kg(40, valid=20)
    chosen = settings(ranking_candidates=5, seed=3)
    trainer = Trainer(IMVIA.from_kg(kg, chosen), kg, chosen)
    found = trainer.validate()
    metrics = []
    for candidates in (draw_candidates(40, 5, 3), draw_candidates(40, 5, 0), None):
        ranking = rank(trainer.model, kg.valid, kg.answers(), candidates=candidates)
        metrics.append(ranking.metrics()["both"])
    assert found == pytest.approx(metrics[0])
    assert metrics[0]["mrr"] not in (metrics[1]["mrr"], metrics[2]["mrr"])


def test_validation_draws_no_random_numbers():
    kg = ring_kg()
    often, once = Records(), Records()
    trained(kg, [often], epochs=4, validate_every=1, patience=None)
    trained(kg, [once], epochs=4, validate_every=4, patience=None)
    for mine, theirs in zip(often.states, once.states, strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_ring_triples_are_what_these_tests_take_them_for():
    triples = ring_triples(10).tolist()
    assert [3, 0, 4] in triples
    assert [3, 1, 8] in triples
    assert len(triples) == 20


def test_sampled_negatives_are_no_true_answers_of_their_queries():
    # Every entity is followed by four others: without care many negatives would be true.
    size = 40
    entity = torch.arange(size)
    triples = torch.cat(
        [torch.stack([entity, 0 * entity, (entity + step) % size], dim=1) for step in range(1, 5)]
    )
    names = [f"e{i}" for i in range(size)]
    kg = ig.MultiViewKG(names, ["r"], triples)
    chosen = settings(regime="sampled", negatives=50, negative_sampling="query")
    batches = Batches(kg, chosen, torch.device("cpu"))
    true = {tuple(row) for row in with_inverses(triples, 1).tolist()}
    count = sum(
        (h, r, t) in true
        for batch in batches
        for h, r, row in zip(
            batch.entity.tolist(),
            batch.relation.tolist(),
            batch.candidate[:, 1:].tolist(),
            strict=True,
        )
        for t in row
    )
    assert count < 10  # of 16,000; 1,600 by chance


@pytest.mark.parametrize("candidates", ["shared", "relation"])
@pytest.mark.parametrize("batch_size", [100, 1000])
@pytest.mark.parametrize("kind", ["in-batch", "uniform", "degree"])
def test_a_shared_candidate_is_told_how_likely_it_is_to_be_there(kind, batch_size, candidates):
    kg = star_kg()
    changes = {"negative_sampling": kind, "batch_size": batch_size, "candidates": candidates}
    chosen = settings(regime="sampled", negatives=3, **changes)
    degree = torch.bincount(kg.train[:, [0, 2]].flatten(), minlength=kg.num_entities) + 1
    drawn = {
        "in-batch": torch.zeros(kg.num_entities),
        "uniform": torch.full((kg.num_entities,), 1 / kg.num_entities),
        "degree": degree / degree.sum(),
    }[kind]

    def of(relation):
        """What a batch draws from: all answers, or those under a relation."""
        return relation if candidates == "relation" else 0

    answers = defaultdict(Counter)
    for _, relation, tail in with_inverses(kg.train, kg.num_relations).tolist():
        answers[of(relation)][tail] += 1
    batches = list(Batches(kg, chosen, CPU))
    assert len(batches) >= len(kg.train) * 2 / batch_size
    for batch in batches:
        asked = Counter(of(relation) for relation in batch.relation.tolist())
        for entity, log_q in zip(*(part.tolist() for part in batch.sampled[:2]), strict=True):
            absent = (1 - drawn[entity].item()) ** 3
            for group, size in asked.items():
                every = answers[group].total()
                absent *= math.comb(every - answers[group][entity], size) / math.comb(every, size)
            assert math.exp(log_q) == pytest.approx(1 - absent, rel=1e-5)


@pytest.mark.parametrize("candidates", ["shared", "relation"])
@pytest.mark.parametrize(
    "batch_size", [7, 200]
)  # with 7, entity 0 has more answers than candidates
def test_other_known_answers_among_shared_candidates_are_left_out(batch_size, candidates):
    kg = star_kg()
    chosen = settings(regime="sampled", negatives=20, batch_size=batch_size, candidates=candidates)
    known = set(map(tuple, with_inverses(kg.train, kg.num_relations).tolist()))
    for batch in Batches(kg, chosen, CPU):
        entities = batch.sampled.entity.tolist()
        assert entities == sorted(set(entities))
        queries = list(zip(batch.entity.tolist(), batch.relation.tolist(), strict=True))
        positives = dict(zip(*(part.tolist() for part in batch.positives[:2]), strict=True))
        expected = {
            (i, j)
            for i, query in enumerate(queries)
            for j, entity in enumerate(entities)
            if (*query, entity) in known and j != positives[i]
        }
        found = list(zip(batch.sampled.row.tolist(), batch.sampled.col.tolist(), strict=True))
        assert len(found) == len(expected)
        assert set(found) == expected


# -- what a trainer is given -----------------------------------------------------------------------


def test_a_trainer_wants_the_graph_of_its_model():
    kg = ring_kg()
    model = IMVIA.from_kg(kg, settings())
    with pytest.raises(ig.DataError, match="graph with 12 entities; the graph 'ring' has 11"):
        Trainer(model, ring_kg(11), settings())
    other = kg.replace(entities=[*kg.entities[1:], kg.entities[0]])
    with pytest.raises(ig.DataError, match=r"entities are in another order: number 0 is 'e0'"):
        Trainer(model, other, settings())


def test_settings_of_a_model_and_a_trainer_are_settings():
    kg = ring_kg()
    for make in (
        lambda: IMVIA.from_kg(kg, {"dim": 8}),
        lambda: IMVIA(12, 2, {}, {"dim": 8}),
        lambda: Trainer(IMVIA.from_kg(kg, settings()), kg, {"dim": 8}),
    ):
        with pytest.raises(ig.SettingsError, match=r"received dict.*Settings.create"):
            make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_not_trained(dtype):
    kg = ring_kg()
    model = IMVIA.from_kg(kg, settings()).to(dtype)
    with pytest.raises(ig.SettingsError, match=rf"entity.weight is in {dtype}.*model.float\(\)"):
        Trainer(model, kg, settings())


class _Changes(ig.Callback):
    """Changes settings after the first epoch."""

    def __init__(self, **changes):
        self.changes, self.rates = changes, []

    def on_step(self, trainer, losses):
        self.rates.append(trainer.optimizer.param_groups[0]["lr"])

    def on_epoch(self, trainer, record):
        if record["epoch"] == 1:
            trainer.settings = trainer.settings.replace(**self.changes)


def test_settings_that_training_reads_may_change_during_training():
    kg = ring_kg()
    run = ig.fit(kg, settings=settings(epochs=9), callbacks=_Changes(epochs=2))
    assert (run.progress.epoch, run.progress.ended, run.settings.epochs) == (2, "epochs", 2)
    changes = _Changes(learning_rate=1e-4)
    ig.fit(kg, settings=settings(schedule="linear"), callbacks=changes)
    assert changes.rates[-1] < 1e-4 < changes.rates[0]


@pytest.mark.parametrize(
    ("key", "value"), [("lambda_regularization", 0.0), ("learning_rate", 1e-4), ("dim", 4)]
)
def test_a_setting_that_would_not_take_effect_cannot_change_during_training(key, value):
    with pytest.raises(ig.SettingsError, match=f"Setting {key}: it cannot change from"):
        ig.fit(ring_kg(), settings=settings(), callbacks=_Changes(**{key: value}))
