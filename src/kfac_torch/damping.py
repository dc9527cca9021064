"""Damping: who shares a stored matrix, and how λ is split between Kronecker factors.

Notation: `λ` the damping, in units of the Fisher of the mean loss; `T` the number of
times a layer's weights are used for one loss term; `A [m, m]`, `G [n, n]` the factors of
`F = T · A ⊗ G`; `π` the split of Martens & Grosse 2015 (arXiv 1503.05671), section 6.3:

    F_λ = T · (A + π√(λ/T) I) ⊗ (G + √(λ/T)/π I),   π² = (tr A / m) / (tr G / n)

A damping function is a zero-argument callable, or a plain number. `LevenbergMarquardt`
says how λ follows the reduction ratio of a step (section 6.5 there; `ω` is its factor):

    ρ = (loss(θ + δ) − loss(θ)) / predicted change,   λ ← λ/ω if ρ < ¼,   λω if ρ > ¾

Left out: how a change is predicted (`quadratic_model.py`), and what trials find
(`damping_search.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

DampingFunc: TypeAlias = Callable[[], "Tensor | float"] | float


class PackagedFunc:
    """A damping function with an identity: equal `func_id`s share one stored matrix.

    Args:
        func: returns the damping, a number or a 0-dim tensor.
        func_id: hashable, or a tuple of hashables; callables in it are called each time
            the identity is read.

    >>> PackagedFunc(lambda: 0.1, "weights").func_id
    ('weights',)
    """

    def __init__(
        self, func: Callable[[], Tensor | float], func_id: Hashable | tuple
    ) -> None:
        self._func = func
        self._func_id = func_id if isinstance(func_id, tuple) else (func_id,)

    def __call__(self) -> Tensor | float:
        """Return the damping."""
        return self._func()

    @property
    def func_id(self) -> tuple[Hashable, ...]:
        """The identity, a tuple."""
        return tuple(part() if callable(part) else part for part in self._func_id)


def damping_id(damping_func: DampingFunc) -> Hashable:
    """What two damping functions have in common if they share a stored matrix.

    Raises:
        ValueError: a negative or non-finite number.
        TypeError: neither a number nor a callable.

    >>> damping_id(0.5) == damping_id(0.5)
    True
    >>> damping_id(lambda: 0.5) == damping_id(lambda: 0.5)
    False
    """
    if hasattr(damping_func, "func_id"):
        func_id = damping_func.func_id
        return ("id", *(func_id if isinstance(func_id, tuple) else (func_id,)))
    if callable(damping_func):
        return ("callable", damping_func)
    return ("number", check_damping(damping_func))


def evaluate_damping(damping_func: DampingFunc, name: str) -> Tensor | float:
    """Call the function (or take the number) and check the value where that is free.

    A value on an accelerator is not read back to the host.
    """
    value = damping_func() if callable(damping_func) else damping_func
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value
    if isinstance(value, Tensor) and value.dim():  # one for each of a stack of matrices
        for number in value.flatten().tolist():
            check_damping(number, f"the damping of {name}")
        return value
    check_damping(value, f"the damping of {name}")
    return value


def check_damping(value: Tensor | float, what: str = "damping") -> float:
    """Return `value` as a float, or raise ValueError (TypeError for a non-number)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{what}: expected a non-negative number or a callable that returns one, "
            f"got {value!r}"
        ) from None
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{what}: expected a finite number >= 0, got {number}")
    return number


def normalize_damping(damping: float, num_replications: float) -> float:
    """Return `λ/T`: so that the block `T · (A + …) ⊗ (G + …)` is damped by λ itself."""
    return damping / num_replications


def compute_pi(left_mean: Tensor, right_mean: Tensor) -> Tensor:
    """Return `π`, the root of the ratio of two mean eigenvalues.

    1 where either is 0, or the ratio is not finite: a side that was corrupted does not
    harm the other.

    >>> compute_pi(torch.tensor(4.0), torch.tensor(1.0))
    tensor(2.)
    """
    both = (left_mean > 0) & (right_mean > 0)
    # `where` twice, so that neither branch divides by zero.
    ratio = left_mean / torch.where(both, right_mean, 1)
    return torch.where(both & (ratio > 0) & ratio.isfinite(), ratio, 1.0).sqrt()


