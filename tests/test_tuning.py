"""tune: searches, goes on, shares, repeats nothing, and never sees the test set."""

import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch
import yaml
from click.testing import CliRunner
from filelock import FileLock
from helpers import TINY, ring_kg, run_python, write_folder

import imvia_graph as ig
from imvia_graph import DataError, SettingsError, TrainingError
from imvia_graph.cli import command_line
from imvia_graph.tuning import SPACE, Range, check_space

optuna = pytest.importorskip("optuna")

SMALL = {**TINY, "epochs": 2}


def tune(study, trials=3, space=None, kg=None, fixed=None, **options):
    fixed = {**SMALL, **(fixed or {})}
    space = space or {"relation_dim": [2, 3, 4, 5, 6, 7, 8]}
    fixed = {key: value for key, value in fixed.items() if key not in space}
    return ig.tune(kg or ring_kg(), study, trials=trials, space=space, settings=fixed, **options)


def tried(found, state="complete"):
    return [tuple(t["settings"].values()) for t in found.trials if t["state"] == state]


# -- what is found --------------------------------------------------------------------------------


def test_the_best_trial_is_the_one_with_the_best_mrr_and_its_settings_give_it_again(tmp_path):
    space = {"relation_dim": [2, 5], "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
    found = tune(tmp_path / "s.db", 4, space)
    values = [trial["mrr"] for trial in found.trials]
    assert len(values) == 4
    assert found.mrr == max(values)
    assert found.settings["learning_rate"] == pytest.approx(
        found.trials[found.trial]["settings"]["learning_rate"], abs=0
    )
    assert found.settings.items() >= {k: v for k, v in SMALL.items() if k not in space}.items()
    run = ig.fit(ring_kg(), settings=ig.Settings.create(found.settings))
    assert run.progress.best_mrr == found.mrr


def test_values_come_from_the_space(tmp_path):
    space = {
        "relation_dim": {"low": 4, "high": 12, "step": 4},
        "label_smoothing": {"low": 0.0, "high": 0.3, "step": 0.1},
        "learning_rate": {"low": 1e-3, "high": 1e-2, "log": True},
        "modalities": [None, [], ["image"]],
        "joint": [True, False],
    }
    found = tune(tmp_path / "s.db", 12, space, prune=False)
    columns = {key: [trial["settings"][key] for trial in found.trials] for key in space}
    assert set(columns["relation_dim"]) <= {4, 8, 12}
    assert set(columns["label_smoothing"]) <= {0.0, 0.1, 0.2, 0.3}
    assert all(1e-3 <= value <= 1e-2 for value in columns["learning_rate"])
    assert {str(value) for value in columns["modalities"]} == {"None", "[]", "['image']"}
    assert set(columns["joint"]) == {True, False}


def test_a_space_that_is_small_is_tried_whole_and_then_the_search_ends(tmp_path):
    space = {"relation_dim": [2, 3], "dim": {"low": 4, "high": 8, "step": 2}}
    found = tune(tmp_path / "s.db", 50, space, prune=False)
    assert sorted(tried(found)) == [(r, d) for r in (2, 3) for d in (4, 6, 8)]


def test_a_range_of_one_value_is_tried_once_and_then_the_search_ends(tmp_path):
    space = {"learning_rate": {"low": 1e-3, "high": 1e-3}}
    found = tune(tmp_path / "s.db", 3, space, timeout=20)
    assert [trial["settings"] for trial in found.trials] == [{"learning_rate": 1e-3}]


def test_draws_that_were_all_tried_end_the_search(tmp_path, monkeypatch):
    from imvia_graph import tuning

    monkeypatch.setattr(tuning, "_MOST_REPEATED", 5)
    # Two numbers of which the settings keep one: too many to list, by what the range says.
    space = {"learning_rate": {"low": 1e-3, "high": 1e-3 * (1 + 1e-14)}}
    assert len(tune(tmp_path / "s.db", 3, space, timeout=20).trials) == 1
    study = optuna.load_study(storage=f"sqlite:///{tmp_path / 's.db'}", study_name="imvia-graph")
    assert len(study.trials) == 1 + 5


def test_drawing_what_was_tried_ends_when_the_time_is_up(tmp_path, monkeypatch):
    from imvia_graph import tuning

    monkeypatch.setattr(tuning, "_MOST_REPEATED", 10**9)
    space = {"learning_rate": {"low": 1e-3, "high": 1e-3 * (1 + 1e-14)}}
    assert len(tune(tmp_path / "s.db", 3, space, timeout=3).trials) == 1


def test_the_same_seed_searches_the_same_and_another_one_something_else(tmp_path):
    space = {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
    one, same, other = (
        tried(tune(tmp_path / f"{i}.db", 3, space, seed=seed)) for i, seed in enumerate((1, 1, 2))
    )
    assert one == same != other


def test_a_hopeless_trial_is_ended_early_unless_told_otherwise(tmp_path):
    # Enqueued in this order by the space being tried whole: many good ones, then one without hope.
    space = {"learning_rate": [1e-2, 1.1e-2, 1.2e-2, 1.3e-2, 1.4e-2, 1.5e-2, 1e-9]}
    fixed = {"epochs": 12, "patience": None}
    pruned = tune(tmp_path / "p.db", 7, space, fixed=fixed, seed=3)
    whole = tune(tmp_path / "w.db", 7, space, fixed=fixed, seed=3, prune=False)
    assert Counter(t["state"] for t in whole.trials if t["state"] != "fail") == {"complete": 7}
    ended = [trial for trial in pruned.trials if trial["state"] == "pruned"]
    assert ended
    assert all(trial["epochs"] < 12 for trial in ended)


def test_a_trial_that_diverges_counts_and_the_search_goes_on(tmp_path, monkeypatch):
    from imvia_graph import tuning

    def fails(graph, settings, **options):
        if settings.relation_dim == 3:
            raise TrainingError("the loss is nan")
        return ig.fit(graph, settings=settings, **options)

    monkeypatch.setattr(tuning, "fit", fails)
    found = tune(tmp_path / "s.db", 3, {"relation_dim": [2, 3, 4]})
    assert tried(found, "pruned") == [(3,)]
    assert sorted(tried(found)) == [(2,), (4,)]


# -- going on and sharing -------------------------------------------------------------------------


def test_called_again_it_goes_on(tmp_path):
    first = tune(tmp_path / "s.db", 2)
    second = tune(tmp_path / "s.db", 5)
    assert second.trials[:2] == first.trials
    assert len(tried(second)) == 5 == len(set(tried(second)))
    assert tune(tmp_path / "s.db", 5).trials == second.trials


def test_a_trial_that_was_interrupted_is_done_by_the_next_call(tmp_path, monkeypatch):
    from imvia_graph import tuning

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(tmp_path / "s.db", 3)
    found = tune(tmp_path / "s.db", 3)
    given_up = tried(found, "fail")
    assert len(given_up) == 1
    assert given_up[0] in tried(found)
    assert len(tried(found)) == 3


WORKER = """
import glob, sys, time
import imvia_graph as ig

source, study, trials, behaviour = sys.argv[1:]
ended = []

def told(trial, state, mrr, epochs):
    if state != "training":
        ended.append(trial)
        print("ended", trial, flush=True)
    elif behaviour == f"hangs after {{len(ended)}}":
        print("hangs", trial, flush=True)
        time.sleep(600)
    elif behaviour == "meets another":
        until = time.monotonic() + 120
        while not ended and len(glob.glob(study + ".trial-*")) < 2 and time.monotonic() < until:
            time.sleep(0.02)

ig.tune(source, study, trials=int(trials), space={space!r}, settings={fixed!r}, progress=told)
"""


def script(space, epochs):
    fixed = {**SMALL, "epochs": epochs, "patience": None, "validation": "published"}
    fixed = {key: value for key, value in fixed.items() if key not in space}
    return WORKER.format(space=space, fixed=fixed), fixed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("kg") / "ring"
    ring_kg().save(path)
    return path


def start(code, *arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def done_by(worker):
    """The trials that a worker ended, by its own word."""
    output, _ = worker.communicate(timeout=240)
    return {int(line.split()[1]) for line in output.splitlines() if line.startswith("ended")}


def hears(worker, word):
    """Wait until a worker says something; what it said until then."""
    lines = []
    for line in worker.stdout:
        lines.append(line)
        if line.startswith(word):
            break
    assert lines[-1].startswith(word), lines
    return lines


def kill(worker):
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()


def test_two_workers_on_one_study_share_it_and_repeat_nothing(tmp_path, folder):
    space = {"relation_dim": list(range(2, 7)), "dim": [4, 6]}
    code, fixed = script(space, 3)
    workers = [start(code, folder, tmp_path / "s.db", 10, "meets another") for _ in range(2)]
    one, other = map(done_by, workers)
    assert [worker.returncode for worker in workers] == [0, 0]
    assert one
    assert other
    assert not one & other
    found = ig.tune(folder, tmp_path / "s.db", trials=1, space=space, settings=fixed)
    done = tried(found) + tried(found, "pruned")
    assert sorted(done) == sorted((r, d) for r in range(2, 7) for d in (4, 6))
    assert tried(found, "fail") == []


def test_killed_it_goes_on_and_does_again_no_more_than_the_trial_in_hand(tmp_path, folder):
    space = {"relation_dim": [2, 3, 4]}
    code, fixed = script(space, 3)
    worker = start(code, folder, tmp_path / "s.db", 3, "hangs after 1")
    before, at = (int(line.split()[1]) for line in hears(worker, "hangs"))
    kill(worker)
    again = start(code, folder, tmp_path / "s.db", 3, "")
    assert len(done_by(again)) == 2
    assert again.returncode == 0
    found = ig.tune(folder, tmp_path / "s.db", trials=1, space=space, settings=fixed)
    by_number = {trial["number"]: trial for trial in found.trials}
    assert by_number[before]["state"] == "complete"
    assert [trial["number"] for trial in found.trials if trial["state"] == "fail"] == [at]
    assert sorted(tried(found) + tried(found, "pruned")) == [(2,), (3,), (4,)]
    assert not list(tmp_path.glob("s.db.trial-*"))


def test_the_trial_of_a_killed_worker_is_done_by_the_one_that_is_left(tmp_path, folder):
    space = {"relation_dim": [2, 3]}
    code, fixed = script(space, 3)
    first = start(code, folder, tmp_path / "s.db", 2, "hangs after 0")
    hears(first, "hangs")
    second = start(code, folder, tmp_path / "s.db", 2, "")
    hears(second, "ended")
    kill(first)
    assert len(done_by(second)) == 1  # beside the one that was heard of
    found = ig.tune(folder, tmp_path / "s.db", trials=1, space=space, settings=fixed)
    assert sorted(tried(found) + tried(found, "pruned")) == [(2,), (3,)]
    assert len(tried(found, "fail")) == 1


def test_a_trial_that_ends_while_another_worker_looks_for_the_dead_is_not_given_up(
    tmp_path, monkeypatch
):
    """Its worker has let go of it between being listed and being looked at."""
    from imvia_graph import tuning

    tune(tmp_path / "s.db", 1)
    study = optuna.load_study(
        study_name="imvia-graph", storage=f"sqlite:///{tmp_path / 's.db'}", sampler=None
    )
    # What the first trial has not tried: two that are equal would not be told apart below.
    space = [2, 3, 4, 5, 6, 7, 8]
    study.enqueue_trial({"relation_dim": 2 if study.trials[0].params["relation_dim"] > 2 else 3})
    busy = study.ask()
    busy.suggest_categorical("relation_dim", space)
    acquire = FileLock.acquire

    def ended_just_now(lock, *args, **options):
        if f"trial-{busy.number}" in lock.lock_file and not study.trials[busy.number].values:
            study.tell(busy, 0.5)
        return acquire(lock, *args, **options)

    monkeypatch.setattr(tuning.FileLock, "acquire", ended_just_now)
    found = tune(tmp_path / "s.db", 3)
    assert found.trials[busy.number]["state"] == "complete"
    assert len(tried(found)) == 3
    assert len(set(tried(found))) == 3


def test_a_worker_that_waits_for_the_last_trial_leaves_no_mark_on_the_study(tmp_path, monkeypatch):
    from imvia_graph import tuning

    space = {"relation_dim": [2, 3]}
    tune(tmp_path / "s.db", 1, space)
    study = optuna.load_study(study_name="imvia-graph", storage=f"sqlite:///{tmp_path / 's.db'}")
    left = ({2, 3} - {study.trials[0].params["relation_dim"]}).pop()
    study.enqueue_trial({"relation_dim": left})
    busy = study.ask()
    assert busy.suggest_categorical("relation_dim", [2, 3]) == left
    naps = []

    def nap(seconds):
        naps.append(len(study.trials))
        if len(naps) == 5:
            claim.release()
            study.tell(busy, 0.5)

    monkeypatch.setattr(tuning.time, "sleep", nap)
    with FileLock(tmp_path / f"s.db.trial-{busy.number}.lock") as claim:
        found = tune(tmp_path / "s.db", 50, space)
    assert naps == [2] * 5
    assert sorted(tried(found)) == [(2,), (3,)]


def test_a_worker_that_has_drawn_nothing_new_does_not_draw_again_while_it_waits(
    tmp_path, monkeypatch
):
    from imvia_graph import tuning

    monkeypatch.setattr(tuning, "_MOST_REPEATED", 5)
    low, high = 1e-3, 1e-3 * (1 + 1e-14)
    space = {"learning_rate": {"low": low, "high": high}}  # one number, in more than can be listed
    tune(tmp_path / "s.db", 1, space)
    study = optuna.load_study(study_name="imvia-graph", storage=f"sqlite:///{tmp_path / 's.db'}")
    busy = study.ask()
    busy.suggest_float("learning_rate", low, high)
    naps = []

    def nap(seconds):
        naps.append(len(study.trials))
        if len(naps) == 3:
            claim.release()
            study.tell(busy, 0.5)

    monkeypatch.setattr(tuning.time, "sleep", nap)
    with FileLock(tmp_path / f"s.db.trial-{busy.number}.lock") as claim:
        found = tune(tmp_path / "s.db", 50, space)
    assert naps == [2 + 5] * 3
    assert len(study.trials) == 2 + 5
    assert len(tried(found)) == 2


def test_settings_that_do_not_go_together_are_passed_over(tmp_path, monkeypatch):
    from imvia_graph import tuning

    def refuses(graph, settings, **options):
        if settings.relation_dim == 3:
            raise SettingsError("there is no head")
        return ig.fit(graph, settings=settings, **options)

    monkeypatch.setattr(tuning, "fit", refuses)
    space = {"relation_dim": [3]}
    with pytest.raises(SettingsError, match="no head"):
        tune(tmp_path / "all.db", 1, space)
    try:
        found = tune(tmp_path / "s.db", 4, {"relation_dim": [2, 3, 4, 5]})
    except SettingsError:  # it came first, while nothing had gone well
        found = tune(tmp_path / "s.db", 4, {"relation_dim": [2, 3, 4, 5]})
    assert tried(found, "pruned") == [(3,)]
    assert sorted(tried(found)) == [(2,), (4,), (5,)]


def test_workers_of_a_study_may_be_on_different_devices(tmp_path):
    tune(tmp_path / "s.db", 1, fixed={"device": "cpu", "ranking_batch_size": 512})
    found = tune(tmp_path / "s.db", 2, fixed={"device": "auto", "ranking_batch_size": 64})
    assert len(tried(found)) == 2


def test_steps_end_where_the_range_ends():
    """0.3 is 0 + 3 * 0.1, though not in floating point."""
    assert Range(low=0.0, high=0.3, step=0.1).values() == [0.0, 0.1, 0.2, 0.3]


# -- the test set ---------------------------------------------------------------------------------


def test_nothing_in_a_search_ranks_or_trains_on_a_test_triple(tmp_path, monkeypatch):
    from imvia_graph import training

    kg = ring_kg()
    seen = []

    def recorded(model, triples, *args, **options):
        seen.append(triples.clone())
        return ig.rank(model, triples, *args, **options)

    monkeypatch.setattr(training, "rank", recorded)
    graphs = []

    class Recorded(training.Batches):
        def __init__(self, graph, *args):
            graphs.append(graph)
            super().__init__(graph, *args)

    monkeypatch.setattr(training, "Batches", Recorded)
    tune(tmp_path / "s.db", 2, kg=kg)
    assert seen
    assert all(torch.equal(triples, kg.valid) for triples in seen)
    assert graphs
    assert all(not len(graph.test) for graph in graphs)
    test = set(map(tuple, kg.test.tolist()))
    assert not any(test & set(map(tuple, graph.train.tolist())) for graph in graphs)


def test_other_test_triples_that_answer_no_validation_query_change_no_search(tmp_path):
    kg = ring_kg(size=16, valid=1, test=6)
    queries = {tuple(t) for h, r, t in kg.valid.tolist() for t in ((h, r), (t, r + 2))}
    test = [[h, r, t] for h, r, t in kg.test.tolist() if not queries & {(h, r), (t, r + 2)}]
    assert len(test) > 2
    results = [
        tune(tmp_path / f"{i}.db", 3, kg=kg.replace(test=torch.tensor(part)))
        for i, part in enumerate((test, test[:1]))
    ]
    assert results[0] == results[1]


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "empty"),
        ({"dims": [1, 2]}, "did you mean 'dim'"),
        ({"dim": []}, "list of values"),
        ({"dim": 3}, "list of values"),
        ({"dim": [8, "many"]}, "dim"),
        ({"dim": {"low": 8}}, "high"),
        ({"dim": {"low": 8, "high": 4}}, "above"),
        ({"dim": {"low": 0, "high": 4}}, "dim"),
        ({"learning_rate": {"low": 0.1, "high": 0.2, "step": 0}}, "step"),
        ({"learning_rate": {"low": 0, "high": 0.2, "log": True}}, "log"),
        ({"learning_rate": {"low": 0.1, "high": 0.2, "width": 3}}, "width"),
        ({"learning_rate": {"low": float("nan"), "high": 0.2}}, "low"),
        ({"epochs": [3]}, "both fixed and searched"),
        ({"epochs": {"low": 0, "high": 4}}, "one epoch or more"),
    ],
)
def test_a_space_that_cannot_be_is_refused_with_its_setting(space, message):
    with pytest.raises(SettingsError, match=message):
        check_space(space, {"epochs": 2})


