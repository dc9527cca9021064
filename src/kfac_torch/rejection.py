"""`Before`: what a step is about to change, so that it can be taken back bit for bit.

A step replaces the entries of a parameter's state and writes into none, so that what it
remembers is held as it is; only the parameters are copied.

Where the step before was taken back too, velocities are forgotten as well: λ has no say in
them, so that on the same batch a velocity that leads uphill would do so for ever, while λ
grows without end. Left out: which steps are taken back (`LevenbergMarquardt.rejects`), and
what becomes of λ then (`optimizer.py`).
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = "MutableMapping[Tensor, dict[str, Any]]"

_VELOCITIES = ("momentum_buffer", "previous_update", "average_gradient")


class Before:
    """Parameters and their state as they were.

    Args:
        params: those that may move.
        state: of an optimizer, by parameter; it may lack some.
        again: whether the step before was taken back.

    >>> p, state = torch.ones(2), {}
    >>> before = Before([p], state)
    >>> _, state[p] = p.mul_(3), {"momentum_buffer": torch.ones(2)}
    >>> before.restore()
    >>> p, state
    (tensor([1., 1.]), {})
    """

    def __init__(self, params: Sequence[Tensor], state: State, again: bool = False) -> None:
        self._params = list(params)
        self._values = [p.detach().clone() for p in params]
        self._state = state
        lost = _VELOCITIES if again else ()
        self._entries = {
            p: {key: value for key, value in state[p].items() if key not in lost}
            for p in params
            if p in state
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Put all of it back; a state that there was none of is gone."""
        torch._foreach_copy_(self._params, self._values)
        for p in self._params:
            if p in self._entries:
                self._state[p] = dict(self._entries[p])
            else:
                self._state.pop(p, None)
