"""The options of `KFAC`: which values are allowed, and what each default stands for.

Without an `lr` all is automatic: step size and momentum are those of the quadratic model
on part of the batch, a trust region limits the step, and λ adapts, in units of the mean
curvature at the start. With an `lr`, or a momentum type by name, the defaults are the
classic ones. A name stands for the rule of the literature, an object for the automatic
recipe with what it sets, and nothing else, changed. Left out: anything that is done with
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from .damping import LevenbergMarquardt, RelativeDamping, check_damping
from .fisher_factors.base import check_choice

ESTIMATION_MODES = ("gradients", "empirical", "curvature_prop", "exact")
MOMENTUM_TYPES = ("regular", "adam", "qmodel", "qmodel_fixedmu")
MOMENTUM = 0.9
NORM_CONSTRAINT = 1e-3
# Decay of the factors' average, steps between statistics, between refreshes.
_AUTOMATIC = 0.85, 3, 6
_CLASSIC = 0.95, 10, 10
_EARLY_UPDATES = 10
_LARGE = 32 * 2**20  # bytes of layers' outputs that a graph which is kept may have


@dataclass(frozen=True, kw_only=True)
class QModel:
    """The quadratic model of the automatic recipe as a `momentum_type`, with options.

    What is not set is as where no `momentum_type` is given: the other options here, and
    the trust region, the damping and the intervals of `KFAC`. `QModel.exact()` is what the
    names `"qmodel"` and `"qmodel_fixedmu"` stand for.

    Args:
        fixed_momentum: take `momentum` as it is and find the step size alone, as
            `"qmodel_fixedmu"`; False finds both, as `"qmodel"`.
        batch_fraction: of the examples that the products with the Fisher are taken on, in
            (0, 1]; 1 is exact. Every k-th example, `k = 1/batch_fraction` rounded, of
            every tensor the model is called with whose first dimension is the batch,
            from a start that moves on with each step.
        min_terms: loss terms that are left at least, where the batch has so many; k is
            smaller for that.
        max_momentum: the momentum found is from 0 to this; None for no bounds.
        average_gradients: apply the inverse to an average of the gradients, over as many
            steps as their noise asks for (`gradient_noise.py`). Where there is next to
            none, from step 60 on, the model is of the whole batch and the momentum found
            may reach 0.99: then only the noise of such estimates is left.

    Raises:
        ValueError: a value out of range.

    >>> QModel(batch_fraction=0.25).stride(1000)
    4
    >>> QModel(batch_fraction=0.25, min_terms=400).stride(1000)
    2
    """

    fixed_momentum: bool = False
    batch_fraction: float = 0.0625
    min_terms: int = 64
    max_momentum: float | None = 0.95
    average_gradients: bool = True

    @classmethod
    def exact(cls, fixed_momentum: bool = False) -> QModel:
        """Return the model of the whole batch and of the last gradient, with no bounds.

        >>> QModel.exact().stride(1000)
        1
        """
        return cls(
            fixed_momentum=fixed_momentum,
            batch_fraction=1.0,
            min_terms=1,
            max_momentum=None,
            average_gradients=False,
        )

    def __post_init__(self) -> None:
        _check_part("QModel", self.batch_fraction, self.min_terms)
        if self.max_momentum is not None and not self.max_momentum >= 0:
            raise ValueError(
                f"QModel: max_momentum: expected a number >= 0, got {self.max_momentum!r}"
            )

    @property
    def name(self) -> str:
        """The momentum type."""
        return "qmodel_fixedmu" if self.fixed_momentum else "qmodel"

    def stride(self, num_terms: float) -> int:
        """`k`: one example in so many of a batch with `num_terms` loss terms is used."""
        return _stride(self.batch_fraction, self.min_terms, num_terms)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """How statistics are estimated, as an `estimation_mode` with options.

    What is not set is the automatic recipe's; a mode by its name is
    `Statistics.whole(mode)`.

    Args:
        mode: `"gradients"`, `"curvature_prop"`, `"exact"` or `"empirical"`.
        batch_fraction: of the examples that statistics are taken on, in (0, 1]: every
            k-th, `k = 1/batch_fraction` rounded, from a start that moves on. The model
            runs again on these when the step comes, with the same random numbers; the
            first batch counts in full.
        min_terms: loss terms that are left at least, where the batch has so many; k is
            smaller for that.
        rerun_above: size of all layers' outputs in one forward, in bytes, above which the
            model runs again for a whole batch too: its statistics then need no more
            memory than the user's backward, and a forward more.

    Raises:
        ValueError: a value out of range, or in `"empirical"` mode, whose gradients are
            those of the user's own backward, a part of the batch or another forward.

    >>> Statistics(mode="curvature_prop").stride(1000)
    4
    """

    mode: str = "gradients"
    batch_fraction: float = 0.25
    min_terms: int = 128
    rerun_above: float = _LARGE

    @classmethod
    def whole(cls, mode: str = "gradients") -> Statistics:
        """Return those of the whole batch, in the user's own backward.

        >>> Statistics.whole("exact").may_rerun
        False
        """
        return cls(mode=mode, batch_fraction=1.0, min_terms=1, rerun_above=math.inf)

    def __post_init__(self) -> None:
        check_choice("Statistics: mode", self.mode, ESTIMATION_MODES)
        _check_part("Statistics", self.batch_fraction, self.min_terms)
        if not self.rerun_above >= 0:
            raise ValueError(
                "Statistics: rerun_above: expected a number of bytes, 0 or more, got "
                f"{self.rerun_above!r}"
            )
        for name, never in (("batch_fraction", 1), ("rerun_above", math.inf)):
            if self.mode == "empirical" and getattr(self, name) < never:
                raise ValueError(
                    f"Statistics: {name}: expected {never} in the empirical mode, which "
                    "takes the gradients of the user's backward, got "
                    f'{getattr(self, name)!r}; use estimation_mode="empirical"'
                )

    @property
    def may_rerun(self) -> bool:
        """Whether the model may be run again for them."""
        return self.batch_fraction < 1 or self.rerun_above < math.inf

    def stride(self, num_terms: float) -> int:
        """`k`: one example in so many of a batch with `num_terms` loss terms is used."""
        return _stride(self.batch_fraction, self.min_terms, num_terms)


def _check_part(name: str, batch_fraction: float, min_terms: int) -> None:
    check_count(f"{name}: min_terms", min_terms, 1)
    if not 0 < batch_fraction <= 1:
        raise ValueError(
            f"{name}: batch_fraction: expected a number in (0, 1], got {batch_fraction!r}"
        )


def _stride(batch_fraction: float, min_terms: int, num_terms: float) -> int:
    return max(1, min(round(1 / batch_fraction), int(num_terms // min_terms)))


@dataclass(frozen=True, kw_only=True)
class TrustRegion:
    """A limit on the whole step by the exact undamped Fisher: `δᵀFδ <= f · L`.

    From step to step `f` goes from `fraction` to `final`, as
    `f_t = final + (fraction − final) exp(−t/decay_steps)`: the first steps are long ones,
    and the later ones, of gradients that are noise for the greater part, shorter.

    Args:
        fraction: a positive number.
        final: a positive number; None for `fraction`, that is no change.
        decay_steps: how fast; a positive number.
        unit: `L`, in units of the mean loss; None for the loss of the batch itself. Of a
            loss that goes below 0, like that of a normal distribution with a variance of
            its own, it is the part that does not; of any convex loss what a Newton step of
            the network outputs alone would gain, which no offset changes. Where only a
            closure tells the loss, it is the absolute value of that.

    Raises:
        ValueError: a number that is not positive and finite; no limit is a
            `norm_constraint` of None.

    >>> region = TrustRegion(fraction=0.1, final=0.02, decay_steps=10.0)
    >>> [round(region.fraction_at(step), 3) for step in (0, 10, 100)]
    [0.1, 0.049, 0.02]
    """

    fraction: float = 0.1
    final: float | None = None
    decay_steps: float = 20.0
    unit: float | None = None

    def __post_init__(self) -> None:
        for name in ("fraction", "final", "decay_steps", "unit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(
                    f"TrustRegion: {name}: expected a positive, finite number, got "
                    f"{value!r}"
                )

    def fraction_at(self, step: int) -> float:
        """Return `f` at a step, counted from 0."""
        final = self.fraction if self.final is None else self.final
        return final + (self.fraction - final) * math.exp(-step / self.decay_steps)


AbsoluteDamping: TypeAlias = "float | Callable[[int], float] | LevenbergMarquardt"
Damping: TypeAlias = "AbsoluteDamping | RelativeDamping"


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often, and of how much, the curvature is estimated: what each None stands for.

    The first steps change most; statistics are taken at each of them. A fixed step size
    bears older factors than one that the quadratic model finds. Intervals that are not
    given (`free`) are the least there may be: `cost_model.py` lengthens them.

    >>> Pace.resolve(automatic=True)  # doctest: +NORMALIZE_WHITESPACE
    Pace(statistics=Statistics(mode='gradients', batch_fraction=0.25, min_terms=128,
                               rerun_above=33554432),
         cov_ema_decay=0.85, cov_update_every=3, invert_every=6, early_updates=10,
         free=('statistics', 'inverses'))
    >>> Pace.resolve(automatic=True, estimation_mode="exact", cov_update_every=2)
    Pace(statistics=Statistics(mode='exact', batch_fraction=1.0, min_terms=1,
                               rerun_above=inf),
         cov_ema_decay=0.85, cov_update_every=2, invert_every=6, early_updates=0,
         free=('inverses',))
    """

    statistics: Statistics
    cov_ema_decay: float
    cov_update_every: int
    invert_every: Any
    early_updates: int
    free: tuple[str, ...] = ()

    @classmethod
    def resolve(
        cls,
        automatic: bool,
        estimation_mode: str | Statistics | None = None,
        cov_ema_decay: float | None = None,
        cov_update_every: int | None = None,
        invert_every: Any = None,
    ) -> Pace:
        """Return what is meant, defaults filled in.

        Raises:
            ValueError: a mode or an interval that there is not.
        """
        early = _EARLY_UPDATES if cov_update_every is None else 0
        decay, covs, inverses = _AUTOMATIC if automatic else _CLASSIC
        if estimation_mode is None:
            estimation_mode = Statistics()
        elif isinstance(estimation_mode, str):
            check_choice("estimation_mode", estimation_mode, ESTIMATION_MODES)
            estimation_mode = Statistics.whole(estimation_mode)
        covs = covs if cov_update_every is None else cov_update_every
        check_count("cov_update_every", covs, 1)
        invert_every, is_free = with_interval(invert_every, inverses)
        given = {"statistics": cov_update_every is None, "inverses": is_free}
        return cls(
            statistics=estimation_mode,
            cov_ema_decay=decay if cov_ema_decay is None else cov_ema_decay,
            cov_update_every=covs,
            invert_every=invert_every,
            early_updates=early,
            free=tuple(name for name, free in given.items() if free),
        )


