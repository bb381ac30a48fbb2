"""Kernels of products, losses and updates: on a GPU, or in Triton's interpreter."""

import weakref
from functools import partial

import pytest
import torch
from helpers import paper_settings as settings
from helpers import ring_kg
from test_fused_triton import (  # noqa: F401
    INTERPRETED,
    ON_GPU,
    device,
    in_the_interpreter,
    needs_triton,
)
from test_losses import POSITIVES, WEIGHTED, factored_case, plainly
from torch.utils._python_dispatch import TorchDispatchMode

import imvia_graph as ig
from imvia_graph import TrainingError, _factored, training
from imvia_graph._gpu import grouped
from imvia_graph._recorded import RecordedSteps, has_one_shape
from imvia_graph.checkpoint import load_trainer, save_trainer
from imvia_graph.losses import Positives, factored_completion
from imvia_graph.optimizers import Adagrad
from imvia_graph.training import Callback, Trainer


@needs_triton
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_claims_below_hold_in_the_interpreter():
    in_the_interpreter(__file__)


# -- products of groups ---------------------------------------------------------------------------

#: How many rows each group has.
COUNTS = [3, 0, 40, 1, 0, 16, 0]
#: What the interpreter, which is made of NumPy, has no arithmetic for.
HALF = [torch.float16] if not ON_GPU else [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("k", "n"), [(64, 64), (70, 40), (17, 130), (1, 3)])
def test_products_of_groups_match_the_loop(device, k, n, dtype):  # noqa: F811
    offsets = torch.tensor([0, *torch.tensor(COUNTS).cumsum(0).tolist()])
    rows = torch.randn(60, k).to(dtype).requires_grad_()
    matrix = torch.randn(len(COUNTS), k, n).to(dtype).requires_grad_()
    grad = torch.randn(60, n).to(dtype)
    given = rows.to(device), matrix.to(device), offsets.to(device)
    assert grouped.usable(*given[:2])
    out = grouped.product(*given)
    assert out.dtype == dtype
    found = out, *torch.autograd.grad(out, [rows, matrix], grad.to(device))
    exact = [part.detach().double().requires_grad_() for part in (rows, matrix)]
    parts = exact[0].split(COUNTS)
    right = torch.cat([part @ exact[1][u] for u, part in enumerate(parts)])
    expected = right, *torch.autograd.grad(right, exact, grad.double())
    for one, other in zip(found, expected, strict=True):
        assert (one.cpu().double() - other).norm() <= TOLERANCE[dtype] * other.norm()


TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def test_groups_without_rows_are_no_error(device):  # noqa: F811
    none, matrix = torch.zeros(0, 4, device=device), torch.ones(3, 4, 4, device=device)
    offsets = torch.zeros(4, dtype=torch.int64, device=device)
    assert grouped.product(none, matrix, offsets).shape == (0, 4)


# -- losses ---------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """The kernels, also where others would be taken: on the CPU of the interpreter."""
    monkeypatch.setattr(_factored._kernels, "load", lambda name: None)


def filled(positives, number):
    """The positives in ascending rows, the last one again and again."""
    order = torch.argsort(positives.row, stable=True)
    place = torch.arange(number).clamp(max=len(order) - 1)
    counts = (torch.arange(number) < len(order)).float()
    row, col = positives.row[order][place], positives.col[order][place]
    return Positives(row, col, positives.weight, counts)


def moved(positives, device):  # noqa: F811
    return Positives(*(None if part is None else part.to(device) for part in positives))


