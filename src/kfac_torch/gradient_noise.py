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
`negligible`, looked at every tenth step. Left out: the step (`updates.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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

    def seen(self, slope: Tensor) -> GradientNoise:
        """Return what is known with the slope `g₊ᵀδ` along the last step, 0-dim."""
        if self.slope is None or self.expected is None:
            return GradientNoise(negligible=self.negligible)
        size = self.slope.abs()
        part = (slope - self.expected) / torch.where(size > 0, size, torch.inf)
        new = part.nan_to_num(0.0).clamp(0.0, 1.0)
        old = torch.zeros_like(new) if self.fraction is None else self.fraction
        fraction = torch.lerp(new, old, _MEMORY)
        return GradientNoise(fraction, negligible=self.negligible)

    def after(self, slope: Tensor, curvature: Tensor) -> GradientNoise:
        """Return what is known after a step with `gᵀδ` and `δᵀFδ`, 0-dim."""
        return replace(self, slope=slope, expected=slope + curvature)

    def looked_at(self, step: int) -> GradientNoise:
        """Return the same, at some steps with a new look at whether it is negligible."""
        if self.fraction is None or step < _FIRST_LOOK or step % _LOOK_EVERY:
            return self
        return replace(self, negligible=bool(self.fraction < _NEGLIGIBLE))

    def averaged(self, grads: list[Tensor], average: list[Tensor]) -> list[Tensor]:
        """Return `β m + (1 − β) g`, of `m` in `average`; changes nothing."""
        if self.fraction is None:
            return [g.clone() for g in grads]
        share = 1 - self.fraction.clamp(max=_MAX_DECAY)
        return [torch.lerp(m, g, share.to(g)) for m, g in zip(average, grads, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return what restores it."""
        return vars(self).copy()
