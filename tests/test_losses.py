"""Eq. 4, 5, 7 and 8 against the loops."""

import math
from itertools import permutations

import pytest
import reference as loops
import torch
from conftest import randomised
from reference import assert_agree, numbers, tensor
from torch._subclasses import FakeTensorMode

import imvia_graph as ig
from imvia_graph import IMVIAError, SettingsError, _factored, losses
from imvia_graph.losses import (
    Alignment,
    MutualInformation,
    Positives,
    binary_completion,
    completion,
    contrastive_alignment,
    dura,
    factored_completion,
    n3,
    printed_alignment,
    relation_prediction,
    softmax_completion,
    total_loss,
)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def rows_with(present, m, n, size):
    """Rows that have both modalities; one that ``present`` does not list, all rows have."""
    everywhere = [True] * size
    masks = [present[name].tolist() if name in present else everywhere for name in (m, n)]
    return [i for i in range(size) if masks[0][i] and masks[1][i]]


# -- L1 (Eq. 4) -----------------------------------------------------------------------------------


def estimator_networks(estimator):
    """The mean and the log-variance of q(y|x) by the loops."""
    mean, log_variance = (
        [(numbers(net[k].weight), numbers(net[k].bias)) for k in (0, 2)]
        for net in (estimator.mean, estimator.log_variance)
    )
    return (
        lambda x: loops.perceptron(mean, x),
        lambda x: [loops.tanh(value) for value in loops.perceptron(log_variance, x)],
    )


@pytest.mark.parametrize("masked", [False, True])
def test_mutual_information_is_the_sampled_club_bound(masked):
    names = ["structure", "image", "text"]
    information = randomised(MutualInformation(names, feats=2, hidden_feats=3)).double()
    embeddings = {name: double(6, 2) for name in names}
    present = {}
    if masked:  # of the structure nothing is said: every entity has one
        present = {
            "image": torch.tensor([True, True, False, True, True, False]),
            "text": torch.tensor([True, False, True, True, True, False]),
        }
    torch.manual_seed(7)
    found, _ = information.both(embeddings, present or None)
    torch.manual_seed(7)
    alone = information(embeddings, present or None)

    torch.manual_seed(7)
    drawn = torch.rand(6, 6)  # a number a pair and row, by which its rows are sorted
    expected = 0.0
    pairs = permutations(names, 2)
    for estimator, (m, n), numbers_drawn in zip(information.estimators, pairs, drawn, strict=True):
        rows = rows_with(present, m, n, 6)
        x, y = ([numbers(embeddings[name])[i] for i in rows] for name in (m, n))
        shuffle = torch.argsort(numbers_drawn[rows]).tolist()
        expected = expected + loops.club(x, y, shuffle, *estimator_networks(estimator))
    inputs = list(embeddings.values())
    assert_agree(found, tensor(expected), [*inputs, *information.parameters()])
    # Asked for alone it is as large, and the estimators do not learn to make it smaller.
    assert_agree(alone, tensor(expected), inputs)
    information.zero_grad()
    information(embeddings, present or None).backward()
    assert all(parameter.grad is None for parameter in information.parameters())


def test_estimation_loss_is_the_negative_log_likelihood():
    information = randomised(MutualInformation(["a", "b"], feats=2, hidden_feats=3)).double()
    embeddings = {"a": double(5, 2), "b": double(5, 2)}
    found = information.estimation_loss(embeddings)
    expected = 0.0
    for estimator, (m, n) in zip(information.estimators, [("a", "b"), ("b", "a")], strict=True):
        mean, log_variance = estimator_networks(estimator)
        for x, y in zip(*(numbers(embeddings[name].detach()) for name in (m, n)), strict=True):
            for value, mu, log_var in zip(y, mean(x), log_variance(x), strict=True):
                expected = expected + ((value - mu) ** 2 / loops.exp(log_var) + log_var) / 2 / 5
    assert_agree(found, tensor(expected), list(information.parameters()))


def test_learning_the_estimators_does_not_reach_the_embeddings():
    information = MutualInformation(["a", "b"], feats=2)
    embeddings = {"a": double(5, 2).float(), "b": double(5, 2).float()}
    for part in embeddings.values():
        part.retain_grad()
    information.estimation_loss(embeddings).backward()
    assert all(part.grad is None for part in embeddings.values())
    assert all(p.grad is not None for p in information.parameters())


def test_bound_tells_correlated_from_independent_gaussians():
    def bound(correlation):
        torch.manual_seed(1)
        information = MutualInformation(["a", "b"], feats=2, hidden_feats=16)
        optimizer = torch.optim.Adam(information.parameters(), lr=0.02)

        def sample():
            x, noise = torch.randn(2, 256, 2)
            return {"a": x, "b": correlation * x + math.sqrt(1 - correlation**2) * noise}

        for _ in range(150):
            optimizer.zero_grad()
            information.estimation_loss(sample()).backward()
            optimizer.step()
        with torch.no_grad():
            return sum(information(sample()).item() for _ in range(20)) / 20 / 2  # a direction

    independent, correlated = bound(0.0), bound(0.9)
    assert independent == pytest.approx(0, abs=0.15)
    assert correlated > -math.log(1 - 0.9**2)  # the true information of two such coordinates


