"""`Ways`: which way the quadratic model's products go, remembered from step to step.

A way that a model cannot go (`tangents.py` refuses an LSTM or attention by parts, say, and
what works in place) is given up in the middle of it, at every step anew at the cost of
part of a pass. After two steps in a row that went one way the next ones begin with it; a
model may change, or refuse some inputs alone, so every hundredth step tries all. The ways
differ in rounding: what is remembered is of the steps taken, and part of an optimizer's
state, so that a resumed run goes the same ways. Left out: the ways (`quadratic_model.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

RULES, TOGETHER, ALONE = range(3)
"""The ways, the fastest first."""

_IN_A_ROW, _LOOK_EVERY = 2, 100  # steps


@dataclass(frozen=True)
class Ways:
    """Which way the products of the last steps went; a step makes a new one.

    Args:
        last: the way, 0 for rules, 1 for all directions at once, 2 for one each.
        steps: that went it in a row, as far as it matters.

    >>> ways = Ways().after(1)
    >>> ways.first(1), ways.after(1).first(2), ways.after(1).first(100)
    (0, 1, 0)
    """

    last: int = RULES
    steps: int = 0

    def first(self, step: int) -> int:
        """Return the way to begin with at a step, counted from 0."""
        known = self.steps >= _IN_A_ROW and step % _LOOK_EVERY
        return self.last if known else RULES

    def after(self, way: int) -> Ways:
        """Return what is known after a step whose products went a way."""
        return Ways(way, min(self.steps + 1, _IN_A_ROW) if way == self.last else 1)


class Route:
    """The way that the products of a step go.

    Args:
        first: to begin with.

    Attributes:
        way: that the slowest of the forwards went. Of one direction, where rules do not do,
            it is that of all directions at once.
    """

    def __init__(self, first: int = RULES) -> None:
        self.first = self.way = first

    def closed(self, way: int) -> None:
        """See that a forward could not go a way."""
        self.way = max(self.way, way + 1)
