"""What the documentation says is so: its Python runs, its commands exist, its pages are built."""

import doctest
import re
import shlex

import click
import pytest
import torch
from helpers import ROOT, run_python

import imvia_graph as ig
from imvia_graph.cli import command_line
from imvia_graph.settings import Settings

DOCS = ROOT / "docs"
PAGES = ["../README.md", *sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))]


def blocks(page, *languages):
    text = (DOCS / page).read_text("utf-8")
    found = re.findall(r"^```(\S*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in languages]


def commands_of(page):
    """The command lines of a page's shell blocks, tagged as such or not tagged."""
    lines = "".join(blocks(page, "sh", "")).replace("\\\n", " ").splitlines()
    lines = [line.removeprefix(".venv/bin/") for line in lines]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("imvia-graph ")]


WITH_PYTHON = [page for page in PAGES if blocks(page, "pycon")]
WITH_COMMANDS = [page for page in PAGES if commands_of(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON)
@pytest.mark.filterwarnings("ignore:Dataloader CPU affinity")
def test_python_of_a_page_runs_and_gives_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    examples = doctest.DocTestParser().get_doctest(
        "".join(blocks(page, "pycon")), {}, page, str(DOCS / page), 0
    )
    assert examples.examples
    assert doctest.DocTestRunner().run(examples).failed == 0


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_of_a_page_are_understood(page):
    """Options and their values are parsed; nothing is run."""
    for _, name, *arguments in commands_of(page):
        command = command_line.get_command(click.Context(command_line), name)
        assert command is not None, name
        if ">" in arguments:
            arguments = arguments[: arguments.index(">")]
        for place, argument in enumerate(arguments):
            if argument == "--set":
                Settings.create(Settings.parse([arguments[place + 1]]))
        # Paths need not be there.
        for parameter in command.params:
            if isinstance(parameter.type, click.Path):
                parameter.type.exists = False
        command.make_context(name, list(arguments))


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_library_that_a_page_uses_are_there(page):
    text = (DOCS / page).read_text("utf-8")
    names = set(re.findall(r"\b(?:ig|imvia_graph)((?:\.[A-Za-z]\w*)+)", text))
    for name in names - {".cli", ".encoders"}:  # a module without torch, a group of entry points
        found = ig
        for part in name[1:].split("."):
            found = getattr(found, part)
    for block in blocks(page, "python"):
        compile(block, page, "exec")


def test_files_that_the_readme_links_to_are_there():
    targets = re.findall(r"\]\((?!http)([^)#]*)", (ROOT / "README.md").read_text("utf-8"))
    assert targets
    assert not [target for target in targets if target and not (ROOT / target).exists()]


def test_scripts_that_pages_show_are_there():
    text = "".join((DOCS / page).read_text("utf-8") for page in PAGES)
    shown = set(re.findall(r"\.\./examples/(\w+\.py)", text))
    assert shown == {path.name for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.slow
def test_documentation_is_built_without_warnings(tmp_path):
    pytest.importorskip("furo")
    pytest.importorskip("sphinx")
    arguments = ["-q", "-E", "-W", "--keep-going", "-d", str(tmp_path / "doctrees")]
    out = str(tmp_path / "html")
    result = run_python("-m", "sphinx", *arguments, str(DOCS), out, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    settings = (tmp_path / "html" / "settings.html").read_text("utf-8")
    assert all(f">{name}<" in settings for name in Settings.model_fields)
    commands = (tmp_path / "html" / "command-line.html").read_text("utf-8")
    names = command_line.list_commands(click.Context(command_line))
    assert all(f'id="imvia-graph-{name}"' in commands for name in names)
