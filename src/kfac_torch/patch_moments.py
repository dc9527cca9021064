r"""Second moment of convolution patches, as a rule without forming the patches.

A convolution sees its input through patches. With one row per example and output
location, one column per (channel, kernel offset) and a last column of ones if there
is a bias, they form the matrix P, and the input factor of KFC is

    A = PᵀP / (N T)                               (Grosse & Martens 2016, section 3)

Notation: N examples, C channels (of one group), T output locations, k kernel size; more
in `patch_geometry`. Three methods, the same matrix:

"chunks" forms P piece by piece in one bounded buffer: (k₁k₂C)² multiply-adds per row, or
nearly half of them where the bands of `gram` pay.

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

from .gram import add_gram, mirror
from .patch_geometry import (
    Arranged,
    Conv,
    Padding,
    Size,
    arrange,
    axes,
    chosen_columns,
    describe,
    pad,
    resolve_padding,
    windows,
)
from .patch_lags import add_lags
from .patch_slices import add_slices

__all__ = ("mean_patch", "patch_second_moment", "patch_view", "resolve_padding")

_METHODS = ("auto", "chunks", "lags", "slices")

_PATCH_BYTES = 16 * 2**20  # patches that "chunks" holds at once


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
        method: ``"chunks"``, ``"lags"``, ``"slices"``, or ``"auto"`` for the one
            expected to be fastest.

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
    if method != "chunks" and how.spread > 1:
        wide = moment.new_empty(conv.groups, how.conv.columns, how.conv.columns)
        spare = wide.view(-1)
    if method == "chunks":
        _add_chunks(moment, inputs, conv)
    elif method == "lags":
        add_lags(wide, inputs, conv, how, spare)
    else:
        add_slices(wide, inputs, conv, how)
    if wide is not moment:
        columns = chosen_columns(conv._replace(batch=1), how, moment.device)
        moment.copy_(wide[:, columns[:, None], columns])


def _add_chunks(moment: Tensor, inputs: Tensor, conv: Conv) -> None:
    width = conv.columns * conv.groups
    held = max(1, _PATCH_BYTES // (width * moment.element_size()))  # rows at once
    held = min(held, max(conv.rows // 12, min(held, 512)))
    # A piece takes whole trailing dimensions of [N, *out] while they fit.
    batch, *sizes = (
        min(n, max(1, held // math.prod(conv.out[i:])))
        for i, n in enumerate((conv.batch, *conv.out))
    )
    buffer = moment.new_empty(width * batch * math.prod(sizes))
    for examples in torch.split(inputs, batch):
        patches = windows(pad(examples.to(moment.dtype), conv, conv.padding), conv)
        starts = (range(0, n, size) for n, size in zip(conv.out, sizes, strict=True))
        for start in itertools.product(*starts):
            piece = patches.movedim(0, 1 + len(start))  # [C, *kernel, N, *out]
            for i, (first, size) in enumerate(zip(start, sizes, strict=True)):
                dim = i - len(start)
                piece = piece.narrow(dim, first, min(size, conv.out[i] - first))
            filled = buffer[: piece.numel()].view(piece.shape).copy_(piece)
            columns = filled.view(conv.groups, conv.columns, -1)
            add_gram(moment, columns)
    mirror(moment.div_(conv.rows))


@functools.lru_cache(maxsize=256)
def _costs(conv: Conv) -> dict[str, float]:
    """Expected costs in multiply-adds of a large matmul, fitted on a CPU."""
    how = arrange(conv)
    chunks = conv.rows * conv.groups * conv.columns * (30 + conv.columns)
    costs = {"chunks": float(chunks)}
    wide = 20 * how.conv.columns**2 * conv.groups if how.spread > 1 else 0
    # Neither pays, nor is its memory in proportion, where few patches have many columns.
    if 8 * wide < 20 * conv.rows * conv.columns * conv.groups:
        costs["lags"] = _lags_cost(how) + wide
        costs["slices"] = _slices_cost(how) + wide
    return costs


def _slices_cost(how: Arranged) -> float:
    conv = how.conv
    each, others = conv.channels // conv.groups, math.prod(conv.space[1:])
    axis = axes(conv)[0]
    locations = sum(conv.space[0] - lag for lag in axis.lags.tolist())
    terms = axis.signs.shape[-1]
    locations += axis.points.shape[1]
    pair = conv.channels * each * others**2
    gram = conv.batch * locations * pair * (1 + 16 / (each * others))
    sums = pair * terms * (40 + math.prod(conv.kernel[1:]) ** 2)
    copies = 20 * conv.batch * conv.channels * conv.space[0] * others
    blocks = 20 * conv.columns**2 * conv.groups * terms
    return 2e7 + gram + sums + copies + blocks


def _lags_cost(how: Arranged) -> float:
    conv = how.conv
    along, each = axes(conv), conv.channels // conv.groups
    terms = math.prod(axis.signs.shape[-1] for axis in along)
    cost = 1e8 + 3 * math.prod(conv.kernel) ** 2 * terms * conv.channels * each
    for at_points in itertools.product((False, True), repeat=len(along)):
        pairs = list(zip(along, at_points, strict=True))
        full = [axis for axis, at in pairs if not at]
        spectra = math.prod(axis.points.shape[1] for axis, at in pairs if at)
        spectra *= math.prod(axis.length for axis in full) * conv.channels
        lags = math.prod(len(axis.lags) for axis in full)
        cost += spectra * (conv.batch * (230 + 4 * (each + 16)) + 15 * lags * each)
    return cost
