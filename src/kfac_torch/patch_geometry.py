r"""Which inputs the patches of a convolution are made of.

Notation: N examples, C channels (of one group), T output locations, k kernel size,
d dilation, s stride, n input size, (b, a) padding before and after, each per dimension;
u and v kernel offsets, δ = v - u their lag.

A strided convolution sees the patches that one of stride 1 sees over the phases of its
input: with `y[φ, j] = x[sj + φ]` (s times the channels, n/s locations) offset u of
location t is

    x[st + du] = y[φ, t + i],      φ = du mod s,   i = ⌊du/s⌋

so `Arranged` is that convolution of stride 1, and which of its columns are ours.

Left out: patches themselves (`patch_moments`).
"""

from __future__ import annotations

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

PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


class Conv(NamedTuple):
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
        """N T: examples times output locations."""
        return self.batch * math.prod(self.out)

    @property
    def columns(self) -> int:
        """Of the patches of one group."""
        return self.channels * math.prod(self.kernel) // self.groups


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


def describe(
    inputs: Tensor, sizes: dict[str, Size], padding: Padding, groups: int, mode: str
) -> Conv:
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
    if mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {PADDING_MODES}; got {mode!r}")
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
    return Conv(
        batch, channels, groups, tuple(space), k, s, d, pairs, mode, tuple(out)
    )  # fmt: skip


def pad(x: Tensor, conv: Conv, padding: Pairs) -> Tensor:
    """Pad inputs as the convolution does, by so much."""
    flat = [size for pair in reversed(padding) for size in pair]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, flat, mode=mode) if any(flat) else x


def windows(x: Tensor, conv: Conv) -> Tensor:
    """View of a padded input as patches, [N, C, *kernel, *out]."""
    dims = len(conv.kernel)
    for i, (k, d) in enumerate(zip(conv.kernel, conv.dilation, strict=True)):
        x = x.unfold(2 + i, d * (k - 1) + 1, conv.stride[i])[..., ::d]
    return x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))


