"""How the benchmarks call K-FAC: the one place where that is decided.

The same settings on every task, apart from the name of the loss. Nothing here may depend on
which task it is.
"""

from __future__ import annotations

from typing import Any

from tasks import Task
from torch import nn

from kfac_torch import KFAC, QModel
from kfac_torch.damping import LevenbergMarquardt


def make_kfac(task: Task, model: nn.Module) -> KFAC:
    """Return K-FAC for a model of a task."""
    optimizer = KFAC(
        model,
        task.kfac_loss,
        momentum_type=QModel(batch_fraction=0.25),
        damping=LevenbergMarquardt(initial=1.0, l2_reg=task.l2),
    )
    for group in optimizer.param_groups[1:]:  # norms and positions, outside of the model
        group["lr"] = 0.03
    return optimizer


def closure_needed(optimizer: Any) -> bool:
    """Whether `step` has to be given a closure: by K-FAC while its damping adapts."""
    return isinstance(optimizer, KFAC)
