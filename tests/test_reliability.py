"""Runs that are stopped, share a folder, meet a full disk, run out of memory or of numbers."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import TINY, contents, differing_tensors, ring_kg, same_weights, settings
from safetensors.torch import load_file

import imvia_graph as ig
from imvia_graph import _factored, _tiles, evaluation, optimizers
from imvia_graph._guards import Health, Parts, is_out_of_memory
from imvia_graph.checkpoint import locked, start_run
from imvia_graph.model import DECISION, IMVIA
from imvia_graph.training import Callback, Trainer

STEPS = 3  # of an epoch: 36 queries by 16
FILES = ("best.safetensors", "last.safetensors")


def fit(out=None, kg=None, **options):
    return ig.fit(kg or ring_kg(), out=out, **{**TINY, **options})


def metrics_of(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def assert_same_run(one, other):
    for name in FILES:
        assert differing_tensors(one / name, other / name) == [], name
    assert metrics_of(one) == metrics_of(other)


# -- stopped by a signal --------------------------------------------------------------------------


class Signal(Callback):
    """Sends this process a signal in the middle of a step, an epoch's end or a validation."""

    def __init__(self, number, *, step=None, epoch=None):
        self.number, self.step, self.epoch, self.after = number, step, epoch, 0

    def on_step(self, trainer, losses):
        if trainer.progress.step == self.step:
            os.kill(os.getpid(), self.number)
        elif self.step is not None and trainer.progress.step > self.step:
            self.after += 1

    def on_epoch(self, trainer, record):
        if record["epoch"] == self.epoch:
            os.kill(os.getpid(), self.number)


