"""Eq. 2 and 3 as segment operations: against the loop, and at the edges of what floats hold."""

import os

import pytest
import torch
from conftest import needs_torch_scatter
from hypothesis import given
from hypothesis import strategies as st
from reference import aggregate, assert_agree, numbers, tensor, view_weights

from imvia_graph.errors import IMVIAError
from imvia_graph.ops import BACKENDS, fused_cpu, gated_view_aggregate, scatter


def case(counts, entity, d, dtype=torch.float64):
    """Random views of entities with these counts, and a gate a query."""
    feat = torch.randn(sum(counts), d, dtype=dtype)
    ptr = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    return (
        feat,
        ptr,
        torch.tensor(entity, dtype=torch.int64),
        torch.rand(len(entity), d, dtype=dtype),
    )


def loop(feat, ptr, entity, gate):
    """(B, d) by the loop; zeros without views."""
    feat, ptr, gate = numbers(feat), ptr.tolist(), numbers(gate)
    rows = []
    for g, i in zip(gate, entity.tolist(), strict=True):
        row = aggregate(g, feat[ptr[i] : ptr[i + 1]])
        rows.append([0.0] * len(g) if row is None else row)
    return tensor(rows)


def loop_weights(feat, ptr, entity, gate):
    """The weights of each query's views by the loop, one list a query."""
    feat, ptr, gate = numbers(feat), ptr.tolist(), numbers(gate)
    return [
        view_weights(g, feat[ptr[i] : ptr[i + 1]])
        for g, i in zip(gate, entity.tolist(), strict=True)
    ]


# -- against the loop -----------------------------------------------------------------------------

COUNTS = [0, 1, 2, 110, 5, 0]
# Entities repeat under different gates, in no order; 0 and 5 have no view.
QUERIES = [4, 0, 3, 1, 4, 2, 5, 2, 3, 1]


@pytest.mark.parametrize("d", [1, 4])
def test_sums_and_gradients_match_the_loop(backend, d):
    feat, ptr, entity, gate = case(COUNTS, QUERIES, d)
    feat[1] = 0.0  # one of two views is a zero vector
    gate[4] = 0.0  # a gate that lets nothing through
    feat.requires_grad_()
    gate.requires_grad_()
    found = gated_view_aggregate(feat, ptr, entity, gate, backend=backend)
    assert_agree(found, loop(feat, ptr, entity, gate), [feat, gate])


def test_a_gate_of_any_sign_matches_the_loop(backend):
    """As of an activation other than the sigmoid."""
    feat, ptr, entity, gate = case([3, 7], [1, 0, 1], 5)
    gate = (4 * torch.randn_like(gate)).requires_grad_()
    feat.requires_grad_()
    found = gated_view_aggregate(feat, ptr, entity, gate, backend=backend)
    assert_agree(found, loop(feat, ptr, entity, gate), [feat, gate])


def test_weights_and_their_gradients_match_the_loop(backend):
    feat, ptr, entity, gate = case(COUNTS, QUERIES, 3)
    feat.requires_grad_()
    gate.requires_grad_()
    out, weights = gated_view_aggregate(feat, ptr, entity, gate, backend=backend, get_weight=True)
    expected = loop_weights(feat, ptr, entity, gate)
    assert weights.ptr.diff().tolist() == [COUNTS[i] for i in QUERIES]
    assert_agree(weights.weight, tensor([w for row in expected for w in row]), [feat, gate])
    plain = gated_view_aggregate(feat, ptr, entity, gate, backend=backend)
    assert torch.equal(out, plain)


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    d=st.integers(1, 5),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_weights_sum_to_one_and_stay_within_a_factor_e_squared(counts, d, seed, data):
    torch.manual_seed(seed)
    entity = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=8))
    feat, ptr, entity, gate = case(counts, entity, d)
    for name in {"reference", "numba", "torch_scatter" if scatter.usable(feat.device) else "numba"}:
        _, weights = gated_view_aggregate(feat, ptr, entity, gate, backend=name, get_weight=True)
        assert weights.ptr[0] == 0
        assert weights.ptr[-1] == len(weights.weight)
        for i, part in zip(entity, weights.weight.split(weights.ptr.diff().tolist()), strict=True):
            assert len(part) == counts[i]
            if len(part):
                assert part.sum().item() == pytest.approx(1)
                # A cosine is between -1 and 1.
                assert part.max() <= part.min() * 7.3891


