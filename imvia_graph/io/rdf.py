"""RDF: N-Triples and Turtle, read with pyoxigraph.

IRIs become labels unchanged. The names of blank nodes are local to a file, so blank nodes are
numbered in the order of their appearance in it: ``_:b0``, ``_:b1``, … in a single file or in the
file of train, ``_:valid-b0``, … and ``_:test-b0``, … in the files of these splits. A file therefore
always gives the same labels, and blank nodes of two files are never the same entity, whatever their
names.

Labels that are not IRIs are written percent-encoded under a base, by default ``urn:imvia:entity:``
or ``urn:imvia:relation:``, and decoded when read: ``New York`` becomes
``<urn:imvia:entity:New%20York>``. A label that is an absolute IRI and does not start with the base
is written unchanged.

Literals are not entities. By default they are left out. With ``literals="numbers"``, numeric
literals become the modality ``number``: one view for each entity that has any, with two columns per
predicate, in the order of the predicates' labels. The first column is the number, standardised over
the entities that have it (mean 0, standard deviation 1) and 0 for the others; the second is 1 if
the number is known, else 0. Several numbers of one entity and predicate are averaged.
`read_literals` reads texts for an encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote, unquote

import numpy as np
import polars as pl
import torch

from imvia_graph import _files
from imvia_graph._files import TRIPLE_COLUMNS
from imvia_graph._labels import decode_triples, encode_labels
from imvia_graph._tables import write_lines
from imvia_graph.errors import DataError, IMVIAError
from imvia_graph.io.source import Source, from_frames
from imvia_graph.io.tables import form_of, target_files
from imvia_graph.io.views import RawViews
from imvia_graph.kg import MultiViewKG, Split, Views

Literals = Literal["leave-out", "numbers"]
#: Prefixes under which labels that are not IRIs are written.
ENTITY_BASE, RELATION_BASE = "urn:imvia:entity:", "urn:imvia:relation:"
#: Name of the modality of numbers.
NUMBER = "number"

_XSD = "http://www.w3.org/2001/XMLSchema#"
_NUMBERS = frozenset(
    _XSD + name
    for name in (
        *("integer", "decimal", "double", "float", "int", "long", "short", "byte", "gYear"),
        *("nonNegativeInteger", "positiveInteger", "nonPositiveInteger", "negativeInteger"),
        *("unsignedInt", "unsignedLong", "unsignedShort", "unsignedByte"),
    )
)
_TEXTS = frozenset({_XSD + "string", "http://www.w3.org/1999/02/22-rdf-syntax-ns#langString"})
# Absolute IRIs of plain characters; pyoxigraph validates those that match.
_IRI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?:[^\x00-\x20<>\"{}|^`\\%\x7f-\xa0]|%[0-9A-Fa-f]{2})+")
_PLAIN_IRI = r"[ \t]*<([A-Za-z][A-Za-z0-9+.-]*:[^\x00-\x20<>\"{}|^`\\]*)>"
# A line of N-Triples with three plain IRIs.
_PLAIN = f"^{_PLAIN_IRI * 3}[ \\t]*\\.[ \\t\\r]*$"
#: Columns of a table of literals.
_LITERAL = ("entity", "predicate", "value", "datatype", "language")
#: Triples converted from RDF to columns at a time.
_BATCH = 500_000


def _library() -> Any:
    try:
        import pyoxigraph
    except ImportError as error:
        raise IMVIAError(
            'RDF needs pyoxigraph, which is not installed: pip install "imvia-graph[rdf]".'
        ) from error
    return pyoxigraph


def read_rdf(
    files: Mapping[Split, Path],
    forms: Mapping[Split, str],
    *,
    whole: bool,
    name: str,
    literals: str = "leave-out",
    base: tuple[str, str] = (ENTITY_BASE, RELATION_BASE),
    entities: Sequence[str] | None = None,
    relations: Sequence[str] | None = None,
) -> Source:
    """Read files of N-Triples or Turtle, one per split."""
    if literals not in get_args(Literals):
        raise DataError(
            f"literals: expected one of {', '.join(get_args(Literals))}; received {literals!r}."
        )
    frames: dict[Split, pl.DataFrame] = {}
    found: list[pl.DataFrame] = []
    for split, path in files.items():
        facts, values = _parse(path, forms[split], split)
        for column, prefix in zip(("head", "relation", "tail"), (*base, base[0]), strict=True):
            facts = _decoded(facts, column, prefix)
        frames[split] = facts
        found.append(values)
        if not facts.height and split == "train":
            raise DataError(
                f"{path}: expected triples between entities, found"
                f" {'only literals' if values.height else 'none'}."
            )
    kind = " and ".join(
        dict.fromkeys(
            {"ntriples": "N-Triples", "turtle": "Turtle"}[form] for form in forms.values()
        )
    )
    source = from_frames(
        f"{'one file' if whole else 'files by split'} of {kind}",
        frames,
        whole=whole,
        entities=entities,
        relations=relations,
        name=name,
    )
    values = pl.concat(found).unique(maintain_order=True)
    if values.height:
        values = _decoded(_decoded(values, "entity", base[0]), "predicate", base[1])
        notes = source.options.setdefault("notes", [])
        left = values
        if literals == "numbers":
            left, note = _add_numbers(source, values)
            notes += [note] if note else []
        if left.height:
            what = "literals that are not numbers" if literals == "numbers" else "literals"
            rest = "" if literals == "numbers" else "literals='numbers' makes numbers a modality, "
            notes.append(
                f"{left.height} {what}, of {left['entity'].n_unique()} entities, are left out"
                f" ({rest}imvia_graph.io.read_literals reads texts)."
            )
    return source


def read_literals(
    source: str | Path,
    of: MultiViewKG,
    *,
    predicates: Sequence[str] | None = None,
    language: str | None = None,
    base: tuple[str, str] = (ENTITY_BASE, RELATION_BASE),
    split: Split = "train",
) -> RawViews:
    r"""Read the text literals of an N-Triples or Turtle file, for an encoder.

    Parameters
    ----------
    source : path
        The file.
    of : MultiViewKG
        The graph. Texts of entities that are not in it are left out.
    predicates : sequence of str, optional
        Read only literals of these predicates (IRIs). Default: all predicates.
    language : str, optional
        Read only literals in this language (``en``) or without a language. Default: all.
    base : tuple of str
        Prefixes under which labels that are not IRIs were written.
    split : {"train", "valid", "test"}
        The split as which the graph read the file, if it was read from several files; the labels of
        blank nodes depend on it (see `imvia_graph.io.rdf`).

    Returns
    -------
    RawViews
        Views of the modality ``text``, sorted by entity, as `read_texts` returns them.

    Raises
    ------
    DataError
        The file does not exist, is not RDF, or has no matching text of an entity of the graph.

    Examples
    --------
    >>> import imvia_graph as ig, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "graph.ttl"
    >>> _ = path.write_text('@prefix e: <http://e/> . e:a e:knows e:b ; e:about "A text"@en .')
    >>> kg = ig.load_kg(path, split=False)
    >>> ig.io.read_literals(path, kg).source
    ['A text']
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; expected N-Triples or Turtle.")
    values = _decoded(_parse(path, _form(path), split)[1], "entity", base[0])
    values = _decoded(values, "predicate", base[1])
    values = values.filter(pl.col("datatype").is_in(sorted(_TEXTS)) & (pl.col("value") != ""))
    if predicates is not None:
        values = values.filter(pl.col("predicate").is_in(list(predicates)))
    if language is not None:
        values = values.filter(pl.col("language").is_in([language, ""]))
    values = values.filter(pl.col("entity").is_in(of.entities))
    if not values.height:
        which = (
            "" if predicates is None and language is None else " with these predicates and language"
        )
        raise DataError(
            f"{path}: expected text literals{which} of entities of {of.title}, found none."
        )
    entity = encode_labels(values["entity"], of.entities, str(path))
    table = pl.DataFrame({"entity": entity.numpy(), "text": values["value"]})
    kept = table.unique(maintain_order=True).sort("entity", maintain_order=True)
    return RawViews(
        "text",
        torch.from_numpy(kept["entity"].to_numpy().copy()),
        kept["text"].to_list(),
        repeated=table.height - kept.height,
    )


