"""`fit`, `load` and `Run`: a trained model with its graph, settings and run folder."""

from __future__ import annotations

import copy
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imvia_graph import _files, checkpoint, distributed, inference
from imvia_graph._guards import MEMORY_ERRORS, is_out_of_memory
from imvia_graph.distributed import Shards
from imvia_graph.errors import CheckpointError, DataError, OutOfMemoryError, SettingsError
from imvia_graph.evaluation import Ranking, evaluating, rank_split
from imvia_graph.io import load_kg, with_validation
from imvia_graph.kg import MultiViewKG, Split
from imvia_graph.model import COMPLEX, IMVIA
from imvia_graph.ops import refuse_backend
from imvia_graph.settings import Settings
from imvia_graph.training import (
    Callback,
    Progress,
    Trainer,
    checked_callbacks,
    resolve_device,
    training_dtype,
)

logger = logging.getLogger(__name__)


class Run:
    """A trained model with its graph, settings, progress and history.

    Attributes
    ----------
    model : IMVIA
        At its best epoch; if training was stopped, the best one until then.
    kg : MultiViewKG
        The graph that it was trained on, splits included.
    settings : Settings
        What it was trained with.
    progress : Progress
        Epochs trained, the best epoch and its validation MRR, seconds.
    folder : Path or None
        The run folder, if there is one.
    history : list of dict
        Losses and validation metrics, epoch by epoch.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> run = ig.fit("countries", epochs=1, dim=16)
    >>> run.predict(head="France", relation="borders", k=3)[0].heads.keys()
    dict_keys(['structure', 'image', 'text', 'joint', 'complex'])
    """

    def __init__(
        self,
        model: IMVIA,
        kg: MultiViewKG,
        settings: Settings,
        progress: Progress,
        folder: Path | None = None,
        history: list[dict[str, Any]] | None = None,
    ) -> None:
        self.model, self.kg, self.settings = model, kg, settings
        self.progress, self.folder = progress, folder
        self._history = [] if history is None else history

    @property
    def history(self) -> list[dict[str, Any]]:
        """A record per epoch: ``epoch``, ``loss``, its terms, ``seconds``, ``valid`` metrics."""
        return self._history if self.folder is None else checkpoint.history_of(self.folder)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the model, graph, settings and history to a run folder, which `load` reads.

        A run that was trained with ``out`` has a folder already. A folder written here cannot be
        resumed. With several processes, all call this.

        Parameters
        ----------
        folder : path
            A folder that does not exist or is empty.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        CheckpointError
            The folder is not empty; nothing in it is changed.

        Examples
        --------
        >>> import imvia_graph as ig, pathlib, tempfile
        >>> run = ig.fit("countries", epochs=1, dim=8)
        >>> folder = run.save(pathlib.Path(tempfile.mkdtemp()) / "run")
        >>> ig.load(folder).evaluate() == run.evaluate()
        True
        """
        path, history = Path(folder), self.history
        checkpoint.save_run(path, self.kg, self.settings, self.model, self.progress, history)
        self.folder = path if self.folder is None else self.folder
        return path

    def evaluate(self, split: Split = "test", **options: Any) -> dict[str, Any]:
        """Return the filtered ranking metrics of a split; see `imvia_graph.evaluate`.

        ``batch_size`` and ``seed`` default to those of the run's settings. `rank` returns the rank
        of each query.
        """
        return self.rank(split, **options).metrics(self.kg.relations)

    def rank(self, split: Split = "test", **options: Any) -> Ranking:
        """Return the rank of each query of a split, with the options of `evaluate`.

        Examples
        --------
        Whether two runs differ by more than chance, over the same queries:

        >>> import imvia_graph as ig
        >>> from scipy.stats import wilcoxon
        >>> runs = [ig.fit("countries", epochs=1, dim=8, seed=seed) for seed in (0, 1)]
        >>> ranks = [run.rank("test").frame(run.kg)["rank"].to_numpy() for run in runs]
        >>> 0 <= float(wilcoxon(1 / ranks[0], 1 / ranks[1]).pvalue) <= 1
        True
        """
        options.setdefault("batch_size", self.settings.ranking_batch_size)
        options.setdefault("seed", self.settings.seed)
        return rank_split(self.model, self.kg, split, **options)

    def predict(
        self,
        *,
        relation: str,
        head: str | None = None,
        tail: str | None = None,
        k: int = 10,
        include_known: bool = False,
        include_self: bool | None = None,
    ) -> list[inference.Prediction]:
        """Return the best answers to a query; see `imvia_graph.inference.predict`.

        The model may have changed since the last call, so each call computes the candidate tables
        again. For many queries, ``ig.Predictor(run.model, run.kg)`` keeps the tables, and
        `Predictor.answers` takes a batch of queries.
        """
        return inference.predict(
            self.model,
            self.kg,
            relation=relation,
            head=head,
            tail=tail,
            k=k,
            include_known=include_known,
            include_self=include_self,
        )

    @torch.no_grad()
    def score(self, triples: Sequence[Sequence[str]], batch_size: int = 1024) -> Tensor:
        """Return the scores of triples as answers to (head, relation, ?).

        Parameters
        ----------
        triples : sequence of (head, relation, tail)
            Labels, or display names that only one entity has.
        batch_size : int, optional
            Triples scored at a time, 1 or more. Default: ``1024``.

        Returns
        -------
        Tensor
            (n,) on the CPU. Scores of the same query rank its answers; those of different queries
            are not comparable.

        Raises
        ------
        UnknownLabelError
            The graph has no entity or relation of that label or name.
        DataError
            A row is not a triple, or ``batch_size`` is below 1.

        Examples
        --------
        >>> import imvia_graph as ig
        >>> run = ig.fit("countries", epochs=1, dim=16)
        >>> run.score([("France", "borders", "Spain"), ("France", "borders", "Peru")]).shape
        torch.Size([2])
        """
        if batch_size < 1:
            raise DataError(f"score: expected a batch_size of 1 or more; received {batch_size}.")
        numbers = self.kg.ids_of(triples).to(self.model.device)
        with evaluating(self.model) as model:
            parts = [model(*part.unbind(1)).cpu() for part in numbers.split(batch_size)]
        return torch.cat(parts)

    def explain(self, head: str, relation: str, tail: str) -> inference.Explanation:
        """Explain the scores of a triple; see `imvia_graph.inference.explain`."""
        return inference.explain(self.model, self.kg, head=head, relation=relation, tail=tail)

    @property
    def encoder(self) -> EntityEncoder:
        """The model's entity encoder, which computes features for other models."""
        return EntityEncoder(self.model)

    @torch.no_grad()
    def entity_embeddings(self) -> dict[str, Tensor]:
        """Return each head's (num_entities, dim) embeddings, relation-free, on the CPU.

        Rows are in the order of ``kg.entities``. The head ``complex`` has shape (num_entities,
        2 complex_rank).

        Raises
        ------
        IMVIAError
            The model was trained in several processes, and each has a part of the entities.
        """
        self.model.check_whole("embeddings of all entities are made")
        with evaluating(self.model) as model:
            tables = model.candidates()
        return {head: table.detach().cpu().clone() for head, table in tables.items()}

    def relation_embeddings(self) -> dict[str, Tensor]:
        """Return each head's (2 num_relations, relation_dim) embeddings on the CPU.

        Rows are in the order of ``kg.relations``, then their inverses. With ``relation_residual``,
        dim more columns hold the entries of the relation's block-diagonal matrix. The head
        ``complex`` has shape (2 num_relations, 2 complex_rank).
        """
        model = self.model
        found = {}
        for number, head in enumerate(model.tucker_heads):
            tables = [model.relation[number], *list(model.relation_residual)[number : number + 1]]
            weights = [table.get_parameter("weight").detach().cpu() for table in tables]
            found[head] = torch.cat(weights, dim=1)
        if model.complex_relation is not None:
            found[COMPLEX] = model.complex_relation.weight.detach().cpu().clone()
        return found

    def __repr__(self) -> str:
        where = f" in {self.folder}" if self.folder else ""
        trained = f"{self.progress.epoch} epochs, heads {self.model.heads}"
        return f"<Run of {self.kg.title}{where}: {trained}>"


