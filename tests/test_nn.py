"""The layers: Eq. 1 to 3, the joint representation, Eq. 6 and the decision, against the loops."""

import copy
import pickle

import pytest
import reference as loops
import torch
from conftest import randomised
from reference import assert_agree, numbers, tensor

import imvia_graph as ig
from imvia_graph._dgl import dgl
from imvia_graph.answers import pointer
from imvia_graph.nn import (
    DecisionFusion,
    GatedViewConv,
    JointFusion,
    MultiViewEncoder,
    TuckerDecoder,
    gated_view_conv,
)
from imvia_graph.nn.dropout import Dropout
from imvia_graph.nn.tucker_decoder import complex_product, group_by_relation


def conv_of(view_feats=4, entity_feats=3, rel_feats=2, **options):
    """A layer in float64 whose parameters are all random."""
    return randomised(GatedViewConv(view_feats, entity_feats, rel_feats, **options)).double()


def eq_1_to_3(conv, views, entity, relation, activation=loops.sigmoid):
    """The representation of one entity by the loops; ``views``, ``entity``, … are numbers.

    W_g is put together from the layer's two halves, the entity's columns first.
    """
    weight = numbers(conv.gate_entity.weight)
    if relation is None:
        relation = []
    else:
        halves = zip(weight, numbers(conv.gate_relation.weight), strict=True)
        weight = [left + right for left, right in halves]
    gate = loops.gate(weight, numbers(conv.gate_entity.bias), entity, relation, activation)
    out = loops.aggregate(gate, views)
    return numbers(conv.absent) if out is None else out, gate


def loop_over_edges(conv, graph, view_feat, entity_feat, rel_feat, **options):
    """(destinations, d_m) and the edges' weights, by the loops."""
    view, entity = numbers(view_feat), numbers(entity_feat)
    source, destination = (part.tolist() for part in graph.edges(order="eid"))
    rows, edge_weights = [], [None] * len(source)
    for i in range(graph.num_dst_nodes()):
        relation = rel_feat
        if rel_feat is not None:
            relation = numbers(rel_feat if rel_feat.dim() == 1 else rel_feat[i])
        edges = [e for e in range(len(source)) if destination[e] == i]
        views = [view[source[e]] for e in edges]
        row, gate = eq_1_to_3(conv, views, entity[i], relation, **options)
        rows.append(row)
        for e, weight in zip(edges, loops.view_weights(gate, views), strict=True):
            edge_weights[e] = weight
    return tensor(rows), tensor(edge_weights)


def relation_features(kind, rows):
    shape = {"none": None, "one row": (2,), "a row a destination": (rows, 2)}[kind]
    return None if shape is None else torch.randn(shape, dtype=torch.float64, requires_grad=True)


def check_against_loop(conv, graph, feat, rel_feat, pair=None):
    """Values, weights and gradients of ``conv(graph, feat)``; ``pair`` is what feat stands for."""
    view_feat, entity_feat = pair or feat
    leaves = feat if isinstance(feat, tuple) else (feat,)
    inputs = [*leaves, *conv.parameters(), *([] if rel_feat is None else [rel_feat])]
    out, weight = conv(graph, feat, rel_feat, get_weight=True)
    expected, expected_weight = loop_over_edges(conv, graph, view_feat, entity_feat, rel_feat)
    assert_agree(out, expected, inputs)
    assert_agree(weight, expected_weight, inputs)
    assert_agree(conv(graph, feat, rel_feat), out, inputs)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# Unsorted edges, a pair twice, a view of two entities; entities 1 and 4 have none, 3 has one.
SOURCE = [5, 0, 3, 3, 1, 2, 5, 4, 5]
DESTINATION = [2, 0, 2, 0, 5, 2, 3, 5, 2]


def bipartite(idtype=torch.int64):
    return dgl.heterograph(
        {("view", "of", "entity"): (SOURCE, DESTINATION)},
        num_nodes_dict={"view": 7, "entity": 6},
        idtype=idtype,
    )


# -- GatedViewConv against Eq. 1 to 3 -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "one row", "a row a destination"])
def test_conv_on_a_bipartite_graph_matches_the_loop(backend, kind):
    conv = conv_of(allow_zero_in_degree=True, backend=backend)
    feat = double(7, 4), double(6, 3)
    check_against_loop(conv, bipartite(), feat, relation_features(kind, 6))


def test_conv_on_an_int32_graph_matches_the_loop():
    conv = conv_of(allow_zero_in_degree=True)
    feat = double(7, 4), double(6, 3)
    check_against_loop(conv, bipartite(torch.int32), feat, relation_features("one row", 6))


def test_conv_with_a_hundred_views_an_entity_matches_the_loop(backend):
    count = torch.tensor([103, 0, 1])
    destination = torch.repeat_interleave(torch.arange(3), count)[torch.randperm(104)]
    graph = dgl.heterograph(
        {("view", "of", "entity"): (torch.randperm(104), destination)},
        num_nodes_dict={"view": 104, "entity": 3},
    )
    conv = conv_of(allow_zero_in_degree=True, backend=backend)
    check_against_loop(conv, graph, (double(104, 4), double(3, 3)), relation_features("one row", 3))


@pytest.mark.parametrize("kind", ["none", "one row", "a row a destination"])
def test_conv_on_a_homogeneous_graph_matches_the_loop(kind):
    graph = dgl.graph((SOURCE, DESTINATION), num_nodes=6)
    conv = conv_of(view_feats=3, entity_feats=3, allow_zero_in_degree=True)
    feat = double(6, 3)
    check_against_loop(conv, graph, feat, relation_features(kind, 6), pair=(feat, feat))


@pytest.mark.parametrize("single", [True, False])
def test_conv_on_a_block_matches_the_loop(single):
    graph = dgl.graph((SOURCE, DESTINATION), num_nodes=6)
    seeds = torch.tensor([5, 2, 0])
    block = dgl.to_block(dgl.in_subgraph(graph, seeds), seeds)
    assert block.num_src_nodes() > block.num_dst_nodes()
    feat = double(block.num_src_nodes(), 3)
    entity_feat = feat[:3]  # a block's destinations are its first sources
    conv = conv_of(view_feats=3, entity_feats=3)
    given = feat if single else (feat, double(3, 3))
    pair = (feat, entity_feat) if single else given
    check_against_loop(conv, block, given, relation_features("a row a destination", 3), pair)


