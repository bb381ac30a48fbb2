"""IMVIA as a whole: its heads, and the exact form against a loop over triples."""

import copy
import io

import pytest
import reference as loops
import torch
from conftest import randomised
from reference import assert_agree, numbers, tensor
from torch.utils._python_dispatch import TorchDispatchMode

import imvia_graph as ig
from imvia_graph.model import inner, moderate, state_shapes

SMALL = ig.Settings(
    dim=4,
    complex_head=False,
    complex_rank=2,
    relation_dim=3,
    information_dim=4,
    batch_norm=False,
    input_dropout=0,
    relation_dropout=0,
    hidden_dropout=0,
)


def model_of(kg, **changes):
    """A model in float64 whose parameters are all random; nothing in it is random otherwise."""
    return randomised(ig.IMVIA.from_kg(kg, SMALL.replace(**changes))).double().eval()


def scores_of(model, entity, relation):
    """Scores of all entities for queries under one relation, as ranking makes them."""
    entity = torch.tensor(entity)
    relation = torch.full_like(entity, relation)
    shared = model.settings.candidates == "shared"
    tables = model.candidates(None if shared else relation[0])
    return model.scores(model.queries(entity, relation), tables, relation)


# -- the exact form against the loops -------------------------------------------------------------


def loop_embedding(model, i, relation):
    """Eq. 1 to 3 and the joint representation of entity i under a relation, head by head."""
    entity = numbers(model.entity.weight)[i]
    rel = numbers(model.relation[0].weight)[relation]
    heads = {"structure": entity} if model.settings.structure else {}
    for m, (modality, (feat, ptr)) in enumerate(model.views.items()):
        conv, projection = model.encoder.convs[m], model.encoder.projections[m]
        halves = (numbers(conv.gate_entity.weight), numbers(conv.gate_relation.weight))
        weight = [left + right for left, right in zip(*halves, strict=True)]
        told = rel if model.settings.gate == "relation" else [0.0] * len(rel)
        gate = loops.gate(weight, numbers(conv.gate_entity.bias), entity, told)
        if model.settings.gate == "none":
            gate = [1.0] * len(gate)
        out = loops.aggregate(gate, numbers(feat)[ptr[i] : ptr[i + 1]])
        out = numbers(conv.absent) if out is None else out
        out = loops.linear(numbers(projection.weight), numbers(projection.bias), out)
        if model.settings.residual:
            free = numbers(model.residual[m].weight)[i]
            out = [a + b for a, b in zip(out, free, strict=True)]
        heads[modality] = out
    if model.joint is not None:
        heads["joint"] = loops.joint(numbers(model.joint.attention), list(heads.values()))
    if model.complex_entity is not None:
        heads["complex"] = numbers(model.complex_entity.weight)[i]
    return heads


def loop_scores(model, i, relation, j):
    """Eq. 6 of one triple, head by head, and the decision; both ends under the relation."""
    head, tail = loop_embedding(model, i, relation), loop_embedding(model, j, relation)
    scores = {
        name: loops.tucker(
            numbers(decoder.core), head[name], numbers(table.weight)[relation], tail[name]
        )
        for name, decoder, table in zip(
            model.tucker_heads, model.decoder, model.relation, strict=True
        )
    }
    for name, table in zip(scores, model.relation_residual, strict=False):
        blocks = numbers(table.weight)[relation]
        scores[name] = scores[name] + loops.complex_score(head[name], blocks, tail[name])
    if model.settings.decision == "mean":
        scores["decision"] = sum(scores.values()) / len(scores)
    else:
        linear = model.decision.linear
        rel = numbers(model.relation[0].weight)[relation]
        scores["decision"] = loops.decision(
            numbers(linear.weight), numbers(linear.bias), rel, list(scores.values())
        )
    if model.complex_relation is not None:
        number, decided = numbers(model.complex_relation.weight)[relation], scores.pop("decision")
        scores["complex"] = loops.complex_score(head["complex"], number, tail["complex"])
        share = model.settings.complex_weight
        scores["decision"] = (1 - share) * decided + share * scores["complex"]
    return scores


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"residual": False},
        {"relation_residual": False},
        {"joint": False},
        {"decision": "mean"},
        {"structure": False},
        {"gate": "entity"},
        {"gate": "none"},
        {"complex_head": True},
        {"complex_head": True, "complex_weight": 0.2, "decision": "mean"},
    ],
    ids=lambda changes: ",".join(map(str, changes.items())) or "all",
)
@pytest.mark.parametrize("relation", [1, 2])  # one as it stands, one inverse
def test_exact_scores_match_the_loop_over_triples(odd_kg, backend, changes, relation):
    model = model_of(odd_kg, candidates="relation", backend=backend, **changes)
    with torch.no_grad():
        found = scores_of(model, [3, 6, 3], relation)
        for b, i in ((0, 3), (1, 6)):
            for j in range(odd_kg.num_entities):
                expected = loop_scores(model, i, relation, j)
                assert list(found) == list(expected)
                for name, value in expected.items():
                    # Until the decision's softmax is in float64, too (see test_nn).
                    tolerance = 1e-6 if name == "decision" else 1e-9
                    value = pytest.approx(value.item(), rel=tolerance, abs=tolerance)
                    assert found[name][b, j].item() == value
        torch.testing.assert_close(found["decision"][0], found["decision"][2])


