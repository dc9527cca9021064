"""`BatchLoss`: the loss of a step's batch and how it changes, targets unseen.

Notation: `z` the network output, `h` the gradient there that the user's backward brought,
`g` that of the declared loss, a sum over terms; `N` the loss terms, `s` the factor of a
`GradScaler`. Of a loss in its natural parameters, `A(z) − zᵀT(y)`, the gradient
`g = ∇A(z) − T(y)` tells all there is to know of the targets, smoothed labels, weights and
terms that do not count included; so that neither the value nor, at other parameters, the
change needs a closure: `change_from_gradient` of a loss function.

`h = coeff g/N` for a mean over terms. Of several micro-batches the gradients add up to
that of the mean over all, but where the first step has shown that they are means each.
`s` is the power of two by which gradients of a few parameters were divided between their
backward and the step; another factor is a clipped norm, which the loss does not see.
Left out: terms of the user's loss besides the declared ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .forwards import Forward, LossPart
from .loss_functions import LossFunction


class BatchLoss:
    """The losses of the forwards since the last step.

    Args:
        forwards: those that a backward may have reached.
        sums: whether the user's loss is a sum over terms, not a mean.
        factor: of the user's gradient, as the check of the loss found it.
        means_each: whether every forward's gradient is that of a mean of its own.
        scale: `s`, 0-dim, NaN where it is not known; 1 if None.
    """

    def __init__(
        self,
        forwards: Sequence[Forward],
        *,
        sums: bool = False,
        factor: float = 1.0,
        means_each: bool = False,
        scale: Tensor | None = None,
    ) -> None:
        self.forwards = [forward for forward in forwards if forward.arrived]
        self._sums, self._factor = sums, factor
        self._means_each, self.scale = means_each, scale
        counts = zip(*([p.terms for p in f.parts] for f in self.forwards), strict=True)
        self._terms = [sum(terms) for terms in counts]

    def value(self) -> Tensor | None:
        """Return the loss per term, 0-dim; None where the gradient cannot tell."""
        return self._value

    def size(self) -> Tensor | None:
        """Return what `½ δᵀFδ` may be compared with; None where nothing can tell."""
        losses = [part.loss for forward in self.forwards for part in forward.parts]
        if all(loss.size_is_value for loss in losses):
            return self._value
        return self._sum(lambda loss, g, w, _: loss.size_from_gradient(g, w))

    @functools.cached_property
    def _value(self) -> Tensor | None:
        return self._sum(lambda loss, g, w, _: loss.value_from_gradient(g, w))

    def change(self, outputs: Iterable[Sequence[Tensor]]) -> Tensor | None:
        """Return how much the loss changes; None where the gradient cannot tell.

        Args:
            outputs: of every forward, the network output of each loss after the change.
        """
        return self._sum(
            lambda loss, g, w, z: loss.change_from_gradient(z.to(g.dtype), g, w), outputs
        )

    def tells_change(self) -> bool:
        """Whether `change` is not None."""
        here = [[part.loss.inputs for part in forward.parts] for forward in self.forwards]
        return self.change(here) is not None

    def _sum(
        self,
        of: Callable[[LossFunction, Tensor, Tensor | None, Tensor], Tensor | None],
        outputs: Iterable[Sequence[Tensor]] | None = None,
    ) -> Tensor | None:
        total: Tensor | None = None
        new = outputs or [[p.loss.inputs for p in f.parts] for f in self.forwards]
        for forward, zs in zip(self.forwards, new, strict=True):
            for part, terms, z in zip(forward.parts, self._terms, zs, strict=True):
                if part.gradient is None:  # the user's loss does without
                    continue
                terms = part.terms if self._means_each else terms
                g = self._of_declared(part, terms)
                loss = part.factory(part.loss.inputs.to(g.dtype))
                term = of(loss, g, part.weights, z)
                if term is None:
                    return None
                term = term * (self._factor * part.coeff / terms)
                total = term if total is None else total + term.to(total)
        return total

    def _of_declared(self, part: LossPart, terms: float) -> Tensor:
        """`g`, in float32 at least."""
        assert part.gradient is not None
        g = part.gradient.to(torch.promote_types(part.gradient.dtype, torch.float32))
        factor = (1.0 if self._sums else terms) / (part.coeff * self._factor)
        return g * (factor if self.scale is None else factor / self.scale.to(g))
