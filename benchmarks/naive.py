"""A straightforward implementation of the paper, against which the library is timed.

Model, losses and ranks are the same as the library's, parameter for parameter
(tests/test_naive.py). Each equation is implemented as printed: one gate per view, one relation
matrix per query, dense targets, separate sigmoid and cross-entropy, one pair of modalities at a
time, and one sort per query. Everything is in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, permutations

import torch
from torch import Tensor, nn
from torch.nn import functional

import imvia_graph as ig

try:
    import torch_scatter
except (ImportError, OSError):
    torch_scatter = None

#: The answers, entity ids, of each query (entity, relation).
Answers = dict[tuple[int, int], list[int]]


# -- views to one vector (Eq. 1 to 3) -------------------------------------------------------------


def sum_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Return (size, …) sums of the rows with equal index."""
    if _scatters(values):
        return torch_scatter.scatter(values, index, dim=0, dim_size=size, reduce="sum")
    return values.new_zeros(size, *values.shape[1:]).index_add(0, index, values)


def softmax_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Return the (T,) softmax over the elements with equal index."""
    if _scatters(values):
        return torch_scatter.scatter_softmax(values, index, dim=0, dim_size=size)
    top = values.new_full((size,), -torch.inf)
    top = top.scatter_reduce(0, index, values.detach(), reduce="amax")
    exp = (values - top[index]).exp()
    return exp / sum_by(exp, index, size)[index]


def _scatters(values: Tensor) -> bool:
    """Return whether torch-scatter is installed and supports the device of the values."""
    return torch_scatter is not None and (
        not values.is_cuda or torch.ops.torch_scatter.cuda_version() > 0
    )


class GatedViews(nn.Module):
    """Eq. 1 to 3 of one modality, then the projection P_m and the entity's free vector."""

    def __init__(self, views: tuple[Tensor, Tensor], dim: int, relation_dim: int) -> None:
        super().__init__()
        feat, ptr = views
        self.register_buffer("feat", feat)  # (V, d_m), sorted by entity
        self.register_buffer("ptr", ptr)  # (N + 1,)
        self.dim = dim
        self.gate = nn.Linear(dim + relation_dim, feat.shape[1])  # W_g and b_g
        self.absent = nn.Parameter(torch.zeros(feat.shape[1]))
        self.projection = nn.Linear(feat.shape[1], dim)
        self.residual = nn.Embedding(len(ptr) - 1, dim)

    def aggregate(self, entity: Tensor, e_h: Tensor, e_r: Tensor | None) -> Tensor:
        """Return (B, d_m) aggregates of (B,) entities under (B, relation_dim) relations or none."""
        start, count = self.ptr[entity], self.ptr.diff()[entity]
        query = torch.repeat_interleave(torch.arange(len(entity), device=entity.device), count)
        first = (count.cumsum(0) - count)[query]
        view = start[query] + torch.arange(len(query), device=entity.device) - first
        f = self.feat[view]  # (T, d_m)
        if e_r is None:
            gate = functional.linear(e_h[query], self.gate.weight[:, : self.dim], self.gate.bias)
        else:
            gate = self.gate(torch.cat([e_h[query], e_r[query]], dim=1))
        gate = torch.sigmoid(gate)
        similarity = functional.cosine_similarity(gate * f, f, dim=1)
        alpha = softmax_by(similarity, query, len(entity))
        out = sum_by(alpha[:, None] * f, query, len(entity))
        return torch.where(count[:, None] > 0, out, self.absent)

    def forward(self, entity: Tensor, e_h: Tensor, e_r: Tensor | None) -> Tensor:
        """(B, dim)."""
        return self.projection(self.aggregate(entity, e_h, e_r)) + self.residual(entity)


# -- Tucker (Eq. 6) -------------------------------------------------------------------------------


