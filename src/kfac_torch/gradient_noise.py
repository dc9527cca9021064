"""`GradientNoise`: which part of a step's slope was the noise of its own batch.

Notation: `g` the gradient of a batch, `δ` the step that was made of it, `g₊` the gradient
of the next batch where the step has led to, `F` the exact Fisher. The quadratic model says
what the slope along `δ` is to be there, `g₊ᵀδ = gᵀδ + δᵀFδ`. Of one and the same batch it
is so, or nearly; a fresh batch does not know the noise of the other, and has less of a
slope left:

    ν = (g₊ᵀδ − gᵀδ − δᵀFδ)/|gᵀδ|,  from 0 (no noise) to 1 (nothing else)

This costs one inner product a step and no further gradient. Against the noise `F̂⁻¹` is
applied to an average `m ← β m + (1 − β) g`, where β is a moving average `ν̄` that starts at
0, up to 0.7: full batches keep their own gradient, whose age would slow them down.
Where after a while there is next to no noise, only that of our own estimates is left:
`negligible`, looked at every tenth step. An `F` of part of the batch has noise of its own,
of which ν may be 0.5 where the batch is one and the same; so the batch itself is looked at
too, whether it is that of the step before. Left out: the step (`updates.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_MEMORY = 0.8  # of ν̄: some five steps
_NEGLIGIBLE = 0.1
_FIRST_LOOK, _LOOK_EVERY = 60, 10  # in steps: a look is a read of the host
_MAX_DECAY = 0.7  # a gradient enters, whatever its noise


@dataclass(frozen=True)
class GradientNoise:
    """What is known after a step; a step makes a new one.

    Args:
        fraction: `ν̄`, 0-dim; None before the first step.
        slope: `gᵀδ` of the last step, 0-dim; None where there was none.
        expected: `gᵀδ + δᵀFδ`.
        negligible: whether `ν̄` was below a tenth at the last look.
        repeats: whether the batch of the last look was that of the step before.
        batch: the fingerprint of a batch that the next one is to be held to.

    >>> noise = GradientNoise()
    >>> for slope in (0.0, -1.0, -0.5, -0.5):  # of this step's gradient along the last step
    ...     noise = noise.seen(torch.tensor(slope))
    ...     noise = noise.after(torch.tensor(-2.0), torch.tensor(1.0))
    >>> noise.fraction  # 0.2 · (0.8² · 0 + 0.8 · ¼ + ¼)
    tensor(0.0900)
    """

    fraction: Tensor | None = None
    slope: Tensor | None = None
    expected: Tensor | None = None
    negligible: bool = False
    repeats: bool = False
    batch: Tensor | None = None

    @property
    def own(self) -> bool:
        """Whether what is left may be the noise of our own estimates alone."""
        return self.negligible or self.repeats

    def seen(self, slope: Tensor) -> GradientNoise:
        """Return what is known with the slope `g₊ᵀδ` along the last step, 0-dim."""
        if self.slope is None or self.expected is None:
            return self.restarted()
        size = self.slope.abs()
        part = (slope - self.expected) / torch.where(size > 0, size, torch.inf)
        new = part.nan_to_num(0.0).clamp(0.0, 1.0)
        old = torch.zeros_like(new) if self.fraction is None else self.fraction
        fraction = torch.lerp(new, old, _MEMORY)
        return replace(self, fraction=fraction, slope=None, expected=None)

    def restarted(self) -> GradientNoise:
        """Return what is left of it where there was no step."""
        return replace(self, fraction=None, slope=None, expected=None)

    def after(self, slope: Tensor, curvature: Tensor) -> GradientNoise:
        """Return what is known after a step with `gᵀδ` and `δᵀFδ`, 0-dim."""
        return replace(self, slope=slope, expected=slope + curvature)

    def looked_at(self, step: int, batch: Callable[[], Tensor | None]) -> GradientNoise:
        """Return the same, at some steps with a new look.

        Args:
            step: its number.
            batch: returns the fingerprint of its batch.
        """
        if self.fraction is None or step < _FIRST_LOOK - 1:
            return self
        if (step + 1) % _LOOK_EVERY == 0:
            return replace(self, batch=batch())
        if step % _LOOK_EVERY:
            return self
        now = None if self.batch is None else batch()
        repeats = self.batch is not None and now is not None and _alike(self.batch, now)
        negligible = bool(self.fraction < _NEGLIGIBLE)
        return replace(self, negligible=negligible, repeats=repeats, batch=None)

    def averaged(self, grads: list[Tensor], average: list[Tensor]) -> list[Tensor]:
        """Return `β m + (1 − β) g`, of `m` in `average`; changes nothing."""
        if self.fraction is None:
            return [g.clone() for g in grads]
        share = 1 - self.fraction.clamp(max=_MAX_DECAY)
        return [torch.lerp(m, g, share.to(g)) for m, g in zip(average, grads, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return what restores it."""
        return vars(self).copy()


def fingerprint(arguments: Sequence[Any]) -> Tensor | None:
    """Return numbers that batches of the same examples share, in whatever order.

    Of every tensor `x` its norm, and those of its sum over examples and of some weights.

    Args:
        arguments: what the model was called with; None where there is no dense tensor.

    >>> examples = torch.tensor([[3.0, 4.0], [0.0, 12.0]])
    >>> fingerprint([examples]), fingerprint([examples.flip(0)])
    (tensor([13.0000, 11.6448]), tensor([13.0000, 11.6448]))
    """
    leaves = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
    # Not every operation is there for sparse and nested tensors.
    tensors = [x for x in leaves if x.layout == torch.strided and not x.is_nested]
    tensors = [x for x in tensors if x.numel()]
    if not tensors:
        return None
    numbers = list[Tensor]()
    for tensor in tensors:
        x = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        x = x.detach().to(x.dtype if x.dtype == torch.float64 else torch.float32)
        total = x.sum(0).flatten() if x.dim() else x.flatten()
        weights = torch.arange(len(total), dtype=x.dtype, device=x.device).cos_()
        numbers += [torch.linalg.vector_norm(x), total @ weights]
    return torch.stack([number.to(numbers[0]) for number in numbers])


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal but for rounding: examples in another order."""
    if one.shape != other.shape:
        return False
    return bool((one.to(other) - other).norm() <= 1e-5 * other.norm())
