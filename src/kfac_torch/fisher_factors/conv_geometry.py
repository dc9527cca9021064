"""`ConvGeometry`: the arguments of a convolution, checked and spelled out once.

Notation: `Δ` kernel offsets, `C` input channels (of one group), N examples, T output
locations. The columns of patches are offset-major, `(u·kw + v)·C + c`, for channels-last
data and channel-major, `(c·kh + u)·kw + v`, for channels-first data.

Left out: the moments themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..patch_moments import (
    mean_patch,
    patch_second_moment,
    patch_view,
    resolve_padding,
)
from .data import check_choice

Padding: TypeAlias = str | int | Sequence[int] | Sequence[tuple[int, int]]

CHANNELS_LAST = ("NWC", "NHWC", "NDHWC")  # by number of spatial dimensions, less one
CHANNELS_FIRST = ("NCW", "NCHW", "NCDHW")
_CONVOLUTION = "extract_convolution_patches"
_IMAGE = "extract_image_patches"
_POINTWISE = "extract_pointwise_conv2d_patches"
_EXTRACTORS = (None, _CONVOLUTION, _IMAGE, _POINTWISE)
_PATCH_BYTES = 16 * 2**20  # patches that are held at once


@dataclass(frozen=True)
class ConvGeometry:
    """A convolution, every argument per spatial dimension.

    `make` checks the arguments; the fields are its results.
    """

    name: str
    kernel: tuple[int, ...]
    channels: int  # of one group
    groups: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Any
    padding_mode: str
    channels_last: bool

    @classmethod
    def make(
        cls,
        name: str,
        filter_shape: Sequence[int],
        padding: Padding,
        strides: Sequence[int] | None,
        dilation_rate: Sequence[int] | None,
        data_format: str | None,
        extract_patches_fn: str | None = None,
        padding_mode: str = "zeros",
        groups: int = 1,
    ) -> ConvGeometry:
        """Check the arguments of the factor `name`, as `ConvInputKroneckerFactor` has them.

        Raises:
            ValueError: arguments that do not fit together.
        """
        filter_shape = [int(size) for size in filter_shape]
        num_dims = len(filter_shape) - 2
        if num_dims not in (1, 2, 3) or min(filter_shape) < 1:
            raise ValueError(
                f"{name}: filter_shape: expected positive [*kernel, C, K] with 1, 2 or 3 "
                f"spatial dimensions, got {filter_shape}"
            )
        check_choice(f"{name}: extract_patches_fn", extract_patches_fn, _EXTRACTORS)
        if isinstance(padding, str):
            check_choice(f"{name}: padding", padding, ("SAME", "VALID"))
        if padding_mode != "zeros" and padding == "SAME":
            raise ValueError(
                f"{name}: padding_mode: {padding_mode!r} needs padding in integers or "
                'pairs; "SAME" is zero padding'
            )
        kernel = tuple(filter_shape[:-2])
        channels_last = _is_channels_last(data_format, num_dims, name)
        form = _Form(name, num_dims, channels_last, extract_patches_fn)
        form.check_extractor(kernel, strides)
        if extract_patches_fn == _POINTWISE:
            dilation_rate, padding = None, "VALID"  # without effect on a 1x1 kernel
        return cls(
            name,
            kernel,
            filter_shape[-2],
            groups,
            form.per_dim("strides", strides),
            form.per_dim("dilation_rate", dilation_rate),
            padding,
            padding_mode,
            channels_last,
        )

    @property
    def num_offsets(self) -> int:
        """`Δ`."""
        return torch.Size(self.kernel).numel()

    @property
    def columns(self) -> int:
        """`Δ·C` of one group."""
        return self.num_offsets * self.channels

    def _check_rank(self, tensor: Tensor) -> None:
        rank = len(self.kernel) + 2
        if tensor.dim() != rank:
            formats = CHANNELS_LAST if self.channels_last else CHANNELS_FIRST
            raise ValueError(
                f"{self.name}: inputs: expected rank {rank} ({formats[rank - 3]}) for a "
                f"kernel of {rank - 2} spatial dimensions, got shape {tuple(tensor.shape)}"
            )

    def check_inputs(self, tensor: Tensor) -> None:
        """Raise ValueError where inputs do not fit the convolution."""
        self._check_rank(tensor)
        channels = tensor.shape[-1 if self.channels_last else 1]
        if channels != self.channels * self.groups:
            raise ValueError(
                f"{self.name}: inputs: expected {self.channels * self.groups} channels as "
                f"in filter_shape, got {channels} in shape {tuple(tensor.shape)}; check "
                "data_format"
            )
        self.out_space(tensor)

    def out_space(self, inputs: Tensor) -> tuple[int, ...]:
        """Return the spatial shape of the output.

        Raises:
            ValueError: inputs of another rank, or a kernel larger than they are, padded.
        """
        self._check_rank(inputs)
        space = inputs.shape[1:-1] if self.channels_last else inputs.shape[2:]
        pads = resolve_padding(self.padding, space, self.kernel, self.stride, self.dilation)
        room = [
            n + before + after - d * (k - 1) - 1
            for n, (before, after), k, d in zip(
                space, pads, self.kernel, self.dilation, strict=True
            )
        ]
        if min(room) < 0:
            raise ValueError(
                f"{self.name}: kernel larger than the padded input: kernel "
                f"{self.kernel} with dilation {self.dilation} does not fit into "
                f"spatial size {tuple(space)} with padding {pads}"
            )
        return tuple(r // s + 1 for r, s in zip(room, self.stride, strict=True))

    def num_rows(self, inputs: Tensor) -> int:
        """`N·T`: examples times output locations.

        Raises:
            ValueError: the kernel is larger than the padded input.
        """
        return inputs.shape[0] * torch.Size(self.out_space(inputs)).numel()

    def channels_first(self, tensor: Tensor) -> Tensor:
        """Return inputs or outputs as `[N, C, *space]`."""
        return tensor.movedim(-1, 1) if self.channels_last else tensor

    def moment(self, inputs: Tensor, has_bias: bool) -> Tensor:
        """Return `PᵀP/(N·T)` of the patches, with a one appended last for a bias."""
        moment = patch_second_moment(
            self.channels_first(inputs),
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            groups=self.groups,
            has_bias=has_bias,
            padding_mode=self.padding_mode,
        )
        return self.in_order(moment, (-2, -1))

    def patches(self, inputs: Tensor) -> Tensor:
        """Return a view of the patches, `[N, groups·C, *kernel, *out]`."""
        return patch_view(
            self.channels_first(inputs),
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            padding_mode=self.padding_mode,
        )

    def mean_patch(self, inputs: Tensor) -> Tensor:
        """Return each example's mean patch, `[N, groups·C, *kernel]`; none is formed."""
        return mean_patch(
            self.channels_first(inputs),
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            padding_mode=self.padding_mode,
        )

    def pieces(self, inputs: Tensor) -> Iterator[tuple[slice, slice]]:
        """Yield (examples, rows of the first output dimension) that fit into one buffer."""
        out = self.out_space(inputs)
        width = self.columns * self.groups * inputs.element_size()
        row = width * torch.Size(out[1:]).numel()
        rows = min(out[0], max(1, _PATCH_BYTES // row))
        examples = max(1, _PATCH_BYTES // (row * out[0])) if rows == out[0] else 1
        for n in range(0, inputs.shape[0], examples):
            for o in range(0, out[0], rows):
                yield slice(n, n + examples), slice(o, o + rows)

    def rows(self, patches: Tensor, n: slice, o: slice, dtype: torch.dtype) -> Tensor:
        """Copy one of the `pieces` of a view of patches into rows `[·, groups·Δ·C]`."""
        first = 2 + len(self.kernel)  # of the output dimensions
        piece = patches[(n, *[slice(None)] * (first - 1), o)].to(dtype)
        channels = range(1, first)
        out = range(first, piece.dim())
        return piece.permute(0, *out, *channels).reshape(-1, self.columns * self.groups)

    def some_rows(self, inputs: Tensor, chosen: Tensor) -> Tensor:
        """Copy the chosen rows of the patches, `[number, groups·Δ·C]`, channel-major."""
        patches = self.patches(inputs)
        first = 2 + len(self.kernel)  # of the output dimensions
        out = range(first, patches.dim())
        by_row = patches.permute(0, *out, *range(1, first))
        shape = by_row.shape[: 1 + len(self.kernel)]
        return by_row[torch.unravel_index(chosen.to(inputs.device), shape)].flatten(1)

    def in_order(self, array: Tensor, dims: Sequence[int]) -> Tensor:
        """Bring dimensions of channel-major columns (and a bias, last) to our order."""
        if not self.channels_last:
            return array
        columns = torch.arange(self.columns, device=array.device)
        order = columns.view(self.channels, -1).T.reshape(-1)
        for dim in dims:
            rest = torch.arange(len(order), array.shape[dim], device=array.device)
            array = array.index_select(dim, torch.cat([order, rest]))
        return array

    def flatten_mask(self, mask: Any, has_bias: bool) -> Tensor:
        """Return a mask `[*kernel, C]` in the order of our columns; the bias passes.

        Raises:
            ValueError: a mask of another shape.
        """
        mask = torch.as_tensor(mask)
        expected = (*self.kernel, self.channels)
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"{self.name}: patch_mask: expected shape {expected}, [*kernel, C], got "
                f"{tuple(mask.shape)}"
            )
        flat = (mask if self.channels_last else mask.movedim(-1, 0)).flatten()
        return torch.cat([flat, flat.new_ones(int(has_bias))])


def printable(padding: Padding) -> object:
    """Return the padding in a form that can stand in a name."""
    if isinstance(padding, str | int):
        return padding
    flat = [
        side
        for pair in padding
        for side in (pair if isinstance(pair, Sequence) else [pair])
    ]
    return flat


def is_channels_first(data_format: str | None, name: str) -> bool:
    """Whether a data format, for any number of dimensions, has the channels first.

    Raises:
        ValueError: an unknown data format.
    """
    known = (None, *CHANNELS_LAST, *CHANNELS_FIRST)
    check_choice(f"{name}: data_format", data_format, known)
    return data_format in CHANNELS_FIRST


def _is_channels_last(data_format: str | None, num_dims: int, name: str) -> bool:
    last, first = CHANNELS_LAST[num_dims - 1], CHANNELS_FIRST[num_dims - 1]
    check_choice(f"{name}: data_format", data_format, (None, last, first))
    return data_format != first


@dataclass(frozen=True)
class _Form:
    """In which form strides and dilations come: short, or long as in tf."""

    name: str
    num_dims: int
    channels_last: bool
    extractor: str | None

    def check_extractor(
        self, kernel: tuple[int, ...], strides: Sequence[int] | None
    ) -> None:
        if self.extractor in (_IMAGE, _POINTWISE) and self.num_dims != 2:
            raise ValueError(
                f"{self.name}: extract_patches_fn: {self.extractor!r} is for two spatial "
                f"dimensions, got a kernel of {self.num_dims}"
            )
        if self.extractor == _IMAGE and strides is None:
            raise ValueError(
                f"{self.name}: strides: {_IMAGE!r} needs the long form "
                f"{self._long('sh', 'sw')}, got None"
            )
        if self.extractor == _POINTWISE and (
            kernel != (1, 1) or (strides is not None and set(strides) != {1})
        ):
            raise ValueError(
                f"{self.name}: extract_patches_fn: {_POINTWISE!r} is for a 1x1 kernel at "
                f"stride 1, got kernel {kernel} and strides {strides}"
            )

    def per_dim(self, argument: str, values: Sequence[int] | None) -> tuple[int, ...]:
        """One value per spatial dimension, from the short or the long form."""
        if values is None:
            return (1,) * self.num_dims
        values = tuple(int(value) for value in values)
        inner = values[1:-1] if self.channels_last else values[2:]
        long = len(inner) == self.num_dims and values == self._long(*inner)
        spatial = inner if long else values
        if (
            len(spatial) != self.num_dims
            or min(spatial) < 1
            or (self.extractor == _IMAGE and not long)
        ):
            letters = [f"{argument[0]}{i}" for i in range(self.num_dims)]
            raise ValueError(
                f"{self.name}: {argument}: expected one positive integer for each of the "
                f"{self.num_dims} spatial dimensions, or the long form "
                f"{self._long(*letters)} (with {_IMAGE!r} always the long form), "
                f"got {list(values)}"
            )
        return spatial

    def _long(self, *spatial: object) -> tuple[object, ...]:
        return (1, *spatial, 1) if self.channels_last else (1, 1, *spatial)
