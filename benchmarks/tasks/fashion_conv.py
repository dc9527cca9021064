"""T4, T4bn: a small convolutional net on 20 000 images of Fashion-MNIST.

Three 3x3 convolutions (16, 32, 32 channels), each followed by ReLU and 2x2 max pooling
(28, 14, 7, 3), and a linear layer; batches of 512; the loss is watched on the first 2 500.
T4bn has a BatchNorm before each ReLU; its losses are watched with the running statistics.
The target is what AdamW, the best tuned rival, first reaches after 220 steps (190 on T4bn).
It was set after the trials, in which it had been 0.536.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from torch import nn

from .base import Task, categorical_loss, seeded, shuffled_batches
from .data import load_idx

CHANNELS = (1, 16, 32, 32)
TRAIN, EVALUATED = 20_000, 2500


def conv_net(batch_norm: bool) -> nn.Sequential:
    """The net, of images as rows of 784 pixels; torch's own initialisation."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
    for n_in, n_out in itertools.pairwise(CHANNELS):
        layers.append(nn.Conv2d(n_in, n_out, 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(n_out))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(CHANNELS[-1] * 9, 10))


def make_task(data_dir: Path | None = None, batch_norm: bool = False) -> Task:
    """Return T4, or T4bn with BatchNorm.

    Raises:
        DataMissingError: Fashion-MNIST is not at hand.
    """
    x, y = load_idx("fashion-mnist", "train", data_dir, TRAIN)
    return Task(
        name="T4bn" if batch_norm else "T4",
        title="Fashion-MNIST convolutional net" + ", BatchNorm" * batch_norm,
        make_model=seeded(lambda: conv_net(batch_norm)),
        batches=shuffled_batches(x, y, min(512, len(x))),
        loss=categorical_loss,
        kfac_loss="categorical",
        train_cases=(x[:EVALUATED], y[:EVALUATED]),
        test_cases=load_idx("fashion-mnist", "t10k", data_dir),
        test_metric="accuracy",
        target=0.30,
        rival_steps=250,
        kfac_steps=80,
    )
