"""`LossCollection`: the losses of a model, by where their inputs are in its output.

Notation: `z` a network output, `N` the loss terms (rows of `z` that carry one). Every
registered loss stands for the *mean* over its terms of `coeff · −log p(y|z)`; several
add up, as for a network with several heads. Left out: the targets, which the Fisher
does not need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor, nn

from .loss_functions import (
    CategoricalLogitsNegativeLogProbLoss,
    LossFactory,
    LossFunction,
    MultiBernoulliNegativeLogProbLoss,
    NegativeLogProbLoss,
    NormalMeanNegativeLogProbLoss,
    NormalMeanVarianceNegativeLogProbLoss,
    Objective,
    OnehotCategoricalLogitsNegativeLogProbLoss,
    make_objective,
)

Output: TypeAlias = str | int | Callable[[Any], Tensor] | None
"""Where a network output is in what the model returns: a key, an index, an attribute
name or a callable; None where the model returns the tensor itself, or has it as its
`logits`."""


@dataclass(frozen=True)
class RegisteredLoss:
    """A loss: what it is, and where its input is in what the model returns."""

    name: str
    objective: Objective
    output: Output


class LossCollection:
    """The losses of a model.

    >>> losses = LossCollection()
    >>> losses.register_categorical_predictive_distribution("class")
    >>> losses.register_squared_error_loss("box", coeff=0.5)
    >>> output = {"class": torch.zeros(2, 3), "box": torch.zeros(2, 4)}
    >>> losses.total_loss(output, {"class": torch.tensor([0, 1]), "box": torch.ones(2, 4)})
    tensor(4.2433)
    """

    def __init__(self) -> None:
        self.registered_losses: list[RegisteredLoss] = []

    # Registration.

    def register_loss_function(
        self,
        loss: str | nn.Module | LossFactory | Objective,
        output: Output = None,
        coeff: float = 1.0,
        name: str | None = None,
    ) -> None:
        """Register any loss.

        Args:
            loss: what `make_objective` takes: a name, a torch criterion, or a
                `LossFunction` class or factory (of your own, for example).
            output: where its input is in what the model returns.
            coeff: its weight; the Fisher is scaled by it.
            name: for targets and messages; `output` if that is a string, else `loss`,
                `loss_1`, ... if None.

        Raises:
            ValueError: a loss that is not known, `coeff` not positive, or a name that is
                registered already.
        """
        if not coeff > 0:
            raise ValueError(f"loss: coeff: expected a positive number, got {coeff}")
        known = [entry.name for entry in self.registered_losses]
        if name is None:
            number = len(known)
            name = f"loss_{number}" if number else "loss"
            name = output if isinstance(output, str) else name
        if name in known:
            raise ValueError(
                f"loss {name}: expected a name that is not registered yet; registered are "
                f"{known}; pass name="
            )
        objective = loss if isinstance(loss, Objective) else make_objective(loss)
        objective = dataclasses.replace(objective, scale=objective.scale * coeff)
        reductions = {e.objective.reduction for e in self.registered_losses}
        if self.registered_losses and "sum" in {*reductions, objective.reduction}:
            raise ValueError(
                f"loss {name}: expected several losses to be means over their terms, got "
                "one that is a sum"
            )
        self.registered_losses.append(RegisteredLoss(name, objective, output))

    def register_categorical_predictive_distribution(
        self, output: Output = None, coeff: float = 1.0, name: str | None = None
    ) -> None:
        """Register logits `[..., classes]` of a categorical distribution."""
        self.register_loss_function(
            CategoricalLogitsNegativeLogProbLoss, output, coeff, name
        )

    def register_onehot_categorical_predictive_distribution(
        self, output: Output = None, coeff: float = 1.0, name: str | None = None
    ) -> None:
        """Register logits whose targets are one-hot."""
        self.register_loss_function(
            OnehotCategoricalLogitsNegativeLogProbLoss, output, coeff, name
        )

    def register_softmax_cross_entropy_loss(
        self, output: Output = None, coeff: float = 1.0, name: str | None = None
    ) -> None:
        """Register the categorical distribution by the name of its loss."""
        self.register_categorical_predictive_distribution(output, coeff, name)

    def register_normal_predictive_distribution(
        self,
        output: Output = None,
        var: float = 0.5,
        coeff: float = 1.0,
        name: str | None = None,
    ) -> None:
        """Register the mean of a normal distribution with variance `var`.

        `var=0.5` is the loss `‖t − y‖²`, `var=1` is `½‖t − y‖²`.
        """
        factory = partial(NormalMeanNegativeLogProbLoss, var=var)
        self.register_loss_function(factory, output, coeff, name)

    def register_normal_mean_variance_predictive_distribution(
        self, output: Output = None, coeff: float = 1.0, name: str | None = None
    ) -> None:
        """Register `[N, 2 D]`, the means and then the variances of normal distributions."""
        self.register_loss_function(
            NormalMeanVarianceNegativeLogProbLoss.from_output, output, coeff, name
        )

    def register_squared_error_loss(
        self, output: Output = None, coeff: float = 1.0, name: str | None = None
    ) -> None:
        """Register the loss `‖t − y‖²`, summed over outputs."""
        self.register_normal_predictive_distribution(output, 0.5, coeff, name)

    def register_multi_bernoulli_predictive_distribution(
        self, output: Output = None, coeff: float = 1.0, name: str | None = None
    ) -> None:
        """Register logits of independent Bernoulli variables."""
        self.register_loss_function(MultiBernoulliNegativeLogProbLoss, output, coeff, name)

    def register_sigmoid_cross_entropy_loss(
        self, output: Output = None, coeff: float = 1.0, name: str | None = None
    ) -> None:
        """Register the multi-Bernoulli distribution by the name of its loss."""
        self.register_multi_bernoulli_predictive_distribution(output, coeff, name)

    # What is registered.

    @property
    def reduction(self) -> str | None:
        """`"sum"` or `"mean"` over terms; None where it is a mean, but not for sure."""
        kinds = [entry.objective.reduction for entry in self.registered_losses]
        return kinds[0] if len(kinds) == 1 else None

    def check_losses(self) -> None:
        """Raise ValueError unless there is a loss."""
        if not self.registered_losses:
            raise ValueError(
                "no loss is registered: call a register_..._predictive_distribution or "
                "register_..._loss method of the layer collection first"
            )

    def network_outputs(self, output: Any) -> list[tuple[RegisteredLoss, Tensor]]:
        """Return the input of every loss in what the model returned.

        Raises:
            ValueError: it is not there.
        """
        return [
            (entry, find_output(output, entry.output)) for entry in self.registered_losses
        ]

    def losses(self, output: Any) -> list[tuple[LossFunction, float]]:
        """Return the losses of what the model returned, each with its weight.

        The Fisher of the mean loss is `Σ_i coeff_i F_i/N_i`, with `F_i` that of the sum
        over the `N_i` terms of loss `i`.
        """
        return [
            (entry.objective.factory(z), entry.objective.coeff(z))
            for entry, z in self.network_outputs(output)
        ]

    def eval_losses(
        self, output: Any, targets: Tensor | Sequence[Tensor] | Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return every loss at its targets, a mean over its terms, without its weight.

        Args:
            output: what the model returned.
            targets: for one loss a tensor; for several, one each in the order of
                registration or by name.

        Raises:
            ValueError: other targets than one for every loss.
        """
        self.check_losses()
        targets = self._by_name(targets)
        result = {}
        for entry, z in self.network_outputs(output):
            loss = entry.objective.factory(z)
            result[entry.name] = (
                loss.evaluate_on_targets(targets[entry.name]) / loss.num_terms
            )
        return result

    def _by_name(
        self, targets: Tensor | Sequence[Tensor] | Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        names = [entry.name for entry in self.registered_losses]
        if isinstance(targets, Mapping):
            if set(targets) != set(names):
                raise ValueError(
                    f"targets: expected one for each of the losses {names}, got "
                    f"{list(targets)}"
                )
            return targets
        if not isinstance(targets, Tensor | list | tuple):
            raise ValueError(
                f"targets: expected a tensor for each of the losses {names}, got "
                f"{type(targets).__name__}"
            )
        given = [targets] if isinstance(targets, Tensor) else list(targets)
        if len(given) != len(names):
            raise ValueError(
                f"targets: expected {len(names)}, one for each of the losses {names}, got "
                f"{len(given)}"
            )
        return dict(zip(names, given, strict=True))

    def eval_losses_on_samples(
        self, output: Any, generator: Generator | None = None
    ) -> dict[str, Tensor]:
        """Return every loss at targets drawn from the model, a mean over its terms.

        Raises:
            TypeError: a loss that has no distribution to draw from.
        """
        self.check_losses()
        result = {}
        for entry, z in self.network_outputs(output):
            loss = entry.objective.factory(z)
            if not isinstance(loss, NegativeLogProbLoss):
                raise TypeError(
                    f"loss {entry.name}: expected a NegativeLogProbLoss, which targets can "
                    f"be drawn from, got {type(loss).__name__}"
                )
            result[entry.name] = loss.evaluate_on_sample(generator) / loss.num_terms
        return result

    def total_loss(
        self, output: Any, targets: Tensor | Sequence[Tensor] | Mapping[str, Tensor]
    ) -> Tensor:
        """Return the weighted sum of all losses at their targets, 0-dim."""
        return self._weighted(output, self.eval_losses(output, targets))

    def total_sampled_loss(self, output: Any, generator: Generator | None = None) -> Tensor:
        """Return the sum of all losses at drawn targets, weighted by `√coeff`, 0-dim.

        So that the second moment of its gradient is the Fisher.
        """
        return self._weighted(output, self.eval_losses_on_samples(output, generator), 0.5)

    def _weighted(self, output: Any, values: dict[str, Tensor], power: float = 1) -> Tensor:
        weights = {
            entry.name: entry.objective.coeff(z) ** power
            for entry, z in self.network_outputs(output)
        }
        return torch.stack([weights[name] * value for name, value in values.items()]).sum()


def find_output(output: Any, where: Output) -> Tensor:
    """Return the network output that `where` points to in what the model returned.

    None is the tensor itself, or `"logits"` where a mapping or an object has them.

    Raises:
        ValueError: it is not there, or no tensor.

    >>> find_output({"logits": torch.zeros(1)}, "logits")
    tensor([0.])
    """
    if where is None and not isinstance(output, Tensor):
        named = (
            "logits" in output if isinstance(output, Mapping) else hasattr(output, "logits")
        )
        where = "logits" if named else None
    try:
        if where is None:
            z = output
        elif callable(where):
            z = where(output)
        elif isinstance(where, str) and not isinstance(output, Mapping):
            z = getattr(output, where)
        else:
            z = output[where]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"output={where!r} does not fit what the model returned, a "
            f"{type(output).__name__}: {error}"
        ) from error
    if not isinstance(z, Tensor):
        raise ValueError(
            f"expected the model to return its network output as a tensor, got "
            f"{type(z).__name__}; say where it is with output=, a key, an index, an "
            "attribute name or a callable"
        )
    return z
