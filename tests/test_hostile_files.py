"""Files of strangers, through every command: refused in one paragraph, or made harmless."""

import gzip
import io
import json
import os
import pickle
import re
import struct
import zipfile
import zlib

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers import TINY, contents, ring_kg, write_folder

import imvia_graph as ig
from imvia_graph import Settings, _files
from imvia_graph.cli import main

SET = [f"--set={key}={value}" for key, value in TINY.items()]
TRAIN = "e1\tafter\te2\ne2\tafter\te3\ne3\tafter\te1\n"
#: What a terminal obeys, and what a browser does.
ESCAPES = "\x1b[2J\x9b31m\u202e"
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>"


class Command:
    name = "imvia-graph"

    def main(self, args, prog_name, **_):
        return main(list(args))


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(Command(), [str(part) for part in arguments])


def assert_refused(result, message):
    """One paragraph, exit code 2, no traceback, nothing that a terminal obeys."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2, result.output
    error = result.stderr[result.stderr.index("Error: ") :].strip()
    assert "\n\n" not in error
    assert "Traceback" not in result.output
    assert re.search(message, error), error
    assert_harmless(result.output)


def assert_harmless(text):
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def graph_commands(source, out):
    """Every command that reads a graph."""
    (out.parent / "ok.tsv").write_text("e1\tone\n")
    encoder = ["--texts", out.parent / "ok.tsv", "--text-encoder", "minilm"]
    return {
        "fit": ["fit", source, "--out", out / "run", *SET],
        "tune": ["tune", source, "--study", out / "study.db", "--trials", "1", *SET],
        "encode": ["encode", source, *encoder, "--out", out / "encoded"],
        "inspect": ["inspect", source],
        "convert": ["convert", source, out / "converted", "--to", "kg"],
    }


def run_commands(run, out):
    """Every command that reads a run."""
    triple = ["--head", "e1", "--relation", "after", "--tail", "e2"]
    return {
        "evaluate": ["evaluate", run],
        "predict": ["predict", run, *triple[:4]],
        "explain": ["explain", run, *triple],
        "report": ["report", run, "--out", out / "report.html"],
        "export": ["export", run, "--out", out / "all.npz"],
        "explore": ["explore", run, "--port", "0"],
        "fit --resume": ["fit", "--resume", "--out", run, "--epochs", "9"],
    }


GRAPH_COMMANDS = ["fit", "tune", "encode", "inspect", "convert"]
RUN_COMMANDS = ["evaluate", "predict", "explain", "report", "export", "explore", "fit --resume"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder's files."""
    folder = tmp_path_factory.mktemp("runs") / "ring"
    return contents(ig.fit(ring_kg(), out=folder, **TINY).folder)


# -- files that lie about their size --------------------------------------------------------------


