"""`Refresh` and `RefreshPlan`: which layers' inverses are refreshed at which step.

Notation: `k` the interval (`every`), `b` that of the bases in refreshes (`basis_every`). A
layer has the period `k`, one of EKFAC `k b`; it is due at the steps `s ≡ φ` modulo its
period. The phase `φ` is 0, or, staggered, such that no step has much more work than
another: layers in order of cost, the dearest first, each at the phase at which the fullest
of its steps is the least full (Graham 1969, "Bounds on multiprocessing timing anomalies",
the rule of longest processing time first). The layer is the unit, for its sides share a
split of λ. Left out: what a refresh is (`fisher_factors/refreshing.py`), and how a thread
makes it (`fisher_factors/background.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .fisher_blocks import FisherBlock
from .fisher_factors.background import check_in_background
from .fisher_factors.eigen_scales import EigenScaleFactor
from .options import check_count


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """When inverses are refreshed: an `invert_every` with options.

    The first steps refresh all, whatever the intervals.

    Args:
        every: steps between refreshes of a layer; None for as many as where no
            `invert_every` is given.
        staggered: spread the layers over these steps by cost, so that no step refreshes
            all of them; a layer's turn comes once every so many steps as before. A λ that
            changes is then taken up by each layer at its turn, where else a λ that adapts
            refreshes all at the next step.
        basis_every: of EKFAC's layers, refreshes until one decomposes: 5 is for
            decompositions five times rarer than `every` says. Scales, and λ, act at once in
            the basis that there is.
        basis_tolerance: keep a basis of EKFAC at a refresh while the share of its factor
            beside the diagonal, by norm, is no more than this (0.1, say); None decomposes
            at every refresh. One product of matrices says so, where a decomposition is the
            work of six or more.
        warm_start: at a refresh turn a basis of EKFAC by one step of orthogonal iteration,
            which follows the eigenbasis, in place of a decomposition.
        background: refresh in a thread beside training, and use what it finds exactly so
            many steps later, at most `every`; None refreshes at once. The thread needs a
            core that training leaves it, and the layers are to be on the CPU.
        early: how many the first steps are; None for as many as take statistics whatever
            their interval, ten where that is not given, and for three at least; for three
            where refreshes are so dear that their interval was lengthened.

    Raises:
        ValueError: a count below 1, a tolerance that is no positive number, or a
            `background` above `every`.

    >>> Refresh(every=10, staggered=True, background=3)
    Refresh(every=10, staggered=True, basis_every=1, ..., background=3, ...)
    """

    every: int | None = None
    staggered: bool = False
    basis_every: int = 1
    basis_tolerance: float | None = None
    warm_start: bool = False
    background: int | None = None
    early: int | None = None

    def __post_init__(self) -> None:
        check_count("Refresh: every", 1 if self.every is None else self.every, 1)
        check_count("Refresh: early", 1 if self.early is None else self.early, 1)
        check_count("Refresh: basis_every", self.basis_every, 1)
        tolerance = self.basis_tolerance
        if tolerance is not None and not tolerance > 0:
            raise ValueError(
                "Refresh: basis_tolerance: expected a positive number or None, got "
                f"{tolerance!r}"
            )
        if self.background is not None:
            check_count("Refresh: background", self.background, 1)
            if self.every is not None and self.background > self.every:
                raise ValueError(
                    "Refresh: background: expected at most the steps between two "
                    f"refreshes, every={self.every}, got {self.background}"
                )


def as_refresh(invert_every: int | Refresh) -> Refresh:
    """Return what an optimizer's `invert_every` means.

    Raises:
        ValueError: neither a positive integer nor a `Refresh`.

    >>> as_refresh(0)
    Traceback (most recent call last):
    ValueError: invert_every: expected an integer >= 1, got 0
    """
    if isinstance(invert_every, Refresh):
        return invert_every
    check_count("invert_every", invert_every, 1)
    return Refresh(every=invert_every)


def check_device(invert_every: int | Refresh, model: nn.Module) -> None:
    """Raise NotImplementedError for a thread, and a model that is not on the CPU."""
    if as_refresh(invert_every).background is not None:
        check_in_background({p.device for p in model.parameters()})


class RefreshPlan:
    """The period and the phase of each layer; the same for the same layers and options.

    Args:
        blocks: by layer, with factors.
        options: see `Refresh`; its `every` is known.

    Attributes:
        periods: in steps, by layer.
        phases: from 0, by layer.
        costs: multiply-adds of a refresh, by layer.
        is_uniform: whether all layers are due together.
    """

    def __init__(self, blocks: Mapping[str, FisherBlock], options: Refresh) -> None:
        assert options.every is not None
        self.costs = {
            name: sum(factor.refresh_cost for factor in block.factors)
            for name, block in blocks.items()
        }
        self.periods = {
            name: options.every * (options.basis_every if _has_basis(block) else 1)
            for name, block in blocks.items()
        }
        self.phases = dict.fromkeys(blocks, 0)
        self.is_uniform = not options.staggered and options.basis_every == 1
        if options.staggered:
            self._balance()

    def _balance(self) -> None:
        loads = [0] * max(self.periods.values(), default=1)
        # Sorting is stable: layers of one cost stay in order.
        for name in sorted(self.costs, key=lambda name: -self.costs[name]):
            period = self.periods[name]
            fullest = [max(loads[phase::period]) for phase in range(period)]
            self.phases[name] = fullest.index(min(fullest))
            for step in range(self.phases[name], len(loads), period):
                loads[step] += self.costs[name]

    def due_at(self, step: int) -> list[str]:
        """Return the layers whose turn it is."""
        return [
            name
            for name, period in self.periods.items()
            if step % period == self.phases[name]
        ]

    def cost_at(self, step: int) -> int:
        """Return about how many multiply-adds the refresh of a step takes."""
        return sum(self.costs[name] for name in self.due_at(step))


def set_bases(blocks: Mapping[str, FisherBlock], options: Refresh) -> None:
    """Tell EKFAC's factors which bases to keep, and how to come to others."""
    for block in blocks.values():
        for factor in block.factors:
            if isinstance(factor, EigenScaleFactor):
                factor.tolerance = options.basis_tolerance
                factor.warm_start = options.warm_start


def _has_basis(block: FisherBlock) -> bool:
    """Whether it is a block of EKFAC, with bases, not K-FAC's in its place."""
    return any(isinstance(factor, EigenScaleFactor) for factor in block.factors)
