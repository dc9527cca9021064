"""`FullyConnectedKroneckerFactor`: either side of a fully connected layer.

Notation: `X [R, d]` the layer's rows (inputs, or gradients of the summed loss with
respect to outputs); `C = XᵀX/R`, with a one appended last to each row for a bias
(Martens & Grosse 2015, arXiv 1503.05671, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import FactorOptions
from .data import (
    TensorLike,
    append_homog,
    compute_cov,
    parts_of,
    scope_string_from_params,
)
from .inverse_providing import InverseProvidingFactor


class FullyConnectedKroneckerFactor(InverseProvidingFactor):
    """The running second moment `XᵀX/R` of a layer's inputs or output gradients.

    Args:
        tensors: `[source][tower]`, each `[..., d]`; all leading dimensions are rows.
        has_bias: append a one, last, to each row.
        size: `d`; needed only where `tensors` are callables, or tuples.
        groups: with more than one an entry is a tuple of as many tensors, each with rows
            of its own, and the moment `[groups, d(+1), d(+1)]`, one matrix for each.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: tensors without a last dimension of size `d`.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> factor = FullyConnectedKroneckerFactor([[x]], has_bias=True)
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.95)()
    tensor([[ 5.,  7.,  2.],
            [ 7., 10.,  3.],
            [ 2.,  3.,  1.]])
    """

    def __init__(
        self,
        tensors: Sequence[Sequence[TensorLike]],
        has_bias: bool = False,
        *,
        size: int | None = None,
        groups: int = 1,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if name is None:
            flat = [
                part for towers in tensors for entry in towers for part in parts_of(entry)
            ]
            name = "ff_fckron_" + scope_string_from_params([flat, has_bias])
        first = tensors[0][0] if tensors and tensors[0] else None
        if size is None:
            if not hasattr(first, "shape") or len(first.shape) == 0:
                raise ValueError(
                    f"{name}: expected tensors of shape [..., d], or size= where they "
                    f"are callables, got {type(first).__name__}"
                )
            size = first.shape[-1]
        self._size = size
        self._groups = groups
        self._has_bias = has_bias
        super().__init__(tensors, name, options, dtype, device)

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        n = self._size + self._has_bias
        return (n, n) if self._groups == 1 else (self._groups, n, n)

    def _check_tensor(self, *tensors: Tensor) -> None:
        if self._groups == 1:
            self._single(tensors)
        elif len(tensors) != self._groups:
            raise ValueError(
                f"{self.name}: expected {self._groups} tensors per tower, one for each "
                f"group, got {len(tensors)}"
            )
        for tensor in tensors:
            if tensor.dim() < 1 or tensor.shape[-1] != self._size:
                raise ValueError(
                    f"{self.name}: expected rows of {self._size} features [..., "
                    f"{self._size}], got shape {tuple(tensor.shape)}"
                )

    def num_rows(self, *tensors: Tensor) -> int:
        """`R`: the product of the leading dimensions; with groups that of all of them."""
        return sum(tensor.numel() for tensor in tensors) // self._size

    def _first_source(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor[0] for tensor in tensors)

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        moments = dict[tuple[Any, ...], Tensor]()  # groups may have the same rows
        for tensor in tensors:
            if _place(tensor) not in moments:
                rows = tensor.reshape(-1, self._size)
                moments[_place(tensor)] = rows_moment(rows, self._has_bias)
        each = [moments[_place(tensor)] for tensor in tensors]
        return each[0] if self._groups == 1 else torch.stack(each)

    def _summed_cov(self, *tensors: Tensor) -> Tensor:
        # A mean over rows: that over the rows of all sources, times their number.
        flat = [tensor.flatten(0, 1) for tensor in tensors]
        return self._new_cov(*flat).mul_(len(tensors[0]))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def rows_moment(rows: Tensor, has_bias: bool) -> Tensor:
    """Return `XᵀX/R`, at least in float32; with a bias that of `append_homog(X)`.

    >>> rows_moment(torch.tensor([[1.0], [2.0]]), has_bias=True)
    tensor([[2.5000, 1.5000],
            [1.5000, 1.0000]])
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if not has_bias:
        return compute_cov(rows)
    # Without a copy of the rows.
    mean = rows.mean(0, keepdim=True)
    top = torch.cat([compute_cov(rows), mean.mT], dim=1)
    return torch.cat([top, append_homog(mean)], dim=0)