def bomb(size=_files.SMALL + 2**22):
    """A gzip file that holds a thousand times its size."""
    line = b"e1\tafter\te2\n"
    return gzip.compress(line * (size // len(line) + 1))


def huge_png(side=60_000):
    """A picture whose header says that it is so wide and high."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def zstd_bomb():
    zstd = pytest.importorskip("backports.zstd")
    return zstd.compress(b"e1\tafter\te2\n" * (_files.SMALL // 10))


def parquet_bomb():
    """A table of many equal rows, which Parquet keeps as one and a number."""
    one = {name: pl.repeat(name, 2_000_000, eager=True) for name in ("head", "relation", "tail")}
    out = io.BytesIO()
    pl.DataFrame(one).write_parquet(out)
    return out.getvalue()


COUNT = b"1000000000000\n"
LIARS = {
    "a gzip bomb": ({"train.tsv.gz": bomb()}, "train.tsv.gz", "decompression bomb"),
    "a gzip bomb named .tsv": ({"train.tsv": bomb()}, "train.tsv", "decompression bomb"),
    "a zstd bomb": ({"train.tsv.zst": zstd_bomb()}, "train.tsv.zst", "decompression bomb"),
    "a Parquet bomb": ({"t.parquet": parquet_bomb()}, "t.parquet", "claims 2,000,000 rows"),
    "a count of a terabyte": (
        {"entity2id.txt": COUNT, "relation2id.txt": "1\nr 0\n", "train2id.txt": "1\n0 0 0\n"},
        "",
        r"entity2id\.txt, line 1: the file announces 1000000000000 lines, but 0 follow",
    ),
    "a number of 5,000 digits": (
        {"entity2id.txt": "9" * 5000, "relation2id.txt": "1\nr 0\n", "train2id.txt": "1\n0 0 0\n"},
        "",
        r"entity2id\.txt, line 1: expected the number of lines",
    ),
    "a bomb in a KG folder": (
        {"train.tsv": TRAIN, "entities.tsv": bomb()},
        "",
        r"entities\.tsv: .* decompression bomb",
    ),
    "JSON nested without end": (
        {"train.tsv": TRAIN, "kg.json": "[" * 100_000},
        "",
        r"kg\.json: expected JSON",
    ),
    "a name that is none": (
        {"train.tsv": TRAIN, "kg.json": '{"name": {"a": 1}}'},
        "",
        r"kg\.json: expected a string for 'name'",
    ),
    "a newer version": (
        {"train.tsv": TRAIN, "kg.json": '{"version": 99}'},
        "",
        "format version 99 is newer than this library reads.*Update",
    ),
}


@pytest.mark.parametrize("command", GRAPH_COMMANDS)
@pytest.mark.parametrize(("files", "name", "message"), LIARS.values(), ids=LIARS)
def test_a_graph_that_lies_is_refused_by_every_command(command, files, name, message, tmp_path):
    source = write_folder(tmp_path / "stranger", files) / name
    out = tmp_path / "out"
    assert_refused(invoke(*graph_commands(source, out)[command]), message)
    assert not out.exists() or not contents(out)


def test_a_file_that_holds_little_more_than_most_is_read(tmp_path):
    lines = "".join(f"e{i}\tafter\te{i + 1}\n" for i in range(200_000))
    (tmp_path / "t.tsv.gz").write_bytes(gzip.compress(lines.encode()))
    assert ig.load_kg(tmp_path / "t.tsv.gz", split=False).num_entities == 200_001


def test_a_picture_of_60000_by_60000_is_reported_and_left_out(tmp_path):
    from PIL import Image

    files = {"facts.tsv": TRAIN, "images/e1/huge.png": huge_png()}
    write_folder(tmp_path, files)
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "e1" / "small.png")
    arguments = ["encode", tmp_path / "facts.tsv", "--split", "none", "--out", tmp_path / "kg"]
    encoder = ["--images", tmp_path / "images", "--image-encoder", "efficientnet-lite0"]
    result = invoke(*arguments, *encoder)
    assert result.exit_code == 0, result.output
    # Pillow's own limit comes first.
    assert re.search(r"huge\.png: .*pixels.*decompression bomb", result.stderr)
    assert ig.load_kg(tmp_path / "kg").view_sources("image") == ["e1/small.png"]


# -- features -------------------------------------------------------------------------------------


class Evil:
    """What a pickle can do."""

    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def expanded(path):
    torch.save(torch.zeros(1).expand(12, 1_000_000, 1_000), path)


def nested(path):
    """A list of lists of lists, each of two that are the same: 2 to the 40 in a few bytes."""
    value = [1]
    for _ in range(40):
        value = [value, value]
    torch.save({"feat": value}, path)


def squeezed(path):
    """An archive whose members say to hold 10 GB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("feat.npy", bytes(_files.SMALL + 2**20))


def fake_npy(path):
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (12, 1000000000000), }\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())


def unended_npy(path):
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (12, 3,\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())


def external_hdf5(path):
    h5py = pytest.importorskip("h5py")
    secret = path.parent / "secret.bin"
    secret.write_bytes(np.arange(48, dtype=np.float32).tobytes())
    with h5py.File(path, "w") as file:
        file.create_dataset("feat", (12, 4), "f4", external=[(str(secret), 0, 192)])


