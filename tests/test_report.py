"""The report: its numbers are the library's, it stands alone, and no name does harm in it."""

import json
import os
import re
import statistics
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from helpers import ring_kg, settings
from test_explore import ODD

import imvia_graph as ig
from imvia_graph._display import folded, shown
from imvia_graph.cli import command_line
from imvia_graph.evaluation import rank
from imvia_graph.inference import decision_weights, view_weights

pytest.importorskip("matplotlib", reason="the extra report is not installed")
pytest.importorskip("jinja2", reason="the extra report is not installed")


class Page(HTMLParser):
    """Tables by caption as rows of cells, all tags with attributes, texts of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.scripts = {}, [], []
        self.row, self.cell, self.caption, self.inside = None, None, "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside.append(tag)
        if tag == "table":
            self.rows, self.caption = [], ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self.tables.setdefault(" ".join(self.caption.split()), []).append(self.rows)
        while self.inside and self.inside.pop() != tag:
            pass  # img, meta and the like have no end

    def handle_data(self, data):
        if "caption" in self.inside:
            self.caption += data
        elif "script" in self.inside:
            self.scripts.append(data)
        elif ("td" in self.inside or "th" in self.inside) and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()

    def only(self, part):
        """The one table with a part of a caption."""
        [[rows]] = [tables for caption, tables in self.tables.items() if part in caption]
        return rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one graph, with other heads."""
    folder = tmp_path_factory.mktemp("runs")
    first = ig.fit(ring_kg(), out=folder / "first", settings=settings(epochs=3))
    second = ig.fit(ring_kg(), out=folder / "second", settings=settings(modalities=["text"]))
    return first, second


@pytest.fixture(scope="module")
def text(runs, tmp_path_factory):
    path = ig.write_report(runs, tmp_path_factory.mktemp("report") / "report.html")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_its_metrics_are_those_of_evaluate(runs, page):
    expected = [run.evaluate("test") for run in runs]
    for metrics in expected:
        assert metrics.pop("candidates").startswith("all ")
    told = json.loads(page.scripts[0])
    assert [told[name]["metrics"] for name in ("first", "second")] == expected
    [rows] = page.tables["Metrics of the decision and of each head"]
    by_row = {(row[0], row[1]): row[2:] for row in rows[1:]}
    first, second = (metrics["both"] for metrics in expected)
    mine = by_row["decision, both sides", "second"]
    assert mine[0] == f"{100 * second['mrr']:.2f}"
    assert mine[1] == f"{100 * (second['mrr'] - first['mrr']):+.2f}"
    assert mine[6] == f"{100 * second['hits@10']:.2f}"
    assert mine[-2:] == [f"{second['mr']:.1f}", f"{second['mr'] - first['mr']:+.1f}"]
    assert by_row["decision, both sides", "first"][1] == ""
    text_head = by_row["text head", "first"][0]
    assert text_head == f"{100 * expected[0]['heads']['text']['mrr']:.2f}"
    assert ("image head", "first") in by_row
    assert ("image head", "second") not in by_row


def test_runs_that_differ_in_the_seed_alone_have_a_mean_and_a_deviation(runs, page, tmp_path):
    assert not any("seeds" in caption for caption in page.tables)  # other heads, the same seed
    seeds = [ig.fit(ring_kg(), settings=settings(epochs=1, seed=seed)) for seed in (1, 2, 3)]
    path = ig.write_report([*seeds, runs[1]], tmp_path / "seeds.html")
    rows = Page(path.read_text(encoding="utf-8")).only("± standard deviation over 3 seeds")
    assert rows[0][:2] == ["ranked by", "MRR %"]
    metrics = [run.evaluate("test")["heads"]["text"] for run in seeds]
    values = [100 * metric["mrr"] for metric in metrics]
    [row] = [row for row in rows if row[0] == "text head"]
    assert row[1] == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    ranks = [metric["mr"] for metric in metrics]
    assert row[-1] == f"{statistics.mean(ranks):.1f} ± {statistics.stdev(ranks):.1f}"


def test_its_numbers_by_relation_and_side_are_those_of_evaluate(runs, page):
    metrics = runs[0].evaluate("test")["relations"]
    found = page.only("by relation;")
    mine = {row[0]: row for row in found[1:] if row[1] == "first"}
    assert mine.keys() == metrics.keys()
    ranking = rank(runs[0].model, runs[0].kg.test, runs[0].kg.answers())
    for name, row in mine.items():
        of = ranking.triples[:, 1] == runs[0].kg.id_of(name, "relation")
        assert row[2] == str(metrics[name]["triples"])
        assert row[3] == f"{100 * metrics[name]['mrr']:.2f}"
        for place, side in ((4, ranking.head), (5, ranking.tail)):
            mrr = side["decision"][of].reciprocal().mean().item()
            assert row[place] == f"{100 * mrr:.2f}"
        assert row[6] == f"{100 * metrics[name]['hits@1']:.2f}"


