"""The explorer's service: it answers what the library says, and does no harm."""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from urllib.parse import quote, urlencode, urlsplit

import pytest
import torch
from conftest import randomised
from helpers import ring_kg, settings

import imvia_graph as ig
from imvia_graph.pictures import Pictures
from imvia_graph.training import Progress

pytest.importorskip("fastapi", reason="the extra explore is not installed")
pytest.importorskip("uvicorn", reason="the extra explore is not installed")

from imvia_graph.explore import make_app, serve
from imvia_graph.explore.service import Service
from imvia_graph.explore.web import HEADERS, MOST_BYTES, Guard

#: Labels that pages and services like to stumble over.
ODD = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"quoted\" & 'apostrophe'",
    "'); DROP TABLE--",
    "nul\x00 bell\x07 tab\t line\nend",
    "\u202eright to left",
    "x" * 10_000,
    "漢" * 10_000,
    "{{ 7 * 7 }} ${7*7}",
    "a/b?c=d&e#f%00",
    " ",
    "../../etc/passwd",
]


def make_run(kg, **changes):
    chosen = settings(**changes)
    return ig.Run(randomised(ig.IMVIA.from_kg(kg, chosen)).eval(), kg, chosen, Progress())


def served(app) -> str:
    """The address of an application, which runs in a thread until the tests end."""
    ready, address = threading.Event(), []

    def on_ready(where):
        address.append(where)
        ready.set()

    threading.Thread(target=serve, args=(app, "127.0.0.1", 0, on_ready), daemon=True).start()
    assert ready.wait(20)
    return address[0]


def ask(address, path, body=None, headers=None, **parameters):
    """(status, headers, body) of a request; JSON is read."""
    url = address + path + (f"?{urlencode(parameters)}" if parameters else "")
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **(headers or {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            status, told, content = answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        status, told, content = error.code, error.headers, error.read()
    is_json = told["Content-Type"] == "application/json"
    return status, told, json.loads(content) if is_json else content


@pytest.fixture(scope="module")
def run():
    torch.manual_seed(0)
    names = [f"Entité {i}" for i in range(12)]
    return make_run(ring_kg(entity_names=names, relation_names=["is after", "is opposite"]))


@pytest.fixture(scope="module")
def address(run):
    return served(make_app(run))


# -- what it answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["head", "tail"])
@pytest.mark.parametrize("options", [{}, {"known": True}, {"known": True, "self": True}])
def test_completions_are_the_predictions(side, options, run, address):
    status, _, found = ask(
        address, "api/complete", relation="after", top=99, **{side: "e3"}, **options
    )
    assert status == 200
    expected = run.predict(
        relation="after",
        k=99,
        include_known=options.get("known", False),
        include_self=options.get("self"),
        **{side: "e3"},
    )
    assert found["answers"] == [
        {
            "rank": rank,
            "label": answer.entity,
            "name": answer.name,
            "score": answer.score,
            "heads": answer.heads,
            "known": answer.known,
        }
        for rank, answer in enumerate(expected, 1)
    ]
    assert found["asked"] == ({"head", "tail"} - {side}).pop()
    assert sum(found["weights"].values()) == pytest.approx(1)
    assert found["given"]["name"] == "Entité 3"


def test_explanations_are_the_librarys(run, address):
    names = {"head": "e1", "relation": "opposite", "tail": "Entité 7"}
    status, _, found = ask(address, "api/explain", **names)
    expected = run.explain(**names).as_dict()
    assert status == 200
    assert found["judgements"] == expected["judgements"]
    assert found["known"] == expected["known"]
    for end in ("head", "tail"):
        assert found[end]["label"] == expected[end]["entity"]
        for modality, views in found[end]["views"].items():
            assert [view.pop("picture") for view in views] == [False] * len(views)
            assert views == expected[end]["views"][modality]


def test_the_run_tells_what_may_be_asked(run, address):
    _, _, found = ask(address, "api/run")
    assert found["heads"] == run.model.heads
    assert [relation["label"] for relation in found["relations"]] == run.kg.relations
    counts = torch.bincount(run.kg.train[:, 1]).tolist()
    assert [relation["train"] for relation in found["relations"]] == counts


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("Entité 7", "e7"),
        ("entite 7", "e7"),
        ("e11", "e11"),
        ("ENTITÉ 1", "e1"),
        ("7", "e7"),
        ("entiet 9", "e9"),
        ("", "e0"),
    ],
)
def test_entities_are_found_by_label_part_of_a_name_and_with_a_slip(typed, first, address):
    status, _, found = ask(address, "api/entities", q=typed, limit=3)
    assert status == 200
    assert found[0]["label"] == first
    assert len(found) <= 3


