"""`Step` and `StepRecord`: a step that is proposed, and what is known of one that is done.

Left out: how a step is made (`updates.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .gradient_noise import GradientNoise
from .ways import Ways

PHASES = ("statistics", "inverses", "closure", "step")
"""What K-FAC's own time goes to; the user's forward and backward are in none."""


@dataclass(frozen=True)
class StepRecord:
    """What a step did; tensors are left on their device, None is what was not computed.

    Args:
        step: its number, from 0, burn-in steps not counted.
        lr: `η` of the first param group, or `−α η` of the quadratic model.
        momentum: `μ`, or the one found by the quadratic model.
        damping: λ that was used.
        loss: per loss term, before the step: what the closure returned, or what the
            gradient tells, where the quadratic model, an adaptation or a writer wants it.
        new_loss: the same after the step, where λ adapts.
        predicted_change: of the loss, by the quadratic model.
        rho: the change of the loss over the predicted one.
        norm_scale: `κ` of the norm constraint.
        region_scale: what the trust region scaled the step by.
        step_norm: `‖δ‖`, Euclidean, of all parameters.
        gradient_noise: `ν̄`, the part of the steps' slopes that was noise of their batch.
        statistics_age: steps since statistics last entered the factors.
        inverse_age: steps since the inverses were refreshed.
        skipped_steps: how many were left out so far.
        rejected: whether it was taken back: all but λ is as it was before.
        seconds: by phase (`PHASES`), since the last record, of the host's clock.
        pi: `π` of every layer's Kronecker product (of groups the mean), where a writer
            gets the record; None of one without statistics.
    """

    step: int
    lr: Tensor | float
    momentum: Tensor | float
    damping: float
    loss: Tensor | float | None = None
    new_loss: Tensor | float | None = None
    predicted_change: Tensor | None = None
    rho: float | None = None
    norm_scale: Tensor | None = None
    region_scale: Tensor | None = None
    step_norm: Tensor | None = None
    gradient_noise: Tensor | None = None
    statistics_age: int | None = None
    inverse_age: int | None = None
    skipped_steps: int = 0
    rejected: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False)
    pi: Mapping[str, Tensor | None] = field(default_factory=dict)

    @property
    def actual_change(self) -> Tensor | float | None:
        """Of the loss, where both are known."""
        if self.loss is None or self.new_loss is None:
            return None
        return self.new_loss - self.loss


class Clock:
    """Seconds by phase; of phases within each other the innermost counts.

    >>> clock = Clock()
    >>> with clock.phase("step"), clock.phase("inverses"):
    ...     pass
    >>> list(clock.take())
    ['statistics', 'inverses', 'closure', 'step']
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is within as this phase's."""
        self._note()
        self._open.append(name)
        try:
            yield
        finally:
            self._note()
            self._open.pop()

    def _note(self) -> None:
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """Return the seconds so far, and begin again."""
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken


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
        norm_scale: see `StepRecord`.
        region_scale: see `StepRecord`.
        noise: what is known of the gradient's noise, after this step.
        ways: what is known of the quadratic model's ways, after this step.
    """

    params: list[Tensor]
    deltas: list[Tensor]
    memory: list[dict[str, Any]]
    finite: Tensor
    lr: Tensor | float
    momentum: Tensor | float
    predicted_change: Tensor | None = None
    norm_scale: Tensor | None = None
    region_scale: Tensor | None = None
    noise: GradientNoise = field(default_factory=GradientNoise)
    ways: Ways = field(default_factory=Ways)

    def norm(self) -> Tensor:
        """Return `‖δ‖` of all parameters, 0-dim."""
        norms = torch._foreach_norm(self.deltas)
        return torch.stack([norm.to(norms[0]) for norm in norms]).norm()

    def prediction(self) -> Tensor:
        """Return the predicted change, which was asked for."""
        assert self.predicted_change is not None
        return self.predicted_change
