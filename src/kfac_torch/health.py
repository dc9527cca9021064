"""`Health`: what went wrong in a run and was mended, in numbers; and its messages.

A run meets batches with a NaN, gradients that overflow, matrices that no Cholesky
factorisation takes. Each is mended where it happens (`estimator.py`, `linalg.py`), counted
here, and logged through `logging.getLogger("kfac_torch")`: the first event of a kind at
WARNING, all others at DEBUG, so that a thousand bad batches make one line and a count.
Left out: what is done about an event, and when.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from .linalg import Rescue

SCALE = "the scale of the user's gradients"
_LEFT_OUT = (
    "KFAC.step(): NaN, Inf or overflow in {}; the step is left out: parameters, velocities "
    "and factors keep their last good values (counted in skipped_steps and health())"
)


@dataclass
class FactorHealth:
    """Counts of one factor.

    Args:
        rejected: updates that were left out because of a NaN or an Inf.
        float64: refreshes in which a matrix needed float64.
        jittered: those in which one needed an addition to its diagonal.
        clamped: those in which one needed its eigenvalues raised.
        kept: those in which no factorisation held, and the last good inverse stayed.
        kept_in_a_row: of these, the ones since the last refresh that did not fail.
        largest_jitter: that was ever added, in units of the factor.
        last_rescues: of the last refresh; not part of the state.
    """

    rejected: int = 0
    float64: int = 0
    jittered: int = 0
    clamped: int = 0
    kept: int = 0
    kept_in_a_row: int = 0
    largest_jitter: float = 0.0
    last_rescues: Sequence[Rescue] = field(default=(), compare=False)

    @property
    def is_clean(self) -> bool:
        """Whether nothing has happened."""
        return self == FactorHealth()

    def counts(self) -> dict[str, Any]:
        """Return what makes the same record again."""
        return {k: v for k, v in vars(self).items() if k != "last_rescues"}

    def refreshed(self, rescues: Sequence[Rescue]) -> None:
        """Count a refresh that ended well, by these rungs of the ladder."""
        rungs = {rescue.rung for rescue in rescues}
        self.float64 += "float64" in rungs
        self.jittered += "jitter" in rungs
        self.clamped += "clamped" in rungs
        self.kept_in_a_row = 0
        self.last_rescues = tuple(rescues)
        jitters = (rescue.jitter for rescue in rescues)
        self.largest_jitter = max(self.largest_jitter, *jitters, 0.0)

    def keep(self) -> None:
        """Count a refresh that left the last good inverse in place."""
        self.kept += 1
        self.kept_in_a_row += 1


class Counted(Protocol):
    """A factor, as far as this module knows it."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def health(self) -> FactorHealth:
        """Its counts."""
        ...


@dataclass(frozen=True)
class Health:
    """What went wrong in a run, and was mended.

    Args:
        bad_gradients: steps left out because of the gradient alone.
        bad_statistics: steps left out because of a NaN or an Inf in the statistics.
        forgotten_steps: backwards whose step never came, as where a `GradScaler` leaves
            one out after an overflow: what was gathered was forgotten by `zero_grad`.
        rejected_steps: steps that were taken back.
        unknown_scales: statistics of the empirical mode that were left out, since it was
            not known what a `GradScaler` had multiplied their gradients by.
        factors: by factor, the counts of those that had any.

    >>> print(Health(bad_gradients=2, factors={"fc.input": FactorHealth(kept=1)}))
    2 steps left out for their gradient, 0 for their statistics; 0 forgotten, 0 taken back
    fc.input: kept 1
    """

    bad_gradients: int = 0
    bad_statistics: int = 0
    forgotten_steps: int = 0
    rejected_steps: int = 0
    unknown_scales: int = 0
    factors: Mapping[str, FactorHealth] = field(default_factory=dict)

    @property
    def skipped_steps(self) -> int:
        """Steps that were left out."""
        return self.bad_gradients + self.bad_statistics

    def __str__(self) -> str:
        lines = [
            f"{self.bad_gradients} steps left out for their gradient, "
            f"{self.bad_statistics} for their statistics; "
            f"{self.forgotten_steps} forgotten, {self.rejected_steps} taken back"
        ]
        if self.unknown_scales:
            lines.append(f"{self.unknown_scales} statistics left out, of unknown scale")
        for name, counts in self.factors.items():
            told = {key: value for key, value in counts.counts().items() if value}
            lines.append(f"{name}: " + ", ".join(f"{k} {v:.3g}" for k, v in told.items()))
        return "\n".join(lines)