def _form(path: Path) -> str:
    return form_of(path) or "turtle"


class _BlankNodes(dict[str, str]):
    """Labels of the blank nodes of a file, numbered in the order of their look-up."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.prefix = "_:b" if split == "train" else f"_:{split}-b"

    def __missing__(self, name: str) -> str:
        self[name] = f"{self.prefix}{len(self)}"
        return self[name]


def _parse(path: Path, form: str, split: Split) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Read facts (head, relation, tail) and literals (the columns `_LITERAL`)."""
    library = _library()
    if form == "ntriples":
        found = _parse_plain(path, library, _BlankNodes(split))
        if found is not None:
            return found
    kind = {"ntriples": library.RdfFormat.N_TRIPLES, "turtle": library.RdfFormat.TURTLE}[form]
    with _files.open_text(path) as file:
        quads = iter(library.parse(file, format=kind))
        return _tables_of(path, quads, library, _BlankNodes(split))


def _parse_plain(
    path: Path, library: Any, blank_nodes: _BlankNodes
) -> tuple[pl.DataFrame, pl.DataFrame] | None:
    """Read N-Triples with a vectorised pass over plain lines of three IRIs.

    The library parses the other lines (literals, blank nodes, escapes, comments). If that fails,
    return None, so that the library parses the whole file and reports the line at fault.
    """
    try:
        lines = _files.scan_lines(path).collect()["line"]
        triples = lines.str.extract_groups(_PLAIN).struct.unnest()
    except (pl.exceptions.PolarsError, OSError):
        return None
    plain = triples["1"].is_not_null()
    rest = "\n".join(lines.filter(~plain)).encode()
    try:
        quads = iter(library.parse(rest, format=library.RdfFormat.N_TRIPLES))
        facts, values = _tables_of(path, quads, library, blank_nodes)
    except DataError:
        return None
    triples.columns = list(TRIPLE_COLUMNS)
    return pl.concat([triples.filter(plain), facts]), values


