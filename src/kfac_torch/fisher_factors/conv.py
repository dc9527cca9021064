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

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..patch_moments import patch_second_moment
from .base import FactorOptions, SubSampling
from .conv_geometry import ConvGeometry, Padding, is_channels_first, printable
from .data import TensorLike, append_homog, compute_cov, scope_string_from_params
from .inverse_providing import InverseProvidingFactor


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
        sub_sample_inputs: the fraction of examples that each update draws; as
            `options.sub_sampling` says if None.
        sub_sample_patches: the most patches that each update draws for each column; as
            `options.sub_sampling` says if None.
        patch_mask: `[*kernel, C]`, multiplies every patch.
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
        sub_sample_inputs: float | None = None,
        sub_sample_patches: float | None = None,
        patch_mask: Any = None,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if name is None:
            params = [inputs, filter_shape, strides, printable(padding), dilation_rate]
            params += [data_format, has_bias]
            # Not in the lineage's name, where such factors clash.
            extras = [extract_patches_fn, padding_mode, groups]
            params += [extra for extra in extras if extra not in (None, "zeros", 1)]
            parts = [("examples", sub_sample_inputs), ("patches", sub_sample_patches)]
            params += [f"{what}{part}" for what, part in parts if part is not None]
            params += [] if patch_mask is None else ["masked"]
            name = "ff_convinkron_" + scope_string_from_params(params)
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
        self._mask = None
        if patch_mask is not None:
            self._mask = self._conv.flatten_mask(patch_mask, has_bias)
        self._sub_sampling = _sub_sampling(
            options.sub_sampling, sub_sample_inputs, sub_sample_patches
        )
        self._generator = None
        if (self._sub_sampling.inputs, self._sub_sampling.patches) != (None, None):
            self._generator = torch.Generator().manual_seed(self._sub_sampling.seed)
        super().__init__([inputs], name, options, dtype, device)

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        n, groups = self._conv.columns + self._has_bias, self._conv.groups
        return (n, n) if groups == 1 else (groups, n, n)

    def _check_tensor(self, *tensors: Tensor) -> None:
        self._conv.check_inputs(self._single(tensors))

    def _nest(self, tensors: Sequence[TensorLike]) -> Sequence[Sequence[TensorLike]]:
        return super()._nest([tensors])  # inputs have one source

    def num_rows(self, *tensors: Tensor) -> int:
        """`N·T`: examples times output locations."""
        return self._conv.num_rows(self._single(tensors))

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        tensor = self._single(tensors)
        sampling, columns = self._sub_sampling, self._conv.columns
        if sampling.inputs is not None:
            kept = math.ceil(sampling.inputs * len(tensor))
            tensor = tensor[self._draw(len(tensor), kept).to(tensor.device)]
        num_patches = limit = self._conv.num_rows(tensor)
        if sampling.patches is not None:
            limit = min(sampling.max_patches, math.ceil(sampling.patches * columns))
        if limit < num_patches:
            moment = self._moment_of_some(tensor, self._draw(num_patches, limit))
        else:
            moment = self._moment(tensor)
        return moment if self._mask is None else self._masked(moment, self._mask)

    def _moment(self, inputs: Tensor) -> Tensor:
        """The moment of all patches."""
        return self._conv.moment(inputs, self._has_bias)

    def _masked(self, moment: Tensor, mask: Tensor) -> Tensor:
        """The moment of masked patches, which are never formed."""
        mask = mask.to(moment)
        return moment.mul_(mask.outer(mask))

    def _draw(self, population: int, number: int) -> Tensor:
        return torch.randperm(population, generator=self._generator)[:number]

    def _moment_of_some(self, inputs: Tensor, chosen: Tensor) -> Tensor:
        """The moment of the chosen rows alone; the others are not formed."""
        conv = self._conv
        rows = conv.some_rows(inputs, chosen).to(self._dtype)
        rows = rows.unflatten(1, (conv.groups, conv.columns)).transpose(0, 1)
        rows = append_homog(rows) if self._has_bias else rows
        rows = conv.in_order(rows, (-1,))
        return self._moment_of_rows(rows if conv.groups > 1 else rows[0])

    def _moment_of_rows(self, rows: Tensor) -> Tensor:
        """The moment of rows `[..., R, n]`, the one of a bias among the columns."""
        return compute_cov(rows, normalizer=rows.shape[-2])

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to restore the factor bit for bit."""
        generator = self._generator
        state = None if generator is None else generator.get_state()
        return {**super().state_dict(), "generator": state}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError where `load_state_dict` would not fit; changes nothing."""
        super().check_state_dict(state)
        samples = self._generator is not None
        if samples != (state["generator"] is not None):
            which = "with" if samples else "without"
            raise ValueError(
                f"{self.name}: expected the state of a factor {which} sub-sampling; make "
                "it with the same options before loading"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, after the same registrations.

        Raises:
            ValueError: the state of another factor; nothing is changed then.
        """
        super().load_state_dict(state)
        if self._generator is not None:
            self._generator.set_state(state["generator"].cpu())


def _sub_sampling(
    options: SubSampling | None, inputs: float | None, patches: float | None
) -> SubSampling:
    """The options, where the arguments do not say otherwise."""
    options = options or SubSampling()
    return replace(
        options,
        inputs=options.inputs if inputs is None else inputs,
        patches=options.patches if patches is None else patches,
    )


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
        self._channel_dim = 1 if is_channels_first(data_format, name) else -1
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
        return patch_second_moment(
            tensor.movedim(self._channel_dim, 1), 1, groups=self._groups
        )
