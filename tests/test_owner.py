"""Folders of pictures outside a KG folder: followed where the same user wrote it, and not else."""

import json
import os

import pytest
import torch
from click.testing import CliRunner
from helpers import ring_kg, settings

import imvia_graph as ig
from imvia_graph import _owner
from imvia_graph.cli import command_line
from imvia_graph.pictures import Pictures


@pytest.fixture(autouse=True)
def _state(tmp_path, monkeypatch):
    be("me", tmp_path, monkeypatch)


def be(user, tmp_path, monkeypatch):
    """From now on, what is kept is kept for another user."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / user))


def kg_with(root):
    entity = torch.tensor([0, 1])
    views = {"image": ig.Views(torch.randn(2, 3), entity, ["e0/1.png", "e1/1.png"], root)}
    return ring_kg(views=False).replace(views=views)


def make_picture(folder):
    image = pytest.importorskip("PIL.Image")
    (folder / "e0").mkdir(parents=True)
    image.new("RGB", (9, 9), "red").save(folder / "e0/1.png")
    return folder / "e0/1.png"


def test_ones_own_graph_knows_where_its_pictures_are_and_so_does_the_run(tmp_path):
    picture = make_picture(tmp_path / "images")
    kg = ig.load_kg(kg_with(tmp_path / "images").save(tmp_path / "kg"))
    assert Pictures(kg).path("image", 0) == picture
    ig.fit(kg, out=tmp_path / "run", settings=settings())
    (tmp_path / "run").rename(tmp_path / "moved")
    run = ig.load(tmp_path / "moved", "cpu")
    assert Pictures(run.kg, run.folder).path("image", 0) == picture


def test_a_strangers_graph_shows_nothing_outside_of_its_folder(tmp_path, monkeypatch, caplog):
    picture = make_picture(tmp_path / "images")
    be("stranger", tmp_path, monkeypatch)
    kg_with(tmp_path / "images").save(tmp_path / "kg")
    be("me", tmp_path, monkeypatch)
    kg = ig.load_kg(tmp_path / "kg")
    assert kg.view_root("image") is None
    assert Pictures(kg).path("image", 0) is None
    [message] = [record.getMessage() for record in caplog.records]
    assert "lies outside of the KG folder" in message
    assert "--images FOLDER" in message
    # Nor once it went through a run of one's own, which would sign what is known of it.
    ig.fit(kg, out=tmp_path / "run", settings=settings())
    run = ig.load(tmp_path / "run", "cpu")
    assert Pictures(run.kg, run.folder).path("image", 0) is None
    # Whoever names the folder may.
    assert Pictures(run.kg, run.folder, tmp_path / "images").path("image", 0) == picture


@pytest.mark.parametrize("command", ["report", "inspect", "evaluate"])
def test_commands_say_so_and_go_on(command, tmp_path, monkeypatch):
    make_picture(tmp_path / "images")
    be("stranger", tmp_path, monkeypatch)
    ig.fit(kg_with(tmp_path / "images"), out=tmp_path / "run", settings=settings())
    be("me", tmp_path, monkeypatch)
    words = [command, str(tmp_path / "run" / ("kg" if command == "inspect" else ""))]
    if command == "report":
        words += ["--out", str(tmp_path / "report.html")]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(command_line, words)
    assert result.exit_code == 0, result.output
    if command == "report":
        page = (tmp_path / "report.html").read_text()
        assert "image/webp" not in page


@pytest.mark.parametrize(
    "change",
    [
        lambda about, root: about["roots"].update(image=str(root)),
        lambda about, root: about["roots"].update(image=f"../{root.name}"),
        lambda about, root: about.update(roots_signature="0" * 64),
        lambda about, root: about.update(roots_signature="\ud800é"),
        lambda about, root: about.update(roots_signature=7),
        lambda about, root: about.pop("roots_signature"),
    ],
)
def test_what_was_changed_is_not_ones_own(tmp_path, change):
    kg_with(tmp_path / "images").save(tmp_path / "kg")
    (tmp_path / "secret").mkdir()
    about = json.loads((tmp_path / "kg/kg.json").read_text())
    change(about, tmp_path / "secret")
    (tmp_path / "kg/kg.json").write_text(json.dumps(about))
    assert ig.load_kg(tmp_path / "kg").view_root("image") is None


def test_pictures_within_a_graphs_folder_go_where_it_goes(tmp_path, monkeypatch):
    picture = make_picture(tmp_path / "kg/images")
    kg_with(tmp_path / "kg/images").save(tmp_path / "kg")
    about = json.loads((tmp_path / "kg/kg.json").read_text())
    assert about["roots"] == {"image": "images"}
    (tmp_path / "kg").rename(tmp_path / "moved")
    be("stranger", tmp_path, monkeypatch)
    moved = picture.relative_to(tmp_path / "kg")
    assert Pictures(ig.load_kg(tmp_path / "moved")).path("image", 0) == tmp_path / "moved" / moved


def test_a_link_in_a_graphs_folder_is_no_way_out(tmp_path, monkeypatch):
    make_picture(tmp_path / "secret")
    kg_with(tmp_path / "kg/images").save(tmp_path / "kg")
    (tmp_path / "kg/images").symlink_to(tmp_path / "secret")
    be("stranger", tmp_path, monkeypatch)
    assert Pictures(ig.load_kg(tmp_path / "kg")).path("image", 0) is None


@pytest.mark.parametrize("root", ["a\0b", "/" + "y" * 5000, "loop", ""])
def test_roots_that_are_no_folders_do_no_harm(tmp_path, root):
    kg_with(tmp_path / "images").save(tmp_path / "kg")
    (tmp_path / "kg/loop").symlink_to(tmp_path / "kg/loop")
    about = json.loads((tmp_path / "kg/kg.json").read_text())
    about["roots"]["image"] = root
    (tmp_path / "kg/kg.json").write_text(json.dumps(about))
    assert Pictures(ig.load_kg(tmp_path / "kg")).path("image", 0) is None


def test_the_key_is_made_once_and_read_by_its_owner_alone(tmp_path):
    first = _owner.sign({"image": "/a"})
    path = tmp_path / "me/imvia-graph/key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["key"]
    assert _owner.sign({"image": "/a"}) == first
    assert _owner.is_own({"image": "/a"}, first)
    assert not _owner.is_own({"text": "/a"}, first)


def test_reading_makes_no_key(tmp_path):
    assert not _owner.is_own({"image": "/a"}, "0" * 64)
    assert not (tmp_path / "me").exists()


def test_a_damaged_key_is_made_again(tmp_path):
    first = _owner.sign({"image": "/a"})
    (tmp_path / "me/imvia-graph/key").write_bytes(b"short")
    assert not _owner.is_own({"image": "/a"}, first)
    again = _owner.sign({"image": "/a"})
    assert _owner.is_own({"image": "/a"}, again)


def test_without_a_place_for_a_key_graphs_are_saved_and_not_followed(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    folder = kg_with(tmp_path / "images").save(tmp_path / "kg")
    assert "roots_signature" not in json.loads((folder / "kg.json").read_text())
    assert ig.load_kg(folder).view_root("image") is None


def test_a_state_folder_that_is_not_absolute_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _owner.key_file() == tmp_path / ".local/state/imvia-graph/key"
    assert not os.path.exists("state")
