"""Kernels of products, losses and updates: on a GPU, or in Triton's interpreter."""

import ast
import importlib
import weakref
from functools import partial
from itertools import product

import pytest
import torch
from helpers import ROOT, ring_kg
from helpers import paper_settings as settings
from test_fused_triton import (  # noqa: F401
    INTERPRETED,
    ON_GPU,
    device,
    in_the_interpreter,
    needs_triton,
)
from test_losses import POSITIVES, WEIGHTED, factored_case, plainly
from torch.utils._python_dispatch import TorchDispatchMode

import imvia_graph as ig
from imvia_graph import TrainingError, _factored, _gpu, optimizers, training
from imvia_graph._gpu import fusion, grouped, powers, probe, products
from imvia_graph._gpu.lookup import lookup
from imvia_graph._recorded import RecordedSteps, has_one_shape
from imvia_graph.checkpoint import load_trainer, save_trainer
from imvia_graph.losses import Positives, dura, factored_completion, n3
from imvia_graph.optimizers import Adagrad
from imvia_graph.training import Callback, Trainer


@needs_triton
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_claims_below_hold_in_the_interpreter():
    in_the_interpreter(__file__)


# -- products of groups ---------------------------------------------------------------------------

#: Of numbers in float32, from those in float64.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
#: How many rows each group has.
COUNTS = [3, 0, 40, 1, 0, 16, 0]
#: What the interpreter, which is made of NumPy, has no arithmetic for.
HALF = [torch.float16] if not ON_GPU else [torch.float16, torch.bfloat16]
#: For large cases, for which the interpreter takes seconds.
FEW = [torch.float32, *(HALF if ON_GPU else [])]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("k", "n"), [(64, 64), (70, 40), (17, 130), (1, 3)])
def test_products_of_groups_match_the_loop(device, k, n, dtype):  # noqa: F811
    offsets = torch.tensor([0, *torch.tensor(COUNTS).cumsum(0).tolist()])
    rows = torch.randn(60, k).to(dtype).requires_grad_()
    matrix = torch.randn(len(COUNTS), k, n).to(dtype).requires_grad_()
    grad = torch.randn(60, n).to(dtype)
    given = rows.to(device), matrix.to(device), offsets.to(device)
    assert grouped.usable(*given[:2])
    out = grouped.product(*given)
    assert out.dtype == dtype
    found = out, *torch.autograd.grad(out, [rows, matrix], grad.to(device))
    exact = [part.detach().double().requires_grad_() for part in (rows, matrix)]
    parts = exact[0].split(COUNTS)
    right = torch.cat([part @ exact[1][u] for u, part in enumerate(parts)])
    expected = right, *torch.autograd.grad(right, exact, grad.double())
    for one, other in zip(found, expected, strict=True):
        assert (one.cpu().double() - other).norm() <= TOLERANCE[dtype] * other.norm()


TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def test_groups_without_rows_are_no_error(device):  # noqa: F811
    none, matrix = torch.zeros(0, 4, device=device), torch.ones(3, 4, 4, device=device)
    offsets = torch.zeros(4, dtype=torch.int64, device=device)
    assert grouped.product(none, matrix, offsets).shape == (0, 4)


# -- losses ---------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """The kernels, also where others would be taken: on the CPU of the interpreter."""
    monkeypatch.setattr(_factored._kernels, "load", lambda name: None)


def filled(positives, number):
    """The positives in ascending rows, the last one again and again."""
    order = torch.argsort(positives.row, stable=True)
    place = torch.arange(number).clamp(max=len(order) - 1)
    counts = (torch.arange(number) < len(order)).float()
    row, col = positives.row[order][place], positives.col[order][place]
    return Positives(row, col, positives.weight, counts)


def moved(positives, device):  # noqa: F811
    return Positives(*(None if part is None else part.to(device) for part in positives))