def test_entities_are_found_by_the_start_of_a_label_that_is_not_their_name():
    labels, names = ["Q142", "Q29", "Q183"], ["France", "Spain", "Qatar 14"]
    triples = torch.tensor([[0, 0, 1], [0, 0, 2], [1, 0, 0]])
    kg = ig.MultiViewKG(labels, ["P47"], triples, entity_names=names)
    service = Service(make_run(kg), Pictures(kg))
    assert [found["label"] for found in service.search("q14", 3)] == ["Q142"]
    assert [found["label"] for found in service.search("14", 3)] == ["Q183", "Q142"]
    assert [found["label"] for found in service.search("q", 3)] == ["Q29", "Q142", "Q183"]
    assert [found["label"] for found in service.search("14", 1)] == ["Q183"]


def test_entities_of_long_labels_that_are_found_can_be_asked_about():
    labels = [letter * 100_000 for letter in "x漢"] + [f"e{i}" for i in range(10)]
    address = served(make_app(make_run(ring_kg().replace(entities=labels))))
    for label in labels[:2]:
        found = ask(address, "api/entities", q=label[:50])[2][0]["label"]
        assert found == label
        status, _, told = ask(address, "api/complete", relation="after", head=found)
        assert (status, told["given"]["label"]) == (200, label)
    long, longer = labels[:2]
    status, _, told = ask(address, "api/explain", relation="after", head=long, tail=longer)
    assert (status, told["tail"]["label"]) == (200, longer)


def test_tables_that_are_not_held_are_said_to_be_slow(caplog):
    run = make_run(ring_kg())
    app = make_app(run, held=0)
    assert "more than the limit" in caplog.text
    caplog.clear()
    held = make_app(run)
    assert caplog.text == ""
    answers = [
        ask(served_at, "api/complete", head="e1", relation="after")[2]["answers"]
        for served_at in map(served, (app, held))
    ]
    assert [a["label"] for a in answers[0]] == [a["label"] for a in answers[1]]


def test_new_entities_are_answered_for_by_their_views_and_said_to_be_new(run, address):
    views = {"text": torch.randn(2, 5), "image": torch.randn(1, 6)}
    body = {"relation": "after", "ask": "head", "top": 4}
    body["views"] = {modality: feat.tolist() for modality, feat in views.items()}
    status, _, found = ask(address, "api/complete-new", body)
    assert status == 200
    expected = ig.Predictor(run.model, run.kg).predict_new(views, relation="after", ask="head", k=4)
    assert [answer["label"] for answer in found["answers"]] == [a.entity for a in expected]
    scores = [answer["score"] for answer in found["answers"]]
    assert scores == pytest.approx([answer.score for answer in expected], abs=1e-5)
    assert set(found["heads"]) == {"image", "text"}
    assert "not trained on this entity" in found["note"]
    status, _, found = ask(address, "api/complete-new", {"relation": "after", "texts": ["a"]})
    assert status == 422
    assert "--text-encoder" in found["detail"]


