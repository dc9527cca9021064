"""`Recorder`: completes the record of a step, and hands it to whoever wants it.

Nothing is read from the device here. Left out: what a record is (`steps.py`), and how it
is written (`telemetry.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .estimator import FisherEstimator
from .fisher_blocks import KroneckerProductFB
from .gradient_probe import GradientProbe
from .options import check_count
from .steps import StepRecord

Writer: TypeAlias = "Callable[[StepRecord], Any]"


_PROBED = 4  # parameters: a layer may be out of use, or dead


def watch_scale(estimator: FisherEstimator) -> None:
    """See what becomes of gradients between backward and step: a `GradScaler`."""
    if estimator.capture.probe is None:
        params = {p for block in estimator.blocks.values() for p in block.params}
        ordered = [p for p in estimator.layers.registered_variables if p in params]
        estimator.capture.probe = GradientProbe(sorted(ordered, key=torch.numel)[:_PROBED])


class Recorder:
    """The writers of an optimizer.

    Args:
        estimator: of the Fisher.
    """

    def __init__(self, estimator: FisherEstimator) -> None:
        self._estimator = estimator
        self._writers: list[tuple[Writer, int]] = []

    def attach(self, writer: Writer, every: int) -> None:
        """Call `writer` with the record of every so many steps.

        Raises:
            ValueError: `every` is not a positive integer.
        """
        check_count("KFAC.attach(): every", every, 1)
        self._writers.append((writer, every))
        self._estimator.capture.keep_losses = True
        watch_scale(self._estimator)

    def is_due(self, step: int) -> bool:
        """Whether the record of a step is going to be written."""
        return any(step % every == 0 for _, every in self._writers)

    def finish(self, record: StepRecord) -> StepRecord:
        """Return the record with all that it lacks, written where that is due."""
        record = replace(record, seconds=self._estimator.capture.clock.take())
        if self.is_due(record.step):
            record = replace(record, pi=self._pi())
        for writer, every in self._writers:
            if record.step % every == 0:
                writer(record)
        return record

    def _pi(self) -> dict[str, Tensor | None]:
        return {
            name: block.pi().mean() if block.has_statistics else None
            for name, block in self._estimator.blocks.items()
            if isinstance(block, KroneckerProductFB)
        }