@pytest.mark.parametrize("number", [None, 9], ids=["as-they-are", "filled-up"])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("decided", ["trained", "detached", "not"])
@pytest.mark.parametrize("size", [5, 333])
@pytest.mark.parametrize(
    ("loss", "positives"),
    [("softmax", POSITIVES), ("softmax", WEIGHTED), ("binary", POSITIVES)],
    ids=["softmax", "weighted", "binary"],
)
def test_losses_match_those_of_the_scores(
    device, on_gpu, loss, positives, size, decided, heads, number  # noqa: F811
):  # fmt: skip
    queries, candidates, weights = factored_case(heads, torch.float32, size)
    weights = None if decided == "not" else weights
    inputs = [*queries, *candidates, *([] if weights is None else [weights])]
    there = [part.to(device) for part in inputs]
    given = positives if number is None else filled(positives, number)
    found = factored_completion(
        there[:heads],
        there[heads : 2 * heads],
        moved(given, device),
        None if weights is None else there[-1],
        loss,
        0.1,
        decided == "detached",
    )
    exact = [part.detach().double().requires_grad_() for part in inputs]
    last = None if weights is None else exact[-1]
    parts = exact[:heads], exact[heads : 2 * heads], last
    expected = plainly(*parts, loss, 0.1, decided == "detached", positives)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(3 * found, inputs)
    right = torch.autograd.grad(3 * expected, exact)
    for one, other in zip(gradients, right, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_losses_do_not_hide_what_is_not_finite(device, on_gpu, value):  # noqa: F811
    queries, candidates, weights = factored_case(2, torch.float32)
    with torch.no_grad():
        candidates[1][4, 0] = value
    there = [part.to(device) for part in (*queries, *candidates, weights)]
    found = factored_completion(there[:2], there[2:4], moved(POSITIVES, device), there[4])
    assert not found.isfinite()
    found.backward()
    assert not queries[1].grad.isfinite().all()


def test_losses_of_large_scores_are_finite(device, on_gpu):  # noqa: F811
    queries = torch.tensor([[1e4], [-1e4], [1.0]], requires_grad=True)
    candidates = torch.tensor([[1.0], [-1.0], [0.0], [0.5], [0.3]])
    for loss in ("softmax", "binary"):
        given = moved(POSITIVES, device)
        found = factored_completion(
            [queries.to(device)], [candidates.to(device)], given, None, loss, 0.1
        )
        expected = plainly([queries], [candidates], None, loss, 0.1)
        torch.testing.assert_close(found.cpu(), expected)
        assert torch.autograd.grad(found, queries)[0].isfinite().all()


# -- Adagrad ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adagrad_in_one_pass_is_torch_s(device, decay):  # noqa: F811
    mine, exact = (
        torch.nn.Parameter(torch.randn(3, 1500, generator=torch.Generator().manual_seed(0)).to(to))
        for to in (device, torch.float64)
    )
    optimizer = Adagrad([mine], lr=0.1, weight_decay=decay)
    other = torch.optim.Adagrad([exact], lr=0.1, weight_decay=decay)
    for step, bad in enumerate([0.0, 0.0, 1.0, 0.0]):
        optimizer.found_inf = torch.tensor(bad, device=device)
        grad = torch.sin(torch.arange(mine.numel()).double() * (step + 1)).view(mine.shape)
        mine.grad = torch.full_like(mine, torch.nan) if bad else grad.to(mine)
        optimizer.step()
        if not bad:
            exact.grad = grad
            other.step()
    torch.testing.assert_close(mine.cpu().double(), exact, rtol=1e-5, atol=1e-5)
    total = optimizer.state[mine]["sum"].cpu().double()
    torch.testing.assert_close(total, other.state[exact]["sum"], rtol=1e-5, atol=1e-6)


# -- steps in one shape ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"complex_head": True},
        {"regime": "kvsall", "loss": "binary", "label_smoothing": 0.1, "lambda_relation": 0.5},
        {
            "decision": "trained",
            "batch_norm": True,
            "lambda_alignment": 0.1,
            "table_optimizer": "same",
            "gradient_clip": 0.5,
            "relation_residual": False,
        },
    ],
    ids=["defaults", "kvsall-binary", "everything-else"],
)
def test_steps_in_one_shape_are_those_of_the_batches(
    device, on_gpu, monkeypatch, changes  # noqa: F811
):  # fmt: skip
    """Not recorded, but what is recorded: the same numbers, and nothing that asks the device."""
    trainers = [trainer_of(device, changes) for _ in range(2)]
    recorded = RecordedSteps(trainers[1], on_gpu=False)
    recorded.begin()
    steps = trainers[0].batches.epoch(), trainers[1].batches.rows_of_epoch()
    with NoWordToTheHost(monkeypatch) as heard:
        # What is recorded; the numbers of the step before may be read meanwhile.
        monkeypatch.setattr(recorded, "_work", heard.listens(recorded._work))
        for batch, rows in zip(*steps, strict=True):
            torch.manual_seed(1)
            plain = trainers[0].train_step(batch)
            torch.manual_seed(1)
            told = recorded.step(rows)
            assert list(told) == list(plain)
            for name, value in plain.items():
                torch.testing.assert_close(told[name], value, rtol=1e-4, atol=1e-5)
    assert trainers[0].sums.keys() == trainers[1].sums.keys()
    assert trainers[1].sums["steps"] == len(trainers[1].batches)
    for one, other in zip(*(t.model.state_dict().values() for t in trainers), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def trainer_of(device, changes):  # noqa: F811
    torch.manual_seed(0)
    chosen = settings(
        device=str(device), batch_size=20, precision="float32", backend="triton", **changes
    )
    kg = ring_kg()
    model = ig.IMVIA.from_kg(kg, chosen).to(device)
    trainer = Trainer(model.train(), kg, chosen)
    for group in trainer.estimator_optimizer.param_groups:
        group["fused"] = True  # as it is on a GPU
    assert has_one_shape(trainer)
    return trainer


@pytest.fixture
def fitted(device, on_gpu, monkeypatch):  # noqa: F811
    """A trainer whose steps are such steps, of a graph without views; and plain ones."""

    def make(in_one_shape, *callbacks, **changes):
        monkeypatch.setattr(training, "can_record", lambda trainer: in_one_shape)
        monkeypatch.setattr(training, "RecordedSteps", partial(RecordedSteps, on_gpu=False))
        chosen = settings(
            device=str(device), batch_size=20, precision="float32", epochs=2, **changes
        )
        kg = ring_kg(views=False)
        torch.manual_seed(0)
        model = ig.IMVIA.from_kg(kg, chosen).to(device)
        return Trainer(model, kg, chosen, callbacks)

    return make


class Records(Callback):
    """Keeps what is told of epochs; stops after a step or in a validation."""

    def __init__(self, after=None, in_validation=False):
        self.after, self.in_validation, self.records = after, in_validation, []

    def on_step(self, trainer, losses):
        if trainer.progress.step == self.after:
            trainer.stop()

    def on_epoch(self, trainer, record):
        self.records.append(record)


@pytest.mark.parametrize("how", ["again", "from-a-checkpoint"])
@pytest.mark.parametrize("stop", [1, "validation"])
def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    fitted, tmp_path, monkeypatch, stop, how
):
    unbroken = Records()
    expected = fitted(True, unbroken)
    expected.fit()
    records = Records(after=stop if stop == 1 else None)
    trainer = fitted(True, records)
    with monkeypatch.context() as patch:
        if stop == "validation":
            validate = Trainer.validate
            patch.setattr(Trainer, "validate", lambda self: self.stop() or validate(self))
        trainer.fit()
    assert not trainer.progress.ended
    assert not records.records
    if how == "from-a-checkpoint":
        save_trainer(tmp_path / "last.safetensors", trainer)
        trainer = fitted(True, records)
        load_trainer(tmp_path / "last.safetensors", trainer)
    else:
        trainer._stopping = False
    records.after = None
    trainer.fit()
    assert [r["loss"] for r in records.records] == pytest.approx(
        [r["loss"] for r in unbroken.records], rel=1e-6
    )
    for one, other in zip(
        trainer.model.state_dict().values(), expected.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("non_finite", ["stop", "skip"])
def test_a_bad_step_changes_nothing_and_is_told_of(fitted, non_finite):
    class Spoil(Records):
        def on_step(self, trainer, losses):
            table = trainer.model.entity.weight
            if trainer.progress.step == 1:
                self.kept = table[0].clone()
                table.data[0] = torch.nan
            else:
                table.data[0] = self.kept

    trainer = fitted(True, Spoil(), non_finite=non_finite)
    if non_finite == "skip":
        trainer.fit()
        assert trainer.progress.skipped == 1
        assert all(p.isfinite().all() for p in trainer.model.parameters())
    else:
        with pytest.raises(TrainingError, match=r"Epoch 1, batch 2 of 2 \(.*the first of 'e\d+'"):
            trainer.fit()
        assert trainer.progress.step == 1


def test_memory_that_runs_out_halves_the_step_and_lets_go_of_the_first_try(fitted, monkeypatch):
    trainers = [fitted(True), fitted(True)]
    plain = trainers[1].gradients_of
    tried = []

    def short(batch, before=None):
        if not tried:
            kept = torch.zeros(3)
            tried.append(weakref.ref(kept))
            raise MemoryError
        assert tried[0]() is None
        return plain(batch, before)

    monkeypatch.setattr(trainers[1], "gradients_of", short)
    for trainer in trainers:
        trainer.train_epoch()
    assert trainers[1].parts.count == 2
    states = (trainer.model.state_dict().values() for trainer in trainers)
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


class NoWordToTheHost(TorchDispatchMode):
    """Raises where the host would have to wait for a GPU, or a shape depends on what it knows."""

    ASKS = (
        "_local_scalar_dense",
        "nonzero",
        "_unique",
        "unique",
        "masked_select",
        "bincount",
        "equal",
    )
    #: What is no operation on the CPU, and nothing that the interpreter itself does.
    WORDS = ("tolist",)

    def __init__(self, monkeypatch):
        super().__init__()
        self.listening = False
        for name in self.WORDS:
            monkeypatch.setattr(torch.Tensor, name, self.asked(getattr(torch.Tensor, name)))

    def listens(self, function):
        def call(*args):
            self.listening = True
            try:
                return function(*args)
            finally:
                self.listening = False

        return call

    def asked(self, method):
        def ask(tensor, *args, **kwargs):
            assert not self.listening, method
            return method(tensor, *args, **kwargs)

        return ask

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.listening:
            assert not name.startswith(self.ASKS), name
            assert not (name == "repeat_interleave" and func.overloadname == "Tensor")
            if name in ("index", "index_put_", "index_put"):
                assert all(one is None or one.dtype != torch.bool for one in args[1]), name
        return func(*args, **(kwargs or {}))
