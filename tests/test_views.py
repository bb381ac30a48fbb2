"""Views in: pictures and texts to be encoded, and ready features of every form."""

import gzip
import json
import pickle

import h5py
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from helpers import ROOT, ring_kg, run_python, write_folder
from safetensors.torch import save_file

import imvia_graph as ig

io = ig.io

PLACES = ["Paris", "AC/DC", "Zoë", "Lyon"]


@pytest.fixture
def kg():
    """Four entities; e2 and e3 bear one display name."""
    return ig.MultiViewKG(
        ["e0", "e1", "e2", "e3"],
        ["r"],
        torch.tensor([[0, 0, 1], [2, 0, 3]]),
        entity_names=["Paris", "Lyon", "Twin", "Twin"],
        name="small",
    )


# -- pictures -------------------------------------------------------------------------------------


def test_a_folder_of_folders_names_the_entities(tmp_path):
    names = ["Paris/2.png", "Paris/1.png", "AC%2FDC/x.jpg", "Zoe\u0308/a.gif", "Paris/.hidden"]
    write_folder(tmp_path, {**dict.fromkeys(names, "x"), "Lyon/Thumbs.db": "x"})
    raw = io.read_images(tmp_path, PLACES)
    assert raw.entity.tolist() == [0, 0, 1, 2]
    assert raw.source == ["Paris/1.png", "Paris/2.png", "AC%2FDC/x.jpg", "Zoe\u0308/a.gif"]
    assert raw.root == tmp_path


def test_a_folder_may_bear_the_display_name(tmp_path, kg):
    write_folder(tmp_path, {"Lyon/1.png": "x", "e0/1.png": "x"})
    assert io.read_images(tmp_path, kg).entity.tolist() == [0, 1]


def test_a_display_name_of_two_entities_names_neither(tmp_path, kg):
    write_folder(tmp_path, {"Twin/1.png": "x", "e0/1.png": "x"})
    with pytest.raises(ig.DataError, match=r"first 'Twin' in row 1.*2 entities have this display"):
        io.read_images(tmp_path, kg)


@pytest.mark.parametrize("form", ["tsv", "csv", "tsv.gz", "parquet", "headless"])
def test_a_table_of_pictures(tmp_path, form):
    rows = [("Lyon", "p/1.png"), ("Paris", "2.png"), ("Lyon", "./p/0.png"), ("Lyon", "p/1.png")]
    table = tmp_path / f"table.{form.replace('headless', 'tsv')}"
    if form == "parquet":
        pl.DataFrame(rows, schema=["entity", "image"], orient="row").write_parquet(table)
    else:
        separator = "," if form == "csv" else "\t"
        lines = [separator.join(row) for row in rows]
        text = "\n".join(lines if form == "headless" else [f"entity{separator}path", *lines])
        table.write_bytes(gzip.compress(text.encode()) if form == "tsv.gz" else text.encode())
    raw = io.read_images(table, PLACES)
    assert raw.entity.tolist() == [0, 3, 3]
    assert raw.source == ["2.png", "p/1.png", "p/0.png"]  # one of the two p/1.png
    assert (raw.root, raw.repeated) == (tmp_path, 1)


