"""`inspect_kg` says what is true, checked against plain loops."""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean, median

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import imvia_graph as ig
from imvia_graph import inspection
from imvia_graph.cli import command_line
from imvia_graph.kg import SPLITS

ENTITIES, RELATIONS = 6, 4
rows = st.tuples(
    st.integers(0, ENTITIES - 2), st.integers(0, RELATIONS - 1), st.integers(0, ENTITIES - 2)
)
splits = st.tuples(
    st.lists(rows, min_size=1, max_size=40),
    st.lists(rows, max_size=15),
    st.lists(rows, max_size=15),
)


def graph(train, valid=(), test=(), views=None, entities=ENTITIES, relations=RELATIONS):
    parts = [torch.tensor(list(p), dtype=torch.int64).reshape(-1, 3) for p in (train, valid, test)]
    return ig.MultiViewKG(
        [f"e{i}" for i in range(entities)], [f"r{i}" for i in range(relations)], *parts, views
    )


def codes(found):
    return [warning["code"] for warning in found["warnings"]]


def run(*arguments):
    return CliRunner().invoke(command_line, ["inspect", *arguments], catch_exceptions=False)


# -- triples --------------------------------------------------------------------------------------


@given(splits)
def test_counts_are_those_of_a_loop(parts):
    found = ig.inspect_kg(graph(*parts))
    for split, part in zip(SPLITS, parts, strict=True):
        assert found["triples"][split] == {
            "triples": len(part),
            "distinct": len(set(part)),
            "repeated": len(part) - len(set(part)),
        }
    everything = [row for part in parts for row in part]
    assert found["triples"]["all"]["triples"] == len(everything)
    assert found["triples"]["all"]["distinct"] == len(set(everything))
    train, valid, test = map(set, parts)
    assert found["shared"] == {
        "train-valid": len(train & valid),
        "train-test": len(train & test),
        "valid-test": len(valid & test),
    }
    assert found["validation"]["held_out"] == len(valid - train - test)
    assert found["validation"]["auto"] == (
        "none" if not valid else "held-out" if (train | test) & valid else "published"
    )


@given(splits)
def test_degrees_and_what_train_has_not_seen_are_those_of_a_loop(parts):
    found = ig.inspect_kg(graph(*parts))
    train, valid, test = parts
    degree = Counter(entity for h, _, t in train for entity in (h, t))
    all_degrees = [degree[i] for i in range(ENTITIES)]
    assert found["degree"] == {
        "min": min(all_degrees),
        "median": median(all_degrees),
        "mean": pytest.approx(mean(all_degrees)),
        "max": max(all_degrees),
        "isolated": all_degrees.count(0),
    }
    size = Counter(r for _, r, _ in train)
    assert found["relation_size"]["max"] == max(size.values())
    assert found["relation_size"]["unseen"] == RELATIONS - len(size)
    for split, part in (("valid", valid), ("test", test)):
        assert found["unseen"][split] == {
            "triples": sum(h not in degree or t not in degree for h, _, t in part),
            "ends": sum((h not in degree) + (t not in degree) for h, _, t in part),
            "relation_triples": sum(r not in size for _, r, _ in part),
        }
    touched = {entity for part in parts for h, _, t in part for entity in (h, t)}
    assert found["unseen"]["nowhere"] == ENTITIES - len(touched)
    assert found["unseen"]["without_views"] == len(touched - degree.keys())
    loops = Counter(f"r{r}" for part in parts for h, r, t in part if h == t)
    assert found["loops"] == {"triples": loops.total(), "relations": dict(loops)}


def patterns_by_loop(parts, threshold, near, minimum):
    """The definitions of `inspect_kg`, one triple after the other."""
    train, _, test = parts
    known = {row for row in train if row[0] != row[2]}
    test = [row for row in test if row[0] != row[2]]
    pairs = defaultdict(set)
    for h, r, t in {row for part in parts for row in part if row[0] != row[2]}:
        pairs[r].add((h, t))
    listed, told = {}, defaultdict(set)
    for sort in ("symmetric", "inverse", "copy"):
        for a in sorted(pairs):
            for b in sorted(pairs):
                if a > b or (a == b) != (sort == "symmetric"):
                    continue
                turned = {(t, h) if sort != "copy" else (h, t) for h, t in pairs[b]}
                common = len(pairs[a] & turned)
                shares = (common / len(pairs[a]), common / len(pairs[b]))
                if common < minimum or max(shares) < near:
                    continue
                answered = [
                    place
                    for place, (h, r, t) in enumerate(test)
                    if r in (a, b)
                    and ((h, a + b - r, t) if sort == "copy" else (t, a + b - r, h)) in known
                ]
                told[sort].update(answered)
                kind = sort if min(shares) >= threshold else f"near-{sort}"
                listed[sort, a, b] = (kind, common, *map(pytest.approx, shares), len(answered))
    return listed, {**{s: len(told[s]) for s in told}, "any": len(set().union(*told.values()))}


