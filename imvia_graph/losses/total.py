"""Eq. 8: the weighted sum of L1, L2 and L3."""

from __future__ import annotations

from torch import Tensor


def total_loss(
    information: Tensor,
    alignment: Tensor,
    completion: Tensor,
    lambda_information: float = 1.0,
    lambda_alignment: float = 1.0,
    lambda_completion: float = 1.0,
) -> Tensor:
    r"""Compute Eq. 8: :math:`\lambda_0 L_1 + \lambda_1 L_2 + \lambda_2 L_3`.

    Parameters
    ----------
    information, alignment, completion : Tensor
        L1, L2 and L3, scalars.
    lambda_information, lambda_alignment, lambda_completion : float, optional
        Their weights. Default: ``1``, as in the paper; the defaults of `Settings` differ.

    Returns
    -------
    Tensor
        A scalar.
    """
    return (
        lambda_information * information
        + lambda_alignment * alignment
        + lambda_completion * completion
    )
