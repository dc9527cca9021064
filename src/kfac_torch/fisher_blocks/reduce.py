"""Blocks of layers that are used at several positions of an example: "reduce".

Notation: an example has P positions of a layer (tokens, locations, calls) with inputs
`a_p` and gradients `g_p` of the summed loss at its outputs; `ā` the mean of its inputs,
`ĝ` the sum of its gradients. Its gradient is `Σ_p a_p g_pᵀ`, which is taken to be `ā ĝᵀ`:

    F = T · A ⊗ G,    A = Σ ā āᵀ / R,    G = Σ ĝ ĝᵀ / R,    T = R/N

with the R examples for rows, the first dimension of a layer's input (Eschenhagen et al.
2023, arXiv 2311.00636, where "expand" has one row per position). Exact for
deep linear nets that average or sum the positions in front of the loss, where all `g_p` of
an example are equal. The rows are also fewer, by the positions.

The mean patch of a convolution is a mean of shifted slices of its input: no patches.
Left out: a loss term for each position, which has no mean (that is what "expand" is for).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..fisher_factors import FactorOptions
from ..fisher_factors.conv_geometry import ConvGeometry
from ..size_limit import SizeLimit
from .base import no_data
from .conv import ConvKFCBasicFB, conv_factor_kwargs, data_format
from .conv_transpose import ConvTransposeFB
from .kronecker import KroneckerProductFB, weighted_mean
from .linear import FullyConnectedKFACBasicFB
from .sides import conv_input_side, conv_output_side


class ReduceFB(KroneckerProductFB):
    """`T · A ⊗ G` of the mean input and the summed gradient of each example (abstract)."""

    skips_idle_rows = False  # its rows are examples

    @abc.abstractmethod
    def _mean_input(self, tensor: Tensor) -> tuple[Tensor, int]:
        """The mean input of each example, as the factor takes it, and the positions."""

    @abc.abstractmethod
    def _summed_grad(self, grad: Tensor) -> Tensor:
        """The summed gradient of each example, `[S, ...]` as the factor takes it."""

    def num_rows(self, inputs: Sequence[Tensor], num_terms: float) -> float:
        """`R`: the examples.

        Raises:
            ValueError: calls with batches of different size.
        """
        self.check_one_batch_size(inputs)
        return inputs[0].shape[0]

    def input_moments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the moment of `A`: all positions of all calls are of one example."""
        A, _ = self._sides()
        self.check_one_batch_size(inputs)
        means, positions = zip(*map(self._mean_input, inputs), strict=True)
        return [A.new_cov([[weighted_mean(means, positions)]])]

    def grad_moments(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], num_terms: float
    ) -> list[Tensor]:
        """Return the moment of `G`, summed over the sources `grads[call] [S, ...]`."""
        _, G = self._sides()
        self.check_one_batch_size(inputs)
        summed = torch.stack([self._summed_grad(grad) for grad in grads]).sum(0)
        return [G.summed_cov(summed)]