def patterns_found(found):
    listed = {}
    for sort in ("symmetric", "inverse", "copy"):
        for entry in found["patterns"][sort]:
            a = int(entry["relation"][1:])
            b = int(entry.get("other", entry["relation"])[1:])
            shares = (entry["share"], entry.get("other_share", entry["share"]))
            listed[sort, a, b] = (entry["kind"], entry["pairs"], *shares, entry["test_answered"])
    told = {sort: n for sort, n in found["patterns"]["test_answered"].items() if n or sort == "any"}
    return listed, told


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
@given(parts=splits, minimum=st.integers(1, 3), near=st.sampled_from([0.2, 0.5]))
def test_patterns_are_those_of_a_loop_in_portions_of_any_size(chunk, parts, minimum, near):
    """Portions of one couple and sorted counters at 1, one portion and dense ones at the last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "CHUNK", chunk)
        found = ig.inspect_kg(graph(*parts), threshold=0.7, near=near, minimum=minimum)
    expected, told = patterns_by_loop(parts, 0.7, near, minimum)
    assert patterns_found(found)[0] == expected
    assert patterns_found(found)[1] == {s: n for s, n in told.items() if n or s == "any"}


def test_patterns_come_with_the_most_leaking_first():
    train = [(i, r, i + 1) for r in (0, 2) for i in range(0, 8, 2)]
    test = [(1, 1, 0), (1, 3, 0), (3, 3, 2), (5, 3, 4)]
    found = ig.inspect_kg(graph(train, test=test, entities=9), minimum=1, near=0.1, threshold=0.1)
    entries = found["patterns"]["inverse"]
    assert [entry["test_answered"] for entry in entries] == [3, 3, 1, 1]


@pytest.mark.parametrize("limits", [{"threshold": 1.5}, {"near": 0}, {"near": 0.9}, {"minimum": 0}])
def test_thresholds_out_of_range_are_an_error(limits):
    with pytest.raises(ig.DataError, match="expected 0 < near <= threshold"):
        ig.inspect_kg(graph([(0, 0, 1)]), **limits)


def test_the_graph_stays_as_it_is(odd_kg):
    before = {split: odd_kg.triples(split).clone() for split in SPLITS}
    features = {modality: odd_kg.views(modality)[0].clone() for modality in odd_kg.modalities}
    ig.inspect_kg(odd_kg)
    assert all(torch.equal(odd_kg.triples(split), before[split]) for split in SPLITS)
    assert all(torch.equal(odd_kg.views(name)[0], feat) for name, feat in features.items())


# -- views ----------------------------------------------------------------------------------------


def test_views_are_counted_by_entity():
    views = {"image": ig.Views(torch.rand(5, 3).double(), torch.tensor([2, 0, 2, 2, 1]))}
    found = ig.inspect_kg(graph([(0, 0, 1)], views=views))["views"]["image"]
    assert (found["views"], found["width"], found["dtype"]) == (5, 3, "float64")
    assert (found["none"], found["one"], found["many"], found["max"]) == (3, 2, 1, 3)
    assert found["median"] == 0.5
    assert found["mean"] == pytest.approx(5 / 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 5, 1 << 22])
def test_broken_features_are_found_in_every_dtype(dtype, chunk, monkeypatch):
    monkeypatch.setattr(inspection, "CHUNK", chunk)
    feat = torch.randn(12, 4).to(dtype)
    feat[:, 2] = 0.5
    feat[3] = feat[8] = feat[0]
    feat[5] = feat[4]
    feat[6], feat[7] = 0, -0.0  # equal, and so repeated
    feat[9] = 0.5
    owner = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5])
    kg = graph([(0, 0, 1)], views={"image": ig.Views(feat, owner)})
    found = ig.inspect_kg(kg)["views"]["image"]
    assert found["zero"] == 2
    assert found["constant"] == 1
    assert found["constant_columns"] == 0  # the zeros differ
    assert found["repeated"] == 2 + 1 + 1
    assert found["repeated_same_entity"] == 1  # rows 4 and 5
    assert found["most_repeated"] == {"views": 3, "entities": 3, "entity": "e0"}
    assert found["non_finite"] == 0


@given(st.lists(st.tuples(*[st.sampled_from([0.0, -0.0, 1.0, 2.0])] * 2), max_size=12))
def test_repeated_rows_are_those_of_a_loop(values):
    owner = torch.arange(len(values)) // 3
    views = {"image": ig.Views(torch.tensor(values).reshape(-1, 2), owner)}
    found = ig.inspect_kg(graph([(0, 0, 1)], views=views))["views"]["image"]
    distinct = {tuple(value + 0.0 for value in row) for row in values}
    assert found["repeated"] == len(values) - len(distinct)
    same = Counter((place // 3, row) for place, row in enumerate(values))
    assert found["repeated_same_entity"] == sum(count - 1 for count in same.values())
    columns = [len({row[i] for row in values}) == 1 for i in range(2)]
    assert found["constant_columns"] == (sum(columns) if len(values) > 1 else 0)


def test_a_column_that_never_changes_is_found():
    feat = torch.randn(5, 3)
    feat[:, 1] = 2.5
    found = ig.inspect_kg(graph([(0, 0, 1)], views={"text": ig.Views(feat, torch.arange(5))}))
    assert found["views"]["text"]["constant_columns"] == 1
    assert "constant-columns" in codes(found)


def test_features_that_went_bad_after_loading_are_found():
    views = {"image": ig.Views(torch.randn(4, 3), torch.arange(4))}
    kg = graph([(0, 0, 1)], views=views)
    kg.views("image")[0][1, 2] = torch.nan
    kg.views("image")[0][3, 0] = torch.inf
    found = ig.inspect_kg(kg)
    assert found["views"]["image"]["non_finite"] == 2
    assert "non-finite-features" in codes(found)


def test_a_modality_without_views_is_warned_of():
    views = {"image": ig.Views(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))}
    found = ig.inspect_kg(graph([(0, 0, 1)], views=views))
    assert found["views"]["image"]["most_repeated"] is None
    assert "no-views" in codes(found)


# -- warnings -------------------------------------------------------------------------------------


def test_a_graph_without_flaws_has_no_warnings():
    kg = graph([(0, 0, 1), (1, 1, 2)], [(2, 0, 0)], [(0, 1, 2)], entities=3, relations=2)
    assert codes(ig.inspect_kg(kg)) == []


@pytest.mark.parametrize(
    ("parts", "code", "says"),
    [
        (([(0, 0, 1)], [(0, 0, 1)], []), "validation-in-train", "1 of the 1 distinct"),
        (([(0, 0, 1)], [(1, 0, 0)], [(1, 0, 0)]), "validation-in-test", "choosing by test"),
        (([(0, 0, 1)], [], [(0, 0, 1)]), "test-in-train", "too good"),
        (([(0, 0, 1)] * 3, [], []), "repeated-triples", "2 in train"),
        (([(0, 0, 1)], [], [(0, 0, 2)]), "unseen-entities", "1 of 1 test triples"),
        (([(0, 0, 1)], [], [(0, 1, 1)]), "unseen-relations", "1 test triple"),
        (([(0, 0, 1)], [], []), "unused-entities", "4 entities"),
        (([(0, 0, 0)], [], []), "loops", "'r0'"),
        (([(0, 0, 1)], [], []), "no-validation", "keeps its last epoch"),
        (([(0, 0, 1)], [], []), "no-test", "no test set"),
    ],
)
def test_each_flaw_has_its_warning(parts, code, says):
    found = ig.inspect_kg(graph(*parts))
    [text] = [warning["text"] for warning in found["warnings"] if warning["code"] == code]
    assert says in text


@pytest.mark.parametrize(
    ("valid", "test", "code"),
    [
        ([], [], "no-validation"),
        ([(0, 0, 1)], [], "validation-in-train"),
        ([(9, 0, 0)], [(9, 0, 0)], "validation-in-test"),
    ],
)
def test_held_out_validation_is_advised_only_where_a_triple_can_be_held_out(valid, test, code):
    star = [(0, 0, i) for i in range(1, 40)]
    clique = [(i, 0, j) for i in range(10) for j in range(10) if i < j]
    for train, advised in ((star, False), (clique, True)):
        found = ig.inspect_kg(graph(train, valid, test, entities=50))
        [text] = [warning["text"] for warning in found["warnings"] if warning["code"] == code]
        assert ("--validation held-out" in text) is advised
        kg = graph(train, valid, test, entities=50)
        if advised:
            assert len(ig.load_kg(kg, "held-out").valid)
        else:
            assert "Give a validation set of other triples" in text
            with pytest.raises(ig.DataError, match="no training triple can be held out"):
                ig.load_kg(kg, "held-out")


@pytest.mark.parametrize(
    ("columns", "labels", "warned"),
    [
        ((1, 0, 2), "abcd", True),
        ((0, 1, 2), "abcd", False),
        ((1, 0, 2), "1234", False),  # ids, of entities and of relations
    ],
)
def test_columns_in_another_order_are_noticed_by_their_labels(columns, labels, warned, tmp_path):
    rows = [(labels[i], f"r{i % 2}", labels[j]) for i in range(4) for j in range(4) if i != j]
    lines = ["\t".join(row[column] for column in columns) for row in rows]
    path = tmp_path / "facts.tsv"
    path.write_text("".join(f"{line}\n" for line in lines))
    found = ig.inspect_kg(ig.load_kg(path, split=False))
    assert ("relations-are-entities" in codes(found)) == warned
    if warned:
        [text] = [w["text"] for w in found["warnings"] if w["code"] == "relations-are-entities"]
        assert "4 of 4 relations have the label of an entity" in text
        assert "--columns" in text


@pytest.mark.parametrize(
    ("test", "code"),
    [
        ((3, 1, 2), "inverse-relations"),
        ((2, 2, 3), "copied-relations"),
        ((1, 3, 0), "symmetric-relations"),
    ],
)
def test_each_kind_of_leak_has_its_warning(test, code):
    train = [(0, 0, 1), (2, 0, 3), (4, 0, 5), (1, 1, 0), (5, 1, 4), (0, 2, 1), (4, 2, 5)]
    train += [(0, 3, 1), (2, 3, 3), (3, 3, 2)]
    found = ig.inspect_kg(graph(train, test=[test]))
    assert code in codes(found)
    told = {code: n for code, n in found["patterns"]["test_answered"].items() if code != "any"}
    assert found["patterns"]["test_answered"]["any"] == 1 <= sum(told.values())


# -- the published benchmarks ---------------------------------------------------------------------

#: Entities, relations, triples, unseen test triples, unseen ends of test triples.
PUBLISHED = {
    "DB15K": (12842, 279, (79222, 9904, 9902), 77, 77),
    "MKG-W": (15000, 169, (34196, 4276, 4274), 306, 325),
    "MKG-Y": (15000, 28, (21310, 2665, 2663), 388, 424),
}


def published(name):
    folder = os.environ.get("IMVIA_DATA")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"IMVIA_DATA names no folder with {name}")
    return Path(folder) / name


def lines_of(folder, split):
    """(head, relation, tail) ids, read without the library."""
    lines = (folder / f"{split}2id.txt").read_text().splitlines()[1:]
    return [(int(h), int(r), int(t)) for h, t, r in map(str.split, lines)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_said_of_a_published_benchmark_is_true(name):
    folder = published(name)
    entities, relations, sizes, unseen_triples, unseen_ends = PUBLISHED[name]
    parts = [lines_of(folder, split) for split in SPLITS]
    train, valid, test = parts
    seen = {entity for h, _, t in train for entity in (h, t)}
    assert tuple(map(len, parts)) == sizes
    assert sum(h not in seen or t not in seen for h, _, t in test) == unseen_triples
    assert sum((h not in seen) + (t not in seen) for h, _, t in test) == unseen_ends

    kg = ig.load_kg(folder, validation="published")
    found = ig.inspect_kg(kg)
    assert (found["entities"], found["relations"]) == (entities, relations)
    assert tuple(found["triples"][split]["triples"] for split in SPLITS) == sizes
    distinct = tuple(len(set(part)) for part in parts)
    assert tuple(found["triples"][split]["distinct"] for split in SPLITS) == distinct
    assert found["unseen"]["test"]["triples"] == unseen_triples
    assert found["unseen"]["test"]["ends"] == unseen_ends
    assert found["unseen"]["entities"] == entities - len(seen)
    assert found["validation"]["in_train"] == len(set(valid) & set(train))
    assert found["validation"]["in_test"] == len(set(valid) & set(test))
    assert found["validation"]["held_out"] == len(set(valid) - set(train) - set(test))
    limits = found["patterns"]["thresholds"]
    expected, told = patterns_by_loop(parts, **limits)
    place = {
        label: i for i, label in enumerate(ig.load_kg(folder, validation="published").relations)
    }
    for sort in ("symmetric", "inverse", "copy"):
        for entry in found["patterns"][sort]:
            entry["relation"] = f"r{place[entry['relation']]}"
            if "other" in entry:
                entry["other"] = f"r{place[entry['other']]}"
    assert patterns_found(found)[0] == expected
    assert found["patterns"]["test_answered"] == {
        **dict.fromkeys(("symmetric", "inverse", "copy"), 0), **told,
    }  # fmt: skip


def test_the_broken_validation_set_of_db15k_is_told():
    folder = published("DB15K")
    printed = run(str(folder), "--json")
    found = json.loads(printed.stdout)
    assert found["validation"] == {
        "distinct": 7481,
        "in_train": 6584,
        "in_test": 824,
        "held_out": 73,
        "auto": "held-out",
        "why": "it shares triples with train or test; auto sets it aside",
    }
    assert found["triples"]["valid"] == {"triples": 9904, "distinct": 7481, "repeated": 2423}
    assert codes(found)[0] == "validation-in-train"
    table = run(str(folder)).stdout
    for number in (
        "12,842",
        "279",
        "79,222",
        "9,904",
        "9,902",
        "7,481",
        "6,584",
        "824",
        "73",
        "77",
    ):
        assert number in table


# -- the command ----------------------------------------------------------------------------------


def test_the_table_shows_names_sizes_views_and_warnings(tmp_path):
    kg = ig.MultiViewKG.from_labels(
        [(f"[b]{i}", "p1", f"c{i}") for i in range(4)],
        test=[("c0", "p2", "[b]0"), ("c1", "p2", "[b]1"), ("c2", "p2", "[b]2")],
        views={"видео": (torch.zeros(2, 3), ["c0", "c1"])},
        relation_names=["parent of", "child [of]"],
    )
    folder = kg.save(tmp_path / "family")
    result = run(str(folder))
    assert result.exit_code == 0
    for text in (
        "family: 8 entities, 2 relations",
        "parent of",
        "and child [of]",
        "видео",
        "zeros",
    ):
        assert text in result.stdout
    assert "parent of" not in run(str(folder), "--patterns", "0").stdout.split("warnings:")[0]


def test_ready_features_are_looked_at_too(tmp_path):
    folder = graph([(0, 0, 1)], entities=2).save(tmp_path / "kg")
    np.save(tmp_path / "image.npy", np.eye(2, 5, dtype=np.float32))
    found = json.loads(run(str(folder), "--json", "--views", f"image={tmp_path}/image.npy").stdout)
    image = found["views"]["image"]
    assert (image["views"], image["width"], image["constant_columns"]) == (2, 5, 3)


def test_json_is_one_object_of_plain_values(tmp_path, odd_kg):
    folder = odd_kg.save(tmp_path / "odd")
    result = run(str(folder), "--json")
    found = json.loads(result.stdout)
    assert found == ig.inspect_kg(ig.load_kg(folder, validation="published"))
    assert list(found["views"]) == odd_kg.modalities


def test_validation_is_as_published_unless_asked_otherwise(tmp_path):
    ring = [(i, 0, (i + 1) % 30) for i in range(30)] + [(i, 0, (i + 7) % 30) for i in range(30)]
    folder = graph(ring, valid=ring[:5], entities=30, relations=1).save(tmp_path / "ring")
    published = json.loads(run(str(folder), "--json").stdout)
    assert published["validation"]["auto"] == "held-out"
    auto = json.loads(run(str(folder), "--json", "--validation", "auto").stdout)
    assert auto["validation"]["in_train"] == 0
    assert "set aside" in auto["notes"][0]


def test_countries_has_nothing_grave():
    found = json.loads(run("countries", "--json").stdout)
    assert set(codes(found)) <= {"repeated-features", "constant-columns"}
    [borders] = found["patterns"]["symmetric"]
    assert (borders["relation"], borders["share"], borders["test_answered"]) == ("borders", 1.0, 0)
