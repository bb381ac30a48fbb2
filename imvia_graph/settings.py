"""Every setting of a run, in one documented list.

A YAML or TOML file, ``--set key=value`` and keyword arguments of `imvia_graph.fit` all reach all of
it. ``imvia-graph settings`` prints the list with the defaults. Some settings come with the package
and stand for a file by their name (`presets`).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from rapidfuzz import process
from rapidfuzz.distance import DamerauLevenshtein

from imvia_graph._display import bounded
from imvia_graph.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: How many seeds torch's generators tell apart.
SEEDS = 2**64


class Settings(BaseModel):
    """Settings of the model, its losses, training and ranking.

    Raises
    ------
    SettingsError
        From `Settings.create` and `Settings.read`: an unknown key (with the nearest known one) or a
        value that the key cannot take. The constructor raises pydantic's ``ValidationError``.

    Examples
    --------
    >>> from imvia_graph import Settings
    >>> Settings.create({"dim": 64}).dim
    64
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # -- data
    validation: Literal["auto", "published", "held-out"] = Field(
        "auto",
        description="Validation set: the published one, 5 % held out of train, or held-out only"
        " where the published one shares triples with train or test (auto).",
    )
    hold_out_by: Literal["auto", "pair", "triple"] = Field(
        "auto",
        description="Held-out validation: triples between the same two entities stay together"
        " (pair), or are held out each by itself (triple), or as the test set was drawn (auto).",
    )
    split_seed: int = Field(
        0,
        ge=0,
        lt=SEEDS,
        description="Seed of held-out validation and of splitting what has no splits.",
    )
    modalities: list[str] | None = Field(
        None, description="Modalities to use, of those that the graph has; null for all."
    )

    # -- model
    scale_views: bool = Field(
        True,
        description="Whether views of a modality whose median length is above 32 or below 1/32 are"
        " multiplied by one number, so that it is about 1: others are hardly learned from.",
    )
    dim: int = Field(256, ge=1, description="Width of entity embeddings and of every head.")
    relation_dim: int = Field(64, ge=1, description="Width of relation embeddings.")
    structure: bool = Field(
        True,
        description="Whether the structural embedding is a head and takes part in the joint one;"
        " the gates see it in any case.",
    )
    joint: bool = Field(True, description="Whether there is a joint head beside the modalities'.")
    gate: Literal["relation", "entity", "none"] = Field(
        "relation",
        description="What the weights of a query's views depend on: entity and relation (Eq. 1),"
        " the entity alone, or nothing, for the plain mean of the views.",
    )
    residual: bool = Field(
        True,
        description="Add a free vector an entity to each projected modality embedding (not in the"
        " paper).",
    )
    relation_residual: bool = Field(
        True,
        description="Add a free block-diagonal matrix a relation, that of ComplEx, to those that"
        " Tucker's core makes (not in the paper).",
    )
    complex_head: bool | None = Field(
        None,
        description="Whether there is a head of ComplEx, with tables of its own that N3 keeps"
        " small, beside the others (not in the paper); null for graphs of fewer than 50,000"
        " entities, whose tables take little memory.",
    )
    complex_rank: int = Field(
        256, ge=1, description="Rank of the head of ComplEx: complex numbers an entity."
    )
    complex_weight: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Weight of that head in the decision; the others share the rest. It is not"
        " learned: on the training triples, which that head soon knows by heart, the decision would"
        " trust it too much.",
    )
    candidates: Literal["shared", "relation"] = Field(
        "shared",
        description="Candidate tables: relation-free and shared by a batch, or the exact form of"
        " Eq. 1, made anew for each relation.",
    )
    decision: Literal["trained", "detached", "mean"] = Field(
        "detached",
        description="Relation-aware decision over the heads: trained with them, trained on their"
        " scores as given (detached), or their plain mean.",
    )
    backend: Literal["auto", "reference", "torch_scatter", "numba", "triton"] = Field(
        "auto",
        description="What aggregates views: plain torch, torch-scatter, one pass on the CPU (numba)"
        " or the GPU (triton), or the fastest there is.",
    )
    batch_norm: bool = Field(False, description="Batch normalisation in the Tucker decoder.")
    input_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the query's entity.")
    relation_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on relation matrices.")
    hidden_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the query vector.")

    # -- losses
    regime: Literal["1vsall", "kvsall", "sampled"] = Field(
        "1vsall",
        description="Positives and negatives of a query: one answer against all entities, all known"
        " answers against all entities, or one answer against sampled entities.",
    )
    loss: Literal["softmax", "binary"] = Field(
        "softmax", description="Completion loss: softmax or binary cross-entropy (Eq. 7)."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing of that loss.")
    negative_sampling: Literal["uniform", "degree", "in-batch", "query"] = Field(
        "uniform",
        description="Negatives in the regime 'sampled': drawn uniformly or by degree, shared by the"
        " batch, beside the other queries' answers; those alone (in-batch); or uniformly for each"
        " query. What is shared is corrected by how likely it was to be there.",
    )
    negatives: int = Field(
        1024,
        ge=1,
        description="Negatives that are drawn in the regime 'sampled': a batch or, with"
        " negative_sampling=query, a query.",
    )
    lambda_information: float = Field(
        1e-4, ge=0, description="Weight of L1, mutual information (Eq. 8; the paper has 1)."
    )
    lambda_alignment: float = Field(
        0.0,
        ge=0,
        description="Weight of L2, alignment (lambda 1); 0 ranks best on validation (docs:"
        " accuracy).",
    )
    lambda_completion: float = Field(1.0, gt=0, description="Weight of L3, completion (lambda 2).")
    lambda_regularization: float | None = Field(
        None,
        ge=0,
        description="Weight of DURA, the regularisation of what a score multiplies; null for 0.1"
        " or, with 50,000 entities or more, 0.01: 0.1 pulls their scores to zero before they have"
        " learned.",
    )
    lambda_n3: float = Field(
        0.05, ge=0, description="Weight of N3, the regularisation of the head of ComplEx."
    )
    lambda_relation: float = Field(
        0.0,
        ge=0,
        description="Weight of relation prediction: which relation joins the two entities of a"
        " training triple (not in the paper). It needs relation_residual.",
    )
    alignment: Literal["contrastive", "printed"] = Field(
        "contrastive", description="Form of L2: contrastive, or Eq. 5 as printed."
    )
    temperature: float = Field(0.1, gt=0, description="Temperature of L2 to start from.")
    information_dim: int = Field(128, ge=1, description="Hidden width of L1's estimator.")
    information_learning_rate: float = Field(
        1e-3, gt=0, description="Learning rate of L1's estimator."
    )

    # -- training
    epochs: int | None = Field(
        None,
        ge=0,
        description="Epochs at most; null for as many as take 500 steps, and 32 at least.",
    )
    batch_size: int = Field(1024, ge=1, description="Queries a batch.")
    optimizer: Literal["adam", "adamw", "adagrad"] = Field(
        "adam", description="Optimizer of the layers."
    )
    table_optimizer: Literal["adam", "adamw", "adagrad", "same"] = Field(
        "adagrad",
        description="Optimizer of the tables of entities and relations; same for that of the"
        " layers, learning rate included.",
    )
    entity_optimizer: Literal["auto", "dense", "lazy", "rowwise"] = Field(
        "auto",
        description="Rows of the entities' tables that a step changes: all (dense), those that the"
        " batch touches (lazy), or those with one second moment a row and no first (rowwise), which"
        " needs the least memory; auto for lazy in the regime 'sampled', else dense.",
    )
    learning_rate: float = Field(1e-3, gt=0, description="Learning rate of the layers.")
    table_learning_rate: float = Field(
        0.1, gt=0, description="Learning rate of the tables, with an optimizer of their own."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear",
        description="Learning rates over the epochs: as they are, or falling to 0 at the last one.",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay a step of the exponential moving average of the weights, which is what"
        " is validated and kept; 0 for the weights as they are.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    gradient_clip: float | None = Field(
        None, gt=0, description="Largest norm of the gradient; null for none."
    )
    validate_every: int = Field(1, ge=1, description="Epochs between validations.")
    ranking_candidates: int | None = Field(
        None,
        ge=1,
        description="Entities that validation ranks against, drawn once with the seed; null for"
        " all.",
    )
    patience: int | None = Field(
        10, ge=1, description="Validations without a better MRR before stopping; null for never."
    )
    checkpoint_every: int = Field(1, ge=1, description="Epochs between checkpoints to resume from.")
    seed: int = Field(0, ge=0, lt=SEEDS, description="Seed of everything random in training.")
    non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="What becomes of training at a step whose loss or gradient is NaN or infinite:"
        " it stops with the weights from before it, or goes on without it and counts it.",
    )
    disk_full: Literal["stop", "continue"] = Field(
        "stop",
        description="What becomes of training where a checkpoint does not fit on the disk: it"
        " stops, or goes on and tries again with the next one.",
    )

    # -- machine
    device: str = Field("auto", description="cpu, cuda, cuda:1, …; auto for a GPU if there is one.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of matrix products in training; auto for bfloat16 where the device"
        " has it, and with several processes where all do; a run keeps what was chosen. Ranking is"
        " always in float32.",
    )
    views_on: Literal["auto", "device", "host"] = Field(
        "auto",
        description="Where the views are: on the device, on the host, mapped from their file, so"
        " that only those of a batch go to the device, or on the device if they take no more than"
        " half of its free memory (auto).",
    )
    cuda_graph: bool = Field(
        True,
        description="Whether a GPU records the steps of training and repeats them, which is faster."
        " That is done where all entities are candidates (not regime: sampled, candidates: shared)"
        " and scores of a batch take no more than 1 GiB, in one process, with the views on the"
        " device, backend auto or triton, without ema_decay, not in float16; it needs Triton.",
    )
    ranking_batch_size: int = Field(4096, ge=1, description="Queries ranked at a time.")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads ``on`` and ``yes`` as true, which Python takes for 1."""
        field = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (field, *get_args(field)):
            raise ValueError(
                "expected no truth value, which on, off, yes and no are, too, unless in quotes"
            )
        return value

    @field_validator("modalities")
    @classmethod
    def _each_once(cls, value: list[str] | None) -> list[str] | None:
        twice = [name for name, count in Counter(value or ()).items() if count > 1]
        if twice:
            raise ValueError(f"expected each modality once, found {twice[0]!r} more often")
        return value

    @classmethod
    def create(cls, *layers: Mapping[str, Any]) -> Settings:
        """Settings from mappings, later ones over earlier ones, over the defaults.

        Raises
        ------
        SettingsError
            A setting that there is not, with the nearest that there is, or a value that it does
            not take.

        Examples
        --------
        >>> from imvia_graph import Settings
        >>> settings = Settings.create({"dim": 64, "seed": 1}, {"seed": 2})
        >>> settings.dim, settings.seed
        (64, 2)
        """
        merged: dict[str, Any] = {}
        for layer in layers:
            merged.update({str(key): value for key, value in layer.items()})
        try:
            return cls(**merged)
        except ValidationError as error:
            raise SettingsError(_explain(error)) from None

    @classmethod
    def read(cls, path: str | Path) -> dict[str, Any]:
        """A mapping from a YAML or TOML file, checked by `create` together with the rest.

        In place of a file one of `presets`, where no file is called so.

        Raises
        ------
        SettingsError
            No such file, one that cannot be read, or what `create` refuses.
        """
        if not Path(path).suffix and not Path(path).exists():
            if str(path) not in presets():
                raise SettingsError(
                    f"{path} is neither a file nor among the settings that come with the package:"
                    f" {', '.join(presets())}."
                )
            path = PRESETS / f"{path}.yaml"
        values = cls.read_mapping(path, "settings")
        cls.create(values)
        return values

    @classmethod
    def read_all(cls, paths: Iterable[str | Path]) -> dict[str, Any]:
        """A mapping from several files, later ones over earlier ones; see `read`."""
        merged: dict[str, Any] = {}
        for path in paths:
            merged.update(cls.read(path))
        return merged

    @classmethod
    def of(cls, given: Settings | Mapping[str, Any] | str | os.PathLike[str] | None) -> Settings:
        """Settings from what a caller has: some, a mapping, a file, a name of `presets`, or none.

        >>> from imvia_graph import Settings
        >>> Settings.of({"dim": 64}).dim, Settings.of("paper").loss
        (64, 'binary')
        """
        if given is None:
            return cls()
        if isinstance(given, cls):
            return given
        if isinstance(given, (str, os.PathLike)):
            return cls.create(cls.read(os.fspath(given)))
        if isinstance(given, Mapping):
            return cls.create(given)
        raise SettingsError(
            "settings: expected Settings, a mapping, a YAML or TOML file, or one of"
            f" {', '.join(presets())}; received {bounded(given)}."
        )

    @staticmethod
    def read_mapping(path: str | Path, what: str) -> dict[str, Any]:
        """The mapping in a YAML or TOML file, unchecked; ``what`` it is of, for messages."""
        from imvia_graph import _files  # it needs torch, and what the settings are is said without

        path = Path(path)
        with _files.open_input(path) as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise SettingsError(
                f"{path} is larger than {MOST_BYTES // 1024} KiB: expected a file of {what}."
            )
        try:
            suffix = path.suffix.lower()
            if suffix == ".toml":
                values = tomllib.loads(content.decode("utf-8"))
            elif suffix in (".yaml", ".yml"):
                values = _yaml(content.decode("utf-8"))
            else:
                raise SettingsError(f"{path}: expected a .yaml, .yml or .toml file.")
        except UNREADABLE as error:
            raise SettingsError(f"{path} cannot be read: {error}") from error
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise SettingsError(f"{path}: expected a mapping of {what}, found {bounded(values)}.")
        return values

    @classmethod
    def parse(cls, assignments: Sequence[str]) -> dict[str, Any]:
        """A mapping from ``key=value`` texts; values are read as YAML.

        Raises
        ------
        SettingsError
            A text without ``=``, or a value that is no YAML.

        Examples
        --------
        >>> from imvia_graph import Settings
        >>> Settings.parse(["dim=64", "joint=false", "modalities=[text]"])
        {'dim': 64, 'joint': False, 'modalities': ['text']}
        """
        values = {}
        for text in assignments:
            key, equals, value = text.partition("=")
            if not equals:
                raise SettingsError(f"--set {text}: expected key=value, for example dim=128.")
            try:
                parsed = _yaml(value)
            except UNREADABLE as error:
                raise SettingsError(f"--set {text}: the value cannot be read: {error}") from None
            values[key.strip()] = as_number(parsed)
        return values

    def replace(self, **changes: Any) -> Settings:
        """The same settings with some changed."""
        return Settings.create(self.model_dump(), changes)

    def to_yaml(self, comments: bool = False) -> str:
        """The settings as YAML, on request with what each is for."""
        lines = []
        for key, field in type(self).model_fields.items():
            text = yaml.safe_dump({key: getattr(self, key)}, allow_unicode=True).strip()
            if comments:
                lines.append(f"# {field.description}")
            lines.append(text)
            if comments:
                lines.append("")
        return "\n".join(lines).rstrip() + "\n"


#: Where the settings are that come with the package.
PRESETS = Path(__file__).parent / "presets"


def checked_settings(given: Any) -> Settings:
    """What is given, if it is `Settings`.

    Raises
    ------
    SettingsError
        It is a mapping, or anything else.
    """
    if isinstance(given, Settings):
        return given
    raise SettingsError(
        f"settings: expected Settings, received {type(given).__name__}. Of a mapping,"
        " imvia_graph.Settings.create(mapping) makes them."
    )


def presets() -> list[str]:
    """Names of the settings that come with the package: ``paper``, those of the paper.

    >>> from imvia_graph.settings import presets
    >>> presets()
    ['paper']
    """
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


#: Bytes that a file of settings has at most: PyYAML reads some 100 KiB a second.
MOST_BYTES = 2**18
#: What PyYAML and tomllib raise at what is no YAML or TOML, or is a date that is none, or is nested
#: too deeply.
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError)


class _Loader(yaml.SafeLoader):
    """The safe loader, without aliases, of which a few can stand for billions of values.

    A key that stands twice is an error: YAML has it so, and PyYAML takes the last one.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=deep)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "aliases are not allowed", event.start_mark
            )
        return super().compose_node(parent, index)


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def as_number(value: Any) -> Any:
    """A number in a text as a number: YAML 1.1 takes 1e-3 for a text; people do not."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


#: What settings are called elsewhere.
_ELSEWHERE = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "wd": "weight_decay",
    "clip": "gradient_clip",
    "embedding_dim": "dim",
    "hidden_dim": "dim",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "num_negatives": "negatives",
    "early_stopping": "patience",
}


def _nearest(key: str) -> str | None:
    """The setting that a name may be meant for: letters left out, added, changed or swapped."""
    if key.lower() in _ELSEWHERE:
        return _ELSEWHERE[key.lower()]
    similarity = DamerauLevenshtein.normalized_similarity
    found = process.extractOne(
        key.lower(), list(Settings.model_fields), scorer=similarity, score_cutoff=0.5
    )
    return found[0] if found else None


def _explain(error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = _nearest(key)
            hint = f"; did you mean {near!r}?" if near else "."
            problems.append(
                f"There is no setting {key!r}{hint} `imvia-graph settings` lists them all."
            )
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            problems.append(f"Setting {key}: {message}; received {bounded(item['input'])}.")
    return " ".join(problems)
