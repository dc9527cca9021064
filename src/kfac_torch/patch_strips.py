r"""Second moment from patches that are formed: whole ones in pieces, or strips of them.

A patch is k offsets of the first dimension, and all offsets of the others at each. Strip
i is w of the k, at location i of the first dimension: y[i], a row for each example and
output location of the other dimensions, a column for each offset and channel. Offset
u = wq + u' of location i is offset u' of strip i + mq where w offsets are m locations,

    w = s / gcd(s, d),    m = dw / s,

    A(q, q')     = Σ_{0 <= i < o} y[i + mq]ᵀ y[i + mq']
    A(q+1, q'+1) = A(q, q') + Σ_{o <= i < o+m} y[i + mq]ᵀ y[i + mq']
                            - Σ_{0 <= i < m} y[i + mq]ᵀ y[i + mq']

so that all strips are multiplied only for the blocks A(0, q'), w of k rows of the moment,
and nothing is held but the strips at hand. With w = k the strips are patches: what serves
kernels of size one and few patches of many channels.

Strips are taken from a copy of the inputs with the channels last, where they are long
runs, so that the columns of the moment come in that order; they are sorted at the end.

Notation: as in `patch_geometry`; o output locations of the first dimension.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .gram import bands, mirror
from .patch_geometry import Conv, pad, windows

_HELD_BYTES = 2**22  # strips, and the inputs that they are taken from, held at once
_FEWEST_ROWS = 512  # for which more than a share of the patches is held, up to that
_PRODUCT_ROWS = 32  # of an example: fewer are better copied together
_SORTED = 2**17  # numbers that are sorted at once


class Cut(NamedTuple):
    """How kernels are cut into strips."""

    width: int  # w
    count: int  # of q
    lag: int  # m

    @property
    def more(self) -> int:
        """Strips beyond those of the output locations."""
        return self.lag * (self.count - 1)


def cut(conv: Conv, *, whole: bool = False) -> Cut:
    """Strips that are as narrow as they can be, or whole patches."""
    k, s, d = conv.kernel[0], conv.stride[0], conv.dilation[0]
    w = s // math.gcd(s, d)
    return Cut(k, 1, 0) if whole or w >= k else Cut(w, -(-k // w), d * w // s)


class _Product(NamedTuple):
    """Strips times strips, in numbers of strips, and what they are added to."""

    into: Tensor
    left: tuple[range, slice]  # strips and their columns
    right: tuple[range, slice]
    sign: int


def add_strips(moment: Tensor, inputs: Tensor, conv: Conv, how: Cut) -> None:
    """Put `PᵀP / (N T)` into a moment of zeros."""
    sizes = (*conv.kernel, *conv.stride, conv.groups)
    plain = max(sizes) == 1 and not any(map(any, conv.padding))
    if plain and math.prod(conv.out) >= _PRODUCT_ROWS:
        _add_products(moment[0], inputs)
    else:
        _add_pieces(moment, inputs, conv, how)
    size = how.width * moment.shape[-1] // conv.kernel[0]
    for q, r in itertools.combinations_with_replacement(range(1, how.count), 2):
        block = moment[:, q * size : (q + 1) * size, r * size : (r + 1) * size]
        before = moment[:, (q - 1) * size :, (r - 1) * size :]
        block += before[:, : block.shape[1], : block.shape[2]]
    mirror(moment.div_(conv.rows))
    _sort_columns(moment, math.prod(conv.kernel))


def _add_products(moment: Tensor, inputs: Tensor) -> None:
    """Add inputs that are patches as they are, but for their order."""
    held = max(1, _HELD_BYTES // (inputs[0].numel() * moment.element_size()))
    for examples in torch.split(inputs, held):
        x = examples.to(moment.dtype).flatten(2)
        for band in bands(len(moment), moment.device):
            moment[band, band.start :].addbmm_(x[:, band], x[:, band.start :].mT)


def _add_pieces(moment: Tensor, inputs: Tensor, conv: Conv, how: Cut) -> None:
    single = conv.groups == 1
    moment = moment[0] if single else moment
    plans = dict[tuple[range, int], list[_Product]]()
    for y, there, out in _pieces(moment, inputs, conv, how):
        if (there, out) not in plans:
            size = how.width * moment.shape[-1] // conv.kernel[0]
            plans[there, out] = list(_products(moment, how, size, there, out))
        rows = y.shape[1] // len(there)
        y = y[0] if single else y
        for into, (i, columns), (j, others), sign in plans[there, out]:
            left = y[..., i.start * rows : i.stop * rows, columns].mT
            right = y[..., j.start * rows : j.stop * rows, others]
            if single:
                into.addmm_(left, right, alpha=sign)
            else:
                into.baddbmm_(left, right, alpha=sign)


def _products(
    moment: Tensor, how: Cut, size: int, there: range, out: int
) -> Iterator[_Product]:
    """For those strips that are there, zero beyond, of so many output locations."""
    spans = [(0, r, 0, r, range(out), 1) for r in range(how.count)]
    for q, r in itertools.combinations_with_replacement(range(how.count - 1), 2):
        spans.append((q + 1, r + 1, q, r, range(out, out + how.lag), 1))
        spans.append((q + 1, r + 1, q, r, range(how.lag), -1))
    for a, b, q, r, span, sign in spans:
        lags = [how.lag * i - there.start for i in (q, r)]
        start = max(span.start, *(-lag for lag in lags))
        stop = min(span.stop, *(len(there) - lag for lag in lags))
        block = moment[..., a * size : (a + 1) * size, b * size : (b + 1) * size]
        rows, columns = block.shape[-2:]
        parts = bands(columns, moment.device) if a == b else [slice(0, rows)]
        for band in parts if start < stop else []:
            others = slice(band.start, columns) if a == b else slice(0, columns)
            left, right = (range(start + lag, stop + lag) for lag in lags)
            yield _Product(block[..., band, others], (left, band), (right, others), sign)


def _pieces(
    moment: Tensor, inputs: Tensor, conv: Conv, how: Cut
) -> Iterator[tuple[Tensor, range, int]]:
    """Strips `[groups, i, columns]` that meet the input, which, of how many locations."""
    batch, *sizes = piece_sizes(conv, how, moment.element_size())
    once = conv._replace(kernel=(how.width, *conv.kernel[1:]))
    zeros, dims = conv.padding_mode == "zeros", len(sizes)
    before, s = conv.padding[0][0], conv.stride[0]
    reach = conv.dilation[0] * (how.width - 1)  # from the first row of a strip to its last
    width = conv.channels * math.prod(once.kernel)
    buffer = moment.new_empty(width * batch * (sizes[0] + how.more) * math.prod(sizes[1:]))
    source = _source(moment, conv, batch, s * (sizes[0] + how.more - 1) + reach + 1)
    for examples in torch.split(inputs, batch):
        x = examples.to(moment.dtype)
        x = x if zeros and source is not None else pad(x, conv, conv.padding)
        for i in range(0, conv.out[0], sizes[0]):
            out = min(sizes[0], conv.out[0] - i)
            first, stop = 0, out + how.more
            if zeros:
                first = max(0, -(-(before - reach) // s) - i)
                stop = min(stop, (before + conv.space[0] - 1) // s + 1 - i)
            if first >= stop:
                continue
            rows = range(s * (i + first), s * (i + stop - 1) + reach + 1)
            patches = windows(_rows(x, conv, rows, source), once)
            patches = patches.unflatten(1, (conv.groups, -1))
            # [groups, i, N, *out, w, *kernel, channels]; without lags in the order of N.
            kernel, others = range(3, 3 + dims), range(4 + dims, 3 + 2 * dims)
            order = (0, 3 + dims) if how.count == 1 else (3 + dims, 0)
            patches = patches.permute(1, *order, *others, *kernel, 2)
            starts = (range(0, n, m) for n, m in zip(conv.out[1:], sizes[1:], strict=True))
            for start in itertools.product(*starts):
                piece = patches
                for dim, (at, size) in enumerate(zip(start, sizes[1:], strict=True), 3):
                    piece = piece.narrow(dim, at, min(size, piece.shape[dim] - at))
                filled = buffer[: piece.numel()].view(piece.shape).copy_(piece)
                y = filled.view(conv.groups, -1, width // conv.groups)
                yield y, range(first, stop), out


def piece_sizes(conv: Conv, how: Cut, itemsize: int) -> list[int]:
    """Examples and locations of a piece: whole trailing dimensions while they fit."""
    each = conv.channels * how.width * math.prod(conv.kernel[1:])
    each += 0 if math.prod(conv.kernel) == 1 else conv.channels * math.prod(conv.stride)
    most = _HELD_BYTES // itemsize
    share = conv.rows * conv.columns * conv.groups // 8
    held = max(1, min(most, max(share, _FEWEST_ROWS * each)) // each)
    extents = (conv.batch, conv.out[0] + how.more, *conv.out[1:])
    sizes = [
        min(n, max(1, held // math.prod(extents[i + 1 :]))) for i, n in enumerate(extents)
    ]
    sizes[1] = max(1, sizes[1] - how.more)
    extents = (conv.batch, *conv.out)  # pieces of like size
    return [-(-n // -(-n // size)) for n, size in zip(extents, sizes, strict=True)]


def _source(moment: Tensor, conv: Conv, batch: int, rows: int) -> Tensor | None:
    """Room for padded inputs `[N, C, *space]`, channels last unless each is alone."""
    if math.prod(conv.kernel) == 1:
        return None  # where no number is read twice
    others = [n + sum(p) for n, p in zip(conv.space[1:], conv.padding[1:], strict=True)]
    if conv.groups == conv.channels > 1:
        return moment.new_zeros(batch, conv.channels, rows, *others)
    return moment.new_zeros(batch, rows, *others, conv.channels).movedim(-1, 1)


def _rows(x: Tensor, conv: Conv, rows: range, source: Tensor | None) -> Tensor:
    """Rows of padded inputs, taken there unless `source` is None."""
    if source is None:
        return x[:, :, rows.start : rows.stop]
    pads = [b if conv.padding_mode == "zeros" else 0 for b, _ in conv.padding]
    source = source[: len(x), :, : len(rows)]
    there = [slice(b, b + n) for b, n in zip(pads[1:], x.shape[3:], strict=True)]
    first = min(max(0, pads[0] - rows.start), len(rows))
    stop = max(first, min(len(rows), pads[0] + x.shape[2] - rows.start))
    if (first, stop) != (0, len(rows)):
        source[:, :, :first] = 0
        source[:, :, stop:] = 0
    start = rows.start - pads[0]
    real = x[:, :, start + first : start + stop]
    source[(slice(None), slice(None), slice(first, stop), *there)].copy_(real)
    return source


def _sort_columns(moment: Tensor, kernel: int) -> None:
    """From (kernel offset, channel) to (channel, kernel offset), of rows and columns."""
    size = moment.shape[-1]
    if kernel in (1, size):
        return
    step = max(1, _SORTED // size)
    for dim in (1, 2):
        for part in moment.split(step, 3 - dim):
            pairs = part.unflatten(dim, (kernel, -1)).transpose(dim, dim + 1)
            part.copy_(pairs.flatten(dim, dim + 1))
