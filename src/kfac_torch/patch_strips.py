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
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .gram import bands, mirror
from .patch_geometry import Conv, pad, windows

_HELD_BYTES = 2**22  # strips, and the inputs that they are taken from, held at once
_FEWEST_ROWS = 512  # for which more than a share of the patches is held, up to that
_PRODUCT_ROWS = 32  # of an example: fewer are better copied together
_PRODUCT_BAND = 96  # columns of inputs that are patches as they are
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


class _Piece(NamedTuple):
    """Strips that are held at once."""

    patches: Tensor  # where they are taken from, a view of the source
    strips: Tensor  # room for them
    products: list[tuple[Tensor, Tensor, Tensor, int]]  # into, left, right, sign


class _Span(NamedTuple):
    """Pieces that are taken from the same rows of the inputs."""

    rows: slice  # of the inputs
    real: Tensor  # where they go in the source
    zeros: list[Tensor]  # the rest of the source, where other spans have rows
    pieces: list[_Piece]


def add_strips(moment: Tensor, inputs: Tensor, conv: Conv, how: Cut) -> None:
    """Put `PᵀP / (N T)` into a moment of zeros."""
    if not _single(conv):
        _add_pieces(moment, inputs, conv, how)
    elif max(conv.stride) == 1 and math.prod(conv.out) >= _PRODUCT_ROWS:
        _add_products(moment[0], inputs)
    else:
        _add_locations(moment[0], inputs, conv, how)
    size = how.width * moment.shape[-1] // conv.kernel[0]
    for q, r in itertools.combinations_with_replacement(range(1, how.count), 2):
        block = moment[:, q * size : (q + 1) * size, r * size : (r + 1) * size]
        before = moment[:, (q - 1) * size :, (r - 1) * size :]
        block += before[:, : block.shape[1], : block.shape[2]]
    mirror(moment.div_(conv.rows))
    _sort_columns(moment, math.prod(conv.kernel))


def _single(conv: Conv) -> bool:
    """Whether patches are locations of the inputs."""
    return max(*conv.kernel, conv.groups) == 1 and not any(map(any, conv.padding))


