"""How the benchmarks call K-FAC: the one place where that is decided.

The same on every task, apart from the name of the loss: nothing is set.
"""

from __future__ import annotations

from tasks import Task
from torch import nn

from kfac_torch import KFAC


def make_kfac(task: Task, model: nn.Module) -> KFAC:
    """Return K-FAC for a model of a task."""
    return KFAC(model, task.kfac_loss)
