"""Optimizers: torch's, and one that updates only the table rows that a step looks up."""

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

#: Adagrad's epsilon for dense tables, and for tables that are updated row by row. With torch's
#: default, 1e-10, an element whose gradient is only the rounding error of terms that cancel also
#: moves by the learning rate, in a direction that depends on the order of a sum. On MKG-Y, regime
#: sampled, the losses of two processes then deviate from those of one by 0.0009 within 50 steps;
#: with 1e-6 for all tables by 2e-5, with these values by 5e-7.
ADAGRAD_EPS, ADAGRAD_EPS_OF_ROWS = 1e-6, 1e-5
#: Adagrad's epsilon for the tables of the ComplEx head, which are initialised so small that a
#: larger one would hide their gradients.
ADAGRAD_EPS_OF_SMALL = 1e-10

#: Elements from which on Adam updates a parameter on a GPU in a kernel of its own: torch's, for
#: several parameters, moved 67 million elements at two thirds of the copy bandwidth of an H200.
_LARGE = 2**20


def table_optimizer(settings: Settings) -> tuple[str, float]:
    """Return the optimizer of the tables and its learning rate."""
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
    """Create an optimizer, fused if all supported versions of torch have it fused.

    Adagrad takes `ADAGRAD_EPS_OF_SMALL` for the parameters that are in ``small``.
    """
    groups: list[dict[str, Any]] = [{"params": list(parameters)}]
    small_ids = {id(parameter) for parameter in small}
    if kind == "adagrad" and any(id(parameter) in small_ids for parameter in parameters):
        others = [parameter for parameter in parameters if id(parameter) not in small_ids]
        of_small = [parameter for parameter in parameters if id(parameter) in small_ids]
        groups = [{"params": others}, {"params": of_small, "eps": ADAGRAD_EPS_OF_SMALL}]
    if kind == "adagrad" and any(parameter.is_cuda for parameter in parameters):
        return Adagrad(groups, lr=lr, weight_decay=weight_decay, eps=ADAGRAD_EPS)
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": Adam,
        "adamw": AdamW,
        "adagrad": functools.partial(torch.optim.Adagrad, eps=ADAGRAD_EPS),
    }
    return kinds[kind](groups, lr=lr, weight_decay=weight_decay, fused=True)


class _LargeApart(torch.optim.Optimizer):
    """Mixin that lets Adam and AdamW update large parameters on a GPU in a kernel of their own.

    Attributes
    ----------
    found_inf : Tensor or None
        See `Adagrad`.
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
            # Unwrapped: torch calls the step hooks around this method already.
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
        """Return the large parameters with their gradients and groups."""
        if getattr(self, "grad_scale", None) is not None:  # only torch's own step unscales
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
    """torch's Adam, with a kernel of its own for each large parameter on a GPU."""


class AdamW(_LargeApart, torch.optim.AdamW):
    """torch's AdamW, with a kernel of its own for each large parameter on a GPU."""


class Adagrad(torch.optim.Adagrad):
    """torch's Adagrad for a GPU, where older versions of torch have no fused one.

    Attributes
    ----------
    found_inf : Tensor or None
        If it is above 0, a step changes nothing, and the host does not wait for it, as in torch's
        fused optimizers.
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
            state["step"] += 1  # not counted in replayed steps; unused without lr_decay
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
        # The rate may be a tensor on the device, whose value changes between recorded steps.
        parameter.sub_(grad / state["sum"].sqrt().add_(group["eps"]) * group["lr"])


class RowOptimizer(torch.optim.Optimizer):
    r"""Adam or Adagrad on the table rows that a step looks up; other rows do not change.

    Adam counts the steps k of each row, so that the bias correction of a row does not depend on
    when it is first looked up:

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        p \leftarrow p - \gamma \frac{m / (1 - \beta_1^k)}{\sqrt{v / (1 - \beta_2^k)} + \epsilon}

    With ``rowwise``, v is the mean of the squares of a row, one number, and Adam's m is g: the
    state of a row is two numbers instead of two rows. For Adagrad, v is the sum of the squares, and
    :math:`\epsilon` is `ADAGRAD_EPS_OF_ROWS` or, for ``small`` tables, `ADAGRAD_EPS_OF_SMALL`.

    Parameters
    ----------
    tables : sequence of EntityTable
        Tables with ``lazy`` on.
    kind : {"adam", "adamw", "adagrad"}
    lr : float
    weight_decay : float
        Applied to the rows that are looked up.
    rowwise : bool
    small : sequence of EntityTable
        Those of the tables with small initial values.
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
        """Do `step` with gradients times ``scale``."""
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
    """Prepare an optimizer for recording its steps in a CUDA graph."""
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.full((), group["lr"], device=device)
        if "capturable" in group:
            group["capturable"] = True
    # torch would warn of the warm-up steps, which are not recorded.
    optimizer._warned_capturable_if_run_uncaptured = True


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def plain_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups as they are without `to_record`, for checkpoints."""
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    for group in groups:
        group["lr"] = float(group["lr"])
        if "capturable" in group:
            group["capturable"] = False
    return groups


def follows_rows(settings: Settings) -> bool:
    """Return whether entity tables are updated row by row.

    Raises
    ------
    SettingsError
        The settings require it in a regime in which every step changes all rows.
    """
    if settings.entity_optimizer == "auto":
        return settings.regime == "sampled"
    if settings.entity_optimizer == "dense":
        return False
    if settings.regime != "sampled":
        raise SettingsError(
            f"Setting entity_optimizer: {settings.entity_optimizer!r} is for regime=sampled; in the"
            f" regime {settings.regime!r} every step changes all rows. Use 'auto' or 'dense'."
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
