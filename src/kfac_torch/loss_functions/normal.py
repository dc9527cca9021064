"""Normal distributions of the output: the squared error, and one that learns its width."""

from __future__ import annotations

from typing import Self

import torch
from torch import Generator, Tensor

from .base import NegativeLogProbLoss, check_output
from .convex import NaturalParamsNegativeLogProbLoss


class NormalMeanNegativeLogProbLoss(NaturalParamsNegativeLogProbLoss):
    """`z` is the mean of a normal distribution with variance `var` in every coordinate.

    `var=1` is the loss `½‖y − z‖²` (up to a constant), `var=0.5` is `‖y − z‖²`. An
    example is one loss term: coordinates are summed over all dimensions but the first.

    Args:
        mean: `z [N, ...]`.
        var: the variance, a positive number.
        targets: of the shape of `mean`.
        name: for messages.

    Raises:
        ValueError: `mean` has no batch dimension, or `var` is not positive.

    >>> loss = NormalMeanNegativeLogProbLoss(torch.zeros(1, 2), var=0.5)
    >>> loss.multiply_fisher(torch.tensor([[1.0, 2.0]]))
    tensor([[2., 4.]])
    """

    size_is_value = True

    def __init__(
        self,
        mean: Tensor,
        var: float = 0.5,
        targets: Tensor | None = None,
        name: str | None = None,
    ) -> None:
        if isinstance(var, Tensor) and var.numel() != 1:
            raise ValueError(
                "normal loss: var: expected a positive number, got a tensor of shape "
                f"{tuple(var.shape)}; targets are the third argument, targets="
            )
        if not var > 0:
            raise ValueError(f"normal loss: var: expected a positive number, got {var}")
        self._var = float(var)
        super().__init__(mean, targets, name)

    def sample(self, generator: Generator | None = None) -> Tensor:
        """Draw `y ~ N(z, var)`, in the shape of `z`."""
        noise = torch.empty_like(self._inputs).normal_(generator=generator)
        return self._inputs.detach() + self._var**0.5 * noise

    def evaluate_on_targets(self, targets: Tensor) -> Tensor:
        """Return `Σ (y − z)²/(2 var) + ½ log(2π var)`."""
        constant = 0.5 * torch.log(
            torch.tensor(2 * torch.pi * self._var, dtype=torch.float64)
        )
        squares = (targets - self._inputs).square().sum() / (2 * self._var)
        return squares + constant.to(squares) * self._inputs.numel()

    def multiply_fisher(self, vector: Tensor) -> Tensor:
        """Return `v/var`."""
        return vector / self._var

    def multiply_fisher_factor(self, vector: Tensor) -> Tensor:
        """Return `v/√var`."""
        return vector / self._var**0.5

    def multiply_fisher_factor_transpose(self, vector: Tensor) -> Tensor:
        """Return `v/√var`; `B` is symmetric."""
        return vector / self._var**0.5

    def value_from_gradient(
        self, gradient: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return `var ‖g‖²/2`, which is `Σ (y − z)²/(2 var)`."""
        return 0.5 * self._var * gradient.square().sum()

    def change_from_gradient(
        self, outputs: Tensor, gradient: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return `gᵀ(z' − z) + ‖z' − z‖²/(2 var)`."""
        moved = outputs - self._inputs.detach()
        return (gradient * moved + 0.5 / self._var * moved.square()).sum()

    def gradient_scale(
        self, gradient: Tensor, value: Tensor | float | None = None
    ) -> Tensor | None:
        """Return `c = var ‖g‖²/(2 value)`; without the value any scale has its targets."""
        if not value:
            return None
        return self._var * gradient.double().square().sum() / (2 * value)


class NormalMeanVarianceNegativeLogProbLoss(NegativeLogProbLoss):
    """A normal distribution in every coordinate, of which `z` is mean and variance.

    `z = [mean | variance]` is one tensor, concatenated in the last dimension: `inputs`,
    and what every product takes and returns. A network that puts out the two in one
    tensor uses `from_output`. Either way the network makes the variance positive
    (softplus, exp): a variance of zero or below gives NaN.

    Args:
        mean: `[N, ..., D]`.
        variance: of the shape of `mean`.
        targets: of the shape of `mean`.
        name: for messages.

    Raises:
        ValueError: the shapes differ, or there is no batch dimension.

    >>> mean, variance = torch.zeros(1, 1), torch.full((1, 1), 2.0)
    >>> loss = NormalMeanVarianceNegativeLogProbLoss(mean, variance)
    >>> loss.multiply_fisher(torch.ones(1, 2))  # diag(1/v, 1/(2v²))
    tensor([[0.5000, 0.1250]])
    """

    def __init__(
        self,
        mean: Tensor,
        variance: Tensor,
        targets: Tensor | None = None,
        name: str | None = None,
    ) -> None:
        if mean.shape != variance.shape:
            raise ValueError(
                "normal loss: expected a variance of the shape of the mean, "
                f"{tuple(mean.shape)}, got {tuple(variance.shape)}"
            )
        super().__init__(torch.cat([mean, variance], -1), targets, name)

    @classmethod
    def from_output(
        cls, output: Tensor, targets: Tensor | None = None, name: str | None = None
    ) -> Self:
        """Return the loss whose `inputs` is `output` itself, `[mean | variance]`.

        Raises:
            ValueError: the last dimension is odd, or there is no batch dimension.

        >>> z = torch.tensor([[0.0, 2.0]])
        >>> loss = NormalMeanVarianceNegativeLogProbLoss.from_output(z)
        >>> loss.inputs is z, loss.variance
        (True, tensor([[2.]]))
        """
        loss = cls.__new__(cls)
        super().__init__(loss, output, targets, name)
        return loss

    def check_inputs(self) -> None:
        """Raise ValueError unless `z` is `[N, ..., 2D]`."""
        check_output(self, min_dim=2)
        if self._inputs.shape[-1] % 2:
            raise ValueError(
                f"loss {self.name}: expected [mean | variance] in the last dimension of "
                f"the network output, got an odd one: {tuple(self._inputs.shape)}"
            )

    @property
    def params(self) -> Tensor:
        """`[mean | variance]`: `inputs`, by its name in tf.contrib.kfac."""
        return self._inputs

    @property
    def mean(self) -> Tensor:
        """The first half of `z`."""
        return self._inputs.chunk(2, -1)[0]

    @property
    def variance(self) -> Tensor:
        """The second half of `z`."""
        return self._inputs.chunk(2, -1)[1]

    def sample(self, generator: Generator | None = None) -> Tensor:
        """Draw `y ~ N(mean, variance)`, in the shape of the mean."""
        mean, variance = self._inputs.detach().chunk(2, -1)
        noise = torch.empty_like(mean).normal_(generator=generator)
        return mean + variance.sqrt() * noise

    def evaluate_on_targets(self, targets: Tensor) -> Tensor:
        """Return `Σ (y − mean)²/(2 variance) + ½ log(2π variance)`."""
        squares = (targets - self.mean).square() / self.variance
        return 0.5 * (squares + (2 * torch.pi * self.variance).log()).sum()

    def _root(self) -> Tensor:
        variance = self._inputs.detach().chunk(2, -1)[1]
        return torch.cat([variance.rsqrt(), 0.5**0.5 / variance], -1)

    def multiply_fisher(self, vector: Tensor) -> Tensor:
        """Return `diag(1/v, 1/(2v²))` times the vector."""
        return self._root().square() * vector

    def multiply_fisher_factor(self, vector: Tensor) -> Tensor:
        """Return `diag(1/√v, 1/(√2 v))` times the vector."""
        return self._root() * vector

    def multiply_fisher_factor_transpose(self, vector: Tensor) -> Tensor:
        """Return `diag(1/√v, 1/(√2 v))` times the vector; `B` is symmetric."""
        return self._root() * vector

    def value_from_gradient(
        self, gradient: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return `Σ (y − mean)²/(2 variance) + ½ log variance`."""
        logs = self._inputs.detach().chunk(2, -1)[1].log().sum()
        return self.size_from_gradient(gradient) + 0.5 * logs

    def change_from_gradient(
        self, outputs: Tensor, gradient: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return the change at the targets, which the gradient at the mean tells."""
        mean, variance = self._inputs.detach().chunk(2, -1)
        targets = mean - variance * gradient.chunk(2, -1)[0]
        there = self.at(outputs).evaluate_on_targets(targets)
        return there - self.at(self._inputs.detach()).evaluate_on_targets(targets)

    def size_from_gradient(self, gradient: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return `Σ (y − mean)²/(2 variance)`, about ½ a coordinate after some training."""
        variance = self._inputs.detach().chunk(2, -1)[1]
        return 0.5 * (variance * gradient.chunk(2, -1)[0].square()).sum()
