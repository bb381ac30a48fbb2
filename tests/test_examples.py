"""The scripts in examples/ run as they stand; here for as short as they can."""

import re
import runpy
import sys

import pytest
from helpers import ROOT

#: Script, arguments that shorten it, and what it prints.
SCRIPTS = {
    "rgcn_link_prediction.py": (["--epochs", "1"], r"R-GCN +\d+\.\d\d .*\nR-GCN with views +\d+\."),
    "hgt_node_classification.py": (["--epochs", "1"], r"HGT +\d+\.\d .*\nHGT with views +\d+\."),
    "one_layer.py": ([], r"right: (\d+)% of 200 countries, \d+% of 49"),
    "networkx_predictions.py": (["--epochs", "1"], r"9 edges added to MultiDiGraph named 'mine'"),
}


def test_every_example_is_run():
    assert set(SCRIPTS) == {path.name for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs(name, tmp_path, monkeypatch, capsys):
    arguments, shown = SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    codes = []
    monkeypatch.setattr(sys, "exit", codes.append)  # how a click command ends
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert not any(codes)
    output = capsys.readouterr().out
    found = re.search(shown, output)
    assert found, output
    if name == "one_layer.py":
        assert int(found[1]) > 50  # of five regions; it has learned


def test_the_model_of_one_layer_is_thirty_lines():
    text = (ROOT / "examples" / "one_layer.py").read_text("utf-8")
    code = text.split('"""')[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