def test_entity_without_views_gets_zeros_and_passes_no_gradient(backend):
    feat, ptr, entity, gate = case([2, 0], [1, 0, 1], 3)
    feat.requires_grad_()
    gate.requires_grad_()
    out = gated_view_aggregate(feat, ptr, entity, gate, backend=backend)
    out.square().sum().backward()
    assert out[[0, 2]].eq(0).all()
    assert gate.grad[[0, 2]].eq(0).all()
    assert gate.grad[1].ne(0).all()


def test_views_of_entities_that_are_not_asked_about_do_not_matter(backend):
    feat, ptr, entity, gate = case([2, 3, 4], [2, 0], 4)
    expected = gated_view_aggregate(feat, ptr, entity, gate, backend=backend)
    feat[2:5] = torch.nan
    feat.requires_grad_()
    found = gated_view_aggregate(feat, ptr, entity, gate, backend=backend)
    found.sum().backward()
    assert torch.equal(found, expected)
    assert feat.grad[2:5].eq(0).all()


def test_order_of_an_entitys_views_does_not_matter(backend):
    feat, ptr, entity, gate = case([6], [0, 0], 4)
    order = torch.randperm(6)
    out, weights = gated_view_aggregate(feat, ptr, entity, gate, backend=backend, get_weight=True)
    same, moved = gated_view_aggregate(
        feat[order], ptr, entity, gate, backend=backend, get_weight=True
    )
    torch.testing.assert_close(same, out)
    torch.testing.assert_close(moved.weight.view(2, 6), weights.weight.view(2, 6)[:, order])


def test_gate_of_equal_entries_gives_the_mean(backend):
    feat, ptr, entity, gate = case([7], [0], 5)
    out = gated_view_aggregate(feat, ptr, entity, torch.full_like(gate, 0.3), backend=backend)
    torch.testing.assert_close(out[0], feat.mean(0))


def test_a_single_view_is_returned_as_it_is(backend):
    feat, ptr, entity, gate = case([1, 1], [1, 0, 1], 5)
    out = gated_view_aggregate(feat, ptr, entity, gate, backend=backend)
    assert torch.equal(out, feat[[1, 0, 1]])


# -- backends among each other --------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", [pytest.param("torch_scatter", marks=needs_torch_scatter), "numba"]
)
@pytest.mark.parametrize("d", [1, 3, 64, 257])
def test_backends_agree_in_float32(d, other):
    counts = [0, 1, 2, 3, 17, 64, 0, 150, 300]
    entity = [8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 2, 8]
    feat, ptr, entity, gate = case(counts, entity, d, torch.float32)
    direction = torch.randn(len(entity), d)
    results = []
    for backend in ("reference", other):
        inputs = feat.clone().requires_grad_(), gate.clone().requires_grad_()
        out, weights = gated_view_aggregate(
            inputs[0], ptr, entity, inputs[1], backend=backend, get_weight=True
        )
        gradients = torch.autograd.grad((out * direction).sum(), inputs)
        results.append([out, weights.weight, *gradients])
    for one, other in zip(*results, strict=True):
        assert one.dtype == torch.float32
        # With one dimension every cosine is 1, and the gate's gradient rounding alone.
        assert (one - other).norm() <= 1e-6 * one.norm().clamp(min=1e-3)


def test_auto_takes_what_is_there(monkeypatch):
    arguments = case([3, 2], [0, 1], 4)

    def auto_is(backend):
        found = gated_view_aggregate(*arguments)
        return torch.equal(found, gated_view_aggregate(*arguments, backend=backend))

    assert auto_is("numba")
    monkeypatch.setattr(fused_cpu, "usable", lambda feat, gate: False)
    if scatter.usable(torch.device("cpu")):
        assert auto_is("torch_scatter")
    monkeypatch.setattr(scatter, "_torch_scatter", lambda: ImportError("not here"))
    assert auto_is("reference")
    with pytest.raises(IMVIAError, match="torch-scatter"):
        gated_view_aggregate(*arguments, backend="torch_scatter")
    with pytest.raises(IMVIAError, match="numba"):
        gated_view_aggregate(*arguments, backend="numba")


# -- the compiled loops ---------------------------------------------------------------------------


