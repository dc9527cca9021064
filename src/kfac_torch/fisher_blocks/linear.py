"""`FullyConnectedKFACBasicFB`: the block of an `nn.Linear`.

`F = T · A ⊗ G` with `A` the second moment of the inputs and `G` that of the gradients of
the summed loss at the outputs (Martens & Grosse 2015, arXiv 1503.05671, section 3). All
leading dimensions of the input are rows: `T = 1` for plain inputs and for tokens that
each carry a loss term, more where several rows share one ("expand" weight sharing,
Eschenhagen et al. 2023, arXiv 2311.00636).
"""

from __future__ import annotations

from torch import nn

from ..fisher_factors import FullyConnectedKroneckerFactor, InverseProvidingFactor
from .base import KroneckerProductFB, accumulation_dtype, no_data


class FullyConnectedKFACBasicFB(KroneckerProductFB):
    """The Kronecker block of an `nn.Linear`, with or without a bias.

    Args:
        module: the layer.
        name: of the layer, for messages and checkpoints.
        options: of the factors.

    Raises:
        TypeError: a module of another type.
        RuntimeError: use before `instantiate_factors`.

    >>> import torch
    >>> block = FullyConnectedKFACBasicFB(nn.Linear(2, 1, bias=False))
    >>> block.instantiate_factors(damping=0.1)
    >>> moments = block.moments([torch.eye(2)], [[torch.ones(2, 1)]])
    >>> block.accumulate(moments, num_terms=2, decay=0.95)
    >>> block.full_fisher_block()
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """

    layer_types = (nn.Linear,)

    def _make_factors(self) -> tuple[InverseProvidingFactor, InverseProvidingFactor]:
        linear = self.module
        assert isinstance(linear, nn.Linear)
        weight = linear.weight
        A, G = (
            FullyConnectedKroneckerFactor(
                [[no_data(f"{self.name}.{side}")]],
                has_bias,
                size=size,
                name=f"{self.name}.{side}",
                options=self._options,
                dtype=accumulation_dtype(weight),
                device=weight.device,
            )
            for side, size, has_bias in (
                ("input", linear.in_features, self.has_bias),
                ("output", linear.out_features, False),
            )
        )
        return A, G