class Tucker(nn.Module):
    """Query vectors with the batch normalisation and the dropouts of TuckER."""

    def __init__(self, settings: ig.Settings) -> None:
        super().__init__()
        self.core = nn.Parameter(torch.empty(settings.relation_dim, settings.dim, settings.dim))
        nn.init.uniform_(self.core, -1, 1)
        self.input_norm = nn.BatchNorm1d(settings.dim)
        self.hidden_norm = nn.BatchNorm1d(settings.dim)
        self.input_dropout = nn.Dropout(settings.input_dropout)
        self.relation_dropout = nn.Dropout(settings.relation_dropout)
        self.hidden_dropout = nn.Dropout(settings.hidden_dropout)

    def forward(self, e_h: Tensor, e_r: Tensor) -> Tensor:
        """Return (B, dim) query vectors of (B, dim) entities and (B, relation_dim) relations."""
        x = self.input_dropout(self.input_norm(e_h))
        matrix = e_r @ self.core.view(len(self.core), -1)
        matrix = self.relation_dropout(matrix.view(-1, *self.core.shape[1:]))  # (B, dim, dim)
        x = torch.bmm(x[:, None], matrix)[:, 0]
        return self.hidden_dropout(self.hidden_norm(x))


# -- the model ------------------------------------------------------------------------------------


class NaiveIMVIA(nn.Module):
    """The model of Fig. 1 over the views of a graph."""

    def __init__(self, kg: ig.MultiViewKG, settings: ig.Settings) -> None:
        super().__init__()
        self.num_entities = kg.num_entities
        self.entity = nn.Embedding(kg.num_entities, settings.dim)
        self.views = nn.ModuleList(
            GatedViews(kg.views(modality), settings.dim, settings.relation_dim)
            for modality in kg.modalities
        )
        sources = 1 + len(self.views)
        heads = sources + 1  # the joint head is the last
        self.attention = nn.Parameter(torch.zeros(sources, settings.dim))
        self.relation = nn.ModuleList(
            nn.Embedding(2 * kg.num_relations, settings.relation_dim) for _ in range(heads)
        )
        self.tucker = nn.ModuleList(Tucker(settings) for _ in range(heads))
        self.decision = nn.Linear(settings.relation_dim, heads)
        for table in (self.entity, *self.relation, *(part.residual for part in self.views)):
            nn.init.xavier_normal_(table.weight)

    def embed(self, entity: Tensor, relation: Tensor | None) -> list[Tensor]:
        """Return the (B, dim) embeddings of structure, each modality and the joint head."""
        e_h = self.entity(entity)
        e_r = None if relation is None else self.relation[0](relation)
        sources = [e_h] + [views(entity, e_h, e_r) for views in self.views]
        logits = [(w * e).sum(1) for w, e in zip(self.attention, sources, strict=True)]
        weights = torch.softmax(torch.stack(logits, dim=1), dim=1)
        joint = sum(weights[:, m, None] * e for m, e in enumerate(sources))
        return [*sources, joint]

    def tables(self) -> list[Tensor]:
        """Return the (N, dim) candidate table of each head."""
        return self.embed(torch.arange(self.num_entities, device=self.entity.weight.device), None)

    def scores(
        self, embedded: list[Tensor], relation: Tensor, tables: list[Tensor]
    ) -> list[Tensor]:
        """Return (B, N) scores of embedded queries by each head and, last, by the decision."""
        scores = []
        for e_h, table, tucker, e_r in zip(
            embedded, tables, self.tucker, self.relation, strict=True
        ):
            scores.append(tucker(e_h, e_r(relation)) @ table.T)
        weights = torch.softmax(self.decision(self.relation[0](relation)), dim=1)
        scores.append(sum(weights[:, m, None] * score for m, score in enumerate(scores)))
        return scores

    def forward(self, entity: Tensor, relation: Tensor) -> list[Tensor]:
        """Return the (B, N) scores of (B,) entities and relations."""
        return self.scores(self.embed(entity, relation), relation, self.tables())

    def copy_weights(self, model: ig.IMVIA) -> None:
        """Copy the parameters of the library's model of the same graph and settings."""
        pairs = [
            (self.entity, model.entity),
            (self.relation, model.relation),
            (self.decision, model.decision.linear),
        ]
        with torch.no_grad():
            self.attention.copy_(model.joint.attention)
            for mine, conv, projection, residual in zip(
                self.views, model.encoder.convs, model.encoder.projections, model.residual,
                strict=True,
            ):  # fmt: skip
                halves = [conv.gate_entity.weight, conv.gate_relation.weight]
                mine.gate.weight.copy_(torch.cat(halves, dim=1))
                mine.gate.bias.copy_(conv.gate_entity.bias)
                mine.absent.copy_(conv.absent)
                pairs += [(mine.projection, projection), (mine.residual, residual)]
            for mine, theirs in zip(self.tucker, model.decoder, strict=True):
                mine.core.copy_(theirs.core)
                pairs += [
                    (mine.input_norm, theirs.input_norm),
                    (mine.hidden_norm, theirs.hidden_norm),
                ]
            for mine, theirs in pairs:
                mine.load_state_dict(theirs.state_dict())


