"""The layers in DGL: its conventions, its models, its samplers, and what torch does to them."""

import copy
import io
import pickle
import sys

import pytest
import torch
import torch.multiprocessing
from conftest import randomised
from helpers import ring_kg, run_python, settings
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import imvia_graph as ig
from imvia_graph._dgl import dgl
from imvia_graph._graphbolt import stand_in_where_needed
from imvia_graph.nn import (
    GatedViewConv,
    JointFusion,
    MultiViewEncoder,
    TuckerDecoder,
)

WIDTH = 6
FACT = ("entity", "fact", "entity")
OF = {modality: (modality, "of", "entity") for modality in ("image", "text")}

# -- the pattern of DGL's tests of its convolutions -----------------------------------------------


def homogeneous():
    return dgl.graph(([0, 1, 2, 0, 3, 3], [1, 2, 0, 1, 3, 0]), num_nodes=4)  # a pair twice, a loop


def star():
    return dgl.graph(([1, 2, 3, 4, 0, 0, 0, 0], [0, 0, 0, 0, 1, 2, 3, 4]))


def bipartite():
    return dgl.heterograph({("view", "of", "entity"): ([4, 0, 1, 2, 0], [1, 0, 0, 1, 2])})


def block_of(graph):
    """The block of the first two destinations: a sampler's, with every view of theirs."""
    seeds = {graph.dsttypes[-1]: torch.tensor([1, 0])}
    return dgl.to_block(dgl.in_subgraph(graph, seeds), seeds)


GRAPHS = {
    "homogeneous": homogeneous,
    "star": star,
    "bipartite": bipartite,
    "block": lambda: block_of(homogeneous()),
    "bipartite block": lambda: block_of(bipartite()),
}


@pytest.fixture(params=GRAPHS)
def graph(request):
    return GRAPHS[request.param]()


def pair_of(graph, dtype=torch.float32):
    source, _, destination = graph.canonical_etypes[0]
    sources, destinations = graph.num_src_nodes(source), graph.num_dst_nodes(destination)
    return torch.randn(sources, WIDTH, dtype=dtype), torch.randn(destinations, 4, dtype=dtype)


@pytest.mark.parametrize("idtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_has_a_row_a_destination_in_the_dtype_of_layer_and_views(graph, idtype, dtype):
    graph = graph.astype(idtype)
    conv = GatedViewConv(WIDTH, 4, 3).to(dtype)
    rel_feat = torch.randn(graph.num_dst_nodes(), 3, dtype=dtype)
    pair = pair_of(graph, dtype)
    out, weight = conv(graph, pair, rel_feat, get_weight=True)
    assert out.shape == (graph.num_dst_nodes(), WIDTH)
    assert out.dtype == dtype
    assert weight.shape == (graph.num_edges(),)
    _, destination = graph.edges(order="eid")
    sums = torch.zeros(graph.num_dst_nodes()).index_add(0, destination.long(), weight.float())
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-2, atol=1e-2)
    # Half precision says the same as double precision, as far as it can.
    exact = copy.deepcopy(conv).double()
    exact_out = exact(graph, tuple(part.double() for part in pair), rel_feat.double())
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(out.double(), exact_out, rtol=tolerance, atol=tolerance)
    out.sum().backward()
    assert conv.gate_entity.weight.grad.dtype == dtype
    assert all(p.grad.isfinite().all() for p in conv.parameters())


@pytest.mark.parametrize("name", ["homogeneous", "star", "block"])
def test_one_tensor_is_both_views_and_entities(name):
    graph = GRAPHS[name]()
    conv = GatedViewConv(WIDTH, WIDTH)
    feat = torch.randn(graph.num_src_nodes(), WIDTH)
    expected = conv(graph, (feat, feat[: graph.num_dst_nodes()]))
    assert torch.equal(conv(graph, feat), expected)


def test_views_in_half_precision_leave_a_layer_in_float32_in_float32(graph):
    view_feat, entity_feat = pair_of(graph)
    conv = GatedViewConv(WIDTH, 4)
    out = conv(graph, (view_feat.half(), entity_feat))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, conv(graph, (view_feat.half().float(), entity_feat)))


def test_layer_is_saved_copied_and_restored(graph):
    conv = randomised(GatedViewConv(WIDTH, 4))
    pair = pair_of(graph)
    expected = conv(graph, pair)
    buffer = io.BytesIO()
    torch.save(conv, buffer)
    buffer.seek(0)
    other = GatedViewConv(WIDTH, 4)
    other.load_state_dict(conv.state_dict())
    for clone in (
        torch.load(buffer, weights_only=False),
        pickle.loads(pickle.dumps(conv)),
        copy.deepcopy(conv),
        other,
    ):
        assert torch.equal(clone(graph, pair), expected)


