"""Spread a list of operations over steps: some now, the others later, each in its turn.

The counterparts of `tf.contrib.kfac`'s `op_queue.OpQueue` and `utils.batch_execute`, for
`FisherEstimator.inv_update_thunks` above all: a step that refreshes one inverse in turn
costs about the same every time, where one that refreshes all of them costs a lot now and
then. Round robin (`batch_execute`) needs no state but the number of the step; a shuffled
queue (`OpQueue`) keeps the order from falling in step with anything else. Left out:
running them in the background or on several machines.

Every inverse has to be there before the first product, so the first refresh is of all:

>>> import torch
>>> from kfac_torch.estimator import FisherEstimator
>>> from kfac_torch.layer_collection import LayerCollection
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
>>> layers = LayerCollection(model)
>>> layers.auto_register_layers()
>>> layers.register_categorical_predictive_distribution()
>>> estimator = FisherEstimator(None, 0.95, 0.1, layers)
>>> thunks = estimator.inv_update_thunks
>>> len(thunks)  # two factors per layer
4
>>> for step in range(8):
...     _ = model(torch.randn(16, 4))  # the estimator watches; your backward goes here
...     bad = estimator.update_covariances()
...     if step == 0:
...         estimator.update_inverses()
...     else:
...         _ = batch_execute(step, thunks, 1)  # one inverse per step

In the same place `OpQueue(thunks).next_op()()` takes them in random order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

Op = TypeVar("Op")
Result = TypeVar("Result")


class OpQueue(Generic[Op]):
    """An endless queue in which every op comes up once per pass, in a new order each.

    Args:
        ops: anything, callables usually; equal ones are ops of their own.
        seed: of the order; None draws one. No global generator is touched.

    Raises:
        ValueError: no ops.

    >>> queue = OpQueue("abc", seed=0)
    >>> passes = ["".join(queue.next_op() for _ in range(3)) for _ in range(2)]
    >>> [sorted(ops) for ops in passes]
    [['a', 'b', 'c'], ['a', 'b', 'c']]
    """

    def __init__(self, ops: Iterable[Op], seed: int | None = None) -> None:
        self.ops = tuple(ops)
        if not self.ops:
            raise ValueError("OpQueue: ops: expected at least one, got none")
        self._random = random.Random(seed)
        self._waiting: list[Op] = []

    def next_op(self) -> Op:
        """Return the next op, without running it."""
        if not self._waiting:
            self._waiting = self._random.sample(self.ops, len(self.ops))
        return self._waiting.pop()


def batch_execute(
    step: int, thunks: Sequence[Callable[[], Result]], batch_size: int
) -> list[Result]:
    """Call exactly `batch_size` of the thunks, round robin over the steps.

    Step s calls numbers `s·batch_size` to `(s + 1)·batch_size − 1`, modulo their number.

    Args:
        step: the number of the step, from 0.
        thunks: callables without arguments, the same and in the same order every step.
        batch_size: from 1 to the number of thunks.

    Returns:
        What they returned, in the order of the calls.

    Raises:
        ValueError: a negative `step`, or a `batch_size` out of range.

    >>> thunks = [lambda: "A", lambda: "B", lambda: "C"]
    >>> [batch_execute(step, thunks, 2) for step in range(3)]
    [['A', 'B'], ['C', 'A'], ['B', 'C']]
    """
    if step < 0:
        raise ValueError(f"batch_execute: step: expected a number >= 0, got {step}")
    if not 1 <= batch_size <= len(thunks):
        raise ValueError(
            "batch_execute: batch_size: expected a number from 1 to that of the thunks, "
            f"got {batch_size} and {len(thunks)} thunks"
        )
    first = step * batch_size
    return [thunks[i % len(thunks)]() for i in range(first, first + batch_size)]
