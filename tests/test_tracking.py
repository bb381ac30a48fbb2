"""TensorBoard gets what metrics.jsonl gets, also from a run that is resumed."""

import io
import json
import sys

import pytest
from click.testing import CliRunner
from helpers import TINY, ring_kg, settings
from rich.console import Console

import imvia_graph as ig
from imvia_graph.cli import command_line

pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")


def written(folder):
    """Name -> [(epoch, value)] of what TensorBoard reads in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def expected(run):
    """The same from metrics.jsonl."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        epoch = record.pop("epoch")
        for metric, value in record.pop("valid").items():
            found.setdefault(f"valid/{metric}", []).append((epoch, pytest.approx(value)))
        for name, value in record.items():
            found.setdefault(name, []).append((epoch, pytest.approx(value)))
    return found


def test_it_gets_every_number_of_every_epoch_also_of_a_resumed_run(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "board"
    ig.fit(ring_kg(), out=run, settings=settings(epochs=2), callbacks=[ig.TensorBoard(folder)])
    assert written(folder) == expected(run)
    ig.fit(None, out=run, resume=True, epochs=3, callbacks=[ig.TensorBoard(folder)])
    assert written(folder) == expected(run)
    assert [epoch for epoch, _ in written(folder)["loss"]] == [1, 2, 3]


class Ends(ig.Callback):
    """Ends training at some point, in some way."""

    def __init__(self, where, how):
        self.where, self.how = where, how

    def on_start(self, trainer):
        self.meet("start", trainer)

    def on_step(self, trainer, losses):
        self.meet("step", trainer)

    def meet(self, where, trainer):
        if where == self.where:
            if self.how == "error":
                raise ValueError("here")
            trainer.stop()


@pytest.mark.parametrize("where", ["start", "step"])
@pytest.mark.parametrize("how", ["error", "stop"])
@pytest.mark.parametrize("first", [True, False])
def test_its_file_is_closed_however_training_ends(where, how, first, tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    made, closed = [], []

    class Writer(SummaryWriter):
        def __init__(self, *args, **options):
            made.append(self)
            super().__init__(*args, **options)

        def close(self):
            closed.append(self)
            super().close()

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Writer)
    callbacks = [ig.TensorBoard(tmp_path), Ends(where, how)]
    chosen = settings(epochs=2)
    if how == "stop":
        ig.fit(ring_kg(), settings=chosen, callbacks=callbacks if first else callbacks[::-1])
    else:
        with pytest.raises(ValueError, match="here"):
            ig.fit(ring_kg(), settings=chosen, callbacks=callbacks if first else callbacks[::-1])
    assert len(made) == (0 if (where, how, first) == ("start", "error", False) else 1)
    assert closed == made


def test_the_command_writes_it_into_the_run_folder(tmp_path):
    graph = ring_kg().save(tmp_path / "ring")
    arguments = ["fit", str(graph), "--out", str(tmp_path / "run"), "--tensorboard"]
    for key, value in TINY.items():
        arguments += ["--set", f"{key}={value}"]
    result = CliRunner().invoke(command_line, arguments)
    assert result.exit_code == 0, result.output
    assert written(tmp_path / "run" / "tensorboard") == expected(tmp_path / "run")


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ig.IMVIAError, match=r"pip install 'imvia-graph\[tensorboard\]'"):
        ig.TensorBoard(tmp_path)


# -- the progress bar -----------------------------------------------------------------------------


def test_one_epoch_is_singular():
    shown = io.StringIO()
    bar = ig.ProgressBar(Console(file=shown, width=100))
    ig.fit(ring_kg(), settings=settings(epochs=1), callbacks=[bar])
    assert "Trained 1 epoch in" in shown.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_tells_epochs_on_the_console_that_it_is_given(terminal, capsys):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=100, highlight=False)
    ig.fit(ring_kg(), settings=settings(), callbacks=[ig.ProgressBar(console)])
    assert "epoch 3/3  loss" in shown.getvalue()
    assert "Trained 3 epochs" in shown.getvalue()
    assert capsys.readouterr().err == ""


class Fails(ig.Callback):
    def on_epoch(self, trainer, record):
        raise KeyError("mine")


def test_the_bar_says_when_validation_ranks_against_a_sample():
    shown = io.StringIO()
    bar = ig.ProgressBar(Console(file=shown, width=100))
    ig.fit(ring_kg(), settings=settings(epochs=1, ranking_candidates=5), callbacks=bar)
    assert "valid MRR against 5 drawn " in shown.getvalue()


def test_the_bar_is_taken_away_whatever_ends_training():
    bar = ig.ProgressBar(Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(KeyError, match="mine"):
        ig.fit(ring_kg(), settings=settings(), callbacks=[bar, Fails()])
    assert not bar.progress.live.is_started