@pytest.mark.parametrize("kind", ["none", "one row", "a row a destination"])
def test_conv_aggregate_matches_the_loop_where_entities_repeat(backend, kind):
    conv = conv_of(backend=backend)
    count, entity = [2, 0, 1, 3], [3, 0, 1, 3, 3, 2, 0]  # the same entity, other relations
    ptr = torch.tensor([0, *torch.tensor(count).cumsum(0).tolist()])
    feat, entity_feat, rel_feat = double(6, 4), double(7, 3), relation_features(kind, 7)
    out, weights = conv.aggregate(
        feat, ptr, torch.tensor(entity), entity_feat, rel_feat, get_weight=True
    )
    rows, expected_weights = [], []
    for b, i in enumerate(entity):
        relation = rel_feat
        if rel_feat is not None:
            relation = numbers(rel_feat if rel_feat.dim() == 1 else rel_feat[b])
        views = numbers(feat)[ptr[i] : ptr[i + 1]]
        row, gate = eq_1_to_3(conv, views, numbers(entity_feat)[b], relation)
        rows.append(row)
        expected_weights += loops.view_weights(gate, views)
    inputs = [feat, entity_feat, *conv.parameters(), *([] if rel_feat is None else [rel_feat])]
    assert_agree(out, tensor(rows), inputs)
    assert_agree(weights.weight, tensor(expected_weights), inputs)
    assert weights.ptr.diff().tolist() == [count[i] for i in entity]


def test_conv_on_a_block_of_a_bipartite_graph_matches_the_loop(backend):
    seeds = {"entity": torch.tensor([3, 1, 2])}  # 1 has no view
    block = dgl.to_block(dgl.in_subgraph(bipartite(), seeds), seeds)
    conv = conv_of(allow_zero_in_degree=True, backend=backend)
    feat = double(block.num_src_nodes("view"), 4), double(3, 3)
    check_against_loop(conv, block, feat, relation_features("a row a destination", 3))


def test_conv_with_relu_matches_the_loop():
    """Eq. 1 leaves the activation open: sigmoid or ReLU."""
    conv = conv_of(activation=torch.relu, allow_zero_in_degree=True)
    feat, rel_feat = (double(7, 4), double(6, 3)), double(2)
    expected, _ = loop_over_edges(conv, bipartite(), *feat, rel_feat, activation=loops.relu)
    assert_agree(conv(bipartite(), feat, rel_feat), expected, [*feat, rel_feat])


def test_conv_that_never_sees_a_relation_matches_the_loop():
    conv = conv_of(rel_feats=0, allow_zero_in_degree=True)
    check_against_loop(conv, bipartite(), (double(7, 4), double(6, 3)), None)
    with pytest.raises(dgl.DGLError, match="rel_feats"):
        conv(bipartite(), (double(7, 4), double(6, 3)), double(2))


def test_relation_changes_which_views_count():
    conv = conv_of()
    feat, ptr = double(5, 4), torch.tensor([0, 5])
    entity, entity_feat = torch.tensor([0, 0]), double(1, 3).expand(2, 3)
    out = conv.aggregate(feat, ptr, entity, entity_feat, double(2, 2))
    assert not torch.allclose(out[0], out[1])


@pytest.mark.parametrize("counts", [[1, 0, 1, 1, 0], [3, 1, 1, 0, 2], [1, 4, 2, 2, 3], [0, 0, 0]])
@pytest.mark.parametrize("relations", ["none", "one", "each", "table"])
def test_an_only_view_is_taken_as_it_is_and_changes_nothing_in_the_rest(
    counts, relations, monkeypatch
):
    ptr = pointer(torch.tensor(counts))
    feat, entity = double(int(ptr[-1]), 4), torch.arange(len(counts)).repeat(2)
    entity_feat = double(len(entity), 3)
    table, relation = double(20, 2), torch.arange(len(entity)) % 3
    given = {
        "none": {},
        "one": {"rel_feat": table[0]},
        "each": {"rel_feat": table[relation]},
        "table": {"rel_feat": table, "relation": relation},
    }[relations]
    conv = GatedViewConv(4, 3, 2, allow_zero_in_degree=True).double()
    inputs = [feat, entity_feat, table, *conv.parameters()]
    out = conv.aggregate(feat, ptr, entity, entity_feat, **given)
    monkeypatch.setattr(gated_view_conv, "_worth_gating", lambda count: None)
    assert_agree(out, conv.aggregate(feat, ptr, entity, entity_feat, **given), inputs)
    assert all(grad is not None for grad in torch.autograd.grad(out.sum(), conv.gate_entity.weight))


def test_edge_weights_are_in_the_graphs_order_of_edges():
    conv = conv_of(allow_zero_in_degree=True)
    feat = double(7, 4), double(6, 3)
    graph = bipartite()
    order = torch.randperm(len(SOURCE))
    moved = dgl.heterograph(
        {("view", "of", "entity"): (torch.tensor(SOURCE)[order], torch.tensor(DESTINATION)[order])},
        num_nodes_dict={"view": 7, "entity": 6},
    )
    _, weight = conv(graph, feat, get_weight=True)
    out, moved_weight = conv(moved, feat, get_weight=True)
    torch.testing.assert_close(moved_weight, weight[order])
    # DGL's own message passing gives the same sums with these weights.
    moved.nodes["view"].data["f"] = feat[0]
    moved.edata["w"] = moved_weight[:, None]
    moved.update_all(dgl.function.u_mul_e("f", "w", "m"), dgl.function.sum("m", "out"))
    has_view = moved.in_degrees() > 0
    torch.testing.assert_close(moved.nodes["entity"].data["out"][has_view], out[has_view])


# -- entities without views -----------------------------------------------------------------------


def test_zero_in_degree_raises_unless_allowed():
    conv = conv_of()
    feat = double(7, 4), double(6, 3)
    with pytest.raises(dgl.DGLError, match="allow_zero_in_degree"):
        conv(bipartite(), feat)
    conv.set_allow_zero_in_degree(True)
    assert conv(bipartite(), feat).shape == (6, 4)
    conv.set_allow_zero_in_degree(False)
    with pytest.raises(dgl.DGLError):
        conv(bipartite(), feat)


