"""`fit`, `load` and `Run`: a trained model with its graph, its settings and its folder."""

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
from imvia_graph.evaluation import evaluate, evaluating
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
    """A trained model with all that belongs to it.

    Attributes
    ----------
    model : IMVIA
        At its best epoch; of a training that was stopped, the best until then.
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
        """A record an epoch: ``epoch``, ``loss``, its parts, ``seconds``, ``valid`` metrics."""
        return self._history if self.folder is None else checkpoint.history_of(self.folder)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a run folder, which `load` reads: the model, its graph, settings and history.

        What was trained with ``out`` has one already. What is saved afterwards can do all but be
        resumed. Of several processes all call this.

        Parameters
        ----------
        folder : path
            Not there yet, or empty.

        Returns
        -------
        Path

        Raises
        ------
        CheckpointError
            The folder holds something already; nothing in it is touched.

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
        """Filtered ranking metrics of a split; see `imvia_graph.evaluate`.

        The batch size and the seed are those of the settings, unless others are given.
        """
        options.setdefault("batch_size", self.settings.ranking_batch_size)
        options.setdefault("seed", self.settings.seed)
        return evaluate(self.model, self.kg, split, **options)

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
        """The best answers to a query; see `imvia_graph.inference.predict`.

        The model may have changed since the last call, so each makes all that it needs anew. Where
        many are asked, ``ig.Predictor(run.model, run.kg)`` keeps it, and `Predictor.answers` takes
        many queries at once.
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
        """Scores of triples as answers to (head, relation, ?).

        Parameters
        ----------
        triples : sequence of (head, relation, tail)
            Labels, or display names that one entity bears.
        batch_size : int, optional
            Triples at a time, 1 or more. Default: ``1024``.

        Returns
        -------
        Tensor
            (n,) on the CPU. They rank the answers to one query; those of different queries do not
            compare.

        Raises
        ------
        UnknownLabelError
        DataError
            A row that is no triple; no batch size.

        Examples
        --------
        >>> import imvia_graph as ig
        >>> run = ig.fit("countries", epochs=1, dim=16)
        >>> run.score([("France", "borders", "Spain"), ("France", "borders", "Peru")]).shape
        torch.Size([2])
        """
        if batch_size < 1:
            raise DataError(f"score: expected a batch_size of 1 or more; received {batch_size}.")
        ids = []
        for row, triple in enumerate(triples):
            if isinstance(triple, str) or len(triple) != 3:
                raise DataError(
                    f"Expected (head, relation, tail) in row {row}, received {triple!r}."
                )
            head, relation, tail = triple
            ids.append(
                (self.kg.id_of(head), self.kg.id_of(relation, "relation"), self.kg.id_of(tail))
            )
        numbers = torch.tensor(ids, dtype=torch.int64, device=self.model.device).reshape(-1, 3)
        with evaluating(self.model) as model:
            parts = [model(*part.unbind(1)).cpu() for part in numbers.split(batch_size)]
        return torch.cat(parts)

    def explain(self, head: str, relation: str, tail: str) -> inference.Explanation:
        """What the model makes of a triple; see `imvia_graph.inference.explain`."""
        return inference.explain(self.model, self.kg, head=head, relation=relation, tail=tail)

    @property
    def encoder(self) -> EntityEncoder:
        """The embedding half of the model, a source of features for other models."""
        return EntityEncoder(self.model)

    @torch.no_grad()
    def entity_embeddings(self) -> dict[str, Tensor]:
        """(num_entities, dim) on the CPU for each head, relation-free; rows as `kg.entities`.

        Those of the head ``complex`` are (num_entities, 2 complex_rank).

        Raises
        ------
        IMVIAError
            Of several processes, each of which has a part of the entities.
        """
        self.model.check_whole("embeddings of all entities are made")
        with evaluating(self.model) as model:
            tables = model.candidates()
        return {head: table.detach().cpu().clone() for head, table in tables.items()}

    def relation_embeddings(self) -> dict[str, Tensor]:
        """(2 num_relations, relation_dim) on the CPU for each head.

        Rows are those of ``kg.relations``, then their inverses. With ``relation_residual`` they are
        dim wider: the numbers of the relation's own blocks come last. Those of the head
        ``complex`` are (2 num_relations, 2 complex_rank).
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
        return f"<Run of {self.kg}{where}: {self.progress.epoch} epochs, heads {self.model.heads}>"


class EntityEncoder(nn.Module):
    """What a trained IMVIA knows of its entities, as a layer: ids in, embeddings out.

    It shares parameters and views with the model, so that training the one trains the other, and
    moving or converting the one moves the other; ``copy.deepcopy`` makes one that stands alone,
    ``requires_grad_(False)`` a frozen one. What only scores triples, the decoders and the decision,
    is no part of it.

    Parameters
    ----------
    model : IMVIA

    Attributes
    ----------
    heads : list of str
        ``structure``, each modality and, where the model has them, ``joint`` and ``complex``.
    num_entities, out_feats : int
        Sizes of the result for all entities; the head ``complex`` has a width of its own.

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
        #: The width of each head's embeddings.
        self.widths = dict(model.widths)
        # The same model with fewer parts: an unused parameter would be an error to
        # DistributedDataParallel, and dead weight in a state_dict.
        half = copy.copy(model)
        names = ("entity", "residual", "encoder", "joint", "complex_entity")
        parts = {name: getattr(model, name) for name in names}
        half._modules = {**parts, "relation": nn.ModuleList(model.relation[:1])}
        self.model = half
        #: The model that this is a part of. In a list, which keeps it out of the modules; a copy,
        #: which shares nothing with it, has an empty one.
        self._whole = [model]

    def _apply(self, fn: Any, recurse: bool = True) -> EntityEncoder:
        """Move or convert the model that this is a part of, so that its parts stay alike."""
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
        """Embed entities, the views of which are the only ones that are read.

        Parameters
        ----------
        entity : Tensor, optional
            (B,) int64 ids of ``run.kg``. Default: all entities.
        relation : Tensor, optional
            (B,) int64 ids, or a scalar for all; those of inverse relations are ``relation +
            num_relations``. Default: ``None``, the relation-free gate.

        Returns
        -------
        dict of str to Tensor
            (B, ``widths[head]``) a head: out_feats, and of ``complex`` 2 complex_rank.

        Raises
        ------
        IMVIAError
            What is no tensor of ids; on a CPU also ids that the model does not have.
        """
        if entity is not None:
            self.model.check_ids(entity=entity)
        if relation is not None:
            one = isinstance(relation, Tensor) and relation.dim() == 0
            self.model.check_ids(relation=relation[None] if one else relation)
        return self.model.embed(entity, relation).heads

    def extra_repr(self) -> str:
        """What ``print`` shows of the module."""
        return f"heads={self.heads}, out_feats={self.out_feats}"


