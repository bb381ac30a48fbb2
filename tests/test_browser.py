"""The report and the explorer in a browser: wide and narrow, by keyboard, without a fault.

A Chromium is looked for: ``$CHROMIUM``, the usual names on the PATH, playwright's own.
"""

import os
import re
import shutil
import socket
from urllib.parse import urlencode

import pytest
import torch
from helpers import ring_kg, settings
from test_explore import ODD, served

import imvia_graph as ig
from imvia_graph._display import shown

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: the extra browser"
)
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe is not installed: the extra browser"
)
pytest.importorskip("fastapi", reason="the extra explore is not installed")
pytest.importorskip("matplotlib", reason="the extra report is not installed")

from imvia_graph.explore import make_app  # noqa: E402 - it needs what is looked for above

expect = sync_api.expect
WIDTHS = (375, 1400)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            # Containers give no user namespaces to build a sandbox with; our own pages are opened.
            found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium to test with: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on the countries, with pictures of some."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("runs") / "countries"
    ig.fit("countries", out=folder, epochs=1, dim=16, information_dim=8, device="cpu")
    for kind, colour in (("flags", "blue"), ("outlines", "white")):
        (folder / "pictures" / kind).mkdir(parents=True)
        for code in ("FR", "ES", "DE", "PT"):
            image.new("RGB", (224, 224), colour).save(folder / f"pictures/{kind}/{code}.png")
    return ig.load(folder, "cpu")


@pytest.fixture(scope="module")
def address(run):
    return served(make_app(run))


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    return ig.write_report([run, run], path).as_uri()


class Watched:
    """A page, what its console says, and where it asks for something."""

    def __init__(self, browser, width, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page = context.new_page()
        self.page.set_default_timeout(10_000)
        self.faults, self.asked = [], set()
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(request.url))

    def open(self, url):
        self.page.goto(url)
        return self.page

    def assert_good(self):
        """Nothing on the console, nothing wider than the window, no serious fault by axe."""
        assert self.faults == []
        wide = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0
        violations = axe.Axe().run(self.page).response["violations"]
        assert [
            (found["id"], [node["html"][:200] for node in found["nodes"]])
            for found in violations
            if found["impact"] in ("serious", "critical")
        ] == []


@pytest.fixture(params=[(375, "dark"), (1400, "light")], ids=["375 dark", "1400 light"])
def watched(request, browser):
    made = Watched(browser, *request.param)
    yield made
    made.page.context.close()


def first_answer(page):
    return page.locator("#answers tbody tr").first


def settled(page, text):
    """Wait for the answers to a question."""
    expect(page.locator("#status")).to_contain_text(text)


# -- the explorer ---------------------------------------------------------------------------------


