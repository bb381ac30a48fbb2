"""Link prediction with an R-GCN, with and without views.

A `dgl.nn.RelGraphConv` with a DistMult score. The input is one embedding per entity, plus, with
views, the output of `MultiViewEncoder` for its pictures and texts. Everything else is equal.

    python examples/rgcn_link_prediction.py
    python examples/rgcn_link_prediction.py --seeds 3
"""

from statistics import mean, stdev

import click
import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout

import imvia_graph as ig
from imvia_graph.answers import with_inverses
from imvia_graph.evaluation import filtered_ranks, rank_metrics

# isort: split
import dgl  # after imvia_graph, which lets DGL 2.1.0 import with a newer torch

kg = ig.load_kg("countries")
#: Each fact gives two queries: (head, relation, ?), and (tail, inverse relation, ?).
QUERIES = with_inverses(kg.train, kg.num_relations)


class RGCN(nn.Module):
    def __init__(self, views: bool, dim: int = 64) -> None:
        super().__init__()
        relations = 2 * kg.num_relations
        self.entity = nn.Embedding(kg.num_entities, dim)
        self.relation = nn.Embedding(relations, dim)
        nn.init.xavier_normal_(self.entity.weight)
        nn.init.xavier_normal_(self.relation.weight)
        self.conv = dgl.nn.RelGraphConv(dim, dim, relations, regularizer="basis", num_bases=8)
        self.views = None
        if views:
            widths = {modality: kg.views(modality)[0].shape[1] for modality in kg.modalities}
            self.views = ig.nn.MultiViewEncoder(widths, dim, 0, dim, aggregate="sum")

    def forward(self, queries):
        """Return (entities, dim) embeddings after messages along the queries' edges."""
        entity, relation, answer = queries.unbind(1)
        graph = dgl.graph((entity, answer), num_nodes=kg.num_entities)
        h = dropout(self.entity.weight, 0.3, self.training)
        if self.views is not None:
            h = h + 2 * self.views(kg.graph, self.entity.weight)
        norm = 1 / graph.in_degrees()[answer].float()[:, None]  # averages an entity's messages
        message = self.conv(graph, dropout(h, 0.3, self.training), relation, norm)
        return h + dropout(message, 0.3, self.training)

    def scores(self, h, entity, relation):
        """Return the DistMult score of each query (entity, relation, ?) against all entities."""
        return (h[entity] * self.relation(relation)) @ h.T


def train_epoch(model: RGCN, optimizer: torch.optim.Optimizer) -> None:
    """Train on each quarter of the facts as queries, with the other facts as the graph."""
    model.train()
    quarter = torch.randint(4, (len(kg.train),)).repeat(2)  # the same for both directions
    for queried in range(4):
        h = model(QUERIES[quarter != queried])
        entity, relation, answer = QUERIES[quarter == queried].unbind(1)
        loss = cross_entropy(model.scores(h, entity, relation), answer, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def mrr(model: RGCN, split: str) -> float:
    """Return the filtered MRR in % of both directions, over the graph of all training facts."""
    model.eval()
    h = model(QUERIES)
    entity, relation, answer = with_inverses(kg.triples(split), kg.num_relations).unbind(1)
    row, col = kg.answers().pairs(entity, relation)
    ranks = filtered_ranks(model.scores(h, entity, relation), answer, row, col)
    return 100 * rank_metrics(ranks)["mrr"]


def fit(views: bool, seed: int, epochs: int) -> tuple[float, float]:
    """Return validation and test MRR of the epoch that is best on validation."""
    torch.manual_seed(seed)
    model = RGCN(views)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    best = (0.0, 0.0)
    for epoch in range(1, epochs + 1):
        train_epoch(model, optimizer)
        if epoch % 5 == 0 or epoch == epochs:
            best = max(best, (mrr(model, "valid"), mrr(model, "test")))
    return best


def cell(values: list[float]) -> str:
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


@click.command()
@click.option("--epochs", default=60, show_default=True)
@click.option("--seeds", default=1, show_default=True, help="Number of runs to average.")
def main(epochs: int, seeds: int) -> None:
    """Train with and without views, and print the filtered MRR in %."""
    print(f"{'':20}{'validation':16}test")
    for views in (False, True):
        valid, test = zip(*(fit(views, seed, epochs) for seed in range(seeds)), strict=True)
        name = "R-GCN with views" if views else "R-GCN"
        print(f"{name:20}{cell(valid):16}{cell(test)}")


if __name__ == "__main__":
    main()