def joined(conv: Conv, number: int) -> Conv:
    """Return the convolution that sees so many neighbouring patches at once.

    Neighbours in the last dimension, undilated; its patches are those of all of them.
    """
    wide = conv.stride[-1] * (number - 1) + conv.kernel[-1]
    return conv._replace(
        kernel=(*conv.kernel[:-1], wide),
        stride=(*conv.stride[:-1], conv.stride[-1] * number),
        out=(*conv.out[:-1], conv.out[-1] // number),
    )


class Arranged(NamedTuple):
    """A convolution of stride 1 that sees the same patches, and more.

    `padding` of it is of zeros that need not be there: those around an input that is not
    strided. All other padding is part of its input.
    """

    conv: Conv
    steps: tuple[int, ...]  # the stride of each dimension whose phases are channels, or 1
    pads: Pairs  # put around the input; the second may be negative

    @property
    def spread(self) -> int:
        """Channels of this for each of the convolution's."""
        return math.prod(self.steps)


@functools.lru_cache(maxsize=256)
def arrange(conv: Conv) -> Arranged:
    """Return the convolution of stride 1 over the phases of a strided one."""
    steps, pads, padding = list[int](), list[tuple[int, int]](), list[tuple[int, int]]()
    space, kernel, dilation = list[int](), list[int](), list[int]()
    real = conv.padding_mode != "zeros"
    for i, (n, k, s) in enumerate(zip(conv.space, conv.kernel, conv.stride, strict=True)):
        d, (b, a) = conv.dilation[i], conv.padding[i]
        step = s if k > 1 else 1
        here = (b, a) if real or s > 1 else (0, 0)
        if step > 1:
            k, d = d * (k - 1) // s + 1, 1
            here = (b, s * (conv.out[i] + k - 1) - n - b)
        steps.append(step)
        pads.append(here)
        padding.append((b, a) if here == (0, 0) and s == 1 and not real else (0, 0))
        space.append(-(-(n + sum(here)) // s))
        kernel.append(k)
        dilation.append(d)
    once = (1,) * len(steps)
    sizes = (tuple(space), tuple(kernel), once, tuple(dilation), tuple(padding))
    channels = conv.channels * math.prod(steps)
    flat = Conv(conv.batch, channels, conv.groups, *sizes, "zeros", conv.out)
    return Arranged(flat, tuple(steps), tuple(pads))


def arranged(x: Tensor, conv: Conv, how: Arranged) -> Tensor:
    """Inputs as `how.conv` takes them, `[N, C * phases, *space]`; a view if it can be."""
    if conv.padding_mode == "zeros":
        x = pad(x, conv, how.pads)
    else:
        x = pad(x, conv, conv.padding)
        pairs = zip(conv.padding, how.pads, strict=True)
        rest = [size for (_, a), (_, end) in pairs for size in (end - a, 0)]
        x = F.pad(x, rest[::-1]) if any(rest) else x
    steps = zip(conv.stride, how.steps, strict=True)
    x = x[(..., *(slice(None, None, s if step == 1 else 1) for s, step in steps))]
    dims = len(how.steps)
    if how.spread > 1:
        for i, step in enumerate(how.steps):
            x = x.unflatten(2 + 2 * i, (-1, step))  # [N, C, n/s, s, ...]
        order = (*range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2))
        x = x.permute(0, 1, *order).flatten(1, 1 + dims)
    return x


@functools.lru_cache(maxsize=256)
def chosen_columns(conv: Conv, how: Arranged, device: torch.device) -> Tensor:
    """Which columns of the patches of `how.conv` those of `conv` are, of one group."""
    phases = offsets = torch.zeros(1, dtype=torch.long)
    for i, (k, step) in enumerate(zip(conv.kernel, how.steps, strict=True)):
        u = torch.arange(k)
        where = conv.dilation[i] * u if step > 1 else u
        phases = (phases[:, None] * step + where % step).flatten()
        inner = where // step
        offsets = (offsets[:, None] * how.conv.kernel[i] + inner).flatten()
    channels = torch.arange(conv.channels // conv.groups)[:, None] * how.spread + phases
    size = math.prod(how.conv.kernel)
    return (channels * size + offsets).flatten().to(device)


class Axis(NamedTuple):
    """The correlations that one dimension calls for."""

    lags: Tensor  # dδ of full(δ)
    points: Tensor  # p and p + dδ of point(p, δ): [2, points]
    signs: Tensor  # block(u, v) as a sum of these: [k, k, lags + points]
    length: int  # of a transform that keeps the lags apart


def axes(conv: Conv) -> list[Axis]:
    """The correlations along each dimension of a convolution of stride 1."""
    return [
        _axis(n, k, d, *pair, half=i == 0)
        for i, (n, k, d, pair) in enumerate(
            zip(conv.space, conv.kernel, conv.dilation, conv.padding, strict=True)
        )
    ]


def reach(n: int, k: int, d: int, b: int, a: int, u: int) -> range:
    """The locations of an input that offset u of a kernel reaches."""
    return range(max(0, d * u - b), min(n, n + a - d * (k - 1 - u)))


def _axis(n: int, k: int, d: int, b: int, a: int, *, half: bool) -> Axis:
    """Correlations for n locations; with half, only for v >= u."""
    lags = [lag for lag in range(0 if half else 1 - k, k) if d * abs(lag) < n]
    missed = [[p for p in range(n) if p not in reach(n, k, d, b, a, u)] for u in range(k)]
    offsets = list(itertools.product(range(k), repeat=2))
    points = sorted(
        {
            (p, v - u)
            for u, v in offsets
            for p in missed[u]
            if v - u in lags and 0 <= p + d * (v - u) < n
        }
    )
    signs = [
        [float(v - u == lag) for lag in lags]
        + [-float(v - u == lag and p in missed[u]) for p, lag in points]
        for u, v in offsets
    ]
    return Axis(
        torch.tensor(lags) * d,
        torch.tensor([[p, p + d * lag] for p, lag in points]).long().view(-1, 2).T,
        torch.tensor(signs, dtype=torch.float64).view(k, k, -1),
        # The next length without a prime factor above 5.
        next(m for m in itertools.count(n + d * max(lags)) if 30**32 % m == 0),
    )
