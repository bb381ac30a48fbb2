"""The moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from imvia_graph.model import IMVIA


class Average:
    r"""The exponential moving average of a model's state, running statistics included.

    .. math:: \bar\theta_s = d_s \bar\theta_{s-1} + (1 - d_s) \theta_s, \quad
        d_s = \min\left(d, \frac{1 + s}{10 + s}\right)

    The decay starts lower, so that the initial weights are soon forgotten.

    Parameters
    ----------
    model : IMVIA
    decay : float
        The decay d.
    """

    def __init__(self, model: IMVIA, decay: float) -> None:
        self.model, self.decay = model, decay
        self.state = {name: value.clone() for name, value in self._followed().items()}

    def _followed(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {name: value for name, value in state.items() if value.is_floating_point()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after step number ``step``, counted from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        now = self._followed()
        torch._foreach_lerp_(list(self.state.values()), [now[name] for name in self.state], weight)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the average and the model's weights; a second call swaps them back."""
        for name, value in self._followed().items():
            kept = value.clone()
            value.copy_(self.state[name])
            self.state[name].copy_(kept)
