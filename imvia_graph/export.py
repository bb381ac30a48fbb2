"""Export of a run's embeddings and predictions for other programs.

`export_embeddings` writes one table per head (structure, each modality, joint, complex) with the
labels of its rows. `export_predictions` answers many queries and writes triples. Files are written
completely or not at all, and existing ones are overwritten only with ``force``.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args
from urllib.parse import quote

import numpy as np
import polars as pl
import torch
from safetensors.torch import save_file
from torch import Tensor

from imvia_graph import _files
from imvia_graph._display import shorten
from imvia_graph.checkpoint import run_of
from imvia_graph.errors import DataError, UnknownLabelError
from imvia_graph.inference import Predictor, Query, Side, query_ids
from imvia_graph.io.arrays import text_array
from imvia_graph.kg import SPLITS, MultiViewKG

if TYPE_CHECKING:
    from imvia_graph.run import Run

What = Literal["entities", "relations"]
EmbeddingFormat = Literal["safetensors", "npz", "parquet", "word2vec"]
PredictionFormat = Literal["tsv", "ntriples"]

#: Format by file suffix.
EMBEDDING_SUFFIXES: dict[str, EmbeddingFormat] = {
    ".safetensors": "safetensors",
    ".npz": "npz",
    ".parquet": "parquet",
    ".txt": "word2vec",
    ".vec": "word2vec",
}
PREDICTION_SUFFIXES: dict[str, PredictionFormat] = {".tsv": "tsv", ".nt": "ntriples"}
#: Format name and version that a safetensors export and its labels file record.
FORMAT, FORMAT_VERSION = "imvia-graph/embeddings", 1
#: Names of the columns beside the embeddings.
LABEL_COLUMNS = {"npz": ("labels", "names", "inverse"), "parquet": ("label", "name", "inverse")}


# -- embeddings -----------------------------------------------------------------------------------


def export_embeddings(
    run: Run,
    path: str | os.PathLike[str],
    format: EmbeddingFormat | None = None,
    *,
    what: What = "entities",
    heads: Sequence[str] | None = None,
    force: bool = False,
) -> list[Path]:
    r"""Write the embeddings of entities or relations, one table per head, with their labels.

    - ``safetensors``: a float32 tensor (rows, dim) per head, under the head's name; beside it
      ``<name>.labels.json`` with ``labels`` and ``names`` (lists in row order), and for relations
      ``inverse``. The labels have their own file because a safetensors header is limited to 100 MB.
    - ``npz``: the same arrays, with ``labels``, ``names`` (and ``inverse``) as arrays of strings
      (and bools), the strings compressed; ``numpy.load`` reads it without pickle. In memory all
      strings are as wide as the longest one; an array of more than 1 GiB is an error.
    - ``parquet``: columns ``label``, ``name`` (and ``inverse``), and a fixed-size list per head.
    - ``word2vec``: the text format, ``rows dim`` in the first line, then one token and its numbers
      per line. A token is the label, with ``%``, white space and unprintable characters replaced by
      the ``%XX`` of their UTF-8 bytes; ``urllib.parse.unquote`` restores the label. A file holds
      one table; of several heads, each has a file with its name before the suffix
      (``vectors.text.txt``).

    Entities are embedded without a relation, like candidates (see `Run.entity_embeddings`).
    All relations come first, then all inverses in the same order. ``inverse`` marks the inverses;
    in word2vec text, a ``^`` before the token does (a label's own leading ``^`` becomes ``%5E``).
    In npz and Parquet, ``_embedding`` is appended to a head's name that is also a label column's.

    Parameters
    ----------
    run : Run
        A trained run.
    path : path
        The file to write.
    format : {"safetensors", "npz", "parquet", "word2vec"}, optional
        Default: by the suffix (``.txt`` and ``.vec`` are word2vec).
    what : {"entities", "relations"}
        Which embeddings to write.
    heads : sequence of str, optional
        Heads of the model: ``structure``, modalities, ``joint``, ``complex``. Default: all.
    force : bool
        Whether to overwrite existing files.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    DataError
        A file exists or belongs to a run, the format is unknown, or it cannot hold a label.
    UnknownLabelError
        The model has no head of a given name.

    Examples
    --------
    >>> import imvia_graph as ig, numpy as np, pathlib, tempfile
    >>> run = ig.fit("countries", epochs=1, dim=16, out=None)
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "vectors.npz"
    >>> [written] = ig.export_embeddings(run, path, heads=["structure", "text"])
    >>> arrays = np.load(written)
    >>> arrays.files, arrays["text"].shape == (run.kg.num_entities, 16)
    (['labels', 'names', 'structure', 'text'], True)
    """
    path = Path(path)
    chosen: EmbeddingFormat = _format(path, format, EMBEDDING_SUFFIXES, get_args(EmbeddingFormat))
    if what not in get_args(What):
        raise DataError(f"what: expected entities or relations, received {what!r}.")
    heads = _heads(run.model.heads, heads)
    paths = _paths(path, chosen, heads)
    for each in paths:
        check_free(each, force)
    tables = run.entity_embeddings() if what == "entities" else run.relation_embeddings()
    table = _Table.of(run.kg, what, {head: tables[head] for head in heads})
    write: dict[EmbeddingFormat, Callable[[list[Path], _Table], None]] = {
        "safetensors": _write_safetensors,
        "npz": _write_npz,
        "parquet": _write_parquet,
        "word2vec": _write_word2vec,
    }
    write[chosen](paths, table)
    return paths


class _Table(NamedTuple):
    """Labels, names, inverse flags (None for entities), and a (rows, d) table per head."""

    what: What
    labels: list[str]
    names: list[str]
    inverse: list[bool] | None
    heads: dict[str, Tensor]

    @classmethod
    def of(cls, kg: MultiViewKG, what: What, heads: dict[str, Tensor]) -> _Table:
        heads = {head: table.detach().cpu().float().contiguous() for head, table in heads.items()}
        if what == "entities":
            return cls(what, kg.entities, kg.entity_names, None, heads)
        inverse = [False] * kg.num_relations + [True] * kg.num_relations
        return cls(what, kg.relations * 2, kg.relation_names * 2, inverse, heads)


Format = TypeVar("Format", bound=str)


def _format(
    path: Path, name: str | None, suffixes: dict[str, Format], known: tuple[Format, ...]
) -> Format:
    if name is not None:
        for format in known:
            if format == name:
                return format
        raise DataError(f"format: expected one of {', '.join(known)}; received {name!r}.")
    if path.suffix.lower() not in suffixes:
        raise DataError(
            f"{path}: the suffix {path.suffix!r} stands for no format. Give a format"
            f" ({', '.join(known)}) or one of the suffixes {', '.join(suffixes)}."
        )
    return suffixes[path.suffix.lower()]


def _heads(known: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    heads = list(dict.fromkeys(known if wanted is None else wanted))
    missing = [head for head in heads if head not in known]
    if missing or not heads:
        raise UnknownLabelError(
            f"The model has no head {', '.join(map(repr, missing))}; it has"
            f" {', '.join(map(repr, known))}."
            if missing
            else f"No head is named; the model has {', '.join(map(repr, known))}."
        )
    return heads


def _paths(path: Path, format: EmbeddingFormat, heads: Sequence[str]) -> list[Path]:
    if format == "safetensors":
        return [path, path.with_name(f"{path.stem}.labels.json")]
    if format == "word2vec" and len(heads) > 1:
        return [path.with_name(f"{path.stem}.{head}{path.suffix}") for head in heads]
    return [path]


def check_free(path: Path, force: bool) -> None:
    """Raise a DataError if ``path`` is no file, belongs to a run, or exists without ``force``."""
    _files.check_target(path)
    folder = run_of(path)
    if folder is not None:
        raise DataError(
            f"{path} belongs to the run in {folder} and cannot be overwritten. Choose another file."
        )
    if os.path.lexists(path) and not force:
        raise DataError(
            f"{path} exists. Choose another file, or overwrite it with --force (force=True)."
        )


def _write_safetensors(paths: list[Path], table: _Table) -> None:
    path, beside = paths
    about: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "what": table.what,
        "labels": table.labels,
        "names": table.names,
    }
    if table.inverse is not None:
        about["inverse"] = table.inverse
    # Written first, so that tensors never exist without their labels.
    _files.write_json(beside, about, follow=True)
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "what": table.what,
        "labels": beside.name,
    }
    # Cloned, because heads may share memory, which safetensors refuses.
    tensors = {head: value.clone() for head, value in table.heads.items()}
    _files.write_atomically(
        path, lambda temporary: save_file(tensors, temporary, metadata), follow=True
    )


def _write_npz(paths: list[Path], table: _Table) -> None:
    columns = LABEL_COLUMNS["npz"]
    # NumPy drops NUL characters at the end of strings.
    if any("\0" in text for texts in (table.labels, table.names) for text in texts):
        raise DataError(f"{paths[0]}: a label contains a NUL character, which npz cannot hold.")
    arrays: dict[str, Any] = {
        columns[0]: text_array(paths[0], table.labels, "Parquet or safetensors"),
        columns[1]: text_array(paths[0], table.names, "Parquet or safetensors"),
    }
    if table.inverse is not None:
        arrays[columns[2]] = np.array(table.inverse, dtype=bool)
    arrays.update(_renamed(table.heads, columns))

    def write(temporary: Path) -> None:
        # Not numpy.savez, whose parameter `file` could not be the name of a modality.
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, array in arrays.items():
                info = zipfile.ZipInfo(f"{name}.npy")
                # NumPy pads strings to the longest one; numbers hardly compress.
                text = array.dtype.kind == "U"
                info.compress_type = zipfile.ZIP_DEFLATED if text else zipfile.ZIP_STORED
                with archive.open(info, "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)

    _files.write_atomically(paths[0], write, follow=True)


def _renamed(heads: dict[str, Tensor], taken: Sequence[str]) -> dict[str, Any]:
    """Return arrays by head; ``_embedding`` is appended to a name that is taken."""
    arrays: dict[str, Any] = {}
    for head, value in heads.items():
        name = head
        while name in taken or (name != head and name in heads):
            name += "_embedding"
        arrays[name] = value.numpy()
    return arrays


def _write_parquet(paths: list[Path], table: _Table) -> None:
    columns = LABEL_COLUMNS["parquet"]
    series = [
        pl.Series(columns[0], table.labels, dtype=pl.String),
        pl.Series(columns[1], table.names, dtype=pl.String),
    ]
    if table.inverse is not None:
        series.append(pl.Series(columns[2], table.inverse, dtype=pl.Boolean))
    for name, array in _renamed(table.heads, columns).items():
        kind = pl.Array(pl.Float32, array.shape[1])
        series.append(pl.Series(name, array, dtype=kind))
    frame = pl.DataFrame(series)
    _files.write_atomically(paths[0], frame.write_parquet, follow=True)


def _write_word2vec(paths: list[Path], table: _Table) -> None:
    tokens = [word2vec_token(label) for label in table.labels]
    if table.inverse is not None:
        tokens = [
            f"^{token}" if inverse else token
            for token, inverse in zip(tokens, table.inverse, strict=True)
        ]
    for path, value in zip(paths, table.heads.values(), strict=True):
        rows, width = value.shape
        frame = pl.from_numpy(value.numpy(), schema=[f"column_{i}" for i in range(width)])
        frame = frame.insert_column(0, pl.Series("token", tokens, dtype=pl.String))
        header = f"{rows} {width}\n".encode()
        _files.write_atomically(path, _word2vec_writer(header, frame), follow=True)


def _word2vec_writer(header: bytes, frame: pl.DataFrame) -> Callable[[Path], None]:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(header)
            frame.write_csv(file, include_header=False, separator=" ", quote_style="never")

    return write


def word2vec_token(label: str) -> str:
    r"""Return a label as a token without white space; ``urllib.parse.unquote`` restores it.

    ``%``, white space, unprintable characters and a leading ``^`` become the ``%XX`` of their UTF-8
    bytes; other characters stay.

    Examples
    --------
    >>> from imvia_graph.export import word2vec_token
    >>> word2vec_token("100 % São Tomé\n")
    '100%20%25%20São%20Tomé%0A'
    """
    if label.isprintable():  # a space is printable, other white space is not
        token = label.replace("%", "%25").replace(" ", "%20")
    else:
        token = "".join(
            letter if letter.isprintable() and letter not in "% " else quote(letter, safe="")
            for letter in label
        )
    return f"%5E{token[1:]}" if token.startswith("^") else token


# -- predictions ----------------------------------------------------------------------------------


def export_predictions(
    run: Run,
    path: str | os.PathLike[str],
    queries: Iterable[Query],
    format: PredictionFormat | None = None,
    *,
    k: int = 10,
    include_known: bool = False,
    include_self: bool | None = None,
    force: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> Path:
    """Answer many queries and write the best answers to each, best first, as triples.

    - ``tsv``: the columns of `predict_all` with a header, separated by tabs, without quoting.
    - ``ntriples``: RDF triples, without ranks and scores, which N-Triples cannot hold. Labels
      become IRIs as in `imvia_graph.io.rdf`, so that `load_kg` restores them: an absolute IRI stays
      as it is, any other label is percent-encoded after ``urn:imvia:entity:`` or
      ``urn:imvia:relation:``.

    Parameters
    ----------
    run : Run
        A trained run.
    path : path
        The file to write.
    queries : iterable of Query
        Queries, for example from `queries_of` or `read_queries`.
    format : {"tsv", "ntriples"}, optional
        Default: by the suffix, ``.tsv`` or ``.nt``.
    k, include_known, include_self, on_batch
        As for `predict_all`.
    force : bool
        Whether to overwrite an existing file.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    DataError
        The file exists or belongs to a run, the format is unknown, TSV cannot hold a label, or a
        query is invalid.
    UnknownLabelError
        A query names an entity or a relation that the graph does not have.

    Examples
    --------
    >>> import imvia_graph as ig, pathlib, tempfile
    >>> from imvia_graph.export import queries_of
    >>> run = ig.fit("countries", epochs=1, dim=16)
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "borders.tsv"
    >>> _ = ig.export_predictions(run, path, queries_of(run.kg, ["borders"]), k=3)
    >>> path.read_text().splitlines()[0].split()
    ['head', 'relation', 'tail', 'asked', 'rank', 'score', 'known']
    """
    path = Path(path)
    chosen = _format(path, format, PREDICTION_SUFFIXES, get_args(PredictionFormat))
    check_free(path, force)
    frame = predict_all(
        run,
        queries,
        k=k,
        include_known=include_known,
        include_self=include_self,
        on_batch=on_batch,
    )
    if chosen == "tsv":
        for column in _files.TRIPLE_COLUMNS:
            _files.check_tsv_labels(path, frame[column].unique(maintain_order=True).to_list())
        _files.write_atomically(
            path,
            lambda temporary: frame.write_csv(temporary, separator="\t", quote_style="never"),
            follow=True,
        )
    else:
        _write_ntriples(path, frame)
    return path


def predict_all(
    run: Run,
    queries: Iterable[Query],
    *,
    k: int = 10,
    include_known: bool = False,
    include_self: bool | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """Return the best answers to many queries as a table; the batched form of `Run.predict`.

    Parameters
    ----------
    run : Run
        A trained run.
    queries : iterable of Query
        Queries, each with either a head or a tail.
    k : int
        Maximum number of answers to a query. Equal scores are ordered by id.
    include_known : bool
        Whether triples of the graph (train, valid or test) are among the answers.
    include_self : bool, optional
        Whether the query's own entity may be an answer. Default: if a training triple of the
        relation has the same head and tail.
    on_batch : callable, optional
        Called with the number of queries answered so far and their total number.

    Returns
    -------
    polars.DataFrame
        The answers, best first, query by query: ``head``, ``relation``, ``tail`` (labels),
        ``asked`` (``head`` or ``tail``, the missing end), ``rank`` (from 1), ``score`` (of the
        decision; comparable within a query only), ``known`` (whether the triple is in the graph).

    Raises
    ------
    DataError
        There are no queries, a query has both ends or none, or k is below 1.
    UnknownLabelError
        A query names an entity or a relation that the graph does not have.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> from imvia_graph.export import Query, predict_all
    >>> run = ig.fit("countries", epochs=1, dim=16)
    >>> frame = predict_all(run, [Query("France", "borders", None)], k=2)
    >>> frame.select("head", "asked", "rank", "known").rows()
    [('France', 'tail', 1, False), ('France', 'tail', 2, False)]
    """
    kg = run.kg
    ids = []
    for number, query in enumerate(queries):
        try:
            ids.append(query_ids(kg, query))
        except DataError as error:
            raise DataError(f"Query {number}: {error}") from None
    if not ids:
        raise DataError("There are no queries to answer.")
    entity, relation = torch.tensor(ids).unbind(1)
    found = Predictor(run.model, kg).answers(
        entity,
        relation,
        k=k,
        include_known=include_known,
        include_self=include_self,
        # Limited because, unlike ranking, this holds all scores of a batch.
        batch_size=min(run.settings.ranking_batch_size, 1024),
        on_batch=on_batch,
    )
    answer = found.entity
    given, asked_relation = entity[found.query], relation[found.query]
    of_tail = asked_relation < kg.num_relations
    entities = pl.Series(kg.entities, dtype=pl.String)
    relations = pl.Series(kg.relations, dtype=pl.String)
    return pl.DataFrame(
        {
            "head": entities[torch.where(of_tail, given, answer).numpy()],
            "relation": relations[(asked_relation % kg.num_relations).numpy()],
            "tail": entities[torch.where(of_tail, answer, given).numpy()],
            "asked": pl.Series(["head", "tail"])[of_tail.long().numpy()],
            "rank": found.rank.numpy(),
            "score": found.score.float().numpy(),
            "known": found.known.numpy(),
        }
    )


def queries_of(
    kg: MultiViewKG,
    relations: Sequence[str] | None = None,
    *,
    ask: Side = "tail",
    entities: Literal["seen", "all"] = "seen",
) -> list[Query]:
    """Return a query for each relation and each entity at its given end.

    Parameters
    ----------
    kg : MultiViewKG
        The graph.
    relations : sequence of str, optional
        Labels or display names. Default: all.
    ask : {"tail", "head"}
        The missing end.
    entities : {"seen", "all"}
        Entities at the given end: those seen there in a triple of the relation, in any split, or
        all.

    Examples
    --------
    >>> import torch, imvia_graph as ig
    >>> from imvia_graph.export import queries_of
    >>> kg = ig.MultiViewKG.from_labels([("Ada", "knows", "Bob"), ("Bob", "likes", "Ada")])
    >>> [tuple(query) for query in queries_of(kg, ["knows"])]
    [('Ada', 'knows', None)]
    >>> [tuple(query) for query in queries_of(kg, ["knows"], ask="head", entities="all")]
    [(None, 'knows', 'Ada'), (None, 'knows', 'Bob')]
    """
    if ask not in get_args(Side):
        raise DataError(f"ask: expected tail or head, received {ask!r}.")
    if entities not in ("seen", "all"):
        raise DataError(f"entities: expected seen or all, received {entities!r}.")
    wanted = kg.relations if relations is None else relations
    chosen = dict.fromkeys(kg.id_of(relation, "relation") for relation in wanted)
    entities_of = dict.fromkeys(chosen, range(kg.num_entities))
    if entities == "seen":
        whole = torch.cat([kg.triples(split) for split in SPLITS])
        # Distinct (relation, entity) pairs, sorted by relation, then by entity.
        keys = whole[:, 1] * kg.num_entities + whole[:, 0 if ask == "tail" else 2]
        pairs = keys.unique()
        of_each = torch.bincount(pairs // kg.num_entities, minlength=kg.num_relations)
        by_relation = (pairs % kg.num_entities).split(of_each.tolist())
        entities_of = {relation: by_relation[relation].tolist() for relation in chosen}
    queries = []
    for relation_id in chosen:
        label = kg.relations[relation_id]
        for entity in (kg.entities[i] for i in entities_of[relation_id]):
            queries.append(
                Query(entity, label, None) if ask == "tail" else Query(None, label, entity)
            )
    return queries


def read_queries(path: str | os.PathLike[str], kg: MultiViewKG) -> list[Query]:
    r"""Read queries from a UTF-8 file, one per line: head, relation and tail, separated by tabs.

    The missing end is ``?`` or empty. Blank lines are skipped.

    Raises
    ------
    DataError
        A line does not have three columns and exactly one missing end, or names an unknown entity
        or relation (the message says which line); or the file has no queries.

    Examples
    --------
    >>> import imvia_graph as ig, pathlib, tempfile
    >>> from imvia_graph.export import read_queries
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "queries.tsv"
    >>> _ = path.write_text("France\tborders\t?\n?\tborders\tSpain\n")
    >>> [tuple(query) for query in read_queries(path, ig.load_kg("countries"))]
    [('France', 'borders', None), (None, 'borders', 'Spain')]
    """
    queries = []
    for number, line in _files.read_lines(Path(path)):
        if not line.strip():
            continue
        fields = line.split("\t")
        missing = [fields[i] in ("", "?") for i in (0, 2)] if len(fields) == 3 else []
        if missing.count(True) != 1 or not fields[1]:
            raise DataError(
                f"{path}, line {number}: expected head, relation and tail, separated by tabs, with"
                f" ? for either head or tail; found {shorten(line)!r}."
            )
        head, relation, tail = fields
        query = Query(None if missing[0] else head, relation, None if missing[1] else tail)
        try:
            query_ids(kg, query)
        except UnknownLabelError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        queries.append(query)
    if not queries:
        raise DataError(f"{path} holds no queries; expected lines of head, relation and ?.")
    return queries


def _write_ntriples(path: Path, frame: pl.DataFrame) -> None:
    # Imported here because it needs an RDF library.
    from imvia_graph.io import rdf

    columns = []
    for column in _files.TRIPLE_COLUMNS:
        base = rdf.RELATION_BASE if column == "relation" else rdf.ENTITY_BASE
        labels = frame[column].unique(maintain_order=True)
        made = rdf.iris(labels.to_list(), base)
        columns.append(frame[column].replace_strict(labels, made, return_dtype=pl.String))
    lines = pl.select(pl.format("<{}> <{}> <{}> .", *columns).alias("line")).to_series()
    _files.write_text(path, "".join(f"{line}\n" for line in lines), follow=True)


__all__ = [
    "Query",
    "export_embeddings",
    "export_predictions",
    "predict_all",
    "queries_of",
    "read_queries",
    "word2vec_token",
]
