"""Several processes, over gloo, against one: losses, ranks, memory, checkpoints, faults."""

import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import distributed_worker
import pytest
import torch
from click.testing import CliRunner
from distributed_worker import CASES, UNEVEN
from helpers import ROOT, paper_settings, ring_kg
from torch.distributed.elastic.multiprocessing import api

import imvia_graph as ig
from imvia_graph import checkpoint, distributed
from imvia_graph.distributed import Shards

#: What is compared with one process: by two, and by three, which share entities unevenly.
COMPARED = [(2, name) for name in CASES] + [(3, name) for name in UNEVEN]
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32",
    reason="torch is built without torch.distributed, or without gloo",
)


def environment():
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "tests"),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def torchrun(processes, *arguments, restarts=0):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        f"--max-restarts={restarts}",
        *map(str, arguments),
    ]


def run(command, **options):
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=400, **options
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process, each of two and each of three found."""
    folder = tmp_path_factory.mktemp("distributed")
    run([sys.executable, ROOT / "tests" / "distributed_worker.py", folder])
    return {
        (processes, rank): json.loads((folder / f"{processes}-{rank}.json").read_text())
        for processes in (1, 2, 3)
        for rank in range(processes)
    }


@pytest.mark.parametrize(("processes", "name"), COMPARED)
def test_the_losses_of_several_processes_are_those_of_one(found, processes, name):
    alone = found[1, 0][name]["losses"]
    assert len(alone) == distributed_worker.STEPS
    assert alone[0]["loss"] != pytest.approx(alone[-1]["loss"], rel=1e-3)  # something was learned
    for rank in range(processes):
        together = found[processes, rank][name]["losses"]
        for step, expected in zip(together, alone, strict=True):
            assert step == pytest.approx(expected, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize(("processes", "name"), COMPARED)
def test_every_process_knows_the_ranks(found, processes, name):
    # Of models that have learned alike, but not to the bit.
    alone = torch.tensor(found[1, 0][name]["ranks"])
    for rank in range(processes):
        together = torch.tensor(found[processes, rank][name]["ranks"])
        assert ((together - alone).abs() > 0.4).float().mean() < 0.02


@pytest.mark.parametrize("regime", ["1vsall", "sampled"])
def test_each_process_holds_its_share_of_the_tables_and_of_their_states(found, regime):
    tables, states = found[1, 0]["bytes"][regime]
    assert states >= tables
    halves = [found[2, rank]["bytes"][regime] for rank in range(2)]
    assert halves == [[tables // 2, states // 2]] * 2
    thirds = [found[3, rank]["bytes"][regime] for rank in range(3)]
    assert [sum(part) for part in zip(*thirds, strict=True)] == [tables, states]
    assert max(part[0] for part in thirds) == -(-14 // 3) * tables // 14


def test_a_process_without_entities_sends_no_rows_that_nobody_receives(monkeypatch):
    sent = []
    monkeypatch.setattr(distributed.dist, "send", lambda rows, to: sent.append(len(rows)))
    parts = [Shards(2, rank, 3) for rank in range(3)]
    assert 0 in map(len, parts)
    for shards in parts[1:]:
        shards.send_rows(torch.zeros(len(shards), 4))
    assert sent == [len(shards) for shards in parts[1:] if len(shards)]


def test_a_part_of_a_model_does_not_answer_for_all():
    kg = ring_kg(14)
    model = ig.IMVIA.from_kg(kg, paper_settings(dim=8), Shards(14, 0, 2))
    run = ig.Run(model, kg, model.settings, ig.training.Progress())
    for ask in (
        lambda: run.predict(head=kg.entities[0], relation=kg.relations[0]),
        lambda: run.score([(kg.entities[0], kg.relations[0], kg.entities[1])]),
        run.entity_embeddings,
        lambda: run.encoder,
    ):
        with pytest.raises(
            ig.IMVIAError, match=r"only one of 2 parts of the entities; `imvia_graph\.load`"
        ):
            ask()


@pytest.mark.parametrize(
    "size", [100, 100_000, 200_000]
)  # in the header, the first, the second table
def test_where_a_disk_is_full_all_rows_are_received_that_others_send(size, monkeypatch, tmp_path):
    received = []
    monkeypatch.setattr(torch.distributed, "recv", lambda rows, rank: received.append(len(rows)))
    monkeypatch.setattr(distributed, "_PORTION", 2**15)  # 8 rows
    tables = {f"model/{name}": torch.rand(20, 1024) for name in "abc"}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(ig.StorageError, match="cannot be written"):
            checkpoint._write(
                tmp_path / "last.safetensors", tables, {}, None, Shards(40, 0, 2), set(tables)
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert received == [8, 8, 4] * 3


@pytest.fixture
def in_turn(monkeypatch):
    """Two processes, the second of which does what it does when the first one is done."""
    told = []

    def first_tells(shards, value):
        if not shards.is_first:
            return told.pop(0)
        told.append(value)
        return value

    monkeypatch.setattr(Shards, "first_tells", first_tells)
    return Shards(4, 0, 2), Shards(4, 1, 2)


def refuse():
    raise PermissionError("the folder may not be written")


def test_what_the_first_process_meets_all_meet_with_the_same_words(in_turn, tmp_path):
    first, second = in_turn
    with pytest.raises(PermissionError, match="may not be written"):
        first.first_does(refuse)
    with pytest.raises(ig.CheckpointError, match="may not be written"):
        second.first_does(refuse)
    (tmp_path / "notes.txt").touch()
    for shards in in_turn:
        with pytest.raises(ig.CheckpointError, match="is not empty"):
            importlib.import_module("imvia_graph.run")._owned(
                tmp_path, shards, new=True
            ).__enter__()


def test_a_full_disk_while_a_trained_model_is_saved_is_told_to_all_processes(
    in_turn, monkeypatch, tmp_path
):
    monkeypatch.setattr(torch.distributed, "recv", lambda rows, rank: None)
    monkeypatch.setattr(torch.distributed, "send", lambda rows, rank: None)
    kg, settings = ring_kg(4), paper_settings(dim=256, precision="float32")
    models = [ig.IMVIA.from_kg(kg, settings, shards) for shards in in_turn]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        for model, error in zip(models, (ig.StorageError, ig.CheckpointError), strict=True):
            with pytest.raises(error, match=r"best\.safetensors cannot be written"):
                checkpoint.save_run(
                    tmp_path / "run", kg, settings, model, ig.training.Progress(), []
                )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not checkpoint.is_run(tmp_path / "run")


def test_a_checkpoint_that_may_not_be_written_ends_all_processes(in_turn, tmp_path):
    trainer = SimpleNamespace(settings=paper_settings(disk_full="continue"))
    (tmp_path / "run.json").touch()
    first, second = (checkpoint.RunFolder(tmp_path, shards) for shards in in_turn)
    with pytest.raises(PermissionError, match="may not be written"):
        first._write(trainer, refuse)
    with pytest.raises(ig.CheckpointError, match="may not be written"):
        second._write(trainer, lambda: None)


def test_shards_share_everything_out_evenly():
    for rows, size in ((10, 3), (2, 3), (0, 2), (7, 7)):
        parts = [Shards(rows, rank, size) for rank in range(size)]
        assert [p.start for p in parts[1:]] == [p.stop for p in parts[:-1]]
        assert (parts[0].start, parts[-1].stop) == (0, rows)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert [p.part(rows) for p in parts] == [slice(p.start, p.stop) for p in parts]


# -- the command line -----------------------------------------------------------------------------

FIT = ["--set", "dim=16", "--set", "precision=float32", "--device", "cpu", "--seed", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A KG folder."""
    return ring_kg(40, valid=8, test=8).save(tmp_path_factory.mktemp("kg") / "ring")


