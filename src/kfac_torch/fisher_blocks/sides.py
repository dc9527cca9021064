"""The factor of each side of a Kronecker block: whole, or in a form that its size asks for.

A side is a full matrix up to the size limit of its block, and above it blocks on the
diagonal, a diagonal, or of low rank (see `size_limit.py`). The size of an input side has
the bias in it; that of a convolution counts channels times kernel offsets, of one group.
Where one channel's kernel offsets exceed the limit of a split, the side is a diagonal.
"""

from __future__ import annotations

from typing import Any

from ..fisher_factors import (
    ConvInputDiagonalKroneckerFactor,
    ConvInputKroneckerFactor,
    ConvInputLowRankKroneckerFactor,
    ConvInputSplitKroneckerFactor,
    ConvOutputDiagonalKroneckerFactor,
    ConvOutputKroneckerFactor,
    ConvOutputLowRankKroneckerFactor,
    ConvOutputSplitKroneckerFactor,
    DiagonalKroneckerFactor,
    FullyConnectedKroneckerFactor,
    LowRankKroneckerFactor,
    SplitKroneckerFactor,
)
from ..fisher_factors.conv_split import channel_blocks
from ..size_limit import SizeLimit, form_of
from .base import accumulation_dtype, no_data
from .kronecker import KroneckerProductFB


def make_side(
    diagonal: bool, size: int, has_bias: bool, block: KroneckerProductFB, side: str
) -> Any:
    """Make the factor of rows with `size` features, for one side of a block."""
    name, weight, limit = f"{block.name}.{side}", block.params[0], block.size_limit
    form = "diagonal" if diagonal else form_of(limit, size + has_bias)
    kind: Any = {
        "full": FullyConnectedKroneckerFactor,
        "diagonal": DiagonalKroneckerFactor,
        "split": SplitKroneckerFactor,
        "low_rank": LowRankKroneckerFactor,
    }[form]
    return kind(
        [[no_data(name)]],
        has_bias,
        **_arguments(form, limit),
        size=size,
        name=name,
        options=block.options,
        dtype=accumulation_dtype(weight),
        device=weight.device,
    )


def _arguments(form: str, limit: SizeLimit | None) -> dict[str, int]:
    """What a form takes besides."""
    if limit is None or form in ("full", "diagonal"):
        return {}
    if form == "split":
        return {"max_size": limit.max_size}
    return {"rank": limit.kept_rank}


def conv_input_side(
    channels: int, num_offsets: int, has_bias: bool, limit: SizeLimit | None
) -> tuple[Any, dict[str, int]]:
    """Return the class of a convolution's input factor, and what it takes besides.

    Args:
        channels: of one group.
        num_offsets: `Δ`.
        has_bias: whether there is a one in each row.
        limit: None for none.

    >>> conv_input_side(8, 9, True, SizeLimit(40))[1]
    {'max_size': 40}
    >>> conv_input_side(8, 49, True, SizeLimit(40))[0].__name__
    'ConvInputDiagonalKroneckerFactor'
    """
    form = form_of(limit, channels * num_offsets + has_bias)
    if limit is not None and form == "split":
        possible = channel_blocks(channels, num_offsets, has_bias, limit.max_size)
        form = form if possible else "diagonal"
    kind = {
        "full": ConvInputKroneckerFactor,
        "diagonal": ConvInputDiagonalKroneckerFactor,
        "split": ConvInputSplitKroneckerFactor,
        "low_rank": ConvInputLowRankKroneckerFactor,
    }[form]
    return kind, _arguments(form, limit)


def conv_output_side(channels: int, limit: SizeLimit | None) -> tuple[Any, dict[str, int]]:
    """Return the class of a convolution's output factor, and what it takes besides.

    `channels` are those of one group.
    """
    form = form_of(limit, channels)
    kind = {
        "full": ConvOutputKroneckerFactor,
        "diagonal": ConvOutputDiagonalKroneckerFactor,
        "split": ConvOutputSplitKroneckerFactor,
        "low_rank": ConvOutputLowRankKroneckerFactor,
    }[form]
    return kind, _arguments(form, limit)
