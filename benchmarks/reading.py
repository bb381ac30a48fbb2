"""Measure reading 20 million labelled triples into a `MultiViewKG` with its heterograph.

    python benchmarks/reading.py

The script writes TSV files of 2 and of 20 million triples (1,000 relations, a fifth as many
entities as triples, 86 bytes per line, 1.7 GB for the larger file) to a temporary folder. It loads
each with `imvia_graph.load_kg`, with all triples in train and with a split 80/10/10, three times
each, in turn, in new processes. The time is that of `load_kg` by the wall clock, without imports:
the median of three, all of which are recorded (the minimum would favour short loads, which fit into
a quiet moment of the machine). The memory is the largest resident set of the whole process
(`resource.ru_maxrss`), imports included, over the three loads. If numba has not yet compiled the
loops for large graphs, the first large load does so (about 3 s). Goals: 20 million triples, all in
train, in less than 45 s and 6 GB, and in at most 12 times the time of 2 million. Results are
written to benchmarks/results/reading.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "reading.json"
GOALS = {"seconds": 45, "peak_gb": 6, "ratio": 12}
CHUNK = 2_000_000


def write_tsv(path: Path, rows: int, entities: int, relations: int = 1000) -> None:
    """Write random triples; each entity occurs, and some entities and relations are frequent."""
    import numpy as np
    import polars as pl

    random = np.random.default_rng(0)
    order = random.permutation(entities)
    with path.open("wb") as file:
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            head = random.integers(0, entities, count)
            fresh = order[start : start + count]
            head[: len(fresh)] = fresh
            tail = (entities * random.random(count) ** 3).astype(np.int64)
            relation = (relations * random.random(count) ** 2).astype(np.int64)
            entity = "http://example.org/entity/Q{}"
            frame = pl.DataFrame({"h": head, "r": relation, "t": tail}).select(
                pl.format(entity, pl.col("h") + 10_000_000).alias("h"),
                pl.format("relation_{}", pl.col("r") + 1000).alias("r"),
                pl.format(entity, pl.col("t") + 10_000_000).alias("t"),
            )
            frame.write_csv(file, include_header=False, separator="\t", quote_style="never")


def load(path: str, split: bool) -> None:
    """Load the file in this process and print time and memory."""
    import resource

    import imvia_graph as ig

    ig.load_kg  # noqa: B018 - imports the library, which is not timed
    start = time.perf_counter()
    kg = ig.load_kg(path, split=split)
    seconds = time.perf_counter() - start
    report = {
        "triples": sum(len(kg.triples(name)) for name in ("train", "valid", "test")),
        "edges": kg.graph.num_edges("fact"),
        "entities": kg.num_entities,
        "relations": kg.num_relations,
        "seconds": round(seconds, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }
    print(json.dumps(report))


def measure(path: Path, split: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--load", str(path), *(["--split"] if split else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{result.stderr}\nLoading {path} failed.")
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return report


def median_of(path: Path, loads: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine the reports of several loads of a file into one."""
    seconds = [load["seconds"] for load in loads]
    return {
        "text_gb": round(path.stat().st_size / 1e9, 2),
        **loads[0],
        "seconds": statistics.median(seconds),
        "seconds_of_each": seconds,
        "peak_gb": max(load["peak_gb"] for load in loads),
    }


def main() -> None:
    import polars as pl
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, nargs=2, default=[2, 20], metavar="M")
    parser.add_argument("--loads", type=int, default=3, help="Loads of each file.")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--split", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load, options.split)
        return
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="imvia-reading-") as folder:
        paths = {}
        for millions in options.millions:
            rows = round(millions * 1e6)
            paths[millions] = Path(folder) / f"{rows}.tsv"
            write_tsv(paths[millions], rows, entities=rows // 5)
        loads: dict[tuple[float, bool], list[dict[str, Any]]] = {}
        for _ in range(options.loads):
            for kind in product(options.millions, (False, True)):
                loads.setdefault(kind, []).append(measure(paths[kind[0]], kind[1]))
                print(kind, loads[kind][-1], flush=True)
        runs = {
            f"{millions:g} million, {'split' if split else 'all in train'}": median_of(
                paths[millions], of_a_kind
            )
            for (millions, split), of_a_kind in loads.items()
        }
    small, large = (f"{millions:g} million, all in train" for millions in options.millions)
    ratio = round(runs[large]["seconds"] / runs[small]["seconds"], 1)
    met = {
        "seconds": runs[large]["seconds"] < GOALS["seconds"],
        "peak_gb": runs[large]["peak_gb"] < GOALS["peak_gb"],
        "ratio": ratio <= GOALS["ratio"],
    }
    report = {
        "runs": runs,
        "ratio": ratio,
        "goals": GOALS,
        "met": met,
        "machine": {
            "cpus": os.cpu_count(),
            "load_before": round(busy, 1),
            "python": platform.python_version(),
            "polars": pl.__version__,
            "torch": torch.__version__,
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"ratio {ratio}; goals met: {met}; written to {options.out}")


if __name__ == "__main__":
    main()
