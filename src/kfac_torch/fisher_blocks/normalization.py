"""Blocks of a scale and a shift: the affine part of a normalisation layer.

`s = x̂ ∘ scale + shift` with `x̂` the normalised input, which is computed again from what
the layer was given. An example's gradient is `Σ x̂ ∘ g` and `Σ g` over the dimensions
that the parameters do not have; the blocks are the second moment of both together over
examples, or its diagonal: exact, up to the dependence of batch statistics on all
examples, where there are any. Left out: statistics of other processes, as of an
`nn.SyncBatchNorm` in training: `x̂` is that of this one's own examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..fisher_factors import (
    FactorOptions,
    ScaleAndShiftDiagonalFactor,
    ScaleAndShiftFullFactor,
)
from ..size_limit import SizeLimit, form_of
from .base import accumulation_dtype, no_data
from .layer import LayerFactorFB

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *_BATCH_NORMS, *_INSTANCE_NORMS)
"""The layers whose scale and shift these blocks are of."""


class ScaleAndShiftFB(LayerFactorFB):
    """The two blocks of a scale and a shift; `V` is a column `[n, 1]` (abstract).

    Args:
        module: the layer, or several that share all their parameters.
        name: of the layer, for messages and checkpoints.
        options: of the factors.

    Raises:
        TypeError: a module of another type.
        ValueError: a layer without a trained scale.
    """

    layer_types = NORMS
    factor_type: type[Any]

    def _make_factors(self) -> tuple[Any, ...]:
        weight = self.params[0]
        factor = self.factor_type(
            [no_data(self.name)],
            [[no_data(self.name)]],
            [0, 1],
            has_shift=self.has_bias,
            shape=(1, *weight.shape),
            name=self.name,
            options=self.options,
            dtype=accumulation_dtype(weight),
            device=weight.device,
        )
        return (factor,)

    def _rows(self, tensor: Tensor) -> Tensor:
        """Bring `[N, ...]` to `[N, L, *scale.shape]`; `L` is summed over."""
        shape = self.params[0].shape
        if not isinstance(self.module, nn.LayerNorm | nn.RMSNorm):
            tensor = tensor.movedim(1, -1)  # channels
        return tensor.reshape(tensor.shape[0], -1, *shape)

    def _is_alone(self, dims: int) -> bool:
        """Whether an input has no dimension of examples: it is one."""
        norm, shape = self.module, self.params[0].shape
        return isinstance(norm, nn.LayerNorm | nn.RMSNorm) and dims == len(shape)

    def prepare_input(self, tensor: Tensor, output_shape: torch.Size) -> Tensor:
        """Return the input of a call, `[N, ...]`."""
        return tensor.unsqueeze(0) if self._is_alone(tensor.dim()) else tensor

    def grad_moments(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], num_terms: float
    ) -> list[Tensor]:
        """Return the moment; all calls of an example belong to one gradient.

        Calls with batches of different size have no examples in common.
        """
        dtype = accumulation_dtype(self.params[0])
        x = [self._rows(normalize(self.module, a.to(dtype))) for a in inputs]
        grads = [g.unsqueeze(1) if self._is_alone(g.dim() - 1) else g for g in grads]
        g = [self._rows(g.flatten(0, 1)).unflatten(0, g.shape[:2]) for g in grads]
        if len({len(rows) for rows in x}) == 1:
            return [self._factor().summed_cov(torch.cat(x, 1), torch.cat(g, 2))]
        sums = [
            self._factor().summed_cov(*pair) * len(pair[0])
            for pair in zip(x, g, strict=True)
        ]
        return [torch.stack(sums).sum(0) / len(x[0])]

    def params_to_vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return all entries of scale and shift, one column `[n, 1]`."""
        return torch.cat([tensor.flatten() for tensor in tensors]).unsqueeze(1)

    def vector_to_params(self, vector: Tensor) -> list[Tensor]:
        """Undo `params_to_vector`."""
        parts = vector.flatten().split([param.numel() for param in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]


class ScaleAndShiftFullFB(ScaleAndShiftFB):
    """The full block of a scale and a shift.

    Args:
        module: the layer, or several that share all their parameters.
        name: of the layer, for messages and checkpoints.
        options: of the factors.
        size_limit: above its `max_size` of parameters the block is a diagonal; None for
            none.

    Raises:
        TypeError, ValueError: as `ScaleAndShiftDiagonalFB`.

    >>> block = ScaleAndShiftFullFB(nn.LayerNorm(3))
    >>> block.instantiate_factors(damping=0.1)
    >>> x, g = torch.randn(5, 3), torch.randn(5, 3)
    >>> block.accumulate(block.moments([x], [[g]], num_terms=5), decay=0.95)
    >>> tuple(block.full_fisher_block().shape)
    (6, 6)
    """

    factor_type = ScaleAndShiftFullFactor

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        size_limit: SizeLimit | None = None,
    ) -> None:
        super().__init__(module, name, options)
        size = sum(param.numel() for param in self.params)
        if form_of(size_limit, size) != "full":
            self.factor_type = ScaleAndShiftDiagonalFactor


class ScaleAndShiftDiagonalFB(ScaleAndShiftFB):
    """The diagonal of the block of a scale and a shift.

    >>> block = ScaleAndShiftDiagonalFB(nn.GroupNorm(2, 4))
    >>> block.instantiate_factors(damping=0.1)
    """

    factor_type = ScaleAndShiftDiagonalFactor


def normalize(module: Any, inputs: Tensor) -> Tensor:
    """Return what a normalisation layer scales: its output without scale and shift.

    With the statistics that the layer uses: running ones only where it is in `eval` mode
    and keeps them. They are not changed.

    >>> normalize(nn.LayerNorm(2), torch.tensor([[1.0, 3.0]]))
    tensor([[-1.0000,  1.0000]])
    """
    eps = module.eps
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(inputs, module.normalized_shape, eps=eps)
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(inputs, module.normalized_shape, eps=eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(inputs, module.num_groups, eps=eps)
    running = None, None
    if not module.training and module.running_mean is not None:
        running = module.running_mean.to(inputs), module.running_var.to(inputs)
    own = running[0] is None
    if isinstance(module, _INSTANCE_NORMS):
        return functional.instance_norm(inputs, *running, use_input_stats=own, eps=eps)
    return functional.batch_norm(inputs, *running, training=own, eps=eps)
