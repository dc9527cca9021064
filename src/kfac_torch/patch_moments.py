r"""Second moment of convolution patches, as a rule without forming the patches.

A convolution sees its input through patches. With one row per example and output
location, one column per (channel, kernel offset) and a last column of ones if there
is a bias, they form the matrix P, and the input factor of KFC is

    A = PᵀP / (N T)                               (Grosse & Martens 2016, section 3)

Notation: N examples, C channels (of one group), T output locations, k kernel size; more
in `patch_geometry`. Four methods, the same matrix:

"chunks" forms P piece by piece in one bounded buffer (`patch_strips`): (k₁k₂C)²
multiply-adds per row, or nearly half of them where the bands of `gram` pay.

"strips" forms one kernel offset of the first dimension, or as many as the stride; products
with the next such strips hold all the others, up to the borders: k₁(k₂C)² multiply-adds.
Where channels are few it is that of several neighbouring patches, joined in the last
dimension, which overlap: wider products, and fewer numbers to copy.

"lags" (`patch_lags`): what two kernel offsets share depends on how far they are apart,
up to the borders, and one Fourier transform gives all such lags.

"slices" (`patch_slices`): products of whole slices of small inputs, where borders are
most of what there is.

The last two take strided convolutions as ones of stride 1 over the phases of the input.

Left out: sparse inputs.

R. Grosse, J. Martens, "A Kronecker-factored approximate Fisher matrix for convolution
layers", ICML 2016, arXiv 1602.01407.
"""

import functools
import itertools
import math

import torch
from torch import Tensor

from .gram import bands
from .patch_geometry import (
    Arranged,
    Conv,
    Padding,
    Size,
    arrange,
    axes,
    chosen_columns,
    describe,
    joined,
    pad,
    resolve_padding,
    windows,
)
from .patch_lags import add_lags, shares
from .patch_slices import add_slices, held_examples, worth_halving
from .patch_strips import Cut, add_strips, cut, piece_sizes

__all__ = ("mean_patch", "patch_second_moment", "patch_view", "resolve_padding")

_MOST_JOINED = 8  # neighbouring patches
_WORTH_JOINING = 0.93  # of the cost
_METHODS = ("auto", "chunks", "strips", "lags", "slices")


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
        method: ``"chunks"``, ``"strips"``, ``"lags"``, ``"slices"``, or ``"auto"`` for
            the one expected to be fastest.

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
    conv = describe(inputs, sizes, padding, groups, padding_mode)
    chosen = _choose(conv, method)
    dtype, device = torch.promote_types(inputs.dtype, torch.float32), inputs.device
    size = conv.columns
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        moment = inputs.new_zeros(groups, size + has_bias, size + has_bias, dtype=dtype)
        _add(moment[:, :size, :size], inputs, conv, chosen, moment.view(-1))
        if has_bias:
            total = pad(inputs.sum(0, keepdim=True, dtype=dtype), conv, conv.padding)
            sums = windows(total, conv).flatten(2 + len(conv.kernel)).sum(-1)
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
    conv = describe(inputs, sizes, padding, 1, padding_mode)
    return windows(pad(inputs, conv, conv.padding), conv)


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
    conv = describe(inputs, sizes, padding, 1, padding_mode)
    x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    x = pad(x, conv, conv.padding)
    # For each offset the mean of a slice, one dimension after the other: x times a matrix
    # that is 1/o where offset u reaches location p. The last first: it is contiguous.
    for i in reversed(range(len(conv.kernel))):
        s, o = conv.stride[i], conv.out[i]
        p = torch.arange(x.shape[2 + i], device=x.device).unsqueeze(1)
        steps = p - conv.dilation[i] * torch.arange(conv.kernel[i], device=x.device)
        reached = (steps >= 0) & (steps <= s * (o - 1)) & (steps % s == 0)
        x = (x.movedim(2 + i, -1) @ (reached.to(x.dtype) / o)).movedim(-1, 2 + i)
    return x