@pytest.mark.parametrize(
    ("size", "heads", "number"),
    [(5, 1, None), (333, 4, None), (333, 4, 9)],
    ids=["a-head", "heads", "filled-up"],
)
@pytest.mark.parametrize("decided", ["trained", "detached", "not"])
@pytest.mark.parametrize(
    ("loss", "positives"),
    [("softmax", POSITIVES), ("softmax", WEIGHTED), ("binary", POSITIVES)],
    ids=["softmax", "weighted", "binary"],
)
def test_losses_match_those_of_the_scores(
    device, on_gpu, loss, positives, size, decided, heads, number  # noqa: F811
):  # fmt: skip
    queries, candidates, weights = factored_case(heads, torch.float32, size)
    weights = None if decided == "not" else weights
    inputs = [*queries, *candidates, *([] if weights is None else [weights])]
    there = [part.to(device) for part in inputs]
    given = positives if number is None else filled(positives, number)
    found = factored_completion(
        there[:heads],
        there[heads : 2 * heads],
        moved(given, device),
        None if weights is None else there[-1],
        loss,
        0.1,
        decided == "detached",
    )
    exact = [part.detach().double().requires_grad_() for part in inputs]
    last = None if weights is None else exact[-1]
    parts = exact[:heads], exact[heads : 2 * heads], last
    expected = plainly(*parts, loss, 0.1, decided == "detached", positives)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(3 * found, inputs)
    right = torch.autograd.grad(3 * expected, exact)
    for one, other in zip(gradients, right, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_losses_do_not_hide_what_is_not_finite(device, on_gpu, value):  # noqa: F811
    queries, candidates, weights = factored_case(2, torch.float32)
    with torch.no_grad():
        candidates[1][4, 0] = value
    there = [part.to(device) for part in (*queries, *candidates, weights)]
    found = factored_completion(there[:2], there[2:4], moved(POSITIVES, device), there[4])
    assert not found.isfinite()
    found.backward()
    assert not queries[1].grad.isfinite().all()


def test_losses_of_large_scores_are_finite(device, on_gpu):  # noqa: F811
    queries = torch.tensor([[1e4], [-1e4], [1.0]], requires_grad=True)
    candidates = torch.tensor([[1.0], [-1.0], [0.0], [0.5], [0.3]])
    for loss in ("softmax", "binary"):
        given = moved(POSITIVES, device)
        found = factored_completion(
            [queries.to(device)], [candidates.to(device)], given, None, loss, 0.1
        )
        expected = plainly([queries], [candidates], None, loss, 0.1)
        torch.testing.assert_close(found.cpu(), expected)
        assert torch.autograd.grad(found, queries)[0].isfinite().all()


def test_losses_read_weights_however_they_lie(device, on_gpu):  # noqa: F811
    queries, candidates, weights = factored_case(2, torch.float32)
    parts = [part.to(device) for part in (*queries, *candidates)]
    found = []
    for given in (weights.detach(), weights.detach().T.contiguous().T):
        there = given.to(device).requires_grad_()
        loss = factored_completion(parts[:2], parts[2:], moved(POSITIVES, device), there)
        found.append([loss, *torch.autograd.grad(loss, there)])
    assert not given.is_contiguous()
    torch.testing.assert_close(*found)


# -- products in half precision --------------------------------------------------------------------


def test_products_in_half_precision_match_those_in_float64(device):  # noqa: F811
    drawn = torch.Generator().manual_seed(0)
    left, right, weight = (
        torch.randn(*shape, generator=drawn).to(device).requires_grad_()
        for shape in ((7, 5), (5, 4), (4, 5))
    )
    bias = torch.randn(4, generator=drawn).to(device).requires_grad_()
    grad = torch.randn(7, 4, generator=drawn).to(device, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (left, right, weight, bias)]
    for found, expected, inputs, given in (
        (
            products.Product.apply(left, right, torch.bfloat16),
            exact[0] @ exact[1],
            [left, right],
            exact[:2],
        ),
        (
            products.Linear.apply(left, weight, bias, torch.bfloat16),
            exact[0] @ exact[2].T + exact[3],
            [left, weight, bias],
            [exact[0], *exact[2:]],
        ),
    ):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05)
        gradients = torch.autograd.grad(found, inputs, grad)
        right_ones = torch.autograd.grad(expected, given, grad.double())
        for one, other in zip(gradients, right_ones, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one.double(), other, rtol=0.05, atol=0.05)


def test_layers_under_autocast_go_the_fast_way_on_a_gpu_alone(device):  # noqa: F811
    layer = torch.nn.Linear(5, 4).to(device)
    feat = torch.randn(7, 5, device=device)
    half = torch.bfloat16
    with torch.autocast(torch.device(device).type, half):
        out = products.linear(layer, feat)
        matrix = products.product(feat, layer.weight.T)
        plain = layer(feat)
    for one in (out, matrix):
        fast = type(one.grad_fn).__name__ in ("LinearBackward", "ProductBackward")
        assert fast == ON_GPU
    torch.testing.assert_close(out, plain)
    # Not that of another class, nor one that somebody listens to.
    layer.register_forward_hook(lambda *given: torch.zeros(7, 4, device=device))
    with torch.autocast(torch.device(device).type, half):
        assert not products.linear(layer, feat).any()
    assert torch.equal(products.linear(torch.nn.Identity(), feat), feat)


