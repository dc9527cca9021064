"""`Forwards`: the forwards of a step, whose statistics wait for their backward.

Notation: `z` a network output, `N` its loss terms, `w` their weights. The hook on `z` is
called when a backward has brought the gradient there and not yet gone on: the graph is
whole, and the gradient shows which loss terms count (an `ignore_index`, padded tokens,
class weights), with no target in sight.

A forward waits until then, or until so many newer ones wait that it is taken as it is, so
that forwards without a backward cannot pile up. Left out: what is done with it (the
estimator's business).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .capture import Capture, LayerCall, RootCall
from .loss_collection import LossCollection
from .loss_functions import LossFactory, LossFunction
from .use_count import UseWatch

_MAX_WAITING = 8


@dataclass(eq=False)
class LossPart:
    """One loss of a forward.

    Args:
        loss: the distribution at `z`.
        factory: what made it.
        coeff: of −log p in one of its terms.
        terms: `N`, its terms, or the sum of their weights.
        weights: `w`, to multiply with a gradient at `z`; None where all terms weigh 1.
        gradient: at `z`: all that the user's backward has brought.
    """

    loss: LossFunction
    factory: LossFactory
    coeff: float
    terms: float
    weights: Tensor | None = None
    gradient: Tensor | None = None

    def weigh(self, gradient: Tensor) -> None:
        """See which loss terms count, and how much."""
        found = self.loss.term_weights(gradient)
        if found is not None:
            self.weights, self.terms = found

    @property
    def term_weights(self) -> tuple[Tensor, float] | None:
        """`w` and `N`, where not all terms weigh 1."""
        return None if self.weights is None else (self.weights, self.terms)

    def source(self, sources: Tensor, first_terms: float) -> Tensor:
        """Return `√(coeff w N₁/N)` times sources of this loss.

        Their second moments are then those of a sum over the `N₁` terms of the first loss,
        whatever the number of this one's.
        """
        weighted = sources if self.weights is None else sources * self.weights.sqrt()
        return (self.coeff * first_terms / self.terms) ** 0.5 * weighted


@dataclass(eq=False)
class Forward:
    """A forward of the root module.

    Args:
        parts: its losses.
        root: what the model was given, where that is kept.
        recorded: whether there are statistics to be taken.
        calls: of the layers, until they are used.
        outputs: every `z`, until they are used.
        arrived: whether a backward has reached one.
        cost: multiply-adds of the calls that were recorded.
        rerun: whether it was run again for its statistics, so that its graph is ours.
    """

    parts: list[LossPart]
    root: RootCall | None
    recorded: bool
    calls: list[LayerCall] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    arrived: bool = False
    cost: float = 0.0
    rerun: bool = False

    @property
    def num_terms(self) -> float:
        """`N` of the first loss."""
        return self.parts[0].terms

    @property
    def gradient_share(self) -> float:
        """What a weighted loss's gradient is to be multiplied by: `√coeff/coeff`."""
        # Of several losses the gradients have come together, weights and all.
        return self.parts[0].coeff ** -0.5 if len(self.parts) == 1 else 1.0

    @property
    def has_idle_terms(self) -> bool:
        """Whether some loss terms may not count."""
        return any(part.weights is not None for part in self.parts)


Gather: TypeAlias = "Callable[[Forward, list[LayerCall], list[Tensor]], None]"