class EntityEncoder(nn.Module):
    """The entity encoder of a trained IMVIA as a layer: ids in, embeddings out.

    It shares parameters and views with the model: training, moving or converting one also trains,
    moves or converts the other. ``copy.deepcopy`` makes an independent copy,
    ``requires_grad_(False)`` freezes it. The decoders and the decision, which only score triples,
    are not part of it.

    Parameters
    ----------
    model : IMVIA

    Attributes
    ----------
    heads : list of str
        ``structure``, each modality and, where the model has them, ``joint`` and ``complex``.
    num_entities, out_feats : int
        Size of each head's embeddings of all entities; the width of ``complex`` is in ``widths``.
    widths : dict of str to int
        The width of each head's embeddings.

    Examples
    --------
    >>> import torch, imvia_graph as ig
    >>> run = ig.fit("countries", epochs=1, dim=16)
    >>> encoder = run.encoder.requires_grad_(False)
    >>> france, borders = run.kg.id_of("France"), run.kg.id_of("borders", "relation")
    >>> encoder(torch.tensor([france]))["joint"].shape
    torch.Size([1, 16])
    >>> encoder(torch.tensor([france]), torch.tensor([borders]))["image"].shape  # under a relation
    torch.Size([1, 16])
    >>> encoder()["text"].shape  # all entities
    torch.Size([1475, 16])
    """

    def __init__(self, model: IMVIA) -> None:
        super().__init__()
        model.check_whole("entities are embedded for other models")
        self.heads = list(model.heads)
        self.num_entities, self.out_feats = model.num_entities, model.settings.dim
        self.widths = dict(model.widths)
        # Only the submodules that embed entities: unused parameters are an error in
        # DistributedDataParallel and would enlarge the state_dict.
        embedding_part = copy.copy(model)
        names = ("entity", "residual", "encoder", "joint", "complex_entity")
        modules = {name: getattr(model, name) for name in names}
        embedding_part._modules = {**modules, "relation": nn.ModuleList(model.relation[:1])}
        self.model = embedding_part
        #: The whole model, in a list so that it is not registered as a submodule; empty in a copy,
        #: which shares nothing with the model.
        self._whole = [model]

    def _apply(self, fn: Any, recurse: bool = True) -> EntityEncoder:
        """Move or convert the whole model, so that all its submodules stay on one device."""
        for model in self._whole:
            model._apply(fn, recurse)
            return self
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_whole": []}

    def forward(
        self, entity: Tensor | None = None, relation: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Embed entities, reading only their own views.

        Parameters
        ----------
        entity : Tensor, optional
            (B,) int64 ids of ``run.kg``. Default: all entities.
        relation : Tensor, optional
            (B,) int64 ids, or a scalar for all entities; the inverse of relation r has the id r +
            num_relations. Default: ``None``, the relation-free gate.

        Returns
        -------
        dict of str to Tensor
            (B, ``widths[head]``) for each head: out_feats or, for ``complex``, 2 complex_rank.

        Raises
        ------
        IMVIAError
            An argument is not a tensor of ids or, on a CPU, ids are out of range.
        """
        if entity is not None:
            self.model.check_ids(entity=entity)
        if relation is not None:
            one = isinstance(relation, Tensor) and relation.dim() == 0
            self.model.check_ids(relation=relation[None] if one else relation)
        return self.model.embed(entity, relation).heads

    def extra_repr(self) -> str:
        """Return what ``print`` shows of the module."""
        return f"heads={self.heads}, out_feats={self.out_feats}"


def fit(
    kg: Any = None,
    *,
    out: str | os.PathLike[str] | None = None,
    settings: Settings | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    resume: bool = False,
    callbacks: Callback | Sequence[Callback] | None = None,
    **overrides: Any,
) -> Run:
    """Train IMVIA on a graph.

    Parameters
    ----------
    kg : MultiViewKG, name or folder
        Anything that `load_kg` accepts; left out with ``resume``. With ``validation="auto"``, a
        validation set that `load_kg` took as published, or held out, stays; else the setting
        ``validation`` chooses it.
    out : path, optional
        The run folder to write. Default: none is written.
    settings : Settings, mapping, file or name, optional
        A YAML or TOML file, or the name of settings that come with the package: ``"paper"`` for
        those of the paper. Default: the default settings.
    resume : bool
        Whether to resume the run in ``out`` with its graph and its settings. Of these, only
        `RESUMABLE` may be changed: ``epochs``, ``patience``, ``device``, ``validate_every``,
        ``checkpoint_every``, ``non_finite``, ``disk_full``, ``views_on``, ``cuda_graph``,
        ``backend``. ``epochs``, ``lambda_regularization``, ``complex_head`` and ``precision`` keep
        the run's values if they are left open. A run that has ended is returned unchanged, unless
        ``epochs`` or ``patience`` lets it go on. ``epochs`` below the number already trained is
        raised to that number.
    callbacks : Callback or sequence of Callback, optional
        See `imvia_graph.training.Callback`. Default: ``None``, none.
    **overrides
        Settings by name, over ``settings``.

    Returns
    -------
    Run
        With the model of the best epoch by validation MRR, or of the last epoch if there are no
        validation triples. If `Trainer.stop` ended training: the best model until then, or the
        current one if nothing was validated yet.

    Raises
    ------
    DataError, SettingsError, CheckpointError
        The graph, the settings or the run folder cannot be used; a file of features was written
        into during training.
    TrainingError
        A loss or a gradient is not finite (see the setting ``non_finite``).
    OutOfMemoryError
        The model, or a single query, does not fit into memory.
    StorageError
        A checkpoint does not fit on the disk (see the setting ``disk_full``), or the run folder was
        moved or deleted during training.
    KeyboardInterrupt
        Ctrl-C. With ``out``, SIGINT and SIGTERM let the current step finish and save a checkpoint
        first, from which ``resume`` continues; a second signal does not wait.

    Notes
    -----
    In processes started by torchrun, all call this function and train one model together; see
    `imvia_graph.distributed`. The `Run` of each process holds the rows of its own entities, and all
    must call `Run.evaluate`; `load` reads the whole model into one process.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> run = ig.fit("countries", epochs=2, dim=16, seed=1)
    >>> 0 < run.evaluate("test")["both"]["mrr"] < 1
    True
    """
    callbacks = checked_callbacks(callbacks)
    folder = None if out is None else Path(out)
    if resume:
        if folder is None:
            raise CheckpointError("resume: pass the run folder as out.")
        if kg is not None:
            raise CheckpointError(f"resume uses the graph in {folder}; pass no other graph.")
        changes = Settings.of(settings).model_dump(exclude_unset=True)
        return _resume(folder, callbacks, {**changes, **overrides})
    if kg is None:
        raise DataError("fit: pass a graph: a MultiViewKG, a data set's name or a folder.")
    chosen = Settings.of(settings).replace(**overrides)
    device = _device(chosen)
    graph = graph_for(kg, chosen)
    _check_modalities(graph, chosen)
    torch.manual_seed(chosen.seed)
    shards = Shards.of_world(graph.num_entities)
    model = _made(graph, chosen, shards, device)
    records = _Records()
    trainer = Trainer(model, graph, chosen, [*callbacks, records])
    if folder is None:
        progress = trainer.fit()
    else:
        with _owned(folder, shards, new=True):
            shards.first_does(lambda: checkpoint.start_run(folder, graph, trainer.settings))
            progress = _fit_in(folder, trainer)
    return Run(_best_of(trainer), graph, trainer.settings, progress, folder, records.found)


def graph_for(kg: Any, settings: Settings) -> MultiViewKG:
    """Return the graph of anything that `load_kg` accepts, with the settings' validation set."""
    graph = kg if isinstance(kg, MultiViewKG) else load_kg(kg, None, settings.split_seed)
    return with_validation(graph, settings.validation, settings.split_seed, settings.hold_out_by)


def _best_of(trainer: Trainer) -> IMVIA:
    """Return the trained model as `load` would read it, also after training was stopped."""
    if not trainer.progress.ended:
        if trainer.best_state is not None:
            trainer.model.load_state_dict(trainer.best_state)
        else:
            trainer.keep_average()
    return trainer.model.eval()


def _made(kg: MultiViewKG, settings: Settings, shards: Shards, device: torch.device) -> IMVIA:
    """Create a model on a device.

    Raises
    ------
    OutOfMemoryError
        The model does not fit into memory.
    """
    try:
        return IMVIA.from_kg(kg, settings, shards).to(device)
    except MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"Out of memory while making the model of {kg.num_entities:,} entities with"
            f" dim={settings.dim}. Use a smaller dim, or fewer heads."
        ) from error


