"""`explain`: ranks, scores and weights are the model's own, and say what the model looked at."""

import json

import pytest
import torch
from click.testing import CliRunner
from conftest import randomised
from helpers import ring_kg, settings

import imvia_graph as ig
from imvia_graph import inference
from imvia_graph.cli import command_line
from imvia_graph.evaluation import rank
from imvia_graph.inference import decision_weights, view_weights
from imvia_graph.training import Progress


def make_run(kg, **changes):
    """A model of random parameters: nothing hides behind an initial zero."""
    chosen = settings(**changes)
    return ig.Run(randomised(ig.IMVIA.from_kg(kg, chosen)).eval(), kg, chosen, Progress())


@pytest.fixture
def run():
    return make_run(ring_kg())


def all_triples(kg):
    return torch.cat([kg.train, kg.valid, kg.test])


@pytest.mark.parametrize("candidates", ["shared", "relation"])
def test_ranks_and_scores_are_those_of_evaluate_and_predict(candidates):
    run = make_run(ring_kg(), candidates=candidates)
    kg = run.kg
    triples = all_triples(kg)[:8]
    ranking = rank(run.model, triples, kg.answers())
    for row, (h, r, t) in enumerate(triples.tolist()):
        names = {"head": kg.entities[h], "relation": kg.relations[r], "tail": kg.entities[t]}
        found = run.explain(**names)
        for side, ranks in (("tail", ranking.tail), ("head", ranking.head)):
            judgements = found.judgements[side]
            assert {name: j.rank for name, j in judgements.items()} == {
                name: values[row].item() for name, values in ranks.items()
            }
            asked = {key: value for key, value in names.items() if key != side}
            answers = run.predict(**asked, k=99, include_known=True, include_self=True)
            [mine] = [answer for answer in answers if answer.entity == names[side]]
            assert judgements["decision"].score == mine.score
            assert {n: j.score for n, j in judgements.items() if n != "decision"} == mine.heads


@pytest.mark.parametrize("candidates", ["shared", "relation"])
def test_scores_of_triples_are_those_that_explain_says(candidates):
    run = make_run(ring_kg(), candidates=candidates)
    kg = run.kg
    triples = [
        (kg.entities[h], kg.relations[r], kg.entities[t]) for h, r, t in all_triples(kg).tolist()
    ]
    found = run.score(triples, batch_size=3)
    assert len(found) == len(triples) > 3
    for score, (head, relation, tail) in zip(found.tolist(), triples, strict=True):
        judged = run.explain(head=head, relation=relation, tail=tail).judgements["tail"]
        assert score == pytest.approx(judged["decision"].score, abs=1e-5)
    assert run.score([]).shape == (0,)
    # Called, the model gives the same, with gradients.
    scores = run.model(*all_triples(kg).unbind(1))
    torch.testing.assert_close(scores.detach(), found)
    scores.sum().backward()
    assert run.model.decision.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("triple", ["France", ("e1", "after")])
def test_what_is_no_triple_is_not_scored(run, triple):
    with pytest.raises(ig.DataError, match=r"\(head, relation, tail\) in row 1"):
        run.score([("e1", "after", "e2"), triple])
    with pytest.raises(ig.UnknownLabelError, match="'nobody'"):
        run.score([("e1", "after", "nobody")])


def test_decision_weights_sum_to_1_and_give_the_decision(run):
    found = run.explain(head="e1", relation="after", tail="e7")
    for judgements in found.judgements.values():
        heads = {name: j for name, j in judgements.items() if name != "decision"}
        assert sum(j.weight for j in heads.values()) == pytest.approx(1)
        assert judgements["decision"].weight == 1
        score = sum(j.weight * j.score for j in heads.values())
        assert judgements["decision"].score == pytest.approx(score, abs=1e-4)


