"""`ConvDiagonalFactor`: the mean squared gradient of a convolution, exact per example.

Notation: `p_nt` the patch at location t of example n, `g_nt [K]` the gradient of the
summed loss at that output. The gradient of one example is `Σ_t p_nt g_ntᵀ`, and

    D = (1/N) Σ_n (Σ_t p_nt g_ntᵀ)²        (elementwise square)

over the N examples, not the N·T rows. Patches are formed piece by piece. Left out:
stored inverses, as in `diagonal.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import FactorOptions
from .conv_geometry import ConvGeometry, Padding, printable
from .data import TensorLike
from .diagonal import GRADIENT_BYTES, DiagonalFactor, name_of_pair, pair_towers


class ConvDiagonalFactor(DiagonalFactor):
    """The mean over examples of the squared gradient of a convolution.

    Stored as `[Δ·C(+1), K]`, the bias in the last row; the rows are in the order of the
    patches (see `ConvInputKroneckerFactor`).

    Args:
        inputs: one tensor per tower, `[N, *space, C]` (channels last) or `[N, C, *space]`.
        outputs_grads: `[source][tower]`, gradients of the summed loss with respect to the
            outputs: `[N, *out, K]` or `[N, K, *out]`.
        filter_shape: `[*kernel, C, K]` whatever the data format.
        strides: one per spatial dimension, or in the long form `[1, *strides, 1]`, or
            None for 1.
        padding: as for `ConvInputKroneckerFactor`.
        data_format: None or `"NHWC"`, ... for channels last, `"NCHW"`, ... for first.
        dilations: as `strides`.
        has_bias: whether the layer has a bias.
        padding_mode: what integer padding is filled with.
        groups: with more than one, `filter_shape` has `C/groups` input channels, and
            column k of the result belongs to the inputs of k's group. A depthwise
            convolution has as many groups as input channels.
        patch_mask: `[*kernel, C]`, multiplies every patch.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: arguments or data that do not fit together.

    >>> x = torch.arange(1.0, 10.0).view(1, 3, 3, 1)
    >>> g = torch.tensor([1.0, -1.0, 2.0, 0.5]).view(1, 2, 2, 1)
    >>> factor = ConvDiagonalFactor([x], [[g]], [2, 2, 1, 1], None, "VALID", has_bias=True)
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.0)().T
    tensor([[ 90.2500, 144.0000, 289.0000, 380.2500,   6.2500]])
    """

    def __init__(
        self,
        inputs: Sequence[TensorLike],
        outputs_grads: Sequence[Sequence[TensorLike]],
        filter_shape: Sequence[int],
        strides: Sequence[int] | None,
        padding: Padding,
        data_format: str | None = None,
        dilations: Sequence[int] | None = None,
        has_bias: bool = False,
        *,
        padding_mode: str = "zeros",
        groups: int = 1,
        patch_mask: Any = None,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if name is None:
            params = [filter_shape, strides, printable(padding), data_format, dilations]
            params += [has_bias, padding_mode, groups]
            name = "ff_convdiag_" + name_of_pair(inputs, outputs_grads, params)
        tensors = pair_towers(inputs, outputs_grads, name)
        self._conv = ConvGeometry.make(
            name,
            filter_shape,
            padding,
            strides,
            dilations,
            data_format,
            padding_mode=padding_mode,
            groups=groups,
        )
        self._out_channels = int(filter_shape[-1])
        if self._out_channels % groups:
            raise ValueError(
                f"{name}: groups: expected a divisor of the {self._out_channels} output "
                f"channels in filter_shape, got {groups}"
            )
        self._has_bias = has_bias
        self._mask = None
        if patch_mask is not None:
            self._mask = self._conv.flatten_mask(patch_mask, has_bias)
        super().__init__(tensors, name, options, dtype, device)

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        return (self._conv.columns + self._has_bias, self._out_channels)

    def _check_tensor(self, *tensors: Tensor) -> None:
        if len(tensors) != 2:
            raise ValueError(
                f"{self.name}: expected (inputs, outputs_grads) per tower, got "
                f"{len(tensors)} tensor(s)"
            )
        inputs, grads = tensors
        self._conv.check_inputs(inputs)
        space = self._conv.out_space(inputs)
        out = (self._out_channels,)
        shape = (*space, *out) if self._conv.channels_last else (*out, *space)
        if grads.shape != (inputs.shape[0], *shape):
            raise ValueError(
                f"{self.name}: outputs_grads: expected shape {(inputs.shape[0], *shape)} "
                f"for inputs of shape {tuple(inputs.shape)}, got {tuple(grads.shape)}"
            )

    def num_rows(self, *tensors: Tensor) -> int:
        """`N`: the examples."""
        return tensors[0].shape[0]

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        inputs, grads = tensors
        return self._summed_cov(inputs, grads.unsqueeze(0))

    def _summed_cov(self, *tensors: Tensor) -> Tensor:
        conv, (inputs, grads) = self._conv, tensors
        total = torch.zeros(self._cov_shape, dtype=self._dtype, device=inputs.device)
        for some, some_grads in self.split_examples(inputs, grads):
            total += self._sum_of_squares(some, some_grads)
        total = conv.in_order(total.div_(len(inputs)), [0])
        if self._mask is not None:
            total *= self._mask.to(total).square().unsqueeze(1)
        return total

    def _sum_of_squares(self, inputs: Tensor, grads: Tensor) -> Tensor:
        """Sum of squared gradients of few examples; `grads [N, groups, K', *out, S]`."""
        total = self.example_gradients(inputs, grads).square_().sum((0, 4))
        return total.transpose(0, 1).flatten(1)

    def example_gradients(self, inputs: Tensor, grads: Tensor) -> Tensor:
        """Return the gradients of few examples, `[N, groups, columns(+1), K', S]`.

        Columns are channel-major. `grads [N, groups, K', *out, S]`.
        """
        conv, dtype = self._conv, self._dtype
        N, S = len(inputs), grads.shape[-1]
        size = self._out_channels // conv.groups
        shape = (N, conv.groups, conv.columns + self._has_bias, size * S)
        weights = torch.zeros(shape, dtype=dtype, device=inputs.device)
        patches = conv.patches(inputs)
        first = 2 + len(conv.kernel)  # of the output dimensions
        for n, o in conv.pieces(inputs):
            P = patches[(n, *[slice(None)] * (first - 1), o)].to(dtype)
            P = P.reshape(len(P) * conv.groups, conv.columns, -1)
            g = grads[n, :, :, o].to(dtype).movedim(2, -2).flatten(2, -3)
            rows = g.reshape(len(P), -1, size * S)  # [N·groups, locations, K'·S]
            weights[n].flatten(0, 1)[:, : conv.columns].baddbmm_(P, rows)
        if self._has_bias:
            bias = grads.to(dtype).sum(tuple(range(3, grads.dim() - 1)))
            weights[:, :, -1] = bias.flatten(2)
        return weights.unflatten(3, (size, S))

    def split_examples(
        self, inputs: Tensor, grads: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield few examples at a time, as `example_gradients` takes them.

        `grads [S, N, *output]`, as many examples as have their gradients in one buffer.
        """
        conv = self._conv
        channel_dim = -1 if conv.channels_last else 2
        grads = grads.movedim(channel_dim, 1).movedim(0, -1)  # [K, N, *out, S]
        grads = grads.unflatten(0, (conv.groups, -1)).movedim(2, 0)  # [N, groups, K', ...]
        width = torch.Size(self._cov_shape).numel() * grads.shape[-1]
        step = max(1, GRADIENT_BYTES // (width * self._dtype.itemsize))
        yield from zip(inputs.split(step), grads.split(step), strict=True)