def test_texts_of_new_entities_are_encoded_where_there_is_an_encoder(run):
    class Lengths(ig.encode.Encoder):
        name, modality, width, identity = "lengths", "text", 5, "lengths 1"

        def encode(self, items):
            return torch.tensor([[len(item) / (i + 1) for i in range(5)] for item in items])

    address = served(make_app(run, text_encoder=Lengths()))
    assert ask(address, "api/run")[2]["encodes_texts"]
    status, _, found = ask(address, "api/complete-new", {"relation": "after", "texts": ["ab"]})
    feat = Lengths().encode(["ab"])
    expected = ig.Predictor(run.model, run.kg).predict_new({"text": feat}, relation="after", k=20)
    assert status == 200
    assert [answer["label"] for answer in found["answers"]] == [a.entity for a in expected]
    body = {"relation": "after", "texts": [" ", "ab", "\n\t", ""]}
    assert ask(address, "api/complete-new", body)[2] == found
    status, _, told = ask(address, "api/complete-new", {"relation": "after", "texts": ["", " \n"]})
    assert (status, told["detail"]) == (
        422,
        "texts: expected at least one that is not blank, or features in views; received 2 that are"
        " blank.",
    )
    body = {"relation": "after", "texts": [" "], "views": {"image": [[0.0] * 6]}}
    assert ask(address, "api/complete-new", body)[2]["heads"] == ["image"]
    Lengths.width = 4
    with pytest.raises(ig.DataError, match=r"was trained on 5 .* makes 4"):
        make_app(run, text_encoder=Lengths())


def test_an_encoder_is_one_of_texts_or_the_name_of_one(run):
    with pytest.raises(ig.EncoderError, match="There is no encoder 'maxilm'"):
        make_app(run, text_encoder="maxilm")
    with pytest.raises(ig.DataError, match="expected an encoder of texts"):
        make_app(run, text_encoder=5)
    pytest.importorskip("PIL", reason="the extra encoders is not installed")
    with pytest.raises(ig.EncoderError, match="is for images, not for texts"):
        make_app(run, text_encoder="efficientnet-lite0")


# -- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "parameters", "status", "told"),
    [
        ("api/complete", {"relation": "after"}, 422, "either head or tail"),
        ("api/complete", {"relation": "after", "head": "e1", "tail": "e2"}, 422, "either"),
        ("api/complete", {"relation": "after", "head": "nobody"}, 404, "No entity is called"),
        (
            "api/complete",
            {"relation": "after", "head": "E99"},
            404,
            "No entity is called or labelled 'E99'. The nearest known: 'e9'",
        ),
        ("api/complete", {"relation": "never", "head": "e1"}, 404, "No relation"),
        ("api/complete", {"relation": "afterr", "head": "e1"}, 404, "The nearest known: 'after'"),
        ("api/complete", {"relation": "after", "head": "e1", "top": 0}, 422, "query.top"),
        ("api/complete", {"head": "e1"}, 422, "query.relation"),
        (
            "api/complete",
            {"relation": "after", "head": "x" * 100_001},
            422,
            "at most 100,000 letters",
        ),
        ("api/explain", {"head": "\x00<b>", "relation": "after", "tail": "e1"}, 404, "␀<b>"),
        ("api/entities", {"limit": 101}, 422, "query.limit"),
        ("views/image/0", {}, 404, "no such picture"),
        ("views/image/99999999", {}, 404, "no such picture"),
        ("views/image/-1", {}, 422, "path.view"),
        ("views/sound/0", {}, 404, "no such picture"),
        ("etc/passwd", {}, 404, "Not Found"),
        ("..%2f..%2fetc/passwd", {}, 404, "Not Found"),
        ("views/image/..%2f..%2frun.json", {}, 404, "Not Found"),
    ],
)
def test_what_cannot_be_answered_says_why(path, parameters, status, told, address):
    found, _, problem = ask(address, path, **parameters)
    assert found == status
    assert told in problem["detail"]
    assert len(problem["detail"]) < 2000


@pytest.mark.parametrize(
    ("views", "told"),
    [
        ({"text": [[1, 2]]}, "(views, 5)"),
        ({"text": [[1, 2], [1]]}, "not of one length"),
        ({"text": []}, "at least one view"),
        ({"sound": [[1]]}, "no modality 'sound'"),
        ({"\ud800": [[1]]}, "no modality"),
        ({"text": [[1e300] * 5]}, "finite"),
        ({"text": [[float("nan")] * 5]}, "finite"),
        ({"text": "nonsense"}, "body.views.text"),
    ],
)
def test_views_that_do_not_fit_are_refused(views, told, address):
    status, _, problem = ask(address, "api/complete-new", {"relation": "after", "views": views})
    assert status == 422
    assert told in problem["detail"]


