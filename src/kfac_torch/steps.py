"""`Step` and `StepRecord`: a step that is proposed, and what is known of one that is done.

Left out: how a step is made (`updates.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """What a step did; tensors are left on their device, None is what was not computed.

    Args:
        step: its number, from 0, burn-in steps not counted.
        lr: `η`, or `−α η` of the quadratic model.
        momentum: `μ`, or the one found by the quadratic model.
        damping: λ that was used.
        loss: what the closure returned, per loss term.
        new_loss: the same after the step.
        predicted_change: of the loss, by the quadratic model.
        rho: the change of the loss over the predicted one.
    """

    step: int
    lr: Tensor | float
    momentum: Tensor | float
    damping: float
    loss: Tensor | float | None = None
    new_loss: Tensor | float | None = None
    predicted_change: Tensor | None = None
    rho: float | None = None


@dataclass
class Step:
    """A step that is proposed; nothing has changed yet.

    Args:
        params: what moves.
        deltas: `δ`, by parameter.
        memory: what to remember of the step, by parameter.
        finite: whether there is neither a NaN nor an Inf in it; 0-dim.
        lr: see `StepRecord`.
        momentum: see `StepRecord`.
        predicted_change: see `StepRecord`.
    """

    params: list[Tensor]
    deltas: list[Tensor]
    memory: list[dict[str, Any]]
    finite: Tensor
    lr: Tensor | float
    momentum: Tensor | float
    predicted_change: Tensor | None = None

    def prediction(self) -> Tensor:
        """Return the predicted change, which was asked for."""
        assert self.predicted_change is not None
        return self.predicted_change