def with_interval(invert_every: Any, least: int) -> tuple[Any, bool]:
    """Return an `invert_every` whose interval is known, and whether it was not given.

    >>> with_interval(None, 6), with_interval(4, 6)
    ((6, True), (4, False))
    """
    if invert_every is None:
        return least, True
    if getattr(invert_every, "every", least) is None:  # of a `Refresh`
        return replace(invert_every, every=least), True
    return invert_every, False


@dataclass(frozen=True)
class Chosen:
    """What the arguments of `KFAC` stand for.

    Args:
        momentum_type: see `resolve`.
        damping: see `resolve`.
        trust_region: if any.
        defaults: the options of a param group.
    """

    momentum_type: QModel | str
    damping: Damping
    trust_region: TrustRegion | None
    defaults: dict[str, Any]

    @property
    def kind(self) -> str:
        """The name of the momentum type."""
        chosen = self.momentum_type
        return chosen.name if isinstance(chosen, QModel) else chosen

    @property
    def model(self) -> QModel | None:
        """The quadratic model, if it makes the steps."""
        return self.momentum_type if isinstance(self.momentum_type, QModel) else None


def choose(
    *,
    lr: float | None,
    momentum_type: str | QModel | None,
    damping: Damping | None,
    norm_constraint: float | str | TrustRegion | None,
    **others: Any,
) -> Chosen:
    """Return what is meant, with the options of a param group; `others` are more of them.

    Raises:
        ValueError: see `group_options`.
    """
    kind, damping, limit = resolve(lr, momentum_type, damping, norm_constraint)
    region = limit if isinstance(limit, TrustRegion) else None
    chosen = Chosen(kind, damping, region, {})
    options = group_options(
        momentum_type=chosen.kind, lr=lr, damping=damping, norm_constraint=limit, **others
    )
    return Chosen(kind, damping, region, options)