class Forwards:
    """Those since the last step.

    Args:
        losses: of the model.
        gather: takes the statistics of a forward, from its calls and network outputs,
            while the graph is whole.
        use_watch: counts uses of parameters where a backward first reaches an output.
        capture: of the model.
    """

    def __init__(
        self,
        losses: LossCollection,
        gather: Gather,
        use_watch: UseWatch,
        capture: Capture,
    ) -> None:
        self._capture = capture
        self._losses = losses
        self._gather = gather
        self._use_watch = use_watch
        self._waiting: list[Forward] = []
        self.arrived: list[Forward] = []

    def add(
        self, output: Any, calls: list[LayerCall] | None, root: RootCall | None
    ) -> None:
        """Let a forward wait for its backward; `calls` is None where none was recorded.

        Raises:
            ValueError: a network output that is not there, or does not fit the loss.
        """
        forward = self._made(output, root, calls is not None)
        if forward is None:
            return
        outputs = [z for _, z in self._losses.network_outputs(output)]
        if calls is not None:
            forward.calls, forward.outputs = calls, outputs
        self._watch(forward, outputs)
        self._waiting.append(forward)
        if len(self._waiting) > _MAX_WAITING:
            self._take(self._waiting[-1 - _MAX_WAITING])

    def _made(self, output: Any, root: RootCall | None, recorded: bool) -> Forward | None:
        """A forward without its calls; None where no output has a gradient."""
        found = self._losses.network_outputs(output)
        if not any(z.requires_grad for _, z in found):
            return None
        parts = []
        for entry, z in found:
            loss = entry.objective.factory(z.detach())
            coeff = entry.objective.coeff(z)
            parts.append(LossPart(loss, entry.objective.factory, coeff, loss.num_terms))
        return Forward(parts, root, recorded)

    def _watch(self, forward: Forward, outputs: list[Tensor]) -> None:
        # The graph holds what its hooks hold: neither may hold the graph.
        known, method = weakref.ref(forward), weakref.WeakMethod(self._arrive)

        def keeper(index: int) -> Callable[[Tensor], None]:
            def keep(gradient: Tensor) -> None:
                one, arrive = known(), method()
                if one is not None and arrive is not None:
                    arrive(one, index, gradient)

            return keep

        for index, z in enumerate(outputs):
            if z.requires_grad:
                z.register_hook(keeper(index))

    def _arrive(self, forward: Forward, index: int, gradient: Tensor) -> None:
        """A backward has reached a network output, and not yet the layers."""
        if self._capture.busy:  # it is our own
            return
        part, first = forward.parts[index], not forward.arrived
        derivative = torch.is_grad_enabled()
        if derivative:
            self._use_watch.see_derivative()
        if not self._use_watch.counted and forward.outputs:
            calls = [call for other in self._waiting for call in other.calls]
            outputs = [z for other in self._waiting for z in other.outputs]
            self._use_watch.see(calls, outputs)
        if first:
            forward.arrived = True
            self._waiting.remove(forward)
            self.arrived.append(forward)
        if not derivative:
            # A gradient that is itself to be differentiated (a penalty on it, say) is not
            # the loss's. Several backwards through one graph add up, as they do in .grad.
            gradient = gradient.detach()
            if first:
                part.weigh(gradient)
            part.gradient = gradient if part.gradient is None else part.gradient + gradient
        if first:
            if forward.root is not None:
                forward.root.arrived = True
                forward.root.weights = [part.term_weights for part in forward.parts]
                forward.root.num_terms = forward.num_terms
            self._take(forward)

    def _take(self, forward: Forward) -> None:
        calls, outputs = forward.calls, forward.outputs
        forward.calls, forward.outputs = [], []
        if not outputs or not forward.num_terms > 0:
            return
        autocast = torch.autocast(outputs[0].device.type, enabled=False)
        clock = self._capture.clock.phase("statistics")
        with clock, torch.no_grad(), autocast, self._capture.own_gradients():
            self._gather(forward, calls, outputs)

    def take_again(
        self,
        output: Any,
        calls: list[LayerCall],
        weights: Sequence[tuple[Tensor, Tensor | float] | None],
    ) -> None:
        """Take the statistics of a forward that was run again, with its loss weights."""
        forward = self._made(output, None, True)
        if forward is None:
            return
        for part, known in zip(forward.parts, weights, strict=False):
            if known is not None:
                part.weights, terms = known
                part.terms = float(terms)
        forward.calls, forward.rerun = calls, True
        forward.outputs = [z for _, z in self._losses.network_outputs(output)]
        self._take(forward)

    def take_rest(self) -> None:
        """Take the forwards that no backward has reached, where none has reached any."""
        waiting, self._waiting = self._waiting, []
        if not self.arrived:
            for forward in waiting:
                self._take(forward)

    def take_arrived(self) -> list[Forward]:
        """Return the forwards that a backward has reached, and forget them."""
        arrived, self.arrived = self.arrived, []
        return arrived


def without_nan(z: Tensor) -> Tensor:
    """Return a network output for the sampling, which a NaN must not stop.

    In float32 at least; -Inf, a mask, becomes the lowest finite number.

    >>> without_nan(torch.tensor([torch.nan, 1.0]))
    tensor([0., 1.])
    """
    safe = z.detach().to(torch.promote_types(z.dtype, torch.float32))
    return safe.nan_to_num(0.0, 0.0, torch.finfo(safe.dtype).min)
