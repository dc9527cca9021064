"""λ by steps that are tried on the batch at hand: which one is taken, none is made.

A trial of λ is `Judged`: the inverses are refreshed with it, the step is proposed, the loss
at its end compared with the loss before, and the parameters put back. `settled` follows
the reduction ratio to where λ stays; `best` looks at the change of the loss alone, which
at the first steps tells λs apart where the ratio, of a step that the trust region limits,
may not. Left out: how a trial is done (`optimizer.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from .damping import LevenbergMarquardt
from .trials import Judgement

MAX_ADAPTATIONS = 100  # of λ within one step: from 1 to 1e-8 at .95⁵ takes 72
_TRIAL_FACTOR = 10.0
_WORTH_RISING = 0.1  # of the change of the loss: λ falls by itself, and rises not

Judged: TypeAlias = Callable[[float], "tuple[Judgement | None, float]"]
"""Of λ: what the loss tells of its step, None where that is not finite, and the λ that was
used, a larger one where factors could not be inverted with it."""


def settled(rule: LevenbergMarquardt, damping: float, judged: Judged) -> tuple[float, bool]:
    """Adapt λ until it settles or turns round; the larger one is kept.

    Returns:
        λ, and whether it is where it belongs: not if a step or its ratio is not known.
    """
    last = 0.0
    for _ in range(MAX_ADAPTATIONS):
        found, old = judged(damping)
        if found is None or found.rho is None:
            return old, False
        damping = rule.update(old, found.rho)
        turned = (damping - old) * last < 0
        if turned:
            damping = max(damping, old)
        if damping == old or turned:
            break
        last = damping - old
    return damping, True


def best(rule: LevenbergMarquardt, damping: float, judged: Judged) -> float:
    """Return the λ after whose step the loss is least: of tenths, else of tenfolds.

    From `damping`, taken into the bounds of the rule, by factors of 10 downward as long as
    the loss is less for it; if it never was, upward, as long as the change of the loss is
    better by a tenth of it.

    >>> def judged(damping):
    ...     return Judgement(None, 1.0, True, abs(math.log10(damping) + 2) - 5), damping
    >>> rule = LevenbergMarquardt(initial=1.0)
    >>> [round(best(rule, damping, judged), 9) for damping in (10.0, 0.01, 1e-5)]
    [0.01, 0.01, 0.01]
    """

    def bounded(damping: float) -> float:
        return min(max(damping, rule.min_damping), rule.max_damping)

    def change(damping: float) -> float:
        found, _ = judged(damping)
        if found is None or found.rho is None or math.isnan(found.change):
            return math.inf
        return found.change

    start = chosen = bounded(damping)
    least = change(start)
    for factor in (1 / _TRIAL_FACTOR, _TRIAL_FACTOR):
        while True:
            new = bounded(chosen * factor)
            at_bound = math.isclose(new, chosen, rel_tol=1e-6)
            found = math.inf if at_bound else change(new)
            margin = _WORTH_RISING * abs(least)
            if not found < (least - margin if margin < math.inf and factor > 1 else least):
                break
            chosen, least = new, found
        if chosen != start:
            break
    return chosen
