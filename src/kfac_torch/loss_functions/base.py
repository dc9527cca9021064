"""Output distributions: draw targets, evaluate, multiply by the Fisher at the output.

Notation: `z` the network output, `p(y|z)` the distribution it parametrises, `N` the
number of loss terms (rows of `z` that carry one), `F_L = E[∇_z log p ∇_z log pᵀ]` the
Fisher of one row, `B Bᵀ = F_L` a factor of it (Martens & Grosse 2015, arXiv 1503.05671,
section 2; Martens 2020, arXiv 1412.1193, section 9).

Every loss is the *sum* over loss terms of the negative log-likelihood, targets treated
as constants. The three families here are natural-parameter ones, where the Fisher, the
generalised Gauss-Newton matrix and the Hessian at the output are one matrix. Their
gradient is `∇_z = E[t(y)] − t(target)`, with `t` the sufficient statistic: what lets
`gradient_scale` check a user's loss without seeing its targets. Left out: reductions,
weights and masks of a user's loss.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator

import torch
from torch import Generator, Tensor


class LossFunction(abc.ABC):
    """A sum over loss terms, as a function of the network output (abstract).

    Args:
        inputs: `z`, the network output.
        targets: of the same number of rows; optional.
        name: for messages.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor | None = None, name: str | None = None
    ) -> None:
        self._inputs = inputs
        self._targets = targets
        self._name = name or type(self).__name__
        self.check_inputs()

    @property
    def name(self) -> str:
        """The name in messages."""
        return self._name

    @property
    def inputs(self) -> Tensor:
        """`z`, the network output."""
        return self._inputs

    @property
    def targets(self) -> Tensor | None:
        """The targets, if given."""
        return self._targets

    def evaluate(self) -> Tensor:
        """Return the loss at the given targets, 0-dim.

        Raises:
            ValueError: no targets were given.
        """
        if self._targets is None:
            raise ValueError(
                f"{self.name}: evaluate() needs targets; pass them to the constructor, or "
                "call evaluate_on_targets(targets)"
            )
        return self.evaluate_on_targets(self._targets)

    @abc.abstractmethod
    def check_inputs(self) -> None:
        """Raise ValueError where the network output cannot parametrise the loss."""

    @property
    @abc.abstractmethod
    def num_terms(self) -> int:
        """`N`, the number of loss terms."""

    @abc.abstractmethod
    def evaluate_on_targets(self, targets: Tensor) -> Tensor:
        """Return the loss at `targets`, 0-dim."""


class NegativeLogProbLoss(LossFunction):
    """`−Σ_n log p(y_n|z_n)`, with everything the Fisher needs (abstract)."""

    _event_dim = -1

    @abc.abstractmethod
    def sample(self, generator: Generator | None = None) -> Tensor:
        """Draw targets from `p(y|z)`."""

    def evaluate_on_sample(self, generator: Generator | None = None) -> Tensor:
        """Return the loss at targets drawn from the model's own distribution, 0-dim."""
        return self.evaluate_on_targets(self.sample(generator))

    @abc.abstractmethod
    def multiply_fisher(self, vector: Tensor) -> Tensor:
        """Return `F_L v`, row by row; `v` and the result have the shape of `z`."""

    @abc.abstractmethod
    def multiply_fisher_factor(self, vector: Tensor) -> Tensor:
        """Return `B v`, row by row; `v` has the inner shape, the result that of `z`."""

    @abc.abstractmethod
    def multiply_fisher_factor_transpose(self, vector: Tensor) -> Tensor:
        """Return `Bᵀ v`, row by row; `v` has the shape of `z`, the result the inner one."""

    @property
    def fisher_factor_inner_shape(self) -> torch.Size:
        """The shape of what `multiply_fisher_factor` takes."""
        return self._inputs.shape

    def multiply_fisher_factor_replicated_one_hot(self, index: int) -> Tensor:
        """Return column `index` of `B` for every row, in the shape of `z`."""
        one_hot = self._inputs.new_zeros(self.fisher_factor_inner_shape)
        one_hot.select(self._event_dim, index).fill_(1)
        return self.multiply_fisher_factor(one_hot)

    def fisher_factor_columns(self) -> Iterator[Tensor]:
        """Yield `B e_j`, in the shape of `z`, for every output coordinate of an example.

        Rows are examples: the first dimension. Loss terms within an example (tokens,
        pixels) interact in the network, so each has coordinates of its own.
        """
        inner = self.fisher_factor_inner_shape
        for j in range(inner[1:].numel()):
            one_hot = self._inputs.new_zeros(inner[0], inner[1:].numel())
            one_hot[:, j] = 1
            yield self.multiply_fisher_factor(one_hot.view(inner))

    def gradient_scale(
        self, gradient: Tensor, value: Tensor | float | None = None
    ) -> Tensor | None:
        """Return the `c` for which `c ∇_z` of this loss is `gradient`, as far as it shows.

        0-dim; NaN if no target in the sample space gives such a gradient; None if the
        gradient, and the user's loss `value` where it is known, cannot tell.
        """
        return None


class NaturalParamsNegativeLogProbLoss(NegativeLogProbLoss):
    """A loss whose `z` is a natural parameter: Hessian and Fisher coincide (abstract)."""

    def multiply_hessian(self, vector: Tensor) -> Tensor:
        """Return the Hessian at the output times `v`: the Fisher's product."""
        return self.multiply_fisher(vector)

    def multiply_hessian_factor(self, vector: Tensor) -> Tensor:
        """Return `B v`; the Fisher's product."""
        return self.multiply_fisher_factor(vector)

    def multiply_hessian_factor_transpose(self, vector: Tensor) -> Tensor:
        """Return `Bᵀ v`; the Fisher's product."""
        return self.multiply_fisher_factor_transpose(vector)


def attained_scale(gradient: Tensor, limit: Tensor) -> Tensor | None:
    """The `c` with `gradient <= c · limit`, if many entries attain it, else None.

    Small entries are left out: rounding would make them the largest ratios.
    """
    ratio = (gradient / limit)[gradient >= 0.01 * gradient.max()]
    scale = ratio.max()
    attained = (ratio >= 0.98 * scale).sum()
    return scale if attained >= max(2, 0.05 * ratio.numel()) else None


def check_output(loss: LossFunction, min_dim: int) -> None:
    """Raise ValueError unless `z` is floating, not empty, of `min_dim` dimensions."""
    z = loss.inputs
    if not isinstance(z, Tensor) or not z.is_floating_point():
        what = z.dtype if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(
            f"loss {loss.name}: expected the network output as a floating-point tensor, "
            f"got {what}; where it is inside a dict or an object, say where with output="
        )
    if z.dim() < min_dim or z.numel() == 0:
        raise ValueError(
            f"loss {loss.name}: expected a network output with at least {min_dim} "
            f"dimensions, the batch first, got shape {tuple(z.shape)}"
        )