def fit(
    kg: Any = None,
    *,
    out: str | os.PathLike[str] | None = None,
    settings: Settings | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    resume: bool = False,
    callbacks: Callback | Sequence[Callback] = (),
    **overrides: Any,
) -> Run:
    """Train IMVIA on a graph.

    Parameters
    ----------
    kg : MultiViewKG, name or folder
        Anything that `load_kg` takes; left out with ``resume``. A validation set that `load_kg` was
        told to take as it is, or held out, stays; else the setting ``validation`` says which it is.
    out : path, optional
        The run folder to write. Default: none is written.
    settings : Settings, mapping, file or name, optional
        A YAML or TOML file, or the name of settings that come with the package: ``"paper"`` for
        those of the paper. Default: the default settings.
    resume : bool
        Whether to go on with the run in ``out``, with its graph and its settings; of the
        settings given, only `RESUMABLE` may differ: ``epochs``, ``patience``, ``device``,
        ``validate_every``, ``checkpoint_every``, ``non_finite``, ``disk_full``, ``views_on``,
        ``cuda_graph``, ``backend``. What is left open in them and the run has chosen (``epochs``,
        ``lambda_regularization``, ``complex_head``, ``precision``) stays as the run has it.
        A run that ended is taken as it is, unless there are more epochs to go. Fewer epochs than
        it has been trained for count as these.
    callbacks : Callback or sequence of Callback
        See `imvia_graph.training.Callback`.
    **overrides
        Settings by name, over ``settings``.

    Returns
    -------
    Run
        With the model of the best epoch by validation MRR; of the last one where there are no
        validation triples. Where `Trainer.stop` ended training: of the best until then, or as it
        was left where nothing was validated yet.

    Raises
    ------
    DataError, SettingsError, CheckpointError
        A graph, settings or a run folder that cannot be taken as they are; features that something
        writes into while they are trained on.
    TrainingError
        A loss or a gradient that is not finite (see the setting ``non_finite``).
    OutOfMemoryError
        What does not fit into memory, however few queries are taken at a time.
    StorageError
        A checkpoint does not fit on the disk (see the setting ``disk_full``), or the run folder was
        moved or deleted meanwhile.
    KeyboardInterrupt
        Ctrl-C. With ``out``, the step in hand is finished and its place kept first, for SIGTERM,
        too, so that ``resume`` goes on there; a second signal does not wait.

    Notes
    -----
    Where torchrun started several processes, all of them call this, and train one model together:
    see `imvia_graph.distributed`. The `Run` of each has its own entities' rows, and what ranks
    (`Run.evaluate`) is to be called by all; `load` has everything in one process.

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
            raise CheckpointError("resume: give the run folder as out.")
        if kg is not None:
            raise CheckpointError(
                f"resume goes on with the graph in {folder}; leave the graph out."
            )
        given = Settings.of(settings).model_dump(exclude_unset=True)
        return _resume(folder, callbacks, {**given, **overrides})
    if kg is None:
        raise DataError("fit: give a graph: a MultiViewKG, a data set's name or a folder.")
    chosen = Settings.of(settings).replace(**overrides)
    device = _device(chosen)
    graph = with_validation(
        kg if isinstance(kg, MultiViewKG) else load_kg(kg, None, chosen.split_seed),
        chosen.validation,
        chosen.split_seed,
        chosen.hold_out_by,
    )
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


def _best_of(trainer: Trainer) -> IMVIA:
    """The trained model as `load` would read it, where training was stopped, too."""
    if not trainer.progress.ended:
        if trainer.best_state is not None:
            trainer.model.load_state_dict(trainer.best_state)
        else:
            trainer.keep_average()
    return trainer.model.eval()


def _made(kg: MultiViewKG, settings: Settings, shards: Shards, device: torch.device) -> IMVIA:
    """A new model, in memory that there is."""
    try:
        return IMVIA.from_kg(kg, settings, shards).to(device)
    except MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"Out of memory while making the model of {kg.num_entities:,} entities with"
            f" dim={settings.dim}. Take a smaller dim, or fewer heads."
        ) from error


class _Records(Callback):
    """Keeps what is known of each epoch."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self.found.append(record)


