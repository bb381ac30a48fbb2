"""Measure filtered ranking by the naive form, by the library and by PyKEEN's evaluator.

    IMVIA_DATA=… python benchmarks/ranking.py
    IMVIA_DATA=… python benchmarks/ranking.py --data DB15K --device cuda

Both sides of the test triples of a published data set are ranked against all entities except other
known answers, by untrained models of width 256 (relations too). With four heads (structure, image,
text, joint) and the views of settings A and B of benchmarks/training.py, the rows are the naive
form, on a sample of the queries, and `imvia_graph.evaluation.rank`, each by every head and the
decision and by the decision alone. With one head, they are `rank` of a model of structure alone,
and PyKEEN's RankBasedEvaluator of a ComplEx of embedding_dim 256, with the batch size that PyKEEN
chooses and with 1,024.

The time of the naive form is that of its candidate tables plus that of the sample, scaled to all
queries. Each row runs in a new process, which keeps the memory that it frees. Peak memory is the
largest resident set minus that of the process with its imports; on a GPU it is torch's peak. The
floor counts the model's products, most of them of queries with candidates, and reading the views
once. Goals on a CPU: at least 10 times as fast as the naive form and 3 times as fast as the faster
row of PyKEEN; on a GPU, on DB15K: at most 1 s. The script writes
benchmarks/results/ranking-cpu.json, ranking-DB15K-h100.json, ….
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import measure
from training import DIM, SETTINGS, graph, peak_bytes

EVERY, DECISION = "every head and the decision", "the decision"


@measure.options
@click.option("--data", default="MKG-Y", help="A published data set in IMVIA_DATA.")
@click.option("--sample", default=500, help="Queries ranked by the naive form.")
@click.option("--repeats", default=3)
@click.option(
    "--every-head-only", is_flag=True, help="Skip the rows of the decision alone and of one head."
)
def main(
    data: str,
    sample: int,
    repeats: int,
    every_head_only: bool,
    device: str,
    threads: int,
    out: Path | None,
    row: dict[str, Any] | None,
) -> None:
    if row:
        kinds = {"rates": measure.rates, "naive": run_naive, "ours": run_ours}
        print(json.dumps(kinds.get(row["form"], run_pykeen)(row)))
        return
    machine = measure.machine(device, threads)
    common = {"device": device, "data": data, "sample": sample, "repeats": repeats}
    asked: list[dict[str, Any]] = [
        {"setting": setting, "by": by, "form": form}
        for setting in SETTINGS
        for by in ((EVERY,) if every_head_only else (EVERY, DECISION))
        for form in ("naive", "ours")
    ]
    one_head = {"setting": "one head", "by": DECISION}
    if not every_head_only:
        asked += [{**one_head, "form": "ours"}]
    if measure.has("pykeen") and not every_head_only:
        asked += [{**one_head, "form": f"PyKEEN, batch size {size}"} for size in ("chosen", 1024)]
    rows = []
    for one in asked:
        rows.append(measure.in_process(__file__, {**common, **one}, threads))
        measure.told(rows[-1], f"{one['setting']}, by {one['by']}, {one['form']}")
    shape = [1024, DIM, rows[0]["entities"]]
    rates = measure.in_process(__file__, {**common, "form": "rates", "shape": shape}, threads)
    for one in rows:
        if "operations" in one:
            one |= measure.floor(one["operations"], one["bytes"], "float32", rates)
            one["times_floor"] = measure.times_floor(one, one["median"])
    report = {
        "data": data,
        "machine": machine,
        "rates": rates,
        "rows": rows,
        "goals": goals_of(rows, device, data),
    }
    name = "ranking" if data == "MKG-Y" else f"ranking-{data}"
    measure.finish(report, out or measure.result_file(name, device), [table_of(report)])


def table_of(report: dict[str, Any]) -> Any:
    rows, rates = report["rows"], report["rates"]
    table = measure.table_of(
        f"{rows[0]['queries']:,} test queries of {report['data']}, {rows[0]['entities']:,}"
        f" candidates; {rates['float32'] / 1e9:.0f} GFLOP/s in float32",
        "views", "ranked by", "form", "best s", "median s", "queries/s", "peak MB", "× floor",
        texts=3,
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row["setting"],
            row["by"],
            row["form"] + (f" ({row['timed']})" if "timed" in row else ""),
            f"{row['best']:.3f}",
            f"{row['median']:.3f}",
            f"{row['queries'] / row['median']:,.0f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            measure.text(row.get("times_floor"), "{:.1f}"),
        )
    return table


def goals_of(rows: list[dict[str, Any]], device: str, data: str) -> list[Any]:
    time = {(row["setting"], row["by"], row["form"]): row["median"] for row in rows}
    goals = []
    for setting in SETTINGS:
        for by in (EVERY, DECISION):
            if (setting, by, "ours") not in time:
                continue
            ours = time[setting, by, "ours"]
            gain = time[setting, by, "naive"] / ours
            goals.append(measure.goal(f"{setting}, by {by}: times the naive form", gain, 10))
        if device != "cpu" and data == "DB15K":
            what, ours = f"{setting}, by {EVERY}: seconds", time[setting, EVERY, "ours"]
            goals.append(measure.goal(what, ours, 1.0, at_least=False))
    pykeen = [value for (_, _, form), value in time.items() if form.startswith("PyKEEN")]
    if pykeen:
        ours = time["one head", DECISION, "ours"]
        goals.append(measure.goal("one head: times PyKEEN's evaluator", min(pykeen) / ours, 3))
    return goals


# -- rows, each in a process of its own -----------------------------------------------------------


def load(row: dict[str, Any]) -> Any:
    """Load the graph with the views of the row's setting; "one head" has none."""
    plain = {name: value for name, value in row.items() if name != "setting"}
    return graph(row if row["setting"] in SETTINGS else plain)