class FullyConnectedKFACReduceFB(ReduceFB, FullyConnectedKFACBasicFB):
    """The block of an `nn.Linear` at several positions of an example, reduced.

    All dimensions of the input between the first and the last are positions, and so are
    several calls.

    Args:
        module: the layer, or several that share all their parameters.
        name: of the layer, for messages and checkpoints.
        options: of the factors.
        diagonal_approx_for_input: keep the diagonal of `A` alone.
        diagonal_approx_for_output: keep the diagonal of `G` alone.
        time_dim: the input's dimension that is time; where that is the first, the second
            is that of the examples.
        size_limit: what sides above a size become; None for none.

    Raises:
        TypeError: a module of another type.
        ValueError: inputs without a dimension of examples, or calls with batches of
            different size.

    >>> block = FullyConnectedKFACReduceFB(nn.Linear(1, 1, bias=False))
    >>> block.instantiate_factors(damping=0.1)
    >>> x, g = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[4.0], [1.0]]])
    >>> block.accumulate(block.moments([x], [[g]], num_terms=1), decay=0.95)
    >>> [factor.get_cov().item() for factor in block.factors]  # of 2 and 5
    [4.0, 25.0]
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        diagonal_approx_for_input: bool = False,
        diagonal_approx_for_output: bool = False,
        time_dim: int | None = None,
        size_limit: SizeLimit | None = None,
    ) -> None:
        super().__init__(
            module,
            name,
            options,
            diagonal_approx_for_input=diagonal_approx_for_input,
            diagonal_approx_for_output=diagonal_approx_for_output,
            size_limit=size_limit,
        )
        self._time_dim = time_dim

    def prepare_input(self, tensor: Tensor, output_shape: torch.Size) -> Tensor:
        """Return the input of a call, the examples first."""
        if tensor.dim() < 2:
            raise ValueError(
                f"layer {self.name}: expected inputs [N, ..., {self.sizes[0]}] "
                f"with the examples first, got shape {tuple(tensor.shape)}"
            )
        return tensor.transpose(0, 1) if self._is_time_first(tensor.dim()) else tensor

    def _is_time_first(self, dims: int) -> bool:
        return dims > 2 and self._time_dim in (0, -dims)

    def _mean_input(self, tensor: Tensor) -> tuple[Tensor, int]:
        rows = tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])
        return rows.mean(1, dtype=self.dtype), rows.shape[1]

    def _summed_grad(self, grad: Tensor) -> Tensor:
        if self._is_time_first(grad.dim() - 1):
            grad = grad.transpose(1, 2)
        S, N, *_, size = grad.shape
        return grad.reshape(S, N, -1, size).sum(2, dtype=self.dtype)


class ConvKFCReduceFB(ReduceFB, ConvKFCBasicFB):
    """The block of a convolution, reduced: of the mean patch of each example.

    Any stride, dilation, padding, `padding_mode` and groups; `V` as `ConvKFCBasicFB` has
    it. The locations of several calls are averaged together.

    Args:
        module: the layer, or several that share all their parameters.
        name: of the layer, for messages and checkpoints.
        options: of the factors.
        size_limit: what sides above a size become; None for none.

    Raises:
        TypeError: a module of another type.
        ValueError: calls with batches of different size.

    >>> block = ConvKFCReduceFB(nn.Conv2d(2, 3, 3, padding=1))
    >>> block.instantiate_factors(damping=0.1)
    >>> x, g = torch.ones(8, 2, 5, 5), torch.ones(8, 3, 5, 5)
    >>> block.accumulate(block.moments([x], [[g]], num_terms=8), decay=0.95)
    >>> block.num_locations, block.factors[1].get_cov()[0, 0].item()
    (1.0, 625.0)
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        size_limit: SizeLimit | None = None,
    ) -> None:
        super().__init__(module, name, options, size_limit=size_limit)
        self._conv = ConvGeometry.make(
            f"{self.name}.input",
            self._filter_shape(),
            self._padding(),
            self._stride(),
            self.module.dilation,
            data_format(self.module),
            padding_mode=self.module.padding_mode,
            groups=self.module.groups,
        )

    def _make_factors(self) -> tuple[Any, Any]:
        groups, out = self.groups, self.module.out_channels
        common = conv_factor_kwargs(self.module, self.options)
        name = f"{self.name}.input"
        # A mean patch is one location of a pointwise convolution, its columns the channels.
        kind, extra = conv_input_side(self._conv.columns, 1, self.has_bias, self.size_limit)
        A = kind(
            [no_data(name)],
            [1, self._conv.columns, out],
            "VALID",
            data_format="NCW",
            has_bias=self.has_bias,
            groups=groups,
            name=name,
            **extra,
            **common,
        )
        kind, extra = conv_output_side(out // groups, self.size_limit)
        G = kind(
            [[no_data(f"{self.name}.output")]],
            "NCW",
            num_channels=out,
            groups=groups,
            name=f"{self.name}.output",
            **extra,
            **common,
        )
        return A, G

    def _mean_input(self, tensor: Tensor) -> tuple[Tensor, int]:
        self._conv.check_inputs(tensor)
        patch = self._conv.mean_patch(tensor).flatten(1)
        return patch.unsqueeze(2), math.prod(self._conv.out_space(tensor))

    def _summed_grad(self, grad: Tensor) -> Tensor:
        return grad.flatten(3).sum(3, keepdim=True, dtype=self.dtype)


class ConvTransposeKFCReduceFB(ConvTransposeFB, ConvKFCReduceFB):
    """The block of a transposed convolution, reduced.

    Arguments and errors as `ConvKFCReduceFB`; `V` as `ConvTransposeKFCFB` has it.
    """
