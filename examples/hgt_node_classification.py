"""Node classification with an HGT: a country's region, from its flag, its outline and its names.

A `dgl.nn.HGTConv` over facts about countries, with and without views. Relations that would give the
region away are removed from the graph: the region itself, `part_of`, memberships such as the
European Union, and everything that locates a country on the globe.

    python examples/hgt_node_classification.py
    python examples/hgt_node_classification.py --seeds 3
"""

from statistics import mean, stdev

import click
import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout

import imvia_graph as ig

# isort: split
import dgl  # after imvia_graph, which lets DGL 2.1.0 import with a newer torch

#: The relations of the graph that the model sees.
RELATIONS = [
    "official_language",
    "regional_language",
    "also_speaks",
    "written_in",
    "language_family",
    "currency",
    "has_capital",
    "under_sovereignty_of",
    "drives_on",
]

kg = ig.load_kg("countries")
triples = torch.cat([kg.train, kg.valid, kg.test])
in_region = triples[:, 1] == kg.id_of("region", "relation")
COUNTRY, _, region = triples[in_region].unbind(1)
_, LABEL = region.unique(return_inverse=True)

kept = torch.isin(triples[:, 1], torch.tensor([kg.id_of(name, "relation") for name in RELATIONS]))
head, relation, tail = triples[kept].unbind(1)
# Messages pass in both directions, with one edge type per relation and direction.
GRAPH = dgl.graph((torch.cat([head, tail]), torch.cat([tail, head])), num_nodes=kg.num_entities)
EDGE_TYPE = torch.cat([relation, relation + kg.num_relations])
NODE_TYPE = torch.isin(torch.arange(kg.num_entities), COUNTRY).long()  # 1 for countries


class HGT(nn.Module):
    def __init__(self, views: bool, dim: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.entity = nn.Embedding(kg.num_entities, dim)
        self.views = None
        if views:
            widths = {modality: kg.views(modality)[0].shape[1] for modality in kg.modalities}
            self.views = ig.nn.MultiViewEncoder(widths, dim, 0, dim, aggregate="sum")
        self.layers = nn.ModuleList(
            dgl.nn.HGTConv(dim, dim // heads, heads, 2, 2 * kg.num_relations) for _ in range(2)
        )
        self.out = nn.Linear(dim, len(LABEL.unique()))

    def forward(self):
        h = dropout(self.entity.weight, 0.3, self.training)
        if self.views is not None:
            # Views have length 1; embeddings have about the square root of their width.
            h = h + 8 * self.views(kg.graph, self.entity.weight)
        for layer in self.layers:
            h = layer(GRAPH, dropout(h, 0.3, self.training), NODE_TYPE, EDGE_TYPE)
        return self.out(dropout(h[COUNTRY], 0.3, self.training))


def fit(views: bool, seed: int, epochs: int) -> tuple[float, float]:
    """Return validation and test accuracy in % at the epoch that is best on validation."""
    torch.manual_seed(seed)
    order = torch.randperm(len(COUNTRY))
    train, valid, test = order.tensor_split([len(order) // 2, 3 * len(order) // 4])
    model = HGT(views)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    best = (0.0, 0.0)
    for epoch in range(1, epochs + 1):
        model.train()
        loss = cross_entropy(model()[train], LABEL[train])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch % 3 == 0 or epoch == epochs:
            model.eval()
            with torch.no_grad():
                right = (model().argmax(1) == LABEL).double()
            best = max(best, tuple(100 * right[part].mean().item() for part in (valid, test)))
    return best


def cell(values: list[float]) -> str:
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


@click.command()
@click.option("--epochs", default=60, show_default=True)
@click.option("--seeds", default=1, show_default=True, help="Number of runs and splits to average.")
def main(epochs: int, seeds: int) -> None:
    """Train with and without views, and print the accuracy in %."""
    print(f"{'':20}{'validation':16}test")
    for views in (False, True):
        valid, test = zip(*(fit(views, seed, epochs) for seed in range(seeds)), strict=True)
        print(f"{'HGT with views' if views else 'HGT':20}{cell(valid):16}{cell(test)}")


if __name__ == "__main__":
    main()
