"""What several processes do in tests/test_distributed.py; called with a folder to write to."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from helpers import in_groups, ring_kg
from helpers import paper_settings as settings

import imvia_graph as ig
from imvia_graph import distributed
from imvia_graph.distributed import Shards
from imvia_graph.evaluation import rank
from imvia_graph.training import Trainer

#: Name -> settings of a training whose first steps are compared.
CASES = {
    "1vsall": {},
    "1vsall, binary": {"loss": "binary"},
    "kvsall": {"regime": "kvsall"},
    "kvsall, binary": {"regime": "kvsall", "loss": "binary"},
    "sampled": {"regime": "sampled"},
    "sampled, by degree, binary": {
        "regime": "sampled",
        "negative_sampling": "degree",
        "loss": "binary",
    },
    "sampled, in the batch": {"regime": "sampled", "negative_sampling": "in-batch"},
    "sampled, of each query": {"regime": "sampled", "negative_sampling": "query", "negatives": 5},
    "sampled, of each query, binary": {
        "regime": "sampled",
        "negative_sampling": "query",
        "loss": "binary",
        "decision": "trained",
        "complex_head": True,
    },
    "sampled, of each query, candidates of each relation": {
        "regime": "sampled",
        "negative_sampling": "query",
        "candidates": "relation",
        "lambda_relation": 0.5,
    },
    "sampled, a row a number": {"regime": "sampled", "entity_optimizer": "rowwise"},
    "sampled, all rows": {"regime": "sampled", "entity_optimizer": "dense"},
    "candidates of each relation": {"candidates": "relation"},
    "kvsall, binary, candidates of each relation": {
        "regime": "kvsall",
        "loss": "binary",
        "candidates": "relation",
        "complex_head": True,
    },
    "everything": {
        "batch_norm": True,
        "input_dropout": 0.2,
        "relation_dropout": 0.3,
        "lambda_alignment": 0.5,
        "lambda_information": 0.1,
        "gradient_clip": 0.5,
        "weight_decay": 0.01,
        "ema_decay": 0.9,
    },
    "structure alone": {"modalities": []},
    "with ComplEx": {"complex_head": True},
    "with ComplEx, sampled, candidates of each relation": {
        "complex_head": True,
        "regime": "sampled",
        "candidates": "relation",
    },
    "relations predicted": {"lambda_relation": 0.5},
    "relations predicted, sampled": {"lambda_relation": 0.5, "regime": "sampled"},
}
#: Those that three processes train, too.
UNEVEN = [
    "1vsall",
    "kvsall, binary",
    "sampled",
    "sampled, of each query, binary",
    "candidates of each relation",
    "everything",
    "with ComplEx, sampled, candidates of each relation",
    "relations predicted, sampled",
]
STEPS = 4


def trainer(kg, **changes):
    chosen = settings(dim=8, batch_size=17, epochs=5, **changes)
    torch.manual_seed(0)
    return Trainer(ig.IMVIA.from_kg(kg, chosen, Shards.of_world(kg.num_entities)), kg, chosen)


def losses(kg, **changes):
    """Losses of the first steps, and ranks after them."""
    training = trainer(kg, **changes)
    training.model.train()
    found = []
    while len(found) < STEPS:
        for batch in training.batches.epoch():
            told = training.train_step(batch)
            training.progress.step += 1
            found.append({name: value.item() for name, value in told.items()})
    ranking = rank(training.model, kg.train, training.known, 13)
    ranks = torch.stack([*ranking.tail.values(), *ranking.head.values()])
    return {"losses": found[:STEPS], "ranks": ranks.tolist()}


def bytes_held(kg):
    """Bytes of the entities' tables and of their optimizer's states, by regime."""
    held = {}
    for regime in ("1vsall", "sampled"):
        training = trainer(kg, regime=regime)
        training.model.train()
        training.train_step(next(iter(training.batches)))
        tables = {id(table.weight) for table in training.model.entity_tables}
        total = 0
        for optimizer in (training.optimizer, training.table_optimizer, training.row_optimizer):
            for weight, state in () if optimizer is None else optimizer.state.items():
                if id(weight) in tables:
                    total += sum(value.nbytes for value in state.values() if value.dim())
        held[regime] = [sum(t.weight.nbytes for t in training.model.entity_tables), total]
    return held


def main(folder):
    if distributed.is_launched():
        distributed.join(torch.device("cpu"))
    kg = ring_kg(14)
    shards = Shards.of_world(14)
    names = UNEVEN if shards.size == 3 else CASES
    found = {name: losses(kg, **CASES[name]) for name in names}
    found["bytes"] = bytes_held(kg)
    file = Path(folder, f"{shards.size}-{shards.rank}.json")
    file.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # imports much of torch, once for all processes
    in_groups((1, 2, 3), partial(main, sys.argv[1]))