def _tables_of(
    path: Path, quads: Iterator[Any], library: Any, blank_nodes: _BlankNodes
) -> tuple[pl.DataFrame, pl.DataFrame]:
    facts: list[pl.DataFrame] = []
    values: list[pl.DataFrame] = []
    while True:
        subjects, predicates, objects, literals = _batch(path, quads, library, blank_nodes)
        if not subjects and not literals:
            break
        facts.append(_frame(TRIPLE_COLUMNS, (subjects, predicates, objects)))
        values.append(_frame(_LITERAL, list(zip(*literals, strict=True)) or [[]] * 5))
    empty, none = _frame(TRIPLE_COLUMNS, [[]] * 3), _frame(_LITERAL, [[]] * 5)
    return pl.concat([empty, *facts]), pl.concat([none, *values])


def _batch(
    path: Path, quads: Iterator[Any], library: Any, blank_nodes: _BlankNodes
) -> tuple[list[str], list[str], list[str], list[tuple[str, ...]]]:
    subjects: list[str] = []
    predicates: list[str] = []
    objects: list[str] = []
    literals: list[tuple[str, ...]] = []
    literal, blank = library.Literal, library.BlankNode
    try:
        for quad in quads:
            subject, predicate, value = quad.subject, quad.predicate.value, quad.object
            label = subject.value
            if isinstance(subject, blank):
                label = blank_nodes[label]
            if isinstance(value, literal):
                row = (label, predicate, value.value, value.datatype.value, value.language or "")
                literals.append(row)
            else:
                subjects.append(label)
                predicates.append(predicate)
                objects.append(
                    blank_nodes[value.value] if isinstance(value, blank) else value.value
                )
            if len(subjects) + len(literals) >= _BATCH:
                break
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise DataError(
            f"{path}{line}: expected RDF, but {error.msg}. Correct or remove the line."
        ) from error
    except (OSError, EOFError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: expected RDF in UTF-8; it cannot be read ({error}).") from error
    return subjects, predicates, objects, literals


def _frame(names: Sequence[str], columns: Sequence[Sequence[str]]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            name: pl.Series(name, column, dtype=pl.String)
            for name, column in zip(names, columns, strict=True)
        }
    )


