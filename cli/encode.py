"""``imvia-graph encode``."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imvia_graph._display import shown
from imvia_graph.cli import stopped
from imvia_graph.cli.display import Bar, log_to_terminal, say
from imvia_graph.cli.options import DEVICE_HELP, loading_options, separator
from imvia_graph.errors import DataError

if TYPE_CHECKING:
    from imvia_graph.encode import Report
    from imvia_graph.io import RawViews
    from imvia_graph.io.views import Column

#: Maximum number of broken inputs to list; encode.json holds all.
LISTED = 10


def _columns(ctx: click.Context, option: click.Parameter, value: str | None) -> Any:
    """Parse ``ENTITY,VALUE``, each a name or a position."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if len(parts) != 2 or not all(parts):
        raise click.BadParameter("expected two columns, as in entity,caption or 0,3")
    columns: list[Column] = [int(part) if part.isdecimal() else part for part in parts]
    return columns[0], columns[1]


@click.command()
@click.argument("graph")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="KG folder to write.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Folder with one folder of pictures per entity, images/ENTITY/*, or a table of entity and"
    " path.",
)
@click.option(
    "--texts",
    type=click.Path(path_type=Path),
    help="Table of entity and text (TSV, CSV, Parquet), any number of rows per entity; or RDF"
    " (N-Triples, Turtle), whose literals become texts.",
)
@click.option(
    "--names",
    is_flag=True,
    help="Use the entities' names, whole and in parts, as texts; --texts may be given, too.",
)
@click.option("--encoder", help="Encoder of both pictures and texts.")
@click.option("--image-encoder", help="Encoder of pictures.  [default: --encoder]")
@click.option("--text-encoder", help="Encoder of texts.  [default: --encoder]")
@click.option(
    "--images-root",
    type=click.Path(path_type=Path),
    help="Folder that the paths in the table are relative to.  [default: the table's folder]",
)
@click.option(
    "--image-columns",
    callback=_columns,
    metavar="ENTITY,PATH",
    help="Columns of the --images table, by name or by position from 0.",
)
@click.option(
    "--text-columns",
    callback=_columns,
    metavar="ENTITY,TEXT",
    help="Columns of the --texts table, by name or by position from 0.",
)
@click.option(
    "--image-separator",
    callback=separator,
    help="TSV, CSV: the character between columns of the --images table; also the word tab.",
)
@click.option(
    "--text-separator",
    callback=separator,
    help="TSV, CSV: the character between columns of the --texts table; also the word tab.",
)
@click.option(
    "--text-predicate",
    "predicates",
    multiple=True,
    metavar="IRI",
    help="RDF: use the literals of this predicate; repeatable.  [default: all]",
)
@click.option(
    "--text-language",
    "language",
    help="RDF: use the literals in this language, such as en, and those without a language tag."
    "  [default: all]",
)
@loading_options
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Inputs per batch.  [default: 256 on a GPU, 32 on the CPU]",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Precision of the encoder; auto: bfloat16 on a GPU that supports it, else float32.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="Folder to keep finished batches in.  [default: in --out, removed at the end]",
)
@click.option(
    "--skip-unknown",
    is_flag=True,
    help="Skip views of entities that are not in GRAPH, instead of failing.",
)
@click.option("--strict", is_flag=True, help="Exit with status 1 if any view is broken.")
@click.option("--overwrite", is_flag=True, help="Write even if --out is not empty.")
def encode(
    graph: str,
    out: Path,
    images: Path | None,
    texts: Path | None,
    names: bool,
    encoder: str | None,
    image_encoder: str | None,
    text_encoder: str | None,
    images_root: Path | None,
    image_columns: tuple[Column, Column] | None,
    text_columns: tuple[Column, Column] | None,
    image_separator: str | None,
    text_separator: str | None,
    predicates: tuple[str, ...],
    language: str | None,
    loading: dict[str, Any],
    device: str,
    batch_size: int | None,
    precision: Any,
    cache: Path | None,
    skip_unknown: bool,
    strict: bool,
    overwrite: bool,
) -> None:
    """Encode pictures and texts of the entities of GRAPH; write a KG folder with features.

    GRAPH is anything that `imvia-graph fit` takes. You must name an encoder: efficientnet-lite0 for
    pictures or minilm for texts, whose weights are installed as packages; clip, a small and strong
    CLIP for both, downloaded once; or any model of open_clip, as open_clip:ARCHITECTURE/TAG or
    open_clip:ARCHITECTURE/path/to/checkpoint. No other model is downloaded. minilm reads the first
    256 word pieces of a text (some 200 words), a CLIP mostly 77 tokens; the command reports how
    many texts are longer.

    To resume after a stop or a kill, run the same command again. Pictures that cannot be read are
    reported and left out.

    \b
    Examples:
      imvia-graph encode my-graph/ --images images/ --texts texts.tsv --encoder clip --out kg/
      imvia-graph encode facts.tsv --images images/ --image-encoder efficientnet-lite0 --out kg/
      imvia-graph encode DB15K --texts captions.parquet --text-columns entity,caption \\
        --text-encoder minilm --out db15k/
      imvia-graph encode MKG-Y --names --text-encoder minilm --out mkg-y/
      imvia-graph encode facts.nt --texts dump.ttl.gz --text-language en --encoder minilm --out kg/
      imvia-graph encode my-graph/ --images table.csv --encoder open_clip:ViT-L-14/openai --out kg/
    """
    if images is None and texts is None and not names:
        raise click.UsageError("There is nothing to encode: give --images, --texts or --names.")
    from imvia_graph import _files
    from imvia_graph.encode import encode_kg
    from imvia_graph.encode.encoder import named_encoder
    from imvia_graph.io import load_kg, read_literals, read_names, read_texts
    from imvia_graph.io.names import joined
    from imvia_graph.io.tables import form_of
    from imvia_graph.kg import is_whole
    from imvia_graph.training import resolve_device

    log_to_terminal()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if images is not None:
        image_encoder = named_encoder(image_encoder or encoder, "image")
    if texts is not None or names:
        text_encoder = named_encoder(text_encoder or encoder, "text")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; expected a folder to write. Name another.")
    # A folder with .encode and without a complete graph was left by a stopped run, which this run
    # resumes.
    unfinished = (out / ".encode").is_dir() and not is_whole(out)
    if out.exists() and not overwrite and not unfinished and any(out.iterdir()):
        raise DataError(f"{out} is not empty. Name another folder, or give --overwrite.")
    kg = load_kg(graph, "published", **loading)
    say(repr(kg))
    folder = out / ".encode" if cache is None else cache
    raw_texts: Path | RawViews | None = texts
    if texts is not None and form_of(texts) in ("ntriples", "turtle"):
        for option, given in (("columns", text_columns), ("separator", text_separator)):
            if given is not None:
                raise click.UsageError(f"--text-{option} is for tables; {texts} is RDF.")
        raw_texts = read_literals(texts, kg, predicates=predicates or None, language=language)
    elif predicates or language is not None:
        raise click.UsageError("--text-predicate and --text-language are for --texts in RDF.")
    if names:
        if isinstance(raw_texts, Path):
            raw_texts = read_texts(
                raw_texts,
                kg,
                columns=text_columns,
                separator=text_separator,
                skip_unknown=skip_unknown,
            )
        raw_texts = read_names(kg) if raw_texts is None else joined(raw_texts, read_names(kg))
    bar = Bar()
    try:
        kg, reports = encode_kg(
            kg,
            images=images,
            texts=raw_texts,
            image_encoder=image_encoder,
            text_encoder=text_encoder,
            device=resolve_device(device),
            batch_size=batch_size,
            precision=precision,
            cache=folder,
            images_root=images_root,
            image_columns=image_columns,
            text_columns=text_columns,
            image_separator=image_separator,
            text_separator=text_separator,
            skip_unknown=skip_unknown,
            progress=lambda modality, *numbers: bar.show(f"Encoding {modality}s", *numbers),
        )
    except KeyboardInterrupt as error:
        bar.close()
        raise stopped(error, "Stopped. Run the same command again to resume.") from None
    finally:
        bar.close()
    kg.save(out)
    _files.write_json(out / "encode.json", [asdict(report) for report in reports])
    if cache is None:
        shutil.rmtree(folder, ignore_errors=True)
    broken = sum(_print_report(report) for report in reports)
    click.echo(f"KG folder: {out}")
    if broken and strict:
        raise SystemExit(1)


def _print_report(report: Report) -> int:
    """Print what happened to a modality's views; return the number of broken ones."""
    reused = f", {report.reused} encoded before" if report.reused else ""
    equal = f", {report.equal} equal to another entity's" if report.equal else ""
    repeated = f"; {report.repeated} duplicates left out" if report.repeated else ""
    say(
        f"{report.modality}: {report.views} views by {report.encoder} ({report.encoded} encoded"
        f"{reused}{equal}{repeated}) in {report.seconds:.1f} s."
    )
    if report.cut:
        reads = f" ({report.context_length} tokens)" if report.context_length else ""
        say(
            f"  longer than {report.encoder} reads{reads}: {report.cut} of"
            f" {report.encoded + report.reused} distinct texts; each is truncated."
        )
    for source, reason in report.broken[:LISTED]:
        say(f"  broken: {shown(source)}: {reason}")
    if report.broken:
        more = len(report.broken) - LISTED
        say(
            f"{_counted(len(report.broken), report.modality)} left out"
            + (f"; encode.json lists {more} more of them." if more > 0 else ".")
        )
    return len(report.broken)


def _counted(number: int, modality: str) -> str:
    return f"{number} broken {modality}{' is' if number == 1 else 's are'}"