def is_automatic(lr: float | None, momentum_type: str | QModel | None) -> bool:
    """Return whether what is not set is the automatic recipe's.

    >>> is_automatic(None, None), is_automatic(1.0, QModel()), is_automatic(None, "qmodel")
    (True, True, False)
    """
    return isinstance(momentum_type, QModel) or (momentum_type is None and lr is None)


def resolve(
    lr: float | None,
    momentum_type: str | QModel | None,
    damping: Damping | None,
    norm_constraint: float | str | TrustRegion | None,
) -> tuple[QModel | str, Damping, float | str | TrustRegion | None]:
    """Return the momentum type, damping and limit that are meant, defaults filled in.

    >>> resolve(0.1, None, 1e-2, "auto")
    ('regular', 0.01, 'auto')
    >>> resolve(None, QModel(batch_fraction=0.5), None, "auto")[2]
    TrustRegion(fraction=0.1, final=0.03, decay_steps=20.0, unit=None)
    """
    automatic = is_automatic(lr, momentum_type)
    if momentum_type is None:
        momentum_type = QModel() if automatic else "regular"
    elif momentum_type in ("qmodel", "qmodel_fixedmu"):
        momentum_type = QModel.exact(fixed_momentum=momentum_type == "qmodel_fixedmu")
    if damping is None:
        modelled = isinstance(momentum_type, QModel)
        damping = RelativeDamping() if modelled else RelativeDamping(0.1)
    if automatic and norm_constraint == "auto":
        norm_constraint = TrustRegion(fraction=0.1, final=0.03)
    return momentum_type, damping, norm_constraint


