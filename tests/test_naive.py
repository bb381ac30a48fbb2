"""The plain forms that the benchmarks compare with compute what the library computes."""

import importlib.util
import math

import pytest
import torch
from helpers import ROOT, ring_kg
from helpers import paper_settings as settings

import imvia_graph as ig
from imvia_graph.answers import with_inverses
from imvia_graph.batches import Batch
from imvia_graph.losses import Positives, information
from imvia_graph.training import Trainer

_spec = importlib.util.spec_from_file_location("naive", ROOT / "benchmarks" / "naive.py")
naive = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(naive)

#: The regime of the plain form; no dropout, whose masks are drawn differently.
REGIME = {
    "regime": "kvsall",
    "loss": "binary",
    "relation_dim": 5,
    "relation_residual": False,
    "decision": "trained",
    "table_optimizer": "same",
    "input_dropout": 0,
    "relation_dropout": 0,
    "hidden_dropout": 0,
    "batch_norm": True,
    "lambda_information": 0.5,
    "lambda_alignment": 0.1,
    "lambda_regularization": 0,
}


@pytest.fixture(params=[True, False], ids=["torch_scatter", "plain torch"], autouse=True)
def _with_or_without_torch_scatter(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(naive, "torch_scatter", None)
    elif naive.torch_scatter is None:
        pytest.skip("torch-scatter does not load")


@pytest.fixture
def kg():
    """Sixteen entities; entity 0 has no view, entity 1 many."""
    return ring_kg(16, valid=2, test=6)


@pytest.fixture
def both(kg):
    """Trainers of the two forms with the same weights, in float64."""
    given = settings(**REGIME)
    model = ig.IMVIA.from_kg(kg, given).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours = Trainer(model, kg, given)
    theirs = naive.NaiveTrainer(naive.NaiveIMVIA(kg, given).double(), kg, given)
    theirs.model.copy_weights(model)
    theirs.estimators.double().load_state_dict(model.information.estimators.state_dict())
    theirs.log_scale.data = model.alignment.log_scale.data.clone()
    return ours, theirs


def test_naive_aggregate_is_the_layer_s(kg, both):
    ours, theirs = both
    entity, relation = torch.tensor([0, 1, 1, 5, 9]), torch.tensor([0, 3, 1, 2, 0])
    for rel in (relation, None):
        embedding = ours.model.embed(entity, rel)
        found = theirs.model.embed(entity, rel)
        for head, mine in zip(ours.model.heads, found, strict=True):
            torch.testing.assert_close(mine, embedding.heads[head], msg=head)


@pytest.mark.parametrize("training", [True, False])
def test_naive_scores_are_the_model_s(kg, both, training):
    ours, theirs = both
    ours.model.train(training)
    theirs.model.train(training)
    entity, relation = torch.tensor([0, 1, 1, 5, 9]), torch.tensor([0, 3, 1, 2, 0])
    scores = ours.model.scores(
        ours.model.queries(entity, relation), ours.model.candidates(), relation
    )
    for (head, expected), found in zip(scores.items(), theirs.model(entity, relation), strict=True):
        torch.testing.assert_close(found, expected, msg=head)


def test_naive_targets_are_the_known_answers(kg, both):
    ours, theirs = both
    (queries,) = [batch for batch in theirs.batches() if len(batch) == 16][:1]
    entity, relation = torch.tensor(queries).unbind(1)
    row, col = ours.batches.answers.pairs(entity, relation)
    expected = torch.zeros(len(queries), kg.num_entities)
    expected[row, col] = 1
    assert torch.equal(theirs.targets(queries), expected)


def test_naive_losses_and_gradients_are_the_trainer_s(kg, both, monkeypatch):
    ours, theirs = both
    # The same permutation in both: the next row of those that take part.
    monkeypatch.setattr(naive, "shuffled", lambda count, device: torch.arange(count).roll(-1))
    monkeypatch.setattr(information, "_shuffle", _next_row)
    # The library computes L1 and L2 in float32; here it is not to.
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    queries = next(theirs.batches())
    entity, relation = torch.tensor(queries).unbind(1)
    batch = Batch(entity, relation, Positives(*ours.batches.answers.pairs(entity, relation)))
    ours.model.train()
    theirs.model.train()

    expected, estimation = ours.losses(batch)
    l1, l2, l3, learning = theirs.losses(queries)
    torch.testing.assert_close(l1, expected["information"])
    torch.testing.assert_close(l2, expected["alignment"])
    torch.testing.assert_close(l3, expected["completion"])
    torch.testing.assert_close(learning, estimation)

    expected["loss"].backward(inputs=ours.parameters, retain_graph=True)
    estimation.backward(inputs=ours.estimators)
    given = ours.settings
    total = given.lambda_information * l1 + given.lambda_alignment * l2 + l3
    theirs_parameters = list(theirs.model.parameters())
    total.backward(inputs=theirs_parameters, retain_graph=True)
    learning.backward(inputs=list(theirs.estimators.parameters()))
    model, plain = ours.model, theirs.model
    pairs = [(plain.entity.weight.grad, model.entity.weight.grad)]
    pairs += [(plain.attention.grad, model.joint.attention.grad)]
    pairs += [(plain.decision.weight.grad, model.decision.linear.weight.grad)]
    for mine, table in zip(plain.relation, model.relation, strict=True):
        pairs.append((mine.weight.grad, table.weight.grad))
    for mine, decoder in zip(plain.tucker, model.decoder, strict=True):
        pairs.append((mine.core.grad, decoder.core.grad))
        pairs.append((mine.hidden_norm.weight.grad, decoder.hidden_norm.weight.grad))
    for mine, conv in zip(plain.views, model.encoder.convs, strict=True):
        halves = [conv.gate_entity.weight.grad, conv.gate_relation.weight.grad]
        pairs.append((mine.gate.weight.grad, torch.cat(halves, dim=1)))
        pairs.append((mine.absent.grad, conv.absent.grad))
    for mine, estimator in zip(theirs.estimators, model.information.estimators, strict=True):
        pairs.append((mine.mean[0].weight.grad, estimator.mean[0].weight.grad))
    for mine, expected_gradient in pairs:
        torch.testing.assert_close(mine, expected_gradient)


def _next_row(rows):
    order = torch.arange(rows.shape[1]).expand(rows.shape).clone()
    for one, mask in zip(order, rows, strict=True):
        there = mask.nonzero().flatten()
        one[there] = there.roll(-1)
    return order


def test_naive_training_goes_down(kg):
    given = settings(**REGIME)
    trainer = naive.NaiveTrainer(naive.NaiveIMVIA(kg, given), kg, given)
    seen = [trainer.step(next(trainer.batches())).item() for _ in range(30)]
    assert all(map(math.isfinite, seen))
    assert sum(seen[-5:]) < sum(seen[:5])


def test_naive_ranks_are_the_evaluator_s(kg, both):
    ours, theirs = both
    ours.model.float()
    theirs.model.float()
    ranking = ig.evaluation.rank(ours.model, kg.test, kg.answers())
    queries = with_inverses(kg.test, kg.num_relations)
    known = naive.answers_of([kg.train, kg.valid, kg.test], kg.num_relations)
    with torch.no_grad():
        tables = theirs.model.tables()
    found = naive.ranks(theirs.model, queries, known, tables, 5, decision_alone=False)
    for head, mine in zip(ranking.tail, found, strict=True):
        expected = torch.cat([ranking.tail[head], ranking.head[head]])
        torch.testing.assert_close(mine.double(), expected, msg=head)
    alone = naive.ranks(theirs.model, queries, known, tables, 5, decision_alone=True)
    assert torch.equal(alone, found[-1:])
