"""README's "your own graph, in ten lines" is run as it stands there, on data made here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

import imvia_graph as ig

PEOPLE = ["Ada Lovelace", "Charles Babbage", "Mary Somerville", "Augustus De Morgan"]
WORKS = ["Analytical Engine", "Difference Engine", "Notes"]


def blocks():
    """The two fenced blocks behind the marker, by their language."""
    text = (ROOT / "README.md").read_text("utf-8").partition("<!-- tests/test_own_kg.py runs")[2]
    return dict(re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[:2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What README says there is: facts.tsv, images/, texts.tsv."""
    folder = tmp_path_factory.mktemp("own")
    facts = [(one, "knows", other) for one in PEOPLE for other in PEOPLE if one < other]
    facts += [(person, "wrote about", work) for person in PEOPLE for work in WORKS]
    facts += [("Charles Babbage", "designed", work) for work in WORKS[:2]]
    lines = ["\t".join(fact) for fact in facts]
    (folder / "facts.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    random = np.random.default_rng(0)
    for place, name in enumerate([*PEOPLE[1:], *WORKS[:2]]):  # one person has no picture
        for number in range(1 + place % 3):
            path = folder / "images" / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((120, 90)).save(path)
    texts = [(name, f"{name}, of the nineteenth century") for name in PEOPLE]
    texts += [("Ada Lovelace", "mathematician"), ("Notes", "a commentary with an algorithm")]
    lines = ["\t".join(row) for row in texts]
    (folder / "texts.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run(command, folder):
    # The command that belongs to this Python, whatever else is called imvia-graph.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_command_lines_of_readme(folder):
    output = run(["bash", "-euo", "pipefail", "-c", blocks()["sh"]], folder)
    assert "(Ada Lovelace, knows, ?)" in output
    kg = ig.load(folder / "runs" / "mine").kg
    assert {m: len(kg.views(m)[0]) for m in kg.modalities} == {"image": 9, "text": 6}
    assert kg.view_sources("text")[kg.views("text")[1][kg.id_of("Notes")]].startswith("a comment")


def test_the_python_of_readme(folder):
    output = run([sys.executable, "-c", blocks()["python"]], folder)
    assert "Prediction(entity=" in output
    assert (folder / "runs" / "mine-too" / "best.safetensors").is_file()


def test_it_is_no_more_than_ten_lines():
    for name, block in blocks().items():
        assert len(block.strip().splitlines()) <= 10, name
