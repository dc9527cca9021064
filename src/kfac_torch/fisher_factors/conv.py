"""Both sides of a convolution: patches of its inputs, gradients of its outputs.

Notation: `P [N·T, Δ·C]` the flattened input patches, one row per example and output
location, one column per kernel offset and input channel; `S [N·T, K]` the gradients of
the summed loss with respect to the outputs. Both second moments are divided by the
number of rows `N·T`; the factor `T` that Grosse & Martens 2016 (arXiv 1602.01407, Ω and
Γ of section 3.1) have in Ω is put back by the block.

Column order: channels-last data, as in tf.contrib, is offset-major with the channel
fastest, `(u·kw + v)·C + c`; channels-first data, as in PyTorch, is channel-major,
`(c·kh + u)·kw + v`, the order of `weight.flatten(1)`. A bias column comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..patch_moments import patch_second_moment, resolve_padding
from .base import FactorOptions
from .data import TensorLike, check_choice, scope_string_from_params
from .inverse_providing import InverseProvidingFactor

Padding: TypeAlias = str | int | Sequence[int] | Sequence[tuple[int, int]]

_CONVOLUTION = "extract_convolution_patches"
_IMAGE = "extract_image_patches"
_POINTWISE = "extract_pointwise_conv2d_patches"
_EXTRACTORS = (None, _CONVOLUTION, _IMAGE, _POINTWISE)
_CHANNELS_LAST = ("NWC", "NHWC", "NDHWC")  # by number of spatial dimensions, less one
_CHANNELS_FIRST = ("NCW", "NCHW", "NCDHW")


def _is_channels_last(data_format: str | None, num_dims: int, name: str) -> bool:
    last, first = _CHANNELS_LAST[num_dims - 1], _CHANNELS_FIRST[num_dims - 1]
    check_choice(f"{name}: data_format", data_format, (None, last, first))
    return data_format != first


class ConvInputKroneckerFactor(InverseProvidingFactor):
    """The running second moment `PᵀP/(N·T)` of a convolution's input patches.

    `E[a aᵀ]` over all examples and locations; no mean is subtracted, and rows over zero
    padding count. The size is `Δ·C + has_bias`.

    Args:
        inputs: one tensor per tower, `[N, *space, C]` (channels last) or `[N, C, *space]`
            (channels first) with 1, 2 or 3 spatial dimensions; tensors, NumPy arrays,
            anything with DLPack, or callables that return one.
        filter_shape: `[*kernel, C, K]` whatever the data format; `K` has no effect.
        padding: `"SAME"` (TensorFlow's: the larger half after), `"VALID"`; or integers or
            `(before, after)` pairs, one per spatial dimension.
        strides: one per spatial dimension or None for 1; with `extract_image_patches`
            required, and in the long form `[1, *strides, 1]`.
        dilation_rate: one per spatial dimension or None for 1; with
            `extract_image_patches` in the long form.
        data_format: None or `"NWC"`, `"NHWC"`, `"NDHWC"` for channels last, `"NCW"`,
            `"NCHW"`, `"NCDHW"` for channels first. It sets the column order too.
        extract_patches_fn: None or `"extract_convolution_patches"` (any number of
            dimensions), `"extract_image_patches"` (two), or
            `"extract_pointwise_conv2d_patches"` (two, a 1x1 kernel at stride 1). They
            differ in the form of `strides` and `dilation_rate`, not in the result.
        has_bias: append a one, last, to each row.
        padding_mode: what integer padding is filled with: `"zeros"`, `"circular"`,
            `"reflect"` or `"replicate"`.
        groups: with more than one, `filter_shape` has `C/groups` input channels, and the
            moment is `[groups, n, n]`, one matrix per group.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: arguments or data that do not fit together.

    >>> x = torch.arange(1.0, 10.0).view(1, 3, 3, 1)
    >>> factor = ConvInputKroneckerFactor([x], [2, 2, 1, 1], "VALID", has_bias=True)
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.95)()
    tensor([[11.5000, 14.5000, 20.5000, 23.5000,  3.0000],
            [14.5000, 18.5000, 26.5000, 30.5000,  4.0000],
            [20.5000, 26.5000, 38.5000, 44.5000,  6.0000],
            [23.5000, 30.5000, 44.5000, 51.5000,  7.0000],
            [ 3.0000,  4.0000,  6.0000,  7.0000,  1.0000]])
    >>> factor.register_inverse(0.1)
    >>> factor.instantiate_inv_variables()
    >>> for op in factor.make_inverse_update_ops():
    ...     op()
    >>> factor.left_multiply_matpower(torch.ones(5, 1), -1, 0.1).shape
    torch.Size([5, 1])
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
            params = [inputs, filter_shape, strides, _printable(padding), dilation_rate]
            params += [data_format, has_bias]
            # Not in the lineage's name, where such factors clash.
            extras = [extract_patches_fn, padding_mode, groups]
            params += [extra for extra in extras if extra not in (None, "zeros", 1)]
            name = "ff_convinkron_" + scope_string_from_params(params)
        filter_shape = [int(size) for size in filter_shape]
        self._num_dims = len(filter_shape) - 2
        if self._num_dims not in (1, 2, 3) or min(filter_shape) < 1:
            raise ValueError(
                f"{name}: filter_shape: expected positive [*kernel, C, K] with 1, 2 or 3 "
                f"spatial dimensions, got {filter_shape}"
            )
        check_choice(f"{name}: extract_patches_fn", extract_patches_fn, _EXTRACTORS)
        if isinstance(padding, str):
            check_choice(f"{name}: padding", padding, ("SAME", "VALID"))
        if padding_mode != "zeros" and padding == "SAME":
            raise ValueError(
                f"{name}: padding_mode: {padding_mode!r} needs padding in integers or "
                'pairs; "SAME" is zero padding'
            )
        self._kernel = tuple(filter_shape[:-2])
        self._channels = filter_shape[-2] * groups
        self._channels_last = _is_channels_last(data_format, self._num_dims, name)
        self._check_extractor(extract_patches_fn, strides, name)
        if extract_patches_fn == _POINTWISE:
            dilation_rate, padding = None, "VALID"  # without effect on a 1x1 kernel
        self._stride = self._per_dim("strides", strides, extract_patches_fn, name)
        self._dilation = self._per_dim(
            "dilation_rate", dilation_rate, extract_patches_fn, name
        )
        self._padding = padding
        self._padding_mode = padding_mode
        self._groups = groups
        self._has_bias = has_bias
        super().__init__([inputs], name, options, dtype, device)

    def _check_extractor(
        self, extractor: str | None, strides: Sequence[int] | None, name: str
    ) -> None:
        if extractor in (_IMAGE, _POINTWISE) and self._num_dims != 2:
            raise ValueError(
                f"{name}: extract_patches_fn: {extractor!r} is for two spatial dimensions, "
                f"got a kernel of {self._num_dims}"
            )
        if extractor == _IMAGE and strides is None:
            raise ValueError(
                f"{name}: strides: {_IMAGE!r} needs the long form "
                f"{self._long_form('sh', 'sw')}, got None"
            )
        if extractor == _POINTWISE and (
            self._kernel != (1, 1) or (strides is not None and set(strides) != {1})
        ):
            raise ValueError(
                f"{name}: extract_patches_fn: {_POINTWISE!r} is for a 1x1 kernel at "
                f"stride 1, got kernel {self._kernel} and strides {strides}"
            )

    def _per_dim(
        self,
        argument: str,
        values: Sequence[int] | None,
        extractor: str | None,
        name: str,
    ) -> tuple[int, ...]:
        """One value per spatial dimension, from the short or the long form."""
        if values is None:
            return (1,) * self._num_dims
        values = tuple(int(value) for value in values)
        inner = values[1:-1] if self._channels_last else values[2:]
        long = len(inner) == self._num_dims and values == self._long_form(*inner)
        spatial = inner if long else values
        if (
            len(spatial) != self._num_dims
            or min(spatial) < 1
            or (extractor == _IMAGE and not long)
        ):
            letters = [f"{argument[0]}{i}" for i in range(self._num_dims)]
            raise ValueError(
                f"{name}: {argument}: expected one positive integer for each of the "
                f"{self._num_dims} spatial dimensions, or the long form "
                f"{self._long_form(*letters)} (with {_IMAGE!r} always the long form), "
                f"got {list(values)}"
            )
        return spatial

    def _long_form(self, *spatial: object) -> tuple[object, ...]:
        return (1, *spatial, 1) if self._channels_last else (1, 1, *spatial)

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        offsets = torch.Size(self._kernel).numel()
        n = offsets * self._channels // self._groups + self._has_bias
        return (n, n) if self._groups == 1 else (self._groups, n, n)

    def _check_tensor(self, *tensors: Tensor) -> None:
        tensor = self._single(tensors)
        rank = self._num_dims + 2
        if tensor.dim() != rank:
            formats = _CHANNELS_LAST if self._channels_last else _CHANNELS_FIRST
            expected = formats[self._num_dims - 1]
            raise ValueError(
                f"{self.name}: inputs: expected rank {rank} ({expected}) for a kernel "
                f"of {self._num_dims} spatial dimensions, got shape "
                f"{tuple(tensor.shape)}"
            )
        channels = tensor.shape[-1 if self._channels_last else 1]
        if channels != self._channels:
            raise ValueError(
                f"{self.name}: inputs: expected {self._channels} channels as in "
                f"filter_shape, got {channels} in shape {tuple(tensor.shape)}; check "
                "data_format"
            )
        self.num_rows(tensor)

    def _nest(self, tensors: Sequence[TensorLike]) -> Sequence[Sequence[TensorLike]]:
        return super()._nest([tensors])  # inputs have one source

    def num_rows(self, *tensors: Tensor) -> int:
        """`N·T`: examples times output locations.

        Raises:
            ValueError: the kernel is larger than the padded input.
        """
        tensor = self._single(tensors)
        space = tensor.shape[1:-1] if self._channels_last else tensor.shape[2:]
        pads = resolve_padding(
            self._padding, space, self._kernel, self._stride, self._dilation
        )
        rows = tensor.shape[0]
        for n, (before, after), k, s, d in zip(
            space, pads, self._kernel, self._stride, self._dilation, strict=True
        ):
            room = n + before + after - d * (k - 1) - 1
            if room < 0:
                raise ValueError(
                    f"{self.name}: kernel larger than the padded input: kernel "
                    f"{self._kernel} with dilation {self._dilation} does not fit into "
                    f"spatial size {tuple(space)} with padding {pads}"
                )
            rows *= room // s + 1
        return rows

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        tensor = self._single(tensors)
        if self._channels_last:
            tensor = tensor.movedim(-1, 1)
        cov = patch_second_moment(
            tensor,
            self._kernel,
            self._stride,
            self._padding,
            self._dilation,
            groups=self._groups,
            has_bias=self._has_bias,
            padding_mode=self._padding_mode,
        )
        return self._offset_major(cov) if self._channels_last else cov

    def _offset_major(self, cov: Tensor) -> Tensor:
        """Reorder rows and columns from `c·Δ + δ` to `δ·C + c`; the bias stays last."""
        channels = self._channels // self._groups
        columns = torch.arange(cov.shape[-1], device=cov.device)
        patch = columns[: len(columns) - self._has_bias]
        order = patch.view(channels, -1).T.reshape(-1)
        order = torch.cat([order, columns[len(patch) :]])
        return cov[..., order[:, None], order]