def test_the_default_space_is_one():
    assert check_space(SPACE, {}).keys() == SPACE.keys()


def test_a_study_of_something_else_is_refused_and_stays_as_it_is(tmp_path):
    study = tmp_path / "s.db"
    before = tune(study, 1).trials
    with pytest.raises(SettingsError, match="space"):
        tune(study, 2, {"dim": [4, 8]})
    with pytest.raises(SettingsError, match="settings"):
        tune(study, 2, fixed={"epochs": 3})
    with pytest.raises(SettingsError, match="graph"):
        tune(study, 2, kg=ring_kg(size=14))
    with pytest.raises(SettingsError, match="views"):
        tune(study, 2, kg=ring_kg(views=False))
    assert tune(study, 1).trials == before


def test_a_file_that_is_no_study_is_refused_and_stays_as_it_is(tmp_path):
    path = write_folder(tmp_path, {"notes.txt": "mine\n" * 500}) / "notes.txt"
    with pytest.raises(DataError, match=r"notes\.txt cannot be used as a study"):
        tune(path)
    assert path.read_text() == "mine\n" * 500
    with pytest.raises(SettingsError, match="is a folder"):
        tune(tmp_path)


def test_a_graph_without_validation_triples_is_refused(tmp_path):
    with pytest.raises(DataError, match="no validation triples"):
        tune(tmp_path / "s.db", kg=ring_kg(valid=0))


