"""Texts from names: their forms, whose they are, and that no triple is in them."""

import re
import unicodedata

import pytest
import torch
from click.testing import CliRunner
from helpers import ring_kg, write_folder

import imvia_graph as ig
from imvia_graph.cli import command_line
from imvia_graph.encode import encode as encoding
from imvia_graph.io.names import forms_of, joined
from imvia_graph.io.views import RawViews

NAMES = [
    "Shaan_(film)",
    "Amélie (2001 film)",
    "Gary, Indiana",
    "Washington, D.C. (city)",
    "http://dbpedia.org/resource/Tromsø_(city)",
    "<http://dbpedia.org/resource/AC%2FDC>",
    "http://www.wikidata.org/entity/Q42",
    "Re:Zero/Ani",
    "AC/DC",
    "(untitled)",
    "大阪市",
    "Foo (bar (baz))",
    "  two   spaces ",
]


# -- forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("Paris", ["Paris"]),
        ("Shaan_(film)", ["Shaan (film)", "Shaan", "film"]),
        ("Gary, Indiana", ["Gary, Indiana", "Gary", "Indiana"]),
        (
            "Washington, D.C. (city)",
            ["Washington, D.C. (city)", "Washington, D.C.", "city", "Washington", "D.C."],
        ),
        ("Ōsaka", ["Ōsaka", "Osaka"]),
        ("大阪市", ["大阪市"]),
        ("http://dbpedia.org/resource/Gary,_Indiana", ["Gary, Indiana", "Gary", "Indiana"]),
        ("<http://dbpedia.org/resource/AC%2FDC>", ["AC/DC"]),
        ("http://example.org/onto#Person/", ["Person"]),
        ("AC/DC", ["AC/DC"]),
        ("Re:Zero/Ani", ["Re:Zero/Ani"]),
        ("(untitled)", ["(untitled)"]),
        ("Foo (bar (baz))", ["Foo (bar (baz))"]),
        ("  two   spaces ", ["two spaces"]),
        ("a_b", ["a b"]),
        ("", []),
        (" _ ", []),
    ],
)
def test_the_forms_of_a_name(name, forms):
    assert forms_of(name) == forms


def words(text):
    bare = unicodedata.normalize("NFKD", text.replace("_", " ").replace("%2F", "/"))
    return set(re.findall(r"\w+", "".join(c for c in bare if not unicodedata.combining(c))))


@pytest.mark.parametrize("name", NAMES)
def test_a_form_says_nothing_that_the_name_does_not_say(name):
    forms = forms_of(name)
    assert forms
    assert len(set(forms)) == len(forms)
    for form in forms:
        assert words(form) <= words(name), form
        assert form == " ".join(form.split())


# -- whose they are -------------------------------------------------------------------------------


def named(names, **options):
    return ring_kg(len(names), views=False, entity_names=list(names), **options)


def test_texts_are_sorted_by_entity_and_an_entity_without_a_name_has_none():
    raw = ig.io.read_names(named(["Shaan (film)", "Paris", " ", "Gary, Indiana"]))
    assert raw.modality == "text"
    assert raw.source == [
        "Shaan (film)",
        "Shaan",
        "film",
        "Paris",
        "Gary, Indiana",
        "Gary",
        "Indiana",
    ]
    assert raw.entity.tolist() == [0, 0, 0, 1, 3, 3, 3]
    assert raw.entity.dtype == torch.int64


def test_names_hold_no_triple():
    """Graphs of the same entities and other triples, or hardly any, give the same texts."""
    kg = named(NAMES)
    shuffled = torch.stack([kg.train[:, 2], kg.train[:, 1], kg.train[:, 0]], dim=1)
    others = [
        kg.replace(train=shuffled, valid=kg.train[:2], test=kg.train[2:]),
        kg.replace(train=kg.train[:1], valid=kg.train[:0], test=kg.train[:0]),
        kg.replace(relations=["other", "names"], relation_names=["other", "names"]),
    ]
    raw = ig.io.read_names(kg)
    for other in others:
        found = ig.io.read_names(other)
        assert found.source == raw.source
        assert torch.equal(found.entity, raw.entity)


def test_an_entity_s_texts_do_not_depend_on_the_names_of_others():
    raw = ig.io.read_names(named(NAMES))
    for i, name in enumerate(NAMES):
        mine = [text for of, text in zip(raw.entity.tolist(), raw.source, strict=True) if of == i]
        assert mine == forms_of(name)


def test_texts_and_names_together_are_sorted_and_none_is_there_twice():
    texts = RawViews("text", torch.tensor([0, 1, 1]), ["a film", "Paris", "a city"], repeated=2)
    both = joined(texts, ig.io.read_names(named(["Shaan", "Paris", "Rome", "Oslo"])))
    assert both.source == ["a film", "Shaan", "Paris", "a city", "Rome", "Oslo"]
    assert both.entity.tolist() == [0, 0, 1, 1, 2, 3]
    assert both.repeated == 2


# -- the command ----------------------------------------------------------------------------------


class Lengths(ig.encode.Encoder):
    """Texts as their lengths."""

    name, modality, width, identity = "lengths", "text", 2, "lengths-1"

    def prepare(self, source):
        return source

    def encode(self, batch):
        return torch.tensor([[float(len(text)), 1.0] for text in batch])


@pytest.fixture
def encode(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encoding, "get_encoder", lambda *args, **options: Lengths())
    named(["Shaan_(film)", "Été", "Rome", "Oslo"]).save("kg")

    def run(*arguments, status=0):
        result = CliRunner().invoke(command_line, ["encode", "kg", "--out", "out", *arguments])
        assert result.exit_code == status, result.output
        return ig.load_kg("out", "published") if not status else result.output

    return run


def test_encode_names_writes_views_of_every_form(encode):
    kg = encode("--names", "--text-encoder", "lengths")
    assert kg.view_sources("text") == [
        "Shaan (film)",
        "Shaan",
        "film",
        "Été",
        "Ete",
        "Rome",
        "Oslo",
    ]
    feat, ptr = kg.views("text")
    assert ptr.tolist() == [0, 3, 5, 6, 7]
    assert feat[:3, 0].tolist() == [12.0, 5.0, 4.0]
    assert [len(kg.triples(split)) for split in ("train", "valid", "test")] == [2, 3, 3]


def test_encode_names_goes_beside_texts(encode, tmp_path):
    write_folder(tmp_path, {"texts.tsv": "entity\ttext\ne2\tRome\ne2\tan old city\n"})
    kg = encode("--names", "--texts", "texts.tsv", "--text-encoder", "lengths")
    assert kg.view_sources("text")[5:] == ["Rome", "an old city", "Oslo"]
    assert kg.views("text")[1].tolist() == [0, 3, 5, 7, 8]


def test_encode_without_anything_to_encode_names_the_option(encode):
    assert "--names" in encode("--text-encoder", "lengths", status=2)