# -- rows of tables -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "size", "width", "dtype"),
    [
        *((150, 40, 5, dtype) for dtype in [torch.float32, *HALF]),
        *((1, 3, 300, dtype) for dtype in [torch.float32, *HALF]),
        *((520, 1, 257, dtype) for dtype in FEW),
    ],
)
def test_gradients_of_lookups_are_summed(device, number, size, width, dtype):  # noqa: F811
    drawn = torch.Generator().manual_seed(0)
    row = torch.randint(size, (number,), generator=drawn)
    table = torch.randn(size + 2, width, generator=drawn).to(device, dtype).requires_grad_()
    # Every other column, so that it is not contiguous.
    grad = torch.randn(number, 2 * width, generator=drawn).to(device, dtype)[:, ::2]
    out = lookup(row.to(device), table)
    assert "Lookup" in type(out.grad_fn).__name__
    assert torch.equal(out.cpu(), table.detach().cpu()[row])
    (found,) = torch.autograd.grad(out, table, grad)
    expected = torch.zeros(size + 2, width, dtype=torch.float64)
    expected.index_add_(0, row, grad.cpu().double())
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.cpu().double(), expected, rtol=bound, atol=bound)
    assert found.dtype == dtype


def test_lookups_have_gradients_of_gradients(device):  # noqa: F811
    table = torch.randn(4, 3, device=device, requires_grad=True)
    row = torch.tensor([2, 0, 2], device=device)
    (first,) = torch.autograd.grad(lookup(row, table).pow(3).sum(), table, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), table)
    times = torch.tensor([1.0, 0.0, 2.0, 0.0], device=device)[:, None]
    torch.testing.assert_close(second, 6 * table * times)


def test_lookups_of_nothing_and_of_what_has_no_gradient_are_torch_s(device):  # noqa: F811
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert lookup(none, torch.randn(2, 3, device=device, requires_grad=True)).shape == (0, 3)
    assert lookup(none + 1, torch.randn(2, 3, device=device)).grad_fn is None


# -- joint fusion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("rows", "width", "count"), [(37, 256, 3), (5, 70, 1), (100, 17, 8), (3, 1024, 2), (0, 8, 2)]
)
def test_joint_fusion_matches_the_plain_form(device, rows, width, count, dtype):  # noqa: F811
    drawn = torch.Generator().manual_seed(0)
    first, *others = [torch.randn(rows, width, generator=drawn) for _ in range(count)]
    # One of another dtype, and one that is not contiguous.
    parts = [
        first.T.contiguous().T.requires_grad_(),
        *(x.to(dtype).requires_grad_() for x in others),
    ]
    vectors = torch.randn(count, width, generator=drawn).div_(width**0.5).requires_grad_()
    grad = torch.randn(rows, width, generator=drawn)
    of_weights = torch.randn(rows, count, generator=drawn)
    there = [part.to(device) for part in parts]
    assert fusion.usable(there)
    joint, weights = fusion.fuse(vectors.to(device), True, there)
    assert joint.dtype == torch.float32
    inputs = [vectors, *parts]
    alone = torch.autograd.grad(joint, inputs, grad.to(device), retain_graph=True)
    both = (grad.to(device), of_weights.to(device))
    found = torch.autograd.grad([joint, weights], inputs, both)

    exact = [part.detach().double().requires_grad_() for part in inputs]
    logits = torch.stack([part @ row for part, row in zip(exact[1:], exact[0], strict=True)], 1)
    right = logits.softmax(1)
    mean = sum(right[:, m, None] * part for m, part in enumerate(exact[1:]))
    bounds = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    )
    torch.testing.assert_close(joint.cpu().double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.cpu().double(), right, rtol=1e-5, atol=1e-5)
    for grads, outputs, given in (
        (alone, [mean], [grad.double()]),
        (found, [mean, right], [grad.double(), of_weights.double()]),
    ):
        expected = torch.autograd.grad(outputs, exact, given, retain_graph=True)
        for one, other, given_as in zip(grads, expected, inputs, strict=True):
            assert one.dtype == given_as.dtype
            torch.testing.assert_close(one.double(), other, **bounds)
    without, none = fusion.fuse(vectors.to(device), False, there)
    assert none is None
    assert torch.equal(without, joint)


def test_joint_fusion_has_gradients_of_gradients(device):  # noqa: F811
    drawn = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=drawn) for shape in ((2, 3), (4, 3), (4, 3))]
    seconds = []
    for form in (lambda v, *parts: fusion.fuse(v, True, parts), fusion.plain):
        given = [part.to(device).requires_grad_() for part in inputs]
        joint, weights = form(*given)
        total = joint.sum() + weights.square().sum()
        firsts = torch.autograd.grad(total, given, create_graph=True)
        seconds.append(torch.autograd.grad(sum(first.square().sum() for first in firsts), given))
    for one, other in zip(*seconds, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other)


