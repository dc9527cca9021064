"""Gram matrices `XᵀX`, half of them computed and mirrored.

A matrix product does not know that its result is symmetric. In bands of columns, each
times itself and those after it, `p` bands take `(p + 1)/2p` of the multiply-adds:

    C[i, j] = X_iᵀX_j  for bands i ≤ j,      C[j, i] = C[i, j]ᵀ

Bands are 48 columns wide, the rows of a block that the matrix products of a CPU with
AVX-512 make in registers, or twice as wide where there are many.

Left out: fewer multiply-adds elsewhere than on a CPU, where a product of many rows is
better left whole.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_WIDTH = 48  # of a band
_MANY = 512  # columns from which it is twice that
_FEWEST = 2**15  # numbers in a matrix: below, the calls take longer than what they save
_CACHE_BYTES = 2**18
_MIRRORED = 96  # columns that are mirrored at once


def bands(columns: int, device: torch.device, width: int | None = None) -> list[slice]:
    """Bands of columns; one of all where they are fewer than two bands.

    >>> [band.start for band in bands(200, torch.device("cpu"))]
    [0, 48, 96, 144, 192]
    """
    width = width or (_WIDTH if columns < _MANY else 2 * _WIDTH)
    if device.type != "cpu" or columns < 2 * width:
        width = columns
    return [slice(i, min(i + width, columns)) for i in range(0, columns, width)]


def gram(rows: Tensor) -> Tensor:
    """Return `XᵀX` of `X [R, d]`, exactly symmetric.

    >>> gram(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[10., 14.],
            [14., 20.]])
    """
    parts = bands(rows.shape[-1], rows.device, 2 * _WIDTH)
    if len(parts) == 1 or rows.numel() < _FEWEST:
        moment = rows.mT @ rows
        return moment.add_(moment.mT.clone()).div_(2)
    moment = rows.new_empty(rows.shape[-1], rows.shape[-1])
    for band in parts:
        # A product of its own: written once more while it is still in the cache.
        product = rows[:, band].mT @ rows[:, band.start :]
        moment[band, band.start :] = product
        moment[band.stop :, band] = product[:, band.stop - band.start :].mT
        square = moment[band, band]
        square.copy_((square + square.mT) / 2)
    return moment


def add_gram(moment: Tensor, columns: Tensor) -> None:
    """Add `Y Yᵀ` of `Y [g, d, R]` to `moment [g, d, d]`: bands from the diagonal on alone.

    `mirror` makes the rest of it.
    """
    for band in bands(moment.shape[-1], moment.device):
        left, right = columns[:, band], columns[:, band.start :].mT
        if len(moment) == 1:
            moment[0, band, band.start :].addmm_(left[0], right[0])
        else:
            moment[:, band, band.start :].baddbmm_(left, right)


def mirror(moment: Tensor) -> None:
    """Copy what is right of the diagonal to the left of it."""
    for i in range(0, moment.shape[-1], _MIRRORED):
        band, rest = slice(i, i + _MIRRORED), slice(i + _MIRRORED, None)
        moment[:, rest, band] = moment[:, band, rest].mT
        square = moment[:, band, band]
        square.copy_(
            torch.where(_below(square.shape[-1], moment.device), square.mT, square)
        )


@functools.lru_cache(maxsize=256)
def _below(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(-1)


def add_transpose(moment: Tensor) -> None:
    """Add to each matrix its transpose, in place; the result is exactly symmetric."""
    size = moment.shape[-1]
    band = max(1, _CACHE_BYTES // (size * moment.element_size()))
    for i in range(0, size, band):
        rows, columns = moment[:, i : i + band, i:], moment[:, i:, i : i + band]
        total = rows + columns.mT
        rows.copy_(total)
        columns.copy_(total.mT)
