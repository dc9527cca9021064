"""Independent Bernoulli variables as the output: the binary cross-entropy."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional

from .base import attained_scale
from .convex import NaturalParamsNegativeLogProbLoss


class MultiBernoulliNegativeLogProbLoss(NaturalParamsNegativeLogProbLoss):
    """`z` are the logits of independent Bernoulli variables.

    An example is one loss term: coordinates are summed over all dimensions but the first.

    Args:
        logits: `z [N, ...]`.
        targets: of the shape of `logits`, in [0, 1].
        name: for messages.
        weight: of each coordinate; its shape goes with that of `z`.
        pos_weight: of each coordinate where its target is 1.

    Raises:
        ValueError: no batch dimension.

    >>> MultiBernoulliNegativeLogProbLoss(torch.zeros(1, 2)).multiply_fisher(
    ...     torch.tensor([[1.0, 2.0]])
    ... )
    tensor([[0.2500, 0.5000]])
    """

    size_is_value = True

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor | None = None,
        name: str | None = None,
        *,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
    ) -> None:
        self._weight, self._pos_weight = weight, pos_weight
        super().__init__(logits, targets, name)

    def term_weights(self, gradient: Tensor) -> tuple[Tensor, float] | None:
        """Return the weight of every coordinate; the target is 1 where `g < 0`."""
        if self._weight is None and self._pos_weight is None:
            return None
        weights = torch.ones_like(gradient)
        if self._pos_weight is not None:
            positive = self._pos_weight.to(gradient)
            weights = torch.where(gradient < 0, positive, weights)
        if self._weight is not None:
            weights = weights * self._weight.to(gradient)
        return weights, self.num_terms

    def _p(self) -> Tensor:
        return self._inputs.detach().sigmoid()

    def sample(self, generator: Generator | None = None) -> Tensor:
        """Draw zeros and ones, in the shape and dtype of `z`."""
        return torch.bernoulli(self._p(), generator=generator)

    def sample_gradient(self, generator: Generator | None = None) -> Tensor:
        """Return `σ(z) − y` for drawn targets."""
        p = self._p()
        return p - torch.bernoulli(p, generator=generator)

    def evaluate_on_targets(self, targets: Tensor) -> Tensor:
        """Return `−Σ y log σ(z) + (1 − y) log(1 − σ(z))`."""
        return functional.binary_cross_entropy_with_logits(
            self._inputs,
            targets.to(self._inputs.dtype),
            self._weight,
            reduction="sum",
            pos_weight=self._pos_weight,
        )

    def multiply_fisher(self, vector: Tensor) -> Tensor:
        """Return `σ(1 − σ) v`."""
        p = self._p()
        return p * (1 - p) * vector

    def multiply_fisher_factor(self, vector: Tensor) -> Tensor:
        """Return `√(σ(1 − σ)) v`."""
        p = self._p()
        return (p * (1 - p)).sqrt() * vector

    def multiply_fisher_factor_transpose(self, vector: Tensor) -> Tensor:
        """Return `√(σ(1 − σ)) v`; `B` is symmetric."""
        return self.multiply_fisher_factor(vector)

    def value_from_gradient(
        self, gradient: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return `Σ w (A − zσ) + zg`, with `A = log(1 + e^z)` and `g = w (σ − y)`."""
        z = self._inputs.detach()
        A, p = _times(weights, functional.softplus(z)), _times(weights, self._p())
        # Before the sum: where the fit is good, what cancels is far larger than the loss.
        return A.addcmul_(z, p.sub_(gradient), value=-1).sum()

    def change_from_gradient(
        self, outputs: Tensor, gradient: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return `Σ w (A(z') − A(z) − σ (z' − z)) + g (z' − z)`."""
        z = self._inputs.detach()
        moved = outputs - z
        gap = functional.softplus(outputs) - functional.softplus(z)
        gap = _times(weights, gap.addcmul_(self._p(), moved, value=-1))
        return gap.addcmul_(gradient, moved).sum()

    def gradient_scale(
        self, gradient: Tensor, value: Tensor | float | None = None
    ) -> Tensor | None:
        """Recover `c` from `g = c (σ − y)`, `y` in [0, 1].

        Only hard targets show it: |σ − y| is σ where `y = 0` and 1 − σ where `y = 1`.
        """
        p = self._p().double()
        g = gradient.double()
        return attained_scale(g.abs(), torch.where(g > 0, p, 1 - p))


def _times(weights: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor if weights is None else weights * tensor
