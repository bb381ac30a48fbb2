"""The equations of the paper (section II) as loops over numbers, in float64.

Nothing here is a vector operation: a vector is a list of numbers, a matrix a list of rows. A number
is a Python float or, where a gradient is wanted, a 0-dim float64 tensor; the same loop serves both.
"""

import math

import torch


def numbers(tensor):
    """A tensor as nested lists of numbers; they carry a gradient where the tensor does."""
    if not tensor.requires_grad:
        return tensor.double().tolist()
    return [numbers(part) for part in tensor.unbind()] if tensor.dim() else tensor


def tensor(nested):
    """Nested lists of numbers as a float64 tensor."""
    if isinstance(nested, list):
        return torch.stack([tensor(part) for part in nested])
    return torch.as_tensor(nested, dtype=torch.float64)


def assert_agree(found, expected, inputs=(), rtol=1e-9, atol=1e-11):
    """Two ways to the same values, and to the same gradients of all inputs."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, check_dtype=False)
    if not inputs:
        return
    direction = torch.randn(expected.shape, dtype=torch.float64)
    # A constant, so that a loop in which nothing has a gradient has one all the same.
    constant = sum((part * 0.0).sum() for part in inputs)
    gradients = [
        torch.autograd.grad(
            (out * direction).sum() + constant, inputs, retain_graph=True, allow_unused=True
        )
        for out in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, check_dtype=False)


# -- numbers and vectors --------------------------------------------------------------------------


def exp(x):
    return x.exp() if isinstance(x, torch.Tensor) else math.exp(x)


def log(x):
    return x.log() if isinstance(x, torch.Tensor) else math.log(x)


def sqrt(x):
    return x.sqrt() if isinstance(x, torch.Tensor) else math.sqrt(x)


def tanh(x):
    return x.tanh() if isinstance(x, torch.Tensor) else math.tanh(x)


def relu(x):
    return x if x > 0 else 0.0 * x


def sigmoid(x):
    return 1 / (1 + exp(-x))


def dot(a, b):
    total = 0.0
    for p, q in zip(a, b, strict=True):
        total = total + p * q
    return total


def cosine(a, b):
    """The cosine, 0 where either vector is 0."""
    size_a, size_b = dot(a, a), dot(b, b)
    if size_a == 0 or size_b == 0:
        return 0.0
    return dot(a, b) / (sqrt(size_a) * sqrt(size_b))


def softmax(values):
    total = 0.0
    for value in values:
        total = total + exp(value)
    return [exp(value) / total for value in values]


def linear(weight, bias, x):
    """W x + b."""
    return [dot(row, x) + b for row, b in zip(weight, bias, strict=True)]


def weighted_sum(weights, vectors):
    total = [0.0] * len(vectors[0])
    for weight, vector in zip(weights, vectors, strict=True):
        total = [t + weight * x for t, x in zip(total, vector, strict=True)]
    return total


# -- A. multi-view fusion -------------------------------------------------------------------------


def gate(weight, bias, entity, relation, activation=sigmoid):
    """Eq. 1: the activation of W_g [e_h; e_r] + b_g; ``weight`` is the one whole matrix."""
    return [activation(x) for x in linear(weight, bias, entity + relation)]


def view_weights(gate, views):
    """Eq. 2: alpha of each view of an entity."""
    similarities = []
    for view in views:
        gated = [g * f for g, f in zip(gate, view, strict=True)]
        similarities.append(cosine(gated, view))
    return softmax(similarities)


def aggregate(gate, views):
    """Eq. 2 and 3: the entity's representation; None without views."""
    return weighted_sum(view_weights(gate, views), views) if views else None


# -- B. disentanglement and alignment -------------------------------------------------------------


def perceptron(layers, x):
    """Linear, ReLU, linear; ``layers`` are two pairs (weight, bias)."""
    hidden = [relu(value) for value in linear(*layers[0], x)]
    return linear(*layers[1], hidden)


def club(x, y, permutation, mean, log_variance):
    """CLUB's sampled bound: mean of log q(y_i|x_i) - log q(y_pi(i)|x_i).

    Of a diagonal Gaussian q, written out with its normalisation.
    """

    def log_density(y_row, x_row):
        total = 0.0
        for value, mu, log_var in zip(y_row, mean(x_row), log_variance(x_row), strict=True):
            variance = exp(log_var)
            total = total - (value - mu) ** 2 / (2 * variance) - log(2 * math.pi * variance) / 2
        return total

    total = 0.0
    for i, x_row in enumerate(x):
        total = total + log_density(y[i], x_row) - log_density(y[permutation[i]], x_row)
    return total / len(x)


def _competitors(i, entity, size):
    """Rows that a row is compared with: itself and all that are not about the same entity."""
    return [j for j in range(size) if j == i or entity is None or entity[j] != entity[i]]


def _unit(vector):
    size = sqrt(dot(vector, vector))
    return [value / size for value in vector]


def _distribution(row, others, rows, temperature):
    """Softmax over ``rows`` of a row's products with ``others``, as a dict."""
    values = softmax([dot(row, others[j]) / temperature for j in rows])
    return dict(zip(rows, values, strict=True))


