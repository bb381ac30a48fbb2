"""The Triton kernels against the loop and the reference: on the GPU, or in Triton's interpreter.

The interpreter is chosen when Triton is imported, for all that runs in the process. So without a
GPU this file runs once more, in a process of its own.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from reference import aggregate, assert_agree, numbers, tensor, view_weights

from imvia_graph.errors import IMVIAError
from imvia_graph.nn import GatedViewConv
from imvia_graph.ops import fused_triton, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
elsewhere = pytest.mark.skip(reason="run by test_the_claims_below_hold_in_the_interpreter")


@pytest.fixture(
    params=[
        pytest.param("cuda" if ON_GPU else "cpu", marks=[] if ON_GPU or INTERPRETED else elsewhere)
    ]
)
def device(request):
    """Where kernels run; every test that runs one asks for it."""
    return torch.device(request.param)


@needs_triton
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_claims_below_hold_in_the_interpreter():
    in_the_interpreter(__file__)


def in_the_interpreter(file):
    """Run a file of tests in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def case(counts, entity, d, dtype=torch.float32):
    """Random views of entities with these counts, and a gate a query; both want a gradient."""
    feat = torch.randn(sum(counts), d).to(dtype).requires_grad_()
    ptr = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    gate = torch.rand(len(entity), d).to(dtype).requires_grad_()
    return feat, ptr, torch.tensor(entity, dtype=torch.int64), gate


def fused(device, feat, ptr, entity, gate, get_weight=True):
    """Sums and weights of the kernels, and back to where the inputs came from."""
    inputs = [given.to(device) for given in (feat, ptr, entity, gate)]
    assert fused_triton.usable(inputs[0], inputs[3])
    out, weight, weight_ptr = fused_triton.aggregate(*inputs, get_weight)
    if weight is None or weight_ptr is None:
        assert weight is weight_ptr is None
        return out.cpu(), None
    assert weight_ptr.diff().tolist() == (ptr[entity + 1] - ptr[entity]).tolist()
    return out.cpu(), weight.cpu()


def loop(feat, ptr, entity, gate):
    """Sums and weights of the loop, in float64."""
    d = feat.shape[1]
    feat, ptr, gate = numbers(feat.double()), ptr.tolist(), numbers(gate.double())
    own = [feat[ptr[i] : ptr[i + 1]] for i in entity.tolist()]
    sums = [aggregate(g, views) or [0.0] * d for g, views in zip(gate, own, strict=True)]
    weights = [view_weights(g, views) for g, views in zip(gate, own, strict=True)]
    return tensor(sums), tensor([weight for row in weights for weight in row])


def assert_near(found, expected, tolerance):
    """Two lists of tensors, each as a whole."""
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        one, other = one.double(), other.double()
        assert (one - other).norm() <= tolerance * other.norm().clamp(min=1e-3)


def gradients(out, weight, inputs):
    """Of a sum that is another for every entry of the sums and the weights."""
    generator = torch.Generator().manual_seed(1)
    total = (out * torch.randn(out.shape, generator=generator)).sum()
    total = total + (weight * torch.randn(weight.shape, generator=generator)).sum()
    return torch.autograd.grad(total, inputs)


# -- against the loop -----------------------------------------------------------------------------

COUNTS = [0, 1, 2, 11, 5, 0]
# Entities repeat under different gates, in no order; 0 and 5 have no view.
QUERIES = [4, 0, 3, 1, 4, 2, 5, 2, 3, 1]


@pytest.mark.parametrize("d", [1, 5])
def test_sums_weights_and_gradients_match_the_loop(device, d):
    feat, ptr, entity, gate = case(COUNTS, QUERIES, d)
    with torch.no_grad():
        feat[1] = 0.0  # one of two views is a zero vector
        gate[4] = 0.0  # a gate that lets nothing through
    for found, expected in zip(
        fused(device, feat, ptr, entity, gate), loop(feat, ptr, entity, gate), strict=True
    ):
        assert_agree(found, expected, [feat, gate], rtol=1e-4, atol=1e-5)


