"""Blocks of a convolution: KFC's Kronecker product, or a diagonal.

`F = T · A ⊗ G` with `A` the second moment of the input patches and `G` that of the
gradients of the summed loss at the outputs, both over examples and locations, and `T`
the locations per loss term (Grosse & Martens 2016, arXiv 1602.01407, Theorem 1: spatial
homogeneity, independent activations and derivatives, uncorrelated derivatives). With
groups there is one such product per group; a depthwise convolution has one per channel.

The diagonal is exact: the mean over examples of the squared gradient of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..fisher_factors import (
    ConvDiagonalFactor,
    ConvInputSUAKroneckerFactor,
    FactorOptions,
)
from ..size_limit import SizeLimit
from .base import accumulation_dtype, no_data
from .kronecker import KroneckerProductFB
from .layer import LayerFactorFB, LayerFB
from .sides import conv_input_side, conv_output_side

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvFB(LayerFB):
    """A block of a convolution (abstract): what its factors have to know of the layer."""

    layer_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def _filter_shape(self) -> list[int]:
        """`[*kernel, C, K]`, the input channels those of one group."""
        conv = self.module
        return [*conv.kernel_size, conv.in_channels // conv.groups, conv.out_channels]

    def _stride(self) -> Sequence[int]:
        return self.module.stride

    def _padding(self) -> list[tuple[int, int]]:
        return explicit_padding(self.module)


class ConvKFCBasicFB(ConvFB, KroneckerProductFB):
    """The Kronecker block of a convolution, with or without a bias and groups.

    Any stride, dilation, padding and `padding_mode`. The rows of `V [in(+1), out]` are in
    the order of `weight.flatten(1)`: channel-major; with groups `V [groups, in(+1),
    out]`.

    Args:
        module: the layer, or several that share all their parameters.
        name: of the layer, for messages and checkpoints.
        options: of the factors.
        sua_approx_for_input: take activations as spatially uncorrelated (Theorem 4); that
            side stays as it is whatever its size.
        size_limit: what sides above a size become; None for none.

    Raises:
        TypeError: a module of another type.
        ValueError: spatially uncorrelated activations with groups.
        RuntimeError: use before `instantiate_factors`.

    >>> import torch
    >>> block = ConvKFCBasicFB(nn.Conv2d(2, 3, 3, padding=1))
    >>> block.instantiate_factors(damping=0.1)
    >>> x, g = torch.ones(8, 2, 5, 5), torch.ones(8, 3, 5, 5)
    >>> block.accumulate(block.moments([x], [[g]], num_terms=8), decay=0.95)
    >>> block.num_locations, tuple(block.full_fisher_block().shape)
    (25.0, (57, 57))
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        sua_approx_for_input: bool = False,
        size_limit: SizeLimit | None = None,
    ) -> None:
        self.size_limit = size_limit
        super().__init__(module, name, options)
        self.groups = self.module.groups
        self._sua = sua_approx_for_input
        if self._sua and self.groups != 1:
            raise ValueError(
                f"layer {self.name}: expected groups=1 for the approximation of spatially "
                f"uncorrelated activations, got {self.module}"
            )

    def _make_factors(self) -> tuple[Any, Any]:
        conv = self.module
        common = conv_factor_kwargs(conv, self.options)
        name = f"{self.name}.input"
        if self._sua:
            A = ConvInputSUAKroneckerFactor(
                [no_data(name)],
                self._filter_shape(),
                self._padding(),
                self._stride(),
                conv.dilation,
                data_format(conv),
                has_bias=self.has_bias,
                name=name,
                **common,
            )
        else:
            num_offsets = math.prod(conv.kernel_size)
            kind, extra = conv_input_side(
                conv.in_channels // conv.groups, num_offsets, self.has_bias, self.size_limit
            )
            A = kind(
                [no_data(name)],
                self._filter_shape(),
                self._padding(),
                self._stride(),
                conv.dilation,
                data_format(conv),
                has_bias=self.has_bias,
                padding_mode=conv.padding_mode,
                groups=conv.groups,
                name=name,
                **extra,
                **common,
            )
        out_channels = conv.out_channels // conv.groups
        kind, extra = conv_output_side(out_channels, self.size_limit)
        G = kind(
            [[no_data(f"{self.name}.output")]],
            data_format(conv),
            num_channels=conv.out_channels,
            groups=conv.groups,
            name=f"{self.name}.output",
            **extra,
            **common,
        )
        return A, G


