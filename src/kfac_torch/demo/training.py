"""Train one task with several optimizers side by side, each on its own clock.

The run that has used the least time takes the next step, so that all of them stand at
about the same second and a busy machine slows them alike. The clock runs during a
training step (batch, schedules, forward, backward, step); evaluation is off it. All runs
of a task start from the same weights and see the same batches.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..optimizer import KFAC
from ..report import RunResult
from .tasks import KFAC_FIXED, Settings, Task

_EVALUATION_CASES = 1000  # and how often, where a batch is not all of the data
_EVALUATE_EVERY = 4
_WARM_UP = 0.02  # of the budget, where a setting asks for it
_COSINE_END = 0.05  # of the learning rate


def make_optimizer(
    name: str, model: nn.Module, task: Task, settings: Settings
) -> torch.optim.Optimizer:
    """Return the optimizer called `name` (one of `OPTIMIZERS`) with these settings."""
    lr = settings["lr"]
    if name == "K-FAC":
        momentum, damping = settings["momentum"], settings["damping"]
        fixed: dict[str, Any] = {k: settings.get(k, v) for k, v in KFAC_FIXED.items()}
        return KFAC(
            model, task.kfac_loss, lr=lr, momentum=momentum, damping=damping, **fixed
        )
    if name == "SGD":
        momentum = settings["momentum"]
        return torch.optim.SGD(model.parameters(), lr, momentum=momentum, nesterov=True)
    betas = (settings["beta1"], 0.999)
    return torch.optim.AdamW(model.parameters(), lr, betas=betas, weight_decay=0.0)


def initial_model(task: Task, seed: int) -> nn.Module:
    """Return the task's model as `seed` initialises it; the global generator is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.make_model()


def batches(cases: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches without replacement, epoch after epoch, in an order of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(cases, generator=generator)
        yield from order[: cases - cases % size].split(size)


class Run:
    """One optimizer on one task.

    Args:
        task: what to train.
        optimizer: its name, one of `OPTIMIZERS`.
        settings: of the optimizer.
        seed: of the initial weights and of the batches.
        budget: the steps to take; schedules end with it.
    """

    def __init__(
        self, task: Task, optimizer: str, settings: Settings, seed: int, budget: int
    ) -> None:
        self.task, self.settings, self.budget = task, settings, budget
        self.model = initial_model(task, seed)
        self.optimizer = make_optimizer(optimizer, self.model, task, settings)
        self.result = RunResult(optimizer, settings)
        self.seconds = 0.0
        self._step_seconds: list[float] = []
        cases = len(task.data.x)
        self._batches = batches(cases, min(cases, task.batch_size or cases), seed)

    @property
    def steps(self) -> int:
        """Taken so far."""
        return len(self._step_seconds)

    @property
    def done(self) -> bool:
        """Whether the budget is used up or the loss is not finite."""
        losses = self.result.losses
        diverged = bool(losses) and not math.isfinite(losses[-1])
        return diverged or self.steps >= self.budget

    def step(self) -> None:
        """Take a step on the clock, and note the training loss off it."""
        data, full_batch = self.task.data, self.task.batch_size is None
        if not full_batch and self.steps % _EVALUATE_EVERY == 0:
            self._record(self._evaluate())
        start = time.perf_counter()
        self._schedule()
        x, y = data.x, data.y
        if not full_batch:
            batch = next(self._batches)
            x, y = x[batch], y[batch]
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model, x, y)
        loss.backward()
        self.optimizer.step()
        elapsed = time.perf_counter() - start
        if full_batch:  # the loss before the step
            self._record(loss.item())
        self.seconds += elapsed
        self._step_seconds.append(elapsed)

    def finish(self) -> RunResult:
        """Note what is only known at the end."""
        if not self.result.steps or self.result.steps[-1] < self.steps:
            self._record(self._evaluate())
        self.result.step_ms = 1e3 * statistics.median(self._step_seconds)
        self.result.test = self.task.test(self.model)
        return self.result

    def _schedule(self) -> None:
        progress, group = self.steps / self.budget, self.optimizer.param_groups[0]
        factor = 1.0
        if self.settings.get("warm_up"):
            factor = min(1.0, (self.steps + 1) / max(1.0, _WARM_UP * self.budget))
        if horizon := self.settings.get("cosine"):
            fall = (1 - math.cos(math.pi * min(1.0, progress / horizon))) / 2
            factor *= 1 - (1 - _COSINE_END) * fall
        group["lr"] = self.settings["lr"] * factor
        if "damping_end" in self.settings:
            start, end = self.settings["damping"], self.settings["damping_end"]
            group["damping"] = start * (end / start) ** progress

    @torch.no_grad()
    def _evaluate(self) -> float:
        data = self.task.data
        x, y = data.x[:_EVALUATION_CASES], data.y[:_EVALUATION_CASES]
        return self.task.loss(self.model, x, y).item()

    def _record(self, loss: float) -> None:
        self.result.steps.append(self.steps)
        self.result.seconds.append(self.seconds)
        self.result.losses.append(loss)


def warm_up(runs: list[Run]) -> None:
    """Let torch set itself up, off every clock, by a step of a copy of each run."""
    for run in runs:
        name = run.result.optimizer
        Run(run.task, name, run.settings, seed=0, budget=1).step()


def race(runs: list[Run], on_step: Callable[[Run], None]) -> None:
    """Run all to their ends, always stepping the one that has used the least time."""
    while racing := [run for run in runs if not run.done]:
        run = min(racing, key=lambda run: run.seconds)
        run.step()
        on_step(run)