@pytest.mark.parametrize("path", ["../1.png", "/etc/passwd", "a/../../b.png"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, monkeypatch, path):
    table = tmp_path / "t" / "table.tsv"
    table.parent.mkdir()
    table.write_text(f"Paris\tok.png\nLyon\t{path}\n")
    message = rf"table\.tsv, line 2: the path .* leaves the folder {table.parent}\."
    with pytest.raises(ig.DataError, match=message):
        io.read_images(table, PLACES)
    monkeypatch.chdir(table.parent)
    with pytest.raises(ig.DataError, match=message):  # not "the folder .."
        io.read_images("table.tsv", PLACES)
    assert io.read_images(table, PLACES, root="/").source[1].endswith(path.rpartition("/")[2])


def test_a_folder_without_folders_says_so(tmp_path):
    write_folder(tmp_path, {"1.png": "x"})
    with pytest.raises(ig.DataError, match=r"holds no folders but 1 files; expected one folder"):
        io.read_images(tmp_path, PLACES)
    (tmp_path / "Paris").mkdir()
    with pytest.raises(ig.DataError, match="hold no files; expected pictures"):
        io.read_images(tmp_path, PLACES)


def test_what_is_left_aside_is_named_with_where_a_picture_belongs(tmp_path, caplog):
    names = ["P9.jpg", "Paris/1.png", "Paris/sub/2.png", "Thumbs.db", "Lyon/.x/1.png", "Z.jpg"]
    write_folder(tmp_path, dict.fromkeys([*names, "Lyon/deep/3.png"], "x"))
    assert io.read_images(tmp_path, PLACES).source == ["Paris/1.png"]
    assert (
        "4 files beside the entities' folders or folders inside them are ignored, first"
        " 'Lyon/deep/', 'P9.jpg', 'Paris/sub/'. Pictures must be directly in the folder"
    ) in caplog.text


# -- texts ----------------------------------------------------------------------------------------


def test_texts_in_the_order_of_entities_then_rows(tmp_path, caplog):
    table = tmp_path / "texts.csv"
    table.write_text('\ufeffentity,text\nLyon,"two, words"\nParis,b\nLyon," a "\nLyon,\nParis,b\n')
    raw = io.read_texts(table, PLACES)
    assert raw.entity.tolist() == [0, 3, 3]
    assert raw.source == ["b", "two, words", "a"]
    assert raw.repeated == 1
    assert "texts.csv: 1 of 5 rows have no text and are left out." in caplog.text


def test_a_header_that_is_not_known_as_one_is_told(tmp_path):
    table = tmp_path / "texts.tsv"
    table.write_text("name\tcaption\nParis\ta\nLyon\tb\n")
    with pytest.raises(ig.DataError, match=r"'name' in line 1\. If that is a header.*text-columns"):
        io.read_texts(table, PLACES)
    named = io.read_texts(table, PLACES, columns=("name", "caption"))
    assert named.source == ["a", "b"]
    table.write_text("Pari\ta\nLyn\tb\n")  # two unknown entities: no header
    with pytest.raises(ig.DataError, match=r"'Pari' in line 1\. The nearest known: 'Paris'"):
        io.read_texts(table, PLACES)


def test_a_tsv_has_no_quotes(tmp_path):
    table = tmp_path / "texts.tsv"
    table.write_text('Paris\t"City" of\nLyon\t5" wide\n')
    assert io.read_texts(table, PLACES).source == ['"City" of', '5" wide']


def test_a_csv_of_texts_may_hold_line_breaks_and_quotes_but_none_left_open(tmp_path):
    table = tmp_path / "texts.csv"
    table.write_text('a,"one\ntwo"\nb,7" nails\nc,x\nd,8" y\n')
    raw = ig.io.read_texts(table, ["a", "b", "c", "d"])
    assert raw.source == ["one\ntwo", '7" nails', "x", '8" y']
    table.write_text('a,"one\ntwo"\nb,"x\nc,y\nd,z\n')
    with pytest.raises(ig.DataError, match=r"texts\.csv, line 3: .*never closed.*'b,\"x'"):
        ig.io.read_texts(table, ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("t.csv", "entity;text\nParis;a, b\nLyon;c\n", r"commas, found semicolons: .*';'.* ';'\)"),
        ("t.csv", "Paris\ta\nLyon\tb, c\n", r"separated by commas, found tabs.*-separator tab\)"),
        ("t.tsv", "Paris|a\nLyon|b\n", r"separated by tabs, found bars.*-separator '\|'\)"),
    ],
)
def test_another_separator_of_a_table_is_told_and_may_be_said(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(ig.DataError, match=rf"line 1: .*{told}") as caught:
        io.read_texts(tmp_path / name, PLACES)
    assert "(--text-separator " in str(caught.value)
    with pytest.raises(ig.DataError, match="--image-separator"):
        io.read_images(tmp_path / name, PLACES)
    mark = next(mark for mark in ";\t|" if mark in content)
    assert len(io.read_texts(tmp_path / name, PLACES, separator=mark).source) == 2
    assert len(io.read_images(tmp_path / name, PLACES, separator=mark).source) == 2


def test_a_separator_is_one_character_and_of_text_tables_alone(tmp_path):
    (tmp_path / "t.csv").write_text("Paris||a\n")
    with pytest.raises(ig.DataError, match=r"^separator: expected one character, received '\|\|'"):
        io.read_texts(tmp_path / "t.csv", PLACES, separator="||")
    pl.DataFrame({"entity": ["Paris"], "text": ["a"]}).write_parquet(tmp_path / "t.parquet")
    for of in ("t.parquet", "."):
        with pytest.raises(ig.DataError, match=r"^separator: "):
            io.read_images(tmp_path / of, PLACES, separator=";")


def test_quotes_around_whole_texts_of_a_tsv_are_told(tmp_path, caplog):
    table = tmp_path / "texts.tsv"
    frame = pd.DataFrame({"entity": ["Paris", "Lyon"], "text": ['the "City"', "plain"]})
    frame.to_csv(table, sep="\t", index=False)
    assert '"the ""City"""' in io.read_texts(table, PLACES).source
    told = "texts.tsv: labels or texts in double quotes: 1"
    assert told in caplog.text
    table = table.rename(tmp_path / "texts.csv")
    assert 'the "City"' in io.read_texts(table, PLACES, separator="\t").source


def test_a_row_is_told_by_its_line_in_a_text_file_and_by_its_number_elsewhere(tmp_path):
    rows = {"who": ["Paris", "Lyon", "Rome"], "text": [["a", "b"], ["c"], ["d"]]}
    pl.DataFrame(rows).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(ig.DataError, match=r"first 'Rome' in row 3 \(counted from 1\)\."):
        io.read_texts(tmp_path / "t.parquet", PLACES)
    (tmp_path / "t.csv").write_text('entity,text\nParis,"a\nb"\n\nLyon,c\nRome,d\n')
    with pytest.raises(ig.DataError, match=r"first 'Rome' in line 6\."):
        io.read_texts(tmp_path / "t.csv", PLACES)
    (tmp_path / "t.tsv").write_text("\nentity\ttext\nParis\ta\n\n\tc\n")
    with pytest.raises(ig.DataError, match=r"t\.tsv, line 5: the entity is missing"):
        io.read_texts(tmp_path / "t.tsv", PLACES)


def test_captions_from_parquet_columns(tmp_path):
    table = tmp_path / "captions [1].parquet"  # a bracket is no pattern
    frame = {"n": [1, 2, 3], "who": [3, 0, 0], "caption": [["a", "b"], [], ["c", None]]}
    pl.DataFrame(frame).write_parquet(table)
    raw = io.read_texts(table, PLACES, columns=("who", "caption"))
    assert raw.entity.tolist() == [0, 3, 3]
    assert raw.source == ["c", "a", "b"]
    assert io.read_texts(table, PLACES, columns=(1, 2)).source == raw.source
    with pytest.raises(ig.DataError, match=r"no column 'whom'; .* 'n', 'who', 'caption'"):
        io.read_texts(table, PLACES, columns=("whom", "caption"))
    with pytest.raises(ig.DataError, match="no column 3; expected 0 to 2"):
        io.read_texts(table, PLACES, columns=(0, 3))


def test_unknown_entities_are_counted_and_the_first_is_named(tmp_path, caplog):
    table = tmp_path / "texts.tsv"
    table.write_text("Paris\ta\nLyom\tb\nRome\tc\nLyom\td\n")
    message = (
        r"texts\.tsv: 3 of 4 rows name 2 entities that are not in the list of entities, first"
        r" 'Lyom' in line 2\. The nearest known: 'Lyon'.*--skip-unknown"
    )
    with pytest.raises(ig.DataError, match=message):
        io.read_texts(table, PLACES)
    assert io.read_texts(table, PLACES, skip_unknown=True).source == ["a"]
    assert "3 of 4 rows" in caplog.text
    table.write_text("Rome\ta\n")
    with pytest.raises(ig.DataError, match="none of the 1 rows names an entity"):
        io.read_texts(table, PLACES, skip_unknown=True)


def test_ids_that_are_all_unknown_are_refused_as_labels_are(tmp_path):
    table = tmp_path / "texts.tsv"
    table.write_text("7\ta\n9\tb\n")
    with pytest.raises(ig.DataError, match=r"texts\.tsv.*none of the 2 rows names an entity"):
        io.read_texts(table, PLACES, skip_unknown=True)
    parquet = tmp_path / "texts.parquet"
    pl.DataFrame({"entity": [7, -1], "text": ["a", "b"]}).write_parquet(parquet)
    with pytest.raises(ig.DataError, match=r"texts\.parquet.*none of the 2 rows names an entity"):
        io.read_texts(parquet, PLACES, skip_unknown=True)


def packed(content):
    """Gzipped, without the time: what a test is called must be the same in every process."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.tsv", b"", "is empty: expected a table of entity and text"),
        ("t.tsv", b"Paris\ta\nLyon\t\xff\n", r"t\.tsv, line 2: expected UTF-8 text"),
        ("t.tsv", b"Paris\ta\nLyon\tb\tc\n", r"line 2: expected 2 columns .* found 3"),
        (
            "t.tsv",
            b"Paris\ta\nLyon\nParis\tb\n",
            r"t\.tsv, line 2: expected 2 columns .* found 1: 'Lyon'",
        ),
        (
            "t.tsv.gz",
            packed(b"Paris\ta\nLyon\tb\tc\n"),
            r"t\.tsv\.gz, line 2: .* found 3",
        ),
        ("t.csv", b'Paris,"a\nb"\nLyon,b,c\n', r"t\.csv, line 3: expected 2 columns .* found 3"),
        ("t.csv", b'Paris,"a, b"\nLyon\n', r"t\.csv, line 2: expected 2 columns .* found 1"),
        ("t.csv.gz", packed(b"Paris,a\nLyon\n"), r"t\.csv\.gz, line 2: .* found 1"),
        ("t.tsv", b"Paris\ta\n\tb\n", "line 2: the entity is missing"),
        ("t.tsv", b"Paris\nLyon\n", "expected two columns or more, found 1"),
        ("t.tsv", b"Paris\ta\0b\n", "found a NUL byte"),
        ("t.tsv", b"entity\ttext\n", "holds no rows"),
        ("t.tsv", b"Paris\t \n", "no row has a text"),
        ("t.tsv.gz", packed(b"Paris\ta\n" * 999)[:20], "cannot be read"),
        ("t.parquet", b"PAR1 not really", "expected a Parquet file"),
        ("t.xlsx", b"x", r"\.tsv, \.csv \(also \.gz\) or \.parquet"),
    ],
)
def test_a_bad_table_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ig.DataError, match=message):
        io.read_texts(tmp_path / name, PLACES)


def test_no_table_at_all(tmp_path):
    with pytest.raises(ig.DataError, match=r"there is no such file; .* of entity and text\.$"):
        io.read_texts(tmp_path / "none.tsv", PLACES)
    with pytest.raises(ig.DataError, match="entity and path, or a folder of folders of pictures"):
        io.read_images(tmp_path / "imags", PLACES)
    with pytest.raises(ig.DataError, match="is a folder; expected a table"):
        io.read_texts(tmp_path, PLACES)


# -- ready features -------------------------------------------------------------------------------

SUFFIXES = [".safetensors", ".npz", ".npy", ".h5", ".pth"]


def write_features(path, feat, **more):
    """Arrays as a file of the suffix; labels as the format has them."""
    if path.suffix == ".safetensors":
        labels = more.pop("entity", None)
        save_file({"feat": feat, **{name: torch.as_tensor(x) for name, x in more.items()}}, path)
        if labels is not None:
            path.with_suffix(".csv").write_text("\n".join(["entity", *labels]) + "\n")
    elif path.suffix == ".npz":
        np.savez(path, feat=feat.numpy(), **more)
    elif path.suffix == ".npy":
        np.save(path, feat.numpy())
        if "entity" in more:
            path.with_suffix(".csv").write_text("\n".join(["entity", *more["entity"]]) + "\n")
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["feat"] = feat.numpy()
            for name, value in more.items():
                file[name] = value
    else:
        torch.save({"feat": feat, **more} if more else feat, path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_row_an_entity(tmp_path, suffix):
    feat = torch.randn(4, 3)
    feat[1] = 0
    feat[2] = torch.nan
    views = io.read_features(write_features(tmp_path / f"x{suffix}", feat), PLACES)
    assert views.entity.tolist() == [0, 3]
    assert torch.equal(views.feat, feat[[0, 3]])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_some_places_an_entity(tmp_path, suffix):
    feat = torch.randn(4, 3, 5)
    feat[0, 1] = 0
    feat[2] = torch.nan
    views = io.read_features(write_features(tmp_path / f"x{suffix}", feat), PLACES)
    assert views.entity.tolist() == [0, 0, 1, 1, 1, 3, 3, 3]
    assert torch.equal(views.feat, torch.cat([feat[0, [0, 2]], feat[1], feat[3]]))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_with_their_entities(tmp_path, suffix):
    feat, labels = torch.randn(3, 5), ["Lyon", "Zoë", "Lyon"]
    feat[1] = 0  # a row that is said to be a view is one
    views = io.read_features(write_features(tmp_path / f"x{suffix}", feat, entity=labels), PLACES)
    assert views.entity.tolist() == [3, 2, 3]
    assert torch.equal(views.feat, feat)


def test_rows_with_ids(tmp_path):
    feat = torch.randn(3, 5)
    path = write_features(tmp_path / "x.npz", feat, ids=np.array([3, 0, 3]))
    assert io.read_features(path, PLACES).entity.tolist() == [3, 0, 3]
    assert io.read_features(path, PLACES, entity=[1, 1, 2]).entity.tolist() == [1, 1, 2]
    assert io.read_features(path, PLACES, entity="ids").entity.tolist() == [3, 0, 3]


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".pth", ".safetensors"])
def test_an_array_an_entity(tmp_path, suffix):
    arrays = {"Lyon": torch.randn(2, 5), "Paris": torch.randn(5)}
    path = tmp_path / f"x{suffix}"
    if suffix == ".h5":
        with h5py.File(path, "w") as file:
            for name, value in arrays.items():
                file[name] = value.numpy()
    elif suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in arrays.items()})
    elif suffix == ".pth":
        torch.save(arrays, path)
    else:
        save_file(arrays, path)
    kg = ig.MultiViewKG(PLACES, ["r"], torch.tensor([[0, 0, 1]]))
    feat, ptr = io.with_views(kg, {"image": path}).views("image")
    assert ptr.tolist() == [0, 1, 1, 1, 3]
    assert torch.equal(feat, torch.cat([arrays["Paris"][None], arrays["Lyon"]]))


def test_two_names_of_one_id_are_an_error(tmp_path):
    np.savez(tmp_path / "x.npz", **{"1": np.ones((1, 5)), "01": np.zeros((1, 5)), "2": np.ones(5)})
    with pytest.raises(ig.DataError, match=r"x\.npz: two arrays are named by one id"):
        io.read_features(tmp_path / "x.npz", PLACES)
    np.savez(tmp_path / "x.npz", **{"9" * 5000: np.ones((1, 5)), "2": np.ones(5)})
    with pytest.raises(ig.DataError, match=r"x\.npz: expected"):  # no id has so many digits
        io.read_features(tmp_path / "x.npz", PLACES)


def test_labels_with_slashes_name_arrays_in_hdf5(tmp_path):
    """HDF5 takes them for paths, and drops their empty parts."""
    labels = ["<http://a/b>", "/m/01", "x/y", "x//y", "p//q", "p///q"]
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        for number, label in enumerate(labels[:3]):
            file[label] = np.full((1, 4), number, dtype=np.float32)
    views = io.read_features(path, labels)
    assert dict(zip(views.entity.tolist(), views.feat[:, 0].tolist(), strict=True)) == {
        0: 0.0,
        1: 1.0,
        2: 2.0,
    }
    with h5py.File(path, "a") as file:
        file["p//q"] = np.ones((1, 4), dtype=np.float32)
    with pytest.raises(ig.DataError, match="'p/q'"):  # of two entities: not guessed
        io.read_features(path, labels)


ONE, TWO = np.ones(5, dtype=np.float32), np.full((2, 5), 2, dtype=np.float32)


@pytest.mark.parametrize(
    "arrays",
    [
        {"Lyon": TWO, "Paris": ONE},
        {"Lyon": torch.from_numpy(TWO), "Paris": ONE.tolist(), "Zoë": None},
        {3: TWO, 0: ONE.astype(np.float64)},
        {np.int64(3): TWO, np.int64(0): ONE},
        [ONE, None, None, TWO],
    ],
)
def test_an_array_an_entity_in_memory(arrays):
    kg = ig.MultiViewKG(PLACES, ["r"], torch.tensor([[0, 0, 1]]))
    feat, ptr = io.with_views(kg, {"image": arrays}).views("image")
    assert ptr.tolist() == [0, 1, 1, 1, 3]
    assert feat.dtype == torch.float32
    assert feat[:, 0].tolist() == [1, 2, 2]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([ONE], "None, for each of the 4 entities in id order, received 1"),
        ({3: ONE, "Lyon": ONE}, "labels .str. or ids .int. as keys, received int, str"),
        ({4: ONE}, "first 4 in row 1"),
        ({2**70: ONE}, "first 1180591620717411303424 in row 1"),
        ({"Nowhere": ONE}, "first 'Nowhere'"),
        ({0: ONE, 1: ONE[:4]}, r"1: expected shape .* received \(1, 4\)"),
        ({0: None}, "no entity has a view"),
        ({}, "no entity has a view"),
        ({0: ONE * np.nan}, "'Paris' has NaN"),
        ({0: "Paris.png"}, "floating-point features, received <U9"),
    ],
)
def test_arrays_that_are_no_views_of_entities_are_an_error(arrays, message):
    with pytest.raises(ig.DataError, match=message):
        io.views_by_entity(arrays, PLACES)


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_arrays_of_a_file_may_be_named_by_ids(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"

    def write(arrays):
        if suffix == ".npz":
            np.savez(path, **{str(name): value for name, value in arrays.items()})
        else:
            torch.save({name: torch.from_numpy(value) for name, value in arrays.items()}, path)

    write({3: TWO, 0: ONE})
    assert io.read_features(path, PLACES).entity.tolist() == [3, 3, 0]
    write({0: np.ones((4, 5), dtype=np.float32), 1: np.ones((4, 5), dtype=np.float32)})
    with pytest.raises(ig.DataError, match="expected one array of features"):  # of all entities
        io.read_features(path, PLACES)


@pytest.mark.parametrize(
    "present",
    [[True, False, False, True], ["Paris", "Lyon"], [3, 0], np.array([True, False, False, True])],
)
def test_who_has_features_may_be_told(tmp_path, present):
    feat = torch.randn(4, 3)
    feat[1] = torch.nan
    feat[3] = 0  # said to be there, so it is
    path = write_features(tmp_path / "x.npy", feat)
    views = io.read_features(path, PLACES, present=present)
    assert views.entity.tolist() == [0, 3]
    assert torch.equal(views.feat, feat[[0, 3]])
    named = write_features(tmp_path / "y.npz", feat, mask=np.array([True, False, False, True]))
    assert torch.equal(io.read_features(named, PLACES).feat, views.feat)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_features_read_in_portions_are_those_read_whole(suffix, rows, tmp_path, monkeypatch):
    feat = torch.randn(10, 2, 4)
    feat[[1, 4, 5], 0] = 0
    feat[[4, 9]] = torch.nan
    there = ~(feat.isnan() | (feat == 0)).all(dim=2)
    monkeypatch.setattr("imvia_graph.io.features._PORTION", rows * 2 * 4 * 4)
    labels = [str(i) for i in range(10)]
    write_features(tmp_path / f"places{suffix}", feat)
    views = ig.io.read_features(tmp_path / f"places{suffix}", labels)
    assert torch.equal(views.feat, feat[there])
    assert torch.equal(views.entity, there.nonzero()[:, 0])
    some = feat[:, 1].nan_to_num()
    write_features(tmp_path / f"some{suffix}", some)
    views = ig.io.read_features(
        tmp_path / f"some{suffix}", labels[2:8], entity=labels, skip_unknown=True
    )
    assert torch.equal(views.feat, some[2:8])


def test_half_stays_and_double_becomes_single():
    assert io.views_from_array(torch.ones(4, 2).half(), PLACES).feat.dtype == torch.float16
    assert io.views_from_array(np.ones((4, 2), dtype=">f8"), PLACES).feat.dtype == torch.float32


def test_views_of_a_kg_folder_are_features_too(tmp_path):
    kg = ring_kg()
    kg.save(tmp_path / "kg")
    again = io.with_views(
        kg.replace(views={}), {"text": tmp_path / "kg" / "views" / "text.safetensors"}
    )
    for mine, theirs in zip(again.views("text"), kg.views("text"), strict=True):
        assert torch.equal(mine, theirs)
    assert again.view_sources("text") == kg.view_sources("text")


def test_views_may_be_given_with_whose_they_are():
    feat = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    seen = io.with_views(ring_kg(), {"sound": (feat, ["e3", "e1", "e3"])})
    found, ptr = seen.views("sound")
    assert found[:, 0].tolist() == [2.0, 1.0, 3.0]
    assert ptr.diff().nonzero().flatten().tolist() == [seen.id_of("e1"), seen.id_of("e3")]


def test_what_is_no_pair_of_features_and_whose_they_are_says_what_was_expected():
    with pytest.raises(ig.DataError, match=r"views\['sound'\]: expected .* received a tuple of 1"):
        io.with_views(ring_kg(), {"sound": (torch.ones(2, 2),)})


def test_the_other_modalities_are_kept():
    kg = ring_kg()
    seen = io.with_views(kg, {"image": torch.ones(12, 2), "sound": torch.ones(12, 1)})
    assert seen.modalities == ["image", "text", "sound"]
    assert torch.equal(seen.views("text")[0], kg.views("text")[0])
    assert seen.views("image")[0].shape == (12, 2)


@pytest.mark.parametrize(
    ("feat", "options", "message"),
    [
        (torch.ones(3, 2), {}, "a row for each of the 4 entities in id order, received 3 rows"),
        (torch.ones(4), {}, r"expected features of shape \(4, width\)"),
        (torch.ones(4, 2).long(), {}, "expected floating-point features, received torch.int64"),
        (np.ones((4, 2), int), {}, "expected floating-point features, received int64"),
        (torch.zeros(4, 2), {}, "every row is zero or NaN"),
        (torch.ones(2, 2), {"entity": ["Paris"]}, "one entity per row, received 1 for 2 rows"),
        (torch.ones(1, 2), {"entity": ["Rome"]}, "first 'Rome' in row 1"),
        (
            torch.ones(1, 2),
            {"entity": [4]},
            r"first 4 in row 1 \(counted from 1\); expected 0 to 3",
        ),
        (torch.ones(1, 2, 2), {"entity": [1]}, r"\(views, width\) with the entity of each"),
        (torch.ones(4, 2), {"present": [True]}, "one value for each of the 4 entities, received 1"),
        (torch.ones(4, 2), {"present": ["Rome"]}, "first 'Rome'"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(feat, options, message):
    with pytest.raises(ig.DataError, match=message):
        io.views_from_array(feat, PLACES, **options)


@pytest.mark.parametrize("options", [{}, {"entity": ["Paris", "AC/DC", "Zoë", "Lyon"]}])
def test_nan_names_the_entity(options):
    feat = torch.ones(4, 2)
    feat[2, 1] = torch.nan
    with pytest.raises(ig.DataError, match=r"a view of 'Zoë' has NaN .* \(1 such views\)"):
        io.views_from_array(feat, PLACES, **options)


class _Boom:
    def __reduce__(self):
        return (print, ("a pickle ran",))


def test_a_pickle_is_refused_and_does_not_run(tmp_path, capsys):
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Boom()))
    torch.save({"feat": torch.ones(4, 2), "more": _Boom()}, tmp_path / "inside.pth")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(_Boom()))
    np.save(tmp_path / "x.npy", np.array([_Boom()]), allow_pickle=True)
    for name in ("plain.pth", "inside.pth", "x.pkl"):
        with pytest.raises(ig.DataError, match="may run code when it is read; imvia-graph reads"):
            io.read_features(tmp_path / name, PLACES)
    with pytest.raises(ig.DataError, match="expected a NumPy file without Python objects"):
        io.read_features(tmp_path / "x.npy", PLACES)
    assert "a pickle ran" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".pt", ".hdf5"])
def test_a_file_that_is_no_such_file_is_named(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"this is not it" * 9)
    with pytest.raises(ig.DataError, match=rf"x\{suffix}"):
        io.read_features(path, PLACES)
    path.write_bytes(b"")
    with pytest.raises(ig.DataError, match="is empty: expected features"):
        io.read_features(path, PLACES)


def test_several_arrays_need_a_name(tmp_path):
    np.savez(tmp_path / "x.npz", clip=np.ones((4, 2)), vgg=np.ones((4, 3)))
    with pytest.raises(ig.DataError, match=r"found 'clip' \(4, 2\), 'vgg' \(4, 3\)\. Name the"):
        io.read_features(tmp_path / "x.npz", PLACES)
    assert io.read_features(tmp_path / "x.npz", PLACES, key="vgg").feat.shape == (4, 3)
    with pytest.raises(ig.DataError, match="there is no array 'bert'"):
        io.read_features(tmp_path / "x.npz", PLACES, key="bert")


def test_other_suffixes_are_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(ig.DataError, match=r"\.safetensors, \.npy, .* '\.bin' is none of these"):
        io.read_features(tmp_path / "x.bin", PLACES)


@pytest.mark.parametrize("name", ["texts.tsv", "images"])
def test_texts_and_pictures_as_features_are_told_what_makes_features_of_them(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / "texts.tsv").write_text("Lyon\ta town\n")
    with pytest.raises(ig.DataError, match=r"texts or pictures, use `imvia-graph encode`"):
        io.read_features(tmp_path / name, PLACES)


# -- the command ----------------------------------------------------------------------------------


def test_fit_takes_ready_features(tmp_path):
    kg = ring_kg(views=False)
    kg.save(tmp_path / "kg")
    torch.save(torch.randn(12, 6), tmp_path / "visual.pth")
    np.save(tmp_path / "text.npy", np.random.default_rng(0).normal(size=(12, 2, 4)))
    fit = ["-m", "imvia_graph", "fit", "kg", "--epochs", "1", "--set", "dim=8", "--out", "run"]
    views = ["--views", "image=visual.pth", "--views", "text=text.npy"]
    result = run_python(*fit, *views, "--device", "cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    saved = ig.load(tmp_path / "run").kg
    assert {m: len(saved.views(m)[0]) for m in saved.modalities} == {"image": 12, "text": 24}
    bad = run_python(*fit, "--views", "visual.pth", cwd=tmp_path)
    assert bad.returncode == 2
    assert "expected NAME=FILE" in bad.stderr


def test_fit_takes_features_of_the_published_shapes_by_two_options(tmp_path):
    """DB15K as it is published, with one row of features an entity in two .pth files beside."""
    kg = ring_kg(views=False)
    ig.io.write_openke(kg, tmp_path / "data" / "DB15K")
    image = torch.randn(kg.num_entities, 4096)
    image[3] = 0  # an entity without a picture
    torch.save(image, tmp_path / "data" / "DB15K" / "visual.pth")
    torch.save(torch.randn(kg.num_entities, 768), tmp_path / "data" / "DB15K" / "text.pth")
    fit = [
        "-m",
        "imvia_graph",
        "fit",
        "DB15K",
        "--epochs",
        "1",
        "--set",
        "dim=8",
        "--out",
        "../run",
    ]
    views = ["--views", "image=DB15K/visual.pth", "--views", "text=DB15K/text.pth"]
    result = run_python(
        *fit, *views, "--device", "cpu", cwd=tmp_path / "data", IMVIA_DATA=str(tmp_path / "data")
    )
    assert result.returncode == 0, result.stderr
    run = ig.load(tmp_path / "run")
    assert {m: tuple(run.kg.views(m)[0].shape) for m in run.kg.modalities} == {
        "image": (11, 4096),
        "text": (12, 768),
    }
    assert run.model.heads == ["structure", "image", "text", "joint", "complex"]
    torch.testing.assert_close(run.kg.views("image")[0][:3], image[:3])


def test_the_extra_for_hdf5_is_pinned():
    assert "h5py==" in (ROOT / "constraints.txt").read_text()
    assert json.dumps("hdf5") in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize(
    ("kept", "read"),
    [
        ({}, True),
        ({"chunks": (3,)}, True),
        ({"maxshape": (None,)}, True),
        ({"chunks": (3,), "compression": "gzip"}, True),
        ({"chunks": (3,), "compression": "gzip", "shuffle": True}, True),
        ({"chunks": (3,), "compression": "lzf"}, False),
        ({"fillvalue": "Paris"}, False),
    ],
)
def test_texts_of_hdf5_however_they_are_kept(tmp_path, kept, read):
    labels = ["Lyon", "Paris", "Lyon", PLACES[3]]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["feat"] = torch.randn(4, 2).numpy()
        file.create_dataset("entity", data=labels, dtype=h5py.string_dtype(), **kept)
        file.create_dataset("none", (0,), dtype=h5py.string_dtype())
        file.create_dataset("lists", (2,), dtype=h5py.vlen_dtype(np.int64))[0] = [1, 2]
    if not read:
        with pytest.raises(ig.DataError, match="'entity': this storage of texts is not supported"):
            io.read_features(tmp_path / "x.h5", PLACES)
        return
    views = io.read_features(tmp_path / "x.h5", PLACES)
    assert [PLACES[i] for i in views.entity.tolist()] == labels