def run_naive(row: dict[str, Any]) -> dict[str, Any]:
    import naive
    import torch

    import imvia_graph as ig
    from imvia_graph.answers import with_inverses

    idle = measure.resident(peak=True)
    device = measure.start(row)
    kg = load(row)
    peak = measure.Peak(device)
    settings = ig.Settings(dim=DIM, relation_dim=DIM, complex_head=False)
    model = naive.NaiveIMVIA(kg, settings).to(device).eval()
    queries = with_inverses(kg.test, kg.num_relations)
    known = naive.answers_of([kg.train, kg.valid, kg.test], kg.num_relations)
    sample = queries[torch.randperm(len(queries))[: row["sample"]]].to(device)
    alone = row["by"] == DECISION
    with torch.no_grad():
        tables = model.tables()
        (once,) = measure.seconds(model.tables, 1, device, warm_up=0)
        naive.ranks(model, sample[:8], known, tables, 1024, alone)
        times = measure.seconds(
            lambda: naive.ranks(model, sample, known, tables, 1024, alone),
            min(2, row["repeats"]),
            device,
            warm_up=0,
        )
    share = len(queries) / len(sample)
    return {
        **measure.summary([once + share * time for time in times]),
        "timed": f"{len(sample)} queries, scaled",
        "queries": len(queries),
        "entities": kg.num_entities,
        "peak_bytes": peak_bytes(peak, idle),
        **work(kg, len(queries), 2 + len(kg.modalities)),
    }


def run_ours(row: dict[str, Any]) -> dict[str, Any]:
    import imvia_graph as ig
    from imvia_graph.evaluation import rank

    idle = measure.resident(peak=True)
    device = measure.start(row)
    kg = load(row)
    peak = measure.Peak(device)
    settings = ig.Settings(dim=DIM, relation_dim=DIM, complex_head=False)
    model = ig.IMVIA.from_kg(kg, settings).to(device)
    known = kg.answers()
    heads = None if row["by"] == EVERY else ()

    def call() -> None:
        ranking = rank(model, kg.test, known, heads=heads)
        ig.evaluation.rank_metrics(ranking.tail["decision"])

    times = measure.seconds(call, row["repeats"], device)
    return {
        **measure.summary(times),
        "queries": 2 * len(kg.test),
        "entities": kg.num_entities,
        "peak_bytes": peak_bytes(peak, idle),
        **work(kg, 2 * len(kg.test), len(model.heads)),
    }


def run_pykeen(row: dict[str, Any]) -> dict[str, Any]:
    from pykeen.evaluation import RankBasedEvaluator
    from pykeen.models import ComplEx
    from pykeen.triples import CoreTriplesFactory

    idle = measure.resident(peak=True)
    device = measure.start(row)
    kg = load(row)
    peak = measure.Peak(device)
    triples = CoreTriplesFactory.create(
        kg.train,
        num_entities=kg.num_entities,
        num_relations=kg.num_relations,
        create_inverse_triples=True,
    )
    model = ComplEx(triples_factory=triples, embedding_dim=DIM, random_seed=0).to(device)
    size = None if row["form"].endswith("chosen") else 1024
    evaluator = RankBasedEvaluator()

    def call() -> None:
        evaluator.evaluate(
            model=model,
            mapped_triples=kg.test,
            additional_filter_triples=[kg.train, kg.valid],
            batch_size=size,
            use_tqdm=False,
        )

    times = measure.seconds(call, row["repeats"], device)
    return {
        **measure.summary(times),
        "queries": 2 * len(kg.test),
        "entities": kg.num_entities,
        "peak_bytes": peak_bytes(peak, idle),
    }


def work(kg: Any, queries: int, heads: int) -> dict[str, float]:
    """Return the operations of the products (scores, queries, tables) and the views' bytes."""
    relations = 2 * len(kg.test[:, 1].unique())
    operations = 2.0 * heads * queries * kg.num_entities * DIM
    operations += 2 * heads * (relations * DIM**3 + queries * DIM**2)
    traffic = 0.0
    for modality in kg.modalities:
        feat, _ = kg.views(modality)
        operations += 2 * 2 * kg.num_entities * feat.shape[1] * DIM  # gate and projection
        traffic += feat.numel() * feat.element_size()
    return {"operations": operations, "bytes": traffic}


if __name__ == "__main__":
    main()