def test_a_single_head_and_a_mean_weigh_alike():
    alone = make_run(ring_kg(), modalities=[], complex_head=False)
    assert decision_weights(alone.model, 0) == {"structure": 1}
    mean = make_run(ring_kg(), decision="mean", complex_head=False)
    assert set(decision_weights(mean.model, 0).values()) == {0.25}


@pytest.mark.parametrize("decision", ["detached", "trained", "mean"])
def test_the_head_of_complex_has_its_weight_whatever_the_others_share(decision):
    kg = ring_kg()
    model = make_run(kg, complex_head=True, complex_weight=0.25, decision=decision).model
    if model.decision is not None:
        torch.nn.init.normal_(model.decision.linear.weight)
    weights = decision_weights(model, 2)
    assert weights.pop("complex") == 0.25
    assert sum(weights.values()) == pytest.approx(0.75)
    assert (len(set(weights.values())) == 1) == (decision == "mean")
    with torch.no_grad():
        entity, relation = torch.tensor([0]), torch.tensor([2])
        scores = model.scores(model.queries(entity, relation), model.candidates(), relation)
    expected = 0.25 * scores["complex"] + sum(w * scores[head] for head, w in weights.items())
    torch.testing.assert_close(scores["decision"], expected)
    # With a single head beside it there is nothing to learn.
    alone = make_run(kg, complex_head=True, modalities=[], decision=decision).model
    assert decision_weights(alone, 0) == {"structure": 0.5, "complex": 0.5}
    assert not alone.learns_decision


def test_view_weights_are_the_layers_own_over_the_whole_graph(run):
    model, kg = run.model, run.kg
    for relation in (None, 0, 1, 2, 3):
        rel_feat = None if relation is None else model.relation[0].weight[relation]
        for modality in model.modalities:
            # The layer as any DGL model calls it, on the heterograph; weights in order of edges.
            part = kg.graph[modality, "of", "entity"]
            feats = (part.nodes[modality].data["feat"], model.entity.weight)
            with torch.no_grad():
                _, weight = model.encoder.conv(modality)(part, feats, rel_feat, get_weight=True)
            _, owner = part.edges(order="eid")
            for entity in range(kg.num_entities):
                mine = view_weights(model, entity, relation)[modality]
                torch.testing.assert_close(mine, weight[owner == entity])


def test_each_end_is_weighted_as_it_is_looked_at_and_weights_sum_to_1(run):
    kg, model = run.kg, run.model
    found = run.explain(head="e1", relation="opposite", tail="e3")
    for end, relation in ((found.head, 1), (found.tail, 1 + kg.num_relations)):
        entity = kg.id_of(end.entity)
        conditioned, plain = view_weights(model, entity, relation), view_weights(model, entity)
        assert list(end.views) == ["image", "text"]
        for modality, views in end.views.items():
            assert [view.weight for view in views] == conditioned[modality].tolist()
            assert [view.plain_weight for view in views] == plain[modality].tolist()
            if views:
                assert sum(view.weight for view in views) == pytest.approx(1)
                assert sum(view.plain_weight for view in views) == pytest.approx(1)
            ptr = kg.views(modality)[1]
            assert [view.view for view in views] == list(range(ptr[entity], ptr[entity + 1]))
    # The relation makes a difference, here where all parameters are random.
    weights = [view.weight - view.plain_weight for view in found.head.views["image"]]
    assert max(map(abs, weights)) > 1e-3


@pytest.mark.parametrize("gate", ["entity", "none"])
def test_a_gate_that_sees_no_relation_sees_none_here_either(gate):
    run = make_run(ring_kg(), gate=gate)
    model, kg = run.model, run.kg
    for entity in range(kg.num_entities):
        plain = view_weights(model, entity)
        for relation in range(2 * kg.num_relations):
            found = view_weights(model, entity, relation)
            assert all(torch.equal(found[modality], plain[modality]) for modality in plain)
    feat, ptr = kg.views("text")
    new = {"text": feat[ptr[4] : ptr[5]]}
    before = ig.Predictor(model, kg).predict_new(new, relation="after", k=99)
    for conv in model.encoder.convs:
        torch.nn.init.normal_(conv.gate_relation.weight)
    after = ig.Predictor(model, kg).predict_new(new, relation="after", k=99)
    assert [(a.entity, a.score) for a in after] == [(b.entity, b.score) for b in before]


