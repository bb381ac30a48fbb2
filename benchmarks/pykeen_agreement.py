"""Check that PyKEEN's rank-based evaluator computes the same metrics from the same scores.

The test triples of a data set are ranked twice from one set of scores, by `imvia_graph.evaluation`
and by PyKEEN (its own filter, its own ranks). Scores are rounded, so that many are tied. The script
writes benchmarks/results/pykeen_agreement.json and exits with 1 if a metric differs by more than
1e-6.

    python benchmarks/pykeen_agreement.py MKG-Y      # needs IMVIA_DATA, and the extra [bench]
    python benchmarks/pykeen_agreement.py countries --epochs 20
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import pykeen
import torch
from pykeen.evaluation import RankBasedEvaluator
from pykeen.evaluation.evaluator import create_sparse_positive_filter_, filter_scores_
from torch import Tensor

import imvia_graph as ig
from imvia_graph.evaluation import Ranking, filtered_ranks

RESULT = Path(__file__).parent / "results" / "pykeen_agreement.json"
TOLERANCE = 1e-6


@click.command()
@click.argument("source", default="MKG-Y")
@click.option("--epochs", default=10, show_default=True, help="Training epochs before ranking.")
@click.option("--decimals", default=0, show_default=True, help="Decimals of rounded scores.")
@click.option("--batch-size", default=256, show_default=True)
def main(source: str, epochs: int, decimals: int, batch_size: int) -> None:
    """Compare the metrics on the test triples of SOURCE."""
    run = ig.fit(source, epochs=epochs, dim=64, learning_rate=0.003, validation="published")
    kg, model = run.kg, run.model
    known = kg.answers()
    triples = kg.test
    all_triples = torch.cat([kg.train, kg.valid, kg.test]).unique(dim=0)
    evaluator = RankBasedEvaluator(add_defaults=True)
    ours: dict[str, list[Tensor]] = {"head": [], "tail": []}
    tied = 0
    with torch.no_grad():
        tables = model.candidates()
        for batch in triples.split(batch_size):
            head, relation, tail = batch.unbind(1)
            for side, entity, asked, answer in (
                ("tail", head, relation, tail),
                ("head", tail, relation + kg.num_relations, head),
            ):
                scores = model.scores(model.queries(entity, asked), tables, asked)["decision"]
                scores = scores.mul(10**decimals).round()
                ours[side].append(filtered_ranks(scores, answer, *known.pairs(entity, asked)))
                true = scores.gather(1, answer[:, None])
                tied += int(((scores == true).sum(1) > 1).sum())
                column = {"head": 0, "tail": 2}[side]
                positives, _ = create_sparse_positive_filter_(
                    hrt_batch=batch, all_pos_triples=all_triples, filter_col=column
                )
                theirs = filter_scores_(scores=scores.clone(), filter_batch=positives)
                theirs.scatter_(1, answer[:, None], true)
                evaluator.process_scores_(batch, side, theirs, true_scores=true)
    result = evaluator.finalize()
    ranking = Ranking(
        triples,
        tail={"decision": torch.cat(ours["tail"])},
        head={"decision": torch.cat(ours["head"])},
    )
    metrics = ranking.metrics()
    rows = []
    for side in ("both", "head", "tail"):
        for name, value in metrics[side].items():
            theirs_name = {"mrr": "inverse_harmonic_mean_rank", "mr": "arithmetic_mean_rank"}.get(
                name, name.replace("hits@", "hits_at_")
            )
            if name == "hits@100":
                continue  # PyKEEN's default metrics end at Hits@10
            other = float(result.get_metric(f"{side}.realistic.{theirs_name}"))
            rows.append({"side": side, "metric": name, "ours": value, "pykeen": other})
    worst = max(abs(row["ours"] - row["pykeen"]) / max(1.0, row["pykeen"]) for row in rows)
    report: dict[str, Any] = {
        "data": kg.name,
        "queries": 2 * len(triples),
        "queries_with_a_tie": tied,
        "largest_difference": worst,
        "pykeen": pykeen.get_version(),
        "torch": torch.__version__,
        "rows": rows,
    }
    for row in rows:
        click.echo(f"{row['side']:5} {row['metric']:8} {row['ours']:.9f} {row['pykeen']:.9f}")
    click.echo(f"{tied} of {2 * len(triples)} queries have a tie; largest difference {worst:.2e}")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