def compute_pi_tracenorm(left_cov: Tensor, right_cov: Tensor) -> Tensor:
    """Return `π = sqrt((tr A / m) / (tr G / n))`, 0-dim; 1 where either trace is 0.

    Each side is a matrix `[n, n]`, or a vector `[n]`, the diagonal of one.

    Raises:
        ValueError: a side is neither.

    >>> compute_pi_tracenorm(torch.diag(torch.tensor([1., 2., 0., 1.])), torch.ones(2, 2))
    tensor(1.)
    """
    return compute_pi(_mean_diagonal(left_cov), _mean_diagonal(right_cov))


def _mean_diagonal(cov: Tensor) -> Tensor:
    if cov.dim() not in (1, 2):
        raise ValueError(
            f"pi: expected a matrix [n, n] or a diagonal [n], got shape {tuple(cov.shape)}"
        )
    return (cov if cov.dim() == 1 else cov.diagonal()).mean()


def compute_pi_adjusted_damping(
    left_cov: Tensor, right_cov: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """Return `(π√λ, √λ/π)`: what is added to the diagonals of `A` and of `G`.

    Args:
        left_cov: `A [m, m]`, or its diagonal `[m]`.
        right_cov: `G [n, n]`, or its diagonal `[n]`.
        damping: λ of the product `A ⊗ G` (of a block with weight sharing: `λ/T`).
    """
    pi = compute_pi_tracenorm(left_cov, right_cov)
    root = math.sqrt(damping)
    return pi * root, root / pi


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt:
    """How λ adapts: up where the quadratic model of the loss is bad, down where good.

    Args:
        initial: λ at the start, in units of the Fisher of the mean loss.
        decay: `ω = decay^interval` is the factor of an adaptation, in (0, 1).
        interval: steps between adaptations.
        thresholds: of `ρ`: λ rises below the first and falls above the second.
        min_damping: λ never falls below.
        max_damping: λ never rises above.
        l2_reg: ℓ, where the loss contains `ℓ/2 ‖θ‖²`: curvature that is always there, so
            that `λ + ℓ` damps the preconditioner and the quadratic model.
        include_damping: whether the predicted change contains λ as well (never less
            than ℓ): a step is then judged by the damped model that it minimises.
        calibrate: at the first step, adapt λ on its batch until it settles, and only
            then take the step.
        reject_below: judge every step, and take back one with a `ρ` below this number,
            at most the first threshold, or a loss that is not finite: parameters and what
            steps remember are then bit for bit what they were, and λ rises. The second
            one in a row forgets velocities as well. None takes no step back. Costs an
            evaluation of the loss and a copy of the parameters in every step.
        trial_steps: in so many first steps λ, taken into its bounds, goes down by factors
            of 10 as long as the loss of the batch is less after the step with it, or if it
            never was up, as long as the change of the loss is better by a tenth of it.
            Every trial costs a refresh, a step and an evaluation of the loss; there are
            three in a step, and more where λ is far off.

    Raises:
        ValueError: a value out of range.

    >>> rule = LevenbergMarquardt(initial=1.0, decay=0.5, interval=2)
    >>> [rule.update(1.0, rho) for rho in (0.1, 0.5, 0.9, math.nan)]
    [4.0, 1.0, 0.25, 4.0]
    """

    initial: float
    decay: float = 0.95
    interval: int = 5
    thresholds: tuple[float, float] = (0.25, 0.75)
    min_damping: float = 1e-8
    max_damping: float = math.inf
    l2_reg: float = 0.0
    include_damping: bool = False
    calibrate: bool = False
    reject_below: float | None = None
    trial_steps: int = 0

    def __post_init__(self) -> None:
        check_damping(self.initial, "LevenbergMarquardt: initial")
        check_damping(self.l2_reg, "LevenbergMarquardt: l2_reg")
        low, high = self.thresholds
        for name, good, expected in (
            ("initial", self.initial > 0, "a positive number"),
            ("decay", 0 < self.decay < 1, "a number in (0, 1)"),
            (
                "interval",
                isinstance(self.interval, int) and self.interval >= 1,
                "an integer >= 1",
            ),
            ("thresholds", low <= high, "two numbers in ascending order"),
            (
                "min_damping",
                0 < self.min_damping <= self.max_damping,
                "a positive number <= max_damping",
            ),
            (
                "reject_below",
                self.reject_below is None or self.reject_below <= low,
                f"None or a number <= {low}, below which λ rises",
            ),
            (
                "trial_steps",
                isinstance(self.trial_steps, int) and self.trial_steps >= 0,
                "an integer >= 0",
            ),
        ):
            if not good:
                raise ValueError(
                    f"LevenbergMarquardt: {name}: expected {expected}, got "
                    f"{getattr(self, name)!r}"
                )

    def judges(self, step: int) -> bool:
        """Return whether the change of the loss in a step, counted from 1, is wanted."""
        return self.reject_below is not None or self.adapts(step)

    def adapts(self, step: int) -> bool:
        """Return whether an adaptation follows a step, counted from 1."""
        return step % self.interval == 0

    def rejects(self, rho: float, finite: bool) -> bool:
        """Return whether a step is to be taken back.

        Args:
            rho: its `ρ`; a NaN tells nothing.
            finite: whether the loss after it is.

        >>> rule = LevenbergMarquardt(initial=1.0, reject_below=0.0)
        >>> [rule.rejects(rho, True) for rho in (-0.1, 0.1, math.nan)]
        [True, False, False]
        """
        return self.reject_below is not None and (not finite or rho < self.reject_below)

    def ratio(self, actual: float, predicted: float) -> float:
        """Return `ρ` of the loss's change and the predicted one.

        Inf where the loss fell although a rise was predicted: that is no reason for more
        damping. NaN where either is, or nothing was predicted.
        """
        if actual < 0 < predicted:
            return math.inf
        return actual / predicted if predicted else math.nan

    def update(self, damping: float, rho: float) -> float:
        """Return the next λ; a NaN counts as a bad step."""
        low, high = self.thresholds
        factor = self.decay**self.interval
        if rho > high:
            damping *= factor
        elif not rho >= low:
            damping /= factor
        return min(max(damping, self.min_damping), self.max_damping)

    def every(self, interval: int) -> LevenbergMarquardt:
        """Return the rule with another interval and the same `ω`.

        >>> rule = LevenbergMarquardt(initial=1.0, decay=0.25, interval=2).every(4)
        >>> rule.decay, rule.update(1.0, 0.9)
        (0.5, 0.0625)
        """
        return replace(
            self, interval=interval, decay=self.decay ** (self.interval / interval)
        )

    def times(self, unit: float) -> LevenbergMarquardt:
        """Return the rule with λ and its bounds in another unit; `l2_reg` has its own."""
        return replace(
            self,
            initial=self.initial * unit,
            min_damping=self.min_damping * unit,
            max_damping=self.max_damping * unit,
        )


@dataclass(frozen=True)
class RelativeDamping:
    """λ in units of the mean curvature at the start, so that no problem's scale is in it.

    The unit is `tr F/dim F` of all blocks together, from the factors of the first batch
    (with burn-in, of its batches), and stays what it was: curvature grows in training,
    often by orders of magnitude, while the λ that helps does not.

    Args:
        damping: a number, a callable of the number of steps, or a `LevenbergMarquardt`,
            whose `initial`, `min_damping` and `max_damping` are in that unit then.

    Raises:
        ValueError: a negative number.

    >>> RelativeDamping(0.5).absolute(4.0)
    2.0
    >>> RelativeDamping().absolute(10.0).min_damping
    0.01
    """

    damping: float | Callable[[int], float] | LevenbergMarquardt = field(
        default_factory=lambda: LevenbergMarquardt(
            initial=0.1,
            min_damping=1e-3,
            max_damping=1.0,
            decay=0.85,
            interval=6,
            trial_steps=2,
        )
    )

    def __post_init__(self) -> None:
        if isinstance(self.damping, RelativeDamping):
            raise TypeError("RelativeDamping: expected a damping that is not relative")
        if not callable(self.damping) and not isinstance(self.damping, LevenbergMarquardt):
            check_damping(self.damping, "RelativeDamping")

    def absolute(self, unit: float) -> float | Callable[[int], float] | LevenbergMarquardt:
        """Return the damping in units of the Fisher, given the mean curvature."""
        relative = self.damping
        if isinstance(relative, LevenbergMarquardt):
            return relative.times(unit)
        if callable(relative):
            return lambda step: unit * relative(step)
        return unit * relative