def _choose(conv: Conv, method: str) -> str:
    if method not in _METHODS:
        raise ValueError(f"method must be one of {_METHODS}; got {method!r}")
    if method != "auto":
        return method
    costs = _costs(conv)
    return min(costs, key=costs.__getitem__)


def _add(moment: Tensor, inputs: Tensor, conv: Conv, method: str, spare: Tensor) -> None:
    """Put `PᵀP / (N T)` into a moment of zeros, a part of the flat spare memory."""
    how = arrange(conv)
    wide = moment
    if method == "chunks":
        add_strips(moment, inputs, conv, cut(conv, whole=True))
        return
    if method == "strips":
        _add_strips(moment, inputs, conv)
        return
    if how.spread > 1:
        wide = moment.new_empty(conv.groups, how.conv.columns, how.conv.columns)
        spare = wide.view(-1)
    if method == "lags":
        add_lags(wide, inputs, conv, how, spare)
    else:
        add_slices(wide, inputs, conv, how)
    if wide is not moment:
        columns = chosen_columns(conv._replace(batch=1), how, moment.device)
        moment.copy_(wide[:, columns[:, None], columns])


def _add_strips(moment: Tensor, inputs: Tensor, conv: Conv) -> None:
    """Strips of joined patches: what each of these has is a part of their moment."""
    number = _joined_number(conv)
    if number == 1:
        add_strips(moment, inputs, conv, cut(conv))
        return
    wider, k, s = joined(conv, number), conv.kernel[-1], conv.stride[-1]
    wide = moment.new_zeros(conv.groups, wider.columns, wider.columns)
    add_strips(wide, inputs, wider, cut(wider))
    into, parts = (
        matrix.unflatten(2, (-1, size)).unflatten(1, (-1, size))
        for matrix, size in ((moment, k), (wide, wider.kernel[-1]))
    )
    for i in range(0, number * s, s):
        into += parts[:, :, i : i + k, :, i : i + k]
    moment.div_(number)


@functools.lru_cache(maxsize=256)
def _joined_costs(conv: Conv) -> dict[int, float]:
    """Expected costs of strips by how many neighbouring patches are joined."""
    costs = {1: _strips_cost(conv, cut(conv))}
    single = conv.groups == conv.dilation[-1] == 1
    if single and len(conv.kernel) > 1 and conv.kernel[-1] > 1:
        for number in range(2, _MOST_JOINED + 1):
            wider = joined(conv, number)
            # Its moment has to fit in beside the strips.
            few = 24 * wider.columns**2 > conv.rows * conv.columns
            if conv.out[-1] % number == 0 and not few:
                parts = 1.5e7 + 190 * number * conv.columns**2
                costs[number] = _strips_cost(wider, cut(wider)) + parts
    return costs


def _joined_number(conv: Conv) -> int:
    costs = _joined_costs(conv)
    best = min(costs, key=costs.__getitem__)
    return best if costs[best] < _WORTH_JOINING * costs[1] else 1


@functools.lru_cache(maxsize=256)
def _costs(conv: Conv) -> dict[str, float]:
    """Expected costs in multiply-adds of a large matmul, fitted on a CPU."""
    how, narrow = arrange(conv), cut(conv)
    costs = {"chunks": _strips_cost(conv, cut(conv, whole=True))}
    if narrow.count > 1:
        costs["strips"] = _joined_costs(conv)[_joined_number(conv)]
    wide = how.conv.columns**2 * conv.groups if how.spread > 1 else 0
    # Neither pays, nor is its memory in proportion, where few patches have many columns.
    if 8 * wide < conv.rows * conv.columns * conv.groups:
        costs["lags"] = _lags_cost(conv, how) + 1.3e4 * wide
        costs["slices"] = _slices_cost(conv, how) + 38 * wide
    return costs