def _decoded(frame: pl.DataFrame, column: str, prefix: str) -> pl.DataFrame:
    """Decode the labels in a column that were percent-encoded under a base."""
    under = frame[column].str.starts_with(prefix)
    if not under.any():
        return frame
    encoded = frame[column].filter(under).unique()
    table = dict(zip(encoded, (unquote(label[len(prefix) :]) for label in encoded), strict=True))
    return frame.with_columns(pl.col(column).replace(table))


def _add_numbers(source: Source, values: pl.DataFrame) -> tuple[pl.DataFrame, str]:
    """Turn numeric literals into the modality `NUMBER`; return the other literals and a note."""
    numbers = values.with_columns(
        pl.when(pl.col("datatype").is_in(sorted(_NUMBERS)))
        .then(pl.col("value").cast(pl.Float64, strict=False))
        .alias("number")
    )
    usable = pl.col("number").is_finite().fill_null(False) & pl.col("entity").is_in(
        list(source.entities)
    )
    left, table = numbers.filter(~usable).drop("number"), numbers.filter(usable)
    if not table.height:
        return left, ""
    table = table.group_by("entity", "predicate", maintain_order=True).agg(pl.col("number").mean())
    table = table.with_columns(
        (
            (pl.col("number") - pl.col("number").mean().over("predicate"))
            / pl.col("number").std(ddof=0).over("predicate")
        )
        .fill_nan(0.0)
        .alias("number")
    )
    predicates = table["predicate"].unique().sort().to_list()
    entities = encode_labels(table["entity"], source.entities, "literals").numpy()
    owner, row = np.unique(entities, return_inverse=True)
    column = encode_labels(table["predicate"], predicates, "literals").numpy()
    feat = torch.zeros(len(owner), 2 * len(predicates))
    feat[row, 2 * column] = torch.from_numpy(table["number"].to_numpy().astype(np.float32))
    feat[row, 2 * column + 1] = 1.0
    source.views = {**source.views, NUMBER: Views(feat, torch.from_numpy(owner))}
    return left, (
        f"The modality {NUMBER!r} holds {table.height} numbers; each predicate has two columns, the"
        f" standardised number and whether it is known: {', '.join(predicates)}."
    )


# -- writing --------------------------------------------------------------------------------------


def iris(labels: Sequence[str], base: str) -> pl.Series:
    """Return labels as IRIs: absolute IRIs unchanged, others percent-encoded under a base.

    Examples
    --------
    >>> from imvia_graph.io.rdf import iris
    >>> iris(["http://example.org/a", "New York"], "urn:imvia:entity:").to_list()
    ['http://example.org/a', 'urn:imvia:entity:New%20York']
    """
    library = _library()
    made = []
    for label in labels:
        keep = _IRI.fullmatch(label) is not None and not label.startswith(base)
        if keep:
            try:
                library.NamedNode(label)
            except ValueError:
                keep = False
        made.append(label if keep else base + quote(label, safe=""))
    return pl.Series(made, dtype=pl.String)


def write_rdf(
    kg: MultiViewKG,
    target: Path,
    form: str,
    *,
    compression: str | None = None,
    base: tuple[str, str] = (ENTITY_BASE, RELATION_BASE),
) -> list[Path]:
    """Write one file per split into a folder, or all triples into one file."""
    library = _library()
    entities, relations = iris(kg.entities, base[0]), iris(kg.relations, base[1])
    written = []
    for path, splits in target_files(kg, target, form, compression):
        frame = pl.concat(
            [decode_triples(kg.triples(split), entities, relations) for split in splits]
        )
        if form == "ntriples":
            line = pl.format("<{}> <{}> <{}> .", "head", "relation", "tail")
            lines = frame.select(line).to_series()
        else:
            node = library.NamedNode
            triples = (
                library.Triple(node(head), node(relation), node(tail))
                for head, relation, tail in frame.sort("head", maintain_order=True).iter_rows()
            )
            text = library.serialize(triples, format=library.RdfFormat.TURTLE)
            lines = pl.Series(text.decode().removesuffix("\n").split("\n"))
        write_lines(path, lines, follow=path == target)
        written.append(path)
    return written