def test_answers_are_grouped_by_the_triples_that_they_are_trained_in(runs, page):
    kg = runs[0].kg
    degree = torch.bincount(kg.train[:, [0, 2]].flatten(), minlength=kg.num_entities)
    right = degree[kg.test[:, [0, 2]].flatten()]
    [rows] = page.tables["Metrics by degree"]
    mine = {row[0]: int(row[2]) for row in rows[1:] if row[1] == "first"}
    groups = {"0": (0, 0), "1 to 2": (1, 2), "3 to 5": (3, 5), "6 to 10": (6, 10)}
    expected = {
        label: int(((right >= low) & (right <= high)).sum())
        for label, (low, high) in groups.items()
    }
    assert mine == {label: count for label, count in expected.items() if count}


def test_its_weights_are_the_models(runs, page):
    tables = page.tables["Weights in per cent"]
    for run, rows in zip(runs, tables, strict=True):
        for name, asked, *shares in rows[1:]:
            relation = run.kg.id_of(name, "relation")
            weights = decision_weights(
                run.model, relation + (run.kg.num_relations if asked == "heads" else 0)
            )
            assert shares == [f"{100 * weight:.1f}" for weight in weights.values()]


def test_its_answers_have_the_ranks_of_explain_and_the_first_of_predict(runs, page):
    run = runs[0]
    for kind in ("Best", "Worst"):
        rows = page.only(f"{kind} answers of first")
        assert rows[0][3:8] == run.model.heads
        for asked, right, found, *ranks, first in rows[1:]:
            head, relation, tail = asked.strip("()").split(",")
            side = "tail" if tail.strip() == "?" else "head"
            names = {"head": head.strip(), "relation": relation.strip(), "tail": tail.strip()}
            explained = run.explain(**{**names, side: right}).judgements[side]
            assert float(found) == explained["decision"].rank
            assert [float(r) for r in ranks] == [explained[h].rank for h in run.model.heads]
            names.pop(side)
            assert first == run.predict(k=1, **names)[0].name


def test_the_gallery_has_the_views_weights(runs, page):
    model, kg = runs[0].model, runs[0].kg
    assert page.tables["image"]
    assert page.tables["text"]
    found = 0
    for modality in ("image", "text"):
        for rows in page.tables[modality]:
            plain = [row[1] for row in rows[1:]]
            owners = [
                entity
                for entity in range(kg.num_entities)
                if [f"{100 * w:.1f}" for w in view_weights(model, entity)[modality].tolist()]
                == plain
            ]
            found += bool(owners)
    assert found


def test_settings_that_differ_come_first(page):
    rows = page.only("Settings;")
    assert rows[1][0] == "modalities"
    assert rows[1][1:] == ["none", "text"]
    assert len(rows) == 1 + len(ig.Settings.model_fields)


def test_it_needs_no_network_and_runs_no_script(page, text):
    assert [about["type"] for tag, about in page.tags if tag == "script"] == ["application/json"]
    policy = next(about for tag, about in page.tags if about.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none'")
    for tag, about in page.tags:
        for name, value in about.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:image/webp;base64,")), value
    assert "url(http" not in text
    assert "@import" not in text


def test_ids_are_there_once_and_links_lead_to_them(page):
    ids = [about["id"] for _, about in page.tags if "id" in about]
    assert len(ids) == len(set(ids))
    for _, about in page.tags:
        for name in ("href", "xlink:href", "aria-labelledby"):
            if about.get(name, "").startswith("#") or (name == "aria-labelledby" and name in about):
                assert about[name].lstrip("#") in ids


def test_the_commands_train_the_runs_again(runs, text):
    folder = runs[0].folder
    assert f"imvia-graph fit {folder}/kg --settings {folder}/settings.yaml" in text
    assert "--validation published" in text
    again = ig.fit(
        folder / "kg",
        settings=ig.Settings.create(
            ig.Settings.read(folder / "settings.yaml"), {"validation": "published"}
        ),
    )
    assert again.evaluate() == runs[0].evaluate()


def test_odd_names_are_harmless(tmp_path):
    kg = ring_kg(len(ODD))
    train = torch.cat([kg.train, kg.valid, kg.test])
    sources = [ODD[i % len(ODD)] for i in range(len(kg.views("text")[0]))]
    feat, ptr = kg.views("text")
    owner = torch.repeat_interleave(torch.arange(len(ODD)), ptr.diff())
    odd = ig.MultiViewKG(
        ODD,
        ODD[:2],
        train,
        test=kg.test,
        views={"<i>": ig.Views(feat, owner, sources)},
        name=ODD[0],
        notes=[ODD[1]],
    )
    run = ig.fit(odd, settings=settings(epochs=1))
    text = ig.write_report(run, tmp_path / "odd.html").read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"i", "iframe", "object"}
    assert [about for tag, about in page.tags if tag in ("script", "img")] == [
        {"type": "application/json", "id": "numbers"}
    ]
    assert "alert(1)" in text  # shown, as text
    assert "{{ 7 * 7 }} ${7*7}" in text  # and no template
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    assert "x" * 200 not in text.split("<script")[0]  # cut where it is for people to read


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("plain", "plain"),
        ("a\x00b\x07\x7f", "a␀b␇␡"),
        ("tab\tand\nline", "tab and line"),
        ("\u202eback", "\ufffdback"),
        ("👩‍🔬", "👩‍🔬"),
        ("  ", "␠"),
        ("", ""),
        ("漢" * 10_000, "漢" * 119 + "…"),
    ],
)
def test_labels_are_shown_as_one_printable_line(label, expected):
    assert shown(label) == expected


