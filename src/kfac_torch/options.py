"""The options of `KFAC`: which values are allowed, and what each default stands for.

A default may depend on the momentum type: the step of the quadratic model needs neither a
learning rate nor a limit. Left out: anything that is done with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from .damping import LevenbergMarquardt, check_damping
from .fisher_factors.base import check_choice

MOMENTUM_TYPES = ("regular", "adam", "qmodel", "qmodel_fixedmu")
MOMENTUM = 0.9
NORM_CONSTRAINT = 1e-3


@dataclass(frozen=True, kw_only=True)
class QModel:
    """The quadratic model as a `momentum_type`, with options.

    Args:
        fixed_momentum: take `momentum` as it is and find the step size alone, as
            `"qmodel_fixedmu"`; False finds both, as `"qmodel"`.
        batch_fraction: of the examples that the products with the Fisher are taken on, in
            (0, 1]; 1 is exact. Every k-th example, `k = 1/batch_fraction` rounded, of
            every tensor the model is called with whose first dimension is the batch,
            from a start that moves on with each step.

    Raises:
        ValueError: `batch_fraction` out of range.

    >>> QModel(batch_fraction=0.25).stride
    4
    """

    fixed_momentum: bool = False
    batch_fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.batch_fraction <= 1:
            raise ValueError(
                "QModel: batch_fraction: expected a number in (0, 1], got "
                f"{self.batch_fraction!r}"
            )

    @property
    def stride(self) -> int:
        """`k`: one example in so many is used."""
        return round(1 / self.batch_fraction)


def name_and_stride(momentum_type: str | QModel) -> tuple[str, int]:
    """Return the name of a momentum type, and one in how many examples its model is of.

    >>> name_and_stride(QModel(fixed_momentum=True)), name_and_stride("adam")
    (('qmodel_fixedmu', 1), ('adam', 1))
    """
    if not isinstance(momentum_type, QModel):
        return momentum_type, 1
    name = "qmodel_fixedmu" if momentum_type.fixed_momentum else "qmodel"
    return name, momentum_type.stride


Damping: TypeAlias = "float | Callable[[int], float] | LevenbergMarquardt"


def group_options(
    *,
    momentum_type: str,
    lr: float | None,
    damping: Damping,
    momentum: float | None,
    weight_decay: float,
    norm_constraint: float | str | None,
) -> dict[str, Any]:
    """Return the options of a param group, defaults filled in.

    Raises:
        ValueError: a value out of range, or one that the momentum type does not take.

    >>> group_options(momentum_type="qmodel", lr=None, damping=0.1, momentum=None,
    ...     weight_decay=0.0, norm_constraint="auto")
    {'lr': None, 'damping': 0.1, 'momentum': 0.0, 'weight_decay': 0.0,
     'norm_constraint': None}
    """
    check_choice("momentum_type", momentum_type, MOMENTUM_TYPES)
    modelled = momentum_type.startswith("qmodel")
    free = momentum_type == "qmodel"
    if momentum is None:
        momentum = 0.0 if free else MOMENTUM
    if norm_constraint == "auto":
        norm_constraint = None if modelled else NORM_CONSTRAINT
    limit = norm_constraint
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
            'a positive number or None, or "auto"',
        ),
    ):
        if not good:
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return {
        "lr": lr,
        "damping": damping_at(damping, 0),
        "momentum": momentum,
        "weight_decay": weight_decay,
        "norm_constraint": norm_constraint,
    }


def damping_at(damping: Damping, step: int) -> float:
    """Return λ at a step: of a schedule, of a rule at its start, or the number itself.

    Raises:
        ValueError: it is negative or not finite.
    """
    if isinstance(damping, LevenbergMarquardt):
        return damping.initial
    return check_damping(damping(step) if callable(damping) else damping)


def check_count(name: str, value: int, at_least: int) -> None:
    """Raise ValueError unless `value` is an integer that is large enough."""
    if not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name}: expected an integer >= {at_least}, got {value!r}")