def printed_alignment(x, y, temperature, entity=None):
    """Eq. 5, one pair of modalities: C(P, Q) + C(Q, P), mean over the batch."""
    total = 0.0
    for i in range(len(x)):
        rows = _competitors(i, entity, len(x))
        p = _distribution(x[i], y, rows, temperature)
        q = _distribution(y[i], x, rows, temperature)
        for j in rows:
            total = total - p[j] * log(q[j]) - q[j] * log(p[j])
    return total / len(x)


def contrastive_alignment(x, y, temperature, entity=None):
    """Eq. 5 with the matching entity as target, unit rows: -log P_ii - log Q_ii, mean over i."""
    x, y = [_unit(row) for row in x], [_unit(row) for row in y]
    total = 0.0
    for i in range(len(x)):
        rows = _competitors(i, entity, len(x))
        total = total - log(_distribution(x[i], y, rows, temperature)[i])
        total = total - log(_distribution(y[i], x, rows, temperature)[i])
    return total / len(x)


# -- C. joint decision ----------------------------------------------------------------------------


def joint(attention, parts):
    """The joint representation: attention over the projected modalities of one entity."""
    weights = softmax([dot(w, part) for w, part in zip(attention, parts, strict=True)])
    return weighted_sum(weights, parts)


def tucker(core, head, relation, tail):
    """Eq. 6: sum over r, h, t of core[r][h][t] * relation[r] * head[h] * tail[t]."""
    total = 0.0
    for r, relation_value in enumerate(relation):
        for h, head_value in enumerate(head):
            for t, tail_value in enumerate(tail):
                total = total + core[r][h][t] * relation_value * head_value * tail_value
    return total


def complex_score(head, relation, tail):
    """Re(<h, c, conj(t)>); halves are real and imaginary parts, an odd last number is real."""
    half = len(head) // 2
    total = 0.0
    for k in range(half):
        left = (head[k], head[half + k])
        times = (relation[k], relation[half + k])
        real = left[0] * times[0] - left[1] * times[1]
        imaginary = left[0] * times[1] + left[1] * times[0]
        total = total + real * tail[k] + imaginary * tail[half + k]
    if len(head) % 2:
        total = total + head[-1] * relation[-1] * tail[-1]
    return total


def decision(weight, bias, relation, scores):
    """The relation-aware decision over the heads' scores of one triple."""
    return dot(softmax(linear(weight, bias, relation)), scores)


def binary_completion(scores, positives, smoothing=0.0):
    """Eq. 7 of one head; with smoothing, targets are (1 - eps) y + eps / N."""
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for i, row in enumerate(scores):
        for j, score in enumerate(row):
            positive = (i, j) in positives
            target = (1 - smoothing) * positive + smoothing / len(row)
            loss = -target * log(sigmoid(score)) - (1 - target) * log(sigmoid(-score))
            sums[positive] = sums[positive] + loss
            counts[positive] += 1
    return sums[True] / counts[True] + sums[False] / max(counts[False], 1)


def softmax_completion(scores, positives, smoothing=0.0):
    """Cross-entropy of each row's softmax with equal shares for its positives; mean over rows."""
    total = 0.0
    for i, row in enumerate(scores):
        mine = [j for j in range(len(row)) if (i, j) in positives]
        for j, probability in enumerate(softmax(row)):
            share = 1 / len(mine) if j in mine else 0.0
            target = (1 - smoothing) * share + smoothing / len(row)
            total = total - target * log(probability)
    return total / len(scores)


def sampled_completion(scores, answers, weights, loss, smoothing=0.0):
    """A completion over entities of which a candidate j of query i stands for ``weights[i][j]``."""
    whole = sum(sum(row) for row in weights)
    size = whole / len(scores)
    total = 0.0
    for row, answer, weight in zip(scores, answers, weights, strict=True):
        normaliser = log(dot(weight, [exp(score) for score in row]))
        for j, score in enumerate(row):
            if loss == "softmax":
                target = (1 - smoothing) * (j == answer) + smoothing * weight[j] / sum(weight)
                total = total + target * (normaliser - score) / len(scores)
                continue
            target = (1 - smoothing) * (j == answer) + smoothing / size
            term = -target * log(sigmoid(score)) - (1 - target) * log(sigmoid(-score))
            number = len(scores) if j == answer else whole - len(scores)
            total = total + weight[j] * term / number
    return total


# -- ranking --------------------------------------------------------------------------------------


def rank(scores, answer, known=()):
    """Filtered realistic rank: the mean of the best and the worst place among ties."""
    better = tied = 0
    for candidate, score in enumerate(scores):
        if candidate == answer or candidate in known:
            continue
        # A NaN wins against every answer, and a NaN answer loses against everyone.
        better += score > scores[answer] or math.isnan(score) or math.isnan(scores[answer])
        tied += score == scores[answer]
    best, worst = 1 + better, 1 + better + tied
    return (best + worst) / 2
