"""Entity names as texts to encode, for graphs that have no texts."""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import unquote

import torch

from imvia_graph.io.views import RawViews
from imvia_graph.kg import MultiViewKG

_IRI = re.compile(r"<[^\s<>]+>|[A-Za-z][A-Za-z0-9+.-]*://[^\s<>]*")
_QUALIFIED = re.compile(r"(?P<plain>.*\S)\s*\((?P<qualifier>[^()]+)\)")


def read_names(of: MultiViewKG) -> RawViews:
    """Return texts derived from the entities' display names, one or more per entity.

    The texts of a name are its forms (`forms_of`). Triples are not used.

    Parameters
    ----------
    of : MultiViewKG
        The graph, whose ``entity_names`` (display names, by default the labels) are used.

    Returns
    -------
    RawViews
        Views of the modality ``text``, for `imvia_graph.encode.encode_kg`. An entity with a blank
        name has none.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> kg = ig.MultiViewKG.from_labels(train=[("Shaan_(film)", "cast", "Sunil Dutt")])
    >>> ig.io.read_names(kg).source
    ['Shaan (film)', 'Shaan', 'film', 'Sunil Dutt']
    """
    entity: list[int] = []
    source: list[str] = []
    for number, name in enumerate(of.entity_names):
        forms = forms_of(name)
        entity += [number] * len(forms)
        source += forms
    return RawViews("text", torch.tensor(entity, dtype=torch.int64), source)


def joined(first: RawViews, second: RawViews) -> RawViews:
    """Join texts: those of ``first`` before those of ``second``, each once per entity."""
    pairs = [
        (entity, order, text)
        for order, views in enumerate((first, second))
        for entity, text in zip(views.entity.tolist(), views.source, strict=True)
    ]
    pairs.sort(key=lambda pair: pair[:2])  # stable: keeps the order within each source
    kept = list(dict.fromkeys((entity, text) for entity, _, text in pairs))
    entities = torch.tensor([entity for entity, _ in kept], dtype=torch.int64)
    return RawViews(first.modality, entities, [text for _, text in kept], repeated=first.repeated)


def forms_of(name: str) -> list[str]:
    """Return the distinct forms of a name, the whole name first.

    The forms are: the name with underscores replaced by spaces (of an IRI, its last part); the name
    without a qualifier in parentheses at its end, and the qualifier; the parts between commas; each
    of these without accents.

    >>> forms_of("http://dbpedia.org/resource/Gary,_Indiana")
    ['Gary, Indiana', 'Gary', 'Indiana']
    >>> forms_of("Amélie (2001 film)")
    ['Amélie (2001 film)', 'Amélie', '2001 film', 'Amelie (2001 film)', 'Amelie']
    """
    whole = " ".join(_readable(name).split())
    forms = [whole]
    if qualified := _QUALIFIED.fullmatch(whole):
        forms += [qualified["plain"], qualified["qualifier"]]
    plain = forms[1] if qualified else whole
    if ", " in plain:
        forms += plain.split(", ")
    forms += [_without_accents(form) for form in forms]
    return list(dict.fromkeys(form.strip() for form in forms if form.strip()))


def _readable(name: str) -> str:
    if _IRI.fullmatch(name):
        last = re.split(r"[/#]", name.strip("<>").rstrip("/#"))[-1]
        name = unquote(last) or name
    return name.replace("_", " ")


def _without_accents(text: str) -> str:
    apart = unicodedata.normalize("NFKD", text)
    bare = "".join(letter for letter in apart if not unicodedata.combining(letter))
    return unicodedata.normalize("NFC", bare)
