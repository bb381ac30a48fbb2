"""What a Parquet file announces is believed only as far as its size; good files are read."""

import io
import itertools
import re

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from pyarrow import parquet

import imvia_graph as ig
from imvia_graph._parquet import check_parquet

ROWS = 3000


def table():
    """Columns of every kind: texts, categories, gaps, nested lists and structs, nothing at all."""
    numbers = range(ROWS)
    return pa.table(
        {
            "head": [f"e{i * i % 97}" for i in numbers],
            "relation": pa.array([f"r{i % 7}" for i in numbers]).dictionary_encode(),
            "tail": [None if i % 5 == 0 else f"e{i}" for i in numbers],
            "number": np.arange(ROWS),
            "list": [[1] * (i % 4) for i in numbers],
            "struct": [{"a": i, "b": [str(i)]} for i in numbers],
            "flag": [True] * ROWS,
            "nothing": pa.nulls(ROWS),
        }
    )


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
def test_what_arrow_writes_is_let_through(compression, tmp_path):
    path = tmp_path / "t.parquet"
    choices = itertools.product(["1.0", "2.0"], [True, False], [ROWS, 100], [True, False])
    for version, dictionary, rows, index in choices:
        parquet.write_table(
            table(),
            path,
            compression=compression,
            data_page_version=version,
            data_page_size=500,
            use_dictionary=dictionary,
            row_group_size=rows,
            write_page_index=index,
            write_page_checksum=index,
        )
        check_parquet(path)


@pytest.mark.parametrize("compression", ["uncompressed", "snappy", "gzip", "zstd", "lz4", "brotli"])
def test_what_polars_writes_is_let_through(compression, tmp_path):
    path = tmp_path / "t.parquet"
    for size, rows in itertools.product([None, 500], [None, 100]):
        pl.from_arrow(table()).write_parquet(
            path, compression=compression, data_page_size=size, row_group_size=rows
        )
        check_parquet(path)


def test_a_table_without_rows_is_let_through(tmp_path):
    parquet.write_table(table().slice(0, 0), tmp_path / "t.parquet")
    check_parquet(tmp_path / "t.parquet")
    pl.DataFrame({"head": []}).write_parquet(tmp_path / "t.parquet")
    check_parquet(tmp_path / "t.parquet")


def three_facts():
    file = io.BytesIO()
    facts = {"head": ["e1", "e2"], "relation": ["r", "s"], "tail": ["e2", "e3"]}
    pl.DataFrame(facts).write_parquet(file)
    return file.getvalue()


#: The header of a page: its type, its two lengths, and the number of values, in Thrift's compact
#: form: field and type, then twice the number, less one if it is negative.
HEADER = re.compile(rb"\x15\x00\x15(.)\x15(.)\x2c\x15\x04", re.DOTALL)


@pytest.mark.parametrize("values", [b"\x05", b"\x01", b"\x7f"], ids=["-3", "-1", "-64"])
@pytest.mark.parametrize("columns", [None, (0, 1, 2)])
def test_pages_with_less_than_no_values_are_refused_before_they_end_the_process(
    values, columns, tmp_path
):
    content = three_facts()
    places = [found.end() - 1 for found in HEADER.finditer(content)]
    assert len(places) == 3  # a page a column
    for place in places:
        path = tmp_path / "t.parquet"
        path.write_bytes(content[:place] + values + content[place + 1 :])
        with pytest.raises(ig.DataError, match=r"t\.parquet: expected a Parquet .*a count is -"):
            ig.load_kg(path, "published", split=False, columns=columns)
        with pytest.raises(ig.DataError, match="a count is -"):
            ig.io.read_texts(path, ["e1", "e2"], columns=("head", "tail"))


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


@pytest.mark.parametrize(
    ("field", "message"),
    [(3, "claims 2,000,000,000 rows"), (1, "claims 2,000,000,000 bytes in one page")],
)
def test_pages_that_announce_far_more_than_the_file_holds_are_refused(field, message, tmp_path):
    content = three_facts()
    found = HEADER.search(content)
    place = found.end() - 1 if field == 3 else found.start(1)
    path = tmp_path / "t.parquet"
    more = varint(4_000_000_000)
    path.write_bytes(content[:place] + more + content[place + 1 :])
    with pytest.raises(ig.DataError, match=f"{message} .*decompression bomb"):
        check_parquet(path)


@pytest.mark.parametrize("place", range(3))
def test_a_footer_that_lies_is_refused(place, tmp_path):
    content = three_facts()
    path = tmp_path / "t.parquet"
    length = int.from_bytes(content[-8:-4], "little")
    lies = [
        content[:-8] + (2**31).to_bytes(4, "little") + b"PAR1",
        content[: -8 - length] + b"\x1c" * length + content[-8:],  # struct in struct in struct
        content[: -8 - length] + b"\x19\xfc" + varint(2**40) + b"\0" * (length - 8) + content[-8:],
    ]
    path.write_bytes(lies[place])
    with pytest.raises(ig.DataError, match="expected a Parquet file"):
        check_parquet(path)
