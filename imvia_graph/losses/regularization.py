"""DURA and N3: what keeps the embeddings of true triples small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imvia_graph._gpu import powers
from imvia_graph._gradients import with_gradients
from imvia_graph.distributed import Shards
from imvia_graph.errors import IMVIAError, SettingsError
from imvia_graph.losses._shared import at_least_float32


def dura(
    head: Tensor | Sequence[Tensor],
    query: Tensor | Sequence[Tensor],
    answer: Tensor | Sequence[Tensor],
    weight: Tensor | None = None,
    num_answers: int | None = None,
    shards: Shards | None = None,
    times: Tensor | None = None,
) -> Tensor:
    r"""DURA: the squares of what is multiplied in the scores of true triples.

    .. math:: \frac{1}{B} \sum_i \left( \|h_i\|^2 + \|q_i\|^2 + \|t_i\|^2 \right), \qquad
        q = \mathcal W \times_1 h \times_2 r

    `Zhang, Cai and Wang 2020 <https://arxiv.org/abs/2011.05816>`__, whose other half, the tail
    under the transposed relation, is here the query of the inverse relation. Not in the IMVIA
    paper; a Tucker model learns more with it than with dropout.

    Parameters
    ----------
    head, query : Tensor or sequence of Tensor
        (B, d): entities of the queries, and their query vectors; or those of several heads, which
        are added up.
    answer : Tensor or sequence of Tensor
        (P, d): the true answers; the mean is over those.
    weight : Tensor, optional
        (B,) weights of the queries in their mean. Default: equal ones.
    num_answers : int, optional
        P, where ``answer`` is a process's own.
    shards : Shards, optional
        With several processes: ``head``, ``query`` and ``answer`` are this process's, ``weight``
        that of all queries; the value is that of all.
    times : Tensor, optional
        (P,) how often each row of ``answer`` counts in the mean, of one process. Default: once.

    Returns
    -------
    Tensor
        A scalar, in float32 at least.

    Raises
    ------
    IMVIAError
        Different numbers of heads in the three.
    SettingsError
        Several processes and no ``weight``.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import dura
    >>> dura(torch.ones(2, 3), torch.zeros(2, 3), torch.full((4, 3), 2.0))
    tensor(15.)
    """
    heads, queries, answers = (
        [given] if isinstance(given, Tensor) else list(given) for given in (head, query, answer)
    )
    numbers = [len(heads), len(queries), len(answers)]
    if len(set(numbers)) != 1 or not heads:
        raise IMVIAError(
            "dura: expected head, query and answer of as many heads; received"
            f" {numbers[0]}, {numbers[1]} and {numbers[2]}."
        )
    shares = _shares("dura", heads[0], answers[0], weight, num_answers, shards, times)
    total: Tensor = _Squares.apply(*shares, *heads, *queries, *answers)
    return total if shards is None else shards.total(total)


def n3(
    head: Tensor,
    relation: Tensor,
    answer: Tensor,
    weight: Tensor | None = None,
    num_answers: int | None = None,
    shards: Shards | None = None,
    times: Tensor | None = None,
) -> Tensor:
    r"""N3: the cubes of the moduli of what ComplEx multiplies in the scores of true triples.

    .. math:: \frac{1}{B} \sum_i \left( \|h_i\|_3^3 + \|r_i\|_3^3 + \|t_i\|_3^3 \right)

    `Lacroix, Usunier and Obozinski 2018 <https://arxiv.org/abs/1806.07297>`__. Not in the IMVIA
    paper.

    Parameters
    ----------
    head, relation : Tensor
        (B, d): entities and relations of the queries. Numbers are as those of
        `complex_product <imvia_graph.nn.tucker_decoder.complex_product>`: real parts, then
        imaginary ones, and of an odd d a last one that is real.
    answer, weight, num_answers, shards, times
        As for `dura`.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import n3
    >>> one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> n3(one, two, torch.tensor([[3.0, 4.0]]))  # 1 + 8 + 125
    tensor(134.)
    """
    shares = _shares("n3", head, answer, weight, num_answers, shards, times)
    total: Tensor = _Cubes.apply(*shares, head, relation, answer)
    return total if shards is None else shards.total(total)


def _shares(
    name: str,
    head: Tensor,
    answer: Tensor,
    weight: Tensor | None,
    num_answers: int | None,
    shards: Shards | None,
    times: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(B,) and (P,) shares of the queries and of the answers in the means of `dura` and `n3`."""
    alone = shards is None or shards.alone
    dtype = torch.promote_types(head.dtype, torch.float32)
    if weight is None:
        if not alone:
            raise SettingsError(
                f"{name}: with several processes, expected the weights of all queries."
            )
        weight = head.new_ones(len(head))
    weight = weight.to(dtype)
    share = weight / weight.sum()
    if shards is not None and not alone:
        share = share[shards.part(len(weight))]
    if times is not None:
        return share, times.to(dtype) / times.sum()
    number = len(answer) if num_answers is None else num_answers
    return share, weight.new_full((len(answer),), 1 / max(number, 1))


