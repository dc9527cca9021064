"""`Trial`: evaluate a closure, and again at other parameters without a trace.

The reduction ratio of Levenberg and Marquardt compares the loss of one batch before and
after a step. The second evaluation has the random numbers of the first (a dropout mask
stays as it was), and leaves gradients, buffers, random state and statistics as it found
them. Left out: where the parameters are, and what follows from the ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .capture import random_state, set_random_state
from .damping import LevenbergMarquardt
from .estimator import FisherEstimator


class Trial:
    """The evaluations of one step.

    Args:
        model: the root module.
        estimator: of the Fisher.
        closure: what `step` was given.
        adapts: whether losses are going to be compared.

    Raises:
        ValueError: they are, and there is no closure.
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: FisherEstimator,
        closure: Callable[[], Any] | None,
        adapts: bool,
    ) -> None:
        if adapts and closure is None:
            raise ValueError(
                "KFAC.step(): damping=LevenbergMarquardt(...) evaluates the loss again "
                "after a step: expected step(closure), with a closure that clears the "
                "gradients, calls the model and backward, and returns the loss; got none"
            )
        self._model = model
        self._estimator = estimator
        self._closure = closure
        self._adapts = adapts
        self._value: Any = None
        self.num_terms: float = 1

    def first(self) -> Any:
        """Call the closure, if there is one, and return what it returned."""
        if self._closure is None:
            return None
        if self._adapts:
            self._device = next(self._model.parameters()).device
            self._random_state = random_state(self._device)
        try:
            with torch.enable_grad():
                self._value = self._closure()
        except BaseException:
            # The closure is called again for the whole batch: what it left is no part.
            self._estimator.reset()
            self._estimator.capture.forwards.clear()
            raise
        if self._adapts:
            check_evaluation(self._value)
        return self._value

    @property
    def loss(self) -> Tensor | float | None:
        """What `first` returned, per loss term; None if that is not one number."""
        one = isinstance(self._value, float) or (
            isinstance(self._value, Tensor) and self._value.numel() == 1
        )
        return check_evaluation(self._value) / self.num_terms if one else None

    def judge(
        self, predicted_change: Tensor, rule: LevenbergMarquardt
    ) -> tuple[Tensor | float, float]:
        """Return the loss at the parameters as they are now, and `ρ`; reads the host."""
        old = self.loss
        assert old is not None
        new = check_evaluation(self._again()) / self.num_terms
        both = torch.stack(
            [torch.as_tensor(x).to(predicted_change) for x in (new - old, predicted_change)]
        )
        actual, predicted = both.tolist()
        return new, rule.ratio(actual, predicted)

    def _again(self) -> Any:
        estimator, capture = self._estimator, self._estimator.capture
        assert self._closure is not None
        params, buffers = list(self._model.parameters()), list(self._model.buffers())
        collecting, keeping = estimator.collecting, capture.keep_forwards
        forwards = capture.forwards  # which zero_grad in the closure takes for used
        grads = [p.grad for p in params]
        copies = [buffer.clone() for buffer in buffers]
        now = random_state(self._device)
        try:
            estimator.collecting = capture.keep_forwards = False
            for p in params:
                p.grad = None  # so that what they had cannot be zeroed in place
            set_random_state(self._random_state, self._device)
            with torch.enable_grad():
                return self._closure()
        finally:
            set_random_state(now, self._device)
            for buffer, copy in zip(buffers, copies, strict=True):
                buffer.copy_(copy)
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            estimator.reset()
            estimator.collecting, capture.keep_forwards = collecting, keeping
            capture.forwards = forwards


def check_evaluation(value: Any) -> Tensor | float:
    """Return what a closure returned as the number that it has to be.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(())
    if isinstance(value, float | int) and not isinstance(value, bool):
        return value
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise TypeError(
        "KFAC.step(): damping=LevenbergMarquardt(...) compares losses: expected the "
        f"closure to return the loss, one number, got {got}"
    )
