"""Blocks of a transposed convolution: KFC's Kronecker product, or a diagonal.

Notation: n input size, s stride, p padding, k kernel size, d dilation, o output size, each
per dimension; u a kernel offset. A transposed convolution adds `w[u] x[i]` to the output
at `i s + d u - p`. It is a plain convolution of stride 1, with the kernel `w` mirrored,
over the *stuffed* input: `x` with `s - 1` zeros between pixels, and `d(k - 1) - p` before
the first (cropped where that is negative), of size `o + d(k - 1)`. So the block is that of
Grosse & Martens 2016 (arXiv 1602.01407, section 3),

    F = T · A ⊗ G,    A the second moment of the patches of the stuffed input,

with one row per example and *output* location. Here the stuffed input is mirrored in place
of the kernel: its patches have the offsets of `w` as PyTorch stores it. `o` is that of the
real output, so `output_padding` and `output_size=` are in it.

Cost: patches are not formed, but the zeros are: `A` is that of a convolution over an input
of the output's size, though all but one in `s` of each dimension is zero. Left out:
correlations of the unstuffed input alone, by the phase `d u mod s` of each offset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..fisher_factors import FactorOptions
from ..size_limit import SizeLimit
from .conv import ConvDiagonalFB, ConvFB, ConvKFCBasicFB


class ConvTransposeFB(ConvFB):
    """A block of a transposed convolution (abstract).

    `prepare_input` brings the input of a call to its stuffed and mirrored form, over which
    the factors see a plain convolution of stride 1 without padding.
    """

    layer_types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    def _stride(self) -> Sequence[int]:
        return [1] * len(self.module.stride)

    def _padding(self) -> list[tuple[int, int]]:
        return [(0, 0)] * len(self.module.stride)

    def prepare_input(self, tensor: Tensor, output_shape: torch.Size) -> Tensor:
        """Return the stuffed input of a call, mirrored, `[N, C, *(o + d(k - 1))]`.

        Raises:
            ValueError: an output that is not of this layer for such an input.
        """
        conv, dims = self.module, len(self.module.stride)
        if tensor.dim() != dims + 2:
            return tensor  # the factor says what is wrong
        extra = [
            o - ((n - 1) * s - 2 * p + d * (k - 1) + 1)
            for n, o, s, p, d, k in zip(
                tensor.shape[2:],
                output_shape[2:],
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.kernel_size,
                strict=True,
            )
        ]
        bounds = map(max, conv.stride, conv.dilation)
        if not all(0 <= e < bound for e, bound in zip(extra, bounds, strict=True)):
            raise ValueError(
                f"layer {self.name}: expected outputs of this layer for inputs of shape "
                f"{tuple(tensor.shape)}, got shape {tuple(output_shape)}: {conv}"
            )
        return stuff(
            tensor,
            output_shape[2:],
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
        )

    def params_to_vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """Bring tensors like `params` to `V [in(+1), out]`, the bias last.

        The rows are channel-major over the input channels of a group, then kernel offsets
        as PyTorch stores them; of a Kronecker block with groups `V [groups, in(+1), out]`.
        """
        weight, *bias = tensors
        return super().params_to_vector([_swap(weight, self.module.groups), *bias])

    def vector_to_params(self, vector: Tensor) -> list[Tensor]:
        """Undo `params_to_vector`."""
        conv = self.module
        weight, *bias = super().vector_to_params(vector)
        shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        return [_swap(weight.reshape(shape), conv.groups), *bias]


class ConvTransposeKFCFB(ConvTransposeFB, ConvKFCBasicFB):
    """The Kronecker block of a transposed convolution, with or without bias and groups.

    Any stride, dilation, padding and output padding, `output_size=` in the call too. `V
    [in(+1), out]` has rows in the order of `weight [in, out, *kernel]` without `out`; with
    groups `V [groups, in(+1), out]`, the sizes those of one group.

    Args:
        module: the layer, or several that share all their parameters.
        name: of the layer, for messages and checkpoints.
        options: of the factors.
        size_limit: what sides above a size become; None for none.

    Raises:
        TypeError: a module of another type.
        RuntimeError: use before `instantiate_factors`.

    >>> block = ConvTransposeKFCFB(nn.ConvTranspose2d(2, 3, 3, stride=2))
    >>> block.instantiate_factors(damping=0.1)
    >>> x, g = torch.ones(8, 2, 2, 2), torch.ones(8, 3, 5, 5)
    >>> block.accumulate(block.moments([x], [[g]], num_terms=8), decay=0.95)
    >>> block.num_locations, tuple(block.full_fisher_block().shape)
    (25.0, (57, 57))
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        size_limit: SizeLimit | None = None,
    ) -> None:
        super().__init__(module, name, options, size_limit=size_limit)