def test_search_choose_switch_and_follow(watched, run, address):
    page = watched.open(address)
    settled(page, "Choose an entity")
    watched.assert_good()
    page.get_by_role("combobox", name="Entity").fill("fran")
    page.get_by_role("option", name="France", exact=True).click()
    page.get_by_label("Relation", exact=True).select_option("borders")
    settled(page, "10 answers to (France, borders, ?)")

    # What is shown is what predict gives, known facts marked.
    expected = run.predict(head="France", relation="borders", k=10, include_known=True)
    rows = page.locator("#answers tbody tr")
    assert rows.count() == 10
    for row, answer in zip(rows.all(), expected, strict=True):
        cells = row.locator("td").all_inner_texts()
        assert answer.name in row.locator("th a").inner_text()
        assert cells[1] == f"{answer.score:.3f}"
        assert cells[2:-1] == [f"{answer.heads[head]:.3f}" for head in run.model.heads]
        assert ("known fact" in row.inner_text()) == answer.known

    # The weights of the views are explain's, and move with the relation.
    def weights():
        return [text.split(" ")[0] for text in page.locator("#given .weight").all_inner_texts()]

    def explained(relation):
        views = run.explain(head="France", relation=relation, tail="Spain").head.views
        return [f"{100 * view.weight:.1f}" for of in views.values() for view in of]

    assert weights() == explained("borders")
    picture = page.get_by_role("img", name="flags/FR.png")
    expect(picture).to_be_visible()
    assert picture.evaluate("node => node.decode().then(() => node.naturalWidth)") == 160
    page.get_by_label("Relation", exact=True).select_option("currency")
    settled(page, "(France, has currency, ?)")
    assert weights() == explained("currency")
    assert page.locator("#given .track").first.get_attribute("aria-hidden") == "true"

    # Each state is an address: back, and the same in a new page.
    page.go_back()
    settled(page, "(France, borders, ?)")
    first_answer(page).get_by_role("link").first.click()
    name = expected[0].name
    expect(page.locator("#why-title")).to_have_text(f"Why {name}")
    judgements = run.explain(head="France", relation="borders", tail=expected[0].entity)
    shown = page.locator("#judgements tbody tr").all()
    for row, (head, found) in zip(shown, judgements.judgements["tail"].items(), strict=True):
        assert row.locator("th").inner_text() == head
        rank, score, weight = row.locator("td").all_inner_texts()
        assert (float(rank), score) == (found.rank, f"{found.score:.3f}")
        assert weight == f"{100 * found.weight:.1f} %"
    watched.assert_good()
    link = page.url
    assert "entity=France" in link
    assert "answer=" in link
    page.goto(link)
    expect(page.locator("#why-title")).to_have_text(f"Why {name}")

    first_answer(page).get_by_role("link", name="Ask about").click()
    settled(page, f"({name}, borders, ?)")
    page.get_by_label("heads:").check()
    settled(page, f"(?, borders, {name})")
    page.get_by_label("show known facts").uncheck()
    expect(page.locator(".known")).to_have_count(0)
    watched.assert_good()
    assert all(url.startswith(address) for url in watched.asked)


def test_by_keyboard_alone(watched, address):
    page = watched.open(address)
    settled(page, "Choose an entity")
    press = page.keyboard.press
    press("Tab")
    expect(page.get_by_role("link", name="Skip to the answers")).to_be_focused()
    press("Tab")
    entity = page.get_by_role("combobox", name="Entity")
    expect(entity).to_be_focused()
    page.keyboard.type("germ")
    expect(page.get_by_role("option").first).to_be_visible()
    press("ArrowDown")
    # If the list is still that of less text, the key waits for the next one.
    expect(entity).to_have_attribute("aria-activedescendant", re.compile("."))
    pointed = entity.get_attribute("aria-activedescendant")
    option = page.locator(f"#{pointed}")
    expect(option).to_have_attribute("aria-selected", "true")
    name = option.inner_text()
    press("Enter")
    settled(page, f"answers to ({name}, ")
    expect(page.get_by_role("listbox")).to_be_hidden()
    expect(entity).to_be_focused()
    press("Escape")
    press("Tab")
    relation = page.get_by_label("Relation", exact=True)
    expect(relation).to_be_focused()
    before = page.locator("#status").inner_text()
    press("ArrowDown")
    expect(page.locator("#status")).not_to_have_text(before)
    # On to the answers, and into the first one.
    link = first_answer(page).get_by_role("link").first
    for _ in range(30):
        press("Tab")
        if link.evaluate("node => node === document.activeElement"):
            break
    expect(link).to_be_focused()
    outline = link.evaluate("node => getComputedStyle(node).outlineStyle")
    assert outline == "solid"
    press("Enter")
    expect(page.locator("#why")).to_be_visible()
    assert watched.faults == []


def test_enter_takes_what_the_text_says_by_then(browser, address):
    watched = Watched(browser, 1400)
    page = watched.open(address)
    settled(page, "Choose an entity")
    entity = page.get_by_role("combobox", name="Entity")
    entity.press("Enter")  # nothing is asked for
    entity.press_sequentially("A")
    expect(page.get_by_role("option").first).to_be_visible()
    # As fast as a hand that knows the name: the list is still that of the first letter.
    entity.evaluate("node => { node.value = 'Austria'; node.dispatchEvent(new Event('input')); }")
    entity.press("Enter")
    settled(page, "answers to (Austria, ")
    expect(entity).to_have_value("Austria")
    for nothing in ("", "  "):
        entity.fill(nothing)
        entity.press("Enter")
        settled(page, "answers to (Austria, ")
    entity.fill("qqqq")
    entity.press("Enter")
    settled(page, "No entity is called qqqq.")
    page.keyboard.press("Tab")  # what is shown is still Austria's
    expect(entity).to_have_value("Austria")
    assert "entity=Austria" in page.url
    assert watched.faults == []
    page.context.close()