@pytest.mark.parametrize("relations", [2, 9])  # fewer than the queries, and more
def test_relations_may_be_given_as_rows_of_a_table(relations):
    conv = conv_of().double()
    feat, ptr = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 2, 5])
    entity, relation = torch.tensor([1, 0, 1, 1]), torch.tensor([0, 1, 1, 0])
    entity_feat = torch.randn(4, conv.entity_feats, dtype=torch.float64)
    table = torch.randn(relations, conv.rel_feats, dtype=torch.float64, requires_grad=True)
    found = conv.aggregate(feat, ptr, entity, entity_feat, table, relation=relation)
    expected = conv.aggregate(feat, ptr, entity, entity_feat, table[relation])
    assert_agree(found, expected, [table, *conv.gate_relation.parameters()])


def test_entity_without_views_gets_the_absent_vector(backend):
    conv = conv_of(allow_zero_in_degree=True, backend=backend)
    feat = double(7, 4), double(6, 3)
    out = conv(bipartite(), feat, double(2))
    assert torch.equal(out[[1, 4]], conv.absent.expand(2, 4))
    out.sum().backward()
    assert torch.equal(conv.absent.grad, torch.full((4,), 2.0).double())
    assert feat[1].grad[[1, 4]].eq(0).all()
    assert all(p.grad.isfinite().all() for p in [*feat, *conv.parameters()])


def test_absent_vector_has_a_gradient_of_zero_where_nobody_needs_it(backend):
    """DistributedDataParallel waits for it, whatever is in the batch."""
    conv = conv_of(backend=backend)
    graph = dgl.heterograph({("view", "of", "entity"): ([0, 1, 2], [0, 0, 1])})
    conv(graph, (double(3, 4), double(2, 3)), double(2)).sum().backward()
    assert torch.equal(conv.absent.grad, torch.zeros(4).double())


@pytest.mark.parametrize("source", [[], [0]], ids=["no-edges", "no-entities-with-views-but-one"])
def test_graph_with_hardly_any_view_gives_no_nan(source):
    graph = dgl.heterograph(
        {("view", "of", "entity"): (torch.tensor(source, dtype=torch.int64),) * 2},
        num_nodes_dict={"view": 3, "entity": 3},
    )
    conv = conv_of(allow_zero_in_degree=True)
    feat = double(3, 4), double(3, 3)
    out, weight = conv(graph, feat, get_weight=True)
    out.sum().backward()
    assert weight.tolist() == [1.0] * len(source)
    assert torch.equal(out[1:], conv.absent.expand(2, 4))
    assert all(p.grad is None or p.grad.isfinite().all() for p in [*feat, *conv.parameters()])


def test_zero_vectors_give_finite_gradients_everywhere(backend):
    conv = conv_of(allow_zero_in_degree=True, activation=torch.relu, backend=backend)
    feat = torch.zeros(7, 4, requires_grad=True), torch.zeros(6, 3, requires_grad=True)
    conv = conv.float()
    conv(bipartite(), feat, torch.zeros(2)).sum().backward()
    assert all(p.grad.isfinite().all() for p in [*feat, *conv.parameters()] if p.grad is not None)


# -- MultiViewEncoder -----------------------------------------------------------------------------


def encoder_of(kg, backend="auto"):
    widths = {m: kg.views(m)[0].shape[1] for m in kg.modalities}
    return randomised(MultiViewEncoder(widths, 3, 2, 5, backend))


def test_encoder_projects_what_the_loop_aggregates(odd_kg, backend):
    encoder = encoder_of(odd_kg, backend).double()
    entity = torch.tensor([3, 6, 0, 3])
    entity_feat, rel_feat = double(4, 3), double(4, 2)
    views = {m: (feat.double(), ptr) for m, (feat, ptr) in _views(odd_kg).items()}
    out = encoder.encode(views, entity, entity_feat, rel_feat)
    assert list(out) == odd_kg.modalities
    for m, (modality, (feat, ptr)) in enumerate(views.items()):
        projection = encoder.projections[m]
        rows = []
        for b, i in enumerate(entity.tolist()):
            mine = numbers(feat)[ptr[i] : ptr[i + 1]]
            row, _ = eq_1_to_3(
                encoder.conv(modality), mine, numbers(entity_feat)[b], numbers(rel_feat)[b]
            )
            rows.append(loops.linear(numbers(projection.weight), numbers(projection.bias), row))
        assert_agree(out[modality], tensor(rows), [entity_feat, rel_feat, *encoder.parameters()])


def test_encoder_gives_the_same_from_the_graph_and_from_the_views(odd_kg):
    encoder = encoder_of(odd_kg)
    entity = torch.arange(odd_kg.num_entities)
    entity_feat, rel_feat = torch.randn(7, 3), torch.randn(2)
    by_graph = encoder(odd_kg.graph, entity_feat, rel_feat)
    by_views = encoder.encode(_views(odd_kg), entity, entity_feat, rel_feat)
    for modality in odd_kg.modalities:
        torch.testing.assert_close(by_graph[modality], by_views[modality])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_encoder_takes_views_of_any_floating_dtype(odd_kg, dtype):
    """`MultiViewKG` takes them all; those that NumPy makes are float64."""
    views = {
        m: ig.Views(feat.to(dtype), torch.repeat_interleave(torch.arange(7), ptr.diff()))
        for m, (feat, ptr) in _views(odd_kg).items()
    }
    kg = odd_kg.replace(views=views)
    out = encoder_of(kg)(kg.graph, torch.randn(7, 3), torch.randn(2))
    assert all(part.isfinite().all() for part in out.values())


def test_encoder_without_the_views_of_a_modality_says_which_it_expects(odd_kg):
    encoder, views = encoder_of(odd_kg), _views(odd_kg)
    del views["keys"]
    with pytest.raises(ig.IMVIAError, match=r"keys.*received"):
        encoder.encode(views, torch.tensor([0]), torch.randn(1, 3))


def _views(kg):
    return {modality: kg.views(modality) for modality in kg.modalities}


# -- JointFusion, DecisionFusion ------------------------------------------------------------------


def test_joint_representation_matches_the_loop():
    fusion = randomised(JointFusion(in_feats=4, num_modalities=3)).double()
    feat = torch.randn(5, 3, 4, dtype=torch.float64)
    feat[2] = 0.0
    feat.requires_grad_()
    joint, attention = fusion(feat, get_attention=True)
    expected = tensor([loops.joint(numbers(fusion.attention), row) for row in numbers(feat)])
    assert_agree(joint, expected, [feat, fusion.attention])
    torch.testing.assert_close(attention.sum(-1), torch.ones(5).double())
    assert_agree((attention[..., None] * feat).sum(1), expected, [feat])
    assert torch.equal(fusion(feat), joint)


