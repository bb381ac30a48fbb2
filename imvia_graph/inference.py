"""Predicting the missing end of a triple."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imvia_graph.errors import DataError, IMVIAError
from imvia_graph.evaluation import score_all
from imvia_graph.kg import MultiViewKG
from imvia_graph.model import DECISION, IMVIA


class Prediction(NamedTuple):
    """An answer to a query.

    Attributes
    ----------
    entity : str
        Its label.
    name : str
        Its display name.
    score : float
        The decision's score; higher is better, comparable within a query only.
    modalities : dict of str to float
        The score of each of the model's heads.
    known : bool
        Whether the triple is in the graph (train, valid or test).
    """

    entity: str
    name: str
    score: float
    modalities: dict[str, float]
    known: bool


@torch.no_grad()
def predict(
    model: IMVIA,
    kg: MultiViewKG,
    *,
    relation: str,
    head: str | None = None,
    tail: str | None = None,
    k: int = 10,
    include_known: bool = False,
) -> list[Prediction]:
    """The best answers to (head, relation, ?) or (?, relation, tail).

    Parameters
    ----------
    relation : str
        Label or display name.
    head, tail : str
        One of the two: the end that is given.
    k : int
        How many answers.
    include_known : bool
        Whether triples of the graph are among the answers.

    Returns
    -------
    list of Prediction
        Best first.

    Raises
    ------
    UnknownLabelError
        A name that the graph does not know, with the nearest known ones.
    """
    if (head is None) == (tail is None):
        raise DataError("predict: give either head or tail, the end that is known.")
    if k < 1:
        raise DataError(f"predict: expected k of at least 1, received {k}.")
    relation_id = kg.id_of(relation, "relation")
    if head is not None:
        entity_id = kg.id_of(head)
    else:
        assert tail is not None
        entity_id, relation_id = kg.id_of(tail), relation_id + kg.num_relations
    entity_ids = torch.tensor([entity_id], device=model.device)
    relation_ids = torch.tensor([relation_id], device=model.device)
    scores = score_queries(model, entity_ids, relation_ids)
    _, known_ids = kg.answers().pairs(entity_ids.cpu(), relation_ids.cpu())
    known = torch.zeros(kg.num_entities, dtype=torch.bool)
    known[known_ids] = True

    decision = scores[DECISION][0].cpu()
    if decision.isnan().any():
        raise IMVIAError("predict: the model's scores are not numbers; train it again.")
    ranked = decision.argsort(descending=True, stable=True)
    if not include_known:
        ranked = ranked[~known[ranked]]
    chosen = ranked[:k].tolist()
    by_head = {name: scores[name][0, chosen].tolist() for name in model.heads}
    return [
        Prediction(
            kg.entities[i],
            kg.entity_names[i],
            decision[i].item(),
            {name: values[place] for name, values in by_head.items()},
            bool(known[i]),
        )
        for place, i in enumerate(chosen)
    ]


@torch.no_grad()
def score_queries(model: IMVIA, entity: Tensor, relation: Tensor) -> dict[str, Tensor]:
    """Scores (B, N) of a few queries against all entities, by head and ``decision``."""
    training = model.training
    model.eval()
    try:
        out: dict[str, Tensor] = {}
        for positions, scores in score_all(model, entity, relation, batch_size=max(len(entity), 1)):
            for name, value in scores.items():
                if name not in out:
                    out[name] = value.new_empty(len(entity), value.shape[1])
                out[name][positions] = value
    finally:
        model.train(training)
    return out
