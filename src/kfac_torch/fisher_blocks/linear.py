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
from .layer import LayerFactorFB, LayerFB
from .sides import make_side


class _ByStructure(type):
    """The type of `TransposedLinear`, whose instances are known by what they have."""

    def __instancecheck__(cls, module: object) -> bool:
        weight = getattr(module, "weight", None)
        return (
            isinstance(module, nn.Module)
            and type(module).__name__ == "Conv1D"
            and isinstance(weight, Tensor)
            and weight.dim() == 2
            and getattr(module, "nf", None) == weight.shape[1]
        )


class TransposedLinear(metaclass=_ByStructure):
    """A linear layer with its weight the other way round: `y = x W + b`, `W [in, out]`.

    For `isinstance` alone: such layers are the `Conv1D` of Hugging Face's transformers
    (of GPT-2 and others), which is known by its name, its weight and `nf`, the size of
    its output, so that nothing has to be imported.

    >>> isinstance(nn.Linear(2, 3), TransposedLinear)
    False
    """


class LinearFB(LayerFB):
    """A block of a linear layer (abstract): which way round its weight is."""

    layer_types = (nn.Linear, TransposedLinear)

    @property
    def transposed(self) -> bool:
        """Whether the weight is `[in, out]`, as `V` is, and not `[out, in]`."""
        return isinstance(self.module, TransposedLinear)

    @property
    def sizes(self) -> tuple[int, int]:
        """`(in, out)`, without the bias."""
        weight = self.params[0].flatten(1)
        m, n = weight.shape if self.transposed else weight.mT.shape
        return m, n

    def params_to_vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """Bring tensors like `params` to `V [in(+1), out]`, the bias last."""
        weight, *bias = tensors
        return super().params_to_vector([weight.mT if self.transposed else weight, *bias])

    def vector_to_params(self, vector: Tensor) -> list[Tensor]:
        """Undo `params_to_vector`."""
        if not self.transposed:
            return super().vector_to_params(vector)
        if self.has_bias:
            return [vector[:-1], vector[-1]]
        return [vector]


class FullyConnectedKFACBasicFB(LinearFB, KroneckerProductFB):
    """The Kronecker block of an `nn.Linear`, with or without a bias.

    Or of a `Conv1D` of transformers, whose weight is `[in, out]`.

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
        (left, right), (m, n) = self._diagonal_sides, self.sizes
        A = make_side(left, m, self.has_bias, self, "input")
        return A, make_side(right, n, False, self, "output")


class FullyConnectedDiagonalFB(LinearFB, LayerFactorFB):
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

    def _make_factors(self) -> tuple[Any, ...]:
        weight, name = self.params[0], f"{self.name}.weight"
        return (
            FullyConnectedDiagonalFactor(
                [no_data(name)],
                [[no_data(name)]],
                self.has_bias,
                sizes=self.sizes,
                name=name,
                options=self.options,
                dtype=accumulation_dtype(weight),
                device=weight.device,
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
