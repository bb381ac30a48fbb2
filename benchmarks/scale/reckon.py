"""Estimate memory and training hours for very large graphs: python benchmarks/scale/reckon.py

The operations, memory traffic and communication of a step, and the memory in use, are computed from
the sizes of graph and model. Throughput is measured for the CPU (benchmarks/results/scale-cpu.json)
and assumed for GPUs, on which none of this was measured; the options set the assumed values. The
tables are Markdown, as in docs/scale.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import click

RESULT = Path(__file__).resolve().parents[1] / "results" / "scale-cpu.json"


class Graph(NamedTuple):
    """Sizes of a graph with one modality."""

    name: str
    entities: int
    relations: int
    triples: int
    views_each: float
    width: int


#: Entities, relations and training triples as published by the authors of the data sets
#: (deepgraphlearning.github.io/project/wikidata5m, transductive; ogb.stanford.edu/docs/lsc). Views
#: are assumed: per entity one text of title and description, encoded by a model of width 768.
GRAPHS = (
    Graph("Wikidata5M", 4_594_485, 822, 20_614_279, 1, 768),
    Graph("WikiKG90Mv2", 91_230_610, 1_387, 601_062_811, 1, 768),
)


class Model(NamedTuple):
    """Sizes of the model and of a step; the heads are structure, the modality and joint."""

    dim: int = 256
    relation_dim: int = 64
    heads: int = 3
    #: Queries per process and step, and negatives shared by all queries of all processes.
    batch: int = 1024
    negatives: int = 1024


class Device(NamedTuple):
    """Speeds and memory of a device. For GPUs these are assumptions, not measurements."""

    #: Operations per second in the products of a step, with the inefficiency of small products.
    operations: float
    #: Bytes per second from and to device memory, when scattered table rows are accessed.
    memory: float
    #: Bytes per second that a process sends to others, and latency in seconds.
    network: float
    latency: float
    #: Fixed seconds per step, for kernel launches.
    overhead: float
    #: Bytes of memory.
    size: float


# -- cost of a step -------------------------------------------------------------------------------


def step(graph: Graph, model: Model, processes: int) -> dict[str, float]:
    """Return operations, bytes moved and bytes sent per process in a step of sampled training."""
    d, r, b = model.dim, model.relation_dim, model.batch
    queries = b * processes
    candidates = queries + model.negatives  # the answer of each query is a negative of the others
    # Each process scores all queries against its own candidates.
    owned = candidates / processes
    relations = min(b, 2 * graph.relations)
    embedded = b + owned
    products = model.heads * (queries * owned * d + relations * r * d * d + b * d * d)
    products += embedded * 2 * graph.width * d  # gate and projection
    # Views in half precision; rows of two tables, which the step reads and the optimizer reads and
    # writes.
    moved = embedded * (graph.views_each * graph.width * 2 + 2 * d * 4 * 4)
    dense = dense_parameters(graph, model)
    moved += dense * 4 * 7
    sent = 0.0
    if processes > 1:
        sent += 2 * model.heads * queries * d * 4  # query vectors, and their gradients
        sent += 2 * 2 * b * d * 4  # rows of other processes' entities
        sent += 2 * dense * 4  # gradients of replicated parameters
    # The backward pass doubles the products of the forward pass; a multiply-add is two operations.
    return {"queries": queries, "operations": 6 * products, "moved": moved, "sent": sent}


def dense_parameters(graph: Graph, model: Model) -> float:
    """Return the number of replicated parameters: relations, decoders, gate and projection."""
    d, r = model.dim, model.relation_dim
    decoders = model.heads * (2 * graph.relations * r + r * d * d)
    return decoders + graph.width * (2 * d + r)


def seconds(graph: Graph, model: Model, device: Device, processes: int) -> float:
    """Return the seconds of a step; computation, memory traffic and sending do not overlap."""
    taken = step(graph, model, processes)
    time = device.overhead + taken["operations"] / device.operations
    time += taken["moved"] / device.memory
    if processes > 1:
        time += taken["sent"] / device.network + 8 * device.latency
    return time


def epoch_hours(graph: Graph, model: Model, device: Device, processes: int) -> float:
    """Return the hours of an epoch, in which each triple makes a head and a tail query."""
    steps = 2 * graph.triples / step(graph, model, processes)["queries"]
    return steps * seconds(graph, model, device, processes) / 3600


# -- memory ---------------------------------------------------------------------------------------


def held(graph: Graph, model: Model, processes: int, optimizer: str) -> dict[str, float]:
    """Return the bytes in use: tables, optimizer, dense and host per process, views of all."""
    rows = 2 * graph.entities / processes  # the tables of structure and of the modality's residual
    state = {"rowwise": rows * 4, "lazy": 2 * rows * model.dim * 4}[optimizer]
    # The training triples, and two answer indices of both directions: of the training triples and
    # of all known triples. This counts a query's key and pointer once per answer.
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
    """Return the rows of the GPU table for a graph."""
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
    """Return the CPU table: one process at the throughput measured on the largest graph."""
    if not rows:
        return ["There are no CPU measurements yet. Run benchmarks/scale/ladder.py."]
    row = max(rows, key=lambda one: one["entities"])
    rate = row["triples_a_second"]
    found = [
        f"Measured with {row['entities']:,} entities: {rate:,.0f} triples per second.",
        "",
        "| graph | tables and optimizer | epoch at this rate |",
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
@click.option("--tflops", default=40.0, help="Assumed: 10^12 operations per second of a GPU.")
@click.option(
    "--memory",
    default=1000.0,
    help="Assumed: GB per second of GPU memory, by rows.",
)
@click.option("--network", default=25.0, help="Assumed: GB per second that a GPU sends.")
@click.option("--latency", default=50.0, help="Assumed: microseconds of latency per collective.")
@click.option("--overhead", default=10.0, help="Assumed: fixed milliseconds per step.")
@click.option("--size", default=80.0, help="GB of GPU memory.")
@click.option("--optimizer", type=click.Choice(["rowwise", "lazy"]), default="rowwise")
@click.option("--dim", default=256, help="Width of embeddings.")
@click.option("--batch", default=1024, help="Queries per process and step.")
@click.option("--result", type=click.Path(path_type=Path), default=RESULT, help="CPU results.")
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
        "| graph | GPUs | memory per GPU | fits | host memory per process | file of views | epoch |"
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