class ConvTransposeDiagonalFB(ConvTransposeFB, ConvDiagonalFB):
    """The exact diagonal of a transposed convolution's block.

    `V [in(+1), out]` whatever the groups, the rows of `in` those of one group, as
    `ConvDiagonalFB` has them. Arguments as `ConvTransposeKFCFB`.

    Raises:
        TypeError: a module of another type.
        NotImplementedError: a layer that is called several times in a forward.

    >>> block = ConvTransposeDiagonalFB(nn.ConvTranspose1d(4, 2, 3, groups=2))
    >>> block.instantiate_factors(damping=0.1)
    >>> x, g = torch.ones(8, 4, 5), torch.ones(8, 2, 7)
    >>> block.accumulate(block.moments([x], [[g]], num_terms=8), decay=0.95)
    >>> tuple(block.factors[0].get_cov_var().shape)
    (7, 2)
    """

    def grad_moments(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], num_terms: float
    ) -> list[Tensor]:
        """Return the diagonal."""
        # Locations go with those of the mirrored input.
        mirrored = [grad.flip(*range(3, grad.dim())) for grad in grads]
        return super().grad_moments(inputs, mirrored, num_terms)


def stuff(
    inputs: Tensor,
    out: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the stuffed input of a transposed convolution, mirrored.

    A convolution over it, with the kernel as PyTorch stores it, at stride 1, without
    padding and with this dilation, gives the output, mirrored.

    Args:
        inputs: `[N, C, *space]`.
        out: the spatial size `o` of the output.
        kernel: one per spatial dimension; so are the others.
        stride: of the transposed convolution.
        padding: likewise.
        dilation: likewise.

    Returns:
        `[N, C, *(o + d(k - 1))]`.

    >>> stuff(torch.tensor([[[1.0, 2.0, 3.0]]]), [5], [3], [2], [1], [1])
    tensor([[[0., 3., 0., 2., 0., 1., 0.]]])
    """
    sizes = [o + d * (k - 1) for o, d, k in zip(out, dilation, kernel, strict=True)]
    source, target = list[slice](), list[slice]()
    for n, size, k, s, p, d in zip(
        inputs.shape[2:], sizes, kernel, stride, padding, dilation, strict=True
    ):
        before = d * (k - 1) - p  # the first pixel's place, before mirroring
        first = max(0, -(before // s))  # of the pixels that are not cropped
        last = min(n - 1, (size - 1 - before) // s)
        count = max(0, last - first + 1)
        start = size - 1 - before - last * s if count else 0
        source.append(slice(first, first + count))
        target.append(slice(start, start + count * s, s))
    stuffed = inputs.new_zeros(*inputs.shape[:2], *sizes)
    kept = inputs[(slice(None), slice(None), *source)]
    stuffed[(slice(None), slice(None), *target)] = kept.flip(*range(2, kept.dim()))
    return stuffed


def _swap(weight: Tensor, groups: int) -> Tensor:
    """Bring `[in, out/groups, *kernel]` to `[out, in/groups, *kernel]`; and back."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
