"""Kernels of products and losses for a GPU: there, or in Triton's interpreter (test_fused_triton)."""

import pytest
import torch
from test_fused_triton import (  # noqa: F401
    INTERPRETED,
    ON_GPU,
    device,
    in_the_interpreter,
    needs_triton,
)
from test_losses import POSITIVES, WEIGHTED, factored_case, plainly

from imvia_graph import _factored
from imvia_graph._gpu import grouped
from imvia_graph.losses import Positives, factored_completion


@needs_triton
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the kernels run in this process")
def test_the_claims_below_hold_in_the_interpreter():
    in_the_interpreter(__file__)


# -- products of groups ---------------------------------------------------------------------------

#: How many rows each group has.
COUNTS = [3, 0, 40, 1, 0, 16, 0]
#: What the interpreter, which is made of NumPy, has no arithmetic for.
HALF = [torch.float16] if not ON_GPU else [torch.float16, torch.bfloat16]


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


@pytest.mark.parametrize("number", [None, 9], ids=["as-they-are", "filled-up"])
@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("decided", ["trained", "detached", "not"])
@pytest.mark.parametrize("size", [5, 333])
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
