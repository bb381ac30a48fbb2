"""ComplEx with N3 (Lacroix, Usunier and Obozinski 2018, arXiv:1806.07297), as strong as it gets.

The baseline of the accuracy table: softmax over all entities, reciprocal relations, Adagrad, and
the cubes of the moduli of what is multiplied in a score as a penalty. It is trained by the
library's batches and loss and ranked by its ranking; nothing of a picture or a text takes part.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import imvia_graph as ig
from imvia_graph.evaluation import Ranking, rank
from imvia_graph.losses import factored_completion
from imvia_graph.training import Batches, training_dtype

#: The settings of `train` and where a search starts, from the authors' and the field's practice.
DEFAULTS: dict[str, Any] = {
    "rank": 200,
    "learning_rate": 0.1,
    "batch_size": 1000,
    "weight": 0.05,
    "epochs": 25,
}


class ComplEx(nn.Module):
    r"""Re(<h, r, conj(t)>), asked as the library asks its own model, so that `rank` ranks it."""

    heads = ("structure",)
    settings = types.SimpleNamespace(candidates="shared")
    device = torch.device("cpu")

    def __init__(self, num_entities: int, num_relations: int, rank: int) -> None:
        super().__init__()
        self.num_entities, self.num_relations = num_entities, num_relations
        #: Real parts, then imaginary ones.
        self.entity = nn.Embedding(num_entities, 2 * rank)
        self.relation = nn.Embedding(2 * num_relations, 2 * rank)
        for table in (self.entity, self.relation):
            nn.init.normal_(table.weight, std=1e-3)

    def queries(self, entity: Tensor, relation: Tensor) -> dict[str, Tensor]:
        """(B, 2 rank): h r, whose products with the tails are the scores."""
        h, h_imaginary = self.entity(entity).chunk(2, dim=1)
        r, r_imaginary = self.relation(relation).chunk(2, dim=1)
        real = h * r - h_imaginary * r_imaginary
        imaginary = h * r_imaginary + h_imaginary * r
        return {"structure": torch.cat([real, imaginary], dim=1)}

    def candidates(self) -> dict[str, Tensor]:
        """(N, 2 rank)."""
        return {"structure": self.entity.weight}

    def scores(self, queries: Any, candidates: Any, relation: Tensor) -> dict[str, Tensor]:
        """(B, N), of the one head and of the decision, which is the same."""
        score = queries["structure"] @ candidates["structure"].T
        return {"structure": score, "decision": score}

    def decision_weights(self, relation: Tensor) -> Tensor:
        """(B, 1): one head decides alone."""
        return torch.ones(len(relation), 1)

    def penalty(self, *factors: Tensor) -> Tensor:
        """N3: the mean over the triples of the cubes of the moduli."""
        cubes = 0.0
        for factor in factors:
            real, imaginary = factor.chunk(2, dim=1)
            cubes = cubes + (real**2 + imaginary**2).clamp(min=1e-12).pow(1.5).sum(1).mean()
        return torch.as_tensor(cubes)


def train(
    kg: ig.MultiViewKG,
    seed: int,
    on_epoch: Callable[[int, dict[str, float]], bool | None],
    **settings: Any,
) -> ComplEx:
    """Train on ``kg.train``; ``on_epoch(epoch, validation metrics)`` may end it by True."""
    chosen = {**DEFAULTS, **settings}
    torch.manual_seed(seed)
    model = ComplEx(kg.num_entities, kg.num_relations, chosen["rank"])
    optimizer = torch.optim.Adagrad(model.parameters(), lr=chosen["learning_rate"])
    basis = ig.Settings.create({"batch_size": chosen["batch_size"], "seed": seed})
    batches = Batches(kg, basis, model.device)
    dtype = training_dtype(basis, model.device)
    for epoch in range(1, chosen["epochs"] + 1):
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                query = model.queries(batch.entity, batch.relation)["structure"]
                loss = factored_completion([query], [model.entity.weight], batch.positives)
            head, answer = model.entity(batch.entity), model.entity(batch.positives.col)
            loss = loss + chosen["weight"] * model.penalty(
                head, model.relation(batch.relation), answer
            )
            loss.backward()
            optimizer.step()
        if on_epoch(epoch, metrics(model, kg, "valid") if len(kg.valid) else {}):
            break
    return model


def metrics(model: ComplEx, kg: ig.MultiViewKG, split: Any) -> dict[str, float]:
    """Filtered metrics of both sides."""
    ranking: Ranking = rank(model, kg.triples(split), kg.answers(), heads=())  # type: ignore[arg-type]
    found: dict[str, float] = ranking.metrics()["both"]
    return found