def _strips_cost(conv: Conv, how: Cut) -> float:
    sizes = piece_sizes(conv, how, 4)  # of float32
    numbers = zip((conv.batch, *conv.out), sizes, strict=True)
    pieces = [-(-n // size) for n, size in numbers]
    rows, o, ends = conv.rows // conv.out[0], conv.out[0], range(how.count - 1)
    size = how.width * conv.columns // conv.kernel[0]
    widths = [size] * len(ends) + [conv.columns - len(ends) * size]
    # Strips of nothing but zeros are left out.
    zeros = how.width == 1 and conv.padding_mode == "zeros" and any(conv.padding[0])
    missed = how.lag if zeros else 0
    products = sum(size * w * max(1, o - r * missed) for r, w in enumerate(widths))
    products -= _saved(size) * o
    if not zeros or pieces[1] > 1:
        ending = sum(size * widths[r + 1] for q in ends for r in ends[q:])
        products += 2 * pieces[1] * how.lag * ending
    # Strips are copied in runs; narrow products, and those of each group, take longer.
    runs = how.width * math.prod(conv.kernel[1:-1]) if len(sizes) > 1 else 1
    copies = (o + pieces[1] * how.more) * (670 * runs + 1000 * (conv.groups > 1))
    operands = 7.8 * o * (len(widths) * size + sum(widths))
    each_row = 1.05 * products + copies + operands
    fixed = 2.4e7 + 25 * conv.batch * conv.channels * math.prod(conv.space)
    calls = 4.9e5 * math.prod(pieces) * (len(_parts(size)) + how.count**2 - 1)
    sorting = 250 * conv.columns**2 * conv.groups
    return fixed + rows * conv.groups * each_row + calls + sorting


def _saved(columns: int) -> int:
    """Multiply-adds, of each row, that bands save where it is multiplied with itself."""
    return sum((part.stop - part.start) * part.start for part in _parts(columns))


def _parts(columns: int) -> list[slice]:
    return bands(columns, torch.device("cpu"))


def _slices_cost(whole: Conv, how: Arranged) -> float:
    conv, axis = how.conv, axes(how.conv)[0]
    each, others = conv.channels // conv.groups, math.prod(conv.space[1:])
    locations = sum(conv.space[0] - lag for lag in axis.lags.tolist())
    locations += axis.points.shape[1]
    held, width = min(conv.batch, held_examples(whole, how)), each * others
    if worth_halving(held * conv.space[0], width):
        locations -= conv.space[0] * _saved(width) / width**2
    pair, terms = conv.channels * each * others**2, axis.signs.shape[-1]
    pieces = -(-conv.batch // held)
    gram = 1.2 * conv.batch * locations * pair
    sums = pieces * terms * (80 * pair + 4.5e6)
    copies = 80 * conv.batch * conv.channels * conv.space[0] * others
    blocks = 40 * conv.columns**2 * conv.groups * terms
    return 1.2e7 + gram + sums + copies + blocks


def _lags_cost(whole: Conv, how: Arranged) -> float:
    conv = how.conv
    along, each = axes(conv), conv.channels // conv.groups
    terms = math.prod(axis.signs.shape[-1] for axis in along)
    *lengths, last = (axis.length for axis in along)
    frequencies = math.prod(lengths) * (last // 2 + 1)
    share = shares(whole, how, (terms, frequencies), conv.columns**2 * conv.groups, 4)
    pieces = -(-conv.batch // share.examples)
    cost = 9e7 + 2.5 * math.prod(conv.kernel) ** 2 * terms * conv.channels * each
    for at_points in itertools.product((False, True), repeat=len(along)):
        pairs = list(zip(along, at_points, strict=True))
        full = [axis for axis, at in pairs if not at]
        spectra = math.prod(axis.points.shape[1] for axis, at in pairs if at)
        spectra *= math.prod(axis.length for axis in full) * conv.channels
        lags = math.prod(len(axis.lags) for axis in full)
        each_example = 244 + 300 / each + 2.7 * each
        cost += spectra * (conv.batch * each_example + 7.7 * pieces * lags * each)
    return cost
