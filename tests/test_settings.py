"""Settings: one list, reachable by YAML, TOML, --set and keywords, and errors that help."""

import pytest
import torch
import yaml
from click.testing import CliRunner
from pydantic import ValidationError

from imvia_graph import DataError, Settings, SettingsError
from imvia_graph.cli.settings import settings as settings_command
from imvia_graph.settings import presets

#: For every setting a value other than its default.
OTHER = {
    "validation": "held-out",
    "hold_out_by": "triple",
    "split_seed": 3,
    "modalities": ["image", "a b: c"],
    "scale_views": False,
    "dim": 48,
    "relation_dim": 24,
    "structure": False,
    "joint": False,
    "gate": "entity",
    "residual": False,
    "relation_residual": False,
    "complex_head": True,
    "complex_rank": 12,
    "complex_weight": 0.3,
    "candidates": "relation",
    "decision": "mean",
    "backend": "reference",
    "batch_norm": True,
    "input_dropout": 0.25,
    "relation_dropout": 0.125,
    "hidden_dropout": 0.35,
    "regime": "kvsall",
    "loss": "binary",
    "label_smoothing": 0.2,
    "negative_sampling": "degree",
    "negatives": 17,
    "lambda_information": 1e-6,
    "lambda_alignment": 0.25,
    "lambda_completion": 2.5,
    "lambda_regularization": 0.25,
    "lambda_n3": 0.2,
    "lambda_relation": 0.75,
    "alignment": "printed",
    "temperature": 0.5,
    "information_dim": 12,
    "information_learning_rate": 2e-3,
    "epochs": 7,
    "batch_size": 33,
    "optimizer": "adagrad",
    "table_optimizer": "adamw",
    "entity_optimizer": "dense",
    "learning_rate": 3e-5,
    "table_learning_rate": 0.25,
    "schedule": "cosine",
    "ema_decay": 0.75,
    "weight_decay": 1e-7,
    "gradient_clip": 1.5,
    "validate_every": 4,
    "ranking_candidates": 500,
    "patience": 3,
    "checkpoint_every": 2,
    "seed": 11,
    "non_finite": "skip",
    "disk_full": "continue",
    "device": "cpu",
    "precision": "float16",
    "views_on": "host",
    "cuda_graph": False,
    "ranking_batch_size": 99,
}
KEYS = list(Settings.model_fields)


def toml(key, value):
    """A line of TOML."""
    if isinstance(value, bool):
        return f"{key} = {str(value).lower()}\n"
    if isinstance(value, list):
        return f"{key} = [{', '.join(map(repr, value))}]\n"
    return f"{key} = {value!r}\n"


def test_every_setting_is_tried_here_with_a_value_other_than_its_default():
    assert list(OTHER) == KEYS
    assert [key for key in KEYS if getattr(Settings(), key) == OTHER[key]] == []


@pytest.mark.parametrize("key", KEYS)
def test_every_setting_is_reached_by_yaml_toml_set_and_keyword(key, tmp_path):
    value = OTHER[key]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({key: value}))
    (tmp_path / "s.yml").write_text(f"{key}: {value!r}")
    (tmp_path / "s.toml").write_text(toml(key, value))
    expected = Settings.create({key: value})
    assert getattr(expected, key) == value
    for name in ("s.yaml", "s.yml", "s.toml"):
        assert Settings.create(Settings.read(tmp_path / name)) == expected, name
    assert Settings.create(Settings.parse([f"{key}={value}"])) == expected
    assert Settings().replace(**{key: value}) == expected


@pytest.mark.parametrize("key", KEYS)
def test_every_setting_says_what_it_is_for(key):
    assert len(Settings.model_fields[key].description or "") > 5


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3", "+1e-3", ".001"])
def test_any_way_to_write_a_number_works_in_yaml_and_set(text, tmp_path):
    (tmp_path / "s.yaml").write_text(f"learning_rate: {text}\ngradient_clip: {text}\n")
    from_file = Settings.create(Settings.read(tmp_path / "s.yaml"))
    parsed = Settings.create(Settings.parse([f"learning_rate={text}", f"gradient_clip={text}"]))
    for settings in (from_file, parsed):
        assert settings.learning_rate == 0.001
        assert settings.gradient_clip == 0.001


@pytest.mark.parametrize("key", ["modalities", "gradient_clip", "patience"])
def test_null_is_a_value_of_settings_that_may_be_none(key):
    assert getattr(Settings.create({key: OTHER[key]}, Settings.parse([f"{key}=null"])), key) is None


def test_an_empty_list_of_modalities_is_not_null():
    assert Settings.create(Settings.parse(["modalities=[]"])).modalities == []


def test_set_keeps_what_follows_the_first_equals_sign_and_the_last_assignment_counts():
    assert Settings.parse(["device=a=b"]) == {"device": "a=b"}
    assert Settings.parse(["dim=1", " dim = 2"]) == {"dim": 2}
    assert Settings.parse(["device=cuda:0"]) == {"device": "cuda:0"}


