"""Optimizers against the equations that their documentation gives, and against torch's."""

import copy

import pytest
import torch
from helpers import paper_settings as settings
from helpers import ring_kg

import imvia_graph as ig
from imvia_graph.distributed import Shards
from imvia_graph.nn.entity_table import EntityTable
from imvia_graph.optimizers import Adagrad, RowOptimizer, make_optimizer
from imvia_graph.training import Trainer


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in ((4, 3), (5,))
    ]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adagrad_is_torch_s(decay):
    ours, theirs = parameters(), parameters()
    pairs = [
        (ours, Adagrad(ours, lr=0.1, weight_decay=decay)),
        (theirs, torch.optim.Adagrad(theirs, lr=0.1, weight_decay=decay)),
    ]
    for step in range(5):
        for values, optimizer in pairs:
            for value in values:
                value.grad = torch.sin(value.detach() * (step + 1))
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    assert pairs[0][1].state_dict()["state"].keys() == pairs[1][1].state_dict()["state"].keys()


def test_a_step_that_is_to_be_left_out_changes_nothing_but_the_count():
    values = parameters()
    optimizer = Adagrad(values, lr=0.1)
    for bad in (0.0, 1.0):
        before = copy.deepcopy((values, optimizer.state_dict()))
        for value in values:
            value.grad = torch.full_like(value, torch.nan if bad else 1.0)
        optimizer.found_inf = torch.tensor(bad)
        optimizer.step()
        same = [torch.equal(a, b) for a, b in zip(values, before[0], strict=True)]
        assert same == [bool(bad)] * 2
    for index in range(2):
        state = optimizer.state_dict()["state"][index]
        assert torch.equal(state["sum"], before[1]["state"][index]["sum"])


@pytest.mark.parametrize("kind", ["adam", "adamw", "adagrad"])
def test_an_optimizer_is_the_one_that_is_named(kind):
    found = make_optimizer(kind, parameters(), 0.25, 0.5)
    assert type(found).__name__.lower() == kind
    assert (found.param_groups[0]["lr"], found.param_groups[0]["weight_decay"]) == (0.25, 0.5)


def moved(value, grads, kind, rowwise, decay, lr):
    """Return a row after a step for each of its gradients, by the equations of `RowOptimizer`."""
    mean, square = torch.zeros_like(value), torch.zeros_like(value)
    for k, grad in enumerate(grads, 1):
        if kind == "adamw":
            value = value - lr * decay * value
        else:
            grad = grad + decay * value
        power = grad**2
        if rowwise:
            power = (power.sum() / len(power)).expand_as(power)
        if kind == "adagrad":
            square = square + power
            value = value - lr * grad / (square.sqrt() + 1e-5)
            continue
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * power
        first = grad if rowwise else mean / (1 - 0.9**k)
        value = value - lr * first / ((square / (1 - 0.999**k)).sqrt() + 1e-8)
    return value


@pytest.mark.parametrize("kind", ["adam", "adamw", "adagrad"])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_rows_move_by_the_equations_each_in_the_steps_that_look_it_up(kind, rowwise, decay):
    table = EntityTable(Shards(5), 3).double()
    table.lazy = True
    before = table.weight.detach().clone()
    optimizer = RowOptimizer([table], kind, 0.1, decay, rowwise)
    grads = [[] for _ in before]
    for step, rows in enumerate([[0, 2, 2], [2], [3, 0], [0, 2]]):
        factors = torch.randn(len(rows), 3, dtype=torch.float64)
        (table(torch.tensor(rows)) * factors).sum().backward()
        scale = torch.tensor(0.5) if step == 1 else None  # as clipping does
        optimizer.step_by(scale)
        table.forget()
        for row in set(rows):
            total = sum(factors[i] for i, one in enumerate(rows) if one == row)
            grads[row].append(total if scale is None else total * scale)
    for row, value in enumerate(before):
        expected = moved(value, grads[row], kind, rowwise, decay, 0.1)
        torch.testing.assert_close(table.weight.detach()[row], expected)


def optimized(optimizer):
    held = [] if optimizer is None else [p for g in optimizer.param_groups for p in g["params"]]
    return {id(parameter) for parameter in held}


@pytest.mark.parametrize("table_optimizer", ["same", "adam", "adagrad"])
@pytest.mark.parametrize("regime", ["1vsall", "sampled"])
@pytest.mark.parametrize("complex_head", [False, True])
def test_each_parameter_has_one_optimizer_and_tables_their_own(
    regime, table_optimizer, complex_head
):
    kg = ring_kg(8)
    chosen = settings(
        regime=regime,
        table_optimizer=table_optimizer,
        complex_head=complex_head,
        lambda_information=0.0,
    )
    trainer = Trainer(model_of(kg, chosen), kg, chosen)
    model = trainer.model
    entities = {id(table.weight) for table in model.entity_tables}
    relations = {id(table.weight) for table in model.relation_tables}
    layers, tables, rows = (
        optimized(o) for o in (trainer.optimizer, trainer.table_optimizer, trainer.row_optimizer)
    )
    everything = {id(p) for p in model.parameters()}
    estimators = (
        set() if model.information is None else set(map(id, model.information.parameters()))
    )
    assert layers | tables | rows == everything - estimators
    assert len(layers) + len(tables) + len(rows) == len(layers | tables | rows)
    assert rows == (entities if regime == "sampled" else set())
    if table_optimizer == "same":
        assert trainer.table_optimizer is None
        rate = chosen.learning_rate
    else:
        assert tables == (relations | entities) - rows
        assert type(trainer.table_optimizer).__name__.lower() == table_optimizer
        rate = chosen.table_learning_rate
        assert trainer.table_optimizer.param_groups[0]["lr"] == rate
    if rows:
        assert trainer.row_optimizer.param_groups[0]["lr"] == rate
        expected = chosen.optimizer if table_optimizer == "same" else table_optimizer
        assert trainer.row_optimizer.kind == expected


@pytest.mark.parametrize("regime", ["1vsall", "sampled"])
@pytest.mark.parametrize("changes", [{}, {"table_optimizer": "same", "optimizer": "adagrad"}])
def test_adagrad_hides_no_gradients_of_tables_that_start_small(regime, changes):
    kg = ring_kg(8)
    chosen = settings(regime=regime, complex_head=True, learning_rate=0.1, **changes)
    trainer = Trainer(model_of(kg, chosen), kg, chosen)
    model = trainer.model
    for table in model.complex_tables:
        assert 0 < table.weight.abs().max() < 0.01
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for table in (*model.entity_tables, *model.relation_tables):
        if any(table is followed for followed in trainer.tables.values()):
            table.lazy = True
            table(torch.arange(len(table.weight))).mul(1e-7).sum().backward()
        else:
            table.weight.grad = torch.full_like(table.weight, 1e-7)
    for optimizer in (trainer.optimizer, trainer.table_optimizer, trainer.row_optimizer):
        if optimizer is not None:
            optimizer.step()
    small = {id(table.weight) for table in model.complex_tables}
    for name, value in model.named_parameters():
        if id(value) in small:
            moved = 0.1 / (1 + 1e-10 / 1e-7)
        elif id(value) in {id(table.weight) for table in model.entity_tables}:
            moved = 0.1 / (1 + (1e-5 if regime == "sampled" else 1e-6) / 1e-7)
        elif name.startswith("relation"):
            moved = 0.1 / (1 + 1e-6 / 1e-7)
        else:
            continue
        expected = before[name] - moved
        torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=1e-6)


def model_of(kg, chosen):
    torch.manual_seed(0)
    return ig.IMVIA.from_kg(kg, chosen)