def test_joint_representation_starts_as_the_mean():
    feat = torch.randn(5, 3, 4)
    torch.testing.assert_close(JointFusion(4, 3)(feat), feat.mean(1))


def test_joint_representation_of_large_embeddings_is_finite():
    fusion = JointFusion(4, 3)
    torch.nn.init.constant_(fusion.attention, 1e4)
    feat = torch.randn(5, 3, 4, requires_grad=True)
    out = fusion(feat)
    out.sum().backward()
    assert out.isfinite().all()
    assert feat.grad.isfinite().all()


def test_decision_matches_the_loop():
    fusion = randomised(DecisionFusion(rel_feats=3, num_heads=4))
    rel_feat = torch.randn(5, 3, requires_grad=True)
    scores = torch.randn(4, 5, 6, requires_grad=True)
    found = fusion(rel_feat, scores.unbind())
    weight, bias = numbers(fusion.linear.weight), numbers(fusion.linear.bias)
    rel, by_head = numbers(rel_feat), numbers(scores)
    expected = [
        [loops.decision(weight, bias, rel[b], [head[b][n] for head in by_head]) for n in range(6)]
        for b in range(5)
    ]
    inputs = [rel_feat, scores, *fusion.parameters()]
    assert_agree(found, tensor(expected), inputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fusion.weights(rel_feat).sum(-1), torch.ones(5))


def test_decision_starts_as_the_mean():
    scores = torch.randn(4, 5, 6)
    torch.testing.assert_close(DecisionFusion(3, 4)(torch.randn(5, 3), scores), scores.mean(0))


def test_decision_keeps_the_precision_of_float64_scores():
    fusion = randomised(DecisionFusion(rel_feats=3, num_heads=2)).double()
    rel_feat, scores = double(1, 3), double(2, 1, 1)
    expected = loops.decision(
        numbers(fusion.linear.weight),
        numbers(fusion.linear.bias),
        numbers(rel_feat)[0],
        [head[0][0] for head in numbers(scores)],
    )
    assert_agree(fusion(rel_feat, scores.unbind()), tensor([[expected]]), [rel_feat, scores])


# -- TuckerDecoder against Eq. 6 ------------------------------------------------------------------


def test_tucker_scores_match_the_loop():
    decoder = randomised(TuckerDecoder(3, 2, batch_norm=False)).double()
    head, rel_feat, tails = double(6, 3), double(4, 2), double(5, 3)
    relation = [3, 0, 3, 1, 0, 3]  # repeated, in no order; 2 is not asked for
    found = decoder(head, rel_feat, torch.tensor(relation)) @ tails.T
    core, h, r, t = (numbers(part) for part in (decoder.core, head, rel_feat, tails))
    expected = [
        [loops.tucker(core, h[b], r[i], tail) for tail in t] for b, i in enumerate(relation)
    ]
    assert_agree(found, tensor(expected), [head, rel_feat, tails, decoder.core])


def test_relations_with_few_queries_and_with_many_have_products_of_their_own():
    sizes = {5: 1, 0: 1, 7: 2, 2: 3, 9: 4, 3: 7, 8: 5, 6: 66, 1: 70, 10: 66}
    relation = torch.tensor([i for i, size in sizes.items() for _ in range(size)])
    relation = relation[torch.randperm(len(relation))]
    decoder = randomised(TuckerDecoder(3, 2, batch_norm=False)).double()
    head, rel_feat = double(len(relation), 3), double(12, 2)
    core, h, r = (numbers(part) for part in (decoder.core, head, rel_feat))
    units = torch.eye(3).tolist()
    expected = [
        [loops.tucker(core, h[b], r[i], unit) for unit in units]
        for b, i in enumerate(relation.tolist())
    ]
    assert_agree(
        decoder(head, rel_feat, relation), tensor(expected), [head, rel_feat, decoder.core]
    )
    small = relation[:9]  # a gradient of the gradient, too
    inputs = (double(9, 3), double(12, 2))
    assert torch.autograd.gradgradcheck(lambda x, y: decoder(x, y, small), inputs)


@pytest.mark.parametrize("width", [1, 3, 4])  # an odd one has a last number that is real
def test_tucker_scores_with_blocks_match_the_loop(width):
    decoder = randomised(TuckerDecoder(width, 2, batch_norm=False)).double()
    head, rel_feat, tails = double(6, width), double(4, 2), double(5, width)
    blocks = double(4, width)
    relation = [3, 0, 3, 1, 0, 3]
    found = decoder(head, rel_feat, torch.tensor(relation), blocks) @ tails.T
    parts = (decoder.core, head, rel_feat, tails, blocks)
    core, h, r, t, c = (numbers(part) for part in parts)
    expected = [
        [loops.tucker(core, h[b], r[i], tail) + loops.complex_score(h[b], c[i], tail) for tail in t]
        for b, i in enumerate(relation)
    ]
    assert_agree(found, tensor(expected), [head, rel_feat, tails, decoder.core, blocks])


def test_blocks_alone_score_as_complex_numbers_do():
    decoder = TuckerDecoder(6, 2, batch_norm=False).double()
    decoder.core.data.zero_()
    head, blocks, tail = torch.randn(3, 4, 6, dtype=torch.float64).unbind()
    query = decoder(head, torch.ones(4, 2).double(), torch.arange(4), blocks)
    h, c, t = (torch.complex(*part.chunk(2, dim=1)) for part in (head, blocks, tail))
    torch.testing.assert_close((query * tail).sum(1), (h * c * t.conj()).sum(1).real)


@pytest.mark.parametrize("rows", [(1, 3), (3, 1)])
def test_one_row_of_numbers_is_multiplied_with_each_of_several(rows):
    left, right = (double(size, 5) for size in rows)
    several = complex_product(left.expand(3, -1), right.expand(3, -1))
    assert_agree(complex_product(left, right), several, [left, right])


def test_batch_normalisation_in_evaluation_leaves_eq_6_up_to_its_scale():
    decoder = TuckerDecoder(3, 2).double().eval()
    plain = TuckerDecoder(3, 2, batch_norm=False).double()
    plain.core = decoder.core
    arguments = double(4, 3), double(2, 2), torch.tensor([0, 1, 1, 0])
    # Fresh statistics: mean 0, variance 1, twice.
    scale = 1 / (1 + decoder.input_norm.eps)
    torch.testing.assert_close(decoder(*arguments), plain(*arguments) * scale)


