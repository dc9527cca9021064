"""Both sides of a convolution as blocks on the diagonal: blocks of channels.

Notation: as `conv.py` and `split.py`. The input's side is cut between channels, so that a
block has all Δ kernel offsets of some channels: it is the second moment of the patches of
a convolution with as many *groups* as there are blocks, and is found without forming
them. The one of a bias is in the last block alone. Where the channels do not divide
evenly, there are two runs of equal blocks. Left out: blocks within a channel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..patch_moments import patch_second_moment
from .conv import ConvInputKroneckerFactor, ConvOutputKroneckerFactor
from .split import SplitFactor, check_max_size, even_parts, runs


def channel_blocks(
    channels: int, num_offsets: int, has_bias: bool, max_size: int
) -> tuple[int, ...] | None:
    """Return the channels of each block, as even as possible; None if none are possible.

    >>> channel_blocks(5, 9, True, 20)
    (2, 2, 1)
    >>> channel_blocks(5, 9, True, 9) is None
    True
    """
    for number in range(-(-channels * num_offsets // max_size), channels + 1):
        parts = even_parts(channels, number)
        last = parts[-1] * num_offsets + has_bias
        if max(parts[0] * num_offsets, last) <= max_size:
            return parts
    return None


class ConvInputSplitKroneckerFactor(SplitFactor, ConvInputKroneckerFactor):
    """Blocks of channels on the diagonal of a convolution's input factor.

    Stored as `[k, b, b]`, or `[groups, k, b, b]`.

    Args:
        args: as `ConvInputKroneckerFactor`; so are `kwargs`.
        max_size: the most columns of a block: channels times kernel offsets, and the one
            of the bias in the last.
        kwargs: see above.

    Raises:
        ValueError: as `ConvInputKroneckerFactor`, or a `max_size` that one channel exceeds.

    >>> x = torch.ones(1, 5, 5, 4)
    >>> factor = ConvInputSplitKroneckerFactor([x], [3, 3, 4, 1], "VALID", max_size=18)
    >>> factor.describe()
    'split 2x18'
    """

    def __init__(self, *args: Any, max_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_max_size(max_size, self.name)
        conv = self._conv
        self._groups = conv.groups
        parts = channel_blocks(conv.channels, conv.num_offsets, self._has_bias, max_size)
        if parts is None:
            raise ValueError(
                f"{self.name}: max_size: expected at least {conv.num_offsets} kernel "
                f"offsets of one channel{' and a bias' if self._has_bias else ''}, got "
                f"{max_size}; use a diagonal"
            )
        self._channels = parts
        sizes = [part * conv.num_offsets for part in parts]
        sizes[-1] += self._has_bias
        # Of channels-last data a block's columns are not consecutive.
        order = None
        if conv.channels_last:
            grid = torch.arange(conv.columns).view(conv.num_offsets, conv.channels)
            bias = torch.arange(conv.columns, conv.columns + self._has_bias)
            columns = [part.reshape(-1) for part in grid.split(parts, dim=1)]
            order = torch.cat([*columns, bias])
        self._cut(sizes, order)

    def _moment(self, inputs: Tensor) -> Tensor:
        conv, groups = self._conv, self._groups
        shape = (groups, *self._cov_shape[-3:])
        total = torch.zeros(shape, dtype=self._dtype, device=inputs.device)
        dim = inputs.dim() - 1 if conv.channels_last else 1
        by_group = inputs.unflatten(dim, (groups, conv.channels))
        start = 0
        for first, number, channels in runs(self._channels):
            some = by_group.narrow(dim + 1, start, number * channels)
            start += number * channels
            has_bias = self._has_bias and start == conv.channels
            part = replace(conv, channels=channels, groups=groups * number)
            moment = part.moment(some.flatten(dim, dim + 1), has_bias)
            moment = moment.view(groups, number, *moment.shape[-2:])
            n = part.columns
            total[:, first : first + number, :n, :n] = moment[..., :n, :n]
            if has_bias:
                total[:, -1, : n + 1, n] = moment[:, -1, :, n]
                total[:, -1, n, : n + 1] = moment[:, -1, n]
        return total.view(self._cov_shape)

    def _masked(self, moment: Tensor, mask: Tensor) -> Tensor:
        mask = self._pad(mask.to(moment).unsqueeze(-1))
        return moment.mul_(mask * mask.mT)


class ConvOutputSplitKroneckerFactor(SplitFactor, ConvOutputKroneckerFactor):
    """Blocks of channels on the diagonal of a convolution's output factor.

    Stored as `[k, b, b]`, or `[groups, k, b, b]`.

    Args:
        args: as `ConvOutputKroneckerFactor`; so are `kwargs`.
        max_size: the most channels of a block.
        kwargs: see above.

    Raises:
        ValueError: as `ConvOutputKroneckerFactor`, or `max_size` below 1.

    >>> grads = torch.arange(1.0, 17.0).view(2, 2, 2, 2)
    >>> factor = ConvOutputSplitKroneckerFactor([[grads]], max_size=1)
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.95)().flatten()
    tensor([ 85., 102.])
    """

    def __init__(self, *args: Any, max_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_max_size(max_size, self.name)
        size = self._num_channels // self._groups
        self._cut(even_parts(size, -(-size // max_size)))

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        x, groups = self._single(tensors).movedim(self._channel_dim, 1), self._groups
        shape = (groups, *self._cov_shape[-3:])
        total = torch.zeros(shape, dtype=self._dtype, device=x.device)
        by_group = x.unflatten(1, (groups, -1))
        start = 0
        for first, number, size in runs(self._sizes):
            some = by_group.narrow(2, start, number * size).flatten(1, 2)
            start += number * size
            # The patches of a 1x1 kernel are the rows themselves.
            moment = patch_second_moment(some, 1, groups=groups * number)
            moment = moment.view(groups, number, size, size)
            total[:, first : first + number, :size, :size] = moment
        return total.view(self._cov_shape)