class ConvDiagonalFB(ConvFB, LayerFactorFB):
    """The exact diagonal of a convolution's block, with or without a bias and groups.

    `V [in(+1), out]` whatever the groups: a diagonal has no products between channels.
    The rows of `in` are those of one group, each output's own.

    Args:
        module: the layer, or several that share all their parameters.
        name: of the layer, for messages and checkpoints.
        options: of the factors.

    Raises:
        TypeError: a module of another type.
        NotImplementedError: a layer that is called several times in a forward.

    >>> import torch
    >>> block = ConvDiagonalFB(nn.Conv2d(4, 2, 3, groups=2))
    >>> block.instantiate_factors(damping=0.1)
    >>> x, g = torch.ones(8, 4, 5, 5), torch.ones(8, 2, 3, 3)
    >>> block.accumulate(block.moments([x], [[g]], num_terms=8), decay=0.95)
    >>> tuple(block.factors[0].get_cov_var().shape)
    (19, 2)
    """

    def _make_factors(self) -> tuple[Any, ...]:
        conv = self.module
        name = f"{self.name}.weight"
        factor = ConvDiagonalFactor(
            [no_data(name)],
            [[no_data(name)]],
            self._filter_shape(),
            self._stride(),
            self._padding(),
            data_format(conv),
            conv.dilation,
            has_bias=self.has_bias,
            padding_mode=conv.padding_mode,
            groups=conv.groups,
            name=name,
            **conv_factor_kwargs(conv, self.options),
        )
        return (factor,)

    def grad_moments(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], num_terms: float
    ) -> list[Tensor]:
        """Return the diagonal."""
        if len(inputs) > 1:
            raise NotImplementedError(
                f"layer {self.name}: the diagonal of a convolution is for one call in a "
                f'forward, got {len(inputs)}; register it with "kron_indep" or "kron"'
            )
        return [self._factor().summed_cov(inputs[0], grads[0])]


def _check_depthwise(conv: Any, name: str) -> None:
    if conv.groups != conv.in_channels:
        raise ValueError(
            f"layer {name}: expected a depthwise convolution (groups=in_channels), "
            f"got {conv}"
        )


class DepthwiseConvKFCBasicFB(ConvKFCBasicFB):
    """The Kronecker block of a depthwise convolution: one product per input channel.

    Args:
        module: the layer, with as many groups as input channels.
        name: of the layer, for messages and checkpoints.
        options: of the factors.
        size_limit: what sides above a size become; None for none.

    Raises:
        TypeError: a module of another type.
        ValueError: a convolution that is not depthwise.

    >>> DepthwiseConvKFCBasicFB(nn.Conv2d(4, 2, 3, groups=2), "conv")
    Traceback (most recent call last):
    ValueError: layer conv: expected a depthwise convolution (groups=in_channels), got ...
    """

    def __init__(
        self,
        module: nn.Module,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        size_limit: SizeLimit | None = None,
    ) -> None:
        super().__init__(module, name, options, size_limit=size_limit)
        _check_depthwise(self.module, self.name)


class DepthwiseConvDiagonalFB(ConvDiagonalFB):
    """The exact diagonal of a depthwise convolution's block.

    Arguments and errors as `DepthwiseConvKFCBasicFB`, without `size_limit`.

    >>> block = DepthwiseConvDiagonalFB(nn.Conv2d(2, 6, 3, groups=2))
    >>> block.instantiate_factors(damping=0.1)
    >>> tuple(block.factors[0].get_cov_var().shape)
    (10, 6)
    """

    def __init__(
        self,
        module: nn.Module,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
    ) -> None:
        super().__init__(module, name, options)
        _check_depthwise(self.module, self.name)


def conv_factor_kwargs(conv: Conv, options: FactorOptions) -> dict[str, Any]:
    """Return what all factors of a convolution are made with."""
    weight = conv.weight
    return {
        "options": options,
        "dtype": accumulation_dtype(weight),
        "device": weight.device,
    }


def data_format(conv: Conv) -> str:
    """Return PyTorch's layout by its name, channels first."""
    return {1: "NCW", 2: "NCHW", 3: "NCDHW"}[conv.weight.dim() - 2]


def explicit_padding(conv: Conv) -> list[tuple[int, int]]:
    """Return the `(before, after)` padding of each dimension; strings resolved.

    >>> explicit_padding(nn.Conv1d(1, 1, 4, padding="same"))
    [(1, 2)]
    """
    if conv.padding == "valid":
        return [(0, 0) for _ in conv.kernel_size]
    if conv.padding == "same":  # PyTorch allows it at stride 1 alone
        sizes = zip(conv.kernel_size, conv.dilation, strict=True)
        totals = [d * (k - 1) for k, d in sizes]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(side), int(side)) for side in conv.padding]
