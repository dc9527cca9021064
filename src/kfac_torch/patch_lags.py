r"""Second moment of patches from lags that one Fourier transform gives.

Block (u, v) of PᵀP is a sum of x[p] x[p + dδ]ᵀ which depends on u only through the
locations that offset u cannot reach (letters as in `patch_geometry`; x[p] the C channels
at location p). In one dimension

    block(u, v) = full(δ) - Σ_{p not in reach(u)} point(p, δ)
    full(δ) = Σ_p x[p] x[p + dδ]ᵀ,    point(p, δ) = x[p] x[p + dδ]ᵀ
    reach(u) = {p : du - b <= p < n + a - d(k - 1 - u)}

and in several it is the product of such differences, full lags in some dimensions and
points in the others. One Fourier transform gives all lags at once (Wiener-Khinchin):
the cross-spectra Σ_n conj(x̂[f]) x̂[f]ᵀ take some 2 C² multiply-adds per location
whatever the kernel, and a small matrix takes them to the lags that are needed. They are
Hermitian, so that many channels are taken in bands, and half of the pairs mirrored.

Short dimensions are transformed by matrices as well, straight to the order that the
products need; the transforms of 18 or 20 real numbers that a CPU has are ten times slower
than those of 16.

Left out: sparse inputs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .gram import add_transpose, bands
from .patch_geometry import Arranged, Conv, arranged, axes

_SPECTRUM_BYTES = 24 * 2**20  # spectra that are held at once
_SHORT = 48  # length up to which a product with a matrix is faster than an FFT
_BAND = 64  # channels
_SMALLEST_WORK = 2**16  # numbers in a piece of work, but for the next
_CACHE_BYTES = 2**21  # pieces of work that should stay in the cache


class _Family(NamedTuple):
    """Terms with points in the same dimensions of [N, groups, C, *space]."""

    points: dict[int, tuple[Tensor, Tensor]]  # by dimension: locations, their pairs
    lengths: dict[int, int]  # of the transform, by dimension
    matrices: list[Tensor]  # that transform short dimensions, the last one first
    shape: tuple[int, int]  # points, lags
    inverse: Tensor  # takes spectra to lags: [lags, frequencies, re/im]
    signs: Tensor  # block(u, v) as a sum of terms: [k₁k₂, k₁k₂, points * lags]
    hermitian: bool  # whether all points are their own partners, and each there once


@functools.lru_cache(maxsize=256)  # a layer asks for the same ones at every step
def _families(conv: Conv, dtype: torch.dtype, device: torch.device) -> list[_Family]:
    along, families = axes(conv), list[_Family]()
    for at_points in itertools.product((False, True), repeat=len(along)):
        order = sorted(range(len(along)), key=lambda i: not at_points[i])  # points first
        points = {3 + i: along[i].points for i in order if at_points[i]}
        full = {3 + i: along[i] for i in order if not at_points[i]}
        inverse = torch.ones(1, 1, dtype=torch.complex128)
        matrices = list[Tensor]()
        for dim, (lags, _, _, m) in full.items():
            # The transform of real numbers keeps one of each conjugate pair.
            half = dim == max(full)
            f = torch.arange(m // 2 + 1 if half else m)
            weight = (1.0 + (half & (f > 0) & (2 * f < m)).double()) / m
            turns = (torch.outer(lags, f) % m).double() / m
            inverse = torch.kron(inverse, weight * torch.exp(-2j * math.pi * turns))
            if max(axis.length for axis in full.values()) <= _SHORT:
                matrix = _transform(conv.space[dim - 3], m, real=half)
                matrices.insert(0, matrix.to(device, dtype))
        parts = [
            axis.signs.tensor_split([len(axis.lags)], -1)[at]
            for axis, at in zip(along, at_points, strict=True)
        ]
        shape = (math.prod(pairs.shape[1] for pairs in points.values()), len(inverse))
        if shape[0]:
            signs = functools.reduce(torch.kron, parts)
            signs = torch.unflatten(signs, -1, [part.shape[-1] for part in parts])
            signs = signs.permute(0, 1, *(2 + i for i in order)).flatten(2)
            found = {i: torch.unique(p, return_inverse=True) for i, p in points.items()}
            family = _Family(
                {i: (p.to(device), at.to(device)) for i, (p, at) in found.items()},
                {dim: axis.length for dim, axis in full.items()},
                matrices,
                shape,
                torch.view_as_real(inverse).to(device, dtype),
                signs.to(device, dtype),
                all(len(p) == len(at.T) and torch.equal(*at) for p, at in found.values()),
            )
            families.append(family)
    return families


def _transform(n: int, length: int, *, real: bool) -> Tensor:
    """Fourier transform of n numbers and zeros, `[re/im * frequencies, n * re/im]`."""
    f = torch.arange(length // 2 + 1 if real else length)
    turns = (torch.outer(f, torch.arange(n)) % length).double() / length
    cosines, sines = torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)
    if real:
        return torch.cat([cosines, -sines])
    return torch.cat(
        [torch.stack([cosines, sines], -1), torch.stack([-sines, cosines], -1)]
    ).flatten(1)


class _Share(NamedTuple):
    """What is in memory at once."""

    examples: int
    work: int  # numbers in a piece of work
    inside: bool  # whether spectra are in the spare memory


def shares(
    conv: Conv, how: Arranged, counts: tuple[int, int], spare: int, width: int
) -> _Share:
    """Split a sixth of the patches of `conv`, given so many spare numbers of a width.

    Terms, a spectrum that does not fit in there and work on pieces of it take that; at
    least a quarter of it is for the spectrum, where many terms meet few patches. Counted
    are terms, and frequencies of the family without points.
    """
    (terms, frequencies), channels = counts, how.conv.channels
    taken = terms * channels**2 // conv.groups
    taken += conv.groups * how.conv.columns**2 if how.spread > 1 else 0
    sixth = conv.rows * conv.columns * conv.groups // 6
    free = max(sixth - taken, sixth // 4)
    example = 2 * channels * frequencies
    padded = 1 if any(map(any, how.pads)) else 0
    copies = channels * math.prod(how.conv.space)
    copies *= padded + (1 if how.spread > 1 else 0)
    needed = example * min(conv.batch, _SPECTRUM_BYTES // width // example + 1)
    inside = spare >= min(needed, 4 * free)  # little is left beside the terms
    work = free // (12 if inside else 16)
    work = max(1, min(_CACHE_BYTES // width, max(work, _SMALLEST_WORK)))
    held = min(_SPECTRUM_BYTES // width, spare) // example if inside else free
    if copies or not inside:
        beside = copies if inside else copies + example
        held = min(held, _SPECTRUM_BYTES // width // example, free * 3 // 4 // beside)
    return _Share(min(max(1, held), conv.batch), work, inside)


def add_lags(
    moment: Tensor, inputs: Tensor, conv: Conv, how: Arranged, spare: Tensor
) -> None:
    """Put `PᵀP / (N T)` of `how.conv` into a moment, whatever is there.

    `spare` is flat memory to use before the moment is written: its own.
    """
    # Nothing in the families depends on the batch.
    families = _families(how.conv._replace(batch=1), moment.dtype, moment.device)
    counts = [math.prod(family.shape) for family in families]
    channels = how.conv.channels // conv.groups
    terms = moment.new_zeros(sum(counts), conv.groups * channels**2)
    sizes = sum(counts), families[0].inverse.shape[1]
    held, work, inside = shares(conv, how, sizes, spare.numel(), moment.element_size())
    spare = spare if inside else spare[:0]
    for examples in inputs.tensor_split(-(-conv.batch // held)):
        x = arranged(examples.to(moment.dtype), conv, how)
        x = torch.unflatten(x, 1, (conv.groups, channels))
        for family, part in zip(families, torch.split(terms, counts), strict=True):
            _add_family(part.view(*family.shape, -1), x, family, work, spare)

    # Upper blocks, and half of each diagonal one.
    size = len(families[0].signs)
    upper = torch.ones(size, size).triu() - torch.eye(size) / 2
    signs = torch.cat([family.signs for family in families], -1)
    signs = (signs * (upper.to(signs) / conv.rows)[:, :, None]).flatten(0, 1)
    blocks = torch.unflatten(moment, 2, (channels, -1))
    blocks = torch.unflatten(blocks, 1, (channels, -1))
    held = max(1, work // (size * size * channels))  # rows of a block at once
    for some, part in zip(
        torch.split(blocks, max(1, held // channels)),
        torch.split(terms.unflatten(1, (conv.groups, -1)), max(1, held // channels), 1),
        strict=True,
    ):
        for rows in range(0, channels, held):
            left = part.unflatten(2, (channels, channels))[:, :, rows : rows + held]
            block = (signs @ left.flatten(1)).view(size, size, *left.shape[1:])
            some[:, rows : rows + held] = block.permute(2, 3, 0, 4, 1)
    add_transpose(moment)


def _add_family(
    terms: Tensor, x: Tensor, family: _Family, work: int, spare: Tensor
) -> None:
    """Add the correlations of x to terms, [points, lags, groups * C * C]."""
    a = b = _spectrum(x, family, work, spare)
    groups, channels = x.shape[1:3]
    parts = bands(channels, x.device, _BAND)
    if not family.hermitian:
        (_, first), *others = family.points.values()
        held = max(1, work * len(a) // a.numel())  # of the first dimension's points
        pairs = torch.split(terms.unflatten(0, (first.shape[1], -1)), held)
        for part, (points, partners) in zip(
            pairs, (at.unbind() for at in torch.split(first, held, 1)), strict=True
        ):
            left, right = a.index_select(0, points), b.index_select(0, partners)
            for i, (_, at) in enumerate(others, 1):
                left, right = left.index_select(i, at[0]), right.index_select(i, at[1])
            flat = part.flatten(0, 1)
            left, right = (z.reshape(len(flat), -1, *z.shape[-4:]) for z in (left, right))
            _correlate(flat, flat, left, right, family, work)
        return
    # [points, frequencies, groups, re/im, N, C]
    a, b = (z.reshape(len(terms), -1, *z.shape[-4:]) for z in (a, b))
    if len(parts) < 2:
        _correlate(terms, terms, a, b, family, work)
        return
    pairs = terms.view(*terms.shape[:2], groups, channels, channels)
    spare = spare[a.numel() :]
    for band in parts:
        right = pairs[..., band, band.start :]
        even, odd = _room(x, spare, (2, *right.shape)).zero_()
        left = a[..., band], b[..., band.start :]
        _correlate(even.flatten(2), odd.flatten(2), *left, family, work)
        right += even
        right += odd
        below, width = pairs[..., band.stop :, band], band.stop - band.start
        below += even[..., width:].mT
        below -= odd[..., width:].mT


def _room(x: Tensor, spare: Tensor, shape: Sequence[int]) -> Tensor:
    size = math.prod(shape)
    inside = size <= spare.numel()
    return spare[:size].view(shape) if inside else x.new_empty(shape)


def _correlate(
    even: Tensor, odd: Tensor, a: Tensor, b: Tensor, family: _Family, work: int
) -> None:
    """Add the lags of the real parts of cross-spectra, and those of the imaginary ones."""
    inverse = family.inverse.expand(len(even), -1, -1, -1)
    step = max(1, work // even[:, 0].numel())
    for f in range(0, a.shape[1], step):
        af = a[:, f : f + step].flatten(0, 2)  # [points * f * groups, re/im, N, C]
        bf = b[:, f : f + step].flatten(0, 2)
        cosines, sines = inverse[:, :, f : f + step].unbind(-1)
        shape = (len(even), -1, even.shape[2])
        real = torch.bmm(af.flatten(1, 2).mT, bf.flatten(1, 2))
        even.baddbmm_(cosines, real.view(shape))
        del real  # before the next is made, as below
        if family.lengths:
            imag = torch.bmm(af[:, 0].mT, bf[:, 1])
            if family.hermitian and imag.shape[1] == imag.shape[2]:
                imag = imag - imag.mT
            else:
                imag.baddbmm_(af[:, 1].mT, bf[:, 0], alpha=-1)
            odd.baddbmm_(sines, imag.view(shape))
            del imag


def _spectrum(x: Tensor, family: _Family, work: int, spare: Tensor) -> Tensor:
    """Transform [N, groups, C, *space]; [*points, *frequencies, groups, 2, N, C]."""
    lengths = list(family.lengths.values())
    order = [*family.points, *family.lengths, 1, x.dim(), 0, 2]
    if not lengths:
        return _at_points(x, family).unsqueeze(-1).permute(order)
    half = [*lengths[:-1], lengths[-1] // 2 + 1]
    points = [len(locations) for locations, _ in family.points.values()]
    shape = (*points, *half, x.shape[1], 2, x.shape[0], x.shape[2])
    out = _room(x, spare, shape)
    step = max(1, work // out[..., 0, :].numel())
    for n in range(0, len(x), step):
        piece = _at_points(x[n : n + step], family)
        part = out[..., n : n + step, :]
        if family.matrices:
            y = _by_products(piece, family)
            y = y.view(*points, 2, *half, *x.shape[1:2], *part.shape[-2:])
            part.copy_(y.movedim(len(points), -3))
        else:
            y = torch.fft.rfftn(piece, lengths, list(family.lengths))
            part.copy_(torch.view_as_real(y).permute(order))
    return out


def _by_products(x: Tensor, family: _Family) -> Tensor:
    """The same transform by matrices: [points, re/im, *frequencies, groups, N, C]."""
    y = x.permute(*family.points, *family.lengths, 1, 0, 2).contiguous()
    sizes = [x.shape[dim] for dim in family.lengths]
    for matrix in family.matrices:
        sizes.pop()
        before = math.prod(x.shape[dim] for dim in family.points) * math.prod(sizes)
        y = torch.matmul(matrix, y.view(before, matrix.shape[1], -1))
    return y


def _at_points(x: Tensor, family: _Family) -> Tensor:
    for dim, (locations, _) in family.points.items():
        x = x.index_select(dim, locations)
    return x