def test_batch_normalisation_is_over_the_batch_in_training():
    decoder = TuckerDecoder(3, 2).double()
    query = decoder(5 + 3 * double(64, 3), double(2, 2), torch.arange(64) % 2)
    torch.testing.assert_close(query.mean(0), torch.zeros(3).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(
        query.var(0, correction=0), torch.ones(3).double(), atol=0.01, rtol=0
    )
    assert decoder.input_norm.running_mean.abs().min() > 0.1


def test_a_batch_of_one_is_normalised_as_in_evaluation():
    decoder = TuckerDecoder(3, 2)
    arguments = torch.randn(1, 3), torch.randn(2, 2), torch.tensor([1])
    decoder(torch.randn(8, 3), arguments[1], torch.arange(8) % 2)
    statistics = copy.deepcopy(list(decoder.buffers()))
    trained = decoder(*arguments)
    for before, after in zip(statistics, decoder.buffers(), strict=True):
        assert torch.equal(before, after)
    torch.testing.assert_close(trained, decoder.eval()(*arguments))


def test_no_queries_give_no_query_vectors():
    decoder = TuckerDecoder(3, 2).eval()
    query = decoder(torch.empty(0, 3), torch.randn(2, 2), torch.empty(0, dtype=torch.int64))
    assert query.shape == (0, 3)


def test_relation_dropout_is_drawn_once_a_relation():
    decoder = TuckerDecoder(8, 4, relation_dropout=0.5, batch_norm=False)
    head = torch.randn(1, 8).expand(6, 8)
    query = decoder(head, torch.randn(1, 4).expand(2, 4), torch.tensor([0, 1, 0, 1, 0, 0]))
    torch.testing.assert_close(query[[0, 2, 4, 5]], query[[0]].expand(4, 8))
    torch.testing.assert_close(query[1], query[3])
    assert not torch.allclose(query[0], query[1])  # equal embeddings, masks of their own


@pytest.mark.parametrize("which", ["input_dropout", "relation_dropout", "hidden_dropout"])
def test_dropout_acts_in_training_only(which):
    decoder = TuckerDecoder(8, 4, **{which: 0.5})
    arguments = torch.randn(6, 8), torch.randn(2, 4), torch.arange(6) % 2
    assert not torch.equal(decoder(*arguments), decoder(*arguments))
    decoder.eval()
    assert torch.equal(decoder(*arguments), decoder(*arguments))


def test_hidden_dropout_zeroes_the_query():
    decoder = TuckerDecoder(50, 4, hidden_dropout=0.3, batch_norm=False)
    query = decoder(torch.randn(100, 50), torch.randn(2, 4), torch.arange(100) % 2)
    assert query.eq(0).float().mean().item() == pytest.approx(0.3, abs=0.05)


# -- what every layer does ------------------------------------------------------------------------

GRAPH = dgl.graph(([0, 1, 2, 2], [1, 2, 0, 1]))
VIEWS = {"видео": (torch.rand(3, 4), torch.tensor([0, 2, 2, 3]))}

#: A layer, what it is called with, and what its repr tells.
LAYERS = {
    "GatedViewConv": (
        lambda: GatedViewConv(4, 4, 2),
        lambda layer: layer(GRAPH, torch.linspace(-1, 1, 12).view(3, 4), torch.ones(2)),
        "view_feats=4, entity_feats=4, rel_feats=2, allow_zero_in_degree=False",
    ),
    "MultiViewEncoder": (
        lambda: MultiViewEncoder({"видео": 4}, 3, 2, 5),
        lambda layer: layer.encode(VIEWS, torch.arange(3), torch.ones(3, 3), torch.ones(2))[
            "видео"
        ],
        "видео",
    ),
    "JointFusion": (
        lambda: JointFusion(4, 3),
        lambda layer: layer(torch.linspace(-1, 1, 24).view(2, 3, 4)),
        "in_feats=4, num_modalities=3",
    ),
    "DecisionFusion": (
        lambda: DecisionFusion(4, 2),
        lambda layer: layer(torch.ones(3, 4), [torch.ones(3, 7), torch.zeros(3, 7)]),
        "in_features=4, out_features=2",
    ),
    "TuckerDecoder": (
        lambda: TuckerDecoder(6, 4),
        lambda layer: layer(
            torch.linspace(-1, 1, 30).view(5, 6),
            torch.linspace(1, 2, 12).view(3, 4),
            torch.tensor([2, 0, 0, 2, 1]),
        ),
        "entity_feats=6, rel_feats=4",
    ),
}


@pytest.fixture(params=LAYERS)
def layer_case(request):
    make, call, shown = LAYERS[request.param]
    return lambda: randomised(make()).eval(), call, shown


def test_repr_tells_the_sizes(layer_case):
    make, _, shown = layer_case
    assert shown in repr(make())


def test_copies_are_equal_and_apart(layer_case):
    make, call, _ = layer_case
    layer = make()
    expected = call(layer).detach().clone()
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(call(clone), expected)
        randomised(clone)
        assert not torch.equal(call(clone), expected)
    assert torch.equal(call(layer), expected)


def test_state_makes_another_layer_the_same(layer_case):
    make, call, _ = layer_case
    layer, other = make(), make()
    assert not torch.equal(call(layer), call(other))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(call(layer), call(other))


def test_autocast_to_bfloat16_trains(layer_case):
    make, call, _ = layer_case
    layer = make().train()
    expected = call(layer).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(layer)
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    out.float().square().sum().backward()
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    "name", ["GatedViewConv", "JointFusion", "DecisionFusion", "TuckerDecoder"]
)
def test_reset_parameters_initialises_every_parameter(name):
    make, call, _ = LAYERS[name]
    layer = make()
    torch.manual_seed(3)
    layer.reset_parameters()
    first = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    torch.manual_seed(3)
    layer.reset_parameters()
    assert all(torch.equal(value, first[key]) for key, value in layer.state_dict().items())
    assert call(layer).isfinite().all()


@pytest.mark.parametrize("name", ["GatedViewConv", "TuckerDecoder"])
def test_reset_parameters_draws_anew(name):
    layer = LAYERS[name][0]()
    before = copy.deepcopy(dict(layer.named_parameters()))
    layer.reset_parameters()
    drawn = {"gate_entity.weight", "gate_relation.weight", "absent", "core"} & set(before)
    assert drawn
    for key in drawn:
        assert not torch.equal(dict(layer.named_parameters())[key], before[key])