# -- the command ----------------------------------------------------------------------------------


def invoke(*arguments):
    result = CliRunner().invoke(command_line, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_writes_settings_that_fit_takes(tmp_path, folder):
    fixed = {key: value for key, value in SMALL.items() if key not in ("dim", "learning_rate")}
    small = [item for pair in fixed.items() for item in ("--set", "{}={}".format(*pair))]
    text = "dim: [4, 8]\nlearning_rate: {low: 1e-3, high: 1e-1, log: true}\n"
    space = write_folder(tmp_path, {"space.yaml": text}) / "space.yaml"
    study = tmp_path / "studies" / "ring.db"
    output = invoke("tune", folder, "--study", study, "--trials", 2, "--space", space, *small)
    best = tmp_path / "studies" / "ring.yaml"
    assert f"Best settings: {best}" in output
    assert output.count("done after 2 epochs") == 2
    values = yaml.safe_load(best.read_text())
    assert values["dim"] in (4, 8)
    assert values["epochs"] == 2
    invoke("fit", folder, "--settings", best, "--out", tmp_path / "run")
    assert ig.load(tmp_path / "run").settings.dim == values["dim"]


def test_the_command_that_is_stopped_writes_the_best_so_far(tmp_path, folder, monkeypatch):
    from imvia_graph import tuning

    calls = []

    def stopped_later(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ig.fit(*args, **options)

    monkeypatch.setattr(tuning, "fit", stopped_later)
    command = ["tune", folder, "--study", tmp_path / "s.db", "--trials", 9, "--epochs", 1]
    command += ["--set", "dim=4", "--device", "cpu"]
    result = CliRunner().invoke(command_line, list(map(str, command)))
    assert result.exit_code == 130
    assert "Run the same command again to resume" in result.output
    best = yaml.safe_load((tmp_path / "s.yaml").read_text())
    assert best["dim"] == 4
    assert "device" not in best
    assert len(calls) == 3


def test_the_command_is_stopped_by_time_and_says_when_there_is_nothing_yet(tmp_path, folder):
    output = invoke("tune", folder, "--study", tmp_path / "s.db", "--timeout", 0)
    assert "No trial was finished" in output
    assert not (tmp_path / "s.yaml").exists()


def test_without_optuna_the_error_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['optuna'] = None; import imvia_graph; imvia_graph.tune('x', 'y')"
    )
    result = run_python("-c", code, cwd=tmp_path)
    assert "imvia-graph[tune]" in result.stderr
