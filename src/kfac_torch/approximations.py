"""The approximations that each kind of layer can have, by name.

The names are those of `tf.contrib.kfac` and of its successor: "kron" a Kronecker
product (with "in", "out" or "both" sides as diagonals), "diagonal", "full"; for layers
that are used several times "kron_indep" (independent uses) and "kron_series_1", "..._2"
(a linear chain over time).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from torch import nn

from . import fisher_blocks as fb
from .fisher_factors import FactorOptions

BlockFactory: TypeAlias = Callable[..., fb.FisherBlock]


def _sides(kind: BlockFactory, **sides: bool | int) -> BlockFactory:
    return lambda *args, **kwargs: kind(*args, **sides, **kwargs)


def _kronecker(name: str, kind: BlockFactory) -> dict[str, BlockFactory]:
    """A Kronecker block under its name, and with either side or both as diagonals."""
    left, right = "diagonal_approx_for_input", "diagonal_approx_for_output"
    return {
        name: kind,
        f"{name}_in_diag": _sides(kind, **{left: True}),
        f"{name}_out_diag": _sides(kind, **{right: True}),
        f"{name}_both_diag": _sides(kind, **{left: True, right: True}),
    }


def _generic(kind: BlockFactory) -> BlockFactory:
    """A block of gradients of parameters, made from a layer."""

    def make(module: nn.Module, name: str, options: FactorOptions) -> fb.FisherBlock:
        return kind([p for p in module.parameters() if p.requires_grad], name, options)

    return make


_FULL = _generic(fb.FullFB)

APPROXIMATIONS: Mapping[str, Mapping[str, BlockFactory]] = MappingProxyType(
    {
        "generic": MappingProxyType({"full": fb.FullFB, "diagonal": fb.NaiveDiagonalFB}),
        "fully_connected": MappingProxyType(
            {
                **_kronecker("kron", fb.FullyConnectedKFACBasicFB),
                "diagonal": fb.FullyConnectedDiagonalFB,
                "full": _FULL,
            }
        ),
        "conv2d": MappingProxyType(
            {
                "kron": fb.ConvKFCBasicFB,
                "kron_sua": _sides(fb.ConvKFCBasicFB, sua_approx_for_input=True),
                "diagonal": fb.ConvDiagonalFB,
                "full": _FULL,
            }
        ),
        "depthwise_conv2d": MappingProxyType(
            {
                "kron": fb.DepthwiseConvKFCBasicFB,
                "diagonal": fb.DepthwiseConvDiagonalFB,
                "full": _FULL,
            }
        ),
        "embedding": MappingProxyType(
            {
                "kron": fb.EmbeddingKFACFB,
                "kron_both_diag": _sides(
                    fb.EmbeddingKFACFB, diagonal_approx_for_output=True
                ),
                "diagonal": _generic(fb.NaiveDiagonalFB),
                "full": _FULL,
            }
        ),
        "scale_and_shift": MappingProxyType(
            {"full": fb.ScaleAndShiftFullFB, "diagonal": fb.ScaleAndShiftDiagonalFB}
        ),
        "fully_connected_multi": MappingProxyType(
            {
                **_kronecker("kron_indep", fb.FullyConnectedMultiIndepFB),
                "kron_series_1": _sides(fb.FullyConnectedSeriesFB, option=1),
                "kron_series_2": _sides(fb.FullyConnectedSeriesFB, option=2),
            }
        ),
        "conv2d_multi": MappingProxyType({"kron_indep": fb.ConvKFCBasicMultiIndepFB}),
        "embedding_multi": MappingProxyType({"kron_indep": fb.EmbeddingKFACMultiIndepFB}),
    }
)
"""By kind of layer, the blocks it can have by the name of the approximation."""

DEFAULT_APPROXIMATIONS: Mapping[str, str] = MappingProxyType(
    {
        "generic": "diagonal",
        "fully_connected": "kron",
        "conv2d": "kron",
        "depthwise_conv2d": "kron",
        "embedding": "kron",
        "scale_and_shift": "full",
        "fully_connected_multi": "kron_indep",
        "conv2d_multi": "kron_indep",
        "embedding_multi": "kron_indep",
    }
)
