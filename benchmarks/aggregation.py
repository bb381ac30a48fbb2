"""Measure gated aggregation of views, forward and backward: the direct form and the backends.

    python benchmarks/aggregation.py
    python benchmarks/aggregation.py --device cuda

There are 4,096 queries over 15,000 entities with 1 to 12 views each, width 256, frozen features. A
call computes the aggregates from the embeddings of entities and relations, and the gradients of the
gate's parameters. The direct form is Eq. 1 to 3 as printed: for every view of a query, a product of
W_g with the concatenation [e_h; e_r], the cosine, and torch-scatter's softmax and sums (plain torch
if that package is not installed for the device). The other forms split W_g into its halves and
aggregate with a backend of `imvia_graph.ops`; "auto, bfloat16 products" does so under autocast, as
training does on a CPU with bfloat16 hardware.

Each row runs in a new process. Extra memory is the peak of one forward and backward pass beyond
inputs and parameters: on a CPU the peak resident set minus the resident set before, measured after
a call on a few queries that loads everything needed; on a GPU torch's peak. GB/s counts the bytes
of features that have to be read, once forward and once backward; the copy rate, measured in the
same run, counts bytes read and bytes written. The floor is the gate's products at the measured
matrix rate plus those bytes at the copy rate.

Goals on a CPU: 12 times as fast as the direct form, with a quarter of its extra memory. Goals on a
GPU: 5 times as fast as the best composition of torch operations, and 60 % of the copy rate by the
aggregation alone, forward and backward from given gates. On a GPU there is a second size that keeps
it busy for longer than the host: 64 times the queries, as many entities, twice the width, bfloat16.
The script writes benchmarks/results/aggregation-cpu.json (or -h100.json, …).
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
from pathlib import Path
from typing import Any

import click
import measure

ENTITIES, RELATIONS, MOST_VIEWS = 15_000, 56, 12
IN_BFLOAT16 = "auto, bfloat16 products"
#: Without the gate: aggregates from given gates, and the gradients of these gates.
ALONE = "auto, the aggregation alone"


@measure.options
@click.option("--queries", default=4096)
@click.option("--dim", default=256)
@click.option("--repeats", default=20)
@click.option("--large-only", is_flag=True, help="On a GPU, measure the second size only.")
@click.option(
    "--learned-embeddings",
    is_flag=True,
    help="Compute gradients of the embeddings, too, as in training.",
)
def main(
    queries: int,
    dim: int,
    repeats: int,
    large_only: bool,
    learned_embeddings: bool,
    device: str,
    threads: int,
    out: Path | None,
    row: dict[str, Any] | None,
) -> None:
    if row:
        print(json.dumps(measure.rates(row) if row["form"] == "rates" else run(row)))
        return
    machine = measure.machine(device, threads)
    sizes = [(queries, dim, "float32")]
    if device != "cpu":
        sizes.append((64 * queries, 2 * dim, "bfloat16"))
        sizes = sizes[large_only:]
    common = {"device": device, "repeats": repeats, "learned": learned_embeddings}
    tables, rows, goals = [], [], []
    for queries, dim, dtype in sizes:
        shape = {"queries": queries, "dim": dim, "dtype": dtype}
        rates = measure.in_process(
            __file__, {**common, "form": "rates", "shape": [queries, 2 * dim, dim]}, threads
        )
        mine = []
        for form in forms(device):
            found = measure.in_process(__file__, {**common, **shape, "form": form}, threads)
            # Gate products (the relation half once per relation): forward, and weight gradients.
            passes = (3 if learned_embeddings else 2) * (form != ALONE)
            products = passes * 2 * (queries + RELATIONS) * dim**2
            precision = "bfloat16" if form == IN_BFLOAT16 else dtype
            found |= measure.floor(products, found["feature_bytes"], precision, rates)
            found["gigabytes_a_second"] = found["feature_bytes"] / found["median"] / 1e9
            found["times_floor"] = measure.times_floor(found, found["median"])
            measure.told(found, f"{form}, {queries} queries, width {dim}, {dtype}")
            mine.append(found)
        direct = mine[0]
        table = measure.table_of(
            f"{queries:,} queries, {direct['views']:,} views, width {dim}, {dtype}; copy rate"
            f" {rates['copy'] / 1e9:.1f} GB/s",
            "form", "best ms", "median ms", "× direct", "extra MB", "GB/s", "× floor",
        )  # fmt: skip
        for one in mine:
            one["times_direct"] = direct["median"] / one["median"]
            table.add_row(
                one["form"],
                f"{one['best'] * 1e3:.2f}",
                f"{one['median'] * 1e3:.2f}",
                f"{one['times_direct']:.1f}",
                f"{one['extra_bytes'] / 1e6:.0f}",
                f"{one['gigabytes_a_second']:.2f}",
                f"{one['times_floor']:.1f}",
            )
        tables.append(table)
        rows += mine
        goals += goals_of(mine, rates, device)
    report = {"machine": machine, "rates": rates, "rows": rows, "goals": goals}
    measure.finish(report, out or measure.result_file("aggregation", device), tables)


def forms(device: str) -> list[str]:
    """Return the direct form and the backends that run on the device, `auto` included."""
    import torch

    from imvia_graph.ops import BACKENDS, scatter
    from imvia_graph.training import cpu_has_bfloat16

    usable = {"auto": True, "reference": True}
    usable["torch_scatter"] = scatter.usable(torch.device(device))
    usable["numba"], usable["triton"] = device == "cpu", device != "cpu"
    found = ["direct", *(name for name in BACKENDS if usable[name])]
    if device != "cpu":
        found.append(ALONE)
    if device == "cpu" and cpu_has_bfloat16():
        found.insert(2, IN_BFLOAT16)
    return found


def goals_of(rows: list[dict[str, Any]], rates: dict[str, Any], device: str) -> list[Any]:
    direct = rows[0]
    auto = next(row for row in rows if row["form"] == "auto")
    what = f"at width {direct['dim']}, {direct['dtype']}"
    memory = auto["extra_bytes"] / direct["extra_bytes"]
    if device == "cpu":
        fast = [row for row in rows if row["form"] in ("auto", IN_BFLOAT16)]
        return [
            *(
                measure.goal(f"{row['form']}: times the direct form {what}",
                             row["times_direct"], 12)
                for row in fast
            ),
            measure.goal(f"share of its extra memory {what}", memory, 0.25, at_least=False),
        ]  # fmt: skip
    composed = min(row["median"] for row in rows if row["form"] not in ("auto", "triton", ALONE))
    alone = next(row for row in rows if row["form"] == ALONE)
    share = alone["gigabytes_a_second"] * 1e9 / rates["copy"]
    return [
        measure.goal(f"times the best composition of torch ops {what}",
                     composed / auto["median"], 5),
        measure.goal(f"the aggregation alone: share of the copy rate {what}", share, 0.6),
    ]  # fmt: skip


def run(row: dict[str, Any]) -> dict[str, Any]:
    """Measure one row in this process."""
    import naive
    import torch
    from torch import nn

    from imvia_graph.nn import GatedViewConv
    from imvia_graph.ops import gated_view_aggregate

    device = torch.device(row["device"])
    torch.set_num_threads(row["threads"])
    torch.manual_seed(0)
    queries, dim = row["queries"], row["dim"]
    entities_there = max(ENTITIES, queries)
    count = torch.randint(1, MOST_VIEWS + 1, (entities_there,))
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)]).to(device)
    feat = torch.randn(int(ptr[-1]), dim, device=device, dtype=getattr(torch, row["dtype"]))
    entity = torch.randint(0, entities_there, (queries,), device=device)
    relation = torch.randint(0, RELATIONS, (queries,), device=device)
    entities = torch.randn(entities_there, dim, device=device, requires_grad=row["learned"])
    relations = torch.randn(RELATIONS, dim, device=device, requires_grad=row["learned"])
    grad = torch.randn(queries, dim, device=device)
    module: nn.Module
    if row["form"] == "direct":
        module = naive.GatedViews((feat, ptr), dim, dim).to(device)
    else:
        module = GatedViewConv(dim, dim, dim, backend=row["form"].split(",")[0]).to(device)
    gates = torch.rand(queries, dim, device=device, requires_grad=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=row["form"] == IN_BFLOAT16)

    def step(size: int = queries) -> None:
        module.zero_grad(set_to_none=True)
        entities.grad = relations.grad = None
        asked = entity[:size]
        if row["form"] == ALONE:
            gates.grad = None
            given = feat, ptr, asked, gates[:size]
            gated_view_aggregate(*given).backward(grad[:size])
            return
        with autocast:
            e_h, under = entities[asked], relation[:size]
            if row["form"] == "direct":
                result = module.aggregate(asked, e_h, relations[under])
            else:
                result = module.aggregate(feat, ptr, asked, e_h, relations, relation=under)
        result.backward(grad[:size].to(result.dtype))

    step(8)
    module.zero_grad(set_to_none=True)
    give_freed_memory_back()
    peak = measure.Peak(device)
    step()
    extra = peak.bytes()
    measure.start(row)
    views = int((ptr.diff()[entity]).sum())
    return {
        "views": views,
        "feature_bytes": 2 * views * dim * feat.element_size(),
        "extra_bytes": extra,
        **measure.summary(measure.seconds(step, row["repeats"], device, warm_up=3)),
    }


def give_freed_memory_back() -> None:
    """Return freed memory to the system, so that a step's allocations show in the resident set."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
