"""The tuned baseline ComplEx-N3 (Lacroix, Usunier and Obozinski 2018, arXiv:1806.07297).

The model has softmax over all entities, reciprocal relations, Adagrad, and as penalty the cubed
moduli of the numbers that are multiplied in a score. It uses the batches, the loss and the ranking
of the library, and neither pictures nor texts.

    python benchmarks/accuracy/complex_n3.py tune MKG-Y --trials 12

searches weight, learning rate and batch size by validation MRR and writes the best settings to
settings/complex-n3/mkg-y.yaml. The study is a file in --studies; the same command resumes it.
`run.py row MKG-Y complex-n3` produces a row with these settings.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import protocol
import torch
import yaml
from features import DATA, held_out, load
from protocol import Trained, epoch_line
from torch import Tensor, nn

import imvia_graph as ig
from imvia_graph.batches import Batch, Batches
from imvia_graph.distributed import Shards
from imvia_graph.io import with_validation
from imvia_graph.losses import factored_completion
from imvia_graph.training import training_dtype

HERE = Path(__file__).parent
#: Default settings and the first trial of a search, as customary.
DEFAULTS: dict[str, Any] = {
    "rank": 200,
    "learning_rate": 0.1,
    "batch_size": 1000,
    "weight": 0.05,
    "epochs": 60,
    "patience": 5,
}


class ComplEx(nn.Module):
    r"""Re(<h, r, conj(t)>), with the interface that the library's `rank` expects of a model."""

    heads = ("structure",)
    device = torch.device("cpu")

    def __init__(self, num_entities: int, num_relations: int, rank: int) -> None:
        super().__init__()
        self.num_entities, self.num_relations = num_entities, num_relations
        self.settings = types.SimpleNamespace(candidates="shared", dim=2 * rank)
        self.widths = {"structure": 2 * rank}
        self.shards = Shards(num_entities)
        #: Real parts, then imaginary parts.
        self.entity = nn.Embedding(num_entities, 2 * rank)
        self.relation = nn.Embedding(2 * num_relations, 2 * rank)
        for table in (self.entity, self.relation):
            nn.init.normal_(table.weight, std=1e-3)

    def queries(self, entity: Tensor, relation: Tensor) -> dict[str, Tensor]:
        """Return the (B, 2 rank) products h r, whose dot products with the tails are the scores."""
        h, h_imaginary = self.entity(entity).chunk(2, dim=1)
        r, r_imaginary = self.relation(relation).chunk(2, dim=1)
        real = h * r - h_imaginary * r_imaginary
        imaginary = h * r_imaginary + h_imaginary * r
        return {"structure": torch.cat([real, imaginary], dim=1)}

    queries_alike = queries

    def candidates(
        self, relation: Tensor | None = None, entity: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return (N, 2 rank) embeddings of all or some entities, whatever the relation."""
        return {"structure": self.entity.weight if entity is None else self.entity(entity)}

    def scores(self, queries: Any, candidates: Any, relation: Tensor) -> dict[str, Tensor]:
        """Return (B, N) scores of the only head and of the decision, which is equal to it."""
        score = queries["structure"] @ candidates["structure"].T
        return {"structure": score, "decision": score}

    def decision_weights(self, relation: Tensor) -> Tensor:
        """Return (B, 1) weights of 1, since there is one head."""
        return torch.ones(len(relation), 1)

    def penalty(self, *factors: Tensor) -> Tensor:
        """Return N3, the mean over the triples of the cubed moduli."""
        cubes = 0.0
        for factor in factors:
            real, imaginary = factor.chunk(2, dim=1)
            cubes = cubes + (real**2 + imaginary**2).clamp(min=1e-12).pow(1.5).sum(1).mean()
        return torch.as_tensor(cubes)


def method(
    settings: dict[str, Any],
    seed: int,
    log: Callable[[str], None] = lambda line: None,
    on_validation: Callable[[int, float], None] = lambda epoch, mrr: None,
) -> protocol.Method:
    """Return a method that trains ComplEx with `DEFAULTS`, overridden by ``settings``.

    ``on_validation(epoch, MRR)`` is called after each validation and may end training by raising.
    """
    chosen = {**DEFAULTS, **settings}
    if unknown := chosen.keys() - DEFAULTS.keys():
        raise ig.SettingsError(
            f"ComplEx has no setting {', '.join(sorted(unknown))}; it has {', '.join(DEFAULTS)}."
        )

    def train(kg: ig.MultiViewKG, epochs: int | None) -> Trained:
        torch.manual_seed(seed)
        model = ComplEx(kg.num_entities, kg.num_relations, chosen["rank"])
        optimizer = torch.optim.Adagrad(model.parameters(), lr=chosen["learning_rate"])
        basis = ig.Settings.create({"batch_size": chosen["batch_size"], "seed": seed})
        batches = Batches(kg, basis, model.device)
        dtype = training_dtype(basis, model.device)
        known = kg.answers()
        curve: list[float | None] = []
        best, best_epoch, state = -1.0, 0, None
        for epoch in range(1, (epochs or chosen["epochs"]) + 1):
            losses = [step(model, optimizer, batch, chosen["weight"], dtype) for batch in batches]
            mrr = protocol.metrics(model, kg.valid, known)["mrr"] if len(kg.valid) else None
            curve.append(mrr)
            log(epoch_line(epoch, float(torch.stack(losses).mean()), mrr))
            if mrr is None:
                best_epoch = epoch
                continue
            if mrr > best:
                best, best_epoch = mrr, epoch
                state = {name: value.clone() for name, value in model.state_dict().items()}
            on_validation(epoch, mrr)
            if epoch - best_epoch >= chosen["patience"]:
                break
        if state is not None:
            model.load_state_dict(state)
        return Trained(model, curve, best_epoch)

    return train


def step(model: ComplEx, optimizer: Any, batch: Batch, weight: float, dtype: torch.dtype) -> Tensor:
    """Run one training step and return its detached loss."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        value = loss(model, batch, weight)
    value.backward()
    optimizer.step()
    return value.detach()


def loss(model: ComplEx, batch: Batch, weight: float) -> Tensor:
    """Return the mean over a batch's triples of the softmax loss plus ``weight`` times N3."""
    row, answer, *_ = batch.positives  # a row may stand for several triples
    query = model.queries(batch.entity, batch.relation)["structure"]
    completion = factored_completion([query], [model.entity.weight], batch.positives)
    head, relation = model.entity(batch.entity[row]), model.relation(batch.relation[row])
    return completion + weight * model.penalty(head, relation, model.entity(answer))


# -- tuning ---------------------------------------------------------------------------------------


def search(kg: ig.MultiViewKG, trials: int, storage: str | None = None, **fixed: Any) -> Any:
    """Search the settings by validation MRR, without the test triples; return the Optuna study."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    blind = protocol.set_aside(kg, "test")

    def objective(trial: Any) -> float:
        settings = {
            "weight": trial.suggest_float("weight", 2e-3, 0.5, log=True),
            "learning_rate": trial.suggest_float("learning_rate", 0.02, 0.5, log=True),
            "batch_size": trial.suggest_categorical("batch_size", [250, 500, 1000]),
        }

        def report(epoch: int, mrr: float) -> None:
            trial.report(mrr, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        trained = method({**fixed, **settings}, 0, on_validation=report)(blind, None)
        return max(mrr for mrr in trained.curve if mrr is not None)

    study = optuna.create_study(
        study_name="complex-n3",
        storage=storage,
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=5),
    )
    ended = sum(trial.state.is_finished() for trial in study.trials)
    # A resumed study must not draw the same settings again.
    study.sampler = optuna.samplers.TPESampler(seed=ended, n_startup_trials=5)
    if not study.trials:
        study.enqueue_trial({k: DEFAULTS[k] for k in ("weight", "learning_rate", "batch_size")})

    def tell(study: Any, trial: Any) -> None:
        result = f"MRR {100 * trial.value:.2f} %" if trial.value else trial.state.name.lower()
        click.echo(f"trial {trial.number}: {result} with {trial.params}")

    study.optimize(objective, n_trials=max(trials - ended, 0), callbacks=[tell])
    return study


@click.group()
def main() -> None:
    """Tune the baseline ComplEx-N3."""


@main.command(context_settings={"show_default": True})
@click.argument("dataset")
@click.option("--trials", default=12, type=click.IntRange(min=1), help="Total number of trials.")
@click.option("--epochs", default=DEFAULTS["epochs"], help="Most epochs of a trial.")
@click.option("--data", type=click.Path(path_type=Path), default=DATA)
@click.option("--studies", type=click.Path(path_type=Path), default=DATA / "studies")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "settings" / "complex-n3")
def tune(dataset: str, trials: int, epochs: int, data: Path, studies: Path, out: Path) -> None:
    """Search the settings for DATASET by validation MRR and write the best ones."""
    torch.set_num_threads(1)
    kg = with_validation(load(dataset, data), "held-out" if held_out(dataset) else "published")
    studies.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{(studies / f'complex-n3-{dataset}.db').resolve()}"
    study = search(kg, trials, storage, epochs=epochs)
    best = {"rank": DEFAULTS["rank"], **study.best_params, "epochs": epochs}
    best["patience"] = DEFAULTS["patience"]
    about = f"{dataset}: validation MRR {100 * study.best_value:.2f} %, the best of {trials} trials"
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{dataset.lower()}.yaml"
    file.write_text(f"# {about}\n{yaml.safe_dump(best, sort_keys=False)}", encoding="utf-8")
    click.echo(f"{file} ({about})")


if __name__ == "__main__":
    main()
