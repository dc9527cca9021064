"""What the user minimises, from a name, a torch criterion or a loss factory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TypeAlias

from torch import Tensor, nn

from .base import LossFunction
from .bernoulli import MultiBernoulliNegativeLogProbLoss
from .categorical import CategoricalLogitsNegativeLogProbLoss
from .normal import NormalMeanNegativeLogProbLoss

LossFactory: TypeAlias = Callable[[Tensor], LossFunction]

_REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Objective:
    """What the user minimises: `reduction` over terms of `coeff · −log p(y|z)`.

    Args:
        factory: makes the distribution from the network output.
        reduction: `"mean"` or `"sum"` over loss terms; None is a mean, not yet checked.
        per_output: the criterion also averages over an example's outputs, so that
            `coeff` is divided by their number.
        scale: `coeff` before that.
    """

    factory: LossFactory
    reduction: str | None = None
    per_output: bool = False
    scale: float = 1.0

    def coeff(self, output: Tensor) -> float:
        """The weight of `−log p(y|z)` in one loss term; the Fisher is scaled by it."""
        outputs = output[0].numel() if self.per_output else 1
        return self.scale / outputs


def make_objective(loss: str | nn.Module | LossFactory) -> Objective:
    """Return the `Objective` that a `loss` argument means.

    Args:
        loss: `"categorical"` (classes last), `"normal"` (unit variance: `½‖y − z‖²`) or
            `"bernoulli"`, a mean over loss terms; or the torch criterion in use
            (`nn.CrossEntropyLoss`, `nn.MSELoss`, `nn.BCEWithLogitsLoss`), its reduction
            and weights understood; or a `LossFunction` class or factory.

    Raises:
        ValueError: an unknown name, criterion, or option of one, or a function of
            `torch.nn.functional`.
        TypeError: something else.

    >>> import torch
    >>> make_objective(nn.MSELoss()).coeff(torch.zeros(8, 4))  # (2/4) · ½‖y − z‖²
    0.5
    """
    if isinstance(loss, str):
        if loss not in _BY_NAME:
            raise ValueError(f"loss: expected one of {tuple(_BY_NAME)}, got {loss!r}")
        return Objective(_BY_NAME[loss])
    if isinstance(loss, nn.Module):
        return _objective_of_criterion(loss)
    if getattr(loss, "__module__", None) == "torch.nn.functional":
        raise ValueError(
            "loss: expected a name, a torch criterion, or a LossFunction class or factory, "
            f"got {loss!r}, a function of output and target; pass the criterion's module, "
            "nn.CrossEntropyLoss() for example"
        )
    if callable(loss):
        return Objective(loss)
    raise TypeError(
        "loss: expected a name, a torch criterion, or a LossFunction class or "
        f"factory, got {loss!r}"
    )


def _objective_of_criterion(criterion: nn.Module) -> Objective:
    reduction = str(getattr(criterion, "reduction", None))
    mean = reduction == "mean"
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"loss: expected a criterion with a reduction in {_REDUCTIONS}, got "
            f"{criterion} with {reduction!r}"
        )
    if isinstance(criterion, nn.CrossEntropyLoss):
        factory = partial(
            CategoricalLogitsNegativeLogProbLoss,
            class_dim=1,
            class_weight=criterion.weight,
            label_smoothing=criterion.label_smoothing,
        )
        return Objective(factory, reduction)
    if isinstance(criterion, nn.MSELoss):
        return Objective(_unit_normal, reduction, per_output=mean, scale=2.0)
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        factory = partial(
            MultiBernoulliNegativeLogProbLoss,
            weight=criterion.weight,
            pos_weight=criterion.pos_weight,
        )
        return Objective(factory, reduction, per_output=mean)
    raise ValueError(
        "loss: expected nn.CrossEntropyLoss, nn.MSELoss or nn.BCEWithLogitsLoss, got "
        f"{criterion}; a sigmoid or softmax at the end of a net is the criterion's to "
        "take; pass a LossFunction class or factory for any other loss"
    )


def _unit_normal(output: Tensor) -> LossFunction:
    return NormalMeanNegativeLogProbLoss(output, var=1.0)


_BY_NAME: Mapping[str, LossFactory] = MappingProxyType(
    {
        "categorical": CategoricalLogitsNegativeLogProbLoss,
        "normal": _unit_normal,
        "bernoulli": MultiBernoulliNegativeLogProbLoss,
    }
)
