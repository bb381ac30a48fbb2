"""The command line: what it prints, where it writes, and how it fails."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy
import polars as pl
import pytest
import torch
from click.testing import CliRunner
from helpers import TINY, contents, differing_tensors, ring_kg, run_python, write_folder
from rich.console import Console

import imvia_graph as ig
from imvia_graph.cli import COMMANDS, command_line, main
from imvia_graph.cli.display import relations_table, results

METRICS = ["mrr", "mr", "hits@1", "hits@3", "hits@10", "hits@100"]
#: --set of a model that trains in no time.
SET = [
    argument
    for key, value in TINY.items()
    if key not in ("epochs", "device")
    for argument in ("--set", f"{key}={value}")
]


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A KG folder."""
    return ring_kg().save(tmp_path_factory.mktemp("graphs") / "ring")


@pytest.fixture(scope="module")
def run(tmp_path_factory, graph):
    """A run folder that `fit` wrote; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "ring"
    result = invoke("fit", graph, "--out", out, "--epochs", 3, *SET)
    assert result.exit_code == 0, result.output
    return out


class Result:
    """What a command printed and how it ended."""

    def __init__(self, exit_code, stdout, stderr):
        self.exit_code, self.stdout, self.stderr = exit_code, stdout, stderr
        self.output = stdout + stderr


def invoke(*arguments) -> Result:
    """Run a command through click's runner, errors shown as `main` shows them."""
    runner = CliRunner(env={"COLUMNS": "200"})

    # `main` turns errors into paragraphs; the runner calls whatever has a `main` of click's form.
    class Command:
        name = "imvia-graph"

        def main(self, args, prog_name, **_):
            return main(list(args))

    done = runner.invoke(Command(), [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Result(done.exit_code, done.stdout, done.stderr)


def assert_one_paragraph(result, message):
    """An error for people: exit code 2, one paragraph, no traceback."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    error = result.stderr[result.stderr.index("Error: ") :]
    assert "\n\n" not in error.strip()
    assert re.search(message, error), error


# -- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_examples(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Usage: imvia-graph {command}" in result.stdout
    assert "Examples:" in result.stdout
    examples = result.stdout[result.stdout.index("Examples:") :]
    assert re.search(rf"^    (\S+=\S+ )?imvia-graph {command}\b", examples, re.MULTILINE)


def test_help_lists_every_command_with_what_it_is_for():
    result = invoke("-h")
    assert result.exit_code == 0
    listed = " ".join(result.stdout.split("Commands:")[1].split())  # long lines are wrapped
    for name, text in COMMANDS.items():
        assert f"{name} {text}" in listed
    assert "imvia-graph fit countries --out" in result.stdout


def test_every_command_that_is_listed_exists_under_its_name():
    for name in COMMANDS:
        command = command_line.get_command(None, name)
        assert command.name == name
        assert command.help


def test_version_is_printed():
    assert invoke("--version").stdout == f"imvia-graph, version {ig.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["nonsense"], ["datasets", "--json"]]
)
def test_what_needs_no_torch_does_not_wait_for_it(arguments, tmp_path):
    program = (
        "import sys\nfrom imvia_graph.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'dgl', 'polars', 'pandas'} & set(sys.modules)\n"
        "print('loaded:', *sorted(heavy), file=sys.stderr)\n"
    )
    done = run_python("-c", program, *arguments, cwd=tmp_path)
    loaded = done.stderr.splitlines()[-1].split()
    assert loaded[0] == "loaded:"
    assert loaded == ["loaded:"]


def test_neither_help_nor_a_wrong_option_waits_for_torch(tmp_path):
    program = (
        "import sys\nfrom imvia_graph.cli import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    for option in ('--help', '--nonsense'):\n"
        "        try:\n            main([name, option])\n"
        "        except SystemExit:\n            pass\n"
        "        heavy = {'torch', 'dgl', 'polars', 'pandas'} & set(sys.modules)\n"
        "        print('loaded:', name, *sorted(heavy), file=sys.stderr)\n"
    )
    done = run_python("-c", program, cwd=tmp_path)
    said = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("loaded:")]
    assert sorted(said) == sorted(2 * [[name] for name in COMMANDS])


def test_importing_the_package_imports_no_torch(tmp_path):
    program = "import sys, imvia_graph; print(sorted({'torch', 'dgl'} & set(sys.modules)))"
    assert run_python("-c", program, cwd=tmp_path).stdout == "[]\n"


def test_predicting_does_not_wait_for_what_it_does_not_use(tmp_path):
    program = (
        "import sys, imvia_graph as ig; kg = ig.load_kg('countries'); settings = ig.Settings();"
        "run = ig.Run(ig.IMVIA.from_kg(kg, settings), kg, settings, ig.training.Progress());"
        "run.predict(head='France', relation='borders'); run.evaluate();"
        "print(sorted({'dgl', 'networkx', 'sympy', 'torch._dynamo'} & set(sys.modules)))"
    )
    done = run_python("-c", program, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("said", "spins"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "70"}, "70"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
    ],
)
def test_waiting_threads_give_their_cores_away_unless_told_otherwise(
    said, spins, tmp_path, monkeypatch
):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["-m", "imvia_graph", "inspect", "countries"]
    done = run_python(*arguments, cwd=tmp_path, OMP_DISPLAY_ENV="verbose", **said)
    if "GOMP_" not in done.stderr:
        pytest.skip("torch computes on threads of another library than GNU OpenMP")
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


@pytest.mark.parametrize(
    ("cores", "said", "threads"), [(8, None, "4"), (1, None, "1"), (8, "3", "3")]
)
def test_processes_of_one_machine_share_its_cores(cores, said, threads, monkeypatch, tmp_path):
    found = []

    def launch(config, program):
        return lambda *arguments: found.append(os.environ["OMP_NUM_THREADS"])

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", launch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    # Set first, so that what the command sets is undone.
    monkeypatch.setenv("OMP_NUM_THREADS", said or "")
    if said is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    done = invoke("fit", "countries", "--processes", "2", "--out", str(tmp_path / "run"))
    assert done.exit_code == 0
    assert found == [threads]


# -- fit ------------------------------------------------------------------------------------------


def test_fit_writes_a_run_that_loads_and_its_test_metrics(run, graph):
    loaded = ig.load(run)
    assert loaded.settings.dim == TINY["dim"]
    assert loaded.progress.epoch <= 3
    assert loaded.kg.name == "ring"
    metrics = json.loads((run / "test.json").read_text())
    assert metrics == loaded.evaluate("test")


def test_fit_says_what_it_trains_on_how_it_went_and_where_it_wrote(tmp_path, graph):
    result = invoke("fit", graph, "--out", tmp_path / "run", "--epochs", 2, *SET)
    assert result.exit_code == 0
    assert result.stdout == f"Run folder: {tmp_path / 'run'}\n"
    assert "12 entities, 2 relations, 18 train, 3 valid, 3 test" in result.stderr
    assert re.search(r"epoch 2/2  loss [\d.]+  valid MRR [\d.]+ %", result.stderr)
    assert re.search(r"Trained 2 epochs in \d+ s: all epochs are done; the best", result.stderr)
    assert "ring: test, filtered" in result.stderr


def test_fit_says_that_the_last_epoch_is_kept_where_there_is_nothing_to_validate(tmp_path):
    graph = ring_kg(valid=0, test=0).save(tmp_path / "ring")
    result = invoke("fit", graph, "--out", tmp_path / "run", "--epochs", 1, *SET)
    assert result.exit_code == 0
    told = " ".join(result.stderr.split())
    assert "nothing was validated, the last epoch is kept" in told
    assert not (tmp_path / "run" / "test.json").exists()


def test_fit_says_that_patience_ended_it(tmp_path, graph):
    still = ["learning_rate=1e-30", "table_optimizer=same", "batch_norm=false", "patience=2"]
    still = [part for change in still for part in ("--set", change)]
    result = invoke("fit", graph, "--out", tmp_path / "run", "--epochs", 9, *SET, *still)
    assert "Trained 3 epochs" in result.stderr
    told = " ".join(result.stderr.split())
    assert "no better validation MRR for 2 validations; the best epoch is 1" in told


def test_fit_without_out_takes_the_first_free_run_folder(tmp_path, graph, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        result = invoke("fit", graph, "--epochs", 0, *SET)
        assert result.stdout == f"Run folder: runs/ring-{number}\n"
        assert (tmp_path / "runs" / f"ring-{number}" / "run.json").is_file()


def test_options_go_over_set_goes_over_the_settings_file(tmp_path, graph):
    (tmp_path / "s.toml").write_text("epochs = 9\nseed = 9\ndim = 4\n")
    arguments = ["--settings", tmp_path / "s.toml", *SET, "--set", "seed=5", "--epochs", 1]
    assert invoke("fit", graph, "--out", tmp_path / "run", *arguments).exit_code == 0
    settings = ig.load(tmp_path / "run").settings
    assert (settings.epochs, settings.seed, settings.dim) == (1, 5, TINY["dim"])


def test_the_command_and_the_function_train_the_same_model(tmp_path, graph):
    invoke("fit", graph, "--out", tmp_path / "cli", "--epochs", 2, "--seed", 3, *SET)
    ig.fit(graph, out=tmp_path / "python", **{**TINY, "epochs": 2, "seed": 3, "device": "auto"})
    assert (
        differing_tensors(
            tmp_path / "cli" / "last.safetensors", tmp_path / "python" / "last.safetensors"
        )
        == []
    )
    assert contents(tmp_path / "cli" / "kg") == contents(tmp_path / "python" / "kg")


@pytest.mark.parametrize("validation", ["auto", "published", "held-out"])
def test_validation_of_the_command_is_that_of_the_function(validation, tmp_path):
    kg = ring_kg(60, valid=0)
    graph = kg.replace(valid=kg.train[:4]).save(tmp_path / "ring")
    arguments = ["--validation", validation, "--epochs", 0, *SET]
    assert invoke("fit", graph, "--out", tmp_path / "run", *arguments).exit_code == 0
    trained_on = ig.load(tmp_path / "run").kg
    expected = ig.load_kg(graph, validation)
    assert torch.equal(trained_on.train, expected.train)
    assert torch.equal(trained_on.valid, expected.valid)
    assert trained_on.notes == expected.notes


def test_fit_tells_where_validation_was_held_out_for_a_leak(tmp_path, caplog):
    kg = ring_kg(60, valid=0)
    graph = kg.replace(valid=kg.train[:4]).save(tmp_path / "ring")
    with caplog.at_level("WARNING"):
        invoke("fit", graph, "--out", tmp_path / "run", "--epochs", 0, *SET)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1  # once, and not again when the run begins
    assert "ring: 4 of the 4 distinct published validation triples are in train" in told[0]


#: A table with a header and its columns in an order of its own, and how to read it.
OWN_TABLE = "id;whom;who;how\n" + "".join(f"{i};e{(i + 1) % 9};e{i};next\n" for i in range(9))
READING = ["--from", "csv", "--separator", ";", "--columns", "who,how,whom", "--split", "none"]


@pytest.mark.parametrize(
    ("command", "out"),
    [
        (["fit", "--epochs", "1", *SET, "--out", "out"], "out/kg"),
        (["encode", "--texts", "texts.tsv", "--encoder", "minilm", "--out", "out"], "out"),
        (["convert", "--to", "kg"], "out"),
        (["inspect", "--json"], None),
    ],
    ids=lambda value: value[0] if value else "",
)
def test_a_source_is_read_as_told_whatever_the_command(command, out, tmp_path, monkeypatch):
    monkeypatch.chdir(write_folder(tmp_path, {"facts.data": OWN_TABLE, "texts.tsv": "e1\tone\n"}))
    target = ["out"] if command[0] == "convert" else []
    result = invoke(*command, "facts.data", *target, *READING)
    assert result.exit_code == 0, result.output
    if out is None:
        assert json.loads(result.stdout)["triples"]["train"]["triples"] == 9
        return
    kg = ig.MultiViewKG.load(out)
    facts = {(kg.entities[h], kg.relations[r], kg.entities[t]) for h, r, t in kg.train.tolist()}
    assert facts == {(f"e{i}", "next", f"e{(i + 1) % 9}") for i in range(9)}


@pytest.mark.parametrize(
    "command",
    [
        ["fit", "--epochs", "1", *SET, "--out", "out"],
        ["inspect", "--json"],
        ["tune", "--study", "study.db", "--timeout", "0"],
    ],
    ids=lambda value: value[0],
)
def test_views_of_unknown_entities_can_be_left_out_as_the_error_says(
    command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    ring_kg().save("graph")
    numpy.savez("look.npz", feat=numpy.ones((2, 3), "float32"), entity=["e1", "nobody"])
    given = [*command, "graph", "--views", "look=look.npz"]
    refused = invoke(*given)
    assert refused.exit_code != 0
    assert "--skip-unknown" in refused.stderr
    assert invoke(*given, "--skip-unknown").exit_code == 0


def test_a_run_on_a_source_that_was_read_as_told_needs_the_source_no_more(tmp_path):
    path = write_folder(tmp_path, {"facts.data": OWN_TABLE}) / "facts.data"
    out = tmp_path / "run"
    assert invoke("fit", path, *READING, "--out", out, "--epochs", 1, *SET).exit_code == 0
    path.unlink()
    assert invoke("fit", "--resume", "--out", out, "--epochs", 2).exit_code == 0
    assert invoke("evaluate", out, "--split", "train").exit_code == 0


def test_resume_goes_on_with_a_run(tmp_path, graph):
    invoke("fit", graph, "--out", tmp_path / "run", "--epochs", 1, *SET)
    result = invoke("fit", "--resume", "--out", tmp_path / "run", "--epochs", 2)
    assert result.exit_code == 0
    assert ig.load(tmp_path / "run").settings.epochs == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_test_metrics_of_an_older_model_do_not_stay(tmp_path, graph):
    out = tmp_path / "run"
    invoke("fit", graph, "--out", out, "--epochs", 1, *SET, "--set", "patience=null")
    assert json.loads((out / "test.json").read_text()) == ig.load(out).evaluate()
    ig.fit(out=out, resume=True, epochs=8, patience=None)
    assert ig.load(out).progress.best_epoch > 1
    assert not (out / "test.json").exists()
    assert invoke("fit", "--resume", "--out", out).exit_code == 0
    assert json.loads((out / "test.json").read_text()) == ig.load(out).evaluate()


@pytest.mark.parametrize("other", [["countries"], ["--columns", "0,2,1"]], ids=["source", "how"])
def test_resume_refuses_a_source_that_is_not_the_runs(other, tmp_path, run):
    copy = write_folder(tmp_path / "run", contents(run))
    before = contents(copy)
    result = invoke("fit", *other, "--resume", "--out", copy, "--epochs", 4)
    assert result.exit_code == 2
    assert "leave out SOURCE, --views" in result.stderr
    assert contents(copy) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_leaves_a_run_that_resumes_and_says_how(tmp_path, graph):
    arguments = ["fit", str(graph), "--out", "run", "--epochs", "100000", *SET]
    process = subprocess.Popen(
        [sys.executable, "-m", "imvia_graph", *arguments, "--set", "patience=null"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "Stopped. Resume with: imvia-graph fit --resume --out run" in errors
    trained = len(metrics.read_text().splitlines())
    epochs = trained + 2
    result = invoke("fit", "--resume", "--out", tmp_path / "run", "--epochs", epochs)
    assert result.exit_code == 0
    lines = metrics.read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, epochs + 1))


# -- evaluate and predict -------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_evaluate_prints_one_json_object_of_fractions(split, run):
    result = invoke("evaluate", run, "--split", split, "--json")
    assert result.exit_code == 0
    metrics = json.loads(result.stdout)
    assert set(metrics) == {"both", "head", "tail", "heads", "relations", "candidates"}
    assert list(metrics["heads"]) == ["structure", "image", "text", "joint", "complex"]
    parts = [metrics["both"], metrics["head"], metrics["tail"], *metrics["heads"].values()]
    for part in parts:
        assert list(part) == METRICS
        assert all(0 <= part[key] <= 1 for key in METRICS if key != "mr")
        assert part["mr"] >= 1
    for part in metrics["relations"].values():
        assert [*METRICS, "triples"] == list(part)
    assert metrics == ig.load(run).evaluate(split)


def test_evaluate_shows_a_table_in_per_cent(run):
    metrics = ig.load(run).evaluate("test")
    result = invoke("evaluate", run, "--relations")
    assert result.exit_code == 0
    assert "ring: test, filtered, against all 12 entities" in result.output
    cells = re.search(r"│ all +│(.*)│", result.output).group(1).split("│")
    shown = [float(cell) for cell in cells]
    both = [metrics["both"][key] * (1 if key == "mr" else 100) for key in METRICS]
    assert shown == pytest.approx(both, abs=0.051)
    for row in ("predict heads", "predict tails", "structure head", "text head", "joint head"):
        assert f"│ {row} " in result.output
    assert re.search(r"│ opposite +│ +\d+ │", result.output)
    assert re.search(r"┃ relation +┃ triples ┃ MRR % ┃ +H@1 % ┃ +H@3 % ┃ +H@10 % ┃", result.output)


def test_the_table_by_relation_shows_display_names():
    metrics = {"relations": {"P58": {**dict.fromkeys(METRICS, 0.5), "triples": 3}}}
    table = relations_table(metrics, {"P58": "screenwriter"})
    assert list(table.columns[0].cells) == ["screenwriter"]


@pytest.mark.parametrize(
    ("command", "options", "task"),
    [
        ("evaluate", [], "Queries ranked"),
        ("export", ["--predictions", "--relation", "after", "--out"], "Queries answered"),
    ],
)
def test_on_a_terminal_a_bar_says_how_far_the_queries_are(
    command, options, task, run, tmp_path, monkeypatch
):
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=100)
    monkeypatch.setattr("imvia_graph.cli.display.console", terminal)
    out = [tmp_path / "answers.tsv"] if options else []
    assert invoke(command, run, *options, *out).exit_code == 0
    plain = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", shown.getvalue())
    done, total = re.findall(rf"{task}.* (\d+)/(\d+)", plain)[-1]
    assert done == total


def test_evaluate_ranks_the_triples_of_a_file_and_writes_each_rank(run, tmp_path):
    loaded = ig.load(run)
    kg = loaded.kg
    rows = loaded.rank().frame(kg).select("head", "relation", "tail").rows()[:4:2]
    listed, ranks = tmp_path / "mine.tsv", tmp_path / "ranks.parquet"
    listed.write_text("".join("\t".join(row) + "\n" for row in rows))
    result = invoke("evaluate", run, "--triples", listed, "--ranks", ranks, "--json")
    ranking = loaded.rank(triples=kg.test[:2])
    assert json.loads(result.stdout) == ranking.metrics(kg.relations)
    assert pl.read_parquet(ranks).equals(ranking.frame(kg))
    assert_one_paragraph(invoke("evaluate", run, "--ranks", ranks), "exists")
    assert_one_paragraph(invoke("evaluate", run, "--ranks", tmp_path / "a.txt"), r"suffix of \.tsv")
    listed.write_text("\t".join(rows[0]) + "\n\nnobody\tknows\n")
    result = invoke("evaluate", run, "--triples", listed)
    assert_one_paragraph(result, r"mine\.tsv, line 3: expected head, relation and tail")


def test_evaluate_among_drawn_or_listed_entities_says_so(run, tmp_path):
    loaded = ig.load(run)
    result = invoke("evaluate", run, "--candidates", 5, "--json")
    assert result.exit_code == 0
    metrics = json.loads(result.stdout)
    assert metrics["candidates"] == f"5 entities drawn with seed {loaded.settings.seed}"
    assert metrics == loaded.evaluate(candidates=5)
    assert metrics["both"]["mr"] < loaded.evaluate()["both"]["mr"]
    listed = tmp_path / "some.txt"
    listed.write_text("e3\n\n e7 \ne3\n")
    result = invoke("evaluate", run, "--candidates", listed)
    assert result.exit_code == 0
    assert "ring: test, filtered, against 2 entities given" in result.output
    expected = loaded.evaluate(candidates=torch.tensor([3, 7]))
    assert f" {expected['both']['mr']:.1f} " in result.output


def test_an_unknown_candidate_is_an_error_that_names_file_and_line(run, tmp_path):
    listed = tmp_path / "some.txt"
    listed.write_text("e3\ne33\n")
    result = invoke("evaluate", run, "--candidates", listed)
    assert_one_paragraph(result, r"some\.txt, line 2: Unknown entity 'e33' .*'e3'")


def test_predict_prints_one_json_list_that_is_what_the_function_gives(run):
    loaded = ig.load(run)
    query = ["--relation", "opposite", "--head", "e3"]
    result = invoke("predict", run, *query, "--top", 4, "--json")
    assert result.exit_code == 0
    answers = json.loads(result.stdout)
    expected = loaded.predict(head="e3", relation="opposite", k=4)
    assert answers == [answer._asdict() for answer in expected]
    assert list(answers[0]) == ["entity", "name", "score", "heads", "known"]
    assert len(answers) == 4

    known = json.loads(
        invoke("predict", run, *query, "--top", 99, "--known", "--self", "--json").stdout
    )
    assert [answer["entity"] for answer in known if answer["known"]] == ["e9"]
    assert len(known) == 12

    heads = invoke("predict", run, "--relation", "after", "--tail", "e3", "--json").stdout
    assert json.loads(heads)[0]["entity"] == loaded.predict(tail="e3", relation="after")[0].entity


@pytest.mark.parametrize("top", ["99999999999999999999", str(2**62)])
def test_more_answers_than_there_are_entities_may_be_asked_for(top, run):
    options = ("--head", "e1", "--relation", "after", "--json", "--known", "--self")
    assert len(json.loads(invoke("predict", run, *options, "--top", top).stdout)) == 12


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--hold", "nan", "expected a number of GiB, received nan"),
        ("--hold", "inf", "not in the range"),
        ("--hold", "1e300", "not in the range"),
        ("--host", "", "expected an address"),
        ("--host", "  ", "expected an address"),
    ],
)
def test_what_the_explorer_cannot_do_is_a_usage_error(option, value, message, run):
    result = invoke("explore", run, option, value)
    assert result.exit_code == 2
    assert option in result.stderr
    assert message in result.stderr


def test_predict_shows_a_table_with_known_facts_marked(run):
    query = ["--head", "e3", "--relation", "opposite"]
    result = invoke("predict", run, *query, "--top", 12, "--known")
    assert result.exit_code == 0
    assert "(e3, opposite, ?)" in result.stdout
    assert result.stdout.count("[known]") == 1
    assert re.search(r"│ +\d+ │ e9 \[known\] +│", result.stdout)
    assert "joint" in result.stdout
    assert "[known]" not in invoke("predict", run, *query).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "RUN", "--out", "-", "--format", "npz"),
        ("export", "RUN", "--out", "x.tsv", "--queries", "-"),
        ("report", "RUN", "--out", "-"),
        ("convert", "countries", "-"),
    ],
)
def test_a_minus_is_no_file(arguments, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*(run if argument == "RUN" else argument for argument in arguments))
    assert result.exit_code == 2
    assert "standard input and output are not supported; name a file" in result.stderr
    assert not contents(tmp_path)


@pytest.mark.parametrize(("columns", "heads"), [(20, 0), (40, 0), (72, 0), (80, 5), (200, 5)])
def test_predict_cuts_no_number_on_a_narrow_terminal(columns, heads, run, monkeypatch):
    monkeypatch.setattr(results, "width", columns)
    answers = ig.load(run).predict(head="e3", relation="opposite", k=10)
    query = ["--head", "e3", "--relation", "opposite"]
    shown = invoke("predict", run, *query).stdout
    for place, answer in enumerate(answers, 1):
        scores = [answer.score, *list(answer.heads.values())[:heads]]
        numbers = " +│ +".join(re.escape(f"{score:.3f}") for score in scores)
        name = answer.name[:2]  # at 20 columns the rest is in the next line
        assert re.search(rf"│ +{place} │ {name}\d? +│ +{numbers} │\n", shown), shown


def test_labels_like_console_markup_are_shown_as_they_are(tmp_path):
    kg = ring_kg()
    labels = [f"[bold]e{i}[/bold]" for i in range(12)]
    kg = kg.replace(entities=labels, entity_names=labels, name="[red]ring")
    folder = kg.save(tmp_path / "ring")
    result = invoke("fit", folder, "--out", tmp_path / "run", "--epochs", 0, *SET)
    assert result.exit_code == 0
    assert "[red]ring: test" in result.stderr
    query = ["--head", labels[3], "--relation", "after", "--top", 12, "--known"]
    shown = invoke("predict", tmp_path / "run", *query).stdout
    assert "([bold]e3[/bold], after, ?)" in shown
    assert "[bold]e7[/bold]" in shown, shown


# -- datasets and settings ------------------------------------------------------------------------


def test_datasets_says_which_are_there_and_where_to_get_the_others(tmp_path, monkeypatch):
    (tmp_path / "MKG-W").mkdir()
    monkeypatch.setenv("IMVIA_DATA", str(tmp_path))
    result = invoke("datasets", "--json")
    assert result.exit_code == 0
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert list(rows) == ["countries", "DB15K", "MKG-W", "MKG-Y"]
    there = {name: row["there"] for name, row in rows.items()}
    assert there == {"countries": True, "DB15K": False, "MKG-W": True, "MKG-Y": False}
    assert rows["DB15K"]["folder"] == str(tmp_path / "DB15K")
    table = invoke("datasets").output
    assert re.search(r"│ countries .*│ built in", table)
    assert re.search(r"│ DB15K .*│ no ", table)
    assert re.search(r"│ MKG-W .*│ yes ", table)
    assert f"DB15K: get it from {rows['DB15K']['origin']}" in table


def test_settings_prints_each_setting_under_what_it_is_for():
    result = invoke("settings")
    assert result.exit_code == 0
    assert result.stdout == ig.Settings().to_yaml(comments=True)


# -- errors ---------------------------------------------------------------------------------------

ERRORS = {
    "an unknown data set": (["fit", "nowhere"], "'nowhere' is neither a file, a folder nor a data"),
    "no source": (["fit"], "SOURCE is missing"),
    "an unknown setting": (["fit", "GRAPH", "--set", "dimm=3"], "did you mean 'dim'"),
    "a wrong value": (["fit", "GRAPH", "--set", "dim=wide"], "Setting dim: .*integer"),
    "a negative number of epochs": (["fit", "GRAPH", "--epochs", "-1"], "Setting epochs"),
    "an assignment without =": (["fit", "GRAPH", "--set", "dim"], "expected key=value"),
    "a missing settings file": (["fit", "GRAPH", "--settings", "no.yaml"], "no.yaml cannot be rea"),
    "an unknown device": (["fit", "GRAPH", "--device", "abacus", "--out", "OUT"], "'abacus'"),
    "an unknown modality": (
        ["fit", "GRAPH", "--set", "modalities=[video]", "--out", "OUT"],
        "no views of 'video'; it has 'image', 'text'",
    ),
    "an unknown validation": (["fit", "GRAPH", "--validation", "none"], "none"),
    "resume without out": (["fit", "--resume"], "--out"),
    "resume of nothing": (["fit", "--resume", "--out", "OUT"], "does not exist"),
    "resume with another setting": (
        ["fit", "--resume", "--out", "RUN", "--set", "dim=99"],
        "Setting dim: the run in .* has 8",
    ),
    "an out folder that is not empty": (["fit", "GRAPH", "--out", "RUN"], "not empty; --resume"),
    "an out folder below a file": (["fit", "GRAPH", "--out", "RUN/run.json/x"], "run.json"),
    "no run": (["evaluate", "OUT"], "does not exist"),
    "no run to predict with": (
        ["predict", "GRAPH", "--head", "e1", "--relation", "after"],
        "holds no run",
    ),
    "an unknown split": (["evaluate", "RUN", "--split", "dev"], "'dev'"),
    "no candidates": (["evaluate", "RUN", "--candidates", "0"], "candidates: .* at least 1"),
    "candidates of a file that is not there": (
        ["evaluate", "RUN", "--candidates", "OUT"],
        "there is no such file",
    ),
    "an unknown entity": (
        ["predict", "RUN", "--head", "ee11", "--relation", "after"],
        "Unknown entity 'ee11'.*'e11'",
    ),
    "an unknown relation": (["predict", "RUN", "--head", "e1", "--relation", "aftr"], "'after'"),
    "neither head nor tail": (["predict", "RUN", "--relation", "after"], "either --head or --tail"),
    "both head and tail": (
        ["predict", "RUN", "--relation", "after", "--head", "e1", "--tail", "e2"],
        "either --head or --tail",
    ),
    "no relation": (["predict", "RUN", "--head", "e1"], "--relation"),
    "no answers at all": (
        ["predict", "RUN", "--head", "e1", "--relation", "after", "--top", "0"],
        "0",
    ),
    "an unknown command": (["train", "GRAPH"], "No such command 'train'"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_an_error_is_one_paragraph_and_exit_code_2(
    arguments, message, graph, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = {"GRAPH": str(graph), "RUN": str(run), "OUT": str(tmp_path / "out")}
    before = contents(run)
    filled = [re.sub("GRAPH|RUN|OUT", lambda m: places[m[0]], part) for part in arguments]
    assert_one_paragraph(invoke(*filled), message)
    assert contents(run) == before
    assert list(tmp_path.iterdir()) == []  # nothing is left of a command that failed


def test_a_malformed_graph_is_an_error_that_names_file_and_line(tmp_path):
    folder = write_folder(tmp_path / "graph", {"train.tsv": "a\tr\tb\na\tr\n"})
    result = invoke("fit", folder, "--out", tmp_path / "run")
    assert_one_paragraph(result, r"train\.tsv, line 2: expected three columns")
    assert not (tmp_path / "run").exists()


def test_with_debug_an_error_keeps_its_traceback(tmp_path):
    with pytest.raises(ig.CheckpointError, match="does not exist"):
        main(["--debug", "evaluate", str(tmp_path / "none")])


@pytest.mark.slow
def test_errors_of_the_process_go_to_stderr_and_debug_shows_the_traceback(tmp_path):
    plain = run_python("-m", "imvia_graph", "evaluate", "none", cwd=tmp_path)
    assert plain.returncode == 2
    assert plain.stdout == ""
    assert plain.stderr == "Error: none does not exist; expected a folder that `fit` wrote.\n"
    debug = run_python("-m", "imvia_graph", "--debug", "evaluate", "none", cwd=tmp_path)
    assert debug.returncode != 0
    assert "Traceback (most recent call last)" in debug.stderr
    assert "CheckpointError: none does not exist" in debug.stderr


@pytest.mark.slow
def test_a_process_fits_and_predicts_on_the_countries(tmp_path):
    def imvia(*arguments):
        done = run_python("-m", "imvia_graph", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done

    tiny = ["--epochs", "1", "--set", "dim=8", "--device", "cpu"]
    done = imvia("fit", "countries", "--validation", "held-out", *tiny)
    assert done.stdout == "Run folder: runs/countries-1\n"
    assert "held out of train, pair by pair (seed 0)" in " ".join(done.stderr.split())
    query = ["--head", "France", "--relation", "borders", "--json"]
    answers = json.loads(imvia("predict", "runs/countries-1", *query).stdout)
    assert len(answers) == 10
    assert not any(answer["known"] for answer in answers)


# -- what stands in the way is said before anything is made ----------------------------------------


def test_a_backend_that_the_device_has_not_is_refused_before_there_is_a_run(graph, tmp_path):
    out = tmp_path / "run"
    result = invoke("fit", graph, "--out", out, "--device", "cpu", *SET, "--set", "backend=triton")
    assert_one_paragraph(result, "Setting backend: 'triton' is not available on cpu")
    assert not out.exists()


def test_a_model_that_memory_does_not_hold_is_refused(graph, tmp_path):
    result = invoke("fit", graph, "--out", tmp_path / "run", *SET, "--set", "dim=100000000000000")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "Out of memory while making the model" in result.stderr


def test_settings_files_go_over_each_other(graph, tmp_path):
    (tmp_path / "one.yaml").write_text("epochs: 2\nloss: binary\n")
    (tmp_path / "two.yaml").write_text("epochs: 1\n")
    files = ["--settings", tmp_path / "one.yaml", "--settings", tmp_path / "two.yaml"]
    result = invoke("fit", graph, "--out", tmp_path / "run", *files, *SET)
    assert result.exit_code == 0, result.output
    chosen = ig.load(tmp_path / "run").settings
    assert (chosen.loss, chosen.epochs) == ("binary", 1)


def test_candidates_that_are_neither_a_number_nor_a_file_are_refused(run, tmp_path):
    for value in ("10k", "-5", tmp_path / "none.txt"):
        result = invoke("evaluate", run, "--candidates", value)
        assert_one_paragraph(result, "expected a number, 1 or more, or a file of entity labels")
    (tmp_path / "blank.txt").write_text("\n \n")
    result = invoke("evaluate", run, "--candidates", tmp_path / "blank.txt")
    assert_one_paragraph(result, "expected entity labels, one per line; the file has none")


def test_a_file_is_no_run_folder(graph, tmp_path):
    (tmp_path / "file").touch()
    result = invoke("fit", graph, "--out", tmp_path / "file", *SET)
    assert_one_paragraph(result, "file is a file; expected a folder to write")