def test_a_modality_that_counts_for_nothing_hides_no_other(device):  # noqa: F811
    parts = [torch.full((2, 4), value, device=device) for value in (-1e30, 2.0, 4.0)]
    vectors = torch.ones(3, 4, device=device)
    vectors[0] = 1e30
    vectors[1:] = 0
    assert fusion.usable(parts)
    joint, weights = fusion.fuse(vectors, True, parts)
    torch.testing.assert_close(joint, torch.full_like(joint, 3.0))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.5, 0.5]] * 2, device=device))


def test_the_layer_of_joint_fusion_takes_the_kernels(device):  # noqa: F811
    layer = ig.nn.JointFusion(8, 3).to(device)
    torch.nn.init.normal_(layer.attention)
    parts = torch.randn(5, 3, 8, device=device)
    joint, weights = layer(parts, get_attention=True)
    assert "Fuse" in type(joint.grad_fn).__name__
    torch.testing.assert_close(joint, (parts * weights[..., None]).sum(1))
    assert torch.equal(layer(parts), joint)
    assert layer(torch.full((2, 3, 8), torch.nan, device=device)).isnan().all()


# -- powers ----------------------------------------------------------------------------------------


def sizes(power, rows):
    """(n,) sums of the squares of (n, d) rows, or of the cubes of the moduli of their numbers."""
    if power == 2:
        return rows.square().sum(1)
    half = rows.shape[1] // 2
    real, imaginary, rest = rows[:, :half], rows[:, half : 2 * half], rows[:, 2 * half :]
    paired = (real.square() + imaginary.square()).pow(1.5).sum(1)
    return paired + rest.abs().pow(3).sum(1)


# The interpreter multiplies no bfloat16, but here it is read as float32.
@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        *product([1, 2, 64, 301], [torch.float32, torch.float16, torch.bfloat16]),
        *product([2051], FEW),
    ],
)
@pytest.mark.parametrize("power", [2, 3])
def test_sums_of_powers_match_the_plain_form(device, power, width, dtype):  # noqa: F811
    few, many, none = torch.rand(13), torch.rand(70), torch.rand(0)
    many[torch.arange(70) % 3 > 0] = 0
    # More parts of a kind than a launch takes, one that is not contiguous, one in two dtypes.
    weights = [few] * 10 + [many] * 2 + [none, few]
    parts = [torch.randn(len(weight), width).to(dtype) for weight in weights]
    parts[1] = parts[1].T.contiguous().T
    parts[-1] = parts[-1].float()
    parts[0][3] = 0
    there = {id(weight): weight.to(device) for weight in (few, many, none)}
    given = [part.to(device) for part in parts], [there[id(weight)] for weight in weights]
    assert powers.usable(*given)
    found = powers.total(power, *given)
    gradients = powers.gradients(power, torch.tensor(1.7, device=device), *given)
    exact = [part.double().requires_grad_() for part in parts]
    expected = sum(
        (sizes(power, part) * weight).sum() for part, weight in zip(exact, weights, strict=True)
    )
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-6, atol=1e-6)
    right = torch.autograd.grad(1.7 * expected, exact)
    for part, one, other in zip(parts, gradients, right, strict=True):
        assert one.dtype == part.dtype
        assert (one.cpu().double() - other).norm() <= TOLERANCE[one.dtype] * other.norm()
    assert not gradients[0][3].any()
    assert not gradients[10][1].any()


@pytest.mark.parametrize("power", [2, 3])
def test_powers_of_no_rows_are_no_error(device, power):  # noqa: F811
    given = [torch.zeros(0, 4, device=device)], [torch.zeros(0, device=device)]
    assert powers.total(power, *given) == 0
    assert powers.gradients(power, torch.ones((), device=device), *given)[0].shape == (0, 4)


@pytest.mark.parametrize("power", [2, 3])
def test_powers_do_not_hide_what_is_not_finite(device, power):  # noqa: F811
    rows = torch.ones(3, 4, device=device)
    rows[1, 2] = torch.nan
    for last in (0.0, 1.0):
        weight = torch.tensor([1.0, last, 1.0], device=device)
        assert powers.usable([rows], [weight])
        found = powers.total(power, [rows], [weight])
        grad = powers.gradients(power, torch.ones((), device=device), [rows], [weight])[0]
        # A row that does not count is not read.
        assert found.isfinite() == grad.isfinite().all() == (last == 0)


def test_weights_of_other_lengths_are_not_for_the_kernels(device):  # noqa: F811
    rows = torch.ones(3, 4, device=device)
    assert powers.usable([rows], [rows[:, 0]])
    assert not powers.usable([rows], [rows[:2, 0]])
    for function in (dura, n3):
        with pytest.raises(RuntimeError):
            function(rows, rows, rows, times=rows[:2, 0])