def test_later_layers_go_over_earlier_ones_over_the_defaults():
    settings = Settings.create({"dim": 1, "seed": 2}, {"dim": 3})
    assert (settings.dim, settings.seed, settings.epochs) == (3, 2, Settings().epochs)


@pytest.mark.parametrize("comments", [False, True])
@pytest.mark.parametrize("values", [{}, OTHER], ids=["defaults", "others"])
def test_settings_written_as_yaml_read_back_the_same(values, comments, tmp_path):
    settings = Settings.create(values)
    text = settings.to_yaml(comments=comments)
    path = tmp_path / "s.yaml"
    path.write_text(text, encoding="utf-8")
    assert Settings.create(Settings.read(path)) == settings
    assert list(yaml.safe_load(text)) == KEYS
    assert ("#" in text) == (comments or "#" in str(values))


def test_yaml_with_comments_says_of_every_key_what_it_is_for():
    text = Settings().to_yaml(comments=True)
    for key, field in Settings.model_fields.items():
        assert f"# {field.description}\n{key}:" in text


def test_the_settings_command_prints_a_file_that_reads_back_to_the_defaults(tmp_path):
    done = CliRunner().invoke(settings_command)
    assert done.exit_code == 0
    path = tmp_path / "s.yaml"
    path.write_text(done.stdout, encoding="utf-8")
    values = Settings.read(path)
    assert list(values) == KEYS
    assert Settings.create(values) == Settings()


def test_the_settings_of_the_paper_are_those_it_gives():
    paper = Settings.of("paper")
    said = {"dim": 256, "batch_size": 1024, "epochs": 2000, "learning_rate": 1e-3}
    assert paper.model_dump(include=set(said)) == said
    assert (paper.loss, paper.regime, paper.candidates, paper.alignment) == (
        "binary",
        "kvsall",
        "relation",
        "printed",
    )
    assert {paper.lambda_information, paper.lambda_alignment, paper.lambda_completion} == {1.0}
    ours = ("residual", "relation_residual", "complex_head", "lambda_regularization")
    assert not any(getattr(paper, name) for name in ours)
    # What it names differs from the defaults, or is said by the paper.
    default = Settings()
    same = [key for key, value in Settings.read("paper").items() if getattr(default, key) == value]
    assert set(same) <= {*said, "lambda_completion"}


@pytest.mark.parametrize("name", presets())
def test_settings_that_come_with_the_package_are_printed_and_read_by_name(name, tmp_path):
    done = CliRunner().invoke(settings_command, [name])
    (tmp_path / "s.yaml").write_text(done.stdout, encoding="utf-8")
    assert Settings.of(tmp_path / "s.yaml") == Settings.of(name) != Settings()


def test_a_file_goes_before_settings_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper").write_text("dim: 3")
    with pytest.raises(SettingsError, match=r"paper: expected a \.yaml, \.yml or \.toml file"):
        Settings.read("paper")


def test_settings_of_what_a_caller_has():
    some = Settings.create({"dim": 3})
    assert Settings.of(None) == Settings()
    assert Settings.of(some) is some
    assert Settings.of({"dim": 3}) == some
    with pytest.raises(SettingsError, match=r"expected Settings, a mapping.*received 3"):
        Settings.of(3)