# -- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_and_the_mean(p, dtype):
    torch.manual_seed(0)
    out = Dropout(p)(torch.ones(300, 333, dtype=dtype)).double()
    kept = out != 0
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=0.01)
    assert out[kept].unique().numel() == 1
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    # Neighbours, whose bits are of one draw, are independent.
    both = (kept[:, 1:] & kept[:, :-1]).double().mean().item()
    assert both == pytest.approx((1 - p) ** 2, abs=0.01)


def test_dropout_passes_the_gradient_of_what_it_keeps_and_follows_the_seed():
    feat = torch.rand(7, 5, requires_grad=True)
    torch.manual_seed(3)
    out = Dropout(0.4)(feat)
    out.sum().backward()
    torch.testing.assert_close(feat.grad, (out / feat).detach())
    torch.manual_seed(3)
    assert torch.equal(Dropout(0.4)(feat), out)


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-9])
def test_dropout_at_the_ends_is_torchs(p):
    feat = torch.rand(4, 4)
    assert torch.equal(Dropout(p)(feat), torch.nn.functional.dropout(feat, p))


def test_dropout_does_nothing_in_evaluation():
    feat = torch.rand(4, 4)
    assert Dropout(0.5).eval()(feat) is feat


# -- mistakes -------------------------------------------------------------------------------------


def mostly_without_views():
    """Entities of three views, one, none: few have several, so that those alone are gated."""
    return dgl.heterograph(
        {("view", "of", "entity"): ([0, 1, 2, 3], [0, 0, 0, 1])},
        {"view": 4, "entity": 5},
    )


@pytest.mark.parametrize(
    ("views", "entities", "match"),
    [
        (5, 5, r"number of nodes: view_feat has 5 rows.*4 srcnodes"),
        (3, 5, r"number of nodes: view_feat has 3 rows"),
        (4, 6, r"number of nodes: entity_feat has 6 rows.*5 dstnodes"),
        (4, 4, r"number of nodes: entity_feat has 4 rows"),
    ],
)
def test_features_of_other_nodes_than_the_graphs_are_refused(views, entities, match):
    conv = GatedViewConv(2, 3, allow_zero_in_degree=True)
    with pytest.raises(dgl.DGLError, match=match):
        conv(mostly_without_views(), (torch.rand(views, 2), torch.rand(entities, 3)))


@pytest.mark.parametrize("name", ["entity_feat", "rel_feat", "relation"])
def test_a_row_of_everything_is_wanted_for_each_query(name):
    conv = GatedViewConv(2, 3, 4)
    given = {"entity_feat": torch.rand(5, 3), "rel_feat": torch.rand(5, 4)}
    if name == "relation":
        given["relation"] = torch.zeros(5, dtype=torch.int64)
    views = torch.rand(4, 2), torch.tensor([0, 3, 4, 4, 4, 4])
    for rows in (4, 6):
        wrong = {**given, name: given[name].new_zeros(rows, *given[name].shape[1:])}
        with pytest.raises(ig.IMVIAError, match=rf"a row of {name} for each of 5.*\({rows}"):
            conv.aggregate(*views, torch.arange(5), **wrong)
    assert conv.aggregate(*views, torch.arange(5), **given).shape == (5, 2)


@pytest.mark.parametrize("graph", [mostly_without_views(), dgl.graph(([0, 1, 2], [0, 0, 0]))])
def test_one_row_of_a_relation_serves_all(graph):
    conv = GatedViewConv(2, 3, 4, allow_zero_in_degree=True)
    pair = torch.rand(graph.num_src_nodes(), 2), torch.rand(graph.num_dst_nodes(), 3)
    relation = torch.rand(1, 4)
    torch.testing.assert_close(conv(graph, pair, relation), conv(graph, pair, relation[0]))


def test_one_relation_of_a_table_serves_all():
    conv = GatedViewConv(2, 3, 4)
    views = torch.rand(4, 2), torch.tensor([0, 3, 4, 4, 4, 4])
    entity, table = torch.rand(5, 3), torch.rand(6, 4)
    expected = conv.aggregate(*views, torch.arange(5), entity, table[2])
    found = conv.aggregate(*views, torch.arange(5), entity, table, relation=torch.tensor([2]))
    torch.testing.assert_close(found, expected)


def test_a_pointer_beyond_the_views_is_refused_by_the_layer():
    conv = GatedViewConv(2, 3)
    with pytest.raises(ig.IMVIAError, match="number of views, 4"):
        conv.aggregate(torch.rand(4, 2), torch.tensor([0, 3, 5]), torch.arange(2), torch.rand(2, 3))
    with pytest.raises(ig.IMVIAError, match="received -1"):
        conv.aggregate(
            torch.rand(4, 2), torch.tensor([0, 3, 4]), torch.tensor([-1]), torch.rand(1, 3)
        )


@pytest.mark.parametrize(
    "scores",
    [[(3, 5)], [(3, 5)] * 3, [(3, 5), (2, 5)], [(3, 5), (3, 1)], [(3, 3), (3,)]],
    ids=str,
)
def test_a_decision_wants_a_score_of_each_head_and_query(scores):
    with pytest.raises(ig.IMVIAError, match=r"2 heads.*3 queries; received"):
        DecisionFusion(4, 2)(torch.rand(3, 4), [torch.rand(shape) for shape in scores])


def test_a_decision_takes_one_candidate_a_query():
    fusion = randomised(DecisionFusion(4, 2))
    relation, scores = torch.rand(3, 4), torch.rand(2, 3)
    expected = fusion(relation, scores[:, :, None])
    torch.testing.assert_close(fusion(relation, scores), expected[:, 0])


def test_a_decision_of_scores_that_are_integers_is_that_of_the_same_numbers():
    fusion = randomised(DecisionFusion(4, 2))
    relation, scores = torch.rand(3, 4), torch.randint(-9, 9, (2, 3, 5))
    torch.testing.assert_close(fusion(relation, scores), fusion(relation, scores.float()))