def test_without_a_gate_views_count_alike(odd_kg):
    model = model_of(odd_kg, gate="none", residual=False)
    feat, ptr = model.views["a.b"]
    several = int((ptr.diff() > 1).nonzero()[0])
    out = model.embed(torch.tensor([several]), torch.tensor([0])).heads["a.b"]
    projection = model.encoder.projections[model.modalities.index("a.b")]
    mean = feat[ptr[several] : ptr[several + 1]].double().mean(0)
    torch.testing.assert_close(out[0], projection(mean))


def test_without_structure_and_views_there_is_nothing_to_score_by(odd_kg):
    with pytest.raises(ig.SettingsError, match="structure: false leaves no head to score with"):
        model_of(odd_kg, structure=False, modalities=[])


def test_a_single_source_has_no_joint_head_and_nothing_to_align(odd_kg):
    model = model_of(odd_kg, structure=False, modalities=["a.b"])
    assert model.heads == ["a.b"]
    assert model.joint is model.alignment is model.information is model.decision is None


def test_gradients_of_exact_scores_match_the_loop(odd_kg):
    kg = odd_kg
    model = model_of(kg, candidates="relation", modalities=["видео", "a.b"], dim=2, relation_dim=2)
    found = scores_of(model, [6], 3)
    for name in model.heads:
        out = found[name][0, 2]
        # Parameters that a head does not have get a zero gradient from both.
        assert_agree(out, loop_scores(model, 6, 3, 2)[name], list(model.parameters()))


def test_queries_are_under_the_relation_in_both_forms(odd_kg):
    exact = model_of(odd_kg, candidates="relation")
    shared = model_of(odd_kg)
    shared.load_state_dict(exact.state_dict())
    arguments = torch.tensor([0, 3, 5]), torch.tensor([0, 1, 3])
    for one, other in zip(
        exact.queries(*arguments).values(), shared.queries(*arguments).values(), strict=True
    ):
        assert torch.equal(one, other)


def test_exact_form_is_the_shared_one_where_the_gate_ignores_the_relation(odd_kg):
    exact = model_of(odd_kg, candidates="relation")
    shared = model_of(odd_kg)
    differ = [
        not torch.allclose(exact.candidates(torch.tensor(r))[m], exact.candidates()[m])
        for r in range(4)
        for m in ("a.b", "видео")
    ]
    assert all(differ)
    for conv in exact.encoder.convs:
        torch.nn.init.zeros_(conv.gate_relation.weight)
    shared.load_state_dict(exact.state_dict())
    for relation in range(4):
        found, expected = (scores_of(model, [0, 6], relation) for model in (exact, shared))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])


# -- heads and shapes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modalities", "joint", "heads"),
    [
        ([], True, ["structure"]),
        (["keys"], True, ["structure", "keys", "joint"]),
        (["keys"], False, ["structure", "keys"]),
        (None, True, ["structure", "a.b", "keys", "видео", "joint"]),
        (["видео", "a.b"], False, ["structure", "видео", "a.b"]),
    ],
)
@pytest.mark.parametrize("candidates", ["shared", "relation"])
def test_heads_and_shapes(odd_kg, modalities, joint, heads, candidates):
    model = model_of(odd_kg, modalities=modalities, joint=joint, candidates=candidates)
    assert model.heads == heads
    scores = scores_of(model, [0, 4, 6, 6], 3)
    assert list(scores) == [*heads, "decision"]
    assert all(part.shape == (4, 7) for part in scores.values())
    embedding = model.embed(torch.tensor([0, 4]), torch.tensor([1, 3]))
    assert all(part.shape == (2, 4) for part in embedding.heads.values())
    assert list(embedding.present) == [m for m in heads if m not in ("structure", "joint")]