@pytest.mark.parametrize("rows", [0, 1])
def test_mutual_information_of_hardly_any_row_is_zero(rows):
    information = MutualInformation(["a", "b"], feats=2)
    embeddings = {"a": torch.randn(3, 2), "b": torch.randn(3, 2, requires_grad=True)}
    present = {"a": torch.arange(3) < rows, "b": torch.ones(3, dtype=torch.bool)}
    assert information(embeddings, present).item() == 0
    loss = information.estimation_loss(embeddings, present)
    assert loss.isfinite()
    assert rows or loss == 0


# -- L2 (Eq. 5) -----------------------------------------------------------------------------------

FORMS = {
    "contrastive": (contrastive_alignment, loops.contrastive_alignment),
    "printed": (printed_alignment, loops.printed_alignment),
}
ENTITIES = {"all-differ": None, "twins": [4, 1, 4, 4, 0, 1], "one-entity": [2] * 6}


@pytest.mark.parametrize("entity", ENTITIES.values(), ids=ENTITIES)
@pytest.mark.parametrize("form", FORMS)
def test_alignment_of_a_pair_matches_the_loop(form, entity):
    function, loop = FORMS[form]
    x, y = double(6, 3), double(6, 3)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    found = function(x, y, temperature, None if entity is None else torch.tensor(entity))
    expected = loop(numbers(x), numbers(y), temperature, entity)
    assert_agree(found, tensor(expected), [x, y, temperature])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_alignment_sums_ordered_pairs_over_the_number_of_modalities(form, masked):
    loop = FORMS[form][1]
    alignment = Alignment(form, temperature=0.5).double()
    embeddings = {name: double(5, 3) for name in ("structure", "image", "text", "audio")}
    entity = torch.tensor([3, 1, 3, 0, 1])
    present = {}
    if masked:
        present = {
            "image": torch.tensor([True, True, True, False, True]),
            "text": torch.tensor([False, True, True, True, True]),
            "audio": torch.zeros(5, dtype=torch.bool),  # nothing to align with
        }
    found = alignment(embeddings, entity, present or None)
    expected, temperature = 0.0, loops.exp(-alignment.log_scale)
    for m, n in permutations(embeddings, 2):
        rows = rows_with(present, m, n, 5)
        if not rows:
            continue
        x, y = ([numbers(embeddings[name])[i] for i in rows] for name in (m, n))
        expected = expected + loop(x, y, temperature, [entity[i].item() for i in rows])
    inputs = [*embeddings.values(), alignment.log_scale]
    assert_agree(found, tensor(expected / 4), inputs)
    assert alignment.temperature.item() == pytest.approx(0.5)


@pytest.mark.parametrize("form", FORMS)
def test_alignment_without_common_rows_is_zero(form):
    embeddings = {"a": double(3, 2), "b": double(3, 2)}
    present = {"a": torch.tensor([True, False, False]), "b": torch.tensor([False, True, True])}
    assert Alignment(form)(embeddings, present=present).item() == 0
    assert Alignment(form)({"a": embeddings["a"]}).item() == 0


def rows_of_three(dtype=torch.float64):
    """Embeddings of three modalities, entities of which some are twins, and what has which.

    No row has both an image and a text; of the structure nothing is said.
    """
    embeddings = {
        name: torch.randn(7, 3, dtype=dtype, requires_grad=True)
        for name in ("structure", "image", "text")
    }
    image = torch.tensor([True, True, False, True, True, False, True])
    return embeddings, torch.tensor([3, 1, 3, 0, 1, 1, 3]), {"image": image, "text": ~image}


def one_by_one(alignment, embeddings, entity=None, present=None):
    """The contrastive form by `contrastive_alignment` of each pair."""
    total = 0.0
    for m, n in permutations(embeddings, 2):
        rows = None
        if present is not None:
            rows = torch.zeros(len(embeddings[m]), dtype=torch.bool)
            rows[rows_with(present, m, n, len(rows))] = True
        x, y = embeddings[m], embeddings[n]
        total = total + contrastive_alignment(x, y, alignment.temperature, entity, rows)
    return total / len(embeddings)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("twins", [False, True])
@pytest.mark.parametrize("number", [2, 3])
def test_alignment_of_all_pairs_at_once_is_that_of_each(number, twins, masked):
    embeddings, entity, present = rows_of_three()
    embeddings = dict(list(embeddings.items())[:number])
    given = (entity if twins else None, present if masked else None)
    alignment = Alignment().double()
    inputs = [*embeddings.values(), alignment.log_scale]
    assert_agree(alignment(embeddings, *given), one_by_one(alignment, embeddings, *given), inputs)


def test_alignment_of_rows_of_hardly_any_length_has_the_gradient_of_normalize():
    embeddings, *given = rows_of_three()
    alignment = Alignment().double()
    with torch.no_grad():
        embeddings["image"][:3] *= torch.tensor([[0.0], [1e-13], [1e-11]])
    found, expected = alignment(embeddings, *given), one_by_one(alignment, embeddings, *given)
    assert_agree(found, expected, [*embeddings.values(), alignment.log_scale])


