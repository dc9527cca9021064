"""T1: the digits autoencoder in full batch.

All 1 797 digits, 64-100-50-25-10-25-50-100-64, tanh, linear code, Bernoulli loss,
weights from `N(0, 1/inputs)`. The target 15.10 is the best of a grid of AdamW and SGD after
2 000 steps.
"""

from __future__ import annotations

from pathlib import Path

from .base import (
    Task,
    autoencoder,
    bernoulli_loss,
    fan_in_normal,
    full_batches,
    seeded,
)
from .data import load_digits

WIDTHS = (64, 100, 50, 25, 10)


def make_task(data_dir: Path | None = None) -> Task:
    """Return the task; the digits need no folder."""
    x, _ = load_digits()
    return Task(
        name="T1",
        title="digits autoencoder, full batch",
        make_model=seeded(lambda: autoencoder(*WIDTHS, init=fan_in_normal)),
        batches=full_batches(x, x),
        loss=bernoulli_loss,
        kfac_loss="bernoulli",
        train_cases=(x, x),
        test_cases=(x, x),  # all digits are trained on
        test_metric="loss",
        target=15.10,
        rival_steps=2000,
        kfac_steps=300,
    )
