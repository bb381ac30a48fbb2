"""Kill runs with SIGKILL at random moments, resume them, and compare them with unbroken runs.

    OMP_NUM_THREADS=1 python benchmarks/reliability/kill.py fit --runs 50
    OMP_NUM_THREADS=1 python benchmarks/reliability/kill.py encode --runs 50
    OMP_NUM_THREADS=1 python benchmarks/reliability/kill.py tune --runs 20

Each run is a process that is killed up to three times: with probability 1/2 by its parent at a
random moment, else by itself at a random step of writing a file (before or after an fsync, a link
or a rename, or with half of the file written) or, with a database, after a statement or before a
commit. The run is resumed until it ends by itself, and its results are compared with those of an
unbroken run: no work may be lost or done twice. While a training runs, and after each kill, its
folder is read with `ig.load`.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import about, write_results
from safetensors import safe_open
from safetensors.torch import load_file

import imvia_graph as ig
from imvia_graph import _files, _kernels, checkpoint

MOST_KILLS = 3
#: Children are forked from a process that has only imported torch and other packages, because a
#: thread pool would not survive a fork.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    [
        *("imvia_graph.run", "imvia_graph.tuning", "imvia_graph.encode"),
        *("torch._dynamo", "optuna", "sqlalchemy"),
    ]
)


# -- killing --------------------------------------------------------------------------------------


class Writes:
    """Counts the steps of writing files in this process, and kills it at step ``fatal``."""

    def __init__(self, fatal: int | None = None) -> None:
        self.count, self.fatal = 0, fatal
        for module, name in ((os, "fsync"), (os, "link"), (Path, "replace")):
            setattr(module, name, self.stepped(getattr(module, name)))
        save = _files.save_file

        def half(tensors: Any, path: Path, metadata: Any) -> None:
            save(tensors, path, metadata)
            if self.step():
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        _files.save_file = half
        if "sqlalchemy" in sys.modules:
            from sqlalchemy import Engine, event

            for name in ("after_cursor_execute", "commit"):
                event.listen(Engine, name, self.killing_step)

    def killing_step(self, *_: Any) -> None:
        if self.step():
            os.kill(os.getpid(), signal.SIGKILL)

    def step(self) -> bool:
        self.count += 1
        return self.count == self.fatal

    def stepped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.killing_step()
            found = function(*arguments, **options)
            self.killing_step()
            return found

        return counted


def child(work: Callable[[], None], fatal: int | None, report: Any) -> None:
    writes = Writes(fatal)
    _kernels.load = lambda kind: None  # no compiled loops, which take a second to load
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            work()
    except SystemExit as ended:
        if ended.code:
            report.send(output.getvalue())
            os._exit(3)
    except BaseException as error:
        report.send(f"{type(error).__name__}: {error}")
        os._exit(3)
    report.send(writes.count)
    report.close()
    os._exit(0)


def once(
    work: Callable[[], None],
    after: float | None = None,
    fatal: int | None = None,
    watch: Callable[[], None] = lambda: None,
) -> tuple[bool, float, int]:
    """Run a process; return whether it was killed, its seconds, and its number of write steps."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=child, args=(work, fatal, sender))
    start = time.monotonic()
    process.start()
    sender.close()
    while process.is_alive():
        watch()
        if after is not None and time.monotonic() - start >= after:
            process.kill()
            after = None
        process.join(0.01)
    seconds = time.monotonic() - start
    watch()
    if process.exitcode == -signal.SIGKILL:
        return True, seconds, 0
    message = receiver.recv()
    if process.exitcode:
        raise RuntimeError(f"A process ended with {process.exitcode}: {message}")
    return False, seconds, message


def broken(
    work: Callable[[], None],
    seconds: float,
    steps: int,
    draw: random.Random,
    made: Sequence[Path],
    watch: Callable[[], None] = lambda: None,
    killed_now: Callable[[], None] = lambda: None,
) -> list[str]:
    """Kill a run at least once, resume it to its end, and return how it was killed.

    ``seconds`` and ``steps`` are those of an unbroken run; ``made`` are its outputs, which are
    deleted to start again if the run ends before it is first killed.
    """
    kills: list[str] = []
    for _ in range(draw.randint(1, MOST_KILLS)):
        if draw.random() < 0.5:
            killed, *_ = once(work, after=draw.uniform(0, seconds), watch=watch)
            how = "at a random moment"
        else:
            killed, *_ = once(work, fatal=draw.randint(1, steps), watch=watch)
            how = "while a file was written"
        if killed:
            kills.append(how)
            killed_now()
        elif kills:
            break
        else:
            for path in made:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
    if not kills:
        return broken(work, seconds, steps, draw, made, watch, killed_now)
    killed, *_ = once(work, watch=watch)
    assert not killed
    return kills


# -- fit ------------------------------------------------------------------------------------------

