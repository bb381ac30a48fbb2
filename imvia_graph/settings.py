"""All settings of a run, with their defaults and descriptions.

Each can be set in a YAML or TOML file, by ``--set key=value`` and as a keyword argument of
`imvia_graph.fit`. ``imvia-graph settings`` prints all of them with the defaults. Settings files
that come with the package are named without a path (`presets`).
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

#: Number of distinct seeds of torch's generators.
SEEDS = 2**64


class Settings(BaseModel):
    """Settings of the model, its losses, training and ranking.

    Raises
    ------
    SettingsError
        From `Settings.create` and `Settings.read`: an unknown key (the message names the nearest
        known one) or an invalid value. The constructor raises pydantic's ``ValidationError``.

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
        description="Validation set: the published one (published), 5 % of train (held-out), or"
        " held-out only if the published one shares triples with train or test (auto).",
    )
    hold_out_by: Literal["auto", "pair", "triple"] = Field(
        "auto",
        description="What is held out for validation: all triples between the same two entities"
        " together (pair), each triple by itself (triple), or as the test set was drawn (auto).",
    )
    split_seed: int = Field(
        0,
        ge=0,
        lt=SEEDS,
        description="Seed of held-out validation and of splitting a graph that has no splits.",
    )
    modalities: list[str] | None = Field(
        None, description="Modalities of the graph to use; null for all."
    )

    # -- model
    scale_views: bool = Field(
        True,
        description="Whether to rescale the views of a modality to a median length of about 1 if"
        " that is above 32 or below 1/32: the model learns little from views of other lengths.",
    )
    dim: int = Field(
        256, ge=1, description="Width of entity embeddings in every head except the ComplEx head."
    )
    relation_dim: int = Field(64, ge=1, description="Width of relation embeddings.")
    structure: bool = Field(
        True,
        description="Whether the structural embedding is a head and takes part in the joint one;"
        " the gates use it in either case.",
    )
    joint: bool = Field(
        True, description="Whether to add a joint head to the heads of the modalities."
    )
    gate: Literal["relation", "entity", "none"] = Field(
        "relation",
        description="What the weights of a query's views depend on: entity and relation (Eq. 1),"
        " the entity only, or nothing, which gives the plain mean of the views (none).",
    )
    residual: bool = Field(
        True,
        description="Whether to add a free vector per entity to each projected modality embedding"
        " (not in the paper).",
    )
    relation_residual: bool = Field(
        True,
        description="Whether to add a free block-diagonal matrix per relation, as in ComplEx, to"
        " the matrices from Tucker's core (not in the paper).",
    )
    complex_head: bool | None = Field(
        None,
        description="Whether to add a ComplEx head with its own tables, regularised by N3 (not"
        " in the paper); null for true with fewer than 50,000 entities, where the tables take"
        " little memory.",
    )
    complex_rank: int = Field(
        256, ge=1, description="Rank of the ComplEx head: complex numbers per entity."
    )
    complex_weight: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Weight of the ComplEx head in the decision; the other heads share the rest."
        " It is not learned: the head soon fits the training triples, on which the decision would"
        " give it too much weight.",
    )
    candidates: Literal["shared", "relation"] = Field(
        "shared",
        description="Candidate tables: without the relation and shared by all queries (shared), or"
        " computed for each relation, the exact form of Eq. 1 (relation).",
    )
    decision: Literal["trained", "detached", "mean"] = Field(
        "detached",
        description="Relation-aware decision over the heads: trained jointly with them (trained),"
        " trained on their detached scores (detached), or their plain mean (mean).",
    )
    backend: Literal["auto", "reference", "torch_scatter", "numba", "triton"] = Field(
        "auto",
        description="Implementation that aggregates views: plain torch (reference), torch-scatter,"
        " one fused pass on the CPU (numba) or the GPU (triton), or the fastest available (auto).",
    )
    batch_norm: bool = Field(False, description="Batch normalisation in the Tucker decoder.")
    input_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the query's entity.")
    relation_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on relation matrices.")
    hidden_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the query vector.")

    # -- losses
    regime: Literal["1vsall", "kvsall", "sampled"] = Field(
        "1vsall",
        description="Positives and negatives of a query: one answer against all entities (1vsall),"
        " all known answers against all entities (kvsall), or one answer against sampled entities"
        " (sampled).",
    )
    loss: Literal["softmax", "binary"] = Field(
        "softmax", description="Completion loss: softmax or binary cross-entropy (Eq. 7)."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Label smoothing of the completion loss."
    )
    negative_sampling: Literal["uniform", "degree", "in-batch", "query"] = Field(
        "uniform",
        description="Negatives in the regime sampled: the answers of the batch's other queries,"
        " alone (in-batch) or with entities drawn for the batch uniformly (uniform) or by degree"
        " (degree), all corrected by their probability of being in the batch; or entities drawn"
        " uniformly for each query (query).",
    )
    negatives: int = Field(
        1024,
        ge=1,
        description="Negatives drawn in the regime sampled: per batch or, with"
        " negative_sampling=query, per query.",
    )
    lambda_information: float = Field(
        1e-4, ge=0, description="Weight of L1, mutual information (Eq. 8; 1 in the paper)."
    )
    lambda_alignment: float = Field(
        0.0,
        ge=0,
        description="Weight of L2, alignment (lambda 1); 0 gives the best validation MRR (docs:"
        " accuracy).",
    )
    lambda_completion: float = Field(1.0, gt=0, description="Weight of L3, completion (lambda 2).")
    lambda_regularization: float | None = Field(
        None,
        ge=0,
        description="Weight of DURA, the regularisation of the embeddings and query vectors that a"
        " score multiplies; null for 0.1 or, with 50,000 entities or more, 0.01: on such graphs"
        " 0.1 pulls the scores to zero before anything is learned.",
    )
    lambda_n3: float = Field(
        0.05, ge=0, description="Weight of N3, the regularisation of the ComplEx head."
    )
    lambda_relation: float = Field(
        0.0,
        ge=0,
        description="Weight of relation prediction: which relation joins the two entities of a"
        " training triple (not in the paper). Needs relation_residual.",
    )
    alignment: Literal["contrastive", "printed"] = Field(
        "contrastive", description="Form of L2: contrastive, or Eq. 5 as printed."
    )
    temperature: float = Field(0.1, gt=0, description="Initial temperature of L2.")
    information_dim: int = Field(128, ge=1, description="Hidden width of L1's estimator.")
    information_learning_rate: float = Field(
        1e-3, gt=0, description="Learning rate of L1's estimator."
    )

    # -- training
    epochs: int | None = Field(
        None,
        ge=0,
        description="Maximum number of epochs; null for as many as take 500 steps, at least 32.",
    )
    batch_size: int = Field(1024, ge=1, description="Queries per batch.")
    optimizer: Literal["adam", "adamw", "adagrad"] = Field(
        "adam", description="Optimizer of the layers."
    )
    table_optimizer: Literal["adam", "adamw", "adagrad", "same"] = Field(
        "adagrad",
        description="Optimizer of the embedding tables of entities and relations; same for that of"
        " the layers and its learning rate.",
    )
    entity_optimizer: Literal["auto", "dense", "lazy", "rowwise"] = Field(
        "auto",
        description="Rows of the entity tables that a step updates: all (dense), those that the"
        " batch looks up (lazy), or those with one second moment per row and no first moment"
        " (rowwise), which needs the least memory. lazy and rowwise need the regime sampled, and"
        " auto is lazy there, else dense.",
    )
    learning_rate: float = Field(1e-3, gt=0, description="Learning rate of the layers.")
    table_learning_rate: float = Field(
        0.1, gt=0, description="Learning rate of the tables; unused with table_optimizer=same."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear",
        description="Learning rates over the epochs: constant, or falling to 0 at the last epoch.",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay per step of the exponential moving average of the weights, which is then"
        " validated and saved in place of the weights; 0 for no average.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    gradient_clip: float | None = Field(
        None, gt=0, description="Largest norm of the gradient; null for no clipping."
    )
    validate_every: int = Field(1, ge=1, description="Epochs between validations.")
    ranking_candidates: int | None = Field(
        None,
        ge=1,
        description="Number of entities that validation ranks against, drawn once with the seed;"
        " null for all.",
    )
    patience: int | None = Field(
        10,
        ge=1,
        description="Validations without a better MRR after which training stops; null for never.",
    )
    checkpoint_every: int = Field(1, ge=1, description="Epochs between checkpoints to resume from.")
    seed: int = Field(0, ge=0, lt=SEEDS, description="Seed of everything random in training.")
    non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="What to do at a step whose loss or gradient is NaN or infinite: stop with the"
        " weights from before the step, or skip and count it.",
    )
    disk_full: Literal["stop", "continue"] = Field(
        "stop",
        description="What to do if a checkpoint does not fit on the disk: stop, or continue and"
        " try to write the next one.",
    )

    # -- machine
    device: str = Field("auto", description="cpu, cuda, cuda:1, …; auto for a GPU if there is one.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of matrix products in training; auto for bfloat16 if the devices of"
        " all processes multiply it in hardware, else float32. A resumed run keeps its precision."
        " Ranking is always in float32.",
    )
    views_on: Literal["auto", "device", "host"] = Field(
        "auto",
        description="Where the views are held: on the device; on the host, memory-mapped from their"
        " file, so that only those of a batch are copied to the device; or on the device if they"
        " take at most half of its free memory (auto).",
    )
    cuda_graph: bool = Field(
        True,
        description="Whether a GPU records training steps as CUDA graphs and replays them, which is"
        " faster. Needs Triton, one process, a regime other than sampled, candidates=shared,"
        " scores of a batch of at most 1 GiB, the views on the device, backend auto or triton, no"
        " ema_decay, and a precision other than float16; else steps are not recorded.",
    )
    ranking_batch_size: int = Field(4096, ge=1, description="Queries ranked at a time.")

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse booleans elsewhere: YAML reads ``on`` and ``yes`` as true, which equals 1."""
        field = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (field, *get_args(field)):
            raise ValueError(
                "expected no boolean; YAML reads on, off, yes and no as booleans unless in quotes"
            )
        return value

    @field_validator("modalities")
    @classmethod
    def _each_once(cls, value: list[str] | None) -> list[str] | None:
        repeated = [name for name, count in Counter(value or ()).items() if count > 1]
        if repeated:
            raise ValueError(f"expected each modality once, found {repeated[0]!r} more often")
        return value

    @classmethod
    def create(cls, *layers: Mapping[str, Any]) -> Settings:
        """Create settings from mappings; later ones override earlier ones and the defaults.

        Raises
        ------
        SettingsError
            An unknown key (the message names the nearest known one) or an invalid value.

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
        """Read a mapping of settings, checked by `create`, from a YAML or TOML file.

        ``path`` may also be one of `presets`, unless a file has that name.

        Raises
        ------
        SettingsError
            The file does not exist or cannot be read, or `create` refuses its content.
        """
        if not Path(path).suffix and not Path(path).exists():
            if str(path) not in presets():
                raise SettingsError(
                    f"{path} is neither a file nor among the settings that come with the package:"
                    f" {', '.join(presets())}."
                )
            path = PRESETS / f"{path}.yaml"
        values = cls.read_mapping(path, "settings")
        try:
            cls.create(values)
        except SettingsError as error:
            raise SettingsError(f"{path}: {error}") from None
        return values

    @classmethod
    def read_all(cls, paths: Iterable[str | Path]) -> dict[str, Any]:
        """Merge the mappings of several files, later ones over earlier ones; see `read`."""
        merged: dict[str, Any] = {}
        for path in paths:
            merged.update(cls.read(path))
        return merged

    @classmethod
    def of(cls, given: Settings | Mapping[str, Any] | str | os.PathLike[str] | None) -> Settings:
        """Convert a mapping, a file, or a name of `presets` to settings; None to the defaults.

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
        """Read a YAML or TOML file as a mapping, unchecked; ``what`` names its keys in messages."""
        from imvia_graph import _files  # imports torch, which printing the settings does not need

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
        """Parse ``key=value`` strings into a mapping; values are read as YAML.

        Raises
        ------
        SettingsError
            A string without ``=``, or a value that is not YAML.

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
        """Return a copy with some settings changed."""
        return Settings.create(self.model_dump(), changes)

    def to_yaml(self, comments: bool = False) -> str:
        """Return the settings as YAML, with ``comments`` that describe each."""
        lines = []
        for key, field in type(self).model_fields.items():
            text = yaml.safe_dump({key: getattr(self, key)}, allow_unicode=True).strip()
            if comments:
                lines.append(f"# {field.description}")
            lines.append(text)
            if comments:
                lines.append("")
        return "\n".join(lines).rstrip() + "\n"