def _printable(padding: Padding) -> object:
    """The padding in a form that can stand in a name."""
    if isinstance(padding, str | int):
        return padding
    flat = [
        side
        for pair in padding
        for side in (pair if isinstance(pair, Sequence) else [pair])
    ]
    return flat


class ConvOutputKroneckerFactor(InverseProvidingFactor):
    """The running second moment `SᵀS/(N·T)` of a convolution's output gradients.

    Args:
        outputs_grads: `[source][tower]`, gradients of the summed loss with respect to the
            outputs: `[N, *space, K]` (channels last) or `[N, K, *space]`.
        data_format: None or a channels-last string (`"NHWC"`, ...), or a channels-first
            one (`"NCHW"`, ...).
        num_channels: `K`; needed only where `outputs_grads` are callables.
        groups: with more than one the moment is `[groups, K/groups, K/groups]`, one
            matrix per group of channels.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: an unknown data format, or data of another rank or size.

    >>> grads = torch.arange(1.0, 17.0).view(2, 2, 2, 2)
    >>> factor = ConvOutputKroneckerFactor([[grads]])
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.95)()
    tensor([[ 85.,  93.],
            [ 93., 102.]])
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
            name = "ff_convoutkron_" + scope_string_from_params([flat, data_format])
        known = (None, *_CHANNELS_LAST, *_CHANNELS_FIRST)
        check_choice(f"{name}: data_format", data_format, known)
        self._channel_dim = 1 if data_format in _CHANNELS_FIRST else -1
        self._rank = None if data_format is None else len(data_format)
        first = outputs_grads[0][0] if outputs_grads and outputs_grads[0] else None
        if num_channels is None:
            if not hasattr(first, "shape") or len(first.shape) < 3:
                raise ValueError(
                    f"{name}: outputs_grads: expected tensors [N, *space, K] (or the "
                    "channels-first form), or num_channels= where they are callables, "
                    f"got {type(first).__name__}"
                )
            num_channels = first.shape[self._channel_dim]
        self._num_channels = num_channels
        self._groups = groups
        super().__init__(outputs_grads, name, options, dtype, device)

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        size = self._num_channels // self._groups
        return (size, size) if self._groups == 1 else (self._groups, size, size)

    def _check_tensor(self, *tensors: Tensor) -> None:
        tensor = self._single(tensors)
        rank = self._rank or max(3, min(tensor.dim(), 5))
        if tensor.dim() != rank or tensor.shape[self._channel_dim] != self._num_channels:
            where = "second" if self._channel_dim == 1 else "last"
            raise ValueError(
                f"{self.name}: outputs_grads: expected rank {rank} with "
                f"{self._num_channels} channels in the {where} dimension, got shape "
                f"{tuple(tensor.shape)}"
            )

    def num_rows(self, *tensors: Tensor) -> int:
        """`N·T`: examples times locations."""
        tensor = self._single(tensors)
        return tensor.numel() // self._num_channels

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        tensor = self._single(tensors)
        # The patches of a 1x1 kernel are the rows themselves.
        return patch_second_moment(tensor.movedim(self._channel_dim, 1), 1, groups=self._groups)
