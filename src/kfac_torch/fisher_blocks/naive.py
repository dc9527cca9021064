"""Blocks of any parameters, from gradients of the loss with respect to them.

`F = g gᵀ/N` with `g` the gradient of the summed loss over a batch: the square of a sum.
With sampled targets or random signs it is the Fisher in expectation, since cross terms
of different loss terms vanish there; its variance is high. In `"exact"` estimation every
source is of one example alone, and nothing is left to chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..fisher_factors import FactorOptions, FullFactor, NaiveDiagonalFactor
from .base import SingleFactorFB, accumulation_dtype, no_data


class _NaiveFB(SingleFactorFB):
    """The two generic blocks; `V` is a column `[n, 1]` (abstract).

    Args:
        params: the parameters, all entries of all of them one after the other.
        name: for messages and checkpoints.
        options: of the factors.
    """

    needs_param_grads = True
    factor_type: type[Any]

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        name: str = "generic",
        options: FactorOptions = FactorOptions(),
    ) -> None:
        super().__init__(params, (), name, options)

    def _make_factors(self) -> tuple[Any, ...]:
        first = self.params[0]
        factor = self.factor_type(
            [[no_data(self.name)] * len(self.params)],
            1,  # what the batch brings is divided by its own number of loss terms
            shapes=[param.shape for param in self.params],
            name=self.name,
            options=self.options,
            dtype=accumulation_dtype(first),
            device=first.device,
        )
        return (factor,)

    def num_rows(self, inputs: Sequence[Tensor], num_terms: float) -> float:
        """`R`: the loss terms."""
        return num_terms

    def input_moments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return nothing: the factor needs gradients."""
        return []

    def grad_moments(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], num_terms: float
    ) -> list[Tensor]:
        """Return `g gᵀ/N` or its diagonal, summed over sources `grads[param] [S, ...]`."""
        return [self._factor().summed_cov(*grads) / num_terms]

    def params_to_vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return all entries of all tensors, one column `[n, 1]`."""
        return torch.cat([tensor.flatten() for tensor in tensors]).unsqueeze(1)

    def vector_to_params(self, vector: Tensor) -> list[Tensor]:
        """Undo `params_to_vector`."""
        parts = vector.flatten().split([param.numel() for param in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]


class FullFB(_NaiveFB):
    """The full block of any parameters, `n x n`.

    >>> block = FullFB([nn.Parameter(torch.zeros(2))])
    >>> block.instantiate_factors(damping=0.5)
    """

    factor_type = FullFactor


class NaiveDiagonalFB(_NaiveFB):
    """The diagonal of the block of any parameters.

    >>> block = NaiveDiagonalFB([nn.Parameter(torch.zeros(2))])
    >>> block.instantiate_factors(damping=0.5)
    """

    factor_type = NaiveDiagonalFactor
