"""Blocks of an `nn.Bilinear`: those of a linear layer of the products of its inputs.

Notation: `y_k = x₁ᵀ W_k x₂ + b_k` is linear in `φ = vec(x₁ x₂ᵀ)`, in the order of
`weight.flatten(1)`: the second input's features are the fastest. So the block is
`F = T · A ⊗ G` with `A` the second moment of the rows `φ`, and a one last for the bias.
Its side is the product of both inputs' sizes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .linear import FullyConnectedDiagonalFB, FullyConnectedKFACBasicFB, LinearFB


class BilinearFB(LinearFB):
    """A block of an `nn.Bilinear` (abstract): what its calls give to it."""

    layer_types = (nn.Bilinear,)

    def call_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Return the rows `φ [..., in1 · in2]`."""
        given = dict(zip(("input1", "input2"), args, strict=False)) | kwargs
        return products(given["input1"].detach(), given["input2"].detach())


class BilinearKFACFB(BilinearFB, FullyConnectedKFACBasicFB):
    """The Kronecker block of an `nn.Bilinear`, with or without a bias.

    Arguments and errors as `FullyConnectedKFACBasicFB`. `V [in1 · in2 (+1), out]`.

    >>> import torch
    >>> bilinear = nn.Bilinear(2, 3, 4)
    >>> block = BilinearKFACFB(bilinear)
    >>> block.instantiate_factors(damping=0.1)
    >>> phi = block.call_input(bilinear, (torch.ones(5, 2), torch.ones(5, 3)), {})
    >>> block.accumulate(block.moments([phi], [[torch.ones(5, 4)]], 5), decay=0.95)
    >>> [factor.cov_dim for factor in block.factors]
    [7, 4]
    """


class BilinearDiagonalFB(BilinearFB, FullyConnectedDiagonalFB):
    """The exact diagonal of the block of an `nn.Bilinear`, with or without a bias.

    Arguments and errors as `FullyConnectedDiagonalFB`.
    """


def products(x1: Tensor, x2: Tensor) -> Tensor:
    """Return all products of entries of `x1 [..., m]` and `x2 [..., n]`: `[..., m · n]`.

    >>> import torch
    >>> products(torch.tensor([1.0, 10.0]), torch.tensor([1.0, 2.0, 3.0]))
    tensor([ 1.,  2.,  3., 10., 20., 30.])
    """
    return (x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-2)
