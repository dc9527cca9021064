r"""Second moment of patches from products of whole slices, for small inputs.

A slice X[p] is all channels and all other locations at location p of the first dimension:
C S numbers of each example. Products of slices a lag apart hold every pair of locations
in the other dimensions, so that nothing special happens at their borders:

    G(δ) = Σ_p X[p] X[p + dδ]ᵀ                      [C S, C S] for each lag
    block((u₁, u₂), (v₁, v₂)) = Σ_q G(δ₁)[q, q + dδ₂]     q in reach(u₂)

and in the first dimension as in `patch_lags`: full lags, less the points that an offset
cannot reach. That takes S C² k multiply-adds per location: few where S or C are, and all
of them in large matrix products. Inputs of one dimension are all lags, no pairs.

Notation: as in `patch_geometry`; S the locations of all dimensions but the first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .gram import add_gram, add_transpose, mirror
from .patch_geometry import Arranged, Conv, arranged, axes, reach

_HALVED = 2**25  # multiply-adds of a product that is worth halving


@functools.lru_cache(maxsize=256)  # a layer asks for the same ones at every step
def _sums(conv: Conv, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which pairs of locations make up which block: `[k * k, S * S]`, zeros and ones."""
    pairs = torch.ones(1, 1, 1, 1, dtype=dtype)  # [S, S, k, k]
    for i in range(1, len(conv.kernel)):
        n, k, d = conv.space[i], conv.kernel[i], conv.dilation[i]
        each = torch.zeros(n, n, k, k, dtype=dtype)
        for u in range(k):
            there = reach(n, k, d, *conv.padding[i], u)
            for v in range(k):
                at = torch.tensor([q for q in there if 0 <= q + d * (v - u) < n]).long()
                each[at, at + d * (v - u), u, v] = 1
        pairs = torch.kron(pairs, each)
    return pairs.flatten(0, 1).flatten(1).T.contiguous().to(device)


@functools.lru_cache(maxsize=256)
def _along(
    conv: Conv, dtype: torch.dtype, device: torch.device
) -> tuple[list[tuple[int, int, int]], Tensor]:
    """First dimension: each term's slices `p`, their number, `p + dδ`; their signs."""
    axis = axes(conv)[0]
    n = conv.space[0]
    terms = [(0, n - lag, lag) for lag in axis.lags.tolist()]
    terms += [(p, 1, other) for p, other in axis.points.T.tolist()]
    k = conv.kernel[0]
    upper = torch.ones(k, k).triu() - torch.eye(k) / 2  # the transposes are added later
    signs = axis.signs * upper[:, :, None]
    return terms, signs.flatten(0, 1).to(device, dtype)


def held_examples(conv: Conv, how: Arranged) -> int:
    """How many examples are taken at once.

    A sixth of the patches of `conv` holds the blocks, the products, twice, and as many
    examples as there is room for then, but at least an eighth of the batch.
    """
    flat = how.conv
    each, others = flat.channels // flat.groups, math.prod(flat.space[1:])
    pairs = axes(flat)[0].signs.shape[-1] * math.prod(flat.kernel[1:]) ** 2
    taken = flat.channels * each * (pairs + 2 * others**2)
    taken += flat.groups * flat.columns**2 if how.spread > 1 else 0
    copies = 2 if any(map(any, how.pads)) or how.spread > 1 else 1
    example = copies * flat.channels * math.prod(flat.space)
    sixth = conv.rows * conv.columns * conv.groups // 6
    return max(1, (sixth - taken) // example, conv.batch // 8)


def worth_halving(rows: int, columns: int) -> bool:
    """Whether a product of rows with themselves takes longer than the calls of `gram`."""
    return rows * columns**2 > _HALVED


def add_slices(moment: Tensor, inputs: Tensor, conv: Conv, how: Arranged) -> None:
    """Put `PᵀP / (N T)` of `how.conv` into a moment, whatever is there."""
    flat = how.conv._replace(batch=1)  # nothing here depends on the batch
    terms, signs = _along(flat, moment.dtype, moment.device)
    sums = _sums(flat, moment.dtype, moment.device)
    each = flat.channels // flat.groups
    blocks = moment.new_zeros(len(terms), len(sums), flat.groups * each * each)

    held = held_examples(conv, how)
    _add_blocks(blocks, inputs.tensor_split(-(-conv.batch // held)), conv, how)

    k, rest = flat.kernel[0], math.prod(flat.kernel[1:])
    where = moment.unflatten(2, (each, k, rest)).unflatten(1, (each, k, rest))
    for u in range(k):
        total = (signs[u * k : (u + 1) * k] / conv.rows) @ blocks.flatten(1)
        total = total.view(k, rest, rest, flat.groups, each, each)
        where[:, :, u] = total.permute(3, 4, 1, 5, 0, 2)
        del total  # before the next is made
    add_transpose(moment)


def _add_blocks(
    blocks: Tensor, pieces: Sequence[Tensor], conv: Conv, how: Arranged
) -> None:
    """Add to `[terms, k * k, groups * C * C]`, k and the sums over the other dimensions."""
    flat = how.conv._replace(batch=1)
    terms, _ = _along(flat, blocks.dtype, blocks.device)
    sums = _sums(flat, blocks.dtype, blocks.device)
    groups, each = flat.groups, flat.channels // flat.groups
    n, others = flat.space[0], math.prod(flat.space[1:])
    width = each * others
    products = blocks.new_empty(groups, width, width)
    buffer = blocks.new_empty(n * max(map(len, pieces)) * flat.channels * others)
    for examples in pieces:
        x = arranged(examples.to(blocks.dtype), conv, how).movedim(2, 0)
        slices = buffer[: x.numel()].view(x.shape).copy_(x)
        slices = slices.view(n, len(examples), groups, width)
        for (first, number, other), block in zip(terms, blocks, strict=True):
            left = slices[first : first + number].flatten(0, 1).movedim(0, 2)
            right = slices[other : other + number].flatten(0, 1).movedim(0, 1)
            halved = blocks.device.type == "cpu" and worth_halving(left.shape[-1], width)
            if first == other and halved:
                add_gram(products.zero_(), left)
                mirror(products)
            elif groups == 1:
                torch.mm(left[0], right[0], out=products[0])
            else:
                torch.bmm(left, right, out=products)
            pairs = products.view(groups, each, others, each, others).transpose(2, 3)
            block.addmm_(sums, pairs.reshape(-1, others * others).T)
