"""The diagonals of both sides of a convolution, without forming patches.

Notation: `P [N·T, Δ·C]` the input patches and `S [N·T, K]` the output gradients, as in
`conv.py`; `diag(PᵀP)/(N·T)` and `diag(SᵀS)/(N·T)`. Entry (c, u) of the first is the sum
over locations of the squared input that kernel offset u meets, so that the squares can be
summed over the examples before there are any patches: the cost is that of the patches of
one image. Left out: sub-sampling, which saves nothing here, and masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import FactorOptions
from .conv_geometry import ConvGeometry, Padding, is_channels_first, printable
from .data import TensorLike, last_size, scope_string_from_params
from .diagonal_kronecker import DiagonalSideFactor


class ConvInputDiagonalKroneckerFactor(DiagonalSideFactor):
    """The diagonal of a convolution's input factor: mean squares of patch entries.

    Stored as `[ΔC(+1)]`, or `[groups, ΔC(+1)]` with the sizes of one group.

    Args:
        inputs: this and the others up to `has_bias` as `ConvInputKroneckerFactor`.
        filter_shape: see there.
        padding: see there.
        strides: see there.
        dilation_rate: see there.
        data_format: see there.
        extract_patches_fn: see there.
        has_bias: append a one, last, to each row.
        padding_mode: as `ConvInputKroneckerFactor`.
        groups: see there.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: arguments or data that do not fit together.

    >>> x = torch.arange(1.0, 10.0).view(1, 3, 3, 1)
    >>> factor = ConvInputDiagonalKroneckerFactor(
    ...     [x], [2, 2, 1, 1], "VALID", has_bias=True
    ... )
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.95)()
    tensor([11.5000, 18.5000, 38.5000, 51.5000,  1.0000])
    """

    def __init__(
        self,
        inputs: Sequence[TensorLike],
        filter_shape: Sequence[int],
        padding: Padding,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        extract_patches_fn: str | None = None,
        has_bias: bool = False,
        *,
        padding_mode: str = "zeros",
        groups: int = 1,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if name is None:
            params = [inputs, filter_shape, strides, printable(padding), dilation_rate]
            params += [data_format, extract_patches_fn, has_bias, padding_mode, groups]
            name = "ff_convindiag_" + scope_string_from_params(params)
        self._conv = ConvGeometry.make(
            name,
            filter_shape,
            padding,
            strides,
            dilation_rate,
            data_format,
            extract_patches_fn,
            padding_mode,
            groups,
        )
        self._has_bias = has_bias
        super().__init__([inputs], name, options, dtype, device)

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        n, groups = self._conv.columns + self._has_bias, self._conv.groups
        return (n,) if groups == 1 else (groups, n)

    def _check_tensor(self, *tensors: Tensor) -> None:
        self._conv.check_inputs(self._single(tensors))

    def _nest(self, tensors: Sequence[TensorLike]) -> Sequence[Sequence[TensorLike]]:
        return super()._nest([tensors])  # inputs have one source

    def num_rows(self, *tensors: Tensor) -> int:
        """`N·T`: examples times output locations."""
        return self._conv.num_rows(self._single(tensors))

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        conv, inputs = self._conv, self._single(tensors)
        squares = inputs.to(self._dtype).square().sum(0, keepdim=True)
        # Padding, of whatever mode, commutes with squares and sums over examples.
        patches = conv.patches(squares)  # [1, groups·C, *kernel, *out]
        diagonal = patches.flatten(2 + len(conv.kernel)).sum(-1)
        diagonal = diagonal.reshape(conv.groups, -1).div_(conv.num_rows(inputs))
        if self._has_bias:
            diagonal = torch.cat([diagonal, diagonal.new_ones(conv.groups, 1)], dim=1)
        return conv.in_order(diagonal, (-1,)).view(self._cov_shape)


class ConvOutputDiagonalKroneckerFactor(DiagonalSideFactor):
    """The diagonal of a convolution's output factor: mean squares of its gradients.

    Stored as `[K]`, or `[groups, K/groups]`.

    Args:
        outputs_grads: this and the others up to `groups` as `ConvOutputKroneckerFactor`.
        data_format: see there.
        num_channels: see there.
        groups: see there.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: an unknown data format, or data of another rank or size.

    >>> grads = torch.arange(1.0, 17.0).view(2, 2, 2, 2)
    >>> factor = ConvOutputDiagonalKroneckerFactor([[grads]])
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.95)()
    tensor([ 85., 102.])
    """

    def __init__(
        self,
        outputs_grads: Sequence[Sequence[TensorLike]],
        data_format: str | None = None,
        *,
        num_channels: int | None = None,
        groups: int = 1,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if name is None:
            flat = [tensor for towers in outputs_grads for tensor in towers]
            name = "ff_convoutdiag_" + scope_string_from_params([flat, data_format])
        self._channel_dim = 1 if is_channels_first(data_format, name) else -1
        dim = self._channel_dim
        self._num_channels = last_size(outputs_grads, num_channels, name, dim)
        self._groups = groups
        super().__init__(outputs_grads, name, options, dtype, device)

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        size = self._num_channels // self._groups
        return (size,) if self._groups == 1 else (self._groups, size)

    def _check_tensor(self, *tensors: Tensor) -> None:
        tensor, dim = self._single(tensors), self._channel_dim
        if not 3 <= tensor.dim() <= 5 or tensor.shape[dim] != self._num_channels:
            where = "second" if dim == 1 else "last"
            raise ValueError(
                f"{self.name}: outputs_grads: expected [N, *space] with "
                f"{self._num_channels} channels in the {where} dimension, got shape "
                f"{tuple(tensor.shape)}"
            )

    def num_rows(self, *tensors: Tensor) -> int:
        """`N·T`: examples times locations."""
        return self._single(tensors).numel() // self._num_channels

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        tensor = self._single(tensors)
        rows = [
            dim for dim in range(tensor.dim()) if dim != self._channel_dim % tensor.dim()
        ]
        squares = tensor.to(self._dtype).square().sum(rows)
        return squares.div_(self.num_rows(tensor)).view(self._cov_shape)