def test_the_page_of_the_service_is_read_without_a_network(watched, address):
    page = watched.open(f"{address}docs")
    expect(page.get_by_role("heading", name="GET /api/complete")).to_be_visible()
    expect(page.get_by_role("heading", name="POST /api/complete-new")).to_be_visible()
    watched.assert_good()


def test_what_is_not_there_is_said(watched, address):
    page = watched.open(f"{address}?entity=Atlantis&relation=borders")
    settled(page, "No entity is called or labelled 'Atlantis'.")
    expect(page.locator("#result")).to_be_hidden()
    # The browser itself notes an answer of 404.
    assert all("404" in fault for fault in watched.faults)


def test_odd_names_do_no_harm_in_the_page(browser):
    kg = ring_kg(len(ODD))
    feat, ptr = kg.views("text")
    owner = torch.repeat_interleave(torch.arange(len(ODD)), ptr.diff())
    sources = [ODD[i % len(ODD)] for i in range(len(feat))]
    views = {"<b>'": ig.Views(feat, owner, sources)}
    train = torch.cat([kg.train, kg.valid, kg.test])
    odd = ig.MultiViewKG(ODD, ODD[:2], train, views=views, name=ODD[1])
    address = served(make_app(ig.fit(odd, settings=settings(epochs=1))))
    watched = Watched(browser, 375)
    page = watched.open(address)
    settled(page, "Choose an entity")
    entity = page.get_by_role("combobox", name="Entity")
    entity.fill("x")
    expect(page.get_by_role("option").first).to_be_visible()
    for label in ODD:
        # A link in the page, as it makes them itself.
        page.goto(f"{address}?{urlencode({'entity': label, 'relation': ODD[1], 'answer': ODD[0]})}")
        expect(page.locator("#why")).to_be_visible()
        expect(entity).to_have_value(re.compile(re.escape(shown(label)[:20])))
        assert page.locator("main script, main b, main img").count() == 0
    watched.assert_good()
    page.context.close()


def test_a_page_from_elsewhere_gets_nothing(browser, address):
    """DNS rebinding: a strange name that leads to this machine is refused."""
    port = address.rstrip("/").rpartition(":")[2]
    page = browser.new_page()
    # Browsers resolve names below localhost to this machine, whatever stands before.
    answer = page.goto(f"http://evil.localhost:{port}/api/run")
    assert answer.status == 400
    assert "not allowed" in answer.text()
    page.close()
    assert socket.gethostbyname("localhost").startswith("127.")


# -- the report -----------------------------------------------------------------------------------


def test_the_report_is_read_on_any_screen(watched, report):
    page = watched.open(report)
    for title in ("What was trained", "Metrics", "Best and worst answers", "Gallery", "Settings"):
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
    assert page.locator("figure svg[role=img]").count() >= 8
    for picture in page.locator("img").all():
        assert picture.evaluate("node => node.naturalWidth") > 0
        assert re.match(r"(flags|outlines)/", picture.get_attribute("alt"))
    # By keyboard: over the contents, and open what is folded.
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.locator("[role=region]").first).to_be_focused()
    for summary in page.locator("summary").all():
        summary.press("Enter")
    assert page.locator("details:not([open])").count() == 0
    watched.assert_good()
    assert {url.partition("#")[0] for url in watched.asked} == {report}


def test_the_reports_plots_take_the_pages_colours(browser, report):
    colours = {}
    for scheme in ("light", "dark"):
        watched = Watched(browser, 1400, scheme)
        page = watched.open(report)
        text = page.locator("figure svg text").first
        colours[scheme] = text.evaluate("node => getComputedStyle(node).fill")
        page.context.close()
    assert colours["light"] != colours["dark"]


def test_the_report_is_printed_without_its_contents(browser, report):
    watched = Watched(browser, 800)
    page = watched.open(report)
    page.emulate_media(media="print")
    expect(page.get_by_role("navigation")).to_be_hidden()
    assert len(page.pdf()) > 10_000
    page.context.close()
