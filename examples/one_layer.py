"""One layer in a model of thirty lines: a country's region, predicted from its flag and outline.

`GatedViewConv` takes the place of a mean over pictures; the rest is plain torch.

    python examples/one_layer.py
"""

import torch
from torch import nn

import imvia_graph as ig

kg = ig.load_kg("countries")
graph = kg.graph["image", "of", "entity"]  # bipartite: from a picture to the entity that it shows
triples = torch.cat([kg.train, kg.valid, kg.test])
country, _, region = triples[triples[:, 1] == kg.id_of("region", "relation")].unbind(1)
_, label = region.unique(return_inverse=True)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.entity = nn.Parameter(torch.zeros(1, 8))  # equal for all: only the pictures differ
        self.conv = ig.nn.GatedViewConv(1280, entity_feats=8, allow_zero_in_degree=True)
        self.out = nn.Linear(1280, 5)

    def forward(self, graph, views):
        return self.out(self.conv(graph, (views, self.entity.expand(graph.num_dst_nodes(), -1))))


torch.manual_seed(0)
model, views = Model(), 10 * graph.srcdata["feat"].float()
train, test = torch.randperm(len(country)).split([200, 49])
optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
for _ in range(60):
    loss = nn.functional.cross_entropy(model(graph, views)[country[train]], label[train])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
right = (model(graph, views)[country].argmax(1) == label).float()
print(
    f"right: {right[train].mean():.0%} of 200 countries, {right[test].mean():.0%} of 49 unseen ones"
)