@pytest.mark.parametrize("shape", [(3, 5), (4,), (3, 1, 4)], ids=str)
def test_a_decision_wants_relations_of_its_width(shape):
    with pytest.raises(ig.IMVIAError, match=r"DecisionFusion: expected rel_feat \(B, 4\); rec"):
        DecisionFusion(4, 2)(torch.rand(shape), torch.rand(2, 3, 5))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_fusions_are_traced():
    for layer, shapes, others in (
        (JointFusion(8, 3), [(5, 3, 8)], [(7, 3, 8)]),
        (DecisionFusion(4, 2), [(3, 4), (2, 3, 7)], [(5, 4), (2, 5, 9)]),
    ):
        traced = torch.jit.trace(randomised(layer), tuple(map(torch.rand, shapes)))
        given = [torch.rand(shape) for shape in others]
        torch.testing.assert_close(traced(*given), layer(*given))


@pytest.mark.parametrize("shape", [(5, 2, 8), (5, 4, 8), (5, 3, 7), (8,), ()])
def test_joint_fusion_wants_its_modalities(shape):
    with pytest.raises(ig.IMVIAError, match=r"3 modalities of \(B, 8\).*received"):
        JointFusion(8, 3)(torch.rand(shape))


def test_a_decoder_wants_a_relation_for_each_row():
    with pytest.raises(ig.IMVIAError, match=r"received 3 for \(5, 6\)"):
        TuckerDecoder(6, 4)(torch.rand(5, 6), torch.rand(3, 4), torch.tensor([0, 2, 1]))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"head": torch.rand(5, 7)}, r"head \(B, 6\); received \(5, 7\)"),
        ({"rel_feat": torch.rand(3, 5)}, r"rel_feat \(R, 4\); received \(3, 5\)"),
        ({"rel_feat": torch.rand(4)}, r"rel_feat \(R, 4\); received \(4,\)"),
        ({"rel_blocks": torch.rand(3, 5)}, r"rel_blocks \(3, 6\); received \(3, 5\)"),
        ({"rel_blocks": torch.rand(9, 6)}, r"rel_blocks \(3, 6\); received \(9, 6\)"),
        ({"relation": torch.tensor([0, 2, 3, 0, 1])}, "from 0 to 2; received 3"),
        ({"relation": torch.tensor([0, 2, -1, 0, 1])}, "from 0 to 2; received -1"),
        ({"relation": torch.zeros(5)}, r"in int64.*received \(5,\) in torch.float32"),
        ({"relation": [0, 2, 2, 0, 1]}, "received the type list"),
    ],
)
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_decoder_says_what_it_expects(batch_norm, changes, match):
    given = {
        "head": torch.rand(5, 6),
        "rel_feat": torch.rand(3, 4),
        "relation": torch.tensor([0, 2, 2, 0, 1]),
        "rel_blocks": torch.rand(3, 6),
    }
    decoder = TuckerDecoder(6, 4, batch_norm=batch_norm)
    with pytest.raises(ig.IMVIAError, match=f"TuckerDecoder: expected .*{match}"):
        decoder(**{**given, **changes})


def test_a_decoder_takes_relations_in_int32():
    decoder, relation = TuckerDecoder(6, 4).eval(), torch.tensor([0, 2, 2, 0, 1])
    head, rel_feat = torch.rand(5, 6), torch.rand(3, 4)
    expected = decoder(head, rel_feat, relation)
    assert torch.equal(decoder(head, rel_feat, relation.int()), expected)
    assert torch.equal(group_by_relation(relation.int()).of_each(), relation)


# -- gradients of gradients, and changes in place --------------------------------------------------


def test_joint_fusion_has_gradients_of_gradients():
    fusion = randomised(JointFusion(3, 2)).double()
    parts = [double(4, 3), double(4, 3)]

    def fused(attention, *parts):
        return torch.func.functional_call(fusion, {"attention": attention}, (list(parts), True))

    assert torch.autograd.gradgradcheck(fused, (fusion.attention, *parts))
    (first,) = torch.autograd.grad(fusion(parts).sum(), parts[0], create_graph=True)
    assert torch.autograd.grad(first.sum(), parts[1])[0].abs().max() > 0


@pytest.mark.parametrize("width", [3, 4])
def test_a_decoder_with_blocks_and_dropout_has_gradients_of_gradients(width):
    decoder = randomised(TuckerDecoder(width, 2, batch_norm=False, hidden_dropout=0.5))
    relation = torch.tensor([1, 0, 1])

    def query(head, rel_feat, blocks):
        torch.manual_seed(0)
        return decoder.double()(head, rel_feat, relation, blocks)

    inputs = double(3, width), double(2, 2), double(2, width)
    assert torch.autograd.gradgradcheck(query, inputs)
    decoder, inputs = decoder.float(), [part.float() for part in inputs]  # our own dropout
    (first,) = torch.autograd.grad(
        decoder(inputs[0], inputs[1], relation, inputs[2]).sum(), inputs[0], create_graph=True
    )
    assert torch.autograd.grad(first.sum(), inputs[2])[0].abs().max() > 0


def test_gradients_of_gradients_are_refused_where_a_backend_has_none(backend):
    conv = GatedViewConv(3, 2, backend=backend)
    views = torch.rand(4, 3), torch.tensor([0, 2, 4])
    entity_feat = torch.rand(2, 2, requires_grad=True)
    out = conv.aggregate(*views, torch.tensor([0, 1]), entity_feat)
    if backend == "reference":
        (first,) = torch.autograd.grad(out.sum(), entity_feat, create_graph=True)
        assert torch.autograd.grad(first.sum(), entity_feat)[0].abs().max() > 0
        return
    with pytest.raises(ig.IMVIAError, match=r"first-order.*'reference'"):
        torch.autograd.grad(out.sum(), entity_feat, create_graph=True)


@pytest.mark.parametrize("counts", [[2, 3], [2, 0], [1, 1]], ids=str)
def test_what_a_layer_gives_can_be_changed_in_place(backend, counts):
    conv = GatedViewConv(3, 2, backend=backend)
    views = torch.randn(sum(counts), 3), torch.tensor([0, counts[0], sum(counts)])
    gradients = []
    for relu in (torch.relu, torch.relu_):
        out = conv.aggregate(*views, torch.tensor([0, 1]), torch.ones(2, 2))
        relu(out).square().sum().backward()
        gradients.append([part.grad.clone() for part in conv.parameters()])
        conv.zero_grad()
    torch.testing.assert_close(*gradients)


# -- what is refused -------------------------------------------------------------------------------