@pytest.mark.parametrize("autocast", [False, True])
def test_rows_without_a_partner_have_a_gradient_of_zeros(autocast):
    embeddings, entity, present = rows_of_three(torch.float32)
    with torch.no_grad():
        embeddings["image"][2] = 0.0  # whose gradient would be as large as numbers come
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        Alignment()(embeddings, entity, present).backward()
        pair = {name: embeddings[name].detach().requires_grad_() for name in ("image", "text")}
        Alignment()(pair, entity, present).backward()
    for name, rows in present.items():
        assert embeddings[name].grad[~rows].eq(0).all()
        assert embeddings[name].grad[rows].ne(0).any(dim=1).all()
        assert pair[name].grad.eq(0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_alignment_does_not_hide_what_is_not_finite(form, value):
    embeddings, *given = rows_of_three(torch.float32)
    with torch.no_grad():
        embeddings["image"][0, 1] = value
    alignment = Alignment(form)
    loss = alignment(embeddings, *given)
    assert not loss.isfinite()
    loss.backward()
    assert not alignment.log_scale.grad.isfinite()
    assert not embeddings["structure"].grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_alignment_under_autocast_is_close(dtype):
    embeddings = {name: torch.randn(64, 16, requires_grad=True) for name in ("a", "b", "c")}
    entity, present = torch.arange(64) // 2, {"b": torch.arange(64) % 3 > 0}
    alignment = Alignment()
    inputs = [*embeddings.values(), alignment.log_scale]
    with torch.autocast("cpu", dtype):
        found = alignment(embeddings, entity, present)
    expected = one_by_one(alignment, embeddings, entity, present)
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    gradients = (torch.autograd.grad(loss, inputs) for loss in (found, expected))
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


def test_alignment_of_float64_is_in_float64_under_autocast():
    embeddings, *given = rows_of_three()
    alignment = Alignment().double()
    with torch.autocast("cpu", torch.bfloat16):
        found = alignment(embeddings, *given)
    torch.testing.assert_close(found, alignment(embeddings, *given), rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_alignment_does_not_wait_for_what_is_in_its_tensors(form):
    """A step with it is recorded as a CUDA graph."""
    with FakeTensorMode():  # tensors without numbers, of which nothing can be asked
        embeddings = {name: torch.empty(7, 3, requires_grad=True) for name in ("a", "b", "c")}
        present = {"b": torch.empty(7, dtype=torch.bool)}
        loss = Alignment(form)(embeddings, torch.empty(7, dtype=torch.int64), present)
        loss.backward()
        assert all(part.grad.shape == (7, 3) for part in embeddings.values())
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            loss.item()


def test_contrastive_alignment_is_least_where_the_same_rows_match():
    x = torch.eye(5)
    aligned = contrastive_alignment(x, x, 0.1)
    permuted = contrastive_alignment(x, x.roll(1, dims=0), 0.1)
    assert aligned < 0.01 < permuted


def test_any_agreed_permutation_minimises_the_printed_form():
    x = 10 * torch.eye(4)
    swapped = x[[1, 0, 3, 2]]  # a symmetric permutation: both directions agree on it
    torch.testing.assert_close(printed_alignment(x, swapped, 1.0), printed_alignment(x, x, 1.0))


def test_contrastive_alignment_does_not_depend_on_lengths():
    x, y = torch.randn(2, 5, 3)
    scaled = contrastive_alignment(x * 7, y / 3, 0.2)
    torch.testing.assert_close(scaled, contrastive_alignment(x, y, 0.2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.01, 5.0])
def test_alignment_is_finite_at_any_temperature_and_with_zero_rows(form, temperature):
    x, y = torch.randn(2, 6, 3)
    x[2] = 0.0
    x, y = x.requires_grad_(), (y * 20).requires_grad_()
    loss = Alignment(form, temperature)({"a": x, "b": y}, torch.tensor([0, 0, 1, 2, 2, 3]))
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.011, 1.0])
def test_temperature_learns_from_wherever_it_starts(temperature):
    """A temperature below the smallest one must find its way up, too."""
    alignment = Alignment(temperature=temperature)
    x = torch.randn(6, 3)
    loss = alignment({"a": x, "b": x.roll(1, dims=0)})  # misaligned: a higher one is better
    loss.backward()
    assert alignment.log_scale.grad > 0


# -- L3 (Eq. 7) -----------------------------------------------------------------------------------

