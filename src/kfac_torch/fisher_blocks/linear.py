"""Blocks of an `nn.Linear`: a Kronecker product, or a diagonal.

`F = T · A ⊗ G` with `A` the second moment of the inputs and `G` that of the gradients of
the summed loss at the outputs (Martens & Grosse 2015, arXiv 1503.05671, section 3). All
leading dimensions of the input are rows: `T = 1` for plain inputs and for tokens that
each carry a loss term, more where several rows share one ("expand" weight sharing,
Eschenhagen et al. 2023, arXiv 2311.00636).

The diagonal is exact: the mean over examples of the squared gradient of each, summed
over all its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..fisher_factors import (
    FactorOptions,
    FullyConnectedDiagonalFactor,
)
from ..size_limit import SizeLimit
from .base import accumulation_dtype, no_data
from .kronecker import KroneckerProductFB
from .layer import LayerFactorFB
from .sides import make_side


class FullyConnectedKFACBasicFB(KroneckerProductFB):
    """The Kronecker block of an `nn.Linear`, with or without a bias.

    Args:
        module: the layer, or several that share all their parameters.
        name: of the layer, for messages and checkpoints.
        options: of the factors.
        diagonal_approx_for_input: keep the diagonal of `A` alone.
        diagonal_approx_for_output: keep the diagonal of `G` alone.
        size_limit: what sides above a size become; None for none.

    Raises:
        TypeError: a module of another type.
        RuntimeError: use before `instantiate_factors`.

    >>> block = FullyConnectedKFACBasicFB(nn.Linear(2, 1, bias=False))
    >>> block.instantiate_factors(damping=0.1)
    >>> moments = block.moments([torch.eye(2)], [[torch.ones(2, 1)]], num_terms=2)
    >>> block.accumulate(moments, decay=0.95)
    >>> block.full_fisher_block()
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """

    layer_types = (nn.Linear,)
    skips_idle_rows = True

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        diagonal_approx_for_input: bool = False,
        diagonal_approx_for_output: bool = False,
        size_limit: SizeLimit | None = None,
    ) -> None:
        self._diagonal_sides = (diagonal_approx_for_input, diagonal_approx_for_output)
        self.size_limit = size_limit
        super().__init__(module, name, options)

    def _make_factors(self) -> tuple[Any, Any]:
        linear = self.module
        A, G = (
            make_side(diagonal, size, has_bias, self, side)
            for diagonal, size, has_bias, side in (
                (self._diagonal_sides[0], linear.in_features, self.has_bias, "input"),
                (self._diagonal_sides[1], linear.out_features, False, "output"),
            )
        )
        return A, G


class FullyConnectedDiagonalFB(LayerFactorFB):
    """The exact diagonal of the block of an `nn.Linear`, with or without a bias.

    Raises:
        TypeError: a module of another type.
        ValueError: calls with batches of different size.

    >>> block = FullyConnectedDiagonalFB(nn.Linear(2, 1, bias=False))
    >>> block.instantiate_factors(damping=0.1)
    >>> x, g = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    >>> block.accumulate(block.moments([x], [[g]], num_terms=1), decay=0.95)
    >>> block.full_fisher_block()
    tensor([[ 9.,  0.],
            [ 0., 36.]])
    """

    layer_types = (nn.Linear,)

    def _make_factors(self) -> tuple[Any, ...]:
        linear, name = self.module, f"{self.name}.weight"
        return (
            FullyConnectedDiagonalFactor(
                [no_data(name)],
                [[no_data(name)]],
                self.has_bias,
                sizes=(linear.in_features, linear.out_features),
                name=name,
                options=self.options,
                dtype=accumulation_dtype(linear.weight),
                device=linear.weight.device,
            ),
        )

    def grad_moments(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], num_terms: float
    ) -> list[Tensor]:
        """Return the diagonal: all calls of an example belong to one gradient."""
        self.check_one_batch_size(inputs)
        if len(inputs) > 1 or inputs[0].dim() > 2:
            inputs = [
                torch.cat(
                    [a.flatten(1, -2) if a.dim() > 2 else a[:, None] for a in inputs], 1
                )
            ]
            grads = [
                torch.cat(
                    [g.flatten(2, -2) if g.dim() > 3 else g[:, :, None] for g in grads], 2
                )
            ]
        return [self._factor().summed_cov(inputs[0], grads[0])]