def test_structure_alone_is_tucker(odd_kg):
    model = model_of(odd_kg, modalities=[], relation_residual=False)
    assert model.alignment is None
    assert model.information is None
    scores = scores_of(model, [1], 0)
    assert torch.equal(scores["decision"], scores["structure"])
    core, entity, relation = (
        numbers(part.detach())
        for part in (model.decoder[0].core, model.entity.weight, model.relation[0].weight)
    )
    expected = [loops.tucker(core, entity[1], relation[0], tail) for tail in entity]
    torch.testing.assert_close(scores["structure"][0], tensor(expected))


def test_present_tells_who_has_views(odd_kg):
    present = model_of(odd_kg).embed(torch.arange(7)).present
    assert present["a.b"].nonzero().flatten().tolist() == [0, 3, 5]
    assert present["keys"].nonzero().flatten().tolist() == [0, 1]
    assert present["видео"].nonzero().flatten().tolist() == [0, 2, 4, 5]


def test_candidates_of_each_querys_own_match_the_table(odd_kg):
    model = model_of(odd_kg)
    relation = torch.tensor([0, 3])
    queries = model.queries(torch.tensor([1, 5]), relation)
    table = model.candidates()
    chosen = torch.tensor([[6, 0, 3], [3, 3, 1]])
    own = {name: part[chosen] for name, part in table.items()}
    for name, scores in model.scores(queries, own, relation).items():
        expected = model.scores(queries, table, relation)[name].gather(1, chosen)
        torch.testing.assert_close(scores, expected)


def test_candidates_of_some_entities_are_rows_of_the_table(odd_kg):
    model = model_of(odd_kg)
    some = torch.tensor([5, 0, 5])
    for relation in (None, torch.tensor(2)):
        table = model.candidates(relation)
        for name, part in model.candidates(relation, some).items():
            torch.testing.assert_close(part, table[name][some])


def test_inner_products_of_both_kinds_agree():
    query, table = torch.randn(3, 4), torch.randn(5, 4)
    torch.testing.assert_close(inner(query, table.expand(3, 5, 4)), inner(query, table))


@pytest.mark.parametrize("dim", [6, 7])
def test_scores_of_all_relations_are_those_of_their_blocks(odd_kg, dim):
    model = model_of(odd_kg, dim=dim)
    for decoder in model.decoder:
        torch.nn.init.zeros_(decoder.core)
    heads, tails = model.embed(torch.tensor([0, 3])), model.embed(torch.tensor([2, 2]))
    found = model.relation_scores(heads.heads, tails.heads)
    assert list(found) == model.heads
    for relation in range(2 * odd_kg.num_relations):
        queries = model.decode(heads, torch.tensor([relation, relation]))
        for head, scores in found.items():
            expected = (queries[head] * tails.heads[head]).sum(1)
            torch.testing.assert_close(scores[:, relation], expected)


def test_residual_is_added_to_each_modality(odd_kg):
    model = model_of(odd_kg)
    without = model_of(odd_kg, residual=False)
    assert len(without.residual) == 0
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("residual.")}
    without.load_state_dict(state)
    entity = torch.arange(7)
    found, plain = model.embed(entity).heads, without.embed(entity).heads
    for table, modality in zip(model.residual, model.modalities, strict=True):
        torch.testing.assert_close(found[modality], plain[modality] + table.weight)
    assert torch.equal(found["structure"], plain["structure"])


def test_entities_without_views_share_the_projected_absent_vector(odd_kg):
    model = model_of(odd_kg, residual=False)
    heads = model.embed(torch.tensor([6, 1, 2]), torch.tensor([0, 1, 2])).heads
    conv, projection = model.encoder.convs[0], model.encoder.projections[0]
    torch.testing.assert_close(heads["a.b"], projection(conv.absent).expand(3, 4))