def _add_products(moment: Tensor, inputs: Tensor) -> None:
    """Add inputs that are patches as they are, but for their order."""
    held = max(1, _HELD_BYTES // (inputs[0].numel() * moment.element_size()))
    for examples in torch.split(inputs, held):
        x = examples.to(moment.dtype).flatten(2)
        for band in bands(len(moment), moment.device, _PRODUCT_BAND):
            moment[band, band.start :].addbmm_(x[:, band], x[:, band.start :].mT)


def _add_locations(moment: Tensor, inputs: Tensor, conv: Conv, how: Cut) -> None:
    """Add locations that are apart, or of many examples, copied together."""
    x = inputs[(..., *(slice(None, None, s) for s in conv.stride))].movedim(1, -1)
    sizes = piece_sizes(conv, how, moment.element_size())
    buffer = moment.new_empty(math.prod(sizes) * conv.channels)
    parts = bands(len(moment), moment.device)
    starts = (range(0, n, m) for n, m in zip(x.shape, sizes, strict=False))
    for start in itertools.product(*starts):
        places = (slice(at, at + size) for at, size in zip(start, sizes, strict=True))
        piece = x[tuple(places)]
        rows = buffer[: piece.numel()].view(piece.shape).copy_(piece).flatten(0, -2)
        for band in parts:
            moment[band, band.start :].addmm_(rows[:, band].mT, rows[:, band.start :])


def _add_pieces(moment: Tensor, inputs: Tensor, conv: Conv, how: Cut) -> None:
    """Multiply strips; views are made once, which takes as long as a small product."""
    batch, *sizes = piece_sizes(conv, how, moment.element_size())
    held = batch * (sizes[0] + how.more) * math.prod(sizes[1:])
    held *= conv.channels * how.width * math.prod(conv.kernel[1:])
    buffer = moment.new_empty(held)
    source = _source(moment, conv, batch, len(_rows(conv, how, 0, sizes[0] + how.more)))
    plans = dict[int, list[_Span]]()
    for examples in torch.split(inputs, batch):
        x = examples
        if conv.padding_mode != "zeros":  # of which the source has its own
            x = pad(x, conv, conv.padding)
        if len(x) not in plans:
            plans[len(x)] = list(_plan(moment, buffer, x, source, conv, how, sizes))
        for rows, real, zeros, pieces in plans[len(x)]:
            for part in zeros:
                part.zero_()
            real.copy_(x[:, :, rows])
            for patches, strips, products in pieces:
                strips.copy_(patches)
                for into, left, right, sign in products:
                    if into.dim() == 2:
                        into.addmm_(left, right, alpha=sign)
                    else:
                        into.baddbmm_(left, right, alpha=sign)


def _rows(conv: Conv, how: Cut, first: int, stop: int) -> range:
    """Rows of the padded inputs that strips from first to stop are taken from."""
    s, reach = conv.stride[0], conv.dilation[0] * (how.width - 1)
    return range(s * first, s * (stop - 1) + reach + 1)


def _spans(conv: Conv, how: Cut, size: int) -> Iterator[tuple[int, range, int]]:
    """First output location, strips that meet the input from there, how many locations."""
    before, s = conv.padding[0][0], conv.stride[0]
    for i in range(0, conv.out[0], size):
        out = min(size, conv.out[0] - i)
        first, stop = 0, out + how.more
        if conv.padding_mode == "zeros":
            first = max(0, -(-(before - conv.dilation[0] * (how.width - 1)) // s) - i)
            stop = min(stop, (before + conv.space[0] - 1) // s + 1 - i)
        if first < stop:
            yield i, range(first, stop), out


def _plan(
    moment: Tensor,
    buffer: Tensor,
    x: Tensor,
    source: Tensor,
    conv: Conv,
    how: Cut,
    sizes: Sequence[int],
) -> Iterator[_Span]:
    """Views for pieces of so many examples as x has."""
    spans = list(_spans(conv, how, sizes[0]))
    starts = (range(0, n, m) for n, m in zip(conv.out[1:], sizes[1:], strict=True))
    places = list(itertools.product(*starts))
    for i, there, out in spans:
        needed = _rows(conv, how, i + there.start, i + there.stop)
        taken = source[: len(x), :, : len(needed)]
        rows, real, zeros = _inside(x, conv, needed, taken)
        pieces = list[_Piece]()
        for start in places:
            patches = _strips(taken, conv, how, start, sizes)
            strips = buffer[: patches.numel()].view(patches.shape)
            y = strips.view(conv.groups, -1, math.prod(patches.shape[-1 - len(sizes) :]))
            products = list(_products(moment, y, how, there, out))
            pieces.append(_Piece(patches, strips, products))
        yield _Span(rows, real, zeros if len(spans) > 1 else [], pieces)


def _strips(
    taken: Tensor, conv: Conv, how: Cut, start: Sequence[int], sizes: Sequence[int]
) -> Tensor:
    """View of some rows as strips, `[groups, i, N, *out, w, *kernel, channels]`."""
    dims = len(sizes)
    once = conv._replace(kernel=(how.width, *conv.kernel[1:]))
    patches = windows(taken, once).unflatten(1, (conv.groups, -1))
    # Without lags in the order of N.
    kernel, others = range(3, 3 + dims), range(4 + dims, 3 + 2 * dims)
    order = (0, 3 + dims) if how.count == 1 else (3 + dims, 0)
    patches = patches.permute(1, *order, *others, *kernel, 2)
    for dim, (at, size) in enumerate(zip(start, sizes[1:], strict=True), 3):
        patches = patches.narrow(dim, at, min(size, patches.shape[dim] - at))
    return patches


def _products(
    moment: Tensor, y: Tensor, how: Cut, there: range, out: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """For those strips that are there, zero beyond, of so many output locations."""
    if len(moment) == 1:
        moment, y = moment[0], y[0]
    size, each = y.shape[-1], y.shape[-2] // len(there)
    spans = [(0, r, 0, r, range(out), 1) for r in range(how.count)]
    for q, r in itertools.combinations_with_replacement(range(how.count - 1), 2):
        spans.append((q + 1, r + 1, q, r, range(out, out + how.lag), 1))
        spans.append((q + 1, r + 1, q, r, range(how.lag), -1))
    for a, b, q, r, span, sign in spans:
        lags = [how.lag * i - there.start for i in (q, r)]
        start = max(span.start, *(-lag for lag in lags))
        stop = min(span.stop, *(len(there) - lag for lag in lags))
        if start >= stop:
            continue
        left, right = (y[..., (start + i) * each : (stop + i) * each, :] for i in lags)
        block = moment[..., a * size : (a + 1) * size, b * size : (b + 1) * size]
        rows, columns = block.shape[-2:]
        for band in bands(columns, moment.device) if a == b else [slice(0, rows)]:
            others = slice(band.start if a == b else 0, columns)
            yield block[..., band, others], left[..., band].mT, right[..., others], sign


def piece_sizes(conv: Conv, how: Cut, itemsize: int) -> list[int]:
    """Examples and locations of a piece: whole trailing dimensions while they fit."""
    each = conv.channels * how.width * math.prod(conv.kernel[1:])
    each += 0 if _single(conv) else conv.channels * math.prod(conv.stride)
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


def _source(moment: Tensor, conv: Conv, batch: int, rows: int) -> Tensor:
    """Room for padded inputs `[N, C, *space]`, channels last unless each is alone."""
    others = [n + sum(p) for n, p in zip(conv.space[1:], conv.padding[1:], strict=True)]
    if conv.groups == conv.channels > 1:
        return moment.new_zeros(batch, conv.channels, rows, *others)
    return moment.new_zeros(batch, rows, *others, conv.channels).movedim(-1, 1)


def _inside(
    x: Tensor, conv: Conv, rows: range, source: Tensor
) -> tuple[slice, Tensor, list[Tensor]]:
    """Rows of x, padded unless with zeros; where they go in the source; the rest of it."""
    pads = [b if conv.padding_mode == "zeros" else 0 for b, _ in conv.padding]
    there = [slice(b, b + n) for b, n in zip(pads[1:], x.shape[3:], strict=True)]
    first = min(max(0, pads[0] - rows.start), len(rows))
    stop = max(first, min(len(rows), pads[0] + x.shape[2] - rows.start))
    zeros = [part for part in (source[:, :, :first], source[:, :, stop:]) if part.numel()]
    start = rows.start - pads[0]
    real = source[(slice(None), slice(None), slice(first, stop), *there)]
    return slice(start + first, start + stop), real, zeros


def _sort_columns(moment: Tensor, kernel: int) -> None:
    """From (kernel offset, channel) to (channel, kernel offset), of rows and columns."""
    size = moment.shape[-1]
    if kernel in (1, size):
        return
    if moment.numel() <= _SORTED:
        pairs = moment.unflatten(2, (kernel, -1)).unflatten(1, (kernel, -1))
        moment.copy_(pairs.permute(0, 2, 1, 4, 3).reshape(moment.shape))
        return
    step = max(1, _SORTED // size)
    for dim in (1, 2):
        for part in moment.split(step, 3 - dim):
            pairs = part.unflatten(dim, (kernel, -1)).transpose(dim, dim + 1)
            part.copy_(pairs.flatten(dim, dim + 1))