# -- the losses (Eq. 4, 5, 7) ---------------------------------------------------------------------


class Club(nn.Module):
    """CLUB's estimator for one pair of modalities, as its authors implement it."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.log_variance = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.Tanh()
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the upper bound of the mutual information."""
        mean, log_variance = self.mean(x), self.log_variance(x)
        positive = -((mean - y) ** 2) / 2 / log_variance.exp()
        negative = -((mean - y[shuffled(len(y), y.device)]) ** 2) / 2 / log_variance.exp()
        return (positive.sum(1) - negative.sum(1)).mean()

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the estimator's training loss, its negative log-likelihood."""
        mean, log_variance = self.mean(x), self.log_variance(x)
        return ((mean - y) ** 2 / 2 / log_variance.exp() + log_variance / 2).sum(1).mean()


def shuffled(count: int, device: torch.device) -> Tensor:
    """Return a random permutation."""
    return torch.randperm(count, device=device)


def alignment(x: Tensor, y: Tensor, entity: Tensor, temperature: Tensor) -> Tensor:
    """Return L2 of one pair: classify the matching row of the other modality, both ways."""
    similarity = functional.normalize(x, dim=1) @ functional.normalize(y, dim=1).T / temperature
    own = torch.eye(len(entity), dtype=torch.bool, device=entity.device)
    twin = (entity[:, None] == entity[None, :]) & ~own
    similarity = similarity.masked_fill(twin, -torch.inf)
    target = torch.arange(len(entity), device=entity.device)
    return functional.cross_entropy(similarity, target) + functional.cross_entropy(
        similarity.T, target
    )