class HealthLedger:
    """Count events, and tell of the first of each kind.

    >>> ledger = HealthLedger()
    >>> ledger.forget_step()
    >>> ledger.forgotten_steps
    1
    """

    def __init__(self) -> None:
        self.bad_gradients = 0
        self.bad_statistics = 0
        self.forgotten_steps = 0
        self.rejected_steps = 0
        self.unknown_scales = 0
        self._told: set[str] = set()

    def health(self, factors: Mapping[str, FactorHealth]) -> Health:
        """Return the record, with the counts of the factors."""
        return Health(
            self.bad_gradients,
            self.bad_statistics,
            self.forgotten_steps,
            self.rejected_steps,
            self.unknown_scales,
            {name: replace(c) for name, c in factors.items() if not c.is_clean},
        )

    def skip_step(
        self, where: Sequence[str], stacklevel: int = 2, words: str = _LEFT_OUT
    ) -> None:
        """Count a step that is left out for a NaN or an Inf in these places."""
        gradient = list(where) == ["the gradient"]
        self.bad_gradients += gradient
        self.bad_statistics += not gradient
        self._event(
            "bad gradient" if gradient else "bad statistics",
            words.format(", ".join(where)),
            stacklevel + 1,
        )

    def reject(self, name: str, stacklevel: int = 2) -> None:
        """Tell of an update that a factor has left out and counted."""
        self._event(
            "rejected update",
            f"{name}: the batch has NaN or Inf values, there or at the network output; it "
            "was left out and the last good covariance is kept",
            stacklevel + 1,
        )

    def leave_out_statistics(self, stacklevel: int = 2) -> None:
        """Count statistics that are left out because their scale is not known."""
        self.unknown_scales += 1
        self._event(
            "unknown scale",
            "KFAC.step(): a GradScaler and a clipped norm have both changed the gradients "
            "since their backward, and cannot be told apart: the statistics of the "
            "empirical mode are left out and the factors kept (counted in health()). "
            "Expected one of the two: use norm_constraint= in place of clipping, "
            'bfloat16 without a scaler, or another mode, estimation_mode="gradients"',
            stacklevel + 1,
        )

    def forget_step(self) -> None:
        """Count a backward whose step never came."""
        self.forgotten_steps += 1
        self._event(
            "forgotten step",
            "KFAC.zero_grad(): a backward had no step, as where a GradScaler leaves one "
            "out after an overflow; what was gathered in it is forgotten",
        )

    def reject_step(self, rho: float) -> None:
        """Count a step that is taken back."""
        self.rejected_steps += 1
        self._event(
            "rejected step",
            "KFAC.step(): the loss after the step is not finite, or its reduction ratio "
            f"{rho:.3g} too low; the step is taken back and damping raised (counted in "
            "health())",
        )

    def refreshed(self, factors: Iterable[Counted], kept: Mapping[Any, Exception]) -> None:
        """Tell of the last refresh of some factors, if it took a rescue or failed.

        `kept` has the errors of those that kept their last good inverse.
        """
        for factor in factors:
            self._refreshed(factor.name, factor.health, kept.get(factor))

    def _refreshed(self, name: str, counts: FactorHealth, error: Exception | None) -> None:
        if error is not None:
            self._event(
                "kept",
                f"the last good inverse of {name} is kept, {counts.kept_in_a_row} in a "
                f"row: {error}",
            )
        for rescue in () if error else counts.last_rescues:
            added = f", {rescue.jitter:.3g} more on its diagonal" if rescue.jitter else ""
            self._event(
                rescue.rung,
                f"matrix {name} was singular to working precision; factorised by the rung "
                f"{rescue.rung!r}{added}. A larger damping avoids that",
            )

    def _event(self, kind: str, message: str, warn: int = 0) -> None:
        """Log an event; where it is the first of its kind and `warn > 0`, warn too."""
        first = kind not in self._told
        self._told.add(kind)
        logger = logging.getLogger("kfac_torch")
        logger.log(logging.WARNING if first else logging.DEBUG, "%s", message)
        if first and warn:
            warnings.warn(message, RuntimeWarning, stacklevel=warn + 1)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and of which kinds there was a message."""
        return {**vars(self), "_told": sorted(self._told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        vars(self).update(state)
        self._told = set(state["_told"])