class _Records(Callback):
    """Keeps the record of each epoch."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self.found.append(record)


def _device(settings: Settings) -> torch.device:
    """Return this process's device; under torchrun, join the process group."""
    if torch.get_default_dtype() != torch.float32:
        raise SettingsError(
            f"torch's default dtype is {torch.get_default_dtype()}, which the model would get; its"
            " parameters are trained in float32 (the setting precision is of products). Call"
            " torch.set_default_dtype(torch.float32) first."
        )
    device = resolve_device(distributed.local_device(settings.device))
    refuse_backend(settings.backend, device)
    if distributed.is_launched():
        distributed.join(device)
    return device


@contextmanager
def _owned(folder: Path, shards: Shards, new: bool = False) -> Iterator[None]:
    """Lock a run folder, which the first process does for all."""
    with ExitStack() as stack:

        def take() -> None:
            if new:
                checkpoint.check_free(folder)
            stack.enter_context(checkpoint.locked(folder))

        shards.first_does(take)
        yield


def _fit_in(folder: Path, trainer: Trainer) -> Progress:
    """Train with a run folder; a signal ends training after the current step."""
    trainer.callbacks.insert(0, checkpoint.RunFolder(folder, trainer.shards))
    with _stopping_on_signals(trainer):
        progress = trainer.fit()
    if not progress.ended and not trainer.is_asked_to_stop:  # another process was
        raise KeyboardInterrupt
    return progress


