"""Factors of a scale and a shift: `y = x · scale + shift`, as in normalisation layers.

Notation: the scale and the shift are broadcast over some dimensions of `x [N, ...]`, the
batch dimension 0 always among them. The gradient of one example is

    scale: Σ x · g,    shift: Σ g        (sums over its other broadcast dimensions)

flattened and concatenated to `v [P]`. The full factor is `Σ_n v_n v_nᵀ / N`, the diagonal
one the mean of squares: both exact per example.

Left out: the statistics of the normalisation itself, which are no parameters.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import FactorOptions, FisherFactor
from .data import TensorLike
from .diagonal import DiagonalFactor, name_of_pair, pair_towers
from .inverse_providing import InverseProvidingFactor


class _ScaleAndShiftFactor(FisherFactor, abc.ABC):
    """Per-example gradients of a scale and a shift (abstract).

    Args:
        inputs: per tower, `x [N, ...]`.
        outputs_grads: `[source][tower]`, gradients of the summed loss with respect to
            `y`, of the same shape.
        broadcast_dims_scale: dimensions of `x` that the scale is broadcast over, 0
            included.
        broadcast_dims_shift: those of the shift; as the scale if None.
        has_shift: whether there is a shift.
        shape: of one example of `x`, where the size of a dimension that scale and shift
            are both broadcast over has no effect; needed only where the data are
            callables.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: dimensions that `x` has not or without 0, or data that do not fit.
    """

    _prefix = ""

    def __init__(
        self,
        inputs: Sequence[TensorLike],
        outputs_grads: Sequence[Sequence[TensorLike]],
        broadcast_dims_scale: Sequence[int],
        broadcast_dims_shift: Sequence[int] | None = None,
        has_shift: bool = True,
        *,
        shape: Sequence[int] | None = None,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if broadcast_dims_shift is None:
            broadcast_dims_shift = broadcast_dims_scale
        dims = (tuple(broadcast_dims_scale), tuple(broadcast_dims_shift))
        if name is None:
            name = self._prefix + name_of_pair(inputs, outputs_grads, [*dims, has_shift])
        tensors = pair_towers(inputs, outputs_grads, name)
        if shape is None:
            first = tensors[0][0][0]
            if not hasattr(first, "shape"):
                raise ValueError(
                    f"{name}: expected tensors [N, ...], or shape= of one example where "
                    "they are callables"
                )
            shape = first.shape[1:]
        self._shape = tuple(shape)
        self._dims = dims if has_shift else dims[:1]
        for which, some in zip(("scale", "shift"), self._dims, strict=False):
            rank = len(self._shape) + 1
            if 0 not in some or any(not 0 <= dim < rank for dim in some):
                raise ValueError(
                    f"{name}: broadcast_dims_{which}: expected dimensions of x [N, ...] "
                    f"with {rank} dimensions, the batch dimension 0 among them, got {some}"
                )
        super().__init__(tensors, name, options, dtype, device)

    @property
    def _num_params(self) -> int:
        sizes = list(enumerate(self._shape, start=1))
        return sum(
            torch.Size(size for dim, size in sizes if dim not in dims).numel()
            for dims in self._dims
        )

    def _check_tensor(self, *tensors: Tensor) -> None:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        free = set.intersection(*map(set, self._dims))
        expected = [
            "any" if dim in free else size for dim, size in enumerate(self._shape, start=1)
        ]
        sizes = [
            "any" if dim in free else size
            for dim, size in enumerate(shapes[0][1:], start=1)
        ]
        if len(shapes) != 2 or shapes[0] != shapes[1] or sizes != expected:
            raise ValueError(
                f"{self.name}: expected inputs and outputs_grads of one shape "
                f"(N, {', '.join(map(str, expected))}), got {shapes}"
            )

    def num_rows(self, *tensors: Tensor) -> int:
        """`N`: the examples."""
        return tensors[0].shape[0]

    def _gradients(self, inputs: Tensor, grads: Tensor) -> Tensor:
        """Per-example gradients `[S, N, P]` from `x [N, ...]` and `g [S, N, ...]`."""
        x, g = inputs.to(self._dtype), grads.to(self._dtype)
        parts = list[Tensor]()
        for factor, dims in zip((x, None), self._dims, strict=False):
            part = g if factor is None else factor * g
            within = [dim + 1 for dim in dims if dim]  # `sum([])` would sum over all
            part = part.sum(within) if within else part
            parts.append(part.reshape(*g.shape[:2], -1))
        return torch.cat(parts, dim=2)

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        inputs, grads = tensors
        return self._summed_cov(inputs, grads.unsqueeze(0))


class ScaleAndShiftFullFactor(_ScaleAndShiftFactor, InverseProvidingFactor):
    """The second moment `[P, P]` of the gradients of a scale and a shift.

    Arguments: `inputs` per tower, `outputs_grads[source][tower]` of the same shape, the
    dimensions that the scale (and the shift) are broadcast over, and `has_shift`.

    >>> x, g = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [-1.0]])
    >>> factor = ScaleAndShiftFullFactor([x], [[g]], [0])
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.0)()
    tensor([[2.5000, 1.5000],
            [1.5000, 1.0000]])
    """

    _prefix = "ff_scaleshiftfull_"

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        return (self._num_params, self._num_params)

    def _summed_cov(self, *tensors: Tensor) -> Tensor:
        v = self._gradients(*tensors).flatten(0, 1)
        return (v.mT @ v).div_(len(tensors[0]))


class ScaleAndShiftDiagonalFactor(_ScaleAndShiftFactor, DiagonalFactor):
    """The mean squares of the gradients of a scale and a shift, a column `[P, 1]`.

    Arguments as `ScaleAndShiftFullFactor`.

    >>> x, g = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [-1.0]])
    >>> factor = ScaleAndShiftDiagonalFactor([x], [[g]], [0])
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.0)()
    tensor([[2.5000],
            [1.0000]])
    """

    _prefix = "ff_scaleshiftdiag_"

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        return (self._num_params, 1)

    def _summed_cov(self, *tensors: Tensor) -> Tensor:
        v = self._gradients(*tensors)
        return v.square_().sum((0, 1)).div_(len(tensors[0])).unsqueeze(1)