def test_an_entity_without_views_has_none(run):
    found = run.explain(head="e0", relation="after", tail="e1")
    assert found.head.views == {"image": [], "text": []}


def test_sources_and_roots_are_carried_from_encoding_to_the_explanation(tmp_path):
    class Length(ig.encode.Encoder):
        name, modality, width, identity = "length", "text", 1, "length 1"

        def encode(self, items):
            return torch.tensor([[float(len(item))] for item in items])

    kg = ring_kg(views=False)
    raw = ig.io.RawViews("text", torch.tensor([1, 1, 3]), ["<b>one</b>", "two", "three"], tmp_path)
    views = ig.encode.encode_views(raw, Length()).views
    run = ig.fit(kg.replace(views={"text": views}), out=tmp_path / "run", settings=settings())
    run = ig.load(tmp_path / "run", "cpu")
    found = run.explain(head="e1", relation="after", tail="e3")
    assert [view.source for view in found.head.views["text"]] == ["<b>one</b>", "two"]
    assert [view.source for view in found.tail.views["text"]] == ["three"]
    assert run.kg.view_root("text") == tmp_path


def test_it_says_which_part_of_the_graph_holds_the_triple():
    run = make_run(ring_kg(known=torch.tensor([[0, 0, 5]])))
    kg = run.kg
    for part in ("train", "valid", "test", "known"):
        h, r, t = getattr(kg, part)[0].tolist()
        found = run.explain(head=f"e{h}", relation=kg.relations[r], tail=f"e{t}")
        assert found.known == part
    assert run.explain(head="e1", relation="after", tail="e9").known is None


def test_weights_move_to_the_view_that_answers_the_relation():
    """Each thing has a view of its colour and one of its shape; each relation is told by one.

    A view is a code, which lies in the same eight dimensions for colours and shapes, and a mark of
    which of the two it is. What the other view says can only be kept out by the weights.
    """
    generator = torch.Generator().manual_seed(0)
    kinds, things, width = 24, 144, 8
    codes = torch.nn.functional.normalize(torch.randn(2, kinds, width, generator=generator), dim=-1)
    kind = torch.randint(kinds, (2, things), generator=generator)  # its colour, its shape
    thing, answer = torch.arange(things), things + torch.arange(2 * kinds)
    feat = torch.zeros(2 * things + 2 * kinds, width + 2)
    for which in (0, 1):
        feat[which : 2 * things : 2, :width] = codes[which, kind[which]]
        feat[which : 2 * things : 2, width + which] = 2
    feat[2 * things :, :width] = codes.flatten(0, 1)
    triples = [
        torch.stack(
            [thing, torch.full_like(thing, which), things + which * kinds + kind[which]], dim=1
        )
        for which in (0, 1)
    ]
    kg = ig.MultiViewKG(
        [f"{i}" for i in range(things + 2 * kinds)],
        ["colour", "shape"],
        torch.cat(triples),
        views={"look": ig.Views(feat, torch.cat([thing.repeat_interleave(2), answer]))},
    )
    off = ("input_dropout", "relation_dropout", "hidden_dropout", "label_smoothing")
    off += ("lambda_information", "lambda_alignment")
    run = ig.fit(
        kg,
        settings=settings(
            lambda_regularization=0.05,
            dim=16,
            epochs=60,
            batch_size=96,
            learning_rate=3e-2,
            residual=False,
            joint=False,
            **dict.fromkeys(off, 0),
        ),
    )
    # Shares of the colour's view. Cosines lie between 0 and 1, so that no view of two can have more
    # than e / (e + 1) = 0.73 or less than 0.27.
    under = [
        torch.stack([view_weights(run.model, i, which)["look"] for i in range(things)])[:, 0]
        for which in (0, 1)
    ]
    moved = under[0] - under[1]
    assert (moved > 0).float().mean() > 0.95
    assert moved.mean() > 0.1