def test_a_gate_of_any_sign_matches_the_loop(device):
    feat, ptr, entity, gate = case([3, 7], [1, 0, 1], 5)
    gate = (8 * gate.detach() - 4).requires_grad_()
    found, _ = fused(device, feat, ptr, entity, gate, get_weight=False)
    expected, _ = loop(feat, ptr, entity, gate)
    assert_agree(found, expected, [feat, gate], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("feat_dtype", "gate_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_half_precision_is_summed_in_float32(device, feat_dtype, gate_dtype):
    feat, ptr, entity, gate = case([0, 1, 20, 9], [2, 0, 3, 1], 33, feat_dtype)
    gate = gate.detach().to(gate_dtype).requires_grad_()
    out, weight = fused(device, feat, ptr, entity, gate)
    expected = loop(feat.detach(), ptr, entity, gate.detach())  # of the rounded, in float64
    assert out.dtype == weight.dtype == torch.float32
    assert_agree(out, expected[0], rtol=1e-5, atol=1e-6)
    assert_agree(weight, expected[1], rtol=1e-5, atol=0)
    wide = [given.detach().float().requires_grad_() for given in (feat, gate)]
    exact = gradients(*reference.aggregate(wide[0], ptr, entity, wide[1])[:2], wide)
    found = gradients(out, weight, [feat, gate])
    assert [part.dtype for part in found] == [feat_dtype, gate_dtype]
    assert_near([part.float() for part in found], exact, 4e-3)  # rounded at the end


# -- against the reference ------------------------------------------------------------------------


# One warp a row, and several.
@pytest.mark.parametrize("d", [48, 1025])
def test_any_width_and_count_match_the_reference(device, d):
    feat, ptr, entity, gate = case([0, 1, 2, 3, 17, 0, 311], [6, 0, 1, 2, 3, 4, 2], d)
    found = fused(device, feat, ptr, entity, gate)
    expected = reference.aggregate(feat, ptr, entity, gate)[:2]
    assert_near(found, expected, 1e-6)
    inputs = [feat, gate]
    assert_near(gradients(*found, inputs), gradients(*expected, inputs), 1e-5)


def test_what_needs_no_gradient_is_left_without(device):
    feat, ptr, entity, gate = case([3, 2], [1, 0, 1], 6)
    everything = torch.autograd.grad(fused(device, feat, ptr, entity, gate)[0].sum(), [feat, gate])
    for alone in (0, 1):
        inputs = [feat.detach(), gate.detach()]
        inputs[alone].requires_grad_()
        fused(device, inputs[0], ptr, entity, inputs[1])[0].sum().backward()
        torch.testing.assert_close(inputs[alone].grad, everything[alone])
        assert inputs[1 - alone].grad is None


def test_sums_are_the_same_without_weights(device):
    feat, ptr, entity, gate = case(COUNTS, QUERIES, 5)
    out, _ = fused(device, feat, ptr, entity, gate)
    alone, weight = fused(device, feat, ptr, entity, gate, get_weight=False)
    assert weight is None
    torch.testing.assert_close(alone, out)
    one, other = (torch.autograd.grad(part.sum(), gate)[0] for part in (alone, out))
    torch.testing.assert_close(one, other)


def test_a_single_view_is_returned_as_it_is(device):
    feat, ptr, entity, gate = case([1, 1], [1, 0, 1], 5)
    out, weight = fused(device, feat, ptr, entity, gate)
    assert torch.equal(out, feat[[1, 0, 1]])
    assert weight.eq(1).all()


def test_inputs_need_not_be_contiguous(device):
    feat, ptr, entity, gate = case([3, 0, 2], [2, 0, 1, 0], 6)
    expected = fused(device, feat, ptr, entity, gate)
    gradient = gradients(*expected, [feat, gate])
    strided = [
        torch.stack([given.detach()] * 2, dim=-1)[..., 0].requires_grad_(given.is_floating_point())
        for given in (feat, ptr, entity, gate)
    ]
    found = fused(device, *strided)
    assert_near(found, expected, 0)
    assert_near(gradients(*found, [strided[0], strided[3]]), gradient, 1e-6)


@pytest.mark.parametrize(
    ("counts", "entity"),
    [([0], [0]), ([0, 0, 0], [2, 1, 1]), ([0], []), ([3, 1], [])],
    ids=["one-without-views", "no-views-at-all", "nothing", "no-queries"],
)
def test_without_queries_or_views_there_are_zeros_at_most(device, counts, entity):
    feat, ptr, entity, gate = case(counts, entity, 3)
    out, weight = fused(device, feat, ptr, entity, gate)
    assert out.shape == (len(entity), 3)
    assert len(weight) == 0
    for part in (out, *torch.autograd.grad(out.sum(), [feat, gate])):
        assert part.eq(0).all()


def test_torch_compile_may_be_around_it(device):
    feat, ptr, entity, gate = case([3, 2], [1, 0, 1], 6)

    def twice(gate):
        assert fused_triton.usable(feat, gate)
        return 2 * fused_triton.aggregate(feat, ptr, entity, 2 * gate, False)[0]

    feat, ptr, entity, gate = (
        given.detach().to(device).requires_grad_(given.is_floating_point())
        for given in (feat, ptr, entity, gate)
    )
    found, expected = torch.compile(twice, backend="eager")(gate), twice(gate)
    assert torch.equal(found, expected)
    one, other = (torch.autograd.grad(part.sum(), gate)[0] for part in (found, expected))
    torch.testing.assert_close(one, other)


# -- what floats hold -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [3e37, 1e30, 1e-30, 1e-40])
def test_weights_do_not_depend_on_the_size_of_views_or_gates(device, scale):
    feat, ptr, entity, gate = (given.detach() for given in case([4, 9], [1, 0, 1], 6))
    _, expected = loop(feat, ptr, entity, gate)
    # The smallest are held with few digits.
    tolerance = 1e-5 if scale > 1e-37 else 1e-3
    for inputs in ((scale * feat, gate), (feat, scale * gate)):
        out, weight = fused(device, inputs[0], ptr, entity, inputs[1])
        assert out.isfinite().all()
        assert_agree(weight, expected, rtol=tolerance, atol=0)


def test_sums_do_not_outgrow_the_largest_view(device):
    feat = torch.full((9, 3), 3e38)
    out, _ = fused(device, feat, torch.tensor([0, 9]), torch.tensor([0]), torch.rand(1, 3))
    torch.testing.assert_close(out, feat[:1])


def test_views_of_very_different_sizes_have_the_right_weights(device):
    feat, ptr, entity, gate = (given.detach() for given in case([5], [0, 0], 6))
    feat = feat * torch.tensor([1e30, 1e-30, 1.0, 1e-3, 1e10])[:, None]
    _, expected = loop(feat, ptr, entity, gate)
    _, weight = fused(device, feat, ptr, entity, gate)
    assert_agree(weight, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e15, 1e-15])
def test_gradients_match_the_reference_at_any_size(device, scale):
    feat, ptr, entity, gate = (given.detach() for given in case([4, 9], [1, 0, 1], 6))
    inputs = [(scale * feat).requires_grad_(), (gate / scale).requires_grad_()]
    found, expected = (
        torch.autograd.grad(out.sum(), inputs)
        for out in (
            fused(device, inputs[0], ptr, entity, inputs[1])[0],
            reference.aggregate(inputs[0], ptr, entity, inputs[1])[0],
        )
    )
    assert_near(found[:1], expected[:1], 1e-5)
    assert_near([found[1] / scale**2], [expected[1] / scale**2], 1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_view_or_gate_that_is_no_number_spoils_its_own_query_alone(device, value):
    feat, ptr, entity, gate = case([6, 6, 6], [0, 1, 2], 3)
    with torch.no_grad():
        feat[2, 1] = gate[2, 0] = value
    found = fused(device, feat, ptr, entity, gate)
    expected = reference.aggregate(feat, ptr, entity, gate)[:2]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    assert found[0].isfinite().all(dim=1).tolist() == [False, True, False]


def test_an_entity_that_there_is_not_gets_nan(device):
    feat, ptr, entity, gate = case([2, 1], [0, 1, 0, 1], 3)
    entity[1], entity[2] = -1, 2
    inputs = [given.to(device) for given in (feat, ptr, entity, gate)]
    out, _, _ = fused_triton.aggregate(*inputs, False)
    assert out.isnan().all(dim=1).tolist() == [False, True, True, False]
    assert out[[0, 3]].isfinite().all()


def test_the_layer_gives_entities_without_views_their_vector(device):
    torch.manual_seed(0)
    feat, ptr, entity, _ = case([3, 0, 1], [1, 0, 2, 1], 20)
    entity_feat, grad = torch.randn(4, 6), torch.randn(4, 20)
    state = GatedViewConv(20, 6).state_dict()
    found = {}
    for backend, here in (("triton", device), ("reference", torch.device("cpu"))):
        conv = GatedViewConv(20, 6, backend=backend).to(here)
        conv.load_state_dict(state)
        out = conv.aggregate(*(x.detach().to(here) for x in (feat, ptr, entity, entity_feat)))
        out.backward(grad.to(here))
        found[backend] = [out, *(parameter.grad for parameter in conv.parameters())]
        if backend == "triton":
            assert "Aggregate" in type(out.grad_fn).__name__  # nothing more comes after it
    assert found["triton"][-1] is not None
    for one, other in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(one.cpu(), other)


def test_the_layer_refuses_views_of_another_width(device):
    feat, ptr, entity, _ = case([2, 1], [0, 1], 8)
    conv = GatedViewConv(4, 6, backend="triton").to(device)
    given = (x.detach().to(device) for x in (feat, ptr, entity, torch.randn(2, 6)))
    with pytest.raises(IMVIAError, match=r"view_feat \(V, 4\); received \(3, 8\)"):
        conv.aggregate(*given)


def test_offsets_do_not_overflow_int32(device):
    if not ON_GPU:
        pytest.skip("takes 4 GiB, which the interpreter would copy")
    feat = torch.empty(2**31 // 512 + 3, 512, dtype=torch.bfloat16, device=device)
    feat[-2:] = torch.randn(2, 512)
    ptr = torch.tensor([0, len(feat) - 2, len(feat)], device=device)
    entity, gate = torch.tensor([1], device=device), torch.rand(1, 512, device=device)
    found, _, _ = fused_triton.aggregate(feat, ptr, entity, gate, False)
    expected, _, _ = reference.aggregate(feat[-2:], ptr[:2].clamp(max=2), entity - 1, gate)
    torch.testing.assert_close(found, expected)


# -- where there is a kernel ----------------------------------------------------------------------


def test_kernels_are_for_what_they_were_written_for(device):
    def usable(feat_dtype=torch.float32, gate_dtype=torch.float32, d=4):
        feat = torch.zeros(2, d, dtype=feat_dtype, device=device)
        return fused_triton.usable(feat, torch.zeros(3, d, dtype=gate_dtype, device=device))

    assert usable()
    assert usable(torch.float16, torch.bfloat16)
    assert usable(d=4096)
    assert not usable(d=4097)
    assert not usable(d=0)
    assert not usable(torch.float64)
    assert not usable(gate_dtype=torch.float64)
    assert not usable(torch.int64)


def test_gradients_of_features_are_not_for_deterministic_algorithms(device):
    feat, gate = torch.zeros(2, 2, 4, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        assert fused_triton.usable(feat, gate.clone().requires_grad_())
        assert not fused_triton.usable(feat.clone().requires_grad_(), gate)
    finally:
        torch.use_deterministic_algorithms(False)
    assert fused_triton.usable(feat.clone().requires_grad_(), gate)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_kernels_are_not_for_the_cpu():
    feat, ptr, entity, gate = case([2], [0], 4)
    assert not fused_triton.usable(feat, gate)
    with pytest.raises(IMVIAError, match=r"'triton'.*received torch.float32 on cpu"):
        fused_triton.aggregate(feat, ptr, entity, gate)


def test_without_triton_there_are_no_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(fused_triton, "tl", None)
    feat, gate = torch.zeros(2, 2, 4, device="cuda" if ON_GPU else "cpu")
    assert not fused_triton.usable(feat, gate)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("everything", [False, True], ids=["for-gates", "for-views-and-weights"])
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_kernels_compile_for_a_gpu_that_is_not_there(monkeypatch, tmp_path, name, everything):
    """With loads of 16 bytes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert fused_triton._load()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(fused_triton, name)
    types = dict.fromkeys(kernel.arg_names, "*fp32")
    types |= {"feat": "*bf16", "num_entities": "i32"}
    types |= dict.fromkeys(["ptr", "entity", "cosine_ptr", "weight_ptr"], "*i64")
    constants = {"d": 512, "BLOCK_D": 512, "BLOCK_N": 4}
    if not everything:
        optional = ["cosine", "cosine_ptr", "weight_ptr", "grad_weight", "grad_feat"]
        constants |= dict.fromkeys(optional)
    signature = {
        argument: "constexpr" if argument in constants else types[argument]
        for argument in kernel.arg_names
    }
    constants = {key: value for key, value in constants.items() if key in signature}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 1, "enable_fp_fusion": True},
    )
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