def test_names_are_looked_up_without_case_and_accents():
    assert folded("ÎLE São") == "ile sao"


def test_names_that_look_like_the_plots_own_markup_stay_as_they_are():
    from imvia_graph.report import plots

    names = ["font-family: Comic", '#010203 id="x"', 'href="#a url(#b)', "font: 9px Comic"]
    series = {name: [1.0, 2.0, 3.0, 4.0] for name in names[:2]}
    for svg in (
        plots.bars(names, series, "title", "MRR %"),
        plots.heat_map(names, names[:2], [[0.1, 0.2]] * 4, "title"),
        plots.curves({name: [(1, 2), (2, 3)] for name in names}, "title", "loss"),
    ):
        assert not re.search(
            "#010203|font: |font-family: (?!inherit)", re.sub(">[^<]*<", "><", svg)
        )
        assert set(names) <= {part.text for part in ElementTree.fromstring(svg).iter()}


def test_a_report_is_of_runs(tmp_path):
    with pytest.raises(ig.DataError, match=r"expected a Run.*received 'runs/seed-1'"):
        ig.write_report(["runs/seed-1"], tmp_path / "r.html")


@pytest.mark.parametrize("split", ["valid", None])
def test_without_test_triples_it_is_the_validation_triples_or_an_error(split, tmp_path):
    kg = ring_kg(test=0, valid=3 if split else 0)
    run = ig.fit(kg, settings=settings(epochs=1))
    if split is None:
        with pytest.raises(ig.DataError, match="neither test nor validation triples"):
            ig.write_report(run, tmp_path / "r.html")
        return
    text = ig.write_report(run, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Filtered ranks of the validation triples" in text


def test_a_structural_model_without_a_folder_has_no_weights_and_no_gallery(tmp_path):
    run = ig.fit(ring_kg(views=False), settings=settings(epochs=1, complex_head=False))
    told = []
    path = ig.write_report(run, tmp_path / "r.html", progress=lambda *at: told.append(at))
    name, done, total = told[-1]
    assert name == run.kg.name
    assert done == total == 2 * len(run.kg.test)
    text = path.read_text(encoding="utf-8")
    assert "Weights of the heads" not in text
    assert "Gallery" not in text
    assert "Curves" not in text


def test_a_file_that_exists_is_kept_unless_forced(runs, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("mine")
    with pytest.raises(ig.DataError, match="--force"):
        ig.write_report(runs[0], path)
    assert path.read_text() == "mine"
    with pytest.raises(ig.DataError, match="at least one run"):
        ig.write_report([], tmp_path / "none.html")


def test_what_is_no_file_is_not_written_over_and_links_are_followed(runs, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ig.DataError, match="is a device, a pipe or a socket"):
        ig.write_report(runs[0], tmp_path / "pipe", force=True)
    link = tmp_path / "report.html"
    link.symlink_to(tmp_path / "target.html")
    with pytest.raises(ig.DataError, match="--force"):
        ig.write_report(runs[0], link)
    ig.write_report(runs[0], link, force=True)
    assert link.is_symlink()
    assert (tmp_path / "target.html").stat().st_size > 1000
    with pytest.raises(ig.DataError, match="belongs to the run in"):
        ig.write_report(runs[0], runs[0].folder / "metrics.jsonl", force=True)


def test_the_command_writes_it_with_the_pictures_of_the_run(runs, tmp_path):
    image = pytest.importorskip("PIL.Image")
    kg = ring_kg()
    feat, ptr = kg.views("image")
    owner = torch.repeat_interleave(torch.arange(kg.num_entities), ptr.diff())
    images = ig.Views(feat, owner, [f"{i}.png" for i in range(len(feat))])
    ig.fit(kg.replace(views={"image": images}), out=tmp_path / "run", settings=settings(epochs=1))
    (tmp_path / "pictures").mkdir()
    for i in range(len(feat)):
        image.new("RGB", (4, 4), "red").save(tmp_path / "pictures" / f"{i}.png")
    arguments = ["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")]
    arguments += ["--images", str(tmp_path / "pictures")]
    result = CliRunner().invoke(command_line, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'report.html'}\n"
    pictures = [
        about
        for tag, about in Page((tmp_path / "report.html").read_text(encoding="utf-8")).tags
        if tag == "img"
    ]
    assert pictures
    assert all(re.fullmatch(r"\d+\.png", picture["alt"]) for picture in pictures)