def group_options(
    *,
    momentum_type: str,
    lr: float | None,
    damping: Damping,
    momentum: float | None,
    weight_decay: float,
    norm_constraint: float | str | TrustRegion | None,
) -> dict[str, Any]:
    """Return the options of a param group, defaults filled in.

    Raises:
        ValueError: a value out of range, or one that the momentum type does not take.

    >>> group_options(momentum_type="qmodel", lr=None, damping=0.1, momentum=None,
    ...     weight_decay=0.0, norm_constraint="auto")
    {'lr': None, 'damping': 0.1, 'momentum': 0.0, 'weight_decay': 0.0,
     'norm_constraint': None, 'trust_region': None}
    """
    check_choice("momentum_type", momentum_type, MOMENTUM_TYPES)
    modelled = momentum_type.startswith("qmodel")
    free = momentum_type == "qmodel"
    if momentum is None:
        momentum = 0.0 if free else MOMENTUM
    limit, region = norm_constraint, None
    if isinstance(limit, TrustRegion):
        if not modelled:
            raise ValueError(
                "norm_constraint: TrustRegion: expected a momentum type with the quadratic "
                f"model, which knows the exact norm, got {momentum_type!r}"
            )
        limit, region = None, limit.fraction
    if limit == "auto":
        limit = None if modelled else NORM_CONSTRAINT
    for name, value, good, expected in (
        (
            "lr",
            lr,
            modelled if lr is None else lr >= 0,
            "a number >= 0 or None"
            if modelled
            else 'a number >= 0 (None is for momentum_type="qmodel" and its kin)',
        ),
        ("momentum", momentum, 0 <= momentum < 1, "a number in [0, 1)"),
        (
            "momentum",
            momentum,
            not (free and momentum),
            'None with momentum_type="qmodel", which finds it (or "qmodel_fixedmu")',
        ),
        ("weight_decay", weight_decay, weight_decay >= 0, "a number >= 0"),
        (
            "norm_constraint",
            limit,
            limit is None or (isinstance(limit, float | int) and limit > 0),
            'a positive number or None, a TrustRegion or "auto"',
        ),
    ):
        if not good:
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return {
        "lr": lr,
        "damping": damping_at(damping, 0),
        "momentum": momentum,
        "weight_decay": weight_decay,
        "norm_constraint": limit,
        "trust_region": region,
    }


def damping_at(damping: Damping, step: int) -> float | None:
    """Return λ at a step: of a schedule, of a rule at its start, or the number itself.

    None where it is relative, its unit not known yet.

    Raises:
        ValueError: it is negative or not finite.
    """
    if isinstance(damping, RelativeDamping):
        return None
    if isinstance(damping, LevenbergMarquardt):
        return damping.initial
    return check_damping(damping(step) if callable(damping) else damping)


def check_count(name: str, value: int, at_least: int) -> None:
    """Raise ValueError unless `value` is an integer that is large enough."""
    if not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name}: expected an integer >= {at_least}, got {value!r}")