# Several positives in a row, in no order.
POSITIVES = Positives(row=torch.tensor([2, 0, 1, 2, 0]), col=torch.tensor([4, 1, 0, 0, 3]))
PAIRS = set(zip(POSITIVES.row.tolist(), POSITIVES.col.tolist(), strict=True))
WEIGHTED = POSITIVES._replace(weight=torch.tensor([2.0, 0.5, 2.0]))
COMPLETION = {
    "binary": (binary_completion, loops.binary_completion),
    "softmax": (softmax_completion, loops.softmax_completion),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("loss", COMPLETION)
def test_completion_matches_the_loop(loss, smoothing):
    function, loop = COMPLETION[loss]
    scores = (3 * torch.randn(3, 5)).requires_grad_()
    found = function(scores, POSITIVES, smoothing)
    expected = loop(numbers(scores), PAIRS, smoothing)
    assert_agree(found, tensor(expected), [scores], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", COMPLETION)
def test_completion_of_float64_scores_is_in_float64(loss):
    function, loop = COMPLETION[loss]
    scores = double(3, 5)
    expected = loop(numbers(scores), PAIRS, 0.1)
    assert_agree(function(scores, POSITIVES, 0.1), tensor(expected), [scores])


def test_binary_completion_is_eq_7():
    scores = torch.randn(3, 5)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[POSITIVES.row, POSITIVES.col] = True
    positive, negative = scores[mask], scores[~mask]
    expected = -positive.sigmoid().log().mean() - (-negative).sigmoid().log().mean()
    torch.testing.assert_close(binary_completion(scores, POSITIVES), expected)


def test_binary_completion_where_all_is_positive_is_finite():
    scores = torch.randn(2, 2)
    everything = Positives(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
    expected = torch.nn.functional.softplus(-scores).mean()
    torch.testing.assert_close(binary_completion(scores, everything), expected)


@pytest.mark.parametrize("loss", COMPLETION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_completion_of_large_scores_is_finite(loss, dtype):
    scores = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 5e3]], dtype=dtype, requires_grad=True)
    out = COMPLETION[loss][0](scores, Positives(torch.tensor([0, 1]), torch.tensor([1, 0])), 0.1)
    out.backward()
    assert out.dtype == torch.float32
    assert out.isfinite()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("loss", COMPLETION)
def test_order_of_positives_does_not_matter(loss):
    scores, order = torch.randn(3, 5), torch.tensor([3, 1, 4, 0, 2])
    moved = Positives(POSITIVES.row[order], POSITIVES.col[order])
    function = COMPLETION[loss][0]
    torch.testing.assert_close(function(scores, moved), function(scores, POSITIVES))


@pytest.mark.parametrize("loss", COMPLETION)
def test_completion_is_the_sum_over_heads(loss):
    scores = {"structure": torch.randn(3, 5), "видео": torch.randn(3, 5)}
    found = completion(scores, POSITIVES, loss, 0.1)
    expected = sum(COMPLETION[loss][1](numbers(part), PAIRS, 0.1) for part in scores.values())
    assert found.item() == pytest.approx(expected, rel=1e-5)


# -- L3 without scores ----------------------------------------------------------------------------


def factored_case(heads, dtype, size=5):
    """Queries (3, 4) and candidates (5, 4) a head, and weights."""
    queries = [torch.randn(3, 4, dtype=dtype, requires_grad=True) for _ in range(heads)]
    candidates = [torch.randn(size, 4, dtype=dtype, requires_grad=True) for _ in range(heads)]
    return queries, candidates, torch.rand(3, heads, dtype=dtype, requires_grad=True)


def plainly(queries, candidates, weights, loss, smoothing, detached=False, positives=POSITIVES):
    """The same from `completion`, scores and all."""
    scores = {m: q @ c.T for m, (q, c) in enumerate(zip(queries, candidates, strict=True))}
    if weights is not None:
        parts = [score.detach() if detached else score for score in scores.values()]
        scores["decision"] = sum(
            weights[:, m, None].to(part.dtype) * part for m, part in enumerate(parts)
        )
    return completion(scores, positives, loss, smoothing)


@pytest.fixture(params=["at-once", "in-blocks"])
def blocks(request, monkeypatch):
    """All queries at a time, or one."""
    if request.param == "in-blocks":
        monkeypatch.setattr(_factored, "SCORES_AT_A_TIME", 1)


@pytest.fixture(params=["compiled", "plain"])
def kernel(request, monkeypatch):
    """With the compiled loops, or as where they do not load."""
    if request.param == "plain":
        monkeypatch.setattr(_factored._kernels, "load", lambda name: None)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", COMPLETION)
def test_factored_completion_is_the_completion_of_the_scores(
    blocks, loss, smoothing, heads, detached
):
    queries, candidates, weights = factored_case(heads, torch.float64)
    found = factored_completion(queries, candidates, POSITIVES, weights, loss, smoothing, detached)
    expected = plainly(queries, candidates, weights, loss, smoothing, detached)
    assert_agree(found, expected, [*queries, *candidates, weights])


@pytest.mark.parametrize("loss", COMPLETION)
def test_factored_completion_without_a_decision_matches_the_loop(blocks, loss):
    queries, candidates, _ = factored_case(2, torch.float64)
    found = factored_completion(queries, candidates, POSITIVES, None, loss, 0.1)
    expected = sum(
        COMPLETION[loss][1](numbers(q @ c.T), PAIRS, 0.1)
        for q, c in zip(queries, candidates, strict=True)
    )
    assert_agree(found, tensor(expected), [*queries, *candidates])


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("decided", [False, True])
@pytest.mark.parametrize("size", [5, 333])
@pytest.mark.parametrize("loss", COMPLETION)
def test_factored_completion_in_float32(kernel, blocks, loss, size, decided, detached):
    queries, candidates, weights = factored_case(3, torch.float32, size)
    inputs = [*queries, *candidates, *([weights] if decided else [])]
    given = weights if decided else None
    found = factored_completion(queries, candidates, POSITIVES, given, loss, 0.1, detached)
    in_double = [part.detach().double().requires_grad_() for part in inputs]
    parts = in_double[:3], in_double[3:6], in_double[6] if decided else None
    expected = plainly(*parts, loss, 0.1, detached)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(3 * found, inputs)
    right = torch.autograd.grad(3 * expected, in_double)
    for one, other in zip(gradients, right, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_a_weighted_softmax_completion_is_the_weighted_mean_of_its_rows():
    scores = double(3, 5)
    rows = []
    for i in range(3):
        pairs = {(0, j) for row, j in PAIRS if row == i}
        rows.append(loops.softmax_completion(numbers(scores)[i : i + 1], pairs, 0.1))
    expected = (2 * rows[0] + 0.5 * rows[1] + 2 * rows[2]) / 4.5
    assert_agree(softmax_completion(scores, WEIGHTED, 0.1), tensor(expected), [scores])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_sampled_completion_matches_the_loop(loss, smoothing):
    scores = {"structure": double(3, 5), "text": double(3, 5)}
    probability = torch.tensor([0.5, 0.9, 0.25, 0.1, 0.6])
    left_out = [(0, 2), (2, 1), (2, 3)]  # other known answers of queries 0 and 2
    sampled = losses.Sampled(
        torch.tensor([1, 4, 5, 8, 9]), probability.log(), *torch.tensor(left_out).T
    )
    answers = [3, 0, 4]
    positives = Positives(torch.tensor([1, 0, 2]), torch.tensor([0, 3, 4]))
    weights = [(1 / probability).tolist() for _ in answers]
    for i, answer in enumerate(answers):
        weights[i][answer] = 1.0
    for i, j in left_out:
        weights[i][j] = 0.0
    found = losses.sampled_completion(scores, positives, sampled, loss, smoothing)
    expected = sum(
        loops.sampled_completion(numbers(part), answers, weights, loss, smoothing)
        for part in scores.values()
    )
    assert_agree(found, tensor(expected), list(scores.values()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factored_completion_weighs_the_rows(kernel, blocks, dtype, detached):
    queries, candidates, weights = factored_case(2, dtype)
    inputs = [*queries, *candidates, weights]
    found = factored_completion(queries, candidates, WEIGHTED, weights, "softmax", 0.1, detached)
    expected = plainly(queries, candidates, weights, "softmax", 0.1, detached, WEIGHTED)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad(found, inputs)
    theirs = torch.autograd.grad(expected, inputs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", COMPLETION)
def test_positives_that_are_repeated_count_once(kernel, blocks, loss):
    queries, candidates, weights = factored_case(2, torch.float32)
    inputs = [*queries, *candidates, weights]
    order = torch.argsort(POSITIVES.row, stable=True)
    place = torch.arange(9).clamp(max=len(order) - 1)
    counts = (torch.arange(9) < len(order)).float()
    repeated = Positives(POSITIVES.row[order][place], POSITIVES.col[order][place], None, counts)
    found, expected = (
        factored_completion(queries, candidates, positives, weights, loss, 0.1)
        for positives in (repeated, POSITIVES)
    )
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        *(torch.autograd.grad(x, inputs) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_the_binary_loss_has_no_weights_of_rows():
    with pytest.raises(SettingsError, match=r"'binary' does not support weights.*softmax"):
        completion({"structure": torch.zeros(3, 5)}, WEIGHTED, "binary")
    with pytest.raises(SettingsError, match=r"'binary' does not support weights.*softmax"):
        factored_completion([torch.zeros(3, 4)], [torch.zeros(5, 4)], WEIGHTED, loss="binary")


def test_dura_matches_the_loop():
    head, query, answer = (
        torch.randn(rows, 4, dtype=torch.float64, requires_grad=True) for rows in (3, 3, 5)
    )
    expected = 0.0
    for part in (head, query, answer):
        rows = numbers(part)
        expected = expected + sum(x * x for row in rows for x in row) / len(rows)
    assert_agree(dura(head, query, answer), tensor(expected), [head, query, answer])
    expected = sum(sum(x * x for x in row) for row in numbers(answer)) / 5
    for part in (head, query):
        first, *others = (sum(x * x for x in row) for row in numbers(part))
        expected = expected + (3 * first + sum(others)) / 5
    weighted = dura(head, query, answer, torch.tensor([3, 1, 1]))
    assert_agree(weighted, tensor(expected), [head, query, answer])


def cubes(row):
    """The cubes of the moduli of a row: real parts, imaginary ones, and what is left over."""
    half = len(row) // 2
    pairs = zip(row[:half], row[half : 2 * half], strict=True)
    sizes = [x * x + y * y for x, y in pairs] + [x * x for x in row[2 * half :]]
    return sum(size**1.5 for size in sizes)


@pytest.mark.parametrize("width", [1, 4, 5])
def test_n3_matches_the_loop(width):
    head, relation, answer = double(3, width), double(3, width), double(5, width)
    parts = [head, relation, answer]
    expected = sum(sum(map(cubes, numbers(part))) / len(part) for part in parts)
    assert_agree(n3(*parts), tensor(expected), parts)
    first, *others = (
        cubes(h) + cubes(r) for h, r in zip(numbers(head), numbers(relation), strict=True)
    )
    of_answers = [cubes(row) for row in numbers(answer)]
    times = torch.tensor([2.0, 0.0, 1.0, 0.0, 1.0])
    counted = (2 * of_answers[0] + of_answers[2] + of_answers[4]) / 4
    weighted = n3(*parts, torch.tensor([3, 1, 1]), times=times)
    assert_agree(weighted, tensor((3 * first + sum(others)) / 5 + counted), parts)


def test_n3_of_zeros_has_a_gradient_of_zeros():
    parts = [torch.zeros(2, 4, requires_grad=True) for _ in range(3)]
    n3(*parts).backward()
    assert all(part.grad.eq(0).all() for part in parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dura_is_in_float32_under_autocast(dtype):
    parts = [300 * torch.rand(rows, 4) for rows in (3, 3, 5)]  # squares that float16 cannot hold
    with torch.autocast("cpu", dtype):
        found = dura(*parts)
    torch.testing.assert_close(found, dura(*parts))
    with torch.autocast("cpu", dtype):
        found = n3(*(part.to(dtype) for part in parts))
    torch.testing.assert_close(found, n3(*(part.to(dtype).float() for part in parts)))


def test_relation_prediction_matches_the_loop():
    scores = double(4, 3)
    relation = torch.tensor([2, 0, 0, 1])
    losses = []
    for row, right in zip(numbers(scores), relation.tolist(), strict=True):
        losses.append(loops.log(sum(loops.exp(x) for x in row)) - row[right])
    assert_agree(relation_prediction(scores, relation), tensor(sum(losses) / 4), [scores])
    assert_agree(relation_prediction(scores, relation, 10), tensor(sum(losses) / 10), [scores])
    counts = torch.tensor([1.0, 0.0, 1.0, 0.0])
    of_two = tensor((losses[0] + losses[2]) / 2)
    assert_agree(relation_prediction(scores, relation, counts=counts), of_two, [scores])
    nothing = relation_prediction(scores[:0], relation[:0])
    assert nothing == 0


def test_relation_prediction_is_in_float32_at_least():
    scores = torch.full((2, 3), 1e4, dtype=torch.float16)
    found = relation_prediction(scores, torch.tensor([0, 1]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(3.0).log())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", COMPLETION)
def test_factored_completion_under_autocast_is_close(kernel, loss, dtype):
    queries, candidates, weights = factored_case(2, torch.float32, 999)
    inputs = [*queries, *candidates, weights]
    expected = plainly(queries, candidates, weights, loss, 0.1)
    with torch.autocast("cpu", dtype):
        found = factored_completion(queries, candidates, POSITIVES, weights, loss, 0.1)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    gradients = (torch.autograd.grad(part, inputs) for part in (found, expected))
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_factored_completion_does_not_hide_what_is_not_finite(kernel, value):
    queries, candidates, weights = factored_case(2, torch.float32)
    with torch.no_grad():
        candidates[1][4, 0] = value
    loss = factored_completion(queries, candidates, POSITIVES, weights, "softmax", 0.1)
    assert not loss.isfinite()
    loss.backward()
    assert not queries[1].grad.isfinite().all()


def test_factored_completion_of_large_scores_is_finite(kernel):
    queries = [torch.tensor([[1e4], [-1e4], [1.0]], requires_grad=True)]
    candidates = [torch.tensor([[1.0], [-1.0], [0.0], [0.5], [0.3]], requires_grad=True)]
    loss = factored_completion(queries, candidates, POSITIVES, None, "softmax", 0.1)
    loss.backward()
    assert loss.isfinite()
    assert queries[0].grad.isfinite().all()
    torch.testing.assert_close(loss, plainly(queries, candidates, None, "softmax", 0.1))


def test_factored_completion_names_an_unknown_loss():
    with pytest.raises(ig.SettingsError, match=r"'hinge'.*softmax"):
        factored_completion(*factored_case(1, torch.float32)[:2], POSITIVES, None, "hinge")


# -- Eq. 8 ----------------------------------------------------------------------------------------


def test_total_loss_is_eq_8():
    parts = double(3)
    found = total_loss(*parts, lambda_alignment=0.3, lambda_completion=1.7)
    assert_agree(found, parts[0] + 0.3 * parts[1] + 1.7 * parts[2], [parts])
    with_all = total_loss(*parts, 1e-4, 0.3, 1.7)
    assert_agree(with_all, 1e-4 * parts[0] + 0.3 * parts[1] + 1.7 * parts[2], [parts])


@pytest.mark.parametrize("form", ["contrastive", "printed"])
def test_a_temperature_is_above_zero(form):
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(SettingsError, match="above 0"):
            Alignment(form, temperature)


def test_rows_that_take_no_part_may_hold_anything():
    drawn = torch.Generator().manual_seed(0)
    plain = {name: torch.randn(5, 4, generator=drawn) for name in "ab"}
    present = {"a": torch.tensor([True, True, False, True, True])}
    odd = {name: part.clone() for name, part in plain.items()}
    odd["a"][2] = math.nan
    information = randomised(MutualInformation(["a", "b"], 4, 6))
    for loss in (Alignment(), Alignment("printed"), information, information.estimation_loss):
        results = []
        for parts in (plain, odd):
            torch.manual_seed(1)
            parts = {name: part.clone().requires_grad_() for name, part in parts.items()}
            loss(parts, present=present).backward()
            results.append([part.grad for part in parts.values() if part.grad is not None])
            results[-1].append(loss(parts, present=present).detach())
        assert results[1][-1].isfinite()
        for one, other in zip(results[0][:-1], results[1][:-1], strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("loss", ["softmax", "binary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # compiled loops, and torch's
def test_an_empty_batch_completes_nothing(loss, dtype):
    none = torch.empty(0, dtype=torch.int64)
    query = torch.zeros(0, 3, dtype=dtype, requires_grad=True)
    candidate = torch.ones(4, 3, dtype=dtype, requires_grad=True)
    found = factored_completion([query], [candidate], Positives(none, none), loss=loss)
    found.backward()
    assert found.item() == 0
    assert completion({"a": query @ candidate.T}, Positives(none, none), loss).item() == 0
    assert candidate.grad.eq(0).all()
    assert query.grad.shape == (0, 3)


def factored(**changes):
    """Arguments of `factored_completion` for 3 queries, 5 candidates and 2 heads."""
    good = {
        "queries": [torch.ones(3, 2), torch.ones(3, 4)],
        "candidates": [torch.ones(5, 2), torch.ones(5, 4)],
        "weights": torch.ones(3, 2),
        "row": torch.arange(3),
        "col": torch.tensor([0, 4, 2]),
        "weight": torch.ones(3),
    } | changes
    positives = Positives(good.pop("row"), good.pop("col"), good.pop("weight"))
    return {**good, "positives": positives}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weights": torch.ones(1, 2)}, r"weights \(3, 2\); received \(1, 2\)"),
        ({"weights": torch.ones(3, 1)}, r"weights \(3, 2\); received \(3, 1\)"),
        ({"col": torch.tensor([0, 5, 2])}, "columns of positives from 0 to 4; received 5"),
        ({"col": torch.tensor([0, -1, 2])}, "columns of positives from 0 to 4; received -1"),
        ({"row": torch.tensor([0, 1, 3])}, "rows of positives from 0 to 2; received 3"),
        ({"row": torch.tensor([0, 1])}, "one length"),
        ({"weight": torch.ones(2)}, r"a weight for each of 3 rows; received \(2,\)"),
        ({"queries": [torch.ones(3, 2)]}, "1 and 2 of them"),
        ({"queries": [], "candidates": []}, "0 and 0 of them"),
        ({"queries": [torch.ones(3, 2), torch.ones(2, 4)]}, r"queries \(B, d\)"),
        ({"queries": [torch.ones(3, 2), torch.ones(3, 3)]}, r"queries \(B, d\)"),
        ({"candidates": [torch.ones(5, 2), torch.ones(4, 4)]}, r"queries \(B, d\)"),
        ({"candidates": [torch.ones(5), torch.ones(5, 4)]}, r"queries \(B, d\)"),
    ],
    ids=range(13),
)
def test_factored_completion_refuses_what_does_not_fit(changes, match):
    assert factored_completion(**factored()).isfinite()
    with pytest.raises(ig.IMVIAError, match=match):
        factored_completion(**factored(**changes))


def test_dura_wants_the_three_of_each_head():
    rows = torch.ones(2, 3)
    with pytest.raises(ig.IMVIAError, match="received 1, 2 and 3"):
        dura([rows], [rows] * 2, [rows] * 3)


@pytest.mark.parametrize("form", ["contrastive", "printed"])
@pytest.mark.parametrize("masked", [True, False])
def test_an_empty_batch_has_nothing_to_align(form, masked):
    empty = {name: torch.zeros(0, 4, requires_grad=True) for name in ("a", "b")}
    present = {"a": torch.zeros(0, dtype=torch.bool)} if masked else None
    assert Alignment(form)(empty, present=present).item() == 0


# -- gradients of gradients -----------------------------------------------------------------------


def test_n3_and_the_alignment_have_gradients_of_gradients():
    drawn = torch.Generator().manual_seed(0)
    rows = [torch.randn(3, 5, generator=drawn).double().requires_grad_() for _ in range(3)]
    weight = torch.tensor([1.0, 2.0, 3.0]).double()
    assert torch.autograd.gradgradcheck(lambda *given: n3(*given, weight), rows)
    frozen = [rows[0], rows[1].detach(), rows[2]]
    assert torch.autograd.gradgradcheck(lambda *given: n3(*given, weight), frozen)
    alignment = Alignment().double()
    entity = torch.tensor([0, 1, 1])
    present = {"b": torch.tensor([True, True, False])}

    def aligned(*parts):
        return alignment(dict(zip("abc", parts, strict=True)), entity, present)

    assert torch.autograd.gradgradcheck(aligned, rows)
    assert torch.autograd.gradgradcheck(aligned, frozen)
    (first,) = torch.autograd.grad(aligned(*rows), alignment.log_scale, create_graph=True)
    (second,) = torch.autograd.grad(first, alignment.log_scale)
    step = 1e-4
    with torch.no_grad():
        around = []
        for shift in (-step, 0.0, step):
            alignment.log_scale += shift
            around.append(aligned(*rows))
            alignment.log_scale -= shift
    expected = (around[0] - 2 * around[1] + around[2]) / step**2
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-6)


def test_dura_has_gradients_of_gradients():
    rows = [double(3, 5), double(3, 5), double(2, 5)]
    weight = torch.tensor([1.0, 2.0, 3.0]).double()
    assert torch.autograd.gradgradcheck(lambda *given: dura(*given, weight), rows)
    (first,) = torch.autograd.grad(dura(*rows, weight), rows[0], create_graph=True)
    assert torch.autograd.grad(first.sum(), rows[0])[0].gt(0).all()


@pytest.mark.parametrize("name", ["contrastive", "printed", "n3", "dura"])
def test_create_graph_changes_no_gradient_where_one_input_is_made_of_another(name):
    z = double(4, 5)
    functions = {
        "contrastive": lambda: Alignment().double()({"a": z, "b": z.square(), "c": z + 1}),
        "printed": lambda: Alignment("printed").double()({"a": z, "b": z.square()}),
        "n3": lambda: n3(z, z.square(), z),
        "dura": lambda: dura(z, z.square(), z),
    }
    (expected,) = torch.autograd.grad(functions[name](), z)
    (found,) = torch.autograd.grad(functions[name](), z, create_graph=True)
    torch.testing.assert_close(found, expected)


def test_factored_completion_says_that_its_gradients_have_none():
    given = factored(queries=[torch.ones(3, 2, requires_grad=True), torch.ones(3, 4)])
    loss = factored_completion(**given)
    with pytest.raises(ig.IMVIAError, match=r"first-order.*losses\.completion"):
        torch.autograd.grad(loss, given["queries"][0], create_graph=True)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ({"a": (5, 8)}, r"embeddings of \['a', 'b'\]; received \['a'\]"),
        ({"a": (5, 7), "b": (5, 7)}, r"\(B, 8\).*received.*\(5, 7\)"),
        ({"a": (5, 8), "b": (4, 8)}, r"\(B, 8\).*received.*\(4, 8\)"),
        ({"a": (8,), "b": (8,)}, r"\(B, 8\).*received.*\(8,\)"),
    ],
    ids=str,
)
def test_mutual_information_says_what_it_expects(shapes, match):
    embeddings = {name: torch.rand(shape) for name, shape in shapes.items()}
    with pytest.raises(IMVIAError, match=f"MutualInformation: expected {match}"):
        MutualInformation(["a", "b"], 8)(embeddings)


@pytest.mark.parametrize("modalities", ["ab", ["a", "a"]])
def test_mutual_information_is_between_distinct_modalities(modalities):
    with pytest.raises(IMVIAError, match="list of distinct modalities"):
        MutualInformation(modalities, 8)


@pytest.mark.parametrize("form", ["contrastive", "printed"])
@pytest.mark.parametrize("shape", [(4, 8), (5, 7), (8,)], ids=str)
def test_alignment_says_what_it_expects(form, shape):
    with pytest.raises(IMVIAError, match=r"Alignment: expected \(B, d\) of each modality.*\(5, 8"):
        Alignment(form)({"a": torch.rand(5, 8), "b": torch.rand(shape)})


@pytest.mark.parametrize("loss", ["softmax", "binary"])
@pytest.mark.parametrize(
    ("row", "col", "match"),
    [
        ([0, 1, 2], [0, 1, -1], "columns of positives from 0 to 3; received -1"),
        ([0, 1, 2], [0, 1, 4], "columns of positives from 0 to 3; received 4"),
        ([0, 1, 3], [0, 1, 2], "rows of positives from 0 to 2; received 3"),
        ([0, 1, 2], [0, 1], r"one length.*received \(3, 4\), \(3,\) and \(2,\)"),
    ],
    ids=str,
)
def test_completion_refuses_positives_outside_the_scores(loss, row, col, match):
    positives = Positives(torch.tensor(row), torch.tensor(col))
    with pytest.raises(IMVIAError, match=match):
        completion({"structure": torch.rand(3, 4)}, positives, loss)


def test_completion_wants_a_head_and_a_column_a_candidate():
    none, positives = torch.empty(0, dtype=torch.int64), Positives(torch.arange(3), torch.arange(3))
    sampled = losses.Sampled(torch.arange(4), torch.zeros(4), none, none)
    for call in (
        lambda: completion({}, positives),
        lambda: losses.sampled_completion({}, positives, sampled),
    ):
        with pytest.raises(IMVIAError, match="at least one head; received none"):
            call()
    with pytest.raises(
        IMVIAError, match=r"scores \(3, 4\), one column.*\(3, 5\) for the head 'text'"
    ):
        losses.sampled_completion(
            {"structure": torch.rand(3, 4), "text": torch.rand(3, 5)}, positives, sampled
        )


def test_losses_that_are_modules_show_what_they_are_made_of():
    assert "modalities=['a', 'b'], feats=8" in repr(MutualInformation(["a", "b"], 8))
    assert repr(Alignment("printed")) == "Alignment(form='printed', temperature=0.1)"