def test_unknown_choices_are_refused_at_once():
    with pytest.raises(ig.IMVIAError, match="unknown backend 'bogus'; expected one of auto"):
        GatedViewConv(3, 2, backend="bogus")
    with pytest.raises(ig.IMVIAError, match="unknown aggregate 'avg'; expected None"):
        MultiViewEncoder({"image": 3}, 2, 0, 4, aggregate="avg")


def test_views_of_another_width_are_refused():
    conv = GatedViewConv(4, 2)
    with pytest.raises(ig.IMVIAError, match=r"view_feat \(V, 4\); received \(4, 6\)"):
        conv.aggregate(
            torch.rand(4, 6), torch.tensor([0, 3, 4]), torch.tensor([0, 1, 1]), torch.rand(3, 2)
        )


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("entity_feat", (5, 2), r"entity_feat \(B, 3\); received \(5, 2\)"),
        ("entity_feat", (5,), r"entity_feat \(B, 3\); received \(5,\)"),
        ("rel_feat", (5, 2), r"rel_feat \(B, 4\); received \(5, 2\)"),
        ("rel_feat", (3,), r"rel_feat \(B, 4\); received \(3,\)"),
        ("rel_feat", (5, 1, 4), r"rel_feat \(B, 4\); received \(5, 1, 4\)"),
        ("rel_feat", (), r"rel_feat \(B, 4\); received \(\)"),
    ],
)
def test_features_of_another_width_are_refused_in_the_shape_they_came_in(name, shape, expected):
    # Of these entities few have several views, and those alone are gated.
    conv = GatedViewConv(2, 3, 4, allow_zero_in_degree=True)
    given = {"entity_feat": torch.rand(5, 3), "rel_feat": torch.rand(4), name: torch.rand(shape)}
    with pytest.raises(ig.IMVIAError, match=expected):
        conv(mostly_without_views(), (torch.rand(4, 2), given["entity_feat"]), given["rel_feat"])


def test_relations_without_their_features_are_refused():
    conv = GatedViewConv(2, 3, 4)
    views = torch.rand(4, 2), torch.tensor([0, 3, 4]), torch.arange(2), torch.rand(2, 3)
    with pytest.raises(ig.IMVIAError, match="rel_feat whose rows relation indexes; received None"):
        conv.aggregate(*views, relation=torch.tensor([0, 1]))
    with pytest.raises(ig.IMVIAError, match=r"rel_feat \(relations, 4\); received \(4,\)"):
        conv.aggregate(*views, torch.rand(4), relation=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("relation", "match"),
    [
        (torch.tensor([0, 3]), "from 0 to 2; received 3"),
        (torch.tensor([-1, 0]), "from 0 to 2; received -1"),
        (torch.tensor([0.0, 1.0]), r"received \(2,\) in torch.float32"),
    ],
)
def test_relations_beyond_the_rows_of_their_features_are_refused(relation, match):
    views = torch.rand(4, 2), torch.tensor([0, 3, 4]), torch.arange(2), torch.rand(2, 3)
    with pytest.raises(ig.IMVIAError, match=f"GatedViewConv: expected relation.*{match}"):
        GatedViewConv(2, 3, 4).aggregate(*views, torch.rand(3, 4), relation=relation)


@pytest.mark.parametrize("given", [None, [1, 2], {"view": 1}, torch.rand(4, 2).numpy()], ids=type)
def test_what_is_no_tensor_is_refused_by_its_type(given):
    conv = GatedViewConv(2, 3, allow_zero_in_degree=True)
    for feat in (given, (given, torch.rand(5, 3))):
        with pytest.raises(dgl.DGLError, match=f"tuple of two.*type {type(given).__name__}"):
            conv(mostly_without_views(), feat)


@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_an_activation_that_cannot_be_called_is_refused_at_once(activation):
    with pytest.raises(ig.IMVIAError, match=r"callable activation.*torch.nn.Identity\(\)"):
        GatedViewConv(3, 2, activation=activation)


def test_a_layer_of_no_width_is_refused_at_once():
    with pytest.raises(ig.IMVIAError, match="view_feats of 1 or more; received 0"):
        GatedViewConv(0, 2)
    with pytest.raises(ig.IMVIAError, match="entity_feats of 1 or more; received 0"):
        TuckerDecoder(0, 2)


def test_views_are_missed_by_name():
    graph = dgl.heterograph({("image", "of", "entity"): ([0, 1], [0, 1])})
    encoder = MultiViewEncoder({"image": 3}, 2, 0, 4)
    with pytest.raises(ig.IMVIAError, match="nodes 'image' have no data 'feat'"):
        encoder(graph, torch.rand(2, 2))


@pytest.mark.parametrize(
    ("feat", "match"),
    [
        ({"entity": torch.rand(2, 2)}, r"nodes 'image'.*received \['entity'\]"),
        ({"image": torch.rand(2, 3)}, r"nodes 'entity'.*received \['image'\]"),
        (({"image": torch.rand(2, 3)}, {}), r"nodes 'entity'.*received \[\]"),
        ((torch.rand(2, 3), torch.rand(2, 2)), "nodes 'image'.*received the type Tensor"),
        (None, "nodes 'image'.*received the type NoneType"),
    ],
)
def test_features_by_node_type_are_missed_by_name(feat, match):
    graph = dgl.heterograph({("image", "of", "entity"): ([0, 1], [0, 1])})
    with pytest.raises(ig.IMVIAError, match=match):
        MultiViewEncoder({"image": 3}, 2, 0, 4)(graph, feat)


def test_an_encoder_says_which_modalities_it_has_and_how_they_are_given():
    with pytest.raises(ig.UnknownLabelError, match=r"no modality 'audio'.*\['image'\]"):
        MultiViewEncoder({"image": 3}, 2, 0, 4).conv("audio")
    for wrong in (["image"], {5: 3}, {("image", "of"): 3}):
        with pytest.raises(ig.IMVIAError, match="map each modality, or each edge type"):
            MultiViewEncoder(wrong, 2, 0, 4)


def test_joint_fusion_takes_what_an_encoder_gives():
    parts = {"image": torch.rand(4, 3), "text": torch.rand(4, 3)}
    fusion = randomised(JointFusion(3, 2))
    assert torch.equal(fusion(parts), fusion(list(parts.values())))


def test_an_empty_batch_gives_a_decoder_all_its_gradients():
    decoder = TuckerDecoder(3, 2)
    none = torch.empty(0, dtype=torch.int64)
    decoder(torch.empty(0, 3), torch.rand(4, 2), none).sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