def completion(score: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Return L3 of one head, with equal total weight for positives and negatives."""
    weight = torch.where(target > 0, 1 / target.sum(), 1 / (1 - target).sum())
    target = (1 - label_smoothing) * target + label_smoothing / target.shape[1]
    return functional.binary_cross_entropy(torch.sigmoid(score), target, weight, reduction="sum")


# -- training -------------------------------------------------------------------------------------


class NaiveTrainer:
    """Training with Eq. 8 on queries (entity, relation) with all their known answers."""

    def __init__(self, model: NaiveIMVIA, kg: ig.MultiViewKG, settings: ig.Settings) -> None:
        self.model, self.settings = model, settings
        self.device = model.entity.weight.device
        self.answers = answers_of([kg.train], kg.num_relations)
        sources = 1 + len(model.views)
        self.pairs = list(permutations(range(sources), 2))
        self.estimators = nn.ModuleList(
            Club(settings.dim, settings.information_dim) for _ in self.pairs
        ).to(self.device)
        log_scale = -torch.tensor(settings.temperature).log()
        self.log_scale = nn.Parameter(log_scale.to(self.device))
        self.optimizer = torch.optim.Adam(
            [*model.parameters(), self.log_scale], lr=settings.learning_rate
        )
        self.estimator_optimizer = torch.optim.Adam(
            self.estimators.parameters(), lr=settings.information_learning_rate
        )

    def batches(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the batches of an epoch, of shuffled queries."""
        queries = list(self.answers)
        order = torch.randperm(len(queries)).tolist()
        size = self.settings.batch_size
        for start in range(0, len(order), size):
            yield [queries[i] for i in order[start : start + size]]

    def targets(self, queries: list[tuple[int, int]]) -> Tensor:
        """Return the (B, N) targets: 1 where the entity answers the query, else 0."""
        target = torch.zeros(len(queries), self.model.num_entities)
        for i, query in enumerate(queries):
            target[i, self.answers[query]] = 1.0
        return target.to(self.device)

    def losses(self, queries: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return L1, L2, L3, and the training loss of L1's estimators."""
        entity, relation = torch.tensor(queries, device=self.device).unbind(1)
        target = self.targets(queries)
        embedded = self.model.embed(entity, relation)
        dtype = embedded[0].dtype
        l3 = sum(
            completion(score, target.to(dtype), self.settings.label_smoothing)
            for score in self.model.scores(embedded, relation, self.model.tables())
        )
        sources = embedded[:-1]
        everyone = torch.ones_like(entity, dtype=torch.bool)
        present = [everyone] + [views.ptr.diff()[entity] > 0 for views in self.model.views]
        l1 = l2 = learning = torch.zeros((), dtype=dtype, device=self.device)
        for (m, n), estimator in zip(self.pairs, self.estimators, strict=True):
            rows = present[m] & present[n]
            x, y = sources[m][rows], sources[n][rows]
            l1 = l1 + estimator(x, y)
            learning = learning + estimator.learning_loss(x.detach(), y.detach())
        for m, n in combinations(range(len(sources)), 2):
            rows = present[m] & present[n]
            pair = alignment(
                sources[m][rows], sources[n][rows], entity[rows], (-self.log_scale).exp()
            )
            l2 = l2 + 2 * pair / len(sources)  # (m, n) and (n, m)
        return l1, l2, l3, learning

    def step(self, queries: list[tuple[int, int]]) -> Tensor:
        """Run one training step and return its total loss."""
        l1, l2, l3, learning = self.losses(queries)
        s = self.settings
        loss = s.lambda_information * l1 + s.lambda_alignment * l2 + s.lambda_completion * l3
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.estimator_optimizer.zero_grad()
        learning.backward()
        self.estimator_optimizer.step()
        return loss.detach()


# -- ranking --------------------------------------------------------------------------------------


def answers_of(triples: list[Tensor], num_relations: int) -> Answers:
    """Return the answers of each query, in both directions."""
    found: dict[tuple[int, int], set[int]] = {}
    for head, relation, tail in torch.cat(triples).tolist():
        found.setdefault((head, relation), set()).add(tail)
        found.setdefault((tail, relation + num_relations), set()).add(head)
    return {query: sorted(answers) for query, answers in found.items()}


@torch.no_grad()
def ranks(
    model: NaiveIMVIA,
    queries: Tensor,
    known: Answers,
    tables: list[Tensor],
    batch_size: int,
    decision_alone: bool,
) -> Tensor:
    """Return the (heads + 1, Q) filtered ranks of (Q, 3) rows (entity, relation, answer).

    The decision is last; with ``decision_alone`` it is the only row.
    """
    model.eval()
    found = []
    for batch in queries.split(batch_size):
        scores = model.scores(model.embed(batch[:, 0], batch[:, 1]), batch[:, 1], tables)
        if decision_alone:
            scores = scores[-1:]
        found.append([_ranks(score, batch, known) for score in scores])
    return torch.cat([torch.tensor(part) for part in found], dim=1)


def _ranks(scores: Tensor, batch: Tensor, known: Answers) -> list[int]:
    rows = batch.tolist()
    for i, (entity, relation, answer) in enumerate(rows):
        own = scores[i, answer].item()
        scores[i, known[entity, relation]] = -torch.inf
        scores[i, answer] = own
    order = torch.argsort(scores, dim=1, descending=True).cpu()
    return [(order[i] == answer).nonzero().item() + 1 for i, (_, _, answer) in enumerate(rows)]