def metrics_of(run_folder):
    """Without the times."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def fit(folder, out, *more):
    return ["-m", "imvia_graph", "fit", str(folder), "--out", str(out), *FIT, *more]


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The folders of runs of four epochs in one process, by regime."""
    runs = tmp_path_factory.mktemp("alone")
    options = {"dim": 16, "epochs": 4, "seed": 3, "precision": "float32", "device": "cpu"}
    regimes = ("1vsall", "sampled")
    return {
        name: ig.fit(folder, out=runs / name, regime=name, **options).folder for name in regimes
    }


def test_fit_in_two_processes_makes_the_run_that_one_makes(folder, alone, tmp_path):
    one = alone["1vsall"]
    two = run([sys.executable, *fit(folder, tmp_path / "two", "--epochs", "4", "--processes", "2")])
    assert two.stdout.count("Run folder") == 1
    alone, together = metrics_of(one), metrics_of(tmp_path / "two")
    assert len(together) == 4
    for record, expected in zip(together, alone, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert record["valid"]["mrr"] == pytest.approx(expected["valid"]["mrr"], abs=0.02)
    # What is written is of the same form, and whole.
    for name in (checkpoint.BEST, checkpoint.LAST):
        first, second = (checkpoint._read(run / name)[0] for run in (one, tmp_path / "two"))
        assert {k: (v.shape, v.dtype) for k, v in first.items()} == {
            k: (v.shape, v.dtype) for k, v in second.items()
        }
    loaded = ig.load(tmp_path / "two", device="cpu")
    test = json.loads((tmp_path / "two" / "test.json").read_text())
    assert loaded.evaluate("test")["both"]["mrr"] == test["both"]["mrr"]


FIT_BY_TWO = """
import json, sys, torch
from helpers import in_groups
import imvia_graph as ig
from imvia_graph.training import Callback

folder, out, stop_after, options = map(json.loads, sys.argv[1:])

class Stop(Callback):
    def on_epoch(self, trainer, record):
        if record["epoch"] == stop_after:
            trainer.stop()

torch.optim.SGD([torch.zeros(1)])  # imports much of torch, once for both
in_groups((2,), lambda: ig.fit(folder, out=out, callbacks=Stop(), **options))
"""


def fit_by_two(folder, out, stop_after=None, **options):
    """Do in two processes what `FIT` does, and possibly stop after an epoch."""
    options = {"dim": 16, "precision": "float32", "device": "cpu", "seed": 3, **options}
    arguments = map(json.dumps, (str(folder), str(out), stop_after, options))
    run([sys.executable, "-c", FIT_BY_TWO, *arguments])


@pytest.mark.parametrize(("regime", "processes"), [("1vsall", 1), ("sampled", 3)])
def test_a_checkpoint_of_two_processes_goes_on_in_another_number(
    regime, processes, folder, alone, tmp_path
):
    out = tmp_path / "begun"
    # As many epochs as the schedule goes by, stopped after two.
    fit_by_two(folder, out, stop_after=2, epochs=4, regime=regime)
    assert len(metrics_of(out)) == 2
    if processes == 1:
        ig.fit(out=out, resume=True)
    else:
        resume = ["-m", "imvia_graph", "fit", "--resume", "--out", str(out)]
        run([sys.executable, *resume, "--processes", str(processes)])
    found = metrics_of(out)
    assert [record["epoch"] for record in found] == [1, 2, 3, 4]
    for record, expected in zip(found, metrics_of(alone[regime]), strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def workers(parent):
    """Processes that torchrun or `fit --processes` started, and which are at work."""
    found = []
    for status in [p for p in os.listdir("/proc") if p.isdigit()]:
        try:
            with open(f"/proc/{status}/stat") as file:
                above = int(re.sub(r".*\)", "", file.read()).split()[1])
            with open(f"/proc/{status}/cmdline") as file:
                command = file.read()
        except (OSError, ValueError):
            continue
        if above == parent and "imvia_graph\0fit" in command:
            found.append(int(status))
    return found


LONG = ("--epochs", "24", "--set", "patience=null")


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory):
    """The folder of a long run in two processes that nobody kills."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    fit_by_two(folder, out, epochs=24, patience=None)
    return out


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
@pytest.mark.parametrize(("launcher", "kills"), [("torchrun", 2), ("fit", 1)])
def test_a_group_of_which_a_process_is_killed_goes_on_by_itself(
    launcher, kills, folder, unbroken, tmp_path
):
    out = tmp_path / "killed"
    command = fit(folder, out, *LONG)
    if launcher == "torchrun":
        command = torchrun(2, *command, restarts=3)
    else:
        command = [sys.executable, *command, "--processes", "2"]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    killed, seen = 0, 0
    try:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            done = len(checkpoint.read_metrics(out)) if out.exists() else 0
            there = workers(process.pid)
            if killed < kills and done >= seen + 3 and len(there) == 2:
                os.kill(there[killed % 2], signal.SIGKILL)
                killed, seen = killed + 1, done
                while process.poll() is None and there[killed % 2 - 1] in workers(process.pid):
                    time.sleep(0.05)
            time.sleep(0.1)
        output = process.communicate(timeout=60)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 0, output[-3000:]
    assert killed == kills
    assert metrics_of(out) == metrics_of(unbroken)
    expected = ig.load(unbroken, device="cpu").evaluate("test")
    assert json.loads((out / "test.json").read_text())["both"] == expected["both"]


@pytest.fixture
def agent_store(monkeypatch):
    """A store as torchrun has it, which knows this process as the first of two."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    described = {
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        distributed.JOB: "",  # so that what is put there is taken away in the end
    }
    for name, value in described.items():
        monkeypatch.setenv(name, value)
    start_again(monkeypatch, attempt=0)
    yield store
    distributed._rendezvous.cache_clear()


