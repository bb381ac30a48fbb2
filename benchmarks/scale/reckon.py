"""Reckon memory and hours for graphs of millions: python benchmarks/scale/reckon.py

What a step computes, moves and sends is counted from the model's sizes; so is what is held. How
fast a device does it is measured for the CPU (benchmarks/results/scale-cpu.json), and assumed for
GPUs, on which nothing here has been measured: the options say what is assumed. The table is
Markdown, as in docs/scale.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import click

RESULT = Path(__file__).resolve().parents[1] / "results" / "scale-cpu.json"


class Graph(NamedTuple):
    """The sizes of a graph; views of one modality."""

    name: str
    entities: int
    relations: int
    triples: int
    views_each: float
    width: int


#: Entities, relations and training triples as published by the makers of the data sets
#: (deepgraphlearning.github.io/project/wikidata5m, transductive; ogb.stanford.edu/docs/lsc). Views
#: are assumed: a text of a title and a description each, encoded by a model of width 768.
GRAPHS = (
    Graph("Wikidata5M", 4_594_485, 822, 20_614_279, 1, 768),
    Graph("WikiKG90Mv2", 91_230_610, 1_387, 601_062_811, 1, 768),
)


class Model(NamedTuple):
    """Sizes of the model and of a step; heads: structure, the modality, joint."""

    dim: int = 256
    relation_dim: int = 64
    heads: int = 3
    #: Queries of a process in a step, and negatives that all queries of all processes share.
    batch: int = 1024
    negatives: int = 1024


class Device(NamedTuple):
    """What a device does in a second. For GPUs these are assumptions, not measurements."""

    #: Operations a second in the products of a step, all losses of small products included.
    operations: float
    #: Bytes a second from and to the device's memory, for rows of tables that lie apart.
    memory: float
    #: Bytes a second that a process sends to others, and seconds before the first arrives.
    network: float
    latency: float
    #: Seconds of a step that go by however small it is: launching kernels.
    overhead: float
    #: Bytes of memory.
    size: float


# -- what a step takes ----------------------------------------------------------------------------


def step(graph: Graph, model: Model, processes: int) -> dict[str, float]:
    """Operations, bytes moved and bytes sent by each process in a step of sampled training."""
    d, r, b = model.dim, model.relation_dim, model.batch
    queries = b * processes
    candidates = queries + model.negatives  # the queries' answers are each other's negatives
    # A process scores all queries against the candidates that it owns.
    owned = candidates / processes
    relations = min(b, 2 * graph.relations)
    embedded = b + owned
    products = model.heads * (queries * owned * d + relations * r * d * d + b * d * d)
    products += embedded * 2 * graph.width * d  # gate and projection
    # Views, in half precision; rows of two tables: read, and read and written by the optimizer.
    moved = embedded * (graph.views_each * graph.width * 2 + 2 * d * 4 * 4)
    dense = dense_parameters(graph, model)
    moved += dense * 4 * 7
    sent = 0.0
    if processes > 1:
        sent += 2 * model.heads * queries * d * 4  # query vectors, and their gradients
        sent += 2 * 2 * b * d * 4  # rows of other processes' entities
        sent += 2 * dense * 4  # gradients of what all hold
    # Twice the products again for the gradients, and two operations a multiplication.
    return {"queries": queries, "operations": 6 * products, "moved": moved, "sent": sent}


def dense_parameters(graph: Graph, model: Model) -> float:
    """Numbers that every process holds: relations, decoders, gate and projection."""
    d, r = model.dim, model.relation_dim
    decoders = model.heads * (2 * graph.relations * r + r * d * d)
    return decoders + graph.width * (2 * d + r)


def seconds(graph: Graph, model: Model, device: Device, processes: int) -> float:
    """Of a step: computing, moving and sending one after the other."""
    taken = step(graph, model, processes)
    time = device.overhead + taken["operations"] / device.operations
    time += taken["moved"] / device.memory
    if processes > 1:
        time += taken["sent"] / device.network + 8 * device.latency
    return time


def epoch_hours(graph: Graph, model: Model, device: Device, processes: int) -> float:
    """Of a pass over the triples, both of whose ends are asked for."""
    steps = 2 * graph.triples / step(graph, model, processes)["queries"]
    return steps * seconds(graph, model, device, processes) / 3600


# -- what is held ---------------------------------------------------------------------------------


def held(graph: Graph, model: Model, processes: int, optimizer: str) -> dict[str, float]:
    """Bytes: those that are split over processes, as each has them, and those that each has."""
    rows = 2 * graph.entities / processes  # structure, and what is added to the modality
    state = {"rowwise": rows * 4, "lazy": 2 * rows * model.dim * 4}[optimizer]
    # The training triples, and the index of the answers of both directions twice: those of the
    # training triples, and all known. A query's key and pointer are counted for every answer.
    index = 2 * (2 * graph.triples) * (8 + 8 + 8)
    return {
        "tables": rows * model.dim * 4,
        "optimizer": state,
        "dense": dense_parameters(graph, model) * 4 * 4,
        "host": graph.triples * 24 + index,
        "views": graph.entities * graph.views_each * graph.width * 2,
    }


# -- the table ------------------------------------------------------------------------------------


def lines(graph: Graph, model: Model, device: Device, optimizer: str) -> list[str]:
    """Rows of the table for a graph."""
    found = []
    for processes in (1, 8, 64):
        bytes_of = held(graph, model, processes, optimizer)
        on_device = bytes_of["tables"] + bytes_of["optimizer"] + bytes_of["dense"]
        fits = on_device <= 0.8 * device.size
        hours = epoch_hours(graph, model, device, processes)
        found.append(
            f"| {graph.name} | {processes} | {on_device / 1e9:,.1f} GB |"
            f" {'yes' if fits else 'no'} | {bytes_of['host'] / 1e9:,.1f} GB |"
            f" {bytes_of['views'] / 1e9:,.1f} GB | {hours:,.2f} h |"
        )
    return found


def cpu_lines(model: Model, optimizer: str, rows: list[dict[str, Any]]) -> list[str]:
    """What the measured rate of the largest graph makes of the same, one process on a CPU."""
    if not rows:
        return ["Not measured on a CPU yet: run benchmarks/scale/ladder.py."]
    row = max(rows, key=lambda one: one["entities"])
    rate = row["triples_a_second"]
    found = [
        f"Measured with {row['entities']:,} entities: {rate:,.0f} triples a second.",
        "",
        "| graph | tables and optimizer | an epoch at that rate |",
        "|---|--:|--:|",
    ]
    for graph in GRAPHS:
        bytes_of = held(graph, model, 1, optimizer)
        found.append(
            f"| {graph.name} | {(bytes_of['tables'] + bytes_of['optimizer']) / 1e9:,.1f} GB |"
            f" {graph.triples / rate / 3600:,.1f} h |"
        )
    return found


@click.command(context_settings={"show_default": True})
@click.option("--tflops", default=40.0, help="Assumed: 10^12 operations a second of a GPU.")
@click.option("--memory", default=1000.0, help="Assumed: GB a second of a GPU's memory, by rows.")
@click.option("--network", default=25.0, help="Assumed: GB a second that a GPU sends.")
@click.option("--latency", default=50.0, help="Assumed: microseconds a collective.")
@click.option("--overhead", default=10.0, help="Assumed: milliseconds a step, besides.")
@click.option("--size", default=80.0, help="GB of a GPU.")
@click.option("--optimizer", type=click.Choice(["rowwise", "lazy"]), default="rowwise")
@click.option("--dim", default=256, help="Width of embeddings.")
@click.option("--batch", default=1024, help="Queries a process and step.")
@click.option("--result", type=click.Path(path_type=Path), default=RESULT, help="The CPU's rates.")
def main(
    tflops: float,
    memory: float,
    network: float,
    latency: float,
    overhead: float,
    size: float,
    optimizer: str,
    dim: int,
    batch: int,
    result: Path,
) -> None:
    """Print the tables."""
    model = Model(dim=dim, batch=batch)
    device = Device(
        tflops * 1e12, memory * 1e9, network * 1e9, latency * 1e-6, overhead * 1e-3, size * 1e9
    )
    click.echo(
        "| graph | GPUs | on each GPU | fits | host memory a process | views' file | epoch |"
    )
    click.echo("|---|--:|--:|---|--:|--:|--:|")
    for graph in GRAPHS:
        for line in lines(graph, model, device, optimizer):
            click.echo(line)
    click.echo()
    rows = json.loads(result.read_text("utf-8"))["rows"] if result.is_file() else []
    for line in cpu_lines(model, optimizer, rows):
        click.echo(line)


if __name__ == "__main__":
    main()