def test_a_question_with_a_field_that_is_none_is_refused(address):
    body = {"relation": "after", "asked": "head", "views": {"text": [[1, 2, 3, 4, 5]]}}
    status, _, problem = ask(address, "api/complete-new", body)
    assert status == 422
    assert "asked" in problem["detail"]


def test_odd_names_are_harmless(tmp_path):
    kg = ring_kg(len(ODD), views=False)
    train = torch.cat([kg.train, kg.valid, kg.test])
    odd = ig.MultiViewKG(ODD, ODD[:2], train, entity_names=ODD[::-1], relation_names=ODD[2:4])
    address = served(make_app(make_run(odd)))
    for label in ODD:
        status, _, found = ask(address, "api/complete", relation=ODD[0], head=label, top=99)
        assert status == 200
        assert found["given"]["label"] == label
        status, told, _ = ask(address, "api/entities", q=label)
        assert status == 200
        assert told["Content-Type"] == "application/json"
        status, _, found = ask(address, "api/explain", head=label, relation=ODD[1], tail=ODD[0])
        assert (status, found["head"]["label"]) == (200, label)


def test_only_pictures_of_the_views_leave_and_never_as_the_file_that_they_are(tmp_path):
    image = pytest.importorskip("PIL.Image")
    root, outside = tmp_path / "images", tmp_path / "outside"
    for folder in (root / "a", outside):
        folder.mkdir(parents=True)
        image.new("RGB", (300, 200), "red").save(folder / "red.png")
    (root / "notes.txt").write_text("secret")
    (root / "broken.png").write_bytes(b"no picture")
    (root / "link.png").symlink_to(outside / "red.png")
    sources = [
        "a/red.png",
        "../outside/red.png",
        str(outside / "red.png"),
        "link.png",
        "notes.txt",
        "broken.png",
        "a",
        "missing.png",
        "nul\x00.png",
        "y" * 5000,
        "",
    ]
    kg = ring_kg(views=False)
    entity = torch.zeros(len(sources), dtype=torch.int64)
    views = {"image": ig.Views(torch.randn(len(sources), 3), entity, sources, root)}
    address = served(make_app(make_run(kg.replace(views=views))))
    status, told, content = ask(address, "views/image/0")
    assert (status, told["Content-Type"]) == (200, "image/webp")
    assert max(image.open(io.BytesIO(content)).size) == 160
    for view in range(1, len(sources)):
        status, _, problem = ask(address, f"views/image/{view}")
        assert (status, problem) == (404, {"detail": "There is no such picture."}), sources[view]


def test_pictures_are_looked_for_where_one_says_and_in_the_run_folder(tmp_path):
    kg = ring_kg(views=False)
    views = {"image": ig.Views(torch.randn(1, 3), torch.zeros(1, dtype=torch.int64), ["a.png"])}
    kg = kg.replace(views=views)
    for folder in ("run/pictures", "given"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.png").write_bytes(b"")
    assert Pictures(kg).path("image", 0) is None
    assert Pictures(kg, tmp_path / "run").path("image", 0) == tmp_path / "run/pictures/a.png"
    given = Pictures(kg, tmp_path / "run", tmp_path / "given")
    assert given.path("image", 0) == tmp_path / "given/a.png"
    with pytest.raises(ig.DataError, match="expected the folder"):
        Pictures(kg, root=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("192.168.0.7", True),
        ("my.host:80", True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
        ("[::1", False),
        ("[evil]", False),
    ],
)
def test_only_addresses_and_names_that_are_allowed_reach_the_service(host, allowed):
    assert Guard(None, ["my.host"]).allows(host) is allowed


def test_an_empty_host_does_not_let_everybody_in():
    with pytest.raises(ig.DataError, match="host: expected an address"):
        serve(None, "")


def test_every_answer_carries_the_guards_and_strange_hosts_get_none(address):
    for path, headers, status in (
        ("", {}, 200),
        ("explore.js", {}, 200),
        ("api/run", {}, 200),
        ("nowhere", {}, 404),
        ("api/run", {"Host": "evil.example"}, 400),
    ):
        found, told, content = ask(address, path, headers=headers)
        assert found == status
        assert {name: told[name] for name in HEADERS} == HEADERS
        assert "Access-Control-Allow-Origin" not in told
    assert content == {"detail": "This host name is not allowed; see --allow-host."}


def test_bodies_are_bounded(address):
    for told in ({"Content-Length": str(MOST_BYTES + 1)}, {"Transfer-Encoding": "chunked"}):
        connection = http.client.HTTPConnection(urlsplit(address).netloc)
        connection.putrequest("POST", "/api/complete-new")
        for name, value in told.items():
            connection.putheader(name, value)
        connection.endheaders()  # the answer comes without a byte of the body
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["detail"]) == (413, "The body is too large.")
        connection.close()


