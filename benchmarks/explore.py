"""Measure the response time of the explorer's service, and whether its memory grows.

The service is `imvia-graph explore` on an untrained model of DB15K's size with made-up pictures and
texts (training does not change the time of a query). One client requests the top 20 for queries of
test triples at a steady rate, over one connection; the time of a response counts from when its
request was due. Then the client sends requests without pauses, and the server's resident memory is
read. The script writes benchmarks/results/explore.json.

    IMVIA_DATA=/path/to/data python benchmarks/explore.py
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import quantiles
from urllib.parse import urlencode

import click
import psutil
import torch
from rich.console import Console

import imvia_graph as ig

RESULT = Path(__file__).parent / "results" / "explore.json"
#: (width, most views per entity) of the made-up views; widths as of a ViT-B and a BERT.
VIEWS = {"image": (768, 8), "text": (768, 3)}
console = Console(stderr=True)


def made_up(kg: ig.MultiViewKG) -> ig.MultiViewKG:
    """Return the graph with random views."""
    generator = torch.Generator().manual_seed(0)
    views = {}
    for modality, (width, most) in VIEWS.items():
        count = torch.randint(most + 1, (kg.num_entities,), generator=generator)
        owner = torch.arange(kg.num_entities).repeat_interleave(count)
        views[modality] = ig.Views(torch.randn(len(owner), width, generator=generator), owner)
    return kg.replace(views=views)


def paths(kg: ig.MultiViewKG, number: int) -> list[str]:
    """Return URL paths of queries for tails and heads of randomly drawn test triples."""
    draw = random.Random(0)
    triples = kg.test.tolist()
    made = []
    for _ in range(number):
        head, relation, tail = draw.choice(triples)
        given = ("head", head) if draw.random() < 0.5 else ("tail", tail)
        query = {"relation": kg.relations[relation], given[0]: kg.entities[given[1]], "top": 20}
        made.append(f"/api/complete?{urlencode(query)}")
    return made


def ask(connection: http.client.HTTPConnection, path: str) -> None:
    connection.request("GET", path)
    answer = connection.getresponse()
    found = json.load(answer)
    if answer.status != 200 or len(found["answers"]) != 20:
        raise RuntimeError(f"{path}: {answer.status}, {str(found)[:200]}")


@click.command()
@click.option("--source", default="DB15K", show_default=True)
@click.option("--rate", default=20.0, show_default=True, help="Queries per second.")
@click.option("--seconds", default=60.0, show_default=True, help="Seconds at that rate.")
@click.option("--queries", default=20_000, show_default=True, help="Queries of the memory test.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULT)
def main(source: str, rate: float, seconds: float, queries: int, out: Path) -> None:
    """Start the service, send queries, and write the measurements."""
    kg = made_up(ig.load_kg(source))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        heads = ig.fit(kg, out=run, epochs=0).model.heads
        command = [sys.executable, "-m", "imvia_graph", "explore", str(run), "--port", "0"]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr is not None
            line = next(line for line in server.stderr if line.startswith("Open "))
            port = int(re.findall(r":(\d+)/", line)[0])
            result = measured(kg, server.pid, port, rate, seconds, queries)
        finally:
            server.terminate()
            server.wait()
    result = {
        "source": source,
        "entities": kg.num_entities,
        "heads": heads,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **result,
    }
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(result)


def measured(
    kg: ig.MultiViewKG, server: int, port: int, rate: float, seconds: float, queries: int
) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for path in paths(kg, 50):
        ask(connection, path)
    times = []
    start = time.perf_counter()
    for number, path in enumerate(paths(kg, int(rate * seconds))):
        due = start + number / rate
        time.sleep(max(0, due - time.perf_counter()))
        ask(connection, path)
        times.append(1000 * (time.perf_counter() - due))
    cuts = quantiles(times, n=100)
    memory = []
    process = psutil.Process(server)
    start = time.perf_counter()
    for number, path in enumerate(paths(kg, queries)):
        if number % max(1, queries // 10) == 0:
            memory.append(process.memory_info().rss / 2**20)
        ask(connection, path)
    memory.append(process.memory_info().rss / 2**20)
    return {
        "rate": rate,
        "queries_at_that_rate": len(times),
        "median_ms": round(cuts[49], 2),
        "p99_ms": round(cuts[98], 2),
        "longest_ms": round(max(times), 2),
        "queries_at_once": queries,
        "queries_a_second_at_once": round(queries / (time.perf_counter() - start), 1),
        "memory_mib": [round(value, 1) for value in memory],
    }


if __name__ == "__main__":
    main()