def _device(settings: Settings) -> torch.device:
    """The device of this process, which joins the others where torchrun started several."""
    if torch.get_default_dtype() != torch.float32:
        raise SettingsError(
            f"torch's default dtype is {torch.get_default_dtype()}, in which the model would be"
            " made; it is trained in float32 and less (the setting precision). Call"
            " torch.set_default_dtype(torch.float32) first."
        )
    device = resolve_device(distributed.local_device(settings.device))
    refuse_backend(settings.backend, device)
    if distributed.is_launched():
        distributed.join(device)
    return device


@contextmanager
def _owned(folder: Path, shards: Shards, new: bool = False) -> Iterator[None]:
    """Have a run folder to oneself: the first process has it for all."""
    with ExitStack() as stack:

        def take() -> None:
            if new:
                checkpoint.check_free(folder)
            stack.enter_context(checkpoint.locked(folder))

        shards.first_does(take)
        yield


def _fit_in(folder: Path, trainer: Trainer) -> Progress:
    """Train with a run folder; a signal ends it after the step in hand."""
    trainer.callbacks.insert(0, checkpoint.RunFolder(folder, trainer.shards))
    with _stopping_on_signals(trainer):
        progress = trainer.fit()
    if not progress.ended and not trainer.is_asked_to_stop:  # another process was, and so all did
        raise KeyboardInterrupt
    return progress


