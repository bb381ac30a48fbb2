"""``imvia-graph evaluate``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from imvia_graph._display import shorten
from imvia_graph.cli.display import Bar, json_text, metrics_table, relations_table, results
from imvia_graph.cli.options import NamedFile, device_option, run_argument, split_option
from imvia_graph.cli.tables import FRAMES, check_suffix, write_frame
from imvia_graph.errors import DataError, UnknownLabelError

if TYPE_CHECKING:
    from torch import Tensor

    from imvia_graph.kg import MultiViewKG


@click.command()
@run_argument
@split_option
@click.option(
    "--triples",
    type=NamedFile(),
    help="File of triples to rank in place of a split's, one per line: the labels of head,"
    " relation and tail, separated by tabs.",
)
@click.option(
    "--candidates",
    metavar="NUMBER|FILE",
    help="Entities that the answer is ranked against: a number of them, drawn with the run's seed,"
    " or a file of labels, one per line.  [default: all entities]",
)
@click.option(
    "--ranks",
    type=NamedFile(),
    help="Also write the rank of each query to this file: .tsv, .csv or .parquet.",
)
@click.option("--force", is_flag=True, help="Overwrite an existing file of --ranks.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (fractions).")
@click.option("--relations", is_flag=True, help="Also show the metrics of each relation.")
@device_option
def evaluate(
    run: Path,
    split: str,
    triples: Path | None,
    candidates: str | None,
    ranks: Path | None,
    force: bool,
    as_json: bool,
    relations: bool,
    device: str,
) -> None:
    """Rank the triples of a split with the trained run in the folder RUN.

    Ranks the head and the tail of each triple. Ranks are filtered by all known triples; tied
    entities get their mean rank. The table of --ranks has two rows per triple, in the order of the
    triples: the query for its tail, then that for its head.

    \b
    Examples:
      imvia-graph evaluate runs/countries-1
      imvia-graph evaluate runs/countries-1 --split valid --relations
      imvia-graph evaluate runs/countries-1 --json | jq .both.mrr
      imvia-graph evaluate runs/large-1 --candidates 10000
      imvia-graph evaluate runs/countries-1 --triples mine.tsv --ranks ranks.parquet
    """
    from imvia_graph.export import check_free
    from imvia_graph.run import load

    if ranks is not None:
        check_suffix("--ranks", ranks, list(FRAMES))
        check_free(ranks, force)
    trained = load(run, device)
    among = _candidates(candidates, trained.kg)
    chosen = None if triples is None else _triples(triples, trained.kg)
    with Bar() as bar:
        ranked = partial(bar.show, "Queries ranked")
        ranking = trained.rank(split, triples=chosen, candidates=among, on_batch=ranked)
    metrics = ranking.metrics(trained.kg.relations)
    if ranks is not None:
        write_frame(ranking.frame(trained.kg), ranks)
    if as_json:
        click.echo(json_text(metrics))
        return
    what = split if triples is None else triples.name
    results.print(metrics_table(f"{trained.kg.name}: {what}, filtered", metrics))
    if relations:
        names = dict(zip(trained.kg.relations, trained.kg.relation_names, strict=True))
        results.print(relations_table(metrics, names))


def _triples(path: Path, kg: MultiViewKG) -> Tensor:
    """Return the ids of the triples that a file lists."""
    import torch

    from imvia_graph._files import read_lines

    ids = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != 3:
            raise DataError(
                f"{path}, line {number}: expected head, relation and tail, separated by tabs; found"
                f" {shorten(line)!r}."
            )
        try:
            ids.append(kg.ids_of([fields]))
        except UnknownLabelError as error:
            raise UnknownLabelError(f"{path}, line {number}: {error}") from None
    if not ids:
        raise DataError(f"{path}: expected triples, one per line; the file has none.")
    return torch.cat(ids)


def _candidates(value: str | None, kg: MultiViewKG) -> int | Tensor | None:
    """Return the number of candidates, or the ids of the entities that a file lists."""
    import torch

    from imvia_graph._files import read_lines

    if value is None or value.isdecimal():
        return None if value is None else int(value)
    path = Path(value)
    if not path.is_file():
        raise DataError(
            f"--candidates {value}: expected a number, 1 or more, or a file of entity labels, one"
            " per line; there is no such file."
        )
    ids = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            ids.append(kg.id_of(line.strip()))
        except UnknownLabelError as error:
            raise UnknownLabelError(f"{value}, line {number}: {error}") from None
    if not ids:
        raise DataError(f"{value}: expected entity labels, one per line; the file has none.")
    return torch.tensor(ids, dtype=torch.int64)