def hollow_hdf5(path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file.create_dataset("feat", (12, 10**6, 10**6), "f4", chunks=(1, 1, 1024))


def endless_hdf5(path, size=b"\xff" * 7 + b"\x7f", index=b"\1\0"):
    """A heap with an object of such a size, through which the HDF5 library walks for ever."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["feat"] = np.arange(18, dtype=np.float32).reshape(6, 3)
        file["entity"] = [f"e{i}" for i in range(6)]
    content = path.read_bytes()
    assert ig.io.read_features(path, [f"e{i}" for i in range(6)]).feat.shape == (6, 3)
    at = content.index(b"GCOL") + 16
    path.write_bytes(content[:at] + index + content[at + 2 : at + 8] + size + content[at + 16 :])


def boastful_hdf5(path, **options):
    """A text that says to be of two gigabytes, for which the HDF5 library would take memory."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["feat"] = np.arange(18, dtype=np.float32).reshape(6, 3)
        labels = [f"e{i}" for i in range(6)]
        entity = file.create_dataset("entity", data=labels, dtype=h5py.string_dtype(), **options)
        if options:
            file.flush()
            chunk = entity.id.read_direct_chunk((0,))[1]
            chunk = zlib.decompress(chunk) if "compression" in options else chunk
            table = np.frombuffer(chunk, np.uint8).reshape(-1, 16).copy()
            table[2, :4] = 0x7B
            # HDF5 leaves texts as they are and says so; where nothing is said, it turns them back.
            chunk = (table.T if "shuffle" in options else table).tobytes()
            chunk = zlib.compress(chunk) if "compression" in options else chunk
            entity.id.write_direct_chunk((0,), chunk, 0)
        at = entity.id.get_offset()
    if not options:
        content = path.read_bytes()
        path.write_bytes(content[: at + 32] + b"\x7b" * 4 + content[at + 36 :])


FEATURES = {
    "a pickle named .pth": (
        "f.pth",
        lambda path: path.write_bytes(pickle.dumps(Evil())),
        "may run code",
    ),
    "a pickle in a torch file": ("f.pt", lambda path: torch.save(Evil(), path), "may run code"),
    "a pickle named .pkl": (
        "f.pkl",
        lambda path: path.write_bytes(pickle.dumps(Evil())),
        "may run code",
    ),
    "a pickle in npy": (
        "f.npy",
        lambda path: np.save(path, np.array([Evil()]), allow_pickle=True),
        "without Python objects",
    ),
    "a tensor expanded from one number": ("f.pth", expanded, "or expanded"),
    "lists in lists": ("f.pth", nested, "expected a tensor, or a dict of tensors"),
    "an npz bomb": ("f.npz", squeezed, "decompression bomb"),
    "an npy of a header alone": ("f.npy", fake_npy, "cannot be read"),
    "an npy whose header does not end": ("f.npy", unended_npy, "cannot be read"),
    "HDF5 that reads another file": ("f.h5", external_hdf5, "the data is in another file"),
    "HDF5 that has no end": ("f.h5", endless_hdf5, "does not fit into it"),
    "HDF5 whose end is where it begins": (
        "f.h5",
        lambda path: endless_hdf5(path, bytes(8), bytes(2)),
        "does not fit into it",
    ),
    "HDF5 with a text that is longer than it": ("f.h5", boastful_hdf5, "cannot hold a text of 2,"),
    "HDF5 with such a text in chunks": (
        "f.h5",
        lambda path: boastful_hdf5(path, chunks=(4,)),
        "cannot hold a text of 2,",
    ),
    "HDF5 with such a text in small chunks": (
        "f.h5",
        lambda path: boastful_hdf5(path, chunks=(4,), compression="gzip", shuffle=True),
        "cannot hold a text of 2,",
    ),
    "HDF5 that is hollow": ("f.h5", hollow_hdf5, "decompression bomb"),
}


@pytest.mark.parametrize("command", ["fit", "inspect", "tune"])
@pytest.mark.parametrize(("name", "make", "message"), FEATURES.values(), ids=FEATURES)
def test_features_that_are_no_features_are_refused(
    command, name, make, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    graph = ring_kg(views=False).save(tmp_path / "ring")
    make(tmp_path / name)
    arguments = graph_commands(graph, tmp_path / "out")[command]
    assert_refused(invoke(*arguments, "--views", f"image={tmp_path / name}"), message)
    assert not (tmp_path / "pwned").exists()


# -- paths and links ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../secret.png", "a\0b"])
def test_a_table_of_pictures_does_not_leave_its_folder(path, tmp_path):
    write_folder(tmp_path / "stranger", {"facts.tsv": TRAIN, "t.tsv": f"e1\t{path}\n"})
    (tmp_path / "secret.png").write_bytes(b"secret")
    source = tmp_path / "stranger" / "facts.tsv"
    arguments = ["encode", source, "--split", "none", "--images", source.with_name("t.tsv")]
    encoder = ["--image-encoder", "efficientnet-lite0", "--out", tmp_path / "kg"]
    assert_refused(invoke(*arguments, *encoder), "leaves the folder|NUL byte")


@pytest.mark.parametrize("way", ["folder", "table"])
def test_links_among_pictures_do_not_lead_out_unless_that_is_named(way, tmp_path):
    from PIL import Image

    for where in ("stranger/images/e1", "home"):
        (tmp_path / where).mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "home" / "private.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "stranger" / "images" / "e1" / "1.png")
    (tmp_path / "stranger/images/e1/2.png").symlink_to(tmp_path / "home" / "private.png")
    (tmp_path / "stranger/images/e2").symlink_to(tmp_path / "home")
    (tmp_path / "stranger/images/e1/3.png").symlink_to("1.png")  # stays inside
    (tmp_path / "stranger/images/e1/4.png").symlink_to("4.png")  # leads in a circle
    os.mkfifo(tmp_path / "stranger/images/e1/5.png")  # would be waited for without end
    table = "e1\te1/1.png\ne1\te1/2.png\ne2\te2/private.png\n"
    write_folder(tmp_path / "stranger", {"facts.tsv": TRAIN, "images/t.tsv": table})
    images = tmp_path / "stranger" / "images"
    source = images if way == "folder" else images / "t.tsv"
    kg = ig.load_kg(tmp_path / "stranger" / "facts.tsv", split=False)
    options = {"images": source, "image_encoder": "efficientnet-lite0"}
    if way == "folder":
        (images / "t.tsv").unlink()
    seen, [report] = ig.encode.encode_kg(kg, **options)
    assert seen.view_sources("image") == ["e1/1.png"]
    outside = {name for name, reason in report.broken if "leads out of" in reason}
    # Of a folder elsewhere not even the names of its files are told.
    assert outside == {"e1/2.png", "e2/" if way == "folder" else "e2/private.png"}
    if way == "folder":  # whoever names the folder may
        seen, [report] = ig.encode.encode_kg(kg, **options, images_root=tmp_path)
        assert "e2/private.png" in seen.view_sources("image")


def test_pictures_whose_names_are_no_text_are_broken_and_shown_as_bytes(tmp_path):
    from PIL import Image

    images = os.fsencode(tmp_path / "images")
    for name in (b"e1/1.png", b"e1/caf\xe9.png", b"e\xff/1.png"):
        path = os.path.join(images, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.new("RGB", (4, 4)).save(path, "PNG")
    write_folder(tmp_path, {"facts.tsv": TRAIN})
    arguments = ["encode", tmp_path / "facts.tsv", "--split", "none", "--out", tmp_path / "kg"]
    arguments += ["--images", tmp_path / "images", "--image-encoder", "efficientnet-lite0"]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert r"broken: e1/b'caf\xe9.png': its name is not UTF-8" in result.output
    assert ig.load_kg(tmp_path / "kg").view_sources("image") == ["e1/1.png"]
    [report] = json.loads((tmp_path / "kg" / "encode.json").read_text("utf-8"))
    names = [r"b'e\xff'", r"e1/b'caf\xe9.png'"]
    assert report["broken"] == [[name, "its name is not UTF-8"] for name in names]
    os.remove(os.path.join(images, b"e1/1.png"))
    with pytest.raises(ig.DataError, match=r"hold no files.*left out, b'e\\xff': its name is not"):
        ig.io.read_images(tmp_path / "images", ["e1"])


LINKED = ["train.tsv", "entities.tsv", "kg.json", "views/image.safetensors", "views/image.csv"]


@pytest.mark.parametrize("command", GRAPH_COMMANDS)
@pytest.mark.parametrize("name", LINKED)
def test_a_kg_folder_does_not_lead_out_of_itself(command, name, tmp_path):
    folder = ring_kg().save(tmp_path / "stranger")
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    result = invoke(*graph_commands(folder, tmp_path / "out")[command])
    assert_refused(result, "leaves the folder")


@pytest.mark.parametrize("command", RUN_COMMANDS)
@pytest.mark.parametrize("name", ["run.json", "settings.yaml", "kg", "best.safetensors"])
def test_a_run_folder_does_not_lead_out_of_itself(command, name, trained, tmp_path):
    folder = write_folder(tmp_path / "stranger", trained)
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    if command == "fit --resume" and name == "best.safetensors":
        pytest.skip("it is written anew, and not through the link")
    result = invoke(*run_commands(folder, tmp_path)[command])
    assert_refused(result, "leaves the folder")


@pytest.mark.parametrize("name", ["train.tsv", "entities.tsv", "views/image.safetensors"])
def test_saving_a_graph_replaces_links_and_no_pipe(name, tmp_path):
    folder = ring_kg().save(tmp_path / "kg")
    outside = tmp_path / "outside"
    outside.write_text("years of work")
    (folder / name).unlink()
    (folder / name).symlink_to(outside)
    ring_kg().save(folder)
    assert not (folder / name).is_symlink()
    assert outside.read_text() == "years of work"
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ig.DataError, match="is a device, a pipe or a socket"):
        ring_kg().save(folder)
    assert (folder / name).is_fifo()


def test_going_on_with_a_strangers_run_writes_through_no_link(trained, tmp_path):
    folder = write_folder(tmp_path / "stranger", trained)
    outside = tmp_path / "outside"
    outside.write_text("years of work")
    (folder / "best.safetensors").unlink()
    (folder / "best.safetensors").symlink_to(outside)
    with pytest.raises(ig.DataError, match="leaves the folder"):
        ig.load(folder)
    assert outside.read_text() == "years of work"


@pytest.mark.parametrize("form", ["kg", "openke", "tsv", "csv", "parquet", "ntriples", "npz"])
def test_names_that_are_paths_write_nothing_outside(form, tmp_path):
    labels = ["../../evil", "/etc/evil", "a/../../b", "C:\\evil", "..", "~root", "con", "|sh"]
    kg = ring_kg(len(labels)).replace(entities=labels, entity_names=labels, name="../../evil")
    kg.save(tmp_path / "in" / "stranger")
    before = contents(tmp_path / "in")
    target = tmp_path / "a" / "b" / "out"
    assert invoke("convert", tmp_path / "in" / "stranger", target, "--to", form).exit_code == 0
    assert contents(tmp_path / "in") == before
    assert {path.name for path in tmp_path.iterdir()} == {"in", "a"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_the_name_of_a_graph_is_no_path_of_a_run_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ring_kg(name="../../../evil").save(tmp_path / "stranger")
    assert invoke("fit", tmp_path / "stranger", *SET).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"here", "stranger"}
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["runs"]


# -- what is shown --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shouting(tmp_path_factory):
    """A run on a graph whose every name is full of escape codes and markup."""
    top = tmp_path_factory.mktemp("shouting")
    kg = ring_kg()
    labels = [f"e{i}{ESCAPES}{MARKUP}" for i in range(12)]
    relations = [f"{name}{ESCAPES}{MARKUP}" for name in kg.relations]
    views = {}
    for modality in kg.modalities:
        feat, ptr = kg.views(modality)
        owner = torch.repeat_interleave(torch.arange(12), ptr.diff())
        views[modality] = ig.Views(feat, owner, [f"{ESCAPES}{MARKUP}"] * len(feat))
    kg = kg.replace(
        entities=labels,
        relations=relations,
        entity_names=labels,
        relation_names=relations,
        views=views,
        name=f"graph{ESCAPES}{MARKUP}",
        notes=[f"note{ESCAPES}{MARKUP}"],
    )
    kg.save(top / "kg")
    ig.fit(kg, out=top / "run", **TINY)
    return top, labels, relations


def test_names_are_shown_and_not_obeyed(shouting, tmp_path):
    top, labels, relations = shouting
    query = ["--head", labels[1], "--relation", relations[0]]
    commands = {
        "fit": ["fit", top / "kg", "--out", tmp_path / "run", *SET],
        "inspect": ["inspect", top / "kg"],
        "inspect --json": ["inspect", top / "kg", "--json"],
        "convert": ["convert", top / "kg", tmp_path / "converted", "--to", "kg"],
        "evaluate": ["evaluate", top / "run", "--relations"],
        "evaluate --json": ["evaluate", top / "run", "--json"],
        "predict": ["predict", top / "run", *query],
        "predict --json": ["predict", top / "run", *query, "--json"],
        "explain": ["explain", top / "run", *query, "--tail", labels[2]],
        "explain --json": ["explain", top / "run", *query, "--tail", labels[2], "--json"],
        "report": ["report", top / "run", "--out", tmp_path / "report.html"],
        "export": ["export", top / "run", "--out", tmp_path / "all.vec"],
        "tune": ["tune", top / "kg", "--study", tmp_path / "s.db", "--trials", "1", *SET],
    }
    for name, arguments in commands.items():
        result = invoke(*arguments)
        assert result.exit_code == 0, (name, result.output)
        assert_harmless(result.output)
        if name.endswith("--json"):
            assert relations[0] in result.stdout or json.loads(result.stdout)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "<img src=x" not in page


def test_a_mistake_quotes_a_name_without_obeying_it(shouting):
    top, _, relations = shouting
    query = ["--head", f"nobody{ESCAPES}", "--relation", relations[0]]
    result = invoke("predict", top / "run", *query)
    assert_refused(result, "nobody")
    result = invoke("evaluate", f"nowhere{ESCAPES}")
    assert_refused(result, "nowhere")
    result = invoke("evaluate", top / "run", "--split", f"dev{ESCAPES}")
    assert_refused(result, "dev")


# -- settings -------------------------------------------------------------------------------------

LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
SETTINGS = {
    "a billion laughs": ("s.yaml", LAUGHS, "aliases are not allowed"),
    "a list of laughs": ("s.yaml", f"- {LAUGHS[3:].splitlines()[0]}\n- *a\n", "aliases"),
    "an object of Python": ("s.yaml", "!!python/object/apply:os.mkdir [pwned]", "cannot be read"),
    "lists without end": ("s.yaml", "[" * 5000, "cannot be read"),
    "TOML without end": ("s.toml", f"a = {'[' * 5000}", "cannot be read"),
    "a date that is none": ("s.yaml", "dim: 2024-13-45", "cannot be read"),
    "a float that is none": ("s.yaml", "dim: !!float", "cannot be read"),
    "a number of 5,000 digits": ("s.yaml", f"dim: {'9' * 5000}", "cannot be read|Setting dim"),
    "a file that is too large": ("s.yaml", "#" * 2**19, "larger than 256 KiB"),
    "bytes that are no text": ("s.yaml", b"dim: \xff", "cannot be read"),
    "control characters": ("s.yaml", "dim: \x1b[2J", "cannot be read"),
}


@pytest.mark.parametrize(("name", "text", "message"), SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("command", ["fit", "tune", "space"])
def test_settings_of_strangers_are_refused(command, name, text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(write_folder(tmp_path, {name: text}))
    study = ["--study", "s.db"] if command != "fit" else []
    option = "--space" if command == "space" else "--settings"
    verb = "tune" if command == "space" else command
    result = invoke(verb, ring_kg().save(tmp_path / "ring"), *study, option, name)
    assert_refused(result, message)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("text", [f"modalities={'[' * 5000}", "dim=&a [*a]", "dim=2024-13-45"])
def test_an_assignment_that_is_no_yaml_is_refused(text):
    assert_refused(invoke("fit", "countries", "--set", text), "--set .*cannot be read")


def test_a_value_of_any_size_is_quoted_in_part():
    with pytest.raises(ig.SettingsError) as caught:
        Settings.create({"dim": [["x" * 10**6] * 1000] * 1000})
    assert len(str(caught.value)) < 1000


# -- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", RUN_COMMANDS)
@pytest.mark.parametrize("key", ["dim", "relation_dim", "information_dim"])
def test_settings_that_ask_for_all_memory_are_refused_before_it_is_taken(
    command, key, trained, tmp_path
):
    folder = write_folder(tmp_path / "stranger", trained)
    values = yaml.safe_load((folder / "settings.yaml").read_text())
    (folder / "settings.yaml").write_text(yaml.safe_dump({**values, key: 10**8}))
    result = invoke(*run_commands(folder, tmp_path)[command])
    assert_refused(result, "does not fit the model")


METRICS = [
    "[" * 100_000,
    '{"epoch": "x"}',
    '{"epoch": 1e400}',
    "\x1b[2J",
    '{"epoch": 1, "loss": {}}',
]


@pytest.mark.parametrize("line", METRICS)
def test_metrics_that_are_none_are_left_out_of_a_report(line, trained, tmp_path):
    folder = write_folder(tmp_path / "stranger", {**trained, "metrics.jsonl": line})
    result = invoke("report", folder, "--out", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    assert ig.fit(out=folder, resume=True, epochs=4).progress.epoch == 4


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0" + bytes(100), b"years of work"])
def test_a_study_that_is_none_is_refused_and_left_as_it_was(content, tmp_path):
    path = tmp_path / "s.db"
    path.write_bytes(content)
    arguments = ["tune", ring_kg().save(tmp_path / "ring"), "--study", path, "--trials", "1", *SET]
    if content:
        assert_refused(invoke(*arguments), "cannot be used as a study")
        assert path.read_bytes() == content
    else:  # an empty file is SQLite's empty database
        assert invoke(*arguments).exit_code == 0
