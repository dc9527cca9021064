"""Both sides of a convolution with several uses: patches and gradients of all of them.

Notation: as `recurrent.py`, with rows for uses, examples and locations: `[T·B·locations,
·]`. A row of lag 1 pairs one location at two successive uses. Left out: groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import FactorOptions
from .conv_geometry import ConvGeometry, Padding, is_channels_first, printable
from .data import Entry, append_homog, last_size, name_of_uses
from .recurrent import FullyConnectedMultiKF, MultiUseFactor


class ConvInputMultiKF(MultiUseFactor):
    """The input side of a convolution with several uses: `C0` and `C1` of its patches.

    A row of lag 1 pairs the patches of one location at two successive uses.

    Args:
        tensors: one entry per tower: `[T·B, *space, C]` (or channels first), use-major,
            or a list of T tensors.
        filter_shape: this and the others up to `has_bias` as `ConvInputKroneckerFactor`.
        padding: see there.
        num_uses: `T`; needed for one tensor per tower if `C1` is kept.
        strides: see there.
        dilation_rate: see there.
        data_format: see there.
        extract_patches_fn: see there.
        has_bias: append a one, last, to each row.
        padding_mode: see there.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: arguments or data that do not fit together.
    """

    def __init__(
        self,
        tensors: Sequence[Entry],
        filter_shape: Sequence[int],
        padding: Padding,
        num_uses: int | None = None,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        extract_patches_fn: str | None = None,
        has_bias: bool = False,
        *,
        padding_mode: str = "zeros",
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if name is None:
            params: list[Any] = [num_uses, filter_shape, strides, printable(padding)]
            params += [dilation_rate, data_format, extract_patches_fn, has_bias]
            name = name_of_uses("ff_convinmulti_", [tensors], params)
        self._conv = ConvGeometry.make(
            name,
            filter_shape,
            padding,
            strides,
            dilation_rate,
            data_format,
            extract_patches_fn,
            padding_mode,
        )
        self._has_bias = has_bias
        super().__init__([tensors], num_uses, name, options, dtype, device)

    @property
    def _matrix_shape(self) -> tuple[int, ...]:
        n = self._conv.columns + self._has_bias
        return (n, n)

    def _nest(self, tensors: Sequence[Entry]) -> Sequence[Sequence[Entry]]:
        return super()._nest([tensors])  # inputs have one source

    def _check_use(self, tensor: Tensor) -> None:
        self._conv.check_inputs(tensor)

    def _num_rows(self, tensor: Tensor) -> int:
        return self._conv.num_rows(tensor)

    def _moment(self, tensor: Tensor) -> Tensor:
        return self._conv.moment(tensor, self._has_bias)

    def _cross_moment(self, future: Tensor, past: Tensor) -> Tensor:
        conv = self._conv
        total = torch.zeros(self._matrix_shape, dtype=self._dtype, device=future.device)
        views = [conv.patches(x) for x in (future, past)]
        for n, o in conv.pieces(future):
            F, P = (conv.rows(view, n, o, self._dtype) for view in views)
            if self._has_bias:
                F, P = append_homog(F), append_homog(P)
            total.addmm_(F.mT, P)
        return conv.in_order(total.div_(conv.num_rows(future)), (-2, -1))


class ConvOutputMultiKF(FullyConnectedMultiKF):
    """The output side of a convolution with several uses: rows are uses and locations.

    Args:
        tensors: `[source][tower]`, each `[T·B, *space, K]` (or channels first),
            use-major, or a list of T tensors.
        num_uses: `T`; needed for one tensor per tower if `C1` is kept.
        data_format: None or `"NHWC"`, ... for channels last, `"NCHW"`, ... for first.
        num_channels: `K`; needed only where `tensors` are callables.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: an unknown data format, or data that do not fit.
    """

    def __init__(
        self,
        tensors: Sequence[Sequence[Entry]],
        num_uses: int | None = None,
        data_format: str | None = None,
        *,
        num_channels: int | None = None,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if name is None:
            name = name_of_uses("ff_convoutmulti_", tensors, [num_uses, data_format])
        self._channel_dim = 1 if is_channels_first(data_format, name) else -1
        super().__init__(
            tensors,
            num_uses,
            size=last_size(tensors, num_channels, name, self._channel_dim),
            name=name,
            options=options,
            dtype=dtype,
            device=device,
        )

    def _check_use(self, tensor: Tensor) -> None:
        if not 3 <= tensor.dim() <= 5 or tensor.shape[self._channel_dim] != self._size:
            where = "second" if self._channel_dim == 1 else "last"
            raise ValueError(
                f"{self.name}: expected [T·B, *space] with {self._size} channels in the "
                f"{where} dimension, got shape {tuple(tensor.shape)}"
            )

    def _moment(self, tensor: Tensor) -> Tensor:
        return super()._moment(tensor.movedim(self._channel_dim, -1))

    def _cross_moment(self, future: Tensor, past: Tensor) -> Tensor:
        dim = self._channel_dim
        return super()._cross_moment(future.movedim(dim, -1), past.movedim(dim, -1))
