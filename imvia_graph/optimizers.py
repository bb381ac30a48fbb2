"""Optimizers: torch's own, and one for the rows of tables that a step touches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from imvia_graph._gpu import updates
from imvia_graph.errors import SettingsError
from imvia_graph.nn.entity_table import EntityTable
from imvia_graph.settings import Settings

#: Adagrad's epsilon: of tables all of whose rows change, and of rows that are followed one by one.
#: With torch's, 1e-10, an element whose gradient is nothing but what rounding leaves of terms that
#: cancel moves by the learning rate, too, in a direction that the order of a sum decides. On MKG-Y,
#: regime sampled, the losses of two processes then part from those of one by 0.0009 within 50
#: steps; with 1e-6 for all by 2e-5, with these by 5e-7.
ADAGRAD_EPS, ADAGRAD_EPS_OF_ROWS = 1e-6, 1e-5
#: That of tables which start so small that others' would hide their gradients: the head of ComplEx.
ADAGRAD_EPS_OF_SMALL = 1e-10

#: Elements of a parameter from which on an update of Adam on a GPU has a pass of its own: torch's,
#: of several parameters, moved 67 million elements at two thirds of what an H200 copies.
_LARGE = 2**20


def table_optimizer(settings: Settings) -> tuple[str, float]:
    """The optimizer of the tables and its learning rate."""
    if settings.table_optimizer == "same":
        return settings.optimizer, settings.learning_rate
    return settings.table_optimizer, settings.table_learning_rate


def make_optimizer(
    kind: str,
    parameters: Sequence[torch.nn.Parameter],
    lr: float,
    weight_decay: float,
    small: Sequence[Tensor] = (),
) -> torch.optim.Optimizer:
    """An optimizer of torch's, fused where every torch has that.

    For those of the parameters that are ``small``, too, Adagrad has `ADAGRAD_EPS_OF_SMALL`.
    """
    groups: list[dict[str, Any]] = [{"params": list(parameters)}]
    apart = {id(parameter) for parameter in small}
    if kind == "adagrad" and any(id(parameter) in apart for parameter in parameters):
        others = [parameter for parameter in parameters if id(parameter) not in apart]
        mine = [parameter for parameter in parameters if id(parameter) in apart]
        groups = [{"params": others}, {"params": mine, "eps": ADAGRAD_EPS_OF_SMALL}]
    if kind == "adagrad" and any(parameter.is_cuda for parameter in parameters):
        return Adagrad(groups, lr=lr, weight_decay=weight_decay, eps=ADAGRAD_EPS)
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": Adam,
        "adamw": AdamW,
        "adagrad": functools.partial(torch.optim.Adagrad, eps=ADAGRAD_EPS),
    }
    return kinds[kind](groups, lr=lr, weight_decay=weight_decay, fused=True)


class _LargeApart(torch.optim.Optimizer):
    """Has Adam or AdamW do large parameters on a GPU in a pass of their own.

    Attributes
    ----------
    found_inf : Tensor or None
        As `Adagrad`'s.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        bad = self.found_inf
        large = [] if bad is None else self._large()
        for parameter, _, _ in large:
            parameter.grad = None
        try:
            # As it is within the hooks of steps, which are this one's already.
            step = super().step
            inner = getattr(step, "__wrapped__", None)
            step(closure) if inner is None else inner(self, closure)
        finally:
            for parameter, grad, _ in large:
                parameter.grad = grad
        for parameter, grad, group in large:
            if bad is not None:
                self._update(parameter, grad, group, bad)

    def _large(self) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Parameters that are done apart, with their gradients and groups."""
        if getattr(self, "grad_scale", None) is not None:  # torch's own step takes it off
            return []
        return [
            (parameter, parameter.grad, group)
            for group in self.param_groups
            if not (group["amsgrad"] or group["maximize"] or group["differentiable"])
            for parameter in group["params"]
            if parameter.grad is not None
            and parameter.numel() >= _LARGE
            and updates.usable(parameter)
        ]

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], bad: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        rate = group["lr"]
        if not isinstance(rate, Tensor):
            rate = torch.full((), rate, device=parameter.device)
        state["step"] += (bad <= 0).float()
        updates.adam(
            parameter,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            rate,
            bad,
            group["betas"],
            group["eps"],
            group["weight_decay"],
            isinstance(self, torch.optim.AdamW),
        )


class Adam(_LargeApart, torch.optim.Adam):
    """That of torch; large parameters on a GPU are done in a pass of their own."""


class AdamW(_LargeApart, torch.optim.AdamW):
    """That of torch; large parameters on a GPU are done in a pass of their own."""


class Adagrad(torch.optim.Adagrad):
    """That of torch, whose fused form older versions have on the CPU only.

    Attributes
    ----------
    found_inf : Tensor or None
        Where it is above 0, a step changes nothing, and the host need not know: as for the fused
        optimizers of torch.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if self.found_inf is not None and updates.usable(parameter):
            rate = group["lr"]
            if not isinstance(rate, Tensor):
                rate = torch.full((), rate, device=parameter.device)
            state["step"] += 1  # not where it is replayed; without a decay of rates nobody asks
            updates.adagrad(
                parameter,
                grad,
                state["sum"],
                rate,
                self.found_inf,
                group["eps"],
                group["weight_decay"],
            )
            return
        if group["weight_decay"]:
            grad = grad.add(parameter, alpha=group["weight_decay"])
        if self.found_inf is not None:
            grad = torch.where(self.found_inf > 0, 0.0, grad)
        state["step"] += 1
        state["sum"].addcmul_(grad, grad)
        # The rate may be a tensor on the device, which a recorded step finds changed.
        parameter.sub_(grad / state["sum"].sqrt().add_(group["eps"]) * group["lr"])