def start_again(monkeypatch, attempt):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    monkeypatch.delenv(distributed.JOB)
    distributed._rendezvous.cache_clear()


def test_processes_started_again_have_the_name_of_those_before_them(agent_store, monkeypatch):
    first = distributed.job()
    assert first
    for attempt in (1, 2):
        start_again(monkeypatch, attempt)
        assert distributed.job() == first
    agent_store.delete_key("imvia_graph/job")  # as in the store of another torchrun
    start_again(monkeypatch, 0)
    assert distributed.job() not in (None, first)


@pytest.mark.parametrize("of_this_job", [True, False])
def test_processes_started_again_go_on_with_a_run_of_their_own_alone(
    of_this_job, agent_store, folder, tmp_path, monkeypatch
):
    command = importlib.import_module("imvia_graph.cli.fit")
    asked = []
    run = importlib.import_module("imvia_graph.run")
    monkeypatch.setattr(run, "fit", lambda kg, **options: asked.append((kg, options)))
    if not of_this_job:
        monkeypatch.setenv(distributed.JOB, "another")
    out = tmp_path / "run"
    checkpoint.start_run(out, ring_kg(10), paper_settings())
    if of_this_job:
        assert distributed.job() in (out / "run.json").read_text()
    start_again(monkeypatch, 1)
    CliRunner().invoke(command.fit, [str(folder), "--out", str(out), *FIT])
    ((kg, options),) = asked
    assert options["out"] == out
    assert (kg is None, options.get("resume", False)) == (of_this_job, of_this_job)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_processes_that_a_signal_stops_end_the_command_as_a_shell_has_it(
    number, code, monkeypatch, tmp_path
):
    def stopped(*_):
        raise api.SignalException("received a death signal", number)

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: stopped)
    monkeypatch.setenv(distributed.JOB, "")  # so that it is put back
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = importlib.import_module("imvia_graph.cli.fit")
    with pytest.raises(SystemExit) as ended:
        command._launch(2, "countries", tmp_path / "run")
    assert ended.value.code == code