@contextmanager
def _stopping_on_signals(trainer: Trainer) -> Iterator[None]:
    """Make SIGINT and SIGTERM stop a trainer first, and then have their usual effect.

    A second signal has its effect at once, unless it is the first one again: torchrun forwards to
    each process the SIGINT that Ctrl-C sent to all of them. Outside the main thread signals are not
    handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    received: list[int] = []
    first = 0.0

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: Any) -> None:
        nonlocal first
        if received:
            forwarded = number == received[0] and time.monotonic() - first < _SAME_SIGNAL
            if forwarded and distributed.is_launched():
                return
            put_back()
            signal.raise_signal(number)
        first = time.monotonic()
        received.append(number)
        trainer.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler is not None and handler is not signal.SIG_IGN:  # None: not set from Python
            before[number] = handler
            signal.signal(number, stop)
    try:
        yield
    finally:
        put_back()
        if received:
            signal.raise_signal(received[0])


#: Seconds within which one of several processes takes a repeated signal as the first one again.
_SAME_SIGNAL = 1.0


#: Settings that may be changed when a run is resumed.
RESUMABLE = (
    "epochs",
    "patience",
    "device",
    "validate_every",
    "checkpoint_every",
    "non_finite",
    "disk_full",
    "views_on",
    "cuda_graph",
    "backend",
)


#: Settings that training chooses if they are left open, by the values that leave them open.
_LEFT_OPEN = {
    "epochs": None,
    "lambda_regularization": None,
    "complex_head": None,
    "precision": "auto",
}


def _resume(folder: Path, callbacks: Sequence[Callback], overrides: dict[str, Any]) -> Run:
    """Resume the run in a folder, with some of its settings changed; see `fit`."""
    graph, settings = checkpoint.open_run(folder)
    overrides = {
        key: value
        for key, value in overrides.items()
        if key not in _LEFT_OPEN or value != _LEFT_OPEN[key]
    }
    changed = settings.replace(**overrides)
    for key in overrides:
        if key not in RESUMABLE and getattr(changed, key) != getattr(settings, key):
            raise SettingsError(
                f"Setting {key}: the run in {folder} has {getattr(settings, key)!r}; a resumed run"
                f" keeps its settings except {', '.join(RESUMABLE)}. Start another run instead."
            )
    device = _device(changed)
    torch.manual_seed(changed.seed)
    shards = Shards.of_world(graph.num_entities)
    model = checkpoint.fitting_model(folder, graph, changed, shards=shards).to(device)
    trainer = Trainer(model, graph, changed, callbacks)
    # Older versions did not record the precision that "auto" chose.
    changed = changed.replace(precision=trainer.settings.precision)
    if shards.is_first:
        _warn_of_slow_precision(trainer)
    with _owned(folder, shards):
        # A run that was stopped before its first checkpoint starts again with the same seed.
        checkpoint.load_last(folder, trainer)
        trained = trainer.progress.epoch
        if trainer.epochs < trained:
            if shards.is_first:
                logger.warning(
                    "Setting epochs: the run in %s is trained for %d epochs already, more than"
                    " epochs=%d; it is not trained further.",
                    folder,
                    trained,
                    trainer.epochs,
                )
            changed = changed.replace(epochs=trained)
            trainer.settings = trainer.settings.replace(epochs=trained)

        def note_changes() -> None:
            checkpoint.upgrade(folder, settings)
            if changed != settings:
                _files.write_text(folder / "settings.yaml", changed.to_yaml())

        shards.first_does(note_changes)
        progress = _fit_in(folder, trainer)
    return Run(_best_of(trainer), graph, changed, progress, folder)


def _warn_of_slow_precision(trainer: Trainer) -> None:
    """Warn if a run is resumed in bfloat16 on a device that has it only in software."""
    here = training_dtype(trainer.settings.replace(precision="auto"), trainer.model.device)
    if trainer.precision == torch.bfloat16 != here:
        logger.warning(
            "Setting precision: the run is trained in bfloat16, which this device (%s) does not"
            " support in hardware. It continues in bfloat16, but its steps may be slow.",
            trainer.model.device,
        )


def load(folder: str | os.PathLike[str], device: str = "auto") -> Run:
    """Load a run from its folder, with the model of its best epoch and the progress of its last.

    Parameters
    ----------
    folder : path
        A run folder that `fit` or `Run.save` wrote.
    device : str
        Device of the model: ``cpu``, ``cuda``, ``cuda:1``, …; ``auto`` for a GPU if torch finds
        one, else the CPU. Default: ``auto``.

    Returns
    -------
    Run

    Raises
    ------
    CheckpointError
        The folder is not a run folder, has no checkpoint yet, or cannot be read.
    SettingsError
        The device cannot be used here.
    """
    path = Path(folder)
    graph, settings = checkpoint.open_run(path)
    place = resolve_device(device)
    files = (checkpoint.BEST, checkpoint.LAST, checkpoint.PREVIOUS)
    model = checkpoint.fitting_model(path, graph, settings, files).to(place)
    progress = checkpoint.load_best(path, model)
    return Run(model.eval(), graph, settings, progress, path)


def _check_modalities(kg: MultiViewKG, settings: Settings) -> None:
    """Refuse modalities in the settings that the graph does not have."""
    missing = [name for name in settings.modalities or [] if name not in kg.modalities]
    if missing:
        raise DataError(
            f"Setting modalities: {kg.title} has no views of {', '.join(map(repr, missing))}; it"
            f" has {', '.join(map(repr, kg.modalities)) or 'none'}."
        )