def test_a_name_that_is_neither_a_file_nor_among_the_presets_says_what_is():
    with pytest.raises(SettingsError, match=r"papre is neither a file nor among .*: paper"):
        Settings.read("papre")


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(ValidationError, match="frozen"):
        Settings().dim = 3


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("dimm", "dim"),
        ("learningrate", "learning_rate"),
        ("batchsize", "batch_size"),
        ("optimiser", "optimizer"),
        ("Epochs", "epochs"),
        ("dmi", "dim"),
        ("lr", "learning_rate"),
        ("embedding_dim", "dim"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_known_one(typo, meant):
    with pytest.raises(SettingsError, match=f"no setting '{typo}'; did you mean '{meant}'"):
        Settings.create({typo: 1})
    with pytest.raises(SettingsError, match=f"'{meant}'"):
        Settings().replace(**{typo: 1})


def test_an_unknown_setting_like_no_other_points_to_the_list():
    with pytest.raises(SettingsError, match=r"'zzz'\. `imvia-graph settings` lists them all"):
        Settings.create({"zzz": 1})


WRONG = [
    ("regime", "2vsall", r"'1vsall', 'kvsall' or 'sampled'.*'2vsall'"),
    ("loss", "mse", r"'softmax' or 'binary'.*'mse'"),
    ("candidates", "all", r"'shared' or 'relation'"),
    ("decision", "max", r"'trained', 'detached' or 'mean'"),
    ("validation", "none", r"'auto', 'published' or 'held-out'"),
    ("optimizer", "sgd", r"'adam', 'adamw' or 'adagrad'"),
    ("precision", "float64", r"'float64'"),
    ("alignment", "clip", r"'contrastive' or 'printed'"),
    ("backend", "cuda", r"'cuda'"),
    ("dim", 0, r"greater than or equal to 1.*received 0"),
    ("dim", 6.5, r"integer.*6\.5"),
    ("dim", "wide", r"integer.*'wide'"),
    ("dim", None, r"integer.*None"),
    ("dim", True, r"expected no boolean.*; received True"),
    ("learning_rate", False, r"expected no boolean"),
    ("patience", True, r"expected no boolean"),
    ("joint", "maybe", r"boolean.*'maybe'"),
    ("hidden_dropout", 1, r"less than 1"),
    ("hidden_dropout", -0.1, r"greater than or equal to 0"),
    ("learning_rate", 0, r"greater than 0"),
    ("learning_rate", "fast", r"number.*'fast'"),
    ("learning_rate", float("nan"), r"nan"),
    ("learning_rate", float("inf"), r"inf"),
    ("lambda_completion", 0, r"greater than 0"),
    ("epochs", -1, r"greater than or equal to 0"),
    ("patience", 0, r"greater than or equal to 1"),
    ("seed", -1, r"greater than or equal to 0"),
    ("seed", 2**64, r"less than 18446744073709551616"),
    ("split_seed", 2**64, r"less than 18446744073709551616"),
    ("modalities", "text", r"list.*'text'"),
    ("modalities", ["text", "image", "text"], r"each modality once, found 'text' more often"),
    ("device", 0, r"string.*0"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_value_that_a_setting_cannot_take_is_refused_by_name(key, value, message):
    with pytest.raises(SettingsError, match=f"Setting {key}: .*{message}"):
        Settings.create({key: value})


def test_the_largest_seed_is_one_that_torch_takes():
    for key in ("seed", "split_seed"):
        largest = getattr(Settings.create({key: 2**64 - 1}), key)
        assert torch.Generator().manual_seed(largest).initial_seed() == largest


def test_several_mistakes_are_told_at_once():
    with pytest.raises(SettingsError, match=r"Setting dim: .*Setting loss: .*'dimm'"):
        Settings.create({"dim": 0, "loss": "x", "dimm": 1})


FILES = {
    "an unknown key": ("s.yaml", "dimm: 3", SettingsError, r"s\.yaml: .*did you mean 'dim'"),
    "an unknown key in TOML": ("s.toml", "dimm = 3", SettingsError, "did you mean 'dim'"),
    "a wrong value": ("s.yaml", "dim: x", SettingsError, r"s\.yaml: Setting dim"),
    "a list": ("s.yaml", "- dim", SettingsError, r"s\.yaml: expected a mapping"),
    "a text": ("s.yaml", "dim", SettingsError, r"s\.yaml: expected a mapping"),
    "no YAML": ("s.yaml", "dim: [", SettingsError, r"s\.yaml cannot be read"),
    "no TOML": ("s.toml", "dim = ", SettingsError, r"s\.toml cannot be read"),
    "no UTF-8": ("s.yaml", b"device: \xe9", SettingsError, r"s\.yaml cannot be read"),
    "another kind of file": ("s.json", "{}", SettingsError, r"s\.json: expected a \.yaml"),
    "a number for a key": ("s.yaml", "1: 2", SettingsError, "1"),
    "a key that stands twice": (
        "s.yaml",
        "dim: 3\nloss: binary\ndim: 4\n",
        SettingsError,
        r"duplicate key 'dim'.*line 3",
    ),
    "a nested mapping": ("s.yaml", "model:\n  dim: 3", SettingsError, "no setting 'model'"),
}


@pytest.mark.parametrize(("name", "content", "kind", "message"), FILES.values(), ids=FILES)
def test_a_settings_file_that_is_wrong_says_what_is(name, content, kind, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind, match=f"(?s){message}"):
        Settings.read(path)


def test_of_several_files_later_ones_go_over_earlier_ones(tmp_path):
    (tmp_path / "one.yaml").write_text("dim: 3\nepochs: 4\n")
    (tmp_path / "two.toml").write_text("dim = 5\n")
    files = ["paper", tmp_path / "one.yaml", tmp_path / "two.toml"]
    merged = Settings.read_all(files)
    assert (merged["dim"], merged["epochs"], merged["loss"]) == (5, 4, "binary")
    assert Settings.read_all([]) == {}


def test_a_settings_file_that_is_missing_says_so(tmp_path):
    with pytest.raises((DataError, SettingsError), match=r"none\.yaml cannot be read: No such"):
        Settings.read(tmp_path / "none.yaml")


@pytest.mark.parametrize(("name", "content"), [("s.yaml", ""), ("s.yaml", "# x\n"), ("s.toml", "")])
def test_an_empty_settings_file_changes_nothing(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert Settings.read(tmp_path / name) == {}


@pytest.mark.parametrize("text", ["dim", "", "dim:3"])
def test_an_assignment_without_an_equals_sign_says_what_is_expected(text):
    with pytest.raises(SettingsError, match=f"--set {text}: expected key=value"):
        Settings.parse([text])


def test_an_assignment_that_is_no_yaml_says_which():
    with pytest.raises(SettingsError, match=r"--set dim=\[1: the value cannot be read"):
        Settings.parse(["dim=[1"])
