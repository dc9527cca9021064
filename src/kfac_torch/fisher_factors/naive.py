"""`FullFactor`, `NaiveDiagonalFactor`: from the gradient of the summed loss alone.

Notation: `g [P]` the gradient of the loss summed over B examples, flattened over all
parameters of a block; the factor is `g gᵀ / B [P, P]`, or its diagonal. With targets
drawn from the model's own distribution the examples' gradients are independent with mean
zero, so that this has the mean of `Σ_n g_n g_nᵀ / B`, at a higher variance (rank one per
batch).

Left out: per-example gradients.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import FactorOptions, FisherFactor
from .data import Entry, scope_string_from_params
from .diagonal import DiagonalFactor
from .inverse_providing import InverseProvidingFactor


def flatten_gradients(tensors: Sequence[Tensor], dtype: torch.dtype, lead: int) -> Tensor:
    """Concatenate gradients of several parameters, behind `lead` leading dimensions."""
    # Not flatten(lead), which a parameter without dimensions has not got.
    rows = [tensor.reshape(*tensor.shape[:lead], -1) for tensor in tensors]
    return torch.cat(rows, dim=lead).to(dtype)


class ParamsGradsFactor(FisherFactor, abc.ABC):
    """A factor of gradients of the summed loss (abstract): `params_grads[source]`.

    Args:
        params_grads: per source, the gradients of all parameters of the block (one
            tensor, or a list of them).
        batch_size: `B`, the examples in the sum.
        shapes: of the parameters; needed only where gradients are callables.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.
    """

    _prefix = ""

    def __init__(
        self,
        params_grads: Sequence[Entry],
        batch_size: int,
        *,
        shapes: Sequence[Sequence[int]] | None = None,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        entries = [
            tuple(grads) if isinstance(grads, list | tuple) else (grads,)
            for grads in params_grads
        ]
        if name is None:
            flat = [grad for entry in entries for grad in entry]
            name = self._prefix + scope_string_from_params([flat, batch_size])
        if batch_size < 1:
            raise ValueError(f"{name}: batch_size: expected at least 1, got {batch_size}")
        if shapes is None:
            if not entries or not all(hasattr(grad, "shape") for grad in entries[0]):
                raise ValueError(
                    f"{name}: params_grads: expected a list of tensors per source, or "
                    "shapes= where they are callables"
                )
            shapes = [grad.shape for grad in entries[0]]
        self._shapes = [tuple(shape) for shape in shapes]
        self._batch_size = batch_size
        super().__init__([[entry] for entry in entries], name, options, dtype, device)

    @property
    def _num_params(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self._shapes)

    def _check_tensor(self, *tensors: Tensor) -> None:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if shapes != self._shapes:
            raise ValueError(
                f"{self.name}: params_grads: expected gradients of shapes {self._shapes}, "
                f"got {shapes}"
            )

    def _nest(self, tensors: Sequence[Entry]) -> Sequence[Sequence[Entry]]:
        return super()._nest([[entry] for entry in tensors])  # one tower

    def _first_source(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor[0] for tensor in tensors)

    def num_rows(self, *tensors: Tensor) -> int:
        """`B`: the examples in the sum."""
        return self._batch_size

    def moment_cost(self, rows: float) -> float:
        """Return about how many multiply-adds a moment takes, however many rows."""
        return super().moment_cost(1)


class NaiveDiagonalFactor(ParamsGradsFactor, DiagonalFactor):
    """`g²/B` with `g` the gradient of the *summed* loss: cheap, of high variance.

    Stored as a column `[P, 1]` over all entries of all parameters. `summed_cov` takes
    every gradient with a leading dimension of sources.

    >>> factor = NaiveDiagonalFactor([[torch.tensor([1.0, 2.0])]], batch_size=2)
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.0)()
    tensor([[0.5000],
            [2.0000]])
    """

    _prefix = "ff_naivediag_"

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        return (self._num_params, 1)

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        gradient = flatten_gradients(tensors, self._dtype, 0)
        return gradient.square().div_(self._batch_size).unsqueeze(1)

    def _summed_cov(self, *tensors: Tensor) -> Tensor:
        gradients = flatten_gradients(tensors, self._dtype, 1)
        return gradients.square().sum(0).div_(self._batch_size).unsqueeze(1)


class FullFactor(ParamsGradsFactor, InverseProvidingFactor):
    """`g gᵀ/B` over all parameters of a block together; arguments as the base class.

    `summed_cov` takes every gradient with a leading dimension of sources.

    >>> factor = FullFactor([[torch.tensor([1.0]), torch.tensor([[2.0]])]], batch_size=2)
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.0)()
    tensor([[0.5000, 1.0000],
            [1.0000, 2.0000]])
    """

    _prefix = "ff_full_"

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        return (self._num_params, self._num_params)

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        g = flatten_gradients(tensors, self._dtype, 0)
        return g.outer(g).div_(self._batch_size)

    def _summed_cov(self, *tensors: Tensor) -> Tensor:
        g = flatten_gradients(tensors, self._dtype, 1)  # [S, P]
        return (g.mT @ g).div_(self._batch_size)


NaiveFullFactor = FullFactor  # its name after r1.8