@pytest.mark.parametrize("later", [0, 5])
def test_a_signal_that_torchrun_passes_on_again_is_no_second_one(later, monkeypatch):
    run = importlib.import_module("imvia_graph.run")
    monkeypatch.setattr(distributed, "is_launched", lambda: True)
    now = [0.0]
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now[0]))
    done = []
    trainer = SimpleNamespace(stop=lambda: done.append("stop"))

    def train():
        with run._stopping_on_signals(trainer):
            signal.raise_signal(signal.SIGINT)
            now[0] += later
            signal.raise_signal(signal.SIGINT)
            done.append("step")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == (["stop"] if later else ["stop", "step"])


def test_under_torchrun_the_folder_is_named(folder):
    command = torchrun(1, "-m", "imvia_graph", "fit", folder, *FIT)
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=200)
    assert done.returncode != 0
    assert "name the run folder with --out" in done.stderr


def test_an_error_is_told_once_and_ends_all(folder, tmp_path):
    command = fit(folder, tmp_path / "x", "--set", "modalities=[sound]", "--processes", "2")
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment(), timeout=200
    )
    assert done.returncode == 2
    assert done.stderr.count("has no views of 'sound'") == 1


def test_a_process_alone_needs_no_group():
    shards = Shards(5)
    rows = torch.rand(4, 3)
    assert shards.alone
    assert shards.is_first
    assert shards.gather(rows, 4) is rows
    assert shards.total(rows) is rows
    assert shards.first_tells("x") == "x"
    shards.wait()
    assert not distributed.is_launched()