FIT = {"dim": 16, "relation_dim": 8, "information_dim": 8, "batch_size": 256, "epochs": 4}
#: Name of the graph's folder.
GRAPH = "graph"


def make_graph(top: Path) -> None:
    """Write a graph of 200 entities and two relations, with random image and text features."""
    entity = torch.arange(200)
    after = torch.stack([entity, torch.zeros_like(entity), (entity + 1) % 200], dim=1)
    across = torch.stack([entity, torch.ones_like(entity), (entity + 100) % 200], dim=1)
    generator = torch.Generator().manual_seed(0)
    triples = torch.cat([after, across])[torch.randperm(400, generator=generator)]
    views = {
        "image": ig.Views(torch.randn(300, 16, generator=generator), torch.arange(300) % 180),
        "text": ig.Views(torch.randn(200, 8, generator=generator), entity),
    }
    labels = [f"e{i}" for i in range(200)]
    kg = ig.MultiViewKG(
        labels, ["after", "across"], triples[40:], triples[:20], triples[20:40], views
    )
    kg.save(top / GRAPH)


def fit_work(folder: Path) -> None:
    if checkpoint.is_run(folder):
        ig.fit(out=folder, resume=True)
    else:
        ig.fit(folder.parent / GRAPH, out=folder, device="cpu", **FIT)


def left_by_fit(folder: Path) -> dict[str, Any]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        del record["seconds"]
    tensors = {
        f"{name}/{key}": value.numpy().tobytes()
        for name in ("best", "last")
        for key, value in load_file(folder / f"{name}.safetensors").items()
    }
    return {"epochs": records, "tensors": tensors, "test": ig.load(folder, "cpu").evaluate()}


