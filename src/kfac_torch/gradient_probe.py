"""`GradientProbe`: what a `GradScaler` has multiplied a backward by, read off gradients.

Notation: `s` that factor. A scaler divides the gradients again before the step, and a
clipped norm is a factor too; the two can be told apart, since `s` is a power of two and
large. Left out: what is done with `s` (`batch_loss.py`, `empirical.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

_MAX_CLIPPING = 2.0**-9  # a GradScaler multiplies by more


class GradientProbe:
    """What became of gradients between their backward and the step: of some parameters.

    Args:
        params: the parameters; small ones, of which it is enough that one has a gradient.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> probe = GradientProbe([weight])
    >>> (1024 * weight.sum()).backward()
    >>> weight.grad /= 2048  # a GradScaler and a norm that was clipped
    >>> probe.ratio()
    tensor(0.0005)
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._params = [p for p in params if p.requires_grad]
        self._sums: dict[int, Tensor] = {}
        add = weakref.WeakMethod(self._add)

        def watcher(index: int) -> Callable[[Tensor], None]:
            def hook(grad: Tensor) -> None:
                method = add()
                if method is not None and not torch.is_grad_enabled():
                    method(index, grad.detach())

            return hook

        handles = [p.register_hook(watcher(i)) for i, p in enumerate(self._params)]
        # Also where nobody closes it: parameters outlive their optimizer.
        self._finalizer = weakref.finalize(self, _remove, handles)

    def _add(self, index: int, grad: Tensor) -> None:
        known = self._sums.get(index)
        self._sums[index] = grad.clone() if known is None else known + grad

    def clear(self) -> None:
        """Forget what has come."""
        self._sums.clear()

    def ratio(self) -> Tensor | None:
        """Return the factor, 0-dim; None where no gradient has come."""
        pairs = [
            (brought, kept)
            for index, brought in self._sums.items()
            if (kept := self._params[index].grad) is not None
        ]
        if not pairs:
            return None
        first = pairs[0][0]
        like = first.new_empty((), dtype=torch.promote_types(first.dtype, torch.float32))
        brought, kept = (
            torch.cat([t.flatten().to(like) for t in ts]) for ts in zip(*pairs, strict=True)
        )
        largest = brought.abs().max()
        unit = brought / largest  # whose square does not overflow
        return (kept * unit).sum() / unit.square().sum() / largest

    def scale(self) -> Tensor | None:
        """Return `s`, 0-dim, NaN where it is not known; None where no gradient has come."""
        ratio = self.ratio()
        return None if ratio is None else scale_of(ratio)

    def close(self) -> None:
        """Remove the hooks."""
        self._finalizer()


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def scale_of(ratio: Tensor) -> Tensor:
    """Return `s` from the factor on a gradient since its backward, 0-dim.

    A power of two is a `GradScaler`'s, which is 1 at least: a larger gradient than what was
    brought has more in it, of before. Any other factor is a clipped norm, with a scaler at
    work too where it is very small: then NaN, for the two cannot be told apart.

    >>> scale_of(torch.tensor([1.0, 2.0**-16, 0.3, 1e-5, 2.0]))
    tensor([1.0000e+00, 6.5536e+04, 1.0000e+00,        nan, 1.0000e+00])
    """
    power = ratio.log2()
    exact = (power - power.round()).abs() < 1e-3
    clipped = torch.where(ratio > _MAX_CLIPPING, 1.0, torch.nan)
    return torch.where(exact, torch.exp2(-power.round()).clamp(min=1), clipped)