@contextmanager
def _stopping_on_signals(trainer: Trainer) -> Iterator[None]:
    """Have SIGINT and SIGTERM stop a trainer; they do what they would have done when it has.

    A second one does so at once; not one that torchrun passes on of what Ctrl-C sent to all. In
    another thread than the main one signals are left alone.
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
            again = number == received[0] and time.monotonic() - first < _SAME_SIGNAL
            if again and distributed.is_launched():
                return
            put_back()
            signal.raise_signal(number)
        first = time.monotonic()
        received.append(number)
        trainer.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler is not None and handler is not signal.SIG_IGN:  # None: not Python's own
            before[number] = handler
            signal.signal(number, stop)
    try:
        yield
    finally:
        put_back()
        if received:
            signal.raise_signal(received[0])


#: Seconds in which a signal that comes again to one of several processes is still the same one.
_SAME_SIGNAL = 1.0


#: Settings that a resumed run may change without becoming another run.
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


#: Settings that may be left open: training chooses, and the run has what it chose.
_LEFT_OPEN = {
    "epochs": None,
    "lambda_regularization": None,
    "complex_head": None,
    "precision": "auto",
}


def _resume(folder: Path, callbacks: Sequence[Callback], overrides: dict[str, Any]) -> Run:
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
                f" keeps its settings but for {', '.join(RESUMABLE)}. Start another run instead."
            )
    device = _device(changed)
    torch.manual_seed(changed.seed)
    shards = Shards.of_world(graph.num_entities)
    model = checkpoint.fitting_model(folder, graph, changed, shards=shards).to(device)
    trainer = Trainer(model, graph, changed, callbacks)
    # Runs of before left it to each machine.
    changed = changed.replace(precision=trainer.settings.precision)
    if shards.is_first:
        _warn_of_slow_precision(trainer)
    with _owned(folder, shards):
        # A run that was stopped before its first checkpoint starts again, from the same seed.
        checkpoint.load_last(folder, trainer)
        trained = trainer.progress.epoch
        if trainer.epochs < trained:
            if shards.is_first:
                logger.warning(
                    "Setting epochs: the run in %s has %d epochs already, more than the %d that"
                    " are asked for; it keeps them, and is trained no further.",
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
    """A run goes on in the precision that it has, on a machine that would not choose it, too."""
    here = training_dtype(trainer.settings.replace(precision="auto"), trainer.model.device)
    if trainer.precision == torch.bfloat16 != here:
        logger.warning(
            "Setting precision: the run is trained in bfloat16, in which this device (%s) does not"
            " compute in hardware. It goes on as it began, but its steps may be slow.",
            trainer.model.device,
        )


def load(folder: str | os.PathLike[str], device: str = "auto") -> Run:
    """Load a run from its folder, with the model of its best epoch and the progress of its last.

    Parameters
    ----------
    folder : path
        What `fit` wrote.
    device : str
        Where to put the model: ``cpu``, ``cuda``, ``cuda:1``, …; ``auto`` is the GPU where torch
        sees one, else the CPU. Default: ``auto``.

    Raises
    ------
    CheckpointError
        No run, a run without a checkpoint, or one that cannot be read.
    SettingsError
        A device that cannot be used here.
    """
    path = Path(folder)
    graph, settings = checkpoint.open_run(path)
    place = resolve_device(device)
    files = (checkpoint.BEST, checkpoint.LAST, checkpoint.PREVIOUS)
    model = checkpoint.fitting_model(path, graph, settings, files).to(place)
    progress = checkpoint.load_best(path, model)
    return Run(model.eval(), graph, settings, progress, path)


def _check_modalities(kg: MultiViewKG, settings: Settings) -> None:
    """A modality that is asked for and not there is a mistake, not an empty one."""
    missing = [name for name in settings.modalities or [] if name not in kg.modalities]
    if missing:
        raise DataError(
            f"Setting modalities: {kg} has no views of {', '.join(map(repr, missing))}; it has"
            f" {', '.join(map(repr, kg.modalities)) or 'none'}."
        )
