"""A training run of a task: steps on a clock, losses off it.

The clock runs during a step alone (batch, forward, backward, update). It is kept twice: on
the wall, and as the processor time of this process, which on one thread says the same where
the machine is idle and is hardly touched by other processes that wait for the same core.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tasks import Task
from torch import nn


class Run:
    """An optimizer on a task.

    Args:
        task: what to train.
        make_optimizer: of the model.
        seed: of the initial weights and of the order of the batches.
        every: steps between two evaluations.

    Attributes:
        curve: rows of `(steps, wall seconds, processor seconds, training loss)`.
    """

    def __init__(
        self, task: Task, make_optimizer: Callable[[nn.Module], Any], seed: int, every: int
    ) -> None:
        self.task, self.every = task, every
        self.model = task.make_model(seed)
        self.optimizer = make_optimizer(self.model)
        self.batches = task.batches(seed)
        self.steps, self.wall, self.cpu = 0, 0.0, 0.0
        self.curve: list[tuple[int, float, float, float]] = []
        self.failure: str | None = None
        self._record()

    @property
    def loss(self) -> float:
        """The last evaluation."""
        return self.curve[-1][-1]

    @property
    def alive(self) -> bool:
        """Whether it has neither failed nor diverged."""
        bad = 10 * self.curve[0][-1]
        return self.failure is None and math.isfinite(self.loss) and self.loss < bad

    def reached(self, target: float) -> tuple[int, float, float] | None:
        """Steps and both seconds at the first evaluation at or under a target."""
        for steps, wall, cpu, loss in self.curve:
            if loss <= target:
                return steps, wall, cpu
        return None

    def train(self, until: int, seconds: float = math.inf) -> None:
        """Go on until so many steps, so much processor time, or the end of a failed run."""
        while self.alive and self.steps < until and self.cpu < seconds:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                self._step()
            except (RuntimeError, ValueError) as error:
                self.failure = f"{type(error).__name__}: {error}"
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu
            self.steps += 1
            if self.steps % self.every == 0:
                self._record()
        if self.curve[-1][0] < self.steps:
            self._record()

    def _step(self) -> None:
        x, y = next(self.batches)
        self.optimizer.zero_grad()
        self.task.training_loss(self.model, x, y).backward()
        self.optimizer.step()

    def _record(self) -> None:
        loss = self.task.evaluate(self.model)
        self.curve.append((self.steps, round(self.wall, 3), round(self.cpu, 3), loss))


def write_json(path: Path, content: Any) -> None:
    """Write a file that people can read too: a list of numbers is one line."""
    text = json.dumps(content, indent=1)
    text = re.sub(
        r"\[\s+([-+\d.e,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
