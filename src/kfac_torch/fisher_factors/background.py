"""`BackgroundRefreshes`: inverses that are computed in a thread and come in at a set step.

Notation: `s` the step of the factors that are inverted, `n` the staleness:

    at s        moments, λ and π are copied, and the thread begins
    at s + n    what it has found replaces the old inverses, after a wait if need be

So what is used at a step depends on `n` alone, never on how fast the thread is: two runs
are the same bit for bit, and so is one that is resumed, whose state has the copies, for
the thread to begin again. A factor that fails keeps its last good matrices, and that is
counted at `s + n`. EKFAC's scales go on meanwhile; as they are at `s + n` they are brought
to the new basis. The thread works on copies alone, one more moment and one more inverse.
Left out: factors whose failure would be an error, which are never put off, and
accelerators, which would need a stream for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import torch

from .base import FisherFactor
from .cholesky_batch import Failures
from .refreshing import refresh_inverses

Layers: TypeAlias = Mapping[str, Sequence[FisherFactor]]
"""Factors by layer; those that others are made of come first."""


def check_in_background(devices: Collection[torch.device]) -> None:
    """Raise NotImplementedError unless a thread can work on factors there.

    >>> check_in_background([torch.device("cpu")])
    """
    others = sorted({str(device) for device in devices if device.type != "cpu"})
    if others:
        raise NotImplementedError(
            "Refresh: background: expected all layers on the CPU, whose other cores a "
            f"thread uses, got layers on {', '.join(others)}; leave background at None"
        )


class PendingRefresh:
    """A refresh of some layers that is under way.

    Args:
        layers: whose moments and dampings are copied.
        due: the step at which it comes in.
        max_kept: see `refresh_inverses`.
        states: of earlier copies, by layer, in place of what is current.
    """

    def __init__(
        self,
        layers: Layers,
        due: int,
        max_kept: int,
        states: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self.due = due
        self.layers = {name: list(factors) for name, factors in layers.items()}
        self._max_kept = max_kept
        self._twins: dict[FisherFactor, FisherFactor] = {}
        for name, factors in self.layers.items():
            given = states[name] if states else [None] * len(factors)
            for factor, state in zip(factors, given, strict=True):
                if factor not in self._twins:
                    self._twins[factor] = factor.snapshot(self._twins, state)
        self._future: Future[Failures] | None = None
        self._found: Failures = {}

    def start(self, executor: ThreadPoolExecutor) -> None:
        """Let the thread begin, once it is through with what came before."""
        twins = list(self._twins.values())
        self._future = executor.submit(_refresh, twins, self._max_kept)

    def wait(self) -> None:
        """Wait until all is found.

        Raises:
            Exception: whatever stopped the thread; no failed factorisation does.
        """
        if self._future is not None:
            self._found, self._future = self._future.result(), None

    def finish(self) -> tuple[list[FisherFactor], Failures]:
        """Let the factors have what was found, and count it.

        Returns:
            The factors, and those that kept their last good matrices, with the reason.
        """
        self.wait()
        factors = list(dict.fromkeys(f for some in self.layers.values() for f in some))
        kept: Failures = {}
        for factor in factors:
            twin = self._twins[factor]
            if twin in self._found:
                factor.health.keep()
                kept[factor] = self._found[twin]
            else:
                factor.adopt(twin)
        return factors, kept

    def state_dict(self) -> dict[str, Any]:
        """Return what begins the same refresh again."""
        states = {
            name: [self._twins[factor].snapshot_state() for factor in factors]
            for name, factors in self.layers.items()
        }
        return {"due": self.due, "layers": states}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: all is found first."""
        self.wait()
        return vars(self)


def _refresh(twins: Sequence[FisherFactor], max_kept: int) -> Failures:
    # The thread's own: the caller's `no_grad` ends with the step.
    with torch.no_grad():
        return refresh_inverses(twins, max_kept)


class BackgroundRefreshes:
    """The refreshes that are under way, in one thread; a layer has one at most."""

    def __init__(self) -> None:
        self._pending: tuple[PendingRefresh, ...] = ()
        self._executor: ThreadPoolExecutor | None = None

    @property
    def layers(self) -> set[str]:
        """Those with a refresh under way."""
        return {name for pending in self._pending for name in pending.layers}

    def start(self, layers: Layers, due: int, max_kept: int) -> None:
        """Begin a refresh of layers that have none under way; see `PendingRefresh`.

        Raises:
            NotImplementedError: a layer on an accelerator.
        """
        covs = [f.get_cov_var() for factors in layers.values() for f in factors]
        check_in_background([cov.device for cov in covs if cov is not None])
        self._add(PendingRefresh(layers, due, max_kept))

    def _add(self, *new: PendingRefresh) -> None:
        if new and self._executor is None:
            self._executor = ThreadPoolExecutor(1, "kfac-refresh")
        for pending in new:
            assert self._executor is not None
            pending.start(self._executor)
        self._pending = (*self._pending, *new)

    def is_due(self, step: int) -> bool:
        """Whether a refresh is to come in."""
        return any(pending.due <= step for pending in self._pending)

    def take_due(self, step: int) -> Iterator[PendingRefresh]:
        """Hand over the refreshes that are to come in, the oldest first."""
        for pending in [p for p in self._pending if p.due <= step]:
            self._pending = tuple(p for p in self._pending if p is not pending)
            yield pending

    def drop(self, layers: Collection[str]) -> None:
        """Forget what is under way for some layers, which are refreshed otherwise."""
        for pending in self._pending:
            for name in set(layers) & set(pending.layers):
                del pending.layers[name]
        self._pending = tuple(pending for pending in self._pending if pending.layers)

    def close(self) -> None:
        """End the thread, once all is found; what is due then still comes in."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    # State.

    def state_dict(self) -> list[dict[str, Any]]:
        """Return what begins all of them again."""
        return [pending.state_dict() for pending in self._pending]

    def load_state_dict(
        self, states: Sequence[Mapping[str, Any]], layers: Layers, max_kept: int
    ) -> None:
        """Begin what a state has, in place of what is under way.

        Args:
            states: `state_dict` of others.
            layers: the factors of all layers, whose own state is loaded.
            max_kept: see `refresh_inverses`.
        """
        new = [
            PendingRefresh(
                {name: layers[name] for name in state["layers"]},
                state["due"],
                max_kept,
                state["layers"],
            )
            for state in states
        ]
        self._pending = ()
        self._add(*new)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: no thread, until it begins something."""
        return {**vars(self), "_executor": None}
