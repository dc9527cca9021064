"""Normal distributions of the output: the squared error."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from .base import NaturalParamsNegativeLogProbLoss, check_output


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

    def __init__(
        self,
        mean: Tensor,
        var: float = 0.5,
        targets: Tensor | None = None,
        name: str | None = None,
    ) -> None:
        if not var > 0:
            raise ValueError(f"normal loss: var: expected a positive number, got {var}")
        self._var = float(var)
        super().__init__(mean, targets, name)

    def check_inputs(self) -> None:
        """Raise ValueError unless `z` is `[N, ...]`."""
        check_output(self, min_dim=1)

    @property
    def num_terms(self) -> int:
        """`N`, the number of examples."""
        return self._inputs.shape[0]

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

    def gradient_scale(
        self, gradient: Tensor, value: Tensor | float | None = None
    ) -> Tensor | None:
        """Return `c = var ‖g‖²/(2 value)`; without the value any scale has its targets."""
        if not value:
            return None
        return self._var * gradient.double().square().sum() / (2 * value)