def test_zero_in_degree_raises_on_every_kind_of_graph_unless_allowed():
    alone = dgl.graph(([0], [1]), num_nodes=3)
    lonely = dgl.heterograph({("view", "of", "entity"): ([0], [1])}, {"view": 1, "entity": 3})
    seeds = {"entity": torch.tensor([1, 2])}
    block = dgl.to_block(dgl.in_subgraph(lonely, seeds), seeds)
    for graph, without in ((alone, [0, 2]), (lonely, [0, 2]), (block, [1])):
        conv, pair = GatedViewConv(WIDTH, 4), pair_of(graph)
        with pytest.raises(dgl.DGLError, match="0-in-degree"):
            conv(graph, pair)
        conv = GatedViewConv(WIDTH, 4, allow_zero_in_degree=True)
        out = conv(graph, pair)
        assert torch.equal(out[without], conv.absent.expand(len(without), WIDTH))


def test_graph_without_nodes_gives_no_rows():
    graph = dgl.heterograph({("view", "of", "entity"): ([], [])}, {"view": 0, "entity": 0})
    assert GatedViewConv(WIDTH, 4)(graph, pair_of(graph)).shape == (0, WIDTH)


def test_layer_leaves_the_graph_as_it_was(graph):
    before = {**graph.srcdata}, {**graph.dstdata}, {**graph.edata}
    GatedViewConv(WIDTH, 4)(graph, pair_of(graph), get_weight=True)
    after = graph.srcdata, graph.dstdata, graph.edata
    assert all(set(one) == set(other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("formats", ["csc", "coo", ["csr", "csc"], ["coo", "csr", "csc"]], ids=str)
def test_graph_restricted_to_a_format_gives_the_same(graph, formats):
    conv, pair = GatedViewConv(WIDTH, 4), pair_of(graph)
    expected = conv(graph, pair, get_weight=True)
    for one, other in zip(
        conv(graph.formats(formats), pair, get_weight=True), expected, strict=True
    ):
        assert torch.equal(one, other)


# -- HeteroGraphConv ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kg():
    """24 entities, two relations; images of width 6, texts of width 5, unevenly spread."""
    return ring_kg(24)


def alike(kg):
    """The same graph, its texts as wide as its images: HeteroGraphConv adds outputs up."""
    feat, ptr = kg.views("text")
    entity = torch.repeat_interleave(torch.arange(kg.num_entities), ptr.diff())
    image = kg.graph.nodes["image"].data["feat"]
    of_image = kg.graph.edges(etype=OF["image"])[1]
    views = {"image": ig.Views(image, of_image), "text": ig.Views(feat[:, [*range(5), 0]], entity)}
    return kg.replace(views=views)


class ViewMean(nn.Module):
    """What `GatedViewConv` takes the place of: the plain mean over an entity's views."""

    def __init__(self, view_feats, *_, **__):
        super().__init__()
        self.absent = nn.Parameter(torch.zeros(view_feats))

    def forward(self, graph, feat, rel_feat=None):
        with graph.local_scope():
            graph.srcdata["f"] = feat[0]
            graph.update_all(dgl.function.copy_u("f", "m"), dgl.function.mean("m", "out"))
            has_view = graph.in_degrees() > 0
            return torch.where(has_view[:, None], graph.dstdata["out"], self.absent)


def ungated(conv):
    """The layer with a constant gate, under which all views count the same: a mean."""
    for linear in (conv.gate_entity, conv.gate_relation):
        if linear is not None:
            for parameter in linear.parameters():
                nn.init.zeros_(parameter)
    return conv


def test_constant_gate_is_the_mean_over_views(kg):
    conv = ungated(GatedViewConv(WIDTH, 4, allow_zero_in_degree=True))
    mean = ViewMean(WIDTH)
    mean.absent = conv.absent
    part = kg.graph[OF["image"]]
    feat = part.srcdata["feat"].clone().requires_grad_(), torch.randn(24, 4)
    one, other = conv(part, feat), mean(part, feat)
    torch.testing.assert_close(one, other)
    gradients = [torch.autograd.grad(out.square().sum(), feat[0])[0] for out in (one, other)]
    torch.testing.assert_close(*gradients)


def hetero_conv(kg, conv=GatedViewConv, aggregate="sum"):
    mods = {relation: dgl.nn.GraphConv(WIDTH, WIDTH) for relation in kg.relations}
    mods.update({edge_type: conv(WIDTH, WIDTH, 3) for edge_type in OF.values()})
    return dgl.nn.HeteroGraphConv(mods, aggregate=aggregate)


def node_features(graph, kg):
    feats = {m: kg.graph.nodes[m].data["feat"] for m in kg.modalities}
    return {**feats, "entity": torch.randn(kg.num_entities, WIDTH, requires_grad=True)}


AGGREGATES = ["sum", "max", "min", "mean", "stack", lambda tensors, ntype: torch.cat(tensors, 1)]


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_hetero_graph_conv_aggregates_it_with_other_layers(kg, aggregate):
    kg = alike(kg)
    graph = kg.per_relation()
    feats = node_features(graph, kg)
    model, plain = (hetero_conv(kg, conv, aggregate) for conv in (GatedViewConv, ViewMean))
    out = model(graph, feats, mod_kwargs={"of": {"rel_feat": torch.randn(3)}})
    assert out.keys() == {"entity"}
    assert out["entity"].shape == plain(graph, feats)["entity"].shape
    # The pair of dicts is the same question.
    kwargs = {"of": {"rel_feat": torch.zeros(3)}}
    torch.testing.assert_close(
        model(graph, (feats, feats), mod_kwargs=kwargs)["entity"],
        model(graph, feats, mod_kwargs=kwargs)["entity"],
    )
    out["entity"].sum().backward()
    gradients = [p.grad for p in (*model.parameters(), feats["entity"])]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_hetero_graph_conv_on_a_block_gives_the_rows_of_its_seeds(kg):
    kg = alike(kg)
    graph = kg.per_relation()
    feats = node_features(graph, kg)
    model = hetero_conv(kg)
    expected = model(graph, feats, mod_kwargs={"of": {"rel_feat": torch.ones(3)}})["entity"]
    # GraphConv norms by out-degrees, which a subgraph has fewer of: compare the views' part.
    views_only = dgl.nn.HeteroGraphConv({edge: model.mods[str(edge)] for edge in OF.values()})
    graph = graph.edge_type_subgraph(list(OF.values()))
    seeds = {"entity": torch.tensor([7, 0, 1])}
    block = dgl.to_block(dgl.in_subgraph(graph, seeds), seeds)
    mine = {ntype: feats[ntype][block.srcnodes[ntype].data[dgl.NID]] for ntype in feats}
    out = views_only(block, mine, mod_kwargs={"of": {"rel_feat": torch.ones(3)}})["entity"]
    whole = views_only(graph, feats, mod_kwargs={"of": {"rel_feat": torch.ones(3)}})["entity"]
    torch.testing.assert_close(out, whole[seeds["entity"]])
    assert not torch.allclose(whole, expected)


# -- MultiViewEncoder in DGL's conventions --------------------------------------------------------

WIDTHS = {"image": 6, "text": 5}


def test_encoder_takes_features_as_hetero_graph_conv_does(kg):
    encoder = MultiViewEncoder(WIDTHS, 4, 3, 7)
    entity, rel_feat = torch.randn(24, 4), torch.randn(3)
    feats = {m: kg.graph.nodes[m].data["feat"] for m in WIDTHS}
    expected = encoder(kg.graph, entity, rel_feat)
    for given in ({**feats, "entity": entity}, (feats, {"entity": entity})):
        out = encoder(kg.graph, given, rel_feat)
        assert all(torch.equal(out[m], expected[m]) for m in WIDTHS)
    twice = {**feats, "image": 2 * feats["image"]}
    assert not torch.equal(
        encoder(kg.graph, (twice, {"entity": entity}))["image"], expected["image"]
    )


def test_encoder_on_a_block_is_the_encoder_of_its_seeds(kg):
    encoder = MultiViewEncoder(WIDTHS, 4, 3, 7)
    entity, rel_feat = torch.randn(24, 4), torch.randn(24, 3)
    seeds = torch.tensor([5, 0, 1, 22])
    block = dgl.to_block(dgl.in_subgraph(kg.graph, {"entity": seeds}), {"entity": seeds})
    out = encoder(block, entity[seeds], rel_feat[seeds])
    whole = encoder(kg.graph, entity, rel_feat)
    # A dict holds what the block's sources have; their first rows are the destinations.
    feats = {ntype: block.srcnodes[ntype].data["feat"] for ntype in WIDTHS}
    sources = {**feats, "entity": entity[block.srcnodes["entity"].data[dgl.NID]]}
    by_dict = encoder(block, sources, rel_feat[seeds])
    for modality in WIDTHS:
        torch.testing.assert_close(out[modality], whole[modality][seeds])
        torch.testing.assert_close(by_dict[modality], out[modality])


def test_encoder_takes_edge_types_of_other_names():
    graph = dgl.heterograph(
        {("photo", "shows", "item"): ([0, 1, 2], [0, 0, 1]), ("item", "like", "item"): ([0], [1])}
    )
    graph.nodes["photo"].data["feat"] = torch.randn(3, 6)
    encoder = MultiViewEncoder({("photo", "shows", "item"): 6}, 4, 0, 7, aggregate="sum")
    assert encoder(graph, torch.randn(2, 4)).shape == (2, 7)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_encoder_makes_one_tensor_as_hetero_graph_conv_does(kg, aggregate):
    plain = MultiViewEncoder(WIDTHS, 4, 3, 7)
    encoder = MultiViewEncoder(WIDTHS, 4, 3, 7, aggregate=aggregate)
    encoder.load_state_dict(plain.state_dict())
    entity = torch.randn(24, 4)
    parts = plain(kg.graph, entity)
    dgls = dgl.nn.HeteroGraphConv({}, aggregate)
    expected = dgls.agg_fn([parts["image"], parts["text"]], "entity")
    torch.testing.assert_close(encoder(kg.graph, entity), expected)
    views = {m: kg.views(m) for m in kg.modalities}
    torch.testing.assert_close(encoder.encode(views, torch.arange(24), entity), expected)


def test_stacked_modalities_go_into_joint_fusion(kg):
    encoder = MultiViewEncoder(WIDTHS, 4, 0, 7, aggregate="stack")
    joint, attention = JointFusion(7, 2)(encoder(kg.graph, torch.randn(24, 4)), get_attention=True)
    assert joint.shape == (24, 7)
    assert attention.shape == (24, 2)


# -- in models ------------------------------------------------------------------------------------


class Features(nn.Module):
    """Input of every model below: an embedding an entity plus its aggregated, projected views."""

    def __init__(self, kg, conv=GatedViewConv, width=8):
        super().__init__()
        self.entity = nn.Embedding(kg.num_entities, width)
        self.convs = nn.ModuleDict({m: conv(w, width) for m, w in WIDTHS.items()})
        self.projections = nn.ModuleDict({m: nn.Linear(w, width) for m, w in WIDTHS.items()})
        for layer in self.convs.values():
            getattr(layer, "set_allow_zero_in_degree", lambda _: None)(True)

    def forward(self, graph, ids):
        """For the destinations of a graph or a block; ``ids`` are theirs."""
        entity = self.entity(ids)
        out = entity
        for modality, conv in self.convs.items():
            part = graph[OF[modality]]
            aggregated = conv(part, (part.srcdata["feat"], entity))
            out = out + self.projections[modality](aggregated)
        return out


class RGCN(nn.Module):
    """Two relational graph convolutions and a DistMult score."""

    def __init__(self, kg, conv=GatedViewConv):
        super().__init__()
        self.features = Features(kg, conv)
        self.layers = nn.ModuleList(dgl.nn.RelGraphConv(8, 8, kg.num_relations) for _ in range(2))
        self.relation = nn.Embedding(kg.num_relations, 8)

    def forward(self, graph):
        h = self.features(graph, graph.nodes("entity"))
        facts = graph[FACT]
        for layer in self.layers:
            h = layer(facts, h, facts.edata["rel"]).relu()
        return h

    def blocks(self, views, facts):
        """The same over blocks: one of views, then one a layer."""
        h = self.features(views, views.dstnodes["entity"].data[dgl.NID])
        for layer, block in zip(self.layers, facts, strict=True):
            h = layer(block, h, block.edata["rel"]).relu()
        return h

    def score(self, h, head, relation, tail):
        return (h[head] * self.relation(relation) * h[tail]).sum(-1)


class HGT(nn.Module):
    """A heterogeneous graph transformer over facts, and a classifier."""

    def __init__(self, kg, conv=GatedViewConv, classes=2):
        super().__init__()
        self.features = Features(kg, conv)
        self.layer = dgl.nn.HGTConv(8, 4, 2, 1, kg.num_relations)
        self.out = nn.Linear(8, classes)

    def forward(self, graph):
        return self.blocks(graph, [graph[FACT]])

    def blocks(self, views, facts):
        ids = views.dstnodes["entity"].data.get(dgl.NID, views.dstnodes("entity"))
        h = self.features(views, ids)
        for block in facts:
            ntype = torch.zeros(len(h), dtype=torch.int64)
            h = self.layer(block, h, ntype, block.edata["rel"])
        return self.out(h)


def trained(model, loss, steps=25):
    """Losses over some steps; every parameter got finite gradients, and not all of them zero."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    learned = dict.fromkeys((name for name, _ in model.named_parameters()), 0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            learned[name] += parameter.grad.abs().sum().item()
        optimizer.step()
    assert min(learned.values()) > 0, learned
    return losses


def link_loss(model, kg, h):
    head, relation, tail = kg.train.unbind(1)
    wrong = torch.randint(kg.num_entities, tail.shape)
    scores = torch.cat([model.score(h, head, relation, t) for t in (tail, wrong)])
    target = torch.cat([torch.ones(len(tail)), torch.zeros(len(tail))])
    return binary_cross_entropy_with_logits(scores, target)


def labels(kg):
    return torch.arange(kg.num_entities) % 2


CALLS = {
    "R-GCN": (RGCN, link_loss, 8),
    "HGT": (HGT, lambda model, kg, h: cross_entropy(h, labels(kg)), 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_model_trains_on_gated_views_where_it_had_their_mean(kg, name):
    make, loss, width = CALLS[name]
    mean, gated = make(kg, ViewMean), make(kg)
    assert gated(kg.graph).shape == mean(kg.graph).shape == (24, width)
    losses = trained(gated, lambda: loss(gated, kg, gated(kg.graph)))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", CALLS)
def test_model_with_constant_gates_is_the_model_of_the_mean(kg, name):
    """Outputs and the gradients of all else; only the aggregation of views was exchanged."""
    make = CALLS[name][0]
    mean, gated = make(kg, ViewMean).eval(), make(kg).eval()
    gated.load_state_dict({**gated.state_dict(), **mean.state_dict()})
    for conv in gated.features.convs.values():
        ungated(conv)
    outs = [model(kg.graph) for model in (mean, gated)]
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    theirs = dict(gated.named_parameters())
    for key, parameter in mean.named_parameters():
        torch.testing.assert_close(
            parameter.grad if parameter.grad is not None else torch.zeros(()),
            theirs[key].grad if theirs[key].grad is not None else torch.zeros(()),
        )


# -- neighbour sampling ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large():
    """Large enough for a batch's neighbourhood to be a small part of it."""
    return ring_kg(200)


def fanouts(facts):
    """A layer that takes all views of its entities, then layers of facts."""
    views = dict.fromkeys(OF.values(), -1)
    none = dict.fromkeys(OF.values(), 0)
    return [{**views, FACT: 0}, *({**none, FACT: fanout} for fanout in facts)]


def sampler(*facts):
    """Fetches the features of the sampled views, and of no others."""
    return dgl.dataloading.NeighborSampler(
        fanouts(facts), prefetch_node_feats={modality: ["feat"] for modality in OF}
    )


def poisoned(kg, spared):
    """The graph with NaN for every view of entities outside ``spared``."""
    graph = kg.graph.clone()
    for modality in kg.modalities:
        owner = graph.edges(etype=OF[modality])[1]
        mine = torch.isin(owner, spared)
        feat = graph.nodes[modality].data["feat"]
        graph.nodes[modality].data["feat"] = torch.where(mine[:, None], feat, torch.nan)
    return graph


def check_that_only_the_batch_is_fetched(kg, block):
    """The block's views are all those of its entities, with their features, and no more."""
    entity = block.dstnodes["entity"].data[dgl.NID]
    for modality in kg.modalities:
        feat, ptr = kg.views(modality)
        count = ptr.diff()[entity]
        assert block.in_degrees(etype=OF[modality]).tolist() == count.tolist()
        ids = block.srcnodes[modality].data[dgl.NID]
        assert len(ids) == count.sum() < len(feat)
        assert torch.equal(block.srcnodes[modality].data["feat"], feat[ids])


def forever(loader):
    while True:
        yield from loader


@pytest.mark.filterwarnings("ignore:Dataloader CPU affinity")
@pytest.mark.parametrize("make", [RGCN, HGT])
def test_node_classification_over_sampled_blocks_trains(large, make):
    model = make(large)
    if make is RGCN:
        model.relation, model.head = nn.Identity(), nn.Linear(8, 2)
    batches = forever(
        dgl.dataloading.DataLoader(
            large.graph,
            {"entity": torch.arange(200)},
            sampler(2, 2) if make is RGCN else sampler(2),
            batch_size=20,
            shuffle=True,
        )
    )

    def loss():
        _, seeds, (views, *facts) = next(batches)
        check_that_only_the_batch_is_fetched(large, views)
        h = model.blocks(views, [block[FACT] for block in facts])
        h = model.head(h) if make is RGCN else h
        assert h.shape == (20, 2)
        return cross_entropy(h, labels(large)[seeds["entity"]])

    losses = trained(model, loss, steps=60)
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.filterwarnings("ignore:Dataloader CPU affinity")
def test_link_prediction_over_sampled_blocks_trains(large):
    model = RGCN(large)
    pairs_and_wrong_ones = dgl.dataloading.as_edge_prediction_sampler(
        sampler(2, 2), negative_sampler=dgl.dataloading.negative_sampler.Uniform(2)
    )
    edges = {FACT: torch.arange(large.graph.num_edges(FACT))}
    batches = forever(
        dgl.dataloading.DataLoader(
            large.graph, edges, pairs_and_wrong_ones, batch_size=16, shuffle=True
        )
    )

    def loss():
        _, pairs, wrong, (views, *facts) = next(batches)
        check_that_only_the_batch_is_fetched(large, views)
        h = model.blocks(views, [block[FACT] for block in facts])
        assert h.shape == (pairs.num_nodes("entity"), 8)
        relation = large.graph.edges[FACT].data["rel"][pairs.edges[FACT].data[dgl.EID]]
        scores, targets = [], []
        for part, times, target in ((pairs, 1, 1.0), (wrong, 2, 0.0)):
            head, tail = part.edges(etype=FACT)
            scores.append(model.score(h, head, relation.repeat_interleave(times), tail))
            targets.append(torch.full_like(scores[-1], target))
        return binary_cross_entropy_with_logits(torch.cat(scores), torch.cat(targets))

    losses = trained(model, loss, steps=60)
    assert sum(losses[-10:]) < sum(losses[:10])


def test_encoder_reads_no_view_of_an_entity_that_is_not_asked_about(kg):
    """NaN is contagious: had a row been read, the result and the gradients would show it."""
    entity = torch.tensor([3, 1, 8])
    graph = poisoned(kg, entity)
    encoder = MultiViewEncoder(WIDTHS, 4, 3, 7)
    views = {m: (graph.nodes[m].data["feat"], kg.views(m)[1]) for m in WIDTHS}
    clean = {m: kg.views(m) for m in WIDTHS}
    feats = torch.randn(3, 4), torch.randn(3)
    out = encoder.encode(views, entity, *feats)
    block = dgl.to_block(dgl.in_subgraph(graph, {"entity": entity}), {"entity": entity})
    for other in (encoder.encode(clean, entity, *feats), encoder(block, *feats)):
        for modality in WIDTHS:
            torch.testing.assert_close(out[modality], other[modality])
    sum(part.sum() for part in out.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


# -- what torch does to a model -------------------------------------------------------------------


def test_model_trains_under_autocast(kg):
    model = RGCN(kg)
    expected = model(kg.graph)

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return link_loss(model, kg, model(kg.graph))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(kg.graph).float()
    assert not torch.equal(out, expected)  # it was at work
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1)
    losses = trained(model, loss)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["GatedViewConv", "MultiViewEncoder", "R-GCN"])
def test_compiled_models_give_what_they_gave(kg, name):
    """Traced, and run as traced; what is traced of DGL is nothing. Inductor takes a minute more."""
    entity, rel_feat = torch.randn(24, 4), torch.randn(3)
    layer, arguments = {
        "GatedViewConv": (
            GatedViewConv(6, 4, 3, allow_zero_in_degree=True),
            (kg.graph[OF["image"]], (kg.graph.nodes["image"].data["feat"], entity), rel_feat),
        ),
        "MultiViewEncoder": (
            MultiViewEncoder(WIDTHS, 4, 3, 7, aggregate="sum"),
            (kg.graph, entity, rel_feat),
        ),
        "R-GCN": (RGCN(kg), (kg.graph,)),
    }[name]
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager" if name == "R-GCN" else "aot_eager")
    compare_with_compiled(layer, layer, compiled, arguments)


def compare_with_compiled(layer, plain, compiled, arguments):
    results = []
    for call in (plain, compiled):
        layer.zero_grad()
        out = call(*arguments)
        out.square().sum().backward()
        results.append((out, [p.grad for p in layer.parameters() if p.grad is not None]))
    (out, gradients), (compiled_out, compiled_gradients) = results
    torch.testing.assert_close(compiled_out, out, rtol=1e-4, atol=1e-5)
    assert len(gradients) == len(compiled_gradients) > 0
    for one, other in zip(gradients, compiled_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["GatedViewConv", "TuckerDecoder"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_what_depends_on_ids_is_not_traced(name):
    ids = torch.tensor([0, 1, 1])
    if name == "GatedViewConv":
        layer = GatedViewConv(6, 4)
        views = torch.rand(5, 6), torch.tensor([0, 2, 5])
        traced = lambda feat: layer.aggregate(*views, ids, feat)  # noqa: E731
    else:
        layer = TuckerDecoder(4, 3)
        traced = lambda feat: layer(feat, torch.rand(2, 3), ids)  # noqa: E731
    with pytest.raises(ig.IMVIAError, match=f"{name}: .*depends on the ids.*torch.compile"):
        torch.jit.trace(traced, (torch.rand(3, 4),))


def test_model_is_copied_and_restored(kg):
    model = RGCN(kg)
    expected = model(kg.graph)
    other = RGCN(kg)
    assert not torch.allclose(other(kg.graph), expected)
    other.load_state_dict(model.state_dict())
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(clone(kg.graph), expected)


def replica(rank, address, state, out):
    """One of two processes, each with the blocks of its half of the entities."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{address}", rank=rank, world_size=2
    )
    graph = ring_kg(24)
    model = ReplicatedRGCN(graph)
    model.load_state_dict(state)
    parallel = nn.parallel.DistributedDataParallel(model)
    seeds = torch.arange(24)[rank * 12 : (rank + 1) * 12]
    views, facts = whole_blocks(graph, seeds)
    cross_entropy(parallel(views, facts), labels(graph)[seeds]).backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


class ReplicatedRGCN(RGCN):
    """DistributedDataParallel wants all of it in `forward`, and every parameter used."""

    def __init__(self, kg):
        super().__init__(kg)
        self.relation, self.head = nn.Identity(), nn.Linear(8, 2)

    def forward(self, views, facts):
        return self.head(self.blocks(views, facts))


def whole_blocks(kg, seeds):
    """Blocks without sampling: every neighbour, so that the gradients are known."""
    facts = []
    frontier = seeds
    for _ in range(2):
        block = dgl.to_block(dgl.in_subgraph(kg.graph[FACT], frontier), frontier)
        facts.insert(0, block)
        frontier = block.srcdata[dgl.NID]
    views = kg.graph.edge_type_subgraph(list(OF.values()))
    views = dgl.in_subgraph(views, {"entity": frontier})
    return dgl.to_block(views, {"entity": frontier}), facts


@pytest.mark.slow
def test_two_processes_train_as_one(kg, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = ReplicatedRGCN(kg)
    torch.multiprocessing.spawn(
        replica,
        (str(tmp_path / "address"), model.state_dict(), str(tmp_path / "gradients")),
        nprocs=2,
    )
    one, other = (torch.load(tmp_path / f"gradients.{r}", weights_only=True) for r in (0, 1))
    views, facts = whole_blocks(kg, torch.arange(24))
    cross_entropy(model(views, facts), labels(kg)).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], parameter.grad, msg=name)


# -- a trained run as a source of features --------------------------------------------------------


@pytest.fixture(scope="module")
def run(kg, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ig.fit(kg, settings=settings(epochs=2, validation="published"), out=folder / "ring")
    return ig.load(folder / "ring", device="cpu")


def test_encoder_of_a_run_gives_its_embeddings(run):
    out = run.encoder()
    for head, table in run.entity_embeddings().items():
        torch.testing.assert_close(out[head], table)
    some = run.encoder(torch.tensor([7, 0, 7]), torch.tensor([1, 0, 3]))
    expected = run.model.embed(torch.tensor([7, 0, 7]), torch.tensor([1, 0, 3])).heads
    assert some.keys() == expected.keys() == set(run.encoder.heads)
    for head, rows in some.items():
        assert rows.shape == (3, 6 if head == "complex" else run.encoder.out_feats)
        assert torch.equal(rows, expected[head])


@pytest.mark.parametrize(
    ("entity", "match"),
    [
        (torch.tensor([0, 99]), "from 0 to 23; received 99"),
        (torch.tensor([-1]), "received -1"),
        (torch.tensor([[1, 2]]), r"received \(1, 2\) in torch.int64"),
        (torch.tensor(1), r"received \(\) in torch.int64"),
        (torch.tensor([1.0]), "in torch.float32"),
        ([1, 2], "received the type list"),
        ("e1", "received the type str"),
    ],
    ids=str,
)
def test_ids_that_are_none_of_a_run_are_refused(run, entity, match):
    with pytest.raises(ig.IMVIAError, match=rf"expected entity \(B,\).*{match}"):
        run.encoder(entity)
    with pytest.raises(ig.IMVIAError, match=rf"expected head \(B,\).*{match}"):
        run.model(entity, torch.tensor([0]), torch.tensor([0]))


def test_relations_that_are_none_of_a_run_are_refused(run):
    one = torch.tensor([1])
    with pytest.raises(ig.IMVIAError, match=r"expected relation.*from 0 to 3; received 4"):
        run.encoder(one, torch.tensor(4))
    with pytest.raises(ig.IMVIAError, match=r"expected relation.*received -1"):
        run.model(one, -one, one)
    with pytest.raises(ig.IMVIAError, match="as many heads as relations and tails; received 2, 1"):
        run.model(torch.tensor([0, 1]), one, one)


def test_ids_of_a_run_may_be_in_int32(run):
    entity, relation = torch.tensor([7, 0]), torch.tensor([1, 3])
    for head, rows in run.encoder(entity.int(), relation.int()).items():
        assert torch.equal(rows, run.encoder(entity, relation)[head])
    expected = run.model(entity, relation, entity)
    assert torch.equal(run.model(entity.int(), relation.int(), entity.int()), expected)


def test_encoder_of_a_run_has_no_part_that_only_scores(run):
    out = run.encoder(torch.tensor([7, 1]), torch.tensor([1, 0]))
    (out["joint"].sum() + out["complex"].sum()).backward()
    assert all(p.grad is not None for p in run.encoder.parameters())
    names = " ".join(run.encoder.state_dict())
    assert not any(part in names for part in ("decoder", "decision", "information", "alignment"))
    run.model.zero_grad()


@pytest.mark.parametrize("frozen", [True, False])
def test_encoder_of_a_run_feeds_an_r_gcn_frozen_or_not(run, frozen):
    kg = run.kg
    encoder = copy.deepcopy(run.encoder).requires_grad_(not frozen)
    before = copy.deepcopy(encoder.state_dict())
    layer = dgl.nn.RelGraphConv(encoder.out_feats, 2, kg.num_relations)
    facts = kg.graph[FACT]
    parameters = [p for p in (*encoder.parameters(), *layer.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        out = layer(facts, encoder()["joint"], facts.edata["rel"])
        value = cross_entropy(out, labels(kg))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    changed = {
        name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])
    }
    # Without a relation in sight the gate's relation half has nothing to learn from, nor has a head
    # that is not asked for.
    others = {name for name in before if "relation" in name or "complex" in name}
    assert changed == (set() if frozen else set(before) - others)
    # The run itself is as it was: what trained was a copy.
    for name, value in run.encoder.state_dict().items():
        assert torch.equal(value, before[name])


def test_converting_the_encoder_of_a_run_converts_the_run_and_not_a_half_of_it(run):
    mine = ig.Run(copy.deepcopy(run.model), run.kg, run.settings, run.progress)
    asked = {"head": run.kg.entities[0], "relation": run.kg.relations[0]}
    apart = copy.deepcopy(mine.encoder)
    model = torch.nn.Sequential(mine.encoder).double()
    assert {p.dtype for p in mine.model.parameters()} == {torch.float64}
    assert all(part.dtype == torch.float64 for part in model[0]().values())
    for found, expected in zip(mine.predict(**asked), run.predict(**asked), strict=True):
        assert found.score == pytest.approx(expected.score, abs=1e-4)
    # So does a copy of the run, whose encoder is its own.
    other = copy.deepcopy(run)
    other.encoder.double()
    assert {p.dtype for p in other.model.parameters()} == {torch.float64}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    # A copy stands alone.
    assert {p.dtype for p in apart.parameters()} == {torch.float32}
    apart.double()
    assert {p.dtype for p in apart.parameters()} == {torch.float64}
    mine.model.float()
    assert {p.dtype for p in apart.parameters()} == {torch.float64}
    assert all(part.dtype == torch.float64 for part in apart().values())


def test_training_the_encoder_of_a_run_trains_the_run(run):
    encoder = copy.deepcopy(run).encoder
    assert encoder.model.entity.weight is not run.model.entity.weight
    run_copy = copy.deepcopy(run)
    with torch.no_grad():
        next(run_copy.encoder.parameters()).fill_(1.0)
    assert run_copy.model.entity.weight.eq(1).all()


# -- beside the user's own import of DGL ----------------------------------------------------------


def test_dgl_is_imported_after_imvia_graph_and_before_its_layers(tmp_path):
    code = (
        "import imvia_graph\n"
        "import dgl, sys\n"
        "from imvia_graph.nn import GatedViewConv\n"
        "conv = dgl.nn.HeteroGraphConv({'of': GatedViewConv(3, 3)})\n"
        "print(dgl.__version__, conv.mods['of'].allow_zero_in_degree)\n"
    )
    result = run_python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-2:] == [dgl.__version__, "True"]


def test_finders_of_other_packages_do_not_pass_for_the_stand_in(monkeypatch):
    # virtualenv's is called so, too.
    other = type("_Finder", (), {"__module__": "_virtualenv"})()
    monkeypatch.setattr(sys, "meta_path", [other])
    stand_in_where_needed()
    stand_in_where_needed()
    assert [type(finder).__module__ for finder in sys.meta_path] == [
        "imvia_graph._graphbolt",
        "_virtualenv",
    ]


def test_stand_in_for_graphbolt_says_why_it_is_empty():
    graphbolt = getattr(dgl, "graphbolt", None)
    if type(graphbolt).__name__ != "_StandIn":
        pytest.skip("this DGL has no GraphBolt, or one that loads")
    with pytest.raises(AttributeError, match=r"ItemSet is not available: .*torch"):
        _ = graphbolt.ItemSet
    assert not hasattr(graphbolt, "__path__")
