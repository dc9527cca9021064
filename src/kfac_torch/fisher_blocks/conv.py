"""`ConvKFCBasicFB`: the KFC block of an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.

`F = T · A ⊗ G` with `A` the second moment of the input patches and `G` that of the
gradients of the summed loss at the outputs, both over examples and locations, and `T`
the locations per loss term (Grosse & Martens 2016, arXiv 1602.01407, Theorem 1: spatial
homogeneity, independent activations and derivatives, uncorrelated derivatives).
Left out: groups.
"""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

from ..fisher_factors import (
    ConvInputKroneckerFactor,
    ConvOutputKroneckerFactor,
    InverseProvidingFactor,
)
from .base import KroneckerProductFB, accumulation_dtype, no_data

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvKFCBasicFB(KroneckerProductFB):
    """The Kronecker block of a convolution, with or without a bias, without groups.

    Any stride, dilation, padding and `padding_mode`. The rows of `V [in(+1), out]` are in
    the order of `weight.flatten(1)`: channel-major.

    Args:
        module: the layer.
        name: of the layer, for messages and checkpoints.
        options: of the factors.

    Raises:
        TypeError: a module of another type.
        ValueError: a grouped convolution.
        RuntimeError: use before `instantiate_factors`.

    >>> import torch
    >>> block = ConvKFCBasicFB(nn.Conv2d(2, 3, 3, padding=1))
    >>> block.instantiate_factors(damping=0.1)
    >>> x, g = torch.ones(8, 2, 5, 5), torch.ones(8, 3, 5, 5)
    >>> block.accumulate(block.moments([x], [[g]]), num_terms=8, decay=0.95)
    >>> block.num_locations, tuple(block.full_fisher_block().shape)
    (25.0, (57, 57))
    """

    layer_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def _make_factors(self) -> tuple[InverseProvidingFactor, InverseProvidingFactor]:
        conv = self.module
        assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if conv.groups != 1:
            raise ValueError(f"layer {self.name}: expected groups=1, got {conv}")
        weight = conv.weight
        data_format = {1: "NCW", 2: "NCHW", 3: "NCDHW"}[weight.dim() - 2]
        common = {
            "options": self._options,
            "dtype": accumulation_dtype(weight),
            "device": weight.device,
        }
        A = ConvInputKroneckerFactor(
            [no_data(f"{self.name}.input")],
            [*conv.kernel_size, conv.in_channels, conv.out_channels],
            explicit_padding(conv),
            conv.stride,
            conv.dilation,
            data_format,
            has_bias=self.has_bias,
            padding_mode=conv.padding_mode,
            name=f"{self.name}.input",
            **common,
        )
        G = ConvOutputKroneckerFactor(
            [[no_data(f"{self.name}.output")]],
            data_format,
            num_channels=conv.out_channels,
            name=f"{self.name}.output",
            **common,
        )
        return A, G


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