class RowOptimizer(torch.optim.Optimizer):
    r"""Adam or Adagrad on the rows of tables that a step touches; the others stay as they are.

    Adam counts a row's own steps k, so that a row that comes late is corrected as the first one
    was:

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        p \leftarrow p - \gamma \frac{m / (1 - \beta_1^k)}{\sqrt{v / (1 - \beta_2^k)} + \epsilon}

    With ``rowwise`` v is the mean of the squares of a row, one number, and Adam's m is g: beside a
    row there are two numbers more instead of two rows. For Adagrad v is the sum of the squares, and
    :math:`\epsilon` is `ADAGRAD_EPS_OF_ROWS` or, of those that are ``small``,
    `ADAGRAD_EPS_OF_SMALL`.

    Parameters
    ----------
    tables : sequence of EntityTable
        With ``lazy`` on.
    kind : {"adam", "adamw", "adagrad"}
    lr, weight_decay : float
        The decay, too, is of rows that are touched.
    rowwise : bool
    small : sequence of EntityTable
    """

    def __init__(
        self,
        tables: Sequence[EntityTable],
        kind: str,
        lr: float,
        weight_decay: float = 0.0,
        rowwise: bool = False,
        small: Sequence[EntityTable] = (),
    ) -> None:
        self.tables, self.kind, self.rowwise = list(tables), kind, rowwise
        self.betas, self.eps = (0.9, 0.999), ADAGRAD_EPS_OF_ROWS if kind == "adagrad" else 1e-8
        self._small = {id(table.weight) for table in small} if kind == "adagrad" else set()
        super().__init__(
            [table.weight for table in tables], {"lr": lr, "weight_decay": weight_decay}
        )
        for table in tables:
            weight = table.weight
            width = 1 if rowwise else weight.shape[1]
            state = self.state[weight]
            state["square"] = weight.new_zeros(len(weight), width)
            if kind != "adagrad":
                state["count"] = weight.new_zeros(len(weight), 1)
                if not rowwise:
                    state["mean"] = torch.zeros_like(weight)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the rows that were looked up."""
        self.step_by()

    @torch.no_grad()
    def step_by(self, scale: Tensor | None = None) -> None:
        """`step` with gradients times ``scale``."""
        group = self.param_groups[0]
        for table in self.tables:
            row, grad = table.gradients()
            if len(row):
                self._update(table.weight, row, grad if scale is None else grad * scale, group)

    def _update(self, weight: Tensor, row: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        lr, decay = group["lr"], group["weight_decay"]
        state = self.state[weight]
        eps = ADAGRAD_EPS_OF_SMALL if id(weight) in self._small else self.eps
        value = weight[row]
        if decay and self.kind == "adamw":
            value = value * (1 - lr * decay)
        elif decay:
            grad = grad + decay * value
        square = grad.square()
        if self.rowwise:
            square = square.mean(1, keepdim=True)
        if self.kind == "adagrad":
            square += state["square"][row]
            state["square"][row] = square
            weight[row] = value - lr * grad / (square.sqrt() + eps)
            return
        first, second = self.betas
        count = state["count"][row] + 1
        state["count"][row] = count
        square = torch.lerp(state["square"][row], square, 1 - second)
        state["square"][row] = square
        if not self.rowwise:
            mean = torch.lerp(state["mean"][row], grad, 1 - first)
            state["mean"][row] = mean
            grad = mean / (1 - first**count)
        weight[row] = value - lr * grad / ((square / (1 - second**count)).sqrt() + eps)


def to_record(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Have an optimizer's step in a form that a CUDA graph can hold."""
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.full((), group["lr"], device=device)
        if "capturable" in group:
            group["capturable"] = True
    # Steps before the one that is recorded are not, and torch would warn of that.
    optimizer._warned_capturable_if_run_uncaptured = True


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def plain_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups of parameters of its state, as they are where nothing is recorded."""
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    for group in groups:
        group["lr"] = float(group["lr"])
        if "capturable" in group:
            group["capturable"] = False
    return groups


def follows_rows(settings: Settings) -> bool:
    """Whether entity tables are updated row by row.

    Raises
    ------
    SettingsError
        It was asked for in a regime in which every step touches all rows.
    """
    if settings.entity_optimizer == "auto":
        return settings.regime == "sampled"
    if settings.entity_optimizer == "dense":
        return False
    if settings.regime != "sampled":
        raise SettingsError(
            f"Setting entity_optimizer: {settings.entity_optimizer!r} is for regime=sampled; in the"
            f" regime {settings.regime!r} every step touches every row. Take 'auto' or 'dense'."
        )
    return True


__all__ = [
    "Adagrad",
    "Adam",
    "AdamW",
    "RowOptimizer",
    "follows_rows",
    "make_optimizer",
    "plain_groups",
    "set_rate",
    "table_optimizer",
    "to_record",
]