@pytest.fixture
def threads():
    """Two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_change_nothing_to_the_bit(threads):
    counts = torch.randint(0, 30, (200,)).tolist()
    entity = torch.randint(0, 200, (900,)).tolist()
    feat, ptr, entity, gate = case(counts, entity, 7, torch.float32)
    direction = torch.randn(900, 7)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        inputs = [feat.clone().requires_grad_(), gate.clone().requires_grad_()]
        out, weights = gated_view_aggregate(
            inputs[0], ptr, entity, inputs[1], backend="numba", get_weight=True
        )
        loss = (out * direction).sum() + (weights.weight**2).sum()
        results.append([out, weights.weight, *torch.autograd.grad(loss, inputs)])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def test_an_entity_with_most_of_the_queries_stays_on_one_thread(threads):
    feat, ptr, entity, gate = case([2, 9, 1], [1] * 300 + [0, 2], 3)
    feat.requires_grad_()
    found = gated_view_aggregate(feat, ptr, entity, gate, backend="numba")
    right = gated_view_aggregate(feat, ptr, entity, gate, backend="reference")
    assert_agree(found, right, [feat])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_is_read_as_it_is(dtype):
    feat = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[:, None]
    each = torch.arange(len(feat))
    ptr = torch.arange(len(feat) + 1)
    out = gated_view_aggregate(feat, ptr, each, torch.ones(len(feat), 1), backend="numba")
    finite = feat.isfinite()
    assert torch.equal(out[finite], feat[finite].float())
    assert not out[~finite].isfinite().any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_aggregates_too(threads):
    arguments = case([20] * 100, list(range(100)), 3)
    expected = gated_view_aggregate(*arguments, backend="numba")
    child = os.fork()
    if not child:
        same = torch.equal(gated_view_aggregate(*arguments, backend="numba"), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- what floats hold -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_summed_in_float32(backend, dtype):
    feat, ptr, entity, gate = case([0, 1, 200, 9], [2, 0, 3, 1, 2], 33)
    feat, gate = feat.to(dtype), gate.to(dtype)
    expected = loop(feat, ptr, entity, gate)  # of the rounded features, in float64
    feat.requires_grad_()
    gate.requires_grad_()
    out = gated_view_aggregate(feat, ptr, entity, gate, backend=backend)
    out.sum().backward()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    assert feat.grad.dtype == dtype
    assert feat.grad.isfinite().all()
    assert gate.grad.isfinite().all()


def test_largest_float16_features_stay_finite(backend):
    feat = torch.full((3, 8), 65504.0, dtype=torch.float16)
    out = gated_view_aggregate(
        feat, torch.tensor([0, 3]), torch.tensor([0]), torch.rand(1, 8), backend=backend
    )
    torch.testing.assert_close(out, torch.full((1, 8), 65504.0))


@pytest.mark.parametrize("scale", [1e20, 1e-25])
def test_weights_do_not_depend_on_the_size_of_features(backend, scale):
    feat, ptr, entity, gate = case([4, 30], [1, 0, 1], 6, torch.float32)
    feat = feat * scale
    expected = tensor([w for row in loop_weights(feat, ptr, entity, gate) for w in row])
    feat.requires_grad_()
    gate.requires_grad_()
    out, weights = gated_view_aggregate(feat, ptr, entity, gate, backend=backend, get_weight=True)
    torch.testing.assert_close(weights.weight.double(), expected, rtol=1e-5, atol=0)
    (out.sum() / scale).backward()
    reference = [feat.detach().double().requires_grad_(), gate.detach().double().requires_grad_()]
    in_double = loop(reference[0], ptr, entity, reference[1]).sum() / scale
    expected = torch.autograd.grad(in_double, reference)
    for found, right in zip((feat.grad, gate.grad), expected, strict=True):
        torch.testing.assert_close(found.double() * scale, right * scale, rtol=1e-3, atol=1e-4)


def test_views_of_very_different_sizes_have_the_right_weights(backend):
    feat, ptr, entity, gate = case([5], [0, 0], 6, torch.float32)
    feat = feat * torch.tensor([1e20, 1e-25, 1.0, 1e-3, 1e10])[:, None]
    _, weights = gated_view_aggregate(feat, ptr, entity, gate, backend=backend, get_weight=True)
    expected = tensor([w for row in loop_weights(feat, ptr, entity, gate) for w in row])
    torch.testing.assert_close(weights.weight.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1e15, 1e25])
def test_weights_do_not_depend_on_the_size_of_a_gate(backend, scale):
    """The cosine is scale free in g too; a saturated sigmoid or a ReLU gives such gates."""
    feat, ptr, entity, gate = case([4, 30], [1, 0, 1], 6, torch.float32)
    gate = gate * scale
    _, weights = gated_view_aggregate(feat, ptr, entity, gate, backend=backend, get_weight=True)
    expected = tensor([w for row in loop_weights(feat, ptr, entity, gate) for w in row])
    torch.testing.assert_close(weights.weight.double(), expected, rtol=1e-5, atol=0)


def test_constant_and_zero_columns_match_the_loop(backend):
    feat, ptr, entity, gate = case([3, 4], [0, 1, 1], 4)
    feat[:, 1], feat[:, 2] = 2.5, 0.0
    feat.requires_grad_()
    gate.requires_grad_()
    found = gated_view_aggregate(feat, ptr, entity, gate, backend=backend)
    assert_agree(found, loop(feat, ptr, entity, gate), [feat, gate])


def test_zero_views_alone_are_averaged_without_nan(backend):
    feat = torch.zeros(3, 4, requires_grad=True)
    gate = torch.zeros(1, 4, requires_grad=True)
    out, weights = gated_view_aggregate(
        feat, torch.tensor([0, 3]), torch.tensor([0]), gate, backend=backend, get_weight=True
    )
    out.sum().backward()
    torch.testing.assert_close(weights.weight, torch.full((3,), 1 / 3))
    torch.testing.assert_close(feat.grad, torch.full((3, 4), 1 / 3))
    assert gate.grad.eq(0).all()


@pytest.mark.parametrize(
    ("counts", "entity"),
    [([0], [0]), ([0, 0, 0], [2, 1, 1]), ([0], []), ([3, 1], []), ([2], [0, 0])],
    ids=["one-without-views", "no-views-at-all", "nothing", "no-queries", "one-entity"],
)
def test_empty_inputs_give_empty_or_zero_outputs(backend, counts, entity):
    feat, ptr, entity, gate = case(counts, entity, 3)
    feat.requires_grad_()
    gate.requires_grad_()
    out, weights = gated_view_aggregate(feat, ptr, entity, gate, backend=backend, get_weight=True)
    assert out.shape == (len(entity), 3)
    assert len(weights.ptr) == len(entity) + 1
    out.sum().backward()
    assert feat.grad.isfinite().all()
    assert gate.grad.isfinite().all()
    if len(entity):
        torch.testing.assert_close(out, loop(feat, ptr, entity, gate))


# -- mistakes -------------------------------------------------------------------------------------


def test_unknown_backend_is_named_with_the_known_ones():
    feat, ptr, entity, gate = case([1], [0], 2)
    with pytest.raises(IMVIAError, match="'cuda'.*" + ", ".join(BACKENDS)):
        gated_view_aggregate(feat, ptr, entity, gate, backend="cuda")


@pytest.mark.parametrize("wrong", range(4))
def test_wrong_shapes_are_named(wrong):
    arguments = list(case([2, 1], [0, 1], 3))
    arguments[wrong] = arguments[wrong][None]
    with pytest.raises(IMVIAError, match=r"feat \(V, d\).*received"):
        gated_view_aggregate(*arguments)


@pytest.mark.parametrize("backend", ["reference", "torch_scatter", "numba"])
@pytest.mark.parametrize(
    ("views", "entity", "match"),
    [
        ([2, 1], [0, 2], r"from 0 to 1.*received 2"),
        ([2, 1], [1, -1], r"from 0 to 1.*received -1"),
        ([2, 2], [0, 1], r"number of views, 3;.*0 to 4"),
        ([2, -1, 2], [0, 1], r"ascends.*and decrease"),
    ],
)
def test_entities_and_pointers_that_lead_outside_the_views_are_refused(
    backend, views, entity, match
):
    # Compiled loops would read and write elsewhere in memory.
    feat, ptr = torch.rand(3, 2), torch.tensor([0, *views]).cumsum(0)
    gate = torch.rand(2, 2, requires_grad=True)
    with pytest.raises(IMVIAError, match=match):
        gated_view_aggregate(feat, ptr, torch.tensor(entity), gate, backend=backend)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int8, torch.float32])
@pytest.mark.parametrize("name", ["ptr", "entity"])
def test_ids_in_what_does_not_look_up_are_refused_by_name(dtype, name):
    # Bytes would be a mask: of two entities the row of one, or an error about masks.
    feat, ptr, entity, gate = case([1, 1], [1, 0], 2)
    given = {"ptr": ptr, "entity": entity}
    given[name] = given[name].to(dtype)
    with pytest.raises(IMVIAError, match=rf"{name} in int64.*received {dtype}"):
        gated_view_aggregate(feat, given["ptr"], given["entity"], gate)


def test_ids_in_int32_are_those_in_int64(backend):
    feat, ptr, entity, gate = case([2, 0, 3], [2, 0, 1, 2], 3)
    expected = gated_view_aggregate(feat, ptr, entity, gate, backend=backend)
    found = gated_view_aggregate(feat, ptr.int(), entity.int(), gate, backend=backend)
    assert torch.equal(found, expected)
