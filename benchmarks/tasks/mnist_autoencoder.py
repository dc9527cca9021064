"""T2: the MNIST autoencoder of the lineage at a smaller size.

784-400-200-100-30 and back, tanh, linear code, Bernoulli loss summed over pixels, Glorot's
uniform weights as in the lineage's example, batches of 1 000 of the 60 000 images; the loss
is watched on the first 2 000. A long plateau near 205, the loss of the mean image, comes
first. The target is the best of a grid of AdamW and SGD after 300 steps.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from .base import Task, autoencoder, bernoulli_loss, seeded, shuffled_batches
from .data import load_idx

WIDTHS = (784, 400, 200, 100, 30)
EVALUATED = 2000


def make_task(data_dir: Path | None = None) -> Task:
    """Return the task.

    Raises:
        DataMissingError: MNIST is not at hand.
    """
    x, _ = load_idx("mnist", "train", data_dir)
    x_test, _ = load_idx("mnist", "t10k", data_dir)
    return Task(
        name="T2",
        title="MNIST autoencoder",
        make_model=seeded(lambda: autoencoder(*WIDTHS, init=nn.init.xavier_uniform_)),
        batches=shuffled_batches(x, x, min(1000, len(x))),
        loss=bernoulli_loss,
        kfac_loss="bernoulli",
        train_cases=(x[:EVALUATED], x[:EVALUATED]),
        test_cases=(x_test, x_test),
        test_metric="loss",
        target=143.2,
        rival_steps=300,
        kfac_steps=100,
    )
