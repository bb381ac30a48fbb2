"""DURA and N3: regularisers of the embeddings of true triples."""

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
    r"""Compute DURA: squared norms of the factors in the scores of true triples.

    .. math:: \frac{1}{B} \sum_i \left( \|h_i\|^2 + \|q_i\|^2 + \|t_i\|^2 \right), \qquad
        q = \mathcal W \times_1 h \times_2 r

    See `Zhang, Cai and Wang 2020 <https://arxiv.org/abs/2011.05816>`__. The other half of their
    regularizer, the tail under the transposed relation, is covered by the query of the inverse
    relation. DURA is not in the IMVIA paper; a Tucker model learns more with it than with dropout.

    Parameters
    ----------
    head, query : Tensor or sequence of Tensor
        (B, d) entity embeddings of the queries and (B, d) query vectors; or sequences of these for
        several heads, which are summed.
    answer : Tensor or sequence of Tensor
        (P, d) embeddings of the true answers, averaged over P.
    weight : Tensor, optional
        (B,) weights of the queries in their mean. Default: equal weights.
    num_answers : int, optional
        P over all processes, if ``answer`` holds only this process's answers.
    shards : Shards, optional
        With several processes: ``head``, ``query`` and ``answer`` are those of this process, and
        ``weight`` covers the queries of all. The value is that of all processes.
    times : Tensor, optional
        (P,) multiplicity of each row of ``answer`` in the mean; for a single process.
        Default: 1 for each row.

    Returns
    -------
    Tensor
        A scalar, in float32 at least.

    Raises
    ------
    IMVIAError
        If ``head``, ``query`` and ``answer`` have different numbers of heads.
    SettingsError
        If there are several processes and no ``weight``.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import dura
    >>> dura(torch.ones(2, 3), torch.zeros(2, 3), torch.full((4, 3), 2.0))
    tensor(15.)
    """
    heads, queries, answers = (
        [part] if isinstance(part, Tensor) else list(part) for part in (head, query, answer)
    )
    numbers = [len(heads), len(queries), len(answers)]
    if len(set(numbers)) != 1 or not heads:
        raise IMVIAError(
            "dura: expected head, query and answer of the same number of heads; received"
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
    r"""Compute N3: cubed moduli of the ComplEx embeddings in the scores of true triples.

    .. math:: \frac{1}{B} \sum_i \left( \|h_i\|_3^3 + \|r_i\|_3^3 + \|t_i\|_3^3 \right)

    See `Lacroix, Usunier and Obozinski 2018 <https://arxiv.org/abs/1806.07297>`__. N3 is not in the
    IMVIA paper.

    Parameters
    ----------
    head, relation : Tensor
        (B, d) entity and relation embeddings of the queries, in the layout of
        `complex_product <imvia_graph.nn.tucker_decoder.complex_product>`: real parts, imaginary
        parts and, if d is odd, one more real number.
    answer, weight, num_answers, shards, times
        As in `dura`.

    Returns
    -------
    Tensor
        A scalar, in float32 at least.

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
    """Return (B,) shares of the queries and (P,) shares of the answers in the means."""
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
    """Weighted sum of squared rows, in two passes over them.

    The parts are M (B, d), M (B, d), with (B,) weights, and M (P, d), with (P,) weights. The
    weights have no gradient.
    """

    @staticmethod
    def plain(weights: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
        """Compute the sum in torch operations, which have second-order gradients."""
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
            args = grad, parts, ctx.needs_input_grad[2:]
            return None, None, *with_gradients(lambda *x: _Squares.plain(weights, x), *args)
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
    """Weighted sum of the cubed moduli of rows of complex numbers.

    The parts are (B, d), (B, d), with (B,) weights, and (P, d), with (P,) weights. The weights have
    no gradient. The gradient of :math:`|z|^3` is :math:`3 |z| z`, also at 0, where the modulus has
    none.
    """

    @staticmethod
    def plain(weights: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
        """Compute the sum in torch operations, which have second-order gradients."""
        total = torch.zeros_like(weights[0].sum())
        for part, weight in zip(parts, weights, strict=True):
            squares = _squared_moduli(at_least_float32(part))
            # The root has no gradient at zero; the gradient of its cube is zero there.
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
        all_moduli = []
        with torch.autocast(share.device.type, enabled=False):
            for part, weight in zip(parts, weights, strict=True):
                squares = _squared_moduli(at_least_float32(part))
                moduli = squares.sqrt()
                total = total + torch.linalg.vecdot(squares, moduli).to(share.dtype) @ weight
                all_moduli.append(moduli)
        ctx.save_for_backward(share, of_answers, *parts, *all_moduli)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        share, of_answers, *rest = ctx.saved_tensors
        parts, all_moduli = rest[:3], rest[3:]
        weights = _weights(share, of_answers, parts)
        if torch.is_grad_enabled():
            args = grad, parts, ctx.needs_input_grad[2:]
            return None, None, *with_gradients(lambda *x: _Cubes.plain(weights, x), *args)
        if not all_moduli:
            return None, None, *powers.gradients(3, grad, parts, weights)
        gradients = []
        for part, weight, moduli in zip(parts, weights, all_moduli, strict=True):
            slope = moduli * (3 * grad * weight)[:, None]
            half = part.shape[1] // 2
            slopes = slope[:, :half], slope[:, :half], slope[:, half:]
            out = torch.empty_like(part)
            for place, numbers, scale in zip(_split(out), _split(part), slopes, strict=True):
                torch.mul(numbers, scale, out=place)
            gradients.append(out)
        return None, None, *gradients


def _squared_moduli(numbers: Tensor) -> Tensor:
    """Return (n, d - d // 2) squared moduli of rows of complex numbers (n, d)."""
    real, imaginary, rest = _split(numbers)
    squares = torch.addcmul(real.square(), imaginary, imaginary)
    return torch.cat([squares, rest.square()], dim=1) if rest.shape[1] else squares


def _split(numbers: Tensor) -> tuple[Tensor, ...]:
    """Split (n, d) numbers into real parts, imaginary parts and, if d is odd, a last real one."""
    half = numbers.shape[1] // 2
    return numbers.split([half, half, numbers.shape[1] % 2], dim=1)


def _weights(share: Tensor, of_answers: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the weights of each part: the first two thirds are queries, the rest answers."""
    count = len(parts) // 3
    return [share] * (2 * count) + [of_answers] * count