@pytest.mark.parametrize("counted", [False, True], ids=["answers", "candidates"])
@pytest.mark.parametrize("name", ["dura", "n3"])
def test_regularizers_are_the_same_with_kernels(device, monkeypatch, name, counted):  # noqa: F811
    heads, queries = (
        [torch.randn(6, 5, device=device).requires_grad_() for _ in range(3)] for _ in range(2)
    )
    answers = [torch.randn(20, 5, device=device).requires_grad_() for _ in range(3)]
    with torch.no_grad():
        heads[0][2], answers[0][0] = 0, 0
    weight = torch.tensor([3.0, 1.0, 1.0, 2.0, 0.0, 1.0], device=device)
    times = (torch.arange(20, device=device) % 4).float() if counted else None
    if name == "dura":
        function, given = dura, (heads, queries, answers)
        inputs = [*heads, *queries, *answers]
    else:
        function, given = n3, (heads[0], queries[0], answers[0])
        inputs = list(given)
    told = []
    usable = powers.usable
    for kernels in (True, False):
        monkeypatch.setattr(powers, "usable", lambda *x, on=kernels: on and usable(*x))
        assert powers.usable(heads, [weight] * 3) == kernels
        found = function(*given, weight, times=times)
        told.append([found, *torch.autograd.grad(3 * found, inputs)])
    for one, other in zip(*told, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(one, other)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("power", [2, 3])
@pytest.mark.parametrize("name", ["_sum_up", "_slopes"])
def test_powers_compile_for_a_gpu_that_is_not_there(monkeypatch, tmp_path, name, power):
    """With loads of 16 bytes, whichever part is loaded."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from imvia_graph import _gpu

    assert _gpu.load(vars(powers), powers._KERNELS)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(powers, name)
    constants = {"d": 512, "POWER": power, "ROWS": 8, "COLUMNS": 512}
    types = {**dict.fromkeys(constants, "constexpr"), "size": "i32"}
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if signature[argument] == "*fp32"
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 8},
    )
    assert "ld.global.v4.b32" in compiled.asm["ptx"]


# -- all of them -----------------------------------------------------------------------------------

#: What arguments of kernels are where they are not pointers to float32 (on the CPU of a test, too,
#: they are compiled as for a GPU: the interpreter takes what the compiler would not).
POINTERS = {
    **dict.fromkeys(["row", "offsets", "ptr", "col"], "*i64"),
    **dict.fromkeys(["scores", "rows", "matrix", "p1"], "*bf16"),
}
NUMBERS = {
    **dict.fromkeys(["size", "number", "width", "wide", "tall"], "i32"),
    **dict.fromkeys(["of_first", "of_second", "log_first", "log_second"], "fp32"),
    **dict.fromkeys(["eps", "weight_decay", "smooth", "smoothing"], "fp32"),
}
CONSTANTS = {
    ("updates", "_adagrad"): [{"COLUMNS": 2048}],
    ("updates", "_adam"): [{"COLUMNS": 2048, "DECOUPLED": apart} for apart in (False, True)],
    ("fusion", "_fuse"): [
        {"d": 256, "count": 3, "COUNT": 4, "ROWS": 8, "COLUMNS": 256, "TIMES": 1, "rows": int}
    ],
    ("fusion", "_back"): [
        {
            **{"d": 256, "count": 3, "COUNT": 4, "ROWS": 8, "COLUMNS": 256, "TIMES": 2},
            **{"rows": int, "grad_attention": given},
        }
        for given in (None, "*fp32")
    ],
    ("grouped", "_multiply"): [
        {"k": 64, "n": 64, "along_k": 64, "along_n": 1, "ROWS": 16, "COLUMNS": 64}
    ],
    ("grouped", "_outer"): [{"k": 64, "n": 64, "grad": "*bf16", "ROWS": 16, "COLUMNS": 64}],
    ("probe", "_store_one"): [{}],
    ("lookup", "_add_up"): [{"LOOKED": 512, "ROWS": 16, "COLUMNS": 256}],
    ("scores", "_sum_up"): [
        {"heads": 5, "DECIDED": True, "SOFTMAX": softmax, "HEADS": 8, "COLUMNS": 512, "rows": int}
        for softmax in (False, True)
    ],
    ("scores", "_into_gradients"): [
        {
            **{"heads": 5, "DECIDED": True, "SOFTMAX": softmax, "HEADS": 8, "COLUMNS": 512},
            **{"DETACHED": softmax, "rows": int},
        }
        for softmax in (False, True)
    ],
    ("scores", "_positives"): [
        {
            **{"heads": 5, "DECIDED": True, "SOFTMAX": softmax, "HEADS": 8, "COLUMNS": 64},
            **{"DETACHED": not softmax, "rows": int, "counts": given},
        }
        for softmax in (False, True)
        for given in (None, "*fp32")
    ],
    ("scores", "_put"): [{"heads": 5, "HEADS": 8, "COLUMNS": 64, "rows": int}],
    ("powers", "_sum_up"): [
        {"d": 257, "POWER": power, "ROWS": 8, "COLUMNS": 256} for power in (2, 3)
    ],
    ("powers", "_slopes"): [
        {"d": 257, "POWER": power, "ROWS": 8, "COLUMNS": 256} for power in (2, 3)
    ],
}


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize(("module", "name"), CONSTANTS, ids=lambda part: part)
def test_kernels_compile(module, name):
    module = importlib.import_module(f"imvia_graph._gpu.{module}")
    assert _gpu.load(vars(module), module._KERNELS)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(module, name)
    for given in CONSTANTS[module.__name__.split(".")[-1], name]:
        numbers = {**NUMBERS, **{key: "i32" for key, value in given.items() if value is int}}
        pointers = {**POINTERS, **{k: v for k, v in given.items() if str(v).startswith("*")}}
        known = {key: v for key, v in given.items() if key not in numbers and key not in pointers}
        kinds = {**pointers, **numbers, **dict.fromkeys(known, "constexpr")}
        signature = {argument: kinds.get(argument, "*fp32") for argument in kernel.arg_names}
        source = ASTSource(kernel, signature, known)
        target = GPUTarget("cuda", 90, 32)
        compiled = triton.compile(source, target=target, options=_gpu.OPTIONS)
        assert "st.global" in compiled.asm["ptx"]
        if "dot(" in kernel.src and "amd" in triton.backends.backends:
            # Of whose GPUs some have no TF32.
            target = GPUTarget("hip", "gfx90a", 64)
            compiled = triton.compile(source, target=target, options=_gpu.OPTIONS)
            assert "mfma" in compiled.asm["amdgcn"]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter needs no compiler")
def test_without_a_compiler_there_are_no_kernels_and_a_warning(monkeypatch, caplog):
    class Kernel:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    assert _gpu.load(vars(probe), probe._KERNELS)
    monkeypatch.setattr(probe, "_store_one", Kernel())
    assert not probe.launches.__wrapped__(torch.device("cpu"))
    assert "kernels on cpu (RuntimeError: Failed to find C compiler.), and slower" in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for answer in (False, True):
        monkeypatch.setattr(probe, "launches", lambda _, answer=answer: answer)
        assert _gpu.runs_on(torch.device("cuda", 1)) == answer
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not _gpu.runs_on(torch.device("cuda", 1)) or torch.version.hip


def test_every_kernel_is_compiled_in_the_test_above():
    for path in sorted((ROOT / "imvia_graph" / "_gpu").glob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        # Those that others call are compiled with them.
        called = {function.id for function in calls if isinstance(function, ast.Name)}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and "no_type_check" in map(
                ast.unparse, node.decorator_list
            ):
                assert node.name in called or (path.stem, node.name) in CONSTANTS, path


def test_every_launch_says_how_numbers_are_computed():
    launches = 0
    for path in sorted((ROOT / "imvia_graph" / "_gpu").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launches += 1
                given = [ast.unparse(one.value) for one in node.keywords if one.arg is None]
                assert "_gpu.OPTIONS" in given, path
    assert launches == 8


# -- Adam ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("kind", "other_kind"),
    [(optimizers.Adam, torch.optim.Adam), (optimizers.AdamW, torch.optim.AdamW)],
    ids=["adam", "adamw"],
)
def test_adam_in_one_pass_is_torch_s(device, monkeypatch, kind, other_kind, decay):  # noqa: F811
    monkeypatch.setattr(optimizers, "_LARGE", 100)
    drawn = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 1500, generator=drawn), torch.randn(7, generator=drawn)]
    mine = [torch.nn.Parameter(value.to(device)) for value in values]
    exact = [torch.nn.Parameter(value.double()) for value in values]
    optimizer = kind(mine, lr=0.1, weight_decay=decay, fused=True)
    other = other_kind(exact, lr=0.1, weight_decay=decay)
    for step, bad in enumerate([0.0, 0.0, 1.0, 0.0]):
        optimizer.found_inf = torch.tensor(bad, device=device)
        for one, right in zip(mine, exact, strict=True):
            grad = torch.sin(torch.arange(one.numel()).double() * (step + 1)).view(one.shape)
            one.grad = torch.full_like(one, torch.nan) if bad else grad.to(one)
            right.grad = grad
        optimizer.step()
        assert all(one.grad is not None for one in mine)
        if not bad:
            other.step()
        for one, right in zip(mine, exact, strict=True):
            torch.testing.assert_close(one.detach().cpu().double(), right.detach(), **CLOSE)
    # Its state is torch's: another optimizer of torch goes on from it.
    state = optimizer.state_dict()["state"]
    assert {number: float(one["step"]) for number, one in state.items()} == {0: 3, 1: 3}
    for number, one in other.state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[number][name].cpu().double(), one[name], **CLOSE)


def test_adam_leaves_scaled_gradients_to_torch_and_runs_hooks_once(device, monkeypatch):  # noqa: F811
    monkeypatch.setattr(optimizers, "_LARGE", 4)
    parameter = torch.nn.Parameter(torch.ones(8, device=device))
    torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])  # whose step has hooks from then on
    optimizer = optimizers.Adam([parameter], lr=0.1, fused=True)
    called = []
    optimizer.register_step_post_hook(lambda *given: called.append(given))
    optimizer.found_inf = torch.zeros((), device=device)
    parameter.grad = torch.full_like(parameter, 2.0)
    assert len(optimizer._large()) == 1
    optimizer.grad_scale = torch.full((), 2.0, device=device)
    assert not optimizer._large()
    del optimizer.grad_scale
    optimizer.step()
    assert len(called) == 1
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 0.9))


# -- Adagrad ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adagrad_in_one_pass_is_torch_s(device, decay):  # noqa: F811
    mine, exact = (
        torch.nn.Parameter(torch.randn(3, 1500, generator=torch.Generator().manual_seed(0)).to(to))
        for to in (device, torch.float64)
    )
    optimizer = Adagrad([mine], lr=0.1, weight_decay=decay)
    other = torch.optim.Adagrad([exact], lr=0.1, weight_decay=decay)
    for step, bad in enumerate([0.0, 0.0, 1.0, 0.0]):
        optimizer.found_inf = torch.tensor(bad, device=device)
        grad = torch.sin(torch.arange(mine.numel()).double() * (step + 1)).view(mine.shape)
        mine.grad = torch.full_like(mine, torch.nan) if bad else grad.to(mine)
        optimizer.step()
        if not bad:
            exact.grad = grad
            other.step()
    torch.testing.assert_close(mine.cpu().double(), exact, rtol=1e-5, atol=1e-5)
    total = optimizer.state[mine]["sum"].cpu().double()
    torch.testing.assert_close(total, other.state[exact]["sum"], rtol=1e-5, atol=1e-6)


# -- steps in one shape ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"complex_head": True},
        {"regime": "kvsall", "loss": "binary", "label_smoothing": 0.1, "lambda_relation": 0.5},
        {
            "decision": "trained",
            "batch_norm": True,
            "lambda_alignment": 0.1,
            "table_optimizer": "same",
            "gradient_clip": 0.5,
            "relation_residual": False,
        },
    ],
    ids=["defaults", "kvsall-binary", "everything-else"],
)
def test_steps_in_one_shape_are_those_of_the_batches(
    device, on_gpu, monkeypatch, changes  # noqa: F811
):  # fmt: skip
    """Not recorded, but what is recorded: the same numbers, and nothing that asks the device."""
    trainers = [trainer_of(device, changes) for _ in range(2)]
    recorded = RecordedSteps(trainers[1], on_gpu=False)
    recorded.begin()
    steps = trainers[0].batches.epoch(), trainers[1].batches.rows_of_epoch()
    with NoWordToTheHost(monkeypatch) as heard:
        # What is recorded; the numbers of the step before may be read meanwhile.
        monkeypatch.setattr(recorded, "_work", heard.listens(recorded._work))
        for batch, rows in zip(*steps, strict=True):
            torch.manual_seed(1)
            plain = trainers[0].train_step(batch)
            torch.manual_seed(1)
            told = recorded.step(rows)
            assert list(told) == list(plain)
            for name, value in plain.items():
                torch.testing.assert_close(told[name], value, rtol=1e-4, atol=1e-5)
    assert trainers[0].sums.keys() == trainers[1].sums.keys()
    assert trainers[1].sums["steps"] == len(trainers[1].batches)
    for one, other in zip(*(t.model.state_dict().values() for t in trainers), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def trainer_of(device, changes):  # noqa: F811
    torch.manual_seed(0)
    chosen = settings(
        device=str(device), batch_size=12, precision="float32", backend="triton", **changes
    )
    kg = ring_kg(7, valid=2, test=2)
    model = ig.IMVIA.from_kg(kg, chosen).to(device)
    trainer = Trainer(model.train(), kg, chosen)
    for group in trainer.estimator_optimizer.param_groups:
        group["fused"] = True  # as it is on a GPU
    assert has_one_shape(trainer)
    return trainer


@pytest.fixture
def fitted(device, on_gpu, monkeypatch):  # noqa: F811
    """A trainer whose steps are such steps, of a graph without views; and plain ones."""

    def make(in_one_shape, *callbacks, **changes):
        monkeypatch.setattr(training, "can_record", lambda trainer: in_one_shape)
        monkeypatch.setattr(training, "RecordedSteps", partial(RecordedSteps, on_gpu=False))
        chosen = settings(
            device=str(device), batch_size=12, precision="float32", epochs=2, **changes
        )
        kg = ring_kg(7, valid=2, test=2, views=False)
        torch.manual_seed(0)
        model = ig.IMVIA.from_kg(kg, chosen).to(device)
        return Trainer(model, kg, chosen, callbacks)

    return make


class Records(Callback):
    """Keeps what is told of epochs; stops after a step or in a validation."""

    def __init__(self, after=None, in_validation=False):
        self.after, self.in_validation, self.records = after, in_validation, []

    def on_step(self, trainer, losses):
        if trainer.progress.step == self.after:
            trainer.stop()

    def on_epoch(self, trainer, record):
        self.records.append(record)


@pytest.mark.parametrize(("stop", "how"), [(1, "from-a-checkpoint"), ("validation", "again")])
def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    fitted, tmp_path, monkeypatch, stop, how
):
    unbroken = Records()
    expected = fitted(True, unbroken)
    expected.fit()
    records = Records(after=stop if stop == 1 else None)
    trainer = fitted(True, records)
    with monkeypatch.context() as patch:
        if stop == "validation":
            validate = Trainer.validate
            patch.setattr(Trainer, "validate", lambda self: self.stop() or validate(self))
        trainer.fit()
    assert not trainer.progress.ended
    assert not records.records
    if how == "from-a-checkpoint":
        save_trainer(tmp_path / "last.safetensors", trainer)
        trainer = fitted(True, records)
        load_trainer(tmp_path / "last.safetensors", trainer)
    records.after = None
    trainer.fit()
    assert [r["loss"] for r in records.records] == pytest.approx(
        [r["loss"] for r in unbroken.records], rel=1e-6
    )
    for one, other in zip(
        trainer.model.state_dict().values(), expected.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("non_finite", ["stop", "skip"])
def test_a_bad_step_changes_nothing_and_is_told_of(fitted, non_finite):
    class Spoil(Records):
        def on_step(self, trainer, losses):
            table = trainer.model.entity.weight
            if trainer.progress.step == 1:
                self.kept = table[0].clone()
                table.data[0] = torch.nan
            else:
                table.data[0] = self.kept

    trainer = fitted(True, Spoil(), non_finite=non_finite)
    if non_finite == "skip":
        trainer.fit()
        assert trainer.progress.skipped == 1
        assert all(p.isfinite().all() for p in trainer.model.parameters())
    else:
        with pytest.raises(TrainingError, match=r"Epoch 1, batch 2 of 2 \(.*the first of 'e\d+'"):
            trainer.fit()
        assert trainer.progress.step == 1


def test_memory_that_runs_out_halves_the_step_and_lets_go_of_the_first_try(fitted, monkeypatch):
    trainers = [fitted(True), fitted(True)]
    plain = trainers[1].gradients_of
    tried = []

    def short(batch, before=None):
        if not tried:
            kept = torch.zeros(3)
            tried.append(weakref.ref(kept))
            raise MemoryError
        assert tried[0]() is None
        return plain(batch, before)

    monkeypatch.setattr(trainers[1], "gradients_of", short)
    for trainer in trainers:
        trainer.train_epoch()
    assert trainers[1].parts.count == 2
    states = (trainer.model.state_dict().values() for trainer in trainers)
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


class NoWordToTheHost(TorchDispatchMode):
    """Raises where the host would have to wait for a GPU, or a shape depends on what it knows."""

    ASKS = (
        "_local_scalar_dense",
        "nonzero",
        "_unique",
        "unique",
        "masked_select",
        "bincount",
        "equal",
    )
    #: What is no operation on the CPU, and nothing that the interpreter itself does.
    WORDS = ("tolist",)

    def __init__(self, monkeypatch):
        super().__init__()
        self.listening = False
        for name in self.WORDS:
            monkeypatch.setattr(torch.Tensor, name, self.asked(getattr(torch.Tensor, name)))

    def listens(self, function):
        def call(*args):
            self.listening = True
            try:
                return function(*args)
            finally:
                self.listening = False

        return call

    def asked(self, method):
        def ask(tensor, *args, **kwargs):
            assert not self.listening, method
            return method(tensor, *args, **kwargs)

        return ask

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.listening:
            assert not name.startswith(self.ASKS), name
            assert not (name == "repeat_interleave" and func.overloadname == "Tensor")
            if name in ("index", "index_put_", "index_put"):
                assert all(one is None or one.dtype != torch.bool for one in args[1]), name
        return func(*args, **(kwargs or {}))
