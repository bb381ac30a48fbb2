"""Measure filtered ranking of 1,000 queries against a million entities: time, memory and floor.

    python benchmarks/scale/ranking.py
    python benchmarks/scale/ranking.py --entities 5000000 --heads structure

Two untrained models of width 256, each in a new process: one with the structure head alone, and one
with a view of width 256 in half precision per entity, which has three heads. Head and tail queries
of 500 triples are ranked by the decision scores, against all entities and against 10,000 sampled
candidates. The floor is the time of the products of queries and candidates alone, at the better of
the rates that torch.mm reaches in the same process before and after ranking. Both times are given
as wall-clock and as processor time; other programs affect the latter less. Peak memory is the peak
resident set size during ranking, minus the memory in use before it (the model and its views).
The results are written to benchmarks/results/scale-ranking.json.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import measure

DIM, RELATIONS, TRIPLES, DRAWN = 256, 50, 500, 10_000
KINDS = ("structure", "views")


@measure.options
@click.option("--entities", default=1_000_000)
@click.option("--heads", "kinds", type=click.Choice(KINDS), multiple=True, default=KINDS)
@click.option("--repeats", default=2)
def main(
    entities: int,
    kinds: tuple[str, ...],
    repeats: int,
    device: str,
    threads: int,
    out: Path | None,
    row: measure.Row | None,
) -> None:
    """Measure ranking against many entities."""
    if row:
        click.echo(json.dumps(run(row)))
        return
    report: dict[str, Any] = {"machine": measure.machine(device, threads), "rows": [], "goals": []}
    for kind in kinds:
        request = {"device": device, "entities": entities, "kind": kind, "repeats": repeats}
        report["rows"].append(measure.in_process(__file__, request, threads))
        measure.told(report["rows"][-1], kind)
    name = "scale-ranking" if device == "cpu" else measure.result_file("scale-ranking", device).stem
    measure.finish(report, out or measure.RESULTS / f"{name}.json", [table_of(report)])


def table_of(report: measure.Row) -> Any:
    """Return a table with a row per model."""
    rows = report["rows"]
    table = measure.table_of(
        f"{rows[0]['queries']:,} queries against {rows[0]['entities']:,} entities, decision scores",
        "model", "heads", "best s", "median s", "floor s", "× floor", "by processor time",
        "peak MB", f"of {DRAWN:,} drawn, s",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["kind"],
            str(row["heads"]),
            f"{row['best']:.1f}",
            f"{row['median']:.1f}",
            f"{row['floor']:.1f}",
            f"{row['times_floor']:.2f}",
            f"{row['processor_times_floor']:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['drawn']:.2f}",
        )
    return table


def run(row: measure.Row) -> measure.Row:
    """Measure one model in this process."""
    import torch

    import imvia_graph as ig
    from imvia_graph.answers import AnswerIndex
    from imvia_graph.evaluation import draw_candidates, rank

    device = measure.start(row, keep=False)
    size = row["entities"]
    views = {}
    if row["kind"] == "views":
        feat = torch.empty(size, DIM, dtype=torch.float16)
        for part in feat.split(2**16):
            part.copy_(torch.randn(part.shape))
        views = {"text": (feat, torch.arange(size + 1))}
    model = (
        ig.IMVIA(size, RELATIONS, views, ig.Settings(dim=DIM, complex_head=False)).to(device).eval()
    )
    triples = torch.stack([torch.randint(most, (20_000,)) for most in (size, RELATIONS, size)], 1)
    known = AnswerIndex.from_triples([triples], size, RELATIONS)
    ranked = triples[:TRIPLES]
    queries, heads = 2 * len(ranked), len(model.heads)
    rank(model, ranked[:8], known, heads=(), candidates=torch.arange(5000))  # compiles kernels
    rates = [rate(queries, device)]
    peak = measure.Peak(device)
    begun = time.process_time()
    times = measure.seconds(
        lambda: rank(model, ranked, known, heads=()), row["repeats"], device, warm_up=0
    )
    processor = (time.process_time() - begun) / row["repeats"]
    peak_bytes = peak.bytes()
    rates.append(rate(queries, device))
    drawn = draw_candidates(size, DRAWN)
    among = measure.seconds(
        lambda: rank(model, ranked, known, heads=(), candidates=drawn), 3, device
    )
    operations = 2.0 * heads * queries * size * DIM
    floor, processor_floor = (operations / max(one) for one in zip(*rates, strict=True))
    summary = measure.summary(times)
    return {
        **summary,
        "queries": queries,
        "heads": heads,
        "peak_bytes": peak_bytes,
        "operations": operations,
        "rates": rates,
        "floor": floor,
        "times_floor": summary["median"] / floor,
        "processor": processor,
        "processor_times_floor": processor / processor_floor,
        "drawn": measure.summary(among)["median"],
    }


def rate(queries: int, device: Any) -> tuple[float, float]:
    """Return operations per second of wall-clock and of processor time of queries x candidates."""
    import torch

    query = torch.randn(queries, DIM, device=device)
    candidate = torch.randn(2**14, DIM, device=device)
    out = torch.empty(queries, len(candidate), device=device)
    times, processor = [], []
    for _ in range(10):
        begun = time.process_time()
        call = functools.partial(torch.mm, query, candidate.T, out=out)
        times += measure.seconds(call, 1, device, warm_up=0)
        processor.append(time.process_time() - begun)
    operations = 2.0 * queries * len(candidate) * DIM
    return operations / min(times), operations / min(processor)


if __name__ == "__main__":
    main()
