"""How the benchmarks call K-FAC: the one place where that is decided.

The same on every task, apart from the name of the loss: nothing is set. Tuned K-FAC, which
is shown beside it, has settings from `SPACE`; what is not in there is as where nothing is
set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from rivals import Choice, Rival, Settings
from tasks import Task
from torch import nn

from kfac_torch import KFAC, TrustRegion
from kfac_torch.damping import LevenbergMarquardt, RelativeDamping

UNTUNED, TUNED = "K-FAC", "K-FAC, tuned"

SPACE: Mapping[str, Choice] = MappingProxyType(
    {
        "trust_region": Choice((0.05, 0.1, 0.2, 0.5)),
        "final": Choice((0.02, 0.03, 0.05)),
        "initial_damping": Choice((0.01, 0.1, 1.0)),
        "cov_ema_decay": Choice((0.8, 0.85, 0.9)),
        "invert_every": Choice((3, 6, 12)),
    }
)


def make_kfac(task: Task, model: nn.Module) -> KFAC:
    """Return K-FAC for a model of a task."""
    return KFAC(model, task.kfac_loss)


def make_tuned_kfac(kfac_loss: str, model: nn.Module, settings: Settings) -> KFAC:
    """Return K-FAC with settings from `SPACE`."""
    rule = RelativeDamping().damping
    assert isinstance(rule, LevenbergMarquardt)
    rule = replace(rule, initial=settings["initial_damping"])
    return KFAC(
        model,
        kfac_loss,
        damping=RelativeDamping(rule),
        norm_constraint=TrustRegion(
            fraction=settings["trust_region"], final=settings["final"]
        ),
        cov_ema_decay=settings["cov_ema_decay"],
        invert_every=int(settings["invert_every"]),
    )


def tuned_kfac(task: Task) -> Rival:
    """K-FAC as something to tune, its loss that of a task."""
    return Rival(partial(make_tuned_kfac, task.kfac_loss), lambda kfac_loss: SPACE)