def test_pages_ask_nothing_of_the_network(address):
    for page in ("", "docs", "explore.js", "docs.js", "explore.css", "icon.svg"):
        status, _, content = ask(address, page)
        assert status == 200
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
        assert "//" not in text.replace("// ", "")


def test_pages_answer_those_who_ask_for_the_head_alone(address):
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    for page in ("/", "/docs", "/explore.js"):
        connection.request("HEAD", page)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"")
        assert int(answer.headers["Content-Length"]) > 100
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    connection.close()


def test_the_openapi_page_names_every_operation(address):
    _, _, api = ask(address, "openapi.json")
    assert set(api["paths"]) == {
        "/api/run",
        "/api/entities",
        "/api/complete",
        "/api/explain",
        "/api/complete-new",
        "/views/{modality}/{view}",
    }


def test_the_service_stands_an_api_tester(address):
    """Schemathesis makes requests from the service's own description, right ones and wrong ones."""
    schemathesis = pytest.importorskip("schemathesis", reason="the extra browser is not installed")
    from hypothesis import HealthCheck, Phase, given
    from hypothesis import settings as trials
    from hypothesis.errors import Unsatisfiable
    from schemathesis import checks
    from schemathesis.generation import GenerationMode

    schema = schemathesis.openapi.from_url(f"{address}openapi.json")
    wanted = [
        checks.CHECKS.get_one(name)
        for name in (
            "not_a_server_error",
            "status_code_conformance",
            "content_type_conformance",
            "response_schema_conformance",
        )
    ]
    tried = 0
    for found in schema.get_all_operations():
        for mode in GenerationMode:

            @given(case=found.ok().as_strategy(generation_mode=mode))
            @trials(
                max_examples=15,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def attempt(case):
                nonlocal tried
                tried += 1
                case.call_and_validate(checks=wanted)

            # Of what takes no parameters there is nothing wrong to ask.
            with contextlib.suppress(Unsatisfiable):
                attempt()
    assert tried > 100


# -- in the address of a state --------------------------------------------------------------------


def test_labels_survive_the_address(address):
    status, _, found = ask(address, f"api/entities?q={quote('Entité 3')}")
    assert status == 200
    assert found[0]["label"] == "e3"


# -- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_serves_until_it_is_stopped(tmp_path):
    ig.fit(ring_kg(), out=tmp_path / "run", settings=settings(epochs=1))
    command = [sys.executable, "-m", "imvia_graph", "explore", str(tmp_path / "run"), "--port"]
    environment = {**os.environ, "COLUMNS": "200"}
    server = subprocess.Popen(
        [*command, "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Where tests run in the background it may be ignored, and what is started inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        line = server.stderr.readline()
        address = re.fullmatch(r"Open (http://127\.0\.0\.1:\d+/)\n", line)[1]
        assert ask(address, "api/run")[2]["run"] == "run"
        port = str(urlsplit(address).port)
        taken = subprocess.run(
            [*command, port], capture_output=True, text=True, env=environment, timeout=120
        )
        assert taken.returncode == 2
        assert "Error: " in taken.stderr
        assert "Address already in use" in taken.stderr
        assert "Traceback" not in taken.stderr
    finally:
        server.send_signal(signal.SIGINT)
        _, rest = server.communicate(timeout=60)
    assert server.returncode == 130
    assert rest.strip() == "Stopped."