# -- entities that the model has not seen ---------------------------------------------------------


@pytest.mark.parametrize("complex_head", [False, True])
def test_a_new_entity_is_judged_by_the_heads_of_its_views(complex_head):
    run = make_run(ring_kg(), complex_head=complex_head)
    kg, model = run.kg, run.model
    feat, ptr = kg.views("text")
    own = feat[ptr[4] : ptr[5]]
    predictor = ig.Predictor(model, kg)
    found = predictor.predict_new({"text": own}, relation="after", k=99)
    assert len(found) == kg.num_entities
    assert not any(answer.known for answer in found)
    for answer in found:
        assert answer.heads == {"text": pytest.approx(answer.score)}
    both = predictor.predict_new(
        {"text": own, "image": torch.randn(3, 6)}, relation="after", ask="head", k=3
    )
    weights = decision_weights(model, kg.num_relations)
    share = weights["text"] / (weights["text"] + weights["image"])
    for answer in both:
        assert set(answer.heads) == {"image", "text"}
        score = share * answer.heads["text"] + (1 - share) * answer.heads["image"]
        assert answer.score == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("ask", ["tail", "head"])
def test_a_new_entity_scores_as_one_whose_rows_are_the_means_of_the_tables(ask):
    run = make_run(ring_kg(), residual=True)
    kg, model = run.kg, run.model
    with torch.no_grad():
        for table in model.entity_tables:
            table.weight[5] = torch.cat([table.weight[:5], table.weight[6:]]).mean(0)
    views = {}
    for modality in kg.modalities:
        feat, ptr = kg.views(modality)
        views[modality] = feat[ptr[5] : ptr[6]]
        assert len(views[modality])
    entity = torch.tensor([5])
    relation = torch.tensor([kg.num_relations if ask == "head" else 0])
    with torch.no_grad():
        queries = model.queries(entity, relation)
        scores = model.scores(queries, model.candidates(), relation)
    for answer in ig.Predictor(model, kg).predict_new(views, relation="after", ask=ask, k=99):
        for head, score in answer.heads.items():
            expected = scores[head][0, kg.id_of(answer.entity)].item()
            assert score == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({}, "at least one view"),
        ({"text": torch.empty(0, 5)}, "at least one view"),
        ({"sound": torch.ones(1, 5)}, "no modality 'sound'; it has 'image', 'text'"),
        ({"text": torch.ones(1, 4)}, r"\(views, 5\), received torch.float32 of shape \(1, 4\)"),
        ({"text": torch.ones(1, 5, dtype=torch.int64)}, "floating-point"),
        ({"text": torch.full((1, 5), torch.nan)}, "finite"),
    ],
)
def test_views_that_do_not_fit_the_model_are_errors(views, message, run):
    with pytest.raises(ig.DataError, match=message):
        ig.Predictor(run.model, run.kg).predict_new(views, relation="after")


def test_views_whose_scores_overflow_are_an_error_and_not_no_answers(run):
    views = {"text": torch.full((1, 5), 3e38)}
    with pytest.raises(ig.IMVIAError, match=r"predict_new: .* not numbers"):
        ig.Predictor(run.model, run.kg).predict_new(views, relation="after")


