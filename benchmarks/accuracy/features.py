"""Make KG folders with text views from the entities' names, for MKG-Y, MKG-W and DB15K.

    IMVIA_DATA=… python benchmarks/accuracy/features.py

The published pictures and descriptions are not needed. An entity's texts are its own name, the name
without its bracketed qualifier, the qualifier and so on (`imvia_graph.io.read_names`), encoded by
MiniLM, which is installed as a package. No triple is used. Finished folders are kept; if the
command was stopped, run it again to resume.

`imvia-graph encode MKG-Y --names --text-encoder minilm --out benchmarks/accuracy/data/MKG-Y` does
the same for one data set.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click
import torch

import imvia_graph as ig
from imvia_graph.io import read_names
from imvia_graph.kg import is_whole

DATASETS = ("MKG-Y", "MKG-W", "DB15K")
#: The published data sets, and the one that comes with the package, views included.
ALL = (*DATASETS, "countries")
DATA = Path(__file__).parent / "data"


def load(dataset: str, data: Path) -> ig.MultiViewKG:
    """Load a data set with its views and published splits."""
    if dataset == "countries":
        return ig.load_kg(dataset, validation="published")
    if not (data / dataset / "kg.json").exists():
        raise click.ClickException(
            f"{data / dataset} does not exist; make it: python benchmarks/accuracy/features.py"
            f" {dataset} --data {data}"
        )
    return ig.load_kg(data / dataset, validation="published")


def held_out(dataset: str) -> bool:
    """Return whether validation triples are held out of the train set; see protocol.py."""
    return dataset == "DB15K"


def make(name: str, out: Path, encoder: str | ig.encode.Encoder = "minilm") -> ig.MultiViewKG:
    """Encode the names of a graph as text views and save the graph to a folder."""
    kg = ig.load_kg(name, validation="published")
    cache = out / ".encode"  # to resume a run that was stopped
    kg, (report,) = ig.encode.encode_kg(kg, texts=read_names(kg), text_encoder=encoder, cache=cache)
    kg.save(out)
    shutil.rmtree(cache, ignore_errors=True)
    click.echo(f"{out}: {report.views} texts by {report.encoder}, {report.seconds:.0f} s")
    return kg


@click.command(context_settings={"show_default": True})
@click.argument("names", nargs=-1)
@click.option("--data", type=click.Path(path_type=Path), default=DATA, help="Where to write.")
@click.option("--threads", default=torch.get_num_threads(), help="Threads on the CPU.")
def main(names: tuple[str, ...], data: Path, threads: int) -> None:
    """Make the folders of the data sets NAMES.  [default: all three]"""
    torch.set_num_threads(threads)
    for name in names or DATASETS:
        out = data / name
        if is_whole(out):
            click.echo(f"{out} exists already.")
        else:
            make(name, out)


if __name__ == "__main__":
    main()
