r"""Second moment of convolution patches, as a rule without forming the patches.

A convolution sees its input through patches. With one row per example and output
location, one column per (channel, kernel offset) and a last column of ones if there
is a bias, they form the matrix P, and the input factor of KFC is

    A = PᵀP / (N T)                               (Grosse & Martens 2016, section 3)

Notation: N examples, C channels (of one group), T output locations, k kernel size,
d dilation, n input size, (b, a) padding before and after, each per dimension; u and v
kernel offsets, δ = v - u their lag; x[p] the C channels at location p of the input.

"chunks" forms P piece by piece in one bounded buffer: (k₁k₂C)² multiply-adds per row.

"lags" uses that block (u, v) of PᵀP is a sum of x[p] x[p + dδ]ᵀ which depends on u only
through the locations that offset u cannot reach. In one dimension

    block(u, v) = full(δ) - Σ_{p not in reach(u)} point(p, δ)
    full(δ) = Σ_p x[p] x[p + dδ]ᵀ,    point(p, δ) = x[p] x[p + dδ]ᵀ
    reach(u) = {p : du - b <= p < n + a - d(k - 1 - u)}

and in several it is the product of such differences, full lags in some dimensions and
points in the others. One Fourier transform gives all lags at once (Wiener-Khinchin):
the cross-spectra Σ_n conj(x̂[f]) x̂[f]ᵀ take some 2 C² multiply-adds per location
whatever the kernel, and a small matrix takes them to the lags that are needed.

Left out: lags of strided kernels (blocks share too few), and sparse inputs.

R. Grosse, J. Martens, "A Kronecker-factored approximate Fisher matrix for convolution
layers", ICML 2016, arXiv 1602.01407.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Size: TypeAlias = int | Sequence[int]
Padding: TypeAlias = str | int | Sequence[int | Sequence[int]]
Pairs: TypeAlias = tuple[tuple[int, int], ...]

_PADDING_MODES = ("zeros", "circular", "reflect", "replicate")
_METHODS = ("auto", "chunks", "lags")

_PATCH_BYTES = 16 * 2**20  # patches that "chunks" holds at once
_SPECTRUM_BYTES = 24 * 2**20  # spectra that "lags" holds at once
_CACHE_BYTES = 2**21  # pieces of work that should stay in the cache


class _Conv(NamedTuple):
    """A convolution and its input, every argument spelled out per dimension."""

    batch: int
    channels: int
    groups: int
    space: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Pairs
    padding_mode: str
    out: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.batch * math.prod(self.out)

    @property
    def columns(self) -> int:
        return self.channels * math.prod(self.kernel) // self.groups


def patch_second_moment(
    inputs: Tensor,
    kernel_size: Size,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    *,
    groups: int = 1,
    has_bias: bool = False,
    padding_mode: str = "zeros",
    method: str = "auto",
) -> Tensor:
    """Second moment ``PᵀP / (N T)`` of the patches a convolution sees.

    Columns are channel-major, ``(c * kh + u) * kw + v``: the order of
    ``weight.flatten(1)`` and of ``F.unfold``. Rows over zero padding count.

    Args:
        inputs: ``[N, C, *space]`` with one to three spatial dimensions.
        kernel_size: k, an integer or one per dimension; so are stride and dilation.
        stride: step between output locations.
        padding: an integer, one per dimension, ``(before, after)`` pairs, ``"SAME"``
            (TensorFlow's, which depends on the stride) or ``"VALID"``.
        dilation: d, step between kernel offsets.
        groups: channel groups; each has its own patches.
        has_bias: append a column of ones to the patches.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
        method: ``"chunks"``, ``"lags"`` (needs stride 1 wherever k > 1), or
            ``"auto"`` for the one expected to be faster.

    Returns:
        A symmetric ``[D, D]`` matrix with D = k₁k₂C (+ 1), or with groups a stack
        ``[groups, D, D]`` with D = k₁k₂C/groups (+ 1). Detached, at least float32.

    Example:
        >>> patch_second_moment(torch.ones(1, 1, 4), 2, has_bias=True)
        tensor([[1., 1., 1.],
                [1., 1., 1.],
                [1., 1., 1.]])
    """
    sizes = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    conv = _describe(inputs, sizes, padding, groups, padding_mode)
    add = _add_chunks if _choose(conv, method) == "chunks" else _add_lags
    dtype, device = torch.promote_types(inputs.dtype, torch.float32), inputs.device
    size = conv.columns
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        moment = inputs.new_zeros(groups, size + has_bias, size + has_bias, dtype=dtype)
        add(moment[:, :size, :size], inputs, conv)
        if has_bias:
            total = _pad(inputs.sum(0, keepdim=True, dtype=dtype), conv, conv.padding)
            sums = _windows(total, conv).flatten(2 + len(conv.kernel)).sum(-1)
            moment[:, -1, :size] = sums.view(groups, size) / conv.rows
            moment[:, :size, -1] = moment[:, -1, :size]
            moment[:, -1, -1] = 1
    return moment if groups > 1 else moment[0]


def patch_view(
    inputs: Tensor,
    kernel_size: Size,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    *,
    padding_mode: str = "zeros",
) -> Tensor:
    """Patches as a view of the padded inputs, ``[N, C, *kernel, *out]``; not a copy.

    Arguments are those of ``patch_second_moment``. Reshaping the view copies it.

    Example:
        >>> patch_view(torch.arange(4.0).view(1, 1, 4), 2)[0, 0]
        tensor([[0., 1., 2.],
                [1., 2., 3.]])
    """
    sizes = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    conv = _describe(inputs, sizes, padding, 1, padding_mode)
    return _windows(_pad(inputs, conv, conv.padding), conv)


def mean_patch(
    inputs: Tensor,
    kernel_size: Size,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    *,
    padding_mode: str = "zeros",
) -> Tensor:
    """Patches averaged over the output locations, ``[N, C, *kernel]``; none is formed.

    Arguments are those of ``patch_second_moment``. At least float32.

    Example:
        >>> mean_patch(torch.arange(4.0).view(1, 1, 4), 2)
        tensor([[[1., 2.]]])
    """
    sizes = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    conv = _describe(inputs, sizes, padding, 1, padding_mode)
    x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    x = _pad(x, conv, conv.padding)
    # For each offset the mean of a slice, one dimension after the other: x times a matrix
    # that is 1/o where offset u reaches location p. The last first: it is contiguous.
    for i in reversed(range(len(conv.kernel))):
        s, o = conv.stride[i], conv.out[i]
        p = torch.arange(x.shape[2 + i], device=x.device).unsqueeze(1)
        steps = p - conv.dilation[i] * torch.arange(conv.kernel[i], device=x.device)
        reached = (steps >= 0) & (steps <= s * (o - 1)) & (steps % s == 0)
        x = (x.movedim(2 + i, -1) @ (reached.to(x.dtype) / o)).movedim(-1, 2 + i)
    return x


def resolve_padding(
    padding: Padding,
    space: Sequence[int],
    kernel_size: Size,
    stride: Size = 1,
    dilation: Size = 1,
) -> Pairs:
    """Padding as one ``(before, after)`` pair per spatial dimension.

    ``"SAME"`` is TensorFlow's: ``ceil(n / stride)`` outputs, the larger half of the
    padding after. At stride 1 it is the ``"same"`` of ``torch.nn.Conv2d``.

    Example:
        >>> resolve_padding("SAME", (7, 8), 3, stride=2)
        ((1, 1), (0, 1))
    """
    dims = len(space)
    if padding in ("VALID", "valid"):
        return ((0, 0),) * dims
    if padding in ("SAME", "same"):
        k = _per_dimension("kernel_size", kernel_size, dims)
        s = _per_dimension("stride", stride, dims)
        d = _per_dimension("dilation", dilation, dims)
        total = [
            max((-(-n // s[i]) - 1) * s[i] + (k[i] - 1) * d[i] + 1 - n, 0)
            for i, n in enumerate(space)
        ]
        return tuple((t // 2, t - t // 2) for t in total)
    if not isinstance(padding, str):
        entries = [padding] * dims if isinstance(padding, int) else padding
        pairs = [(e, e) if isinstance(e, int) else tuple(e) for e in entries]
        if len(pairs) == dims and all(len(p) == 2 and min(p) >= 0 for p in pairs):
            return tuple((before, after) for before, after in pairs)
    raise ValueError(
        f"padding must be 'SAME', 'VALID', a non-negative integer, or {dims} integers "
        f"or (before, after) pairs, one per spatial dimension; got {padding!r}"
    )


def _per_dimension(name: str, value: Size, dims: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims or min(values) < 1:
        raise ValueError(
            f"{name} must be a positive integer or {dims} of them, one per spatial "
            f"dimension; got {value!r}"
        )
    return values


def _describe(
    inputs: Tensor, sizes: dict[str, Size], padding: Padding, groups: int, mode: str
) -> _Conv:
    """Check the arguments and spell them out."""
    if not 3 <= inputs.dim() <= 5 or inputs.numel() == 0:
        raise ValueError(
            "inputs must be [N, C, *space], 1 to 3 spatial dimensions, none of them "
            f"empty; got shape {tuple(inputs.shape)}"
        )
    if not inputs.is_floating_point():
        raise TypeError(f"inputs must be real floating point; got {inputs.dtype}")
    batch, channels, *space = inputs.shape
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} channels; got {groups}")
    if mode not in _PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {_PADDING_MODES}; got {mode!r}")
    k, s, d = (_per_dimension(name, n, len(space)) for name, n in sizes.items())
    pairs = resolve_padding(padding, space, k, s, d)
    # A reflection leaves out the edge itself.
    widest = {"reflect": -1, "circular": 0}.get(mode, math.inf)
    out = list[int]()
    for i, (n, (before, after)) in enumerate(zip(space, pairs, strict=True)):
        if max(before, after) > n + widest:
            raise ValueError(
                f"padding {pairs} is too large for padding_mode {mode!r} and "
                f"inputs of size {tuple(space)}"
            )
        out.append((n + before + after - d[i] * (k[i] - 1) - 1) // s[i] + 1)
    if min(out) < 1:
        raise ValueError(
            f"kernel_size must fit into the padded input; got {k} with dilation {d} "
            f"for inputs of size {tuple(space)} with padding {pairs}"
        )
    return _Conv(
        batch, channels, groups, tuple(space), k, s, d, pairs, mode, tuple(out)
    )  # fmt: skip


def _choose(conv: _Conv, method: str) -> str:
    if method not in _METHODS:
        raise ValueError(f"method must be one of {_METHODS}; got {method!r}")
    shared = all(1 in pair for pair in zip(conv.kernel, conv.stride, strict=True))
    if method == "lags" and not shared:
        raise ValueError(
            "method 'lags' needs stride 1 wherever the kernel is larger than 1, since "
            "strided patches do not share their lags; got kernel_size "
            f"{conv.kernel} and stride {conv.stride}"
        )
    if method != "auto":
        return method
    return "lags" if shared and _lags_pay(conv) else "chunks"


def _pad(x: Tensor, conv: _Conv, padding: Pairs) -> Tensor:
    flat = [size for pair in reversed(padding) for size in pair]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, flat, mode=mode) if any(flat) else x


def _windows(x: Tensor, conv: _Conv) -> Tensor:
    """View of a padded input as patches, [N, C, *kernel, *out]."""
    dims = len(conv.kernel)
    for i, (k, d) in enumerate(zip(conv.kernel, conv.dilation, strict=True)):
        x = x.unfold(2 + i, d * (k - 1) + 1, conv.stride[i])[..., ::d]
    return x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))


def _add_chunks(moment: Tensor, inputs: Tensor, conv: _Conv) -> None:
    width = conv.columns * conv.groups
    held = max(1, _PATCH_BYTES // (width * moment.element_size()))  # rows at once
    # A piece takes whole trailing dimensions of [N, *out] while they fit.
    batch, *sizes = (
        min(n, max(1, held // math.prod(conv.out[i:])))
        for i, n in enumerate((conv.batch, *conv.out))
    )
    buffer = moment.new_empty(width * batch * math.prod(sizes))
    for examples in torch.split(inputs, batch):
        patches = _windows(_pad(examples.to(moment.dtype), conv, conv.padding), conv)
        starts = (range(0, n, size) for n, size in zip(conv.out, sizes, strict=True))
        for start in itertools.product(*starts):
            piece = patches.movedim(0, 1 + len(start))  # [C, *kernel, N, *out]
            for i, (first, size) in enumerate(zip(start, sizes, strict=True)):
                dim = i - len(start)
                piece = piece.narrow(dim, first, min(size, conv.out[i] - first))
            filled = buffer[: piece.numel()].view(piece.shape).copy_(piece)
            columns = filled.view(conv.groups, conv.columns, -1)
            moment.baddbmm_(columns, columns.mT)
    _add_transpose(moment.div_(2 * conv.rows))


class _Axis(NamedTuple):
    """The correlations that one dimension calls for."""

    lags: Tensor  # dδ of full(δ)
    points: Tensor  # p and p + dδ of point(p, δ): [2, points]
    signs: Tensor  # block(u, v) as a sum of these: [k, k, lags + points]
    length: int  # of a transform that keeps the lags apart


class _Family(NamedTuple):
    """Terms with points in the same dimensions of [N, groups, C, *space]."""

    points: dict[int, tuple[Tensor, Tensor]]  # by dimension: locations, their pairs
    lengths: dict[int, int]  # of the transform, by dimension
    shape: tuple[int, int]  # points, lags
    inverse: Tensor  # takes spectra to lags: [lags, frequencies, re/im]
    signs: Tensor  # block(u, v) as a sum of terms: [k₁k₂, k₁k₂, points * lags]


def _real_padding(conv: _Conv) -> Pairs:
    """Padding that has to be there; zeros around a kernel need not."""
    real = conv.padding_mode != "zeros"
    pairs = zip(conv.padding, conv.stride, strict=True)
    return tuple(pair if real or s > 1 else (0, 0) for pair, s in pairs)


def _axes(conv: _Conv) -> list[_Axis]:
    axes = list[_Axis]()
    for i, (before, after) in enumerate(_real_padding(conv)):
        n = -(-(conv.space[i] + before + after) // conv.stride[i])
        b, a = conv.padding[i][0] - before, conv.padding[i][1] - after
        axes.append(_axis(n, conv.kernel[i], conv.dilation[i], b, a, half=i == 0))
    return axes


def _axis(n: int, k: int, d: int, b: int, a: int, *, half: bool) -> _Axis:
    """Correlations for n locations; with half, only for v >= u."""
    lags = [lag for lag in range(0 if half else 1 - k, k) if d * abs(lag) < n]
    missed = [
        [p for p in range(n) if not d * u - b <= p < n + a - d * (k - 1 - u)]
        for u in range(k)
    ]
    offsets = list(itertools.product(range(k), repeat=2))
    points = {
        (p, v - u): None
        for u, v in offsets
        for p in missed[u]
        if v - u in lags and 0 <= p + d * (v - u) < n
    }
    signs = [
        [float(v - u == lag) for lag in lags]
        + [-float(v - u == lag and p in missed[u]) for p, lag in points]
        for u, v in offsets
    ]
    return _Axis(
        torch.tensor(lags) * d,
        torch.tensor([[p, p + d * lag] for p, lag in points]).long().view(-1, 2).T,
        torch.tensor(signs, dtype=torch.float64).view(k, k, -1),
        # The next length without a prime factor above 5.
        next(m for m in itertools.count(n + d * max(lags)) if 30**32 % m == 0),
    )


@functools.lru_cache(maxsize=256)
def _lags_pay(conv: _Conv) -> bool:
    """Whether "lags" should be faster, by costs in multiply-adds of a large matmul.

    The factors were fitted to some 200 random convolutions on a CPU.
    """
    axes, each = _axes(conv), conv.channels // conv.groups
    terms = math.prod(axis.signs.shape[-1] for axis in axes)
    cost = 5e7 + 3 * math.prod(conv.kernel) ** 2 * terms * conv.channels * each
    for at_points in itertools.product((False, True), repeat=len(axes)):
        pairs = list(zip(axes, at_points, strict=True))
        full = [axis for axis, at in pairs if not at]
        spectra = math.prod(axis.points.shape[1] for axis, at in pairs if at)
        spectra *= math.prod(axis.length for axis in full) * conv.channels
        lags = math.prod(len(axis.lags) for axis in full)
        cost += spectra * (conv.batch * (200 + 4 * (each + 16)) + 15 * lags * each)
    chunks = conv.rows * conv.groups * conv.columns * (30 + conv.columns)
    return cost < chunks + 1e7


@functools.lru_cache(maxsize=256)  # a layer asks for the same ones at every step
def _families(conv: _Conv, dtype: torch.dtype, device: torch.device) -> list[_Family]:
    axes, families = _axes(conv), list[_Family]()
    for at_points in itertools.product((False, True), repeat=len(axes)):
        order = sorted(range(len(axes)), key=lambda i: not at_points[i])  # points first
        points = {3 + i: axes[i].points for i in order if at_points[i]}
        full = {3 + i: axes[i] for i in order if not at_points[i]}
        inverse = torch.ones(1, 1, dtype=torch.complex128)
        for dim, (lags, _, _, m) in full.items():
            # The transform of real numbers keeps one of each conjugate pair.
            half = dim == max(full)
            f = torch.arange(m // 2 + 1 if half else m)
            weight = (1.0 + (half & (f > 0) & (2 * f < m)).double()) / m
            turns = (torch.outer(lags, f) % m).double() / m
            inverse = torch.kron(inverse, weight * torch.exp(-2j * math.pi * turns))
        parts = [
            axis.signs.tensor_split([len(axis.lags)], -1)[at]
            for axis, at in zip(axes, at_points, strict=True)
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
                shape,
                torch.view_as_real(inverse).to(device, dtype),
                signs.to(device, dtype),
            )
            families.append(family)
    return families


def _add_lags(moment: Tensor, inputs: Tensor, conv: _Conv) -> None:
    real = _real_padding(conv)
    # Nothing in the families depends on the batch.
    families = _families(conv._replace(batch=1), moment.dtype, moment.device)
    counts = [math.prod(family.shape) for family in families]
    channels = conv.channels // conv.groups
    terms = moment.new_zeros(sum(counts), conv.groups * channels**2)

    # Within a quarter of the patches: terms, a spectrum, and work on pieces of it.
    width = moment.element_size()
    quarter = conv.rows * conv.columns * conv.groups // 4
    free = max(quarter - terms.numel(), quarter // 4)  # many terms, few patches
    work = max(1, min(_CACHE_BYTES // width, free // 16))
    held = min(_SPECTRUM_BYTES // width, free * 5 // 6)
    example = 2 * conv.channels * families[0].inverse.shape[1]
    for examples in inputs.tensor_split(-(-conv.batch // max(1, held // example))):
        x = _pad(examples.to(moment.dtype), conv, real)
        x = x[(slice(None),) * 2 + tuple(slice(None, None, s) for s in conv.stride)]
        x = torch.unflatten(x, 1, (conv.groups, channels))
        for family, part in zip(families, torch.split(terms, counts), strict=True):
            _add_family(part.view(*family.shape, -1), x, family, work)

    # Upper blocks, and half of each diagonal one.
    size = len(families[0].signs)
    upper = torch.ones(size, size).triu() - torch.eye(size) / 2
    signs = torch.cat([family.signs for family in families], -1)
    signs *= (upper.to(signs) / conv.rows)[:, :, None]
    blocks = torch.unflatten(moment, 2, (channels, -1))
    blocks = torch.unflatten(blocks, 1, (channels, -1))
    step = max(1, work // (size * terms.shape[1]))
    for u in range(0, size, step):
        block = signs[u : u + step].flatten(0, 1) @ terms
        block = block.view(-1, size, conv.groups, channels, channels)
        blocks[:, :, u : u + step] = block.permute(2, 3, 0, 4, 1)
    _add_transpose(moment)


def _add_transpose(moment: Tensor) -> None:
    """In place and in bands; the result is exactly symmetric."""
    size = moment.shape[-1]
    band = max(1, _CACHE_BYTES // (size * moment.element_size()))
    for i in range(0, size, band):
        rows, columns = moment[:, i : i + band, i:], moment[:, i:, i : i + band]
        total = rows + columns.mT
        rows.copy_(total)
        columns.copy_(total.mT)


def _add_family(terms: Tensor, x: Tensor, family: _Family, work: int) -> None:
    """Add the correlations of x to terms, [points, lags, groups * C * C]."""
    for dim, (locations, _) in family.points.items():
        x = x.index_select(dim, locations)
    a = b = _spectrum(x, family, work)
    for i, (_, (points, partners)) in enumerate(family.points.values()):
        a, b = a.index_select(i, points), b.index_select(i, partners)
    # [points, frequencies, groups, re/im, N, C]
    a, b = (z.reshape(len(terms), -1, *z.shape[-4:]) for z in (a, b))
    inverse = family.inverse.expand(len(terms), -1, -1, -1)
    step = max(1, work // terms[:, 0].numel())
    for f in range(0, a.shape[1], step):
        af = a[:, f : f + step].flatten(0, 2)  # [points * f * groups, re/im, N, C]
        bf = b[:, f : f + step].flatten(0, 2)
        cosines, sines = inverse[:, :, f : f + step].unbind(-1)
        shape = (len(terms), -1, terms.shape[2])
        real = torch.bmm(af.flatten(1, 2).mT, bf.flatten(1, 2))
        terms.baddbmm_(cosines, real.view(shape))
        if family.lengths:
            imag = torch.bmm(af[:, 0].mT, bf[:, 1])
            imag.baddbmm_(af[:, 1].mT, bf[:, 0], alpha=-1)
            terms.baddbmm_(sines, imag.view(shape))


def _spectrum(x: Tensor, family: _Family, work: int) -> Tensor:
    """Transform [N, groups, C, *space]; [*points, *frequencies, groups, 2, N, C]."""
    lengths = list(family.lengths.values())
    order = [*family.points, *family.lengths, 1, x.dim(), 0, 2]
    if not lengths:
        return x.unsqueeze(-1).permute(order)
    half = [*lengths[:-1], lengths[-1] // 2 + 1]
    points = [x.shape[dim] for dim in family.points]
    out = x.new_empty(*points, *half, x.shape[1], 2, x.shape[0], x.shape[2])
    step = max(1, work // out[..., 0, :].numel())
    for n in range(0, len(x), step):
        y = torch.fft.rfftn(x[n : n + step], lengths, list(family.lengths))
        out[..., n : n + step, :] = torch.view_as_real(y).permute(order)
    return out
