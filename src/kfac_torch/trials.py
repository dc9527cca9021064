"""`Trial`: the loss of a step's batch, and at other parameters without a trace.

The reduction ratio of Levenberg and Marquardt compares the loss of one batch before and
after a step. The second evaluation has the random numbers of the first (a dropout mask
stays as it was), and leaves gradients, buffers, random state and statistics as it found
them. With a closure it is a call of that; without one the model is run again on what it
was called with, and the gradient at its output stands for the targets (`batch_loss.py`).
Left out: where the parameters are, and what follows from the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batch_loss import BatchLoss
from .capture import random_state, set_random_state, uncompiled
from .damping import LevenbergMarquardt
from .estimator import FisherEstimator
from .gradient_noise import GradientNoise
from .quadratic_model import products
from .rejection import Before
from .replay import rerun
from .steps import Step


@dataclass(frozen=True)
class Judgement:
    """What the loss after a step tells of it.

    Args:
        new_loss: per loss term; None where it is not known.
        rho: the change of the loss over the predicted one; None where that is not known.
        finite: whether the new loss is, or where only its change is known, that.
        change: of the loss; in an unknown unit where `rho` is None.
    """

    new_loss: Tensor | float | None
    rho: float | None
    finite: bool
    change: float


class Trial:
    """The evaluations of one step.

    Args:
        model: the root module.
        estimator: of the Fisher.
        closure: what `step` was given.
        adapts: whether losses are going to be compared.
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: FisherEstimator,
        closure: Callable[[], Any] | None,
        adapts: bool,
    ) -> None:
        self._model = model
        self._estimator = estimator
        self._closure = closure
        self._adapts = adapts
        self._value: Any = None
        self._device = next(model.parameters()).device
        self.batch = BatchLoss([])
        self.step: Step | None = None
        self.noise = GradientNoise()  # as known before it
        self.before: Before | None = None  # where the step may be taken back
        self.num_terms: float = 1

    def first(self) -> Any:
        """Call the closure, if there is one, and return what it returned."""
        if self._closure is None:
            return None
        if self._adapts:
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
    def can_judge(self) -> bool:
        """Whether there is anything to judge a step by."""
        if self._closure is not None:
            return True
        known = [forward.root is not None for forward in self.batch.forwards]
        return bool(known) and all(known)

    @property
    def tells_change(self) -> bool:
        """Whether the loss is one that `judge` knows the change of."""
        return self._closure is not None or self.batch.tells_change()

    @property
    def loss(self) -> Tensor | float | None:
        """What `first` returned, per loss term; None if that is not one number.

        Without a closure the loss that the gradient tells.
        """
        if self._closure is None:
            return self.batch.value()
        one = isinstance(self._value, float) or (
            isinstance(self._value, Tensor) and self._value.numel() == 1
        )
        return check_evaluation(self._value) / self.num_terms if one else None

    def judge(
        self,
        step: Step,
        rule: LevenbergMarquardt,
    ) -> Judgement:
        """Return the loss where a step has led to, and `ρ`; reads the host.

        `ρ` is None where the scale of the gradient is not known, and with it the loss.
        """
        old, predicted_change = self.loss, step.prediction()
        scale: Tensor | float | None = self.batch.scale
        if self._closure is None:
            actual = self._told_change()
            if rule.l2_reg:  # ℓ/2 (‖θ + δ‖² − ‖θ‖²), which the network output knows not
                gram = products([step.params, step.deltas])
                actual = actual + rule.l2_reg * (gram[0, 1] - 0.5 * gram[1, 1]).to(actual)
            new = None if old is None else old + actual
        else:
            assert old is not None
            new = check_evaluation(self._again()) / self.num_terms
            actual, scale = new - old, None
        level = actual if new is None else new
        read = (actual, predicted_change, 1.0 if scale is None else scale, level)
        numbers = torch.stack([torch.as_tensor(x).to(predicted_change) for x in read])
        change, predicted, known, level = numbers.tolist()
        rho = None if math.isnan(known) else rule.ratio(change, predicted)
        return Judgement(new, rho, math.isfinite(level), change)

    def _told_change(self) -> Tensor:
        now = random_state(self._device)
        try:
            with torch.no_grad():
                change = self.batch.change(self._outputs())
        finally:
            set_random_state(now, self._device)
        assert change is not None
        return change

    def _outputs(self) -> Iterator[list[Tensor]]:
        """The network outputs of every forward at the parameters as they are now."""
        for forward in self.batch.forwards:
            call = forward.root
            assert call is not None
            set_random_state(call.random_state, self._device)
            run = rerun(uncompiled(self._model), call.args, call.kwargs)
            with torch.autocast(
                self._device.type, dtype=call.autocast, enabled=call.autocast is not None
            ):
                output = run({})
            yield [z for _, z in self._estimator.layers.network_outputs(output)]

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