@pytest.mark.parametrize("candidates", ["shared", "relation"])
def test_modality_that_no_entity_has_is_finite(odd_kg, candidates):
    empty = ig.Views(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
    kg = odd_kg.replace(views={"image": empty})
    model = ig.IMVIA.from_kg(kg, SMALL.replace(candidates=candidates, batch_norm=True)).train()
    scores = scores_of(model, [0, 1, 6], 1)
    sum(part.square().sum() for part in scores.values()).backward()
    assert all(part.isfinite().all() for part in scores.values())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["encoder.convs.0.absent"].abs().sum() > 0


def test_detached_decision_trains_no_head_through_itself(odd_kg):
    model = model_of(odd_kg, decision="detached")
    scores = scores_of(model, [0, 3], 1)
    scores["decision"].sum().backward()
    assert model.decision.linear.weight.grad.abs().sum() > 0
    assert model.decoder[0].core.grad is None
    assert model.relation[0].weight.grad is None  # the structural head's, too
    trained = model_of(odd_kg, decision="trained")
    trained.load_state_dict(model.state_dict())
    assert torch.equal(scores_of(trained, [0, 3], 1)["decision"], scores["decision"])


def test_a_trained_decision_gives_each_head_its_weight_as_gradient(odd_kg):
    model = model_of(odd_kg, decision="trained")
    scores = [torch.randn(2, 7, dtype=torch.float64, requires_grad=True) for _ in model.heads]
    relation = torch.tensor([1, 3])
    model.decide(scores, relation).sum().backward()
    for score, weight in zip(scores, model.decision_weights(relation).unbind(1), strict=True):
        torch.testing.assert_close(score.grad, weight[:, None].expand(2, 7))


def test_features_are_scaled_to_a_median_length_of_one_and_columns_to_a_range():
    long, short = torch.tensor([[0.0, 600.0]]), torch.tensor([[0.0, 2.0**-7]])
    assert moderate(long).tolist() == [2.0**-9] * 2  # 600 / 512
    assert moderate(2 * long).tolist() == [2.0**-10] * 2
    assert moderate(short).tolist() == [2.0**7] * 2
    assert moderate(torch.zeros(3, 2)) is None
    # A small column stays as it is beside a large one, and all are raised if all are small.
    assert moderate(torch.tensor([[0.5, 2.0**12]]), typical=False).tolist() == [1.0, 2.0**-3]
    assert moderate(2.0**-20 * torch.tensor([[1.0, 0.5]]), typical=False).tolist() == [2.0**19] * 2


def test_no_queries_have_no_scores(odd_kg):
    model = model_of(odd_kg)
    nothing = torch.empty(0, dtype=torch.int64)
    scores = model.scores(model.queries(nothing, nothing), model.candidates(), nothing)
    assert all(part.shape == (0, 7) for part in scores.values())


# -- state ----------------------------------------------------------------------------------------


def test_state_holds_what_was_learned_and_no_views(odd_kg):
    model = model_of(odd_kg)
    assert not [name for name in model.state_dict() if "view" in name]
    assert set(dict(model.named_parameters())) == set(model.state_dict())  # no batch statistics
    found = sum(value.numel() for value in model.state_dict().values())
    assert found == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("changes", [{}, {"modalities": ["keys"], "complex_head": False}])
def test_shapes_of_the_state_are_told_without_making_it(odd_kg, changes):
    made = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(func)
            return func(*args, **(kwargs or {}))

    settings = SMALL.replace(**changes)
    with Watching():
        shapes = state_shapes(odd_kg, settings)
    state = ig.IMVIA.from_kg(odd_kg, settings).state_dict()
    assert shapes == {name: list(value.shape) for name, value in state.items()}
    # On the device meta torch imports its compiler to draw these: two seconds of each command.
    assert torch.ops.aten.normal_.default not in made


def test_views_move_with_the_model(odd_kg):
    model = ig.IMVIA.from_kg(odd_kg, SMALL)
    assert list(model.views) == odd_kg.modalities
    for modality, (feat, ptr) in model.double().views.items():
        expected, expected_ptr = odd_kg.views(modality)
        assert feat.data_ptr() == expected.data_ptr()  # no copy, whatever the parameters are
        assert torch.equal(ptr, expected_ptr)
    for feat, ptr in model.to("meta").views.values():
        assert feat.is_meta
        assert ptr.is_meta
    assert odd_kg.views("keys")[0].device.type == "cpu"  # the graph's own are left alone


def test_state_round_trips_through_a_file_and_copies(odd_kg):
    model, other = model_of(odd_kg), model_of(odd_kg)
    expected = scores_of(model, [0, 6], 1)["decision"]
    assert not torch.equal(scores_of(other, [0, 6], 1)["decision"], expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for same in (other, copy.deepcopy(model)):
        assert torch.equal(scores_of(same, [0, 6], 1)["decision"], expected)


def test_same_seed_makes_the_same_model(odd_kg):
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(ig.IMVIA.from_kg(odd_kg, SMALL).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_reset_parameters_initialises_every_parameter(odd_kg):
    """As in every layer of DGL and of this library: a reset model is a new model."""
    model = ig.IMVIA.from_kg(odd_kg, SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.reset_parameters()
    assert [name for name, p in model.named_parameters() if not p.isfinite().all()] == []


def test_parameters_start_at_the_sizes_that_training_expects():
    ptr = torch.arange(301)
    chosen = ig.Settings(dim=64, relation_dim=32, complex_rank=16, residual=True)
    model = ig.IMVIA(300, 200, {"image": (torch.randn(300, 48), ptr)}, chosen)
    conv, decoder = model.encoder.convs[0], model.decoder[0]
    bound = (6 / (64 + 32 + 48)) ** 0.5  # of Xavier, for the gate as one linear layer
    expected = {
        "entity": (model.entity.weight, 64**-0.5),
        "residual": (model.residual[0].weight, 64**-0.5),
        "relation": (model.relation[-1].weight, 32**-0.5),
        "blocks": (model.relation_residual[0].weight, 0.05),
        "complex entity": (model.complex_entity.weight, 1e-3),
        "complex relation": (model.complex_relation.weight, 1e-3),
        "core": (decoder.core, 64**-0.5),
        "gate of entities": (conv.gate_entity.weight, bound / 3**0.5),
        "gate of relations": (conv.gate_relation.weight, bound / 3**0.5),
    }
    for name, (value, std) in expected.items():
        assert value.std().item() == pytest.approx(std, rel=0.05), name
        assert abs(value.mean().item()) < 0.1 * std, name
    assert conv.absent.std().item() == pytest.approx(48**-0.5, rel=0.5)
    assert conv.gate_entity.bias.abs().max() == 0


#: The first element of some parameters, drawn with seed 0.
DRAWN = {
    "entity.weight": -0.0736572,
    "residual.2.weight": -0.0282339,
    "encoder.convs.0.absent": -0.5186358,
    "encoder.convs.1.gate_entity.weight": 0.8254247,
    "encoder.convs.2.gate_relation.weight": -0.2048396,
    "encoder.projections.2.bias": -0.4710113,
    "relation.0.weight": 0.1031938,
    "relation.4.weight": 0.4740418,
    "relation_residual.4.weight": 0.0505091,
    "decoder.0.core": 0.324575,
    "decoder.3.core": -0.1159472,
    "complex_entity.weight": 0.0009206,
    "complex_relation.weight": 0.000745,
    "information.estimators.11.log_variance.2.bias": 0.2468247,
}


def test_a_seed_draws_what_it_has_always_drawn(odd_kg):
    """Results that were published with their seed can be made again."""
    torch.manual_seed(0)
    model = ig.IMVIA.from_kg(odd_kg, SMALL.replace(complex_head=True))
    found = {name: value.flatten()[0].item() for name, value in model.named_parameters()}
    for name, value in DRAWN.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name


def test_autocast_to_bfloat16_trains(odd_kg):
    model = randomised(ig.IMVIA.from_kg(odd_kg, SMALL))
    expected = scores_of(model, [0, 3, 6], 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scores_of(model, [0, 3, 6], 1)
    for name, part in scores.items():
        torch.testing.assert_close(part.float(), expected[name], rtol=0.1, atol=0.5)
    sum(part.float().square().sum() for part in scores.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_graph_with_views_of_another_dtype_makes_a_float32_model(odd_kg, dtype):
    feat, ptr = odd_kg.views("a.b")
    owner = torch.repeat_interleave(torch.arange(7), ptr.diff())
    kg = odd_kg.replace(views={"a.b": ig.Views(feat.to(dtype), owner)})
    model = ig.IMVIA.from_kg(kg, SMALL)
    assert scores_of(model, [0, 3], 1)["a.b"].dtype == torch.float32