#: Folder of the settings files that come with the package.
PRESETS = Path(__file__).parent / "presets"


def checked_settings(settings: Any) -> Settings:
    """Return the argument if it is a `Settings`.

    Raises
    ------
    SettingsError
        It is a mapping, or anything else.
    """
    if isinstance(settings, Settings):
        return settings
    raise SettingsError(
        f"settings: expected Settings, received {type(settings).__name__}. Convert a mapping with"
        " imvia_graph.Settings.create(mapping)."
    )


def presets() -> list[str]:
    """Return the names of the settings that come with the package: ``paper``, as in the paper.

    >>> from imvia_graph.settings import presets
    >>> presets()
    ['paper']
    """
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


#: Largest size of a settings file in bytes: PyYAML reads about 100 KiB per second.
MOST_BYTES = 2**18
#: Errors of PyYAML and tomllib for invalid YAML or TOML, invalid dates, and too deep nesting.
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases, a few of which can expand to billions of values.

    Duplicate keys are an error, as in the YAML specification; PyYAML itself keeps the last one.
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
                        None, None, f"duplicate key {key!r}", key_node.start_mark
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
    """Convert a string that is a number: YAML 1.1 reads 1e-3 as a string."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


#: Names of settings in other libraries.
_SYNONYMS = {
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
    """Return the setting whose name is most similar to an unknown key; None if none is similar."""
    if key.lower() in _SYNONYMS:
        return _SYNONYMS[key.lower()]
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