@pytest.fixture(autouse=True)
def _interruptible():
    """SIGINT as it is in the foreground; where tests run in the background it may be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def terminable():
    """SIGTERM as an exception, as the command line has it."""

    def terminate(number, frame):
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, terminate)
    yield
    assert signal.getsignal(signal.SIGTERM) is terminate  # as it was
    signal.signal(signal.SIGTERM, before)


ENDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}
WAYS = {
    "plain": {},
    "sampled": {"regime": "sampled", "loss": "binary"},
    "by relation": {"regime": "kvsall", "candidates": "relation"},
    "average and schedule": {"ema_decay": 0.9, "schedule": "cosine"},
    "rare checkpoints": {"checkpoint_every": 3},
    "float16": {"precision": "float16"},
}


@pytest.mark.parametrize("number", ENDS, ids=["ctrl-c", "sigterm"])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_signal_lets_the_step_end_keeps_its_place_and_the_rest_is_the_same_to_the_bit(
    number, options, tmp_path, terminable
):
    options = {"epochs": 4, "patience": None, **options}
    whole = fit(tmp_path / "whole", **options)
    stop = Signal(number, step=STEPS + 2)
    with pytest.raises(ENDS[number]):
        fit(tmp_path / "stopped", callbacks=[stop], **options)
    assert stop.after == 0
    kept = load_file(tmp_path / "stopped" / "last.safetensors")
    assert {"random/order", "sums/loss"} <= kept.keys()  # a place within the epoch
    torch.rand(17)
    # Only what was left of the epoch is done.
    steps = []
    counted = type("Count", (Callback,), {"on_step": lambda self, trainer, _: steps.append(1)})
    resumed = ig.fit(out=tmp_path / "stopped", resume=True, callbacks=[counted()])
    assert len(steps) == whole.progress.step - (STEPS + 2)
    assert_same_run(whole.folder, resumed.folder)
    assert resumed.evaluate() == whole.evaluate()


def test_a_run_stopped_in_every_step_is_the_run_that_never_stopped(tmp_path):
    whole = fit(tmp_path / "whole", epochs=2)
    out = tmp_path / "stopped"
    for step in range(1, whole.progress.step + 1):
        given = {"resume": True} if out.exists() else {"kg": ring_kg(), **TINY, "epochs": 2}
        with pytest.raises(KeyboardInterrupt):
            ig.fit(out=out, callbacks=[Signal(signal.SIGINT, step=step)], **given)
    ig.fit(out=out, resume=True)
    assert_same_run(whole.folder, out)


def test_a_stop_while_validating_does_not_train_the_epoch_again(tmp_path, monkeypatch):
    whole = fit(tmp_path / "whole", epochs=3)
    calls = []

    def counts(*arguments, _count=_tiles.RankCounter.count):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return _count(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_tiles.RankCounter, "count", counts)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "stopped", epochs=3)
    assert len(metrics_of(tmp_path / "stopped")) == 1
    steps = []
    counted = type("Count", (Callback,), {"on_step": lambda self, trainer, _: steps.append(1)})
    resumed = ig.fit(out=tmp_path / "stopped", resume=True, callbacks=[counted()])
    assert len(steps) == STEPS
    assert_same_run(whole.folder, resumed.folder)


def test_a_second_signal_does_not_wait_for_the_step(tmp_path):
    class Twice(Callback):
        def on_step(self, trainer, losses):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("went on")

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", callbacks=[Twice()])


def test_without_a_folder_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt):
        fit(callbacks=[Signal(signal.SIGINT, step=1)])


def test_another_thread_trains_and_leaves_signals_alone(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(fit(tmp_path / "run", epochs=1)))
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert found[0].progress.epoch == 1
    assert signal.getsignal(signal.SIGINT) is before


def command(*arguments, cwd, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "imvia_graph", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def set_options(**changes):
    values = {**TINY, **changes}
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_what_resumes_and_exits_as_a_shell_has_it(number, code, tmp_path):
    graph = ring_kg().save(tmp_path / "ring")
    out = "my run"  # a name that a shell would take for two
    arguments = ["fit", graph, "--out", out, *set_options(epochs=100000, patience="null")]
    process = command(*arguments, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        metrics = tmp_path / out / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert (
        errors.splitlines()[-1] == "Stopped. Resume with: imvia-graph fit --resume --out 'my run'"
    )
    trained = len(metrics_of(tmp_path / out))
    again = ig.fit(out=tmp_path / out, resume=True, epochs=trained + 1)
    assert again.progress.epoch == trained + 1


# -- one process a run folder ---------------------------------------------------------------------


def test_a_second_process_on_a_run_folder_is_refused_and_changes_nothing(tmp_path):
    out = tmp_path / "run"
    fit(out, epochs=1)
    before = contents(out)
    with locked(out), pytest.raises(ig.CheckpointError, match="another process is training there"):
        ig.fit(out=out, resume=True, epochs=2)
    assert contents(out) == before
    assert ig.fit(out=out, resume=True, epochs=2).progress.epoch == 2


def test_a_second_process_that_starts_a_run_in_the_same_folder_is_refused(tmp_path):
    with locked(tmp_path / "run"), pytest.raises(ig.CheckpointError, match="another process"):
        fit(tmp_path / "run")


def test_a_run_that_trains_can_be_loaded_and_ranked(tmp_path):
    found = []

    class Load(Callback):
        def on_epoch(self, trainer, record):
            found.append(ig.load(tmp_path / "run").evaluate()["both"]["mrr"])

    fit(tmp_path / "run", epochs=3, callbacks=[Load()])
    assert len(found) == 3


@pytest.mark.parametrize("done", ["nothing", "kg"])
def test_what_a_process_left_that_was_killed_making_the_folder_is_no_obstacle(done, tmp_path):
    out = tmp_path / "run"
    kg = ring_kg()
    with locked(out):
        if done == "kg":
            start_run(out, kg, settings())
            (out / "run.json").unlink()
            (out / "settings.yaml").unlink()
            (out / "kg" / "kg.json").unlink()
            (out / "kg" / "known.tsv").write_text("left\tover\tfact\n")
    assert fit(out, epochs=1).progress.epoch == 1
    assert not (out / "kg" / "known.tsv").exists()


def test_what_writers_left_that_were_killed_is_removed(tmp_path):
    out = fit(tmp_path / "run", epochs=1).folder
    for name in (".last.safetensors.abc", ".metrics.jsonl.xyz", ".best.safetensors.1"):
        (out / name).write_bytes(b"half")
    ig.fit(out=out, resume=True, epochs=2)
    assert [path.name for path in out.glob(".*")] == [".lock"]


class AtEpoch(Callback):
    """Does something once, at the end of an epoch."""

    def __init__(self, epoch, do):
        self.epoch, self.do = epoch, do

    def on_epoch(self, trainer, record):
        if record["epoch"] == self.epoch:
            self.do()


@pytest.mark.parametrize("disk_full", ["stop", "continue"])
def test_a_folder_that_is_moved_while_training_stops_it_and_is_gone_on_with(disk_full, tmp_path):
    out, moved = tmp_path / "run", tmp_path / "moved"
    move = AtEpoch(2, lambda: out.rename(moved))
    with pytest.raises(ig.StorageError, match=r"run folder .*run is gone: it was moved"):
        fit(out, epochs=4, callbacks=[move], disk_full=disk_full)
    assert not out.exists()
    assert ig.fit(out=moved, resume=True).progress.epoch == 4
    assert len(metrics_of(moved)) == 4


def test_a_folder_in_whose_place_another_run_is_made_is_left_alone(tmp_path):
    out = tmp_path / "run"
    there = {}

    def replace():
        out.rename(tmp_path / "moved")
        fit(out, epochs=1)
        os.utime(out / "run.json", (0, 0))  # some time lies between two runs
        there.update(contents(out))

    with pytest.raises(ig.StorageError, match="replaced during training"):
        fit(out, epochs=4, callbacks=[AtEpoch(1, replace)])
    assert contents(out) == there


# -- a full disk ----------------------------------------------------------------------------------


class FullDisk(Callback):
    """Limits the size of files from one epoch on, to another."""

    def __init__(self, first, last=10**9, size=2000):
        self.first, self.last, self.size = first, last, size
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step(self, trainer, losses):
        full = self.first <= trainer.progress.epoch + 1 <= self.last
        limit = (self.size, self.before[1]) if full else self.before
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    def lift(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_full_disk_stops_training_with_the_last_good_checkpoint_intact(tmp_path):
    whole = fit(tmp_path / "whole", epochs=5)
    out, full = tmp_path / "run", FullDisk(first=3)
    try:
        with pytest.raises(ig.StorageError, match=r"safetensors cannot be written: the disk is f"):
            fit(out, epochs=5, callbacks=[full])
    finally:
        full.lift()
    assert metrics_of(out)[:2] == metrics_of(whole.folder)[:2]
    assert not list(out.glob(".*safetensors*"))  # no half-written file takes the last room
    assert ig.load(out).progress.best_epoch <= 2
    resumed = ig.fit(out=out, resume=True)
    assert_same_run(whole.folder, resumed.folder)


def test_a_full_disk_does_not_stop_training_that_is_to_go_on(tmp_path, caplog):
    whole = fit(tmp_path / "whole", epochs=6)
    full = FullDisk(first=3, last=4)
    try:
        with caplog.at_level("WARNING"):
            run = fit(tmp_path / "run", epochs=6, callbacks=[full], disk_full="continue")
    finally:
        full.lift()
    assert "Training continues" in caplog.text
    assert_same_run(whole.folder, run.folder)
    assert same_weights(ig.load(run.folder).model, run.model)


def test_a_best_model_that_could_not_be_written_is_in_the_checkpoint(tmp_path, monkeypatch):
    """The model and the best one are then the same tensors, and there was room for one file."""
    save_model = ig.checkpoint.save_model

    def full(path, state, progress, *args):
        if progress.epoch < 3:
            raise ig.StorageError(f"{path} cannot be written: the disk is full.")
        save_model(path, state, progress, *args)

    monkeypatch.setattr(ig.checkpoint, "save_model", full)
    run = fit(tmp_path / "run", epochs=2, disk_full="continue")
    assert not (run.folder / "best.safetensors").exists()
    assert same_weights(ig.load(run.folder).model, run.model)
    resumed = ig.fit(out=run.folder, resume=True, epochs=3)
    assert same_weights(ig.load(run.folder).model, resumed.model)


def test_a_full_disk_while_the_folder_is_made_is_an_error_and_the_folder_may_be_had(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(ig.StorageError, match="cannot be written"):
            fit(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert fit(tmp_path / "run", epochs=1).progress.epoch == 1


# -- numbers that are none ------------------------------------------------------------------------


class Spoil(Callback):
    """Makes the loss term of some steps, or a gradient of them, be no number."""

    def __init__(self, monkeypatch, steps, *, term=None, parameter=None, value=torch.nan):
        self.steps, self.seen, self.states = steps, 0, []
        losses = Trainer.losses

        def spoiled(trainer, batch):
            found, estimation = losses(trainer, batch)
            self.states.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
            if trainer.progress.step in self.steps:
                self.seen += 1
                if term is not None:
                    found = {**found, term: found[term] * value, "loss": found["loss"] * value}
                else:
                    weight = dict(trainer.model.named_parameters())[parameter]
                    found = {**found, "loss": found["loss"] + _Bad.apply(weight, value)}
            return found, estimation

        monkeypatch.setattr(Trainer, "losses", spoiled)


class _Bad(torch.autograd.Function):
    """0, whose gradient has one element that is not finite."""

    @staticmethod
    def forward(ctx, weight, value):
        ctx.shape, ctx.value = weight.shape, value
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, grad_out):
        grad = torch.zeros(ctx.shape)
        grad.view(-1)[-1] = ctx.value
        return grad, None


def test_a_loss_that_is_no_number_is_named_in_its_step_and_nothing_is_learned_from_it(
    monkeypatch, tmp_path
):
    spoil = Spoil(monkeypatch, {STEPS + 1}, term="alignment")
    message = (
        rf"^Epoch 2, batch 2 of {STEPS} \(12 queries, the first of 'e\d+' under '(after|opposite)'"
        r"(, inverse)?\): loss is nan, alignment is nan, .*from before this step.*non_finite=skip"
    )
    with pytest.raises(ig.TrainingError, match=message):
        fit(tmp_path / "run", epochs=4, callbacks=[spoil], batch_norm=True)
    kept = load_file(tmp_path / "run" / "last.safetensors")
    assert all(value.isfinite().all() for value in kept.values() if value.is_floating_point())
    # Weights are those that the step was made with, running statistics those from before it.
    state = spoil.states[STEPS + 1]
    assert torch.equal(kept["model/entity.weight"], state["entity.weight"])
    name = "decoder.0.input_norm.running_mean"
    assert not torch.equal(kept[f"model/{name}"], state[name])
    assert torch.equal(kept[f"model/{name}"], spoil.states[STEPS][name])
    # Resumed where the reason is gone, it is the run that never met it.
    monkeypatch.undo()
    whole = fit(tmp_path / "whole", epochs=4, batch_norm=True)
    ig.fit(out=tmp_path / "run", resume=True)
    assert_same_run(whole.folder, tmp_path / "run")


@pytest.mark.parametrize("place", [0, STEPS - 1])
def test_a_step_that_went_wrong_at_an_end_of_an_epoch_is_made_again(place, monkeypatch, tmp_path):
    Spoil(monkeypatch, {STEPS + place}, term="completion")
    with pytest.raises(ig.TrainingError, match=f"batch {place + 1} of"):
        fit(tmp_path / "run", epochs=3)
    monkeypatch.undo()
    whole = fit(tmp_path / "whole", epochs=3)
    ig.fit(out=tmp_path / "run", resume=True)
    assert_same_run(whole.folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("gradient", "good"),
    [
        ([1.0, -2.0, 0.0], True),
        ([3e38, 3e38, -3e38], True),  # whose sum on the way is infinite
        ([3e38, 3e38, 3e38], True),
        ([torch.inf, -torch.inf, 0.0], False),
        ([torch.nan, 0.0, 0.0], False),
        ([-torch.inf, 3e38, 3e38], False),
    ],
)
def test_a_gradient_is_bad_where_an_element_is_not_where_its_sum_is(gradient, good):
    gradients = {"fine": torch.ones(2), "looked_at": torch.tensor(gradient)}
    health, bad = Health.of({"L3": torch.tensor(1.0)}, gradients)
    assert bad.item() == (not good)
    assert health.problems() == ([], [] if good else ["looked_at"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_no_number_names_its_parameter(value, monkeypatch):
    Spoil(monkeypatch, {1}, parameter="residual.1.weight", value=value)
    message = r"batch 2 of 3 .*\): the gradient of residual\.1\.weight is not finite\."
    with pytest.raises(ig.TrainingError, match=message):
        fit()


@pytest.mark.parametrize("what", [{"term": "completion"}, {"parameter": "entity.weight"}])
def test_bad_steps_are_skipped_and_counted_where_that_is_asked_for(what, monkeypatch, caplog):
    spoil = Spoil(monkeypatch, {1, STEPS + 1, STEPS + 2}, **what)
    records = []
    keep = type("Keep", (Callback,), {"on_epoch": lambda self, _, record: records.append(record)})
    with caplog.at_level("WARNING"):
        run = fit(epochs=3, non_finite="skip", callbacks=[keep()])
    assert spoil.seen == 3
    assert [record.get("skipped") for record in records] == [1, 2, None]
    assert run.progress.skipped == 3
    assert caplog.text.count("is skipped") == 1
    assert all(value.isfinite().all() for value in run.model.state_dict().values())
    assert all(torch.tensor(record["loss"]).isfinite() for record in records)


def test_steps_that_were_skipped_before_a_stop_are_counted_in_their_epoch(tmp_path, monkeypatch):
    class Stop(Callback):
        def on_step(self, trainer, losses):
            if trainer.progress.step == 2:
                trainer.stop()

    for name, callbacks in ("whole", []), ("run", [Stop()]):
        Spoil(monkeypatch, {1}, term="completion")
        fit(tmp_path / name, epochs=1, non_finite="skip", callbacks=callbacks)
        monkeypatch.undo()
    ig.fit(out=tmp_path / "run", resume=True)
    assert [record["skipped"] for record in metrics_of(tmp_path / "run")] == [1]
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_skipped_step_changes_neither_weights_nor_running_statistics(monkeypatch):
    states = []

    class States(Callback):
        def on_step(self, trainer, losses):
            state = trainer.model.state_dict()
            states.append({name: value.clone() for name, value in state.items()})

    Spoil(monkeypatch, {1}, term="completion")
    fit(epochs=1, non_finite="skip", batch_norm=True, callbacks=[States()])
    assert any("running" in name for name in states[0])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not any(
        torch.equal(value, states[2][name]) for name, value in states[0].items() if "norm" in name
    )


def test_an_epoch_of_bad_steps_alone_is_an_error(monkeypatch):
    Spoil(monkeypatch, set(range(STEPS)), term="completion")
    with pytest.raises(ig.TrainingError, match="Epoch 1: no step had a finite loss and gradient"):
        fit(non_finite="skip")


def test_a_fused_optimizer_leaves_a_step_out_that_it_is_told_is_bad():
    """What training on a GPU relies on, so that the host need not wait."""
    for kind in ("adam", "adamw", "adagrad"):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = optimizers.make_optimizer(kind, [weight], 0.1, 0.0)
        for bad in (0.0, 1.0):
            before = weight.detach().clone()
            weight.grad = torch.full((3,), torch.nan if bad else 1.0)
            optimizer.found_inf = torch.tensor(bad)
            optimizer.step()
            assert torch.equal(weight, before) == bool(bad), kind


@pytest.mark.parametrize("columns", ["huge", "tiny", "constant", "zero", "mixed"])
def test_features_of_any_size_train(columns):
    kg = ring_kg()
    views = {}
    for modality in kg.modalities:
        feat, ptr = kg.views(modality)
        feat = feat.double()
        if columns in ("huge", "mixed"):
            feat[:, 0] *= 1e30
            feat[:, 1] *= 1e300
        if columns in ("tiny", "mixed"):
            feat[:, -1] *= 1e-30
        if columns == "tiny":
            feat *= 1e-300
        if columns == "constant":
            feat[:, :] = 7.0
        if columns == "zero":
            feat[:, :] = 0.0
        owner = torch.repeat_interleave(torch.arange(kg.num_entities), ptr.diff())
        views[modality] = ig.Views(feat, owner)
    losses = []
    keep = type("Keep", (Callback,), {"on_epoch": lambda self, _, r: losses.append(r["loss"])})
    run = fit(kg=kg.replace(views=views), epochs=6, callbacks=[keep()], patience=None)
    assert min(losses[-2:]) < losses[0]
    assert run.evaluate()["both"]["mrr"] > 0
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


# -- memory that runs out -------------------------------------------------------------------------


def shortage():
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory:"
        " you tried to allocate 1000000000000 bytes. Error code 12 (Cannot allocate memory)"
    )


ERRORS = [shortage(), MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory. Tried")]


@pytest.mark.parametrize("error", ERRORS, ids=["cpu", "python", "cuda"])
def test_a_lack_of_memory_is_told_from_other_errors(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_rows_are_halved_until_one_is_too_many(caplog):
    parts = Parts("counting")
    rows = [parts.rows(9)]
    with caplog.at_level(logging.WARNING):
        while rows[-1] > 1:
            parts.halve(MemoryError("no more"), 9)
            rows.append(parts.rows(9))
    assert rows == [9, 5, 3, 2, 1]
    assert len(caplog.records) == 1
    with pytest.raises(ig.OutOfMemoryError, match="while counting, one row at a time"):
        parts.halve(MemoryError("no more"), 9)
    with pytest.raises(KeyError):
        parts.halve(KeyError("other"), 9)


class Little:
    """Memory for the scores of so many queries at a time."""

    def __init__(self, monkeypatch, rows, error=None):
        self.failed = 0
        do = _factored._Work.do
        scores = IMVIA.scores

        def fits(count):
            if count > rows:
                self.failed += 1
                raise error or shortage()

        def limited_do(work, start, stop, *positives):
            fits(stop - start)
            return do(work, start, stop, *positives)

        def limited_scores(model, queries, candidates, relation):
            if model.training:
                fits(len(relation))
            return scores(model, queries, candidates, relation)

        monkeypatch.setattr(_factored._Work, "do", limited_do)
        monkeypatch.setattr(IMVIA, "scores", limited_scores)


@pytest.mark.parametrize("regime", ["1vsall", "kvsall", "sampled"])
@pytest.mark.parametrize("error", ERRORS, ids=["cpu", "python", "cuda"])
def test_training_without_enough_memory_is_the_same_in_smaller_parts(
    regime, error, monkeypatch, caplog
):
    # Dropout is drawn again as it was, and running statistics are moved once.
    losses = []
    keep = type("Keep", (Callback,), {"on_epoch": lambda self, _, r: losses.append(r["loss"])})
    options = {"regime": regime, "epochs": 2, "patience": None, "callbacks": [keep()]}
    options.update(batch_norm=True, input_dropout=0.2, hidden_dropout=0.2)
    whole = fit(**options)
    little = Little(monkeypatch, 5, error)
    with caplog.at_level("WARNING"):
        run = fit(**options)
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-5)
    assert little.failed == 2  # 12 queries, 6, then 3; and 3 from then on
    assert caplog.text.count("Out of memory while training") == 1
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-3, atol=1e-3)


def test_training_where_not_one_row_fits_says_so(monkeypatch):
    Little(monkeypatch, 0)
    with pytest.raises(ig.OutOfMemoryError, match=r"one row at a time .*smaller dim") as caught:
        fit()
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("candidates", ["shared", "relation"])
def test_ranking_without_enough_memory_gives_the_same_ranks(candidates, monkeypatch, caplog):
    run = fit(epochs=1, candidates=candidates)
    model, kg = run.model, run.kg
    whole = evaluation.rank(model, kg.train, kg.answers(), 16)
    done, sizes = [], []

    def little(self, entity, *rest, _batch=_tiles.RankCounter.batch):
        sizes.append(len(entity))
        if len(entity) > 3:
            raise shortage()
        return _batch(self, entity, *rest)

    monkeypatch.setattr(_tiles.RankCounter, "batch", little)
    with caplog.at_level("WARNING"):
        found = evaluation.rank(
            model, kg.train, kg.answers(), 16, on_batch=lambda n, of: done.append((n, of))
        )
    for side in ("head", "tail"):
        for name in (*model.heads, DECISION):
            assert torch.equal(getattr(found, side)[name], getattr(whole, side)[name])
    assert caplog.text.count("Out of memory while ranking") == 1
    assert done[-1] == (2 * len(kg.train), 2 * len(kg.train))
    assert [size for size in sizes if size > 3][:3] != sizes  # some did not fit, most did


def test_ranking_where_not_one_query_fits_says_so(monkeypatch):
    run = fit(epochs=1)

    def never(*arguments):
        raise MemoryError

    monkeypatch.setattr(_tiles.RankCounter, "batch", never)
    with pytest.raises(ig.OutOfMemoryError, match="while ranking"):
        run.evaluate()


def test_the_process_that_compiles_the_loops_finds_what_those_after_it_find(tmp_path):
    script = (
        "import torch, imvia_graph as ig\n"
        "from imvia_graph.losses import Positives, factored_completion\n"
        "torch.set_num_threads(1); torch.manual_seed(0)\n"
        "parts = [torch.randn(n, 64, requires_grad=True) for n in (50, 50, 333, 333)]\n"
        "weights = torch.rand(50, 2)\n"
        "positives = Positives(torch.arange(50), torch.arange(50) * 3)\n"
        "loss = factored_completion(parts[:2], parts[2:], positives, weights, 'softmax', 0.1)\n"
        "grads = torch.autograd.grad(loss, parts)\n"
        "print([g.view(torch.int32).long().sum().item() for g in grads], loss.item())\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    found = [
        subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert any(tmp_path.rglob("*.nbc"))  # the second one has not compiled them
    assert found[0] == found[1]