class FolderReader:
    """Loads a run folder during training; this must succeed once the run has a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reads, self.unreadable = folder, 0, []

    def __call__(self) -> None:
        # Only about every tenth call, which leaves the core to the training.
        if not checkpoint.is_run(self.folder) or random.random() > 0.1:
            return
        self.reads += 1
        try:
            ig.load(self.folder, "cpu")
        except ig.CheckpointError as error:
            if "has not reached its first checkpoint" not in str(error):
                self.unreadable.append(str(error))
        except Exception as error:
            self.unreadable.append(repr(error))


def fit(runs: int, top: Path, draw: random.Random) -> dict[str, Any]:
    make_graph(top)
    _, seconds, steps = once(partial(fit_work, top / "whole"))
    expected = left_by_fit(top / "whole")
    same, kills, reads, unreadable = 0, Counter(), 0, []
    for number in range(runs):
        folder = top / f"run-{number}"
        reader = FolderReader(folder)
        kills.update(broken(partial(fit_work, folder), seconds, steps, draw, [folder], reader))
        same += left_by_fit(folder) == expected
        reads += reader.reads
        unreadable += reader.unreadable
        shutil.rmtree(folder)
        print(f"{number + 1}: {same} the same, {sum(kills.values())} kills", flush=True)
    return {
        "settings": FIT,
        "runs": runs,
        "the_same_to_the_bit": same,
        "kills": dict(kills),
        "reads_of_the_folder": reads,
        "unreadable": unreadable,
        "met": same == runs and not unreadable,
    }


# -- encode ---------------------------------------------------------------------------------------

INPUTS, BATCH = 120, 8


def make_raw(top: Path) -> None:
    """Write a graph with texts and pictures to encode."""
    from PIL import Image

    names = [f"e{i}" for i in range(INPUTS)]
    facts = "".join(f"{a}\tnext\t{b}\n" for a, b in itertools.pairwise(names))
    (top / "facts.tsv").write_text(facts)
    (top / "texts.tsv").write_text("".join(f"{name}\tthe text of {name}\n" for name in names))
    generator = np.random.default_rng(0)
    for name in names:
        (top / "images" / name).mkdir(parents=True)
        pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(top / "images" / name / "1.png")


class Digest(ig.encode.Encoder):
    """A slow encoder whose features are digests of the inputs."""

    name, width, identity = "digest", 8, "digest 1"

    def __init__(self, modality: Any) -> None:
        self.modality = modality

    def encode(self, items: Sequence[Any]) -> torch.Tensor:
        time.sleep(0.02)
        contents = [item.encode() if isinstance(item, str) else item.tobytes() for item in items]
        digests = [np.frombuffer(hashlib.sha256(one).digest()[:8], np.uint8) for one in contents]
        return torch.from_numpy(np.stack(digests)).float()


def encode_work(top: Path, out: Path, cache: Path) -> None:
    kg, _ = ig.encode.encode_kg(
        ig.load_kg(top / "facts.tsv", split=False),
        texts=top / "texts.tsv",
        images=top / "images",
        text_encoder=Digest("text"),
        image_encoder=Digest("image"),
        cache=cache,
        batch_size=BATCH,
    )
    kg.save(out)


def left_by_encode(out: Path) -> dict[str, bytes]:
    found = {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    return found


def inputs_in(cache: Path) -> tuple[int, int, int]:
    """Return the numbers of cached inputs, of distinct cached inputs, and of started inputs."""
    digests = []
    for path in cache.rglob("part-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            digests += [bytes(row.tolist()) for row in file.get_tensor("digest")]
    begun = 0
    for log in cache.rglob("log.jsonl"):
        for line in log.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                event = json.loads(line)
                begun += event["inputs"] if event["event"] == "start" else 0
    return len(digests), len(set(digests)), begun


def encode(runs: int, top: Path, draw: random.Random) -> dict[str, Any]:
    make_raw(top)
    _, seconds, steps = once(partial(encode_work, top, top / "whole", top / "whole-cache"))
    expected = left_by_encode(top / "whole")
    same, once_each, in_hand, kills = 0, 0, 0, Counter()
    for number in range(runs):
        out, cache = top / f"out-{number}", top / f"cache-{number}"
        found = broken(partial(encode_work, top, out, cache), seconds, steps, draw, [out, cache])
        kills.update(found)
        same += left_by_encode(out) == expected
        kept, distinct, begun = inputs_in(cache)
        once_each += kept == distinct == 2 * INPUTS
        in_hand += begun - kept <= BATCH * len(found)
        shutil.rmtree(out)
        shutil.rmtree(cache)
        print(f"{number + 1}: {same} the same, {sum(kills.values())} kills", flush=True)
    return {
        "inputs": 2 * INPUTS,
        "batch": BATCH,
        "runs": runs,
        "the_same_to_the_bit": same,
        "every_input_kept_once": once_each,
        "no_more_done_twice_than_a_batch_a_kill": in_hand,
        "kills": dict(kills),
        "met": same == once_each == in_hand == runs,
    }


# -- tune -----------------------------------------------------------------------------------------

SPACE = {"dim": [4, 8, 16], "learning_rate": [0.001, 0.003, 0.01]}
TRIALS = 9


def tuned(study: Path) -> ig.Tuned:
    settings = {**FIT, "epochs": 1, "device": "cpu"}
    del settings["dim"]
    graph = study.parent / GRAPH
    return ig.tune(graph, study, trials=TRIALS, space=SPACE, settings=settings, prune=False)


def tune_work(study: Path) -> None:
    tuned(study)


def left_by_tune(study: Path) -> tuple[dict[Any, float], int, int]:
    """Return validation MRR by settings, and the numbers of complete and of failed trials."""
    found = tuned(study)
    ended = [trial for trial in found.trials if trial["state"] == "complete"]
    values = {tuple(sorted(trial["settings"].items())): trial["mrr"] for trial in ended}
    given_up = sum(trial["state"] == "fail" for trial in found.trials)
    return values, len(ended), given_up


def is_damaged(study: Path) -> bool:
    if not study.exists():
        return False
    with contextlib.closing(sqlite3.connect(study)) as connection:
        check: str = connection.execute("PRAGMA integrity_check").fetchone()[0]
    return check != "ok"


def tune(runs: int, top: Path, draw: random.Random) -> dict[str, Any]:
    make_graph(top)
    _, seconds, steps = once(partial(tune_work, top / "whole.db"))
    expected, ended, _ = left_by_tune(top / "whole.db")
    assert ended == len(expected) == TRIALS
    same, in_hand, kills = 0, 0, Counter()
    damaged: list[bool] = []
    for number in range(runs):
        folder = top / f"study-{number}"
        shutil.copytree(top / GRAPH, folder / GRAPH)
        study = folder / "study.db"
        left = [study, study.with_name("study.db-journal")]
        found = broken(
            partial(tune_work, study),
            seconds,
            steps,
            draw,
            left,
            killed_now=lambda study=study: damaged.append(is_damaged(study)),
        )
        kills.update(found)
        values, ended, given_up = left_by_tune(study)
        same += values == expected and ended == TRIALS
        in_hand += given_up <= len(found)
        shutil.rmtree(folder)
        print(f"{number + 1}: {same} the same, {sum(kills.values())} kills", flush=True)
    return {
        "trials": TRIALS,
        "runs": runs,
        "every_trial_once_with_the_same_mrr": same,
        "no_more_given_up_than_a_trial_a_kill": in_hand,
        "checks_of_the_study_after_a_kill": len(damaged),
        "damaged_studies": sum(damaged),
        "kills": dict(kills),
        "met": same == in_hand == runs and not any(damaged),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["fit", "encode", "tune"])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work = {"fit": fit, "encode": encode, "tune": tune}[options.what]
    once(partial(time.sleep, 0))  # imports happen here, not in the timed run
    with tempfile.TemporaryDirectory() as top:
        found = work(options.runs, Path(top), random.Random(options.seed))
    write_results(f"kill-{options.what}", {**about(), "seed": options.seed, **found})


if __name__ == "__main__":
    main()