class _Squares(torch.autograd.Function):
    """Squares of rows, weighted and added up, in two passes over them.

    The rows are M (B, d), M (B, d), whose weights are (B,), and M (P, d) with weights (P,).
    Weights have no gradient.
    """

    @staticmethod
    def plain(weights: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
        """In torch's operations, and with their gradients."""
        total = torch.zeros_like(weights[0].sum())
        for part, weight in zip(parts, weights, strict=True):
            total = total + (at_least_float32(part).square().sum(1) * weight).sum()
        return total

    @staticmethod
    def forward(ctx: Any, share: Tensor, of_answers: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(share, of_answers, *parts)
        weights = _weights(share, of_answers, parts)
        if powers.usable(parts, weights):
            return powers.total(2, parts, weights)
        count = len(parts) // 3
        with torch.autocast(share.device.type, enabled=False):
            sizes = []
            for part in parts:
                exact = at_least_float32(part)
                sizes.append(torch.linalg.vecdot(exact, exact).to(share.dtype))
            of_queries = torch.stack(sizes[: 2 * count]).sum(0) @ share
            return of_queries + torch.stack(sizes[2 * count :]).sum(0) @ of_answers

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        share, of_answers, *parts = ctx.saved_tensors
        weights = _weights(share, of_answers, parts)
        if torch.is_grad_enabled():
            given = grad, parts, ctx.needs_input_grad[2:]
            return None, None, *with_gradients(lambda *x: _Squares.plain(weights, x), *given)
        if powers.usable(parts, weights):
            return None, None, *powers.gradients(2, grad, parts, weights)
        count = len(parts) // 3
        slopes = [(2 * grad * weight)[:, None] for weight in (share, of_answers)]
        return (
            None,
            None,
            *(
                (part * slopes[place >= 2 * count]).to(part.dtype)
                for place, part in enumerate(parts)
            ),
        )


class _Cubes(torch.autograd.Function):
    """Cubes of the moduli of the numbers of rows, weighted and added up.

    The rows are (B, d) and (B, d), whose weights are (B,), and (P, d) with weights (P,). Weights
    have no gradient. That of :math:`|z|^3` is :math:`3 |z| z`, also where the modulus, a root, has
    none.
    """

    @staticmethod
    def plain(weights: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
        """In torch's operations, and with their gradients."""
        total = torch.zeros_like(weights[0].sum())
        for part, weight in zip(parts, weights, strict=True):
            squares = _squared_moduli(at_least_float32(part))
            # The root of zero has no gradient; that of its cube is zero.
            moduli = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
            total = total + ((squares * moduli).sum(1) * weight).sum()
        return total

    @staticmethod
    def forward(ctx: Any, share: Tensor, of_answers: Tensor, *parts: Tensor) -> Tensor:
        weights = _weights(share, of_answers, parts)
        if powers.usable(parts, weights):
            ctx.save_for_backward(share, of_answers, *parts)
            return powers.total(3, parts, weights)
        total = share.new_zeros(())
        every = []
        with torch.autocast(share.device.type, enabled=False):
            for part, weight in zip(parts, weights, strict=True):
                squares, moduli = _moduli(at_least_float32(part))
                total = total + torch.linalg.vecdot(squares, moduli).to(share.dtype) @ weight
                every.append(moduli)
        ctx.save_for_backward(share, of_answers, *parts, *every)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        share, of_answers, *rest = ctx.saved_tensors
        parts, every = rest[:3], rest[3:]
        weights = _weights(share, of_answers, parts)
        if torch.is_grad_enabled():
            given = grad, parts, ctx.needs_input_grad[2:]
            return None, None, *with_gradients(lambda *x: _Cubes.plain(weights, x), *given)
        if not every:
            return None, None, *powers.gradients(3, grad, parts, weights)
        gradients = []
        for part, weight, moduli in zip(parts, weights, every, strict=True):
            slope = moduli * (3 * grad * weight)[:, None]
            half = part.shape[1] // 2
            slopes = slope[:, :half], slope[:, :half], slope[:, half:]
            out = torch.empty_like(part)
            for place, numbers, scale in zip(_split(out), _split(part), slopes, strict=True):
                torch.mul(numbers, scale, out=place)
            gradients.append(out)
        return None, None, *gradients


def _moduli(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(n, d - d // 2) squares of the moduli of (n, d) numbers, and the moduli."""
    squares = _squared_moduli(numbers)
    return squares, squares.sqrt()


def _squared_moduli(numbers: Tensor) -> Tensor:
    real, imaginary, rest = _split(numbers)
    squares = torch.addcmul(real.square(), imaginary, imaginary)
    return torch.cat([squares, rest.square()], dim=1) if rest.shape[1] else squares


def _split(numbers: Tensor) -> tuple[Tensor, ...]:
    """Real parts of (n, d) numbers, imaginary ones, and of an odd d the last, which is real."""
    half = numbers.shape[1] // 2
    return numbers.split([half, half, numbers.shape[1] % 2], dim=1)


def _weights(share: Tensor, of_answers: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """The weights of each part: two thirds are of queries, the rest of answers."""
    count = len(parts) // 3
    return [share] * (2 * count) + [of_answers] * count