# -- the predictor --------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", ["shared", "relation"])
@pytest.mark.parametrize("held", [None, 0])
def test_scores_of_no_more_queries_are_held_than_there_is_room_for(candidates, held, monkeypatch):
    run = make_run(ring_kg(), candidates=candidates)
    predictor = ig.Predictor(run.model, run.kg, held)
    assert predictor.holds == (held is None)
    entity, relation = torch.arange(12).repeat(4), torch.arange(4).repeat_interleave(12)
    expected = predictor.answers(entity, relation, k=3)
    sizes = []
    queries_of = run.model.queries
    monkeypatch.setattr(
        run.model, "queries", lambda *given: sizes.append(len(given[0])) or queries_of(*given)
    )
    monkeypatch.setattr(inference, "PORTION", 16)
    # Room for five rows of 12 candidates, or three of 16.
    monkeypatch.setattr(inference, "SCORES", 5 * 4 * 12 * (len(run.model.heads) + 4))
    found = predictor.answers(entity, relation, k=3)
    assert max(sizes) == (5 if held is None else 3)
    assert sum(sizes) == 48
    assert torch.equal(found.entity, expected.entity)
    torch.testing.assert_close(found.score, expected.score)


def test_a_graph_that_is_not_the_models_is_refused(run):
    kg = run.kg
    other = torch.arange(12).roll(1)
    reordered = ig.MultiViewKG(
        [kg.entities[i] for i in other], kg.relations, kg.train, kg.valid, kg.test
    )
    fewer = ig.MultiViewKG(kg.entities, ["after"], torch.tensor([[0, 0, 1]]))
    more = ig.MultiViewKG([*kg.entities, "e12"], kg.relations, kg.train, test=kg.test)
    for wrong, message in (
        (reordered, "entities are in another order: number 0 is 'e0' there and 'e11'"),
        (fewer, "2 relations; the graph has 1"),
        (more, "12 entities; the graph has 13"),
    ):
        for ask in (ig.evaluate, ig.Predictor):
            with pytest.raises(ig.DataError, match=message):
                ask(run.model, wrong)
    same = ig.MultiViewKG(kg.entities, kg.relations, kg.train, kg.valid, kg.test)
    assert ig.evaluate(run.model, same)["both"]["mrr"] > 0


@pytest.mark.parametrize("candidates", ["shared", "relation"])
def test_a_predictor_gives_what_predict_gives_and_makes_tables_once(candidates, monkeypatch):
    run = make_run(ring_kg(), candidates=candidates)
    predictor = ig.Predictor(run.model, run.kg)
    made = []
    candidates_of = run.model.candidates
    monkeypatch.setattr(
        run.model, "candidates", lambda *given: made.append(given) or candidates_of(*given)
    )
    query = {"head": "e3", "relation": "after"}
    first = predictor.predict(**query)
    assert predictor.predict(**query) == first
    assert len(made) == 1
    assert run.predict(**query) == first


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain") / "run"
    kg = ring_kg(entity_names=["[red]a[/red]", "\x07bell", *[f"Entity {i}" for i in range(2, 12)]])
    ig.fit(kg, out=folder, settings=settings(epochs=1))
    return folder


def command(folder, *arguments):
    runner = CliRunner(env={"COLUMNS": "160"})
    return runner.invoke(command_line, ["explain", str(folder), *arguments])


def test_the_command_prints_what_the_function_gives(folder):
    names = {"head": "e1", "relation": "after", "tail": "e0"}
    arguments = [part for key, value in names.items() for part in (f"--{key}", value)]
    result = command(folder, *arguments, "--json")
    assert result.exit_code == 0, result.output
    expected = ig.load(folder).explain(**names)
    assert json.loads(result.stdout) == expected.as_dict()
    result = command(folder, *arguments)
    assert result.exit_code == 0, result.output
    assert "(␇bell, after, [red]a[/red]): not in the graph" in result.stdout
    assert "number 2" in result.stdout
    assert f"{100 * expected.head.views['image'][0].weight:.1f} %" in result.stdout
    assert "(none)" in result.stdout


def test_the_command_prints_no_table_of_views_for_a_graph_without_any(tmp_path):
    ig.fit(ring_kg(views=False), out=tmp_path / "run", settings=settings(epochs=1))
    result = command(tmp_path / "run", "--head", "e1", "--relation", "after", "--tail", "e0")
    assert result.exit_code == 0, result.output
    assert "decision" in result.stdout
    assert "Views of" not in result.stdout
